"""One forward of a module that reads weights itself, run so that every torch function is seen.

    W[e], W.mT, W.chunk(2)       the same is done to the factors                  weight_view.py
    linear(x, W[e]), x @ W, …    the factors' product is added to the result      weight_product.py
    x[tokens], x.view(…), …      in a routed batch: where its rows are now        row_layout.py

The base's own numbers come from the base's own calls, so a bare row keeps its bits, and the experts
are grouped as the module groups them (transformers' eager, grouped and batched implementations).

Law: any other function that is given the weight is refused by its name. The row of a token is never
guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakIdKeyDictionary

from ...errors import BaseMismatch, MergedOnly, StateError
from ...sites import Site
from ..rows.batch_axis import DECLARE, BatchAxis
from ..rows.row_functions import followed, function_name
from ..rows.row_layout import RowLayout
from ..unpromised import attention_body
from .readers import Reader
from .shares import Share
from .token_sum import add_shares
from .weight_product import WeightProduct, multiplies, product_of
from .weight_view import WeightView, is_view, views_of

__all__ = ["WatchedForward"]


class WatchedForward(TorchFunctionMode):
    """One forward of one reader.

    Args:
        reader: the module.
        sites: the sites whose weights it reads.
        sides: site → its side path.
        axis: how the rows of a batch lie; None: no batch is routed.
        ran: is called with a site and the result of each product with its weight.
        dropped: an input and a site → the input after the dropout of nodes that train.
    """

    def __init__(
        self,
        reader: Reader,
        sites: Sequence[Site],
        *,
        sides: Mapping[str, Any],
        axis: BatchAxis | None,
        ran: Callable[[Site, Tensor], Tensor],
        dropped: Callable[[Tensor, Site], Tensor],
    ) -> None:
        super().__init__()
        self._reader, self._sites = reader, sites
        self._sides, self._axis = sides, axis
        self._ran, self._dropped = ran, dropped
        self._views: Any = WeakIdKeyDictionary()
        self.layouts: Any = WeakIdKeyDictionary()
        """Tensor → the layout of the rows in it. The keys are weak, so that they keep no tensor
        alive.
        """
        self.paused = False
        self._shares: dict[tuple[str, Any], list[Share]] = {}
        self._records = torch.is_grad_enabled()
        self._unknown: BaseMismatch | None = None
        """The error that says why the rows are not known in the forward's input."""
        self._attention: RowLayout | None = None
        """The layout of the query of the attention that runs now."""

    def begin(self, x: Tensor, axis: BatchAxis) -> None:
        """Note where the rows of the batch are in the forward's first input."""
        if isinstance(self._reader.module, nn.MultiheadAttention):
            return  # `_attend` finds them in the arguments of torch's function
        try:
            spread = axis.rows_of(self._reader, x)
        except BaseMismatch as error:
            self._unknown = error  # raised only if a weight in here needs the rows
            return
        if spread is not None:
            self.layouts[x] = RowLayout.of(x.shape, spread=spread)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func is torch.einsum and len(args) == 2 and isinstance(args[1], Sequence):
            args = (args[0], *args[1])
        views = self._weights(args, kwargs)
        if views:
            return self._with_weight(func, args, kwargs, views)
        out = func(*args, **kwargs)
        if self.layouts:
            followed(self.layouts, func, args, kwargs, out)
        return out

    # ------------------------------------------------------------------ a function of a weight
    def _weights(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, WeightView]:
        """Return the arguments that are weights, or were made of one, by place or keyword."""
        views: dict[Any, WeightView] = {}
        for at, value in (*enumerate(args), *kwargs.items()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                view = self._views.get(tensor)
                for site in self._sites if view is None else ():
                    # Looked up each time: FSDP2 replaces a module's parameters while it runs.
                    if site.weight is tensor:
                        view = WeightView(site)
                if view is not None:
                    views[at] = view
        return views

    def _with_weight(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        views: Mapping[Any, WeightView],
    ) -> Any:
        if func is F.multi_head_attention_forward:
            return self._attend(args, kwargs)
        name = function_name(func)
        (at, view), *others = views.items()
        if not others and isinstance(at, int) and multiplies(name):
            product = product_of(name, func, at, args, kwargs)
            if product is not None:
                return self._multiply(func, args, kwargs, view, product)
        out = func(*args, **kwargs)
        if not _has_tensors(out):
            return out  # the function only asked for its shape, its dtype, …
        made = None
        if not others and at == 0 and is_view(name):
            made = views_of(view, name, args[0], [*args[1:], *kwargs.values()], out)
        if made is None:
            self._refuse(view.site, func)
        for tensor, new_view in made:
            self._views[tensor] = new_view
        return out

    def _multiply(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        view: WeightView,
        product: WeightProduct,
    ) -> Tensor:
        site, x = view.site, product.x
        layout = self._layout(x)
        out: Tensor = func(*args, **kwargs)
        shares = self._shares_at(site, out.device, layout)
        if self._records and not torch.is_grad_enabled() and any(s.live for s in shares):
            raise StateError(
                f"{site.name}: {type(site.module).__name__} multiplies with it where "
                "autograd does not record, so the nodes that train there would get no gradient",
                "choose an implementation in plain torch: "
                'model.base.set_experts_implementation("eager")',
            )
        after = add_shares(
            out,
            product,
            shares,
            cut=view.of,
            dropped=lambda x: self._dropped(x, site),
            layout=layout,
        )
        if after is None:
            raise BaseMismatch(
                f"{site.name}: {type(site.module).__name__} multiplies it with "
                f"{tuple(x.shape)}, and the rows of the batch can't be followed to there",
                "activate one path at a time",
                DECLARE,
            )
        after = self._ran(site, after)
        if layout is not None and product.keeps_axes:
            self.layouts[after] = layout.with_last(after.shape[product.features], product.features)
        return after

    def _shares_at(self, site: Site, device: torch.device, layout: RowLayout | None) -> list[Share]:
        """Return the shares that are added at a site. They are made once for all experts, because
        factors that train would be stacked again each time.
        """
        key = site.name, None if layout is None else layout.spread
        found = self._shares.get(key)
        if found is None:
            side = self._sides[site.name]
            try:
                found = self._shares[key] = side.shares(device, layout)
            except BaseMismatch as error:
                raise self._unknown or error from None
        return found

    def _layout(self, x: Tensor) -> RowLayout | None:
        found: RowLayout | None = self.layouts.get(x)
        if found is None and self._attention is not None and x.ndim == 2:
            # torch's attention joins the axes of tokens and rows into one.
            query = self._attention
            if len(x) == query.axes[0][0].size * query.count:
                found = query.with_last(x.shape[1]).reshape(x.shape)
        return found

    # ------------------------------------------------------------------ torch's attention
    def _attend(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run `F.multi_head_attention_forward` with its products watched. Its inputs are (tokens,
        rows, features), or (tokens, features) of one row.
        """
        body = attention_body()
        if body is None:
            self._refuse(self._sites[0], F.multi_head_attention_forward)
        axis = self._axis
        query = args[0]
        if axis is not None and query.ndim == 3 and axis.is_length(query.shape[1]):
            spread = axis.spread_of(query.shape[1])
            self._attention = RowLayout.of(query.shape, axis=1, spread=spread)
            for x in args[:3]:
                self.layouts[x] = RowLayout.of(x.shape, axis=1, spread=spread)
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self._attention = None

    def with_bare_rows(self, out: Any, forward: Callable[[], Any]) -> Any:
        """Return the output of torch's attention with the bare rows as the base computes them.

        In evaluation the bare base may compute it in one fused call, which gives other bits. torch
        never takes that call while a forward is watched.

        Args:
            out: (attention, weights or None).
            forward: runs the module unwatched.
        """
        module = self._reader.module
        if not isinstance(module, nn.MultiheadAttention) or module.training or not self._shares:
            return out
        owes = None
        for share in itertools.chain.from_iterable(self._shares.values()):
            if share.table is None or share.table.owes is None:
                return out  # no row is bare
            owes = share.table.owes if owes is None else owes | share.table.owes
        assert owes is not None
        attended, weights = out
        bare, bare_weights = forward()
        if not module.batch_first:
            owes = owes.mT
        attended = torch.where(owes[..., None], attended, bare)
        if weights is not None:
            is_bare = ~owes.reshape(-1, *[1] * (weights.ndim - 1))
            weights = torch.where(is_bare, bare_weights, weights)
        return attended, weights

    def _refuse(self, site: Site, func: Any) -> NoReturn:
        module = type(site.module).__name__
        raise MergedOnly(
            f"{site.name}: can't run unmerged: {module} gives it to "
            f"{resolve_name(func) or function_name(func)}, which is no product, so no factors can "
            "be added beside it",
            'use activate(…, mode="merged")',
        )


def _has_tensors(out: Any) -> bool:
    values: Iterable[Any] = out if isinstance(out, (list, tuple)) else (out,)
    return any(isinstance(value, Tensor) for value in values)
