"""Prepared: permanent hooks over buffers of a fixed rank, for a base that is compiled.

A compiled forward keeps the hooks that were there when it was traced, and ignores later ones in silence. So the hooks
are put in once, before, and what they read is rewritten in place:

    y = base(x) + B (c ∘ A x)        A: (max_rank, in), B: (out, max_rank), zeros past the rank in use
                                     c: (rows, max_rank), which columns a row owes; only while a batch is routed

The hook's code is plain tensor work, and all sites are in one mode: one trace while bare, one for a path, one for a
batch of as many rows. From path to path, and from batch to batch of the same size, only numbers change.

What the other side paths have beside that is not here, since it could not be compiled: no watch over sites that never
run, over key/value caches, or over checkpointed backwards; and nodes that train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import BaseMismatch, SpecError, StateError
from ..lowrank import LowRank, stacked
from ..sites import Site
from .arithmetic import exact_mode
from .batch import Batch
from .batch_axis import DECLARE, BatchAxis, in_a_list_of_lists
from .plan import Plan, Terms
from .routed import Route
from .side import check_own, side_dtype, widened
from .upload import uploaded

__all__ = ["Numbers", "Prepared"]

OFF, PATH, ROWS = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Numbers:
    """The numbers that go into the buffers, for one path or for a batch.

    Args:
        of: whose buffers.
        mode: `OFF`, `PATH` or `ROWS`.
        at_site: site → what is written there.
    """

    of: Prepared
    mode: int
    at_site: Mapping[str, _SiteNumbers]

    def install(self) -> None:
        """Make these the numbers that the side paths read."""
        self.of.write(self)


class Prepared:
    """Fixed side paths at some sites of a base.

    Args:
        sites: every site, with the increments that nodes have there; the shapes of these are enough.
        max_rank: columns of every buffer: the largest Σr of a path, or of all the nodes of a batch together.
        dtype: what side paths compute in; None: the widest of the factors' and the weight's own.
    """

    def __init__(
        self, sites: Mapping[Site, Sequence[LowRank]], *, max_rank: int, dtype: torch.dtype | None
    ) -> None:
        if not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1:
            raise SpecError(f"max_rank must be a whole number from 1, got {max_rank!r}")
        made = [
            _Fixed(site, values, max_rank, side_dtype(site, values, dtype))
            for site, values in sites.items()
        ]
        self._fixed = {fixed.site.name: fixed for fixed in made}
        self._handles: list[RemovableHandle] = []
        self.reached: set[str] = set()
        """Nothing that is prepared trains, so no gradient comes back to a node."""
        try:
            for fixed in made:
                hook = fixed.site.module.register_forward_hook(fixed.hook(), with_kwargs=True)
                self._handles.append(hook)
        except BaseException:
            self.forget()
            raise

    permanent = True

    def check(self, plan: Plan) -> None:
        """Check that every site of the plan has buffers, and that nothing of it trains.

        Raises:
            MergedOnly: a site's module is never called.
            StateError: a node was not there when the model was prepared, or trains; names it.
        """
        for name, terms in plan.terms.items():
            site, fixed = plan.sites[name], self._fixed.get(name)
            site.check_mode(terms[0].value, merged=False, node=terms[0].node)
            if (
                fixed is None
                or fixed.site is not site
                or (any(t.value.bias is not None for t in terms) > fixed.biased)
            ):
                raise StateError(
                    f"{terms[0].node}: {name}: nothing was prepared for it; the node or the module came later",
                    "detach, attach the tree again, and prepare it before the base is compiled",
                )
            training = next((term.node for term in terms if term.trains), None)
            if training is not None:
                raise StateError(
                    f"{training}: trains, which a prepared model can't do",
                    "model.trainable() first",
                )

    def lay_out(self, plan: Plan) -> Numbers:
        """Return the numbers of one path or blend; of an empty plan none, and side paths that are off.

        Raises:
            StateError: the path's rank is larger than what was prepared for; names the site.
        """
        if not plan.terms:
            return Numbers(self, OFF, {})
        made = {
            name: fixed.numbers(plan.terms.get(name, ())) for name, fixed in self._fixed.items()
        }
        return Numbers(self, PATH, made)

    def lay_out_rows(self, route: Route, axis: BatchAxis) -> Numbers:
        """Return the numbers of a batch whose rows lie as ``axis`` says.

        Raises:
            SpecError: a strategy that can't be prepared.
            StateError: the nodes of the batch have a larger rank together than what was prepared for; names the site.
        """
        if route.strategy not in ("auto", "matrix"):
            raise SpecError(
                f"a prepared model adds up as 'matrix' does, got strategy {route.strategy!r}"
            )
        made: dict[str, _SiteNumbers] = {}
        for name, fixed in self._fixed.items():
            terms = route.plan.terms.get(name, ())
            rows = route.batch.at([term.node for term in terms]).spread(axis.repeat, axis.tile)
            made[name] = fixed.numbers(terms, rows, batch_first=axis.batch_first)
        return Numbers(self, ROWS, made)

    def write(self, numbers: Numbers) -> None:
        """Rewrite the buffers. All sites are in one mode, active or not: each mode is one trace."""
        if numbers.mode == OFF:
            for fixed in self._fixed.values():
                fixed.mode = OFF
            return
        with torch.no_grad(), torch.inference_mode(False):
            for name, made in numbers.at_site.items():
                self._fixed[name].write(made, numbers.mode)

    def forget(self) -> None:
        """Take the hooks out."""
        while self._handles:
            self._handles.pop().remove()


@dataclass(frozen=True, eq=False)
class _SiteNumbers:
    """What goes into one site's buffers: a value of any rank; and for a batch what each row owes of it."""

    value: LowRank | None
    rows: Tensor | None = None  # (rows, max_rank · groups): coefficients
    bias: Tensor | None = None  # (rows, out)
    uniform: bool = False
    batch_first: bool = False


class _Fixed:
    """One site's buffers."""

    def __init__(
        self, site: Site, values: Sequence[LowRank], max_rank: int, dtype: torch.dtype
    ) -> None:
        self.site, self.dtype, self.max_rank = site, dtype, max_rank
        *batch, out, into = values[0].shape
        device = site.weight.device if site.weight is not None else values[0].device
        self.biased = any(value.bias is not None for value in values)
        with torch.inference_mode(False):
            self.A = torch.zeros(*batch, max_rank, into, dtype=dtype, device=device)
            self.B = torch.zeros(*batch, out, max_rank, dtype=dtype, device=device)
            self.bias = torch.zeros(out * len(self.A) if batch else out, dtype=dtype, device=device)
            self.rows = self.row_bias = self.adapted = torch.zeros(0, device=device)
        self.mode, self.uniform, self.batch_first = OFF, False, False

    def numbers(
        self, terms: Terms, rows: Batch | None = None, *, batch_first: bool = False
    ) -> _SiteNumbers:
        """The numbers for some terms; ``rows``: what each row owes to them, whose coefficients then are 1.

        Raises:
            StateError: their rank is larger than what was prepared for.
        """
        rank = sum(term.value.rank for term in terms)
        if rank > self.max_rank:
            nodes = ", ".join(term.node for term in terms)
            raise StateError(
                f"{self.site.name}: {nodes} have rank {rank} together, and {self.max_rank} was prepared for",
                f"prepare(max_rank={rank}) or more, after attaching anew; or route fewer paths at a time",
            )
        device, values = self.A.device, [term.value.scaled(term.coefficient) for term in terms]
        with exact_mode(device):
            value = stacked(values, dtype=self.dtype, device=device) if values else None
            if rows is None:
                return _SiteNumbers(value)
            owed = rows.coefficients(range(len(rows)))  # (rows, nodes)
            there = uploaded(owed, device)
            column = [i for i, v in enumerate(values) for _ in range(v.rank)]
            wide = torch.nn.functional.pad(owed[:, column], (0, self.max_rank - rank)).repeat(
                1, self._groups
            )
            bias = torch.zeros(len(rows), len(self.bias), dtype=torch.float64, device=device)
            for i, v in enumerate(values):
                if v.bias is not None:
                    bias += there[:, i, None] * (v.bias.to(bias) * v.scale)
            wide = uploaded(wide.to(self.dtype), device)
            return _SiteNumbers(value, wide, bias.to(self.dtype), rows.is_uniform, batch_first)

    def write(self, numbers: _SiteNumbers, mode: int) -> None:
        """Rewrite the buffers in place; those of the rows are made anew only for another number of rows."""
        self.mode, self.uniform, self.batch_first = mode, numbers.uniform, numbers.batch_first
        value, rank = numbers.value, 0 if numbers.value is None else numbers.value.rank
        if value is not None:
            self.A[..., :rank, :].copy_(value.A)
            self.B[..., :rank].copy_(value.B)
        self.A[..., rank:, :].zero_()
        self.B[..., rank:].zero_()
        self.bias.zero_() if value is None or value.bias is None else self.bias.copy_(value.bias)
        if numbers.rows is not None and numbers.bias is not None:
            adapted = (numbers.rows != 0).any(1)
            if self.rows.shape == numbers.rows.shape:
                self.rows.copy_(numbers.rows)
                self.row_bias.copy_(numbers.bias)
                self.adapted.copy_(adapted)
            else:
                self.rows, self.row_bias, self.adapted = numbers.rows, numbers.bias, adapted

    @property
    def _groups(self) -> int:
        return len(self.A) if self.A.ndim == 3 else 1

    def hook(self) -> Callable[..., Any]:
        """The site's forward hook: shapes and tensors only, so that it can be traced."""
        site = self.site

        def side_path(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> Any:
            if self.mode == OFF:
                return None
            check_own(module, site)
            x = args[0] if args else next(iter(kwargs.values()))
            before, taken, _ = widened(out, x, self.dtype, False)
            low = site.down(taken, self.A.to(taken.dtype) if taken.is_floating_point() else self.A)
            bias = self.bias
            if self.mode == ROWS:
                rows, bias, adapted = self._rows_of(x, out)
                owed = site.along_channels(rows.to(low.dtype), low.ndim)
                low = torch.where(owed != 0, low, torch.zeros_like(low)) * owed
            after = site.onto(before, low, self.B.to(low.dtype), scale=1.0, spare=False)
            if self.biased:
                after = after + site.along_channels(bias.to(after.dtype), after.ndim)
            if self.mode == ROWS:
                after = torch.where(adapted.view(-1, *(1 for _ in after.shape[1:])), after, before)
            return after.to(out.dtype)

        return side_path

    def _rows_of(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the rows of an input owe; all the same where its first axis is something else.

        Raises:
            BaseMismatch: the first axis is not the rows, or can't be known to be, and the rows differ here.
        """
        length = len(self.rows)
        fits = x.shape[0] == length and out.shape[0] == length
        others = self.site.token_axes(x)
        if fits and not self.batch_first and others is not None:
            fits = length not in others and (
                len(others) > 0 or not in_a_list_of_lists(self.site.name)
            )
        if fits:
            return self.rows, self.row_bias, self.adapted
        if self.uniform:
            return self.rows[:1], self.row_bias[:1], self.adapted[:1]
        raise BaseMismatch(
            f"{self.site.name}: its input is {tuple(x.shape)}, and the first axis should be {length} rows",
            "where it may be tokens: route(…, batch_first=True) says that the first axis is the rows at every site",
            DECLARE,
        )
