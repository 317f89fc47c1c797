"""The side paths of a batch: what a site's hook adds if the rows differ at the site.

the rows are the first axis         ─▶ the route's forms of the site, one after the other
the rows were followed to tokens    ─▶ the route's shares of the site, token by token
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BaseMismatch
from ...sites import Site
from ..rows.batch_axis import DECLARE, BatchAxis
from ..rows.row_layout import RowLayout
from ..sidepaths.shares import Share
from ..sidepaths.side import Sides, widened
from ..sidepaths.token_sum import add_shares
from ..sidepaths.weight_product import WeightProduct
from ..sidepaths.weight_view import FactorPair
from .routed import Route, Spread
from .sum_form import SumForm

__all__ = ["routed_sides"]


def routed_sides(route: Route, axis: BatchAxis) -> Sides:
    """Return the side path of every site of a batch, for rows that lie as ``axis`` says."""
    # The axis is the request's own, so mixed sites get a side path for each request.
    sides = Sides(route.uniform)
    for site in route.mixed:
        sides[site.name] = RoutedSide(route, site, axis)
    return sides


class RoutedSide:
    """One site's side path in a batch whose rows differ there."""

    def __init__(self, route: Route, site: Site, axis: BatchAxis) -> None:
        self._route, self._site, self._axis = route, site, axis
        self._grounds = route.grounds.get(site.name)

    def __call__(self, out: Tensor, x: Tensor, spare: bool, layout: RowLayout | None) -> Tensor:
        axis, site = self._axis, self._site
        if axis.probing:
            axis.note(site, x)
            return out
        if layout is None or not site.is_product:
            return self._by_rows(out, x, spare, axis.spread(site, x, out))
        if layout.is_rows_first:
            # The tokens of a row are adjacent on one axis, so a view gives the rows their axis.
            wide = out.reshape(layout.count, -1, out.shape[-1])
            rows = x.reshape(layout.count, -1, x.shape[-1])
            return self._by_rows(wide, rows, spare, layout.spread).view(out.shape)
        if self._grounds is not None:
            return self._by_rows(out, x, spare, axis.spread(site, x, out))  # or refuses it
        return self._by_tokens(out, x, layout)

    def shares(self, device: torch.device, layout: RowLayout | None) -> list[Share]:
        if layout is None:
            raise BaseMismatch(
                f"{self._site.name}: the rows of the batch can't be followed to its tokens",
                "inputs that are packed, time first or cut into windows can't be routed: activate "
                "one path at a time",
                DECLARE,
            )
        return self._route.shares(self._site, layout.spread, device)

    def _by_rows(self, out: Tensor, x: Tensor, spare: bool, spread: Spread) -> Tensor:
        """Add what the rows owe to an output whose first axis is the rows."""
        dtype = out.dtype
        grounds = self._grounds
        if grounds is not None:
            out, spare = grounds.applied(out, x, spread), False
        tokens = out.numel() // (out.shape[0] * out.shape[self._site.channels])
        for form in self._forms(out, spread, tokens):
            if form.owed.live:
                x = self._route.manner.dropped(x, self._site)
            taken = x
            if form.widens:
                out, taken, spare = widened(out, x, form.owed.dtype, spare)
            # A form returns a tensor of its own, so the next one may write it over.
            out, spare = form.add(out, taken, spare=spare), True
        return out if out.dtype == dtype else out.to(dtype)

    def _forms(self, out: Tensor, spread: Spread, tokens: int) -> list[SumForm]:
        """Return the route's forms, which are looked up once for all calls that are alike."""
        known = self._route.known_forms
        called = self._site.name, spread, tokens, out.get_device()
        forms = known.get(called)
        if forms is None:
            forms = self._route.forms(self._site, spread, tokens, out.device)
            known[called] = forms
        return forms

    def _by_tokens(self, out: Tensor, x: Tensor, layout: RowLayout) -> Tensor:
        """Add what the rows owe to tokens in any order."""
        site = self._site
        product = WeightProduct(
            x,
            down=lambda x, factors: site.down(x, factors.right),
            up=lambda low, factors: site.up(low, factors.left),
        )
        after = add_shares(
            out,
            product,
            self.shares(out.device, layout),
            cut=lambda value, bias: FactorPair(value.B, value.A, bias),
            dropped=lambda x: self._route.manner.dropped(x, site),
            layout=layout,
        )
        assert after is not None  # the layout was given
        return after
