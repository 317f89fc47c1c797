"""Prepared: permanent hooks over buffers of a fixed rank, for a base that is compiled.

A compiled forward keeps the hooks that were there when it was traced, and ignores later ones
without an error. So the hooks are put in once, before the trace, and the buffers that they read are
rewritten in place:

    y = base(x) + B (c ∘ A x)        A: (max_rank, in), B: (out, max_rank), zeros past the rank
                                     c: (rows, max_rank), which columns a row owes; only while a
                                         batch is routed

The hook's code is plain tensor work, and all sites are in one mode: there is one trace while bare,
one for a path, and one for each number of rows of a batch. From path to path, and from batch to
batch of the same size, only numbers change. Where our own kernels run (`prepared_segments.py`) the
buffers hold addresses and index lists, and no rank is fixed.

Prepared models lack everything that can't be compiled: nodes that train, and the watches over sites
that never run, over key/value caches and over checkpointed backwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import MergedOnly, SpecError, StateError, agreeing
from ..lowrank import LowRank, stacked
from ..sites import Site
from ..tree import AdapterTree
from .arithmetic import exact_mode
from .behaviour import RoutedRows
from .binder import Binder
from .finite import check_side_paths
from .hook import Hook
from .plan import PlacedPlan, Plan, Terms, WeightDtypes
from .prepared_segments import OFF, PATH, ROWS, PreparedSegments, SegmentNumbers, covered
from .routing.forms import check_strategy
from .rows.batch import Batch
from .rows.batch_axis import has_rows_first, rows_not_first_error
from .sidepaths.side import raise_for_copy, side_dtype, side_kinds, widened
from .upload import uploaded

__all__ = ["Numbers", "Prepared", "side_path_increments"]


def side_path_increments(tree: AdapterTree, binder: Binder) -> dict[Site, list[LowRank]]:
    """Return every site that may get a side path, with the increments that nodes have there.

    If a node's files were not read yet, its increments are shapes on the meta device.

    Raises:
        BaseMismatch, FormatError: a node does not fit the base, or its files are broken.
    """
    increments: dict[Site, list[LowRank]] = {}
    for path in tree.paths():
        outline = tree.outline(path)
        if outline is None:
            continue
        for name, value in outline.modules.items():
            site = binder.site_for(path, name, value)
            # Some modules read a weight themselves, or run a forward of their own, where a side
            # path would be missed or wrong. Such a node can still be merged.
            if site.why_merged_only is None and not site.reader_names:
                increments.setdefault(site, []).append(value)
    return increments


@dataclass(frozen=True, eq=False)
class Numbers:
    """The numbers that go into the buffers, for one path or for a batch.

    Args:
        of: the owner of the buffers.
        mode: `OFF`, `PATH` or `ROWS`.
        at_site: site → the numbers for its buffers.
        segments: for each device with sites that run kernels, the numbers for their buffers.
    """

    of: Prepared
    mode: int
    at_site: Mapping[str, _SiteNumbers]
    segments: Sequence[SegmentNumbers] = ()

    def install(self) -> None:
        """Make these the numbers that the side paths read."""
        self.of.write(self)


class Prepared:
    """Fixed side paths at some sites of a base.

    Args:
        sites: every site, with the increments that nodes have there; only their shapes are used.
        max_rank: columns of every buffer: the largest Σr of a path, or of all the nodes of a batch
            together; None: every site runs kernels, which need no such buffer.
        dtype: what side paths compute in; None: the widest of the factors' and the weight's own.
        nodes: how many nodes the tree has.
        depth: the number of nodes on its longest lineage.

    Raises:
        SpecError: ``max_rank`` is not a positive whole number, or missing where a site needs it.
    """

    permanent = True

    def __init__(
        self,
        sites: Mapping[Site, Sequence[LowRank]],
        *,
        max_rank: int | None,
        dtype: torch.dtype | None,
        nodes: int,
        depth: int,
    ) -> None:
        if max_rank is not None and (
            not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1
        ):
            raise SpecError(f"max_rank must be a whole number from 1, got {max_rank!r}")
        self._dtype = dtype
        self._finite: weakref.WeakKeyDictionary[Plan, WeightDtypes] = weakref.WeakKeyDictionary()
        """Plan → the dtypes of the weights for which its numbers were found to be finite."""
        self._fixed: dict[str, _Fixed] = {}
        by_device: dict[torch.device, dict[Site, Sequence[LowRank]]] = {}
        dtypes = {}
        for site, values in sites.items():
            dtypes[site.name] = side_dtype(site.weight, values, dtype)
            if covered(site, values, dtypes[site.name]):
                assert site.weight is not None
                by_device.setdefault(site.weight.device, {})[site] = values
            elif max_rank is None:
                raise SpecError(
                    f"{site.name}: prepare needs max_rank: this site runs no kernels, and takes "
                    "buffers of a fixed rank",
                    "pass the largest Σr of a path, or of all nodes of a batch together",
                )
            else:
                self._fixed[site.name] = _Fixed(site, values, max_rank, dtypes[site.name])
        self._segments: list[PreparedSegments] = []
        for device, on_device in by_device.items():
            made = PreparedSegments(on_device, dtypes, nodes=nodes, depth=depth, device=device)
            self._segments.append(made)
        self._sites = {site.name: site for site in sites}
        self._handles: list[RemovableHandle] = []
        self.nothing = Numbers(self, OFF, {})
        """Numbers that turn the side paths off."""
        self.reached: set[str] = set()
        """Always empty: no node trains in a prepared model, so no gradient comes back to one."""
        # Each handle goes into the list at once, so that a failure takes out the hooks already in.
        try:
            hooks: list[tuple[Site, Callable[..., Any]]] = []
            for fixed in self._fixed.values():
                hooks.append((fixed.site, fixed.hook()))
            for segments in self._segments:
                hooks += [
                    (segmented.site, segmented.hook()) for segmented in segments.sites.values()
                ]
            for site, hook in hooks:
                self._handles.append(
                    site.module.register_forward_hook(Hook(hook), with_kwargs=True)
                )
        except BaseException:
            self.forget()
            raise

    def look_ahead(self, placed: PlacedPlan) -> None:
        """Do nothing: the memory of permanent side paths is written to in `lay_out`."""

    def lay_out(self, placed: PlacedPlan) -> Numbers:
        """Check one path or blend, and return its numbers; an empty plan turns the side paths off.

        Raises:
            MergedOnly: a site's module is never called.
            BaseMismatch: a side path would hold a number that is not finite; names the node and the
                module.
            StateError: a node was not there when the model was prepared, or trains; or the path's
                rank is larger than what was prepared for; names the site.
        """
        plan = placed.plan
        if not plan.terms:
            return self.nothing
        self._check(placed, None)
        # Every site gets numbers, zeros if it is not on the path: turning its hook off would be
        # another trace.
        made = {}
        for name, fixed in self._fixed.items():
            made[name] = fixed.numbers(plan.terms.get(name, ()))
        segments = [group.numbers(plan, None) for group in self._segments]
        return Numbers(self, PATH, made, segments)

    def lay_out_rows(self, placed: PlacedPlan, rows: RoutedRows) -> Numbers:
        """Check the nodes of a batch, and return its numbers.

        Raises:
            SpecError: no such strategy, or one that can't be prepared.
            MergedOnly, BaseMismatch, StateError: as `lay_out`, of the nodes of the batch together.
        """
        axis, plan = rows.axis, placed.plan
        check_strategy(rows.strategy)
        if rows.strategy not in ("auto", "matrix", "segmented"):
            raise SpecError(
                "a prepared model chooses by itself how it adds up, "
                f"got strategy {rows.strategy!r}",
                "leave strategy out",
            )
        self._check(placed, rows.batch.largest)
        made: dict[str, _SiteNumbers] = {}
        for name, fixed in self._fixed.items():
            terms = plan.terms.get(name, ())
            nodes = [term.node for term in terms]
            batch = rows.batch.at(nodes).spread(axis.repeat, axis.tile)
            made[name] = fixed.numbers(terms, batch, batch_first=axis.batch_first)
        spread = rows.batch.spread(axis.repeat, axis.tile) if self._segments else rows.batch
        segments = []
        for group in self._segments:
            segments.append(group.numbers(plan, spread, batch_first=axis.batch_first))
        return Numbers(self, ROWS, made, segments)

    def write(self, numbers: Numbers) -> None:
        """Rewrite the buffers, and put all sites into one mode, because each mode is one trace."""
        with torch.no_grad(), torch.inference_mode(False):
            for i, segments in enumerate(self._segments):
                segments.write(None if numbers.mode == OFF else numbers.segments[i])
            if numbers.mode == OFF:
                for fixed in self._fixed.values():
                    fixed.mode = OFF
            for name, made in numbers.at_site.items():
                self._fixed[name].write(made, numbers.mode)

    def forget(self) -> None:
        """Take the hooks out."""
        while self._handles:
            self._handles.pop().remove()

    # ------------------------------------------------------------------ private
    def _check(self, placed: PlacedPlan, largest: Mapping[str, float] | None) -> None:
        """Check that every site of the plan has buffers, that no node of it trains, and that its
        numbers are finite.
        """
        plan = placed.plan
        for name, overrides in plan.overrides.items():
            raise StateError(
                f"{overrides[0].node}: {name}: an override has no buffer in a prepared model, "
                "which holds increments alone",
                'use activate(…, mode="merged"), which works under torch.compile as it is',
            )
        kinds = side_kinds(plan, self._dtype)
        for name, terms in plan.terms.items():
            site = plan.sites[name]
            if site.reader_names:
                raise MergedOnly(
                    f"{terms[0].node}: {name}: can't run in a prepared model: "
                    f"{type(site.module).__name__} reads it itself",
                    'use activate(…, mode="merged")',
                )
            # A module that was replaced since has a new site, and none of our hooks.
            known = self._sites.get(name) is plan.sites[name]
            fixed = self._fixed.get(name)
            biased = fixed is not None and fixed.biased
            if not known or (name in plan.biased and not biased):
                raise StateError(
                    f"{terms[0].node}: {name}: not prepared: the node or the module was added "
                    "after prepare()",
                    "detach, attach the tree again, and prepare it before the base is compiled",
                )
            for term in terms:
                if term.trains:
                    raise StateError(
                        f"{term.node}: trains, which a prepared model can't do",
                        "model.trainable() first",
                    )
        # A row may owe a node more than its full weight. Such a batch is checked each time.
        ordinary = largest is None or max(largest.values(), default=0.0) <= 1.0
        if ordinary and self._finite.get(plan) == placed.dtypes:
            return
        check_side_paths(placed, kinds, largest)
        if ordinary and plan.fixed:
            self._finite[plan] = placed.dtypes


@dataclass(frozen=True, eq=False)
class _SiteNumbers:
    """The numbers for one site's buffers: a value of any rank, and for a batch each row's
    coefficients.

    Args:
        value: the sum of the terms; None: no node changes the site.
        rows: (rows, max_rank · groups): coefficients.
        bias: (rows, out).
        uniform: all rows owe the same.
        batch_first: the caller knows that the first axis is the rows.
    """

    value: LowRank | None
    rows: Tensor | None = None
    bias: Tensor | None = None
    uniform: bool = False
    batch_first: bool = False


class _Fixed:
    """One site's buffers.

    Args:
        site: the site.
        values: the increments that nodes have there.
        max_rank: columns of the buffers.
        dtype: of the buffers.
    """

    def __init__(
        self, site: Site, values: Sequence[LowRank], max_rank: int, dtype: torch.dtype
    ) -> None:
        self.site, self.dtype, self.max_rank = site, dtype, max_rank
        *batch, out, into = values[0].shape
        device = site.weight.device if site.weight is not None else values[0].device
        self.biased = any(value.bias is not None for value in values)
        # Tensors made under the caller's inference_mode could not be rewritten outside of it.
        with torch.inference_mode(False):
            self.A = torch.zeros(*batch, max_rank, into, dtype=dtype, device=device)
            self.B = torch.zeros(*batch, out, max_rank, dtype=dtype, device=device)
            self.bias = torch.zeros(out * len(self.A) if batch else out, dtype=dtype, device=device)
            self.rows = self.row_bias = self.adapted = torch.zeros(0, device=device)
        self.mode, self.uniform, self.batch_first = OFF, False, False

    def numbers(
        self, terms: Terms, rows: Batch | None = None, *, batch_first: bool = False
    ) -> _SiteNumbers:
        """Return the numbers for some terms.

        Args:
            terms: the terms at this site; of a batch, their coefficients are 1.
            rows: what each row owes to the terms' nodes; None: the terms are those of one path.
            batch_first: the caller knows that the first axis is the rows.

        Raises:
            StateError: their rank is larger than what was prepared for.
        """
        rank = sum(term.value.rank for term in terms)
        if rank > self.max_rank:
            nodes = ", ".join(term.node for term in terms)
            have = agreeing(len(terms), f"has rank {rank}", f"have rank {rank} together")
            raise StateError(
                f"{self.site.name}: {nodes} {have}, and the model was prepared for at most "
                f"{self.max_rank}",
                f"detach, attach again, and prepare(max_rank={rank}) or more; or route fewer paths "
                "at a time",
            )
        device, values = self.A.device, [term.scaled for term in terms]
        with exact_mode(device):
            value = stacked(values, dtype=self.dtype, device=device) if values else None
            if rows is None:
                return _SiteNumbers(value)
            owed = rows.coefficients(range(len(rows)))  # (rows, nodes)
            column: list[int] = []
            for i, increment in enumerate(values):
                column += [i] * increment.rank
            # A node's coefficient is repeated for each of the node's ranks, and that row of
            # coefficients for each group.
            wide = torch.nn.functional.pad(owed[:, column], (0, self.max_rank - rank))
            wide = uploaded(wide.repeat(1, self._groups).to(self.dtype), device)
            bias = self._biases(values, uploaded(owed, device)).to(self.dtype)
            return _SiteNumbers(value, wide, bias, rows.is_uniform, batch_first)

    def _biases(self, values: Sequence[LowRank], owed: Tensor) -> Tensor:
        """Return the bias that each row is given, (rows, out), in fp64."""
        bias = torch.zeros(len(owed), len(self.bias), dtype=torch.float64, device=owed.device)
        for i, value in enumerate(values):
            if value.bias is not None:
                bias += owed[:, i, None] * (value.bias.to(bias) * value.scale)
        return bias

    def write(self, numbers: _SiteNumbers, mode: int) -> None:
        """Rewrite the buffers in place. Those of the rows are replaced if the number of rows is
        another.
        """
        self.mode, self.uniform, self.batch_first = mode, numbers.uniform, numbers.batch_first
        value, rank = numbers.value, 0 if numbers.value is None else numbers.value.rank
        if value is not None:
            self.A[..., :rank, :].copy_(value.A)
            self.B[..., :rank].copy_(value.B)
        # An earlier path of a larger rank has left numbers beyond this one's rank.
        self.A[..., rank:, :].zero_()
        self.B[..., rank:].zero_()
        if value is None or value.bias is None:
            self.bias.zero_()
        else:
            self.bias.copy_(value.bias)
        if numbers.rows is not None and numbers.bias is not None:
            adapted = (numbers.rows != 0).any(1)
            # In place, so that a traced forward finds them where they were. Another number of rows
            # is another trace.
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
        """Return the site's forward hook: shapes and tensors only, so that it can be traced."""
        site = self.site

        def side_path(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> Any:
            if self.mode == OFF:
                return None
            if module is not site.module:
                raise_for_copy(module, site.name)
            x = args[0] if args else next(iter(kwargs.values()))
            before, taken, _ = widened(out, x, self.dtype, False)
            A = self.A.to(taken.dtype) if taken.is_floating_point() else self.A
            low = site.down(taken, A)
            bias = self.bias
            if self.mode == ROWS:
                rows, bias, adapted = self._rows_of(x, out)
                owed = site.along_channels(rows.to(low.dtype), low.ndim)
                # Masked, not multiplied by zero: another path's factor may have overflowed, and 0 ·
                # inf is NaN.
                low = torch.where(owed != 0, low, torch.zeros_like(low)) * owed
            after = site.onto(before, low, self.B.to(low.dtype), scale=1.0, spare=False)
            if self.biased:
                after = after + site.along_channels(bias.to(after.dtype), after.ndim)
            if self.mode == ROWS:
                # A bare row keeps its bits: −0 + 0 would be +0.
                is_adapted = adapted.view(-1, *[1] * (after.ndim - 1))
                after = torch.where(is_adapted, after, before)
            return after.to(out.dtype)

        return side_path

    def _rows_of(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return every row's coefficients, its bias, and whether it owes anything.

        If all rows owe the same, the input's first axis need not be the rows: then one row's are
        returned for all.

        Raises:
            BaseMismatch: the first axis is not the rows, or can't be known to be, and the rows
                differ here.
        """
        if has_rows_first(self.site, x, out, len(self.rows), batch_first=self.batch_first):
            return self.rows, self.row_bias, self.adapted
        if self.uniform:
            return self.rows[:1], self.row_bias[:1], self.adapted[:1]
        raise rows_not_first_error(self.site, x, len(self.rows))
