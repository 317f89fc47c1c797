"""Several modules that became one parameter, by transformers' own conversion.

They are the experts of a layer, or its gate and up, which are fused now.

    W = op(W_1, W_2, …)  and op moves rows and nothing else, so
    ΔW = Σ op(0, …, B_k, …, 0) A_k

transformers' operation is applied to the Bs, and the As are stacked. The parts lie side by side in
the rank: A of a fused gate and up is [A_gate; A_up], and B is block-diagonal. Experts without
    factors get zeros.

Whether an operation moves rows alone is tried out, on a weight of three numbered columns: if
these come out in their order, whole or transposed, then each entry of B goes where its row goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BaseMismatch
from ..lowrank import LowRank, concat
from .loading import Loading

__all__ = ["Conversion", "Increment"]

_COLUMNS = torch.arange(3.0, device="cpu")


class Increment(NamedTuple):
    """A part of the increment of a stored parameter: scale · left @ right."""

    parameter: str
    left: Tensor
    right: Tensor
    scale: float


class _Placement(NamedTuple):
    """Where a conversion puts its sources in one parameter.

    Args:
        experts: the expert of each matrix in the parameter, (batch,); None if the conversion counts
            none.
        is_transposed: whether the parameter holds the transpose.
    """

    experts: Tensor | None
    is_transposed: bool


class Conversion:
    """The values of the modules that one conversion joins into one parameter, or several.

    Args:
        first: the first of its parameters, by which transformers calls the conversion.
        converter: transformers' own.
    """

    def __init__(self, first: str, converter: Any) -> None:
        self.first, self._converter = first, converter
        self.names: list[str] = []
        """The names that the modules had."""
        # source → number of the expert (0 if it counts none) → the values that add up there
        self._values: dict[str, dict[int, list[LowRank]]] = {}
        self._sources: list[str] = list(converter.source_patterns)
        self._counts_experts = any("*" in source for source in self._sources)

    def add(self, name: str, source: str, number: int, value: LowRank) -> None:
        """Add a module's value: a matrix, or a batch for a source that counts no experts.

        Args:
            name: that the module had.
            source: which source of the conversion it is.
            number: of its expert, from 0.
            value: of the module.
        """
        self._values.setdefault(source, {}).setdefault(number, []).append(value)
        self.names.append(name)

    def increments(self, loading: Loading) -> Iterator[Increment]:
        """Yield the increments of the stored parameters, source by source.

        Raises:
            BaseMismatch: a module adds a bias; or the base has no parameter for its experts, or too
                few of them; or the conversion does more than to move rows.
        """
        self._check_no_bias()
        target = loading.parameters.get(self.first)
        experts = self._count_experts(target)
        # One value a source first: the number of rows of one may follow from that of another.
        values: dict[str, LowRank] = {}
        for source, numbered in self._values.items():
            if self._counts_experts:
                values[source] = _stack(numbered, experts)
            else:
                values[source] = concat(numbered[0])
        rows = self._rows(values, target)
        for source, value in values.items():
            placements = self._placements(loading, self._trial(value, rows, experts))
            made = loading.convert(self.first, self._converter, self._alone(source, value, rows))
            for parameter, moved in made.items():
                experts_there, is_transposed = placements[parameter]
                A = value.A
                if experts_there is not None:
                    A = A[experts_there.to(A.device)]
                if is_transposed:
                    # (B A)ᵀ = Aᵀ Bᵀ: the operation has transposed B already.
                    yield Increment(parameter, A.mT, moved, value.scale)
                else:
                    yield Increment(parameter, moved, A, value.scale)

    def _check_no_bias(self) -> None:
        for numbered in self._values.values():
            for values in numbered.values():
                if any(value.bias is not None for value in values):
                    raise BaseMismatch(
                        f"it adds a bias (lora_bias), and {self.first} of this base has none",
                        "train without lora_bias",
                    )

    def _count_experts(self, target: Tensor | None) -> int:
        if not self._counts_experts:
            return 1
        if target is None or target.ndim != 3:
            raise BaseMismatch(f"this base has no parameter {self.first} that holds its experts")
        # Some conversions share the experts out between several parameters.
        return target.shape[0] * len(self._converter.target_patterns)

    def _rows(self, values: Mapping[str, LowRank], target: Tensor | None) -> dict[str, int]:
        """Return source → how many rows its weight has.

        A source without factors has as many as all others, if these agree; or else an equal share
        of the target's.
        """
        rows = {source: value.B.shape[-2] for source, value in values.items()}
        known = set(rows.values())
        if len(known) == 1:
            lacking = known.pop()
        elif target is None:
            lacking = 0
        else:
            lacking = max(target.shape[1:] or (0,)) // len(self._sources)
        return {source: rows.get(source, lacking) for source in self._sources}

    def _alone(
        self, source: str, value: LowRank, rows: Mapping[str, int]
    ) -> dict[str, Iterable[Tensor]]:
        """Return source → its tensors, with one source's B and zeros for the others."""
        *batch, _, rank = value.B.shape
        alone: dict[str, Iterable[Tensor]] = {}
        for other in self._sources:
            B = value.B
            if other != source:
                B = value.B.new_zeros(*batch, rows[other], rank)
            # Experts are given one by one: iterating over the batch yields their matrices.
            alone[other] = B if self._counts_experts else [B]
        return alone

    def _trial(
        self, value: LowRank, rows: Mapping[str, int], experts: int
    ) -> dict[str, Iterable[Tensor]]:
        """Return source → tensors of numbered columns, in the shapes of `_alone`."""
        batch = value.B.shape[:-2]
        trial: dict[str, Iterable[Tensor]] = {}
        for source in self._sources:
            if self._counts_experts:
                trial[source] = _numbered(experts, rows[source])
            else:
                columns = _numbered(1, rows[source])[0]  # (rows, 3)
                trial[source] = [columns.expand(*batch, *columns.shape)]
        return trial

    def _placements(
        self, loading: Loading, trial: Mapping[str, Iterable[Tensor]]
    ) -> dict[str, _Placement]:
        """Return parameter → where the conversion puts its sources, tried out on numbered columns.

        Raises:
            BaseMismatch: it mixes columns; then its result for B says nothing about its result for
                B·A.
        """
        found: dict[str, _Placement] = {}
        for parameter, made in loading.convert(self.first, self._converter, trial).items():
            is_transposed = False
            order = _order(made)
            if order is None:
                is_transposed = True
                order = _order(made.mT)
            if order is None:
                operations = [type(each).__name__ for each in self._converter.operations]
                raise BaseMismatch(
                    f"transformers makes {self.first} of it by {' and '.join(operations)}, "
                    "which has no low-rank form",
                    "merge the adapter into the base under the transformers that trained it",
                )
            found[parameter] = _Placement(order if self._counts_experts else None, is_transposed)
        return found


def _numbered(experts: int, rows: int) -> Tensor:
    """Return (experts, rows, 3): every number tells its expert and its column."""
    each_expert = torch.arange(float(experts), device="cpu").mul(len(_COLUMNS)).reshape(-1, 1, 1)
    return (each_expert + _COLUMNS).expand(experts, rows, len(_COLUMNS))


def _order(made: Tensor) -> Tensor | None:
    """Return the expert of each matrix of such numbers; None if the columns lost their order."""
    if made.ndim != 3:
        made = made[None]
    if made.shape[-1] != len(_COLUMNS):
        return None
    # The first number of each matrix says which expert it was, and so what the others have to be.
    order = made[:, 0, 0].div(len(_COLUMNS)).long()
    wanted = order.reshape(-1, 1, 1) * len(_COLUMNS) + _COLUMNS
    return order if bool((made == wanted).all()) else None


def _stack(numbered: Mapping[int, list[LowRank]], experts: int) -> LowRank:
    """Return the values of all experts as one batch of one rank; zeros for those without one.

    Raises:
        BaseMismatch: there is an expert too many, or two differ in shape.
    """
    if max(numbered) >= experts:
        raise BaseMismatch(
            f"it is of expert {max(numbered)}, and this base has {experts}, counted from 0"
        )
    summed: dict[int, LowRank] = {}
    scales: set[float] = set()
    rank = 0
    for number, values in numbered.items():
        summed[number] = concat(values)
        scales.add(summed[number].scale)
        rank = max(rank, summed[number].rank)
    # A batch has one scale. If the experts differ in it, every scale is folded into its B.
    scale = scales.pop() if len(scales) == 1 else 1.0
    padded: dict[int, LowRank] = {}
    for number, value in summed.items():
        one_scale = value if value.scale == scale else value.folded()
        padded[number] = one_scale.padded(rank)
    # Zero factors: an expert that no adapter changes stays as it is.
    zero = next(iter(padded.values())).with_tensors(torch.zeros_like)
    batch = [padded.get(number, zero) for number in range(experts)]
    try:
        A = torch.stack([value.A for value in batch])
        B = torch.stack([value.B for value in batch])
    except RuntimeError:
        shapes = sorted({value.shape for value in batch})
        raise BaseMismatch(f"the experts' factors differ in shape: {shapes}") from None
    return LowRank(A, B, scale)
