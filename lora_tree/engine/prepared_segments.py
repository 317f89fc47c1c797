"""Prepared side paths that run our own kernels, for a base that is compiled or captured in a graph.

    one buffer of index lists for each number of rows     rewritten in place at a switch
    one buffer of addresses, (sites, nodes, fields)       rewritten in place at a switch
    an operator at each site                              opaque to the compiler

No rank is fixed beforehand, because the kernels read factors where they lie. The operator finds the
buffers by its site's number. A captured graph reads their memory directly, so it runs what was last
written there. A path is a batch of one row that holds all inputs.

A switch clears from the buffers everything that is no longer active: a graph that is replayed later
finds lists in which no row owes anything, and never the address of memory that was freed.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError, plural
from ..lowrank import LowRank
from ..sites import Site
from .kernels import (
    FIELDS,
    FactorTable,
    Segments,
    SegmentSizes,
    Tiling,
    can_route,
    room_for,
    routed_kernels,
    routes,
    segment_numbers,
)
from .plan import Plan
from .routing.segmented import NARROW, route_dtype
from .rows.batch import Batch
from .rows.batch_axis import has_rows_first, rows_not_first_error
from .sidepaths.side import raise_for_copy
from .upload import uploaded

__all__ = ["OFF", "PATH", "ROWS", "PreparedSegments", "SegmentNumbers", "covered"]

OFF, PATH, ROWS = 0, 1, 2
"""The modes of prepared side paths: each is one trace."""

GROUPS = (16, 1)
"""Rows in a group: for rows of few inputs, and for rows of `MANY` or more."""

MANY = 16

_NUMBERS = itertools.count()
_SITES: weakref.WeakValueDictionary[int, _SegmentedSite] = weakref.WeakValueDictionary()
"""Number → site: a custom operator takes numbers and tensors, and no objects."""


def covered(site: Site, values: Sequence[LowRank], dtype: torch.dtype) -> bool:
    """Return whether the kernels cover a site, by the shapes of its nodes' increments."""
    weight = site.weight
    if weight is None or not routes(weight.device) or not site.is_product:
        return False
    if dtype not in NARROW or weight.dtype not in NARROW:
        return False
    if any(value.bias is not None for value in values):
        return False
    # Only shapes, dtypes and layouts are compared: outlines are on the meta device.
    factors = [(value.A, value.B, value.scale) for value in values]
    return can_route(factors, values[0].A.device)


@dataclass(frozen=True, eq=False)
class SegmentNumbers:
    """The numbers for the buffers of one device, for one path or one batch.

    Args:
        rows: the number of rows of the batch; None: a path, which is one row of all inputs.
        lists: number of rows → the lists for each of `GROUPS`.
        addresses: (sites, nodes, FIELDS) int64.
        scales: (sites, nodes) fp32.
        uniform: the sites at which all rows owe the same.
        batch_first: the caller knows that the first axis is the rows.
        held: factors that were copied for this; they live as long as these numbers.
    """

    rows: int | None
    lists: Mapping[int, Sequence[tuple[SegmentSizes, Tensor]]]
    addresses: Tensor
    scales: Tensor
    uniform: frozenset[str]
    batch_first: bool
    held: Sequence[Tensor]


class PreparedSegments:
    """The buffers of all sites on one device, and their hooks' operators.

    Args:
        sites: every site, with the increments that nodes have there; only their shapes are used.
        dtypes: site → the narrowest dtype that it computes in.
        nodes: how many nodes the tree has.
        depth: the number of nodes on the longest lineage.
        device: where the sites are.
    """

    def __init__(
        self,
        sites: Mapping[Site, Sequence[LowRank]],
        dtypes: Mapping[str, torch.dtype],
        *,
        nodes: int,
        depth: int,
        device: torch.device,
    ) -> None:
        self._depth, self._device = depth, device
        # Tensors made under the caller's inference_mode could not be rewritten outside of it.
        with torch.inference_mode(False):
            shape = len(sites), nodes, FIELDS
            self._addresses = torch.zeros(shape, dtype=torch.int64, device=device)
            self._scales = torch.zeros(shape[:2], dtype=torch.float32, device=device)
        self._lists: dict[int, list[Segments]] = {}
        self._of_plan: weakref.WeakKeyDictionary[
            Plan, tuple[tuple[int, ...], tuple[Tensor, Tensor, list[Tensor]]]
        ]
        self._of_plan = weakref.WeakKeyDictionary()
        """Plan → the addresses of its adapters' buffers, and what `_laid_out` returned for them."""
        self.sites: dict[str, _SegmentedSite] = {}
        for i, (site, values) in enumerate(sites.items()):
            table = _table(values, self._addresses[i], self._scales[i])
            self.sites[site.name] = _SegmentedSite(self, site, dtypes[site.name], table)
        self.mode, self.rows, self.batch_first = OFF, 1, False
        self.version = torch.zeros((), dtype=torch.int64, device=device)
        """Every switch writes to this tensor, so that autograd refuses a backward that comes after
        a switch: its forward saved the tensor.
        """

    # ------------------------------------------------------------------ what can fail
    def numbers(
        self, plan: Plan, batch: Batch | None, *, batch_first: bool = False
    ) -> SegmentNumbers:
        """Return the numbers for a plan's sites on this device.

        Args:
            plan: the plan of the path, or of all the nodes of the batch.
            batch: what each row of the inputs owes; None: one path for all inputs.
            batch_first: the caller knows that the first axis is the rows.

        Raises:
            StateError: a node's factors have another dtype, or a larger rank, than those that were
                prepared for; or there are more nodes.
        """
        nodes = list(batch.nodes) if batch is not None else _nodes_of(plan)
        places, known = self._of_plan.get(plan, ((), None))
        if known is None or places != plan.places():
            known = self._laid_out(plan, nodes)
            if plan.fixed:
                self._of_plan[plan] = plan.places(), known
        addresses, scales, held = known
        kinds: Sequence[Sequence[float]] = [[1.0] * len(nodes)]
        of_row: Sequence[int] = [0]
        uniform = frozenset(self.sites)
        if batch is not None:
            kinds, of_row = batch.kinds, batch.of_row
            uniform = self._uniform(plan, batch)
        lists = {}
        # A site at which all rows owe the same may have something else on its first axis.
        for rows in ({1: of_row[:1], len(of_row): of_row}).values():
            buffers = []
            for group in GROUPS:
                # Room for any paths, so that any batch of as many rows can be written over this.
                room = room_for(len(rows), group, self._depth)
                most = self._scales.shape[1]
                buffers.append(segment_numbers(kinds, rows, group, entries=room, nodes=most))
            lists[len(rows)] = buffers
        count = None if batch is None else len(batch)
        return SegmentNumbers(count, lists, addresses, scales, uniform, batch_first, held)

    def _laid_out(self, plan: Plan, nodes: Sequence[str]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the addresses and scales of a plan's factors on the device, and the factors that
        had to be copied.
        """
        if len(nodes) > self._scales.shape[1]:
            raise StateError(
                f"the tree has {plural(len(nodes), 'node')}, and had {self._scales.shape[1]} when "
                "the model was prepared",
                "detach, attach the tree again, and prepare it before the base is compiled",
            )
        place = {node: i for i, node in enumerate(nodes)}
        fields = torch.zeros(len(self.sites), len(nodes), FIELDS, dtype=torch.int64, device="cpu")
        scales = torch.zeros(len(self.sites), len(nodes), dtype=torch.float32, device="cpu")
        held: list[Tensor] = []
        for i, (name, site) in enumerate(self.sites.items()):
            columns: list[int] = []
            numbers: list[list[int]] = []
            factors_scales: list[float] = []
            for term in plan.terms.get(name, ()):
                A, B = site.placed(term.node, term.value, held)
                columns.append(place[term.node])
                strides = A.stride(0), B.stride(0)
                numbers.append(
                    [A.data_ptr(), strides[0], 0, B.data_ptr(), strides[1], 0, A.shape[0], 0]
                )
                factors_scales.append(term.scaled.scale)
            if columns:
                fields[i, columns] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
                scales[i, columns] = torch.tensor(factors_scales, device="cpu")
        return uploaded(fields, self._device), uploaded(scales, self._device), held

    def _uniform(self, plan: Plan, batch: Batch) -> frozenset[str]:
        """Return the sites at which all rows of a batch owe the same."""
        known: dict[tuple[str, ...], bool] = {}
        found = []
        for name in self.sites:
            nodes = tuple([term.node for term in plan.terms.get(name, ())])
            if nodes not in known:
                known[nodes] = not nodes or batch.at(nodes).is_uniform
            if known[nodes]:
                found.append(name)
        return frozenset(found)

    # ------------------------------------------------------------------ the only writer
    def write(self, numbers: SegmentNumbers | None) -> None:
        """Rewrite the buffers in place; None: no row owes anything."""
        self.version.add_(1)
        for lists in self._lists.values():
            for segments in lists:
                segments.clear()
        if numbers is None:
            self.mode = OFF
            return
        self.mode = PATH if numbers.rows is None else ROWS
        self.rows, self.batch_first = numbers.rows or 1, numbers.batch_first
        for name, site in self.sites.items():
            site.uniform = name in numbers.uniform
        nodes = numbers.scales.shape[1]
        self._addresses[:, :nodes].copy_(numbers.addresses)
        self._scales[:, :nodes].copy_(numbers.scales)
        for rows, made in numbers.lists.items():
            self._write_lists(rows, made)

    def _write_lists(self, rows: int, made: Sequence[tuple[SegmentSizes, Tensor]]) -> None:
        present = self._lists.get(rows)
        if present is None or any(
            sizes.entries > segments.sizes.entries or sizes.largest > segments.sizes.largest
            for (sizes, _), segments in zip(made, present, strict=True)
        ):
            if present is not None:
                warnings.warn(
                    f"a batch of {plural(rows, 'row')} needs more nodes than any before, so its "
                    "lists were allocated again; a CUDA graph captured for as many rows still "
                    "reads the old lists, in which no row needs a node: capture it again",
                    RuntimeWarning,
                    stacklevel=2,
                )
            # The old lists stay: a captured graph reads them.
            self._lists[rows] = present = [
                Segments(sizes, uploaded(memory, self._device)) for sizes, memory in made
            ]
            return
        for (sizes, memory), segments in zip(made, present, strict=True):
            segments.take(Segments(sizes, uploaded(memory, self._device)))

    def lists(self, rows: int, tokens: int) -> Segments:
        """Return the lists for a number of rows, each of ``tokens`` inputs."""
        return self._lists[rows][tokens >= MANY]


class _SegmentedSite:
    """One site's operator.

    Args:
        of: the buffers.
        site: the site.
        dtype: the narrowest dtype that it computes in.
        table: its part of the addresses.
    """

    def __init__(
        self, of: PreparedSegments, site: Site, dtype: torch.dtype, table: FactorTable
    ) -> None:
        self.of, self.site, self.dtype, self.table = of, site, dtype, table
        self.number = next(_NUMBERS)
        self.uniform = True
        _SITES[self.number] = self

    def placed(self, node: str, value: LowRank, held: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return a node's factors where the kernels may read them; copies go to ``held``.

        Raises:
            StateError: they have another dtype or a larger rank than what was prepared for.
        """
        fits = value.A.dtype == value.B.dtype == self.table.dtype and value.bias is None
        fits = fits and value.rank <= self.table.rank
        if not fits or (self.table.aligned and value.rank % 8):
            raise StateError(
                f"{node}: {self.site.name}: its factors are {value.dtype} of rank {value.rank}, "
                f"and the model was prepared for {self.table.dtype} of rank at most "
                f"{self.table.rank}",
                "detach, attach the tree again, and prepare it before the base is compiled",
            )
        factors = []
        for factor in (value.A, value.B):
            readable = factor.detach().to(self.table.numbers.device)
            if not readable.is_contiguous() or readable.data_ptr() % 16:
                readable = (
                    readable.contiguous() if not readable.is_contiguous() else readable.clone()
                )
            if readable is not factor:
                held.append(readable)
            factors.append(readable)
        return factors[0], factors[1]

    def hook(self) -> Callable[..., Any]:
        """Return the site's forward hook: shapes and one operator, so that it can be traced."""
        site, of = self.site, self.of

        def side_path(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> Any:
            if of.mode == OFF:
                return None
            if module is not site.module:
                raise_for_copy(module, site.name)
            x = args[0] if args else next(iter(kwargs.values()))
            rows = 1
            if of.mode == ROWS:
                if has_rows_first(site, x, out, of.rows, batch_first=of.batch_first):
                    rows = of.rows
                elif not self.uniform:
                    raise rows_not_first_error(site, x, of.rows)
            compute = route_dtype(self.dtype, x.dtype, x.device.type)
            return _add_segments(out, x, of.version, self.number, rows, compute)

        return side_path

    def run(self, out: Tensor, x: Tensor, rows: int, compute: torch.dtype) -> Tensor:
        """Launch the kernels, and return the sum as a new tensor."""
        out, x = out.contiguous(), x.contiguous()
        segments, tiling = self._sized(x, rows, compute)
        kernels, after = routed_kernels(), torch.empty_like(out)
        low = kernels.shrink(x, segments, self.table, 0, tiling)
        kernels.expand(low, out, after, segments, self.table, 1, tiling)
        return after

    def back(self, grad: Tensor, rows: int, compute: torch.dtype, dtype: torch.dtype) -> Tensor:
        """Return the gradient with respect to the input."""
        grad = grad.contiguous()
        segments, tiling = self._sized(grad, rows, compute)
        kernels = routed_kernels()
        low = kernels.shrink(grad, segments, self.table, 1, tiling)
        shape = (*grad.shape[:-1], self.table.wide[0])
        to_input = torch.empty(shape, dtype=dtype, device=grad.device)
        kernels.expand(low, None, to_input, segments, self.table, 0, tiling)
        return to_input

    def _sized(self, x: Tensor, rows: int, compute: torch.dtype) -> tuple[Segments, Tiling]:
        tokens = x.numel() // (x.shape[-1] * rows)
        segments = self.of.lists(rows, tokens)
        return segments, Tiling.of(segments.sizes, tokens, compute)


# ---------------------------------------------------------------------- the operator
@torch.library.custom_op("lora_tree::add_segments", mutates_args=())
def _add_segments(
    out: Tensor, x: Tensor, version: Tensor, site: int, rows: int, compute: torch.dtype
) -> Tensor:
    return _SITES[site].run(out, x, rows, compute)


@_add_segments.register_fake
def _(
    out: Tensor, x: Tensor, version: Tensor, site: int, rows: int, compute: torch.dtype
) -> Tensor:
    return torch.empty(out.shape, dtype=out.dtype, device=out.device)


@torch.library.custom_op("lora_tree::add_segments_backward", mutates_args=())
def _add_segments_backward(
    grad: Tensor, version: Tensor, site: int, rows: int, compute: torch.dtype, dtype: torch.dtype
) -> Tensor:
    return _SITES[site].back(grad, rows, compute, dtype)


@_add_segments_backward.register_fake
def _(
    grad: Tensor, version: Tensor, site: int, rows: int, compute: torch.dtype, dtype: torch.dtype
) -> Tensor:
    width = _SITES[site].table.wide[0]
    return torch.empty((*grad.shape[:-1], width), dtype=dtype, device=grad.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, version, ctx.site, ctx.rows, ctx.compute = inputs
    ctx.dtype = x.dtype
    # Saved, so that autograd refuses a backward after the buffers were rewritten.
    ctx.save_for_backward(version)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (version,) = ctx.saved_tensors
    to_input = None
    if ctx.needs_input_grad[1]:
        to_input = _add_segments_backward(grad, version, ctx.site, ctx.rows, ctx.compute, ctx.dtype)
    return grad, to_input, None, None, None, None


_add_segments.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------------- helpers
def _nodes_of(plan: Plan) -> list[str]:
    """Return the nodes of a plan, in the order in which its sites first name them."""
    found: dict[str, None] = {}
    for terms in plan.terms.values():
        for term in terms:
            found[term.node] = None
    return list(found)


def _table(values: Sequence[LowRank], numbers: Tensor, scales: Tensor) -> FactorTable:
    """Return a table over the buffers of one site, for factors like these."""
    A, B = values[0].A, values[0].B
    rank = max(value.rank for value in values)
    strides_aligned = A.shape[1] % 8 == 0 and all(value.rank % 8 == 0 for value in values)
    return FactorTable(
        numbers,
        scales,
        key=(),
        rank=max(16, 1 << (rank - 1).bit_length()),
        wide=(A.shape[1], B.shape[0]),
        dtype=A.dtype,
        aligned=strides_aligned,
        grad_sizes=(0, 0),
    )
