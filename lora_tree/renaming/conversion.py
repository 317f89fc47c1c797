"""Convert several modules that became one parameter, by transformers' own operation.

Such modules are the experts of a layer, or its gate and up projections, which are fused now.

    W = op(W_1, W_2, …), where op only moves rows, so
    ΔW = Σ op(0, …, B_k, …, 0) A_k

transformers' operation is applied to the Bs, and the As are stacked: A of a fused gate and up is
[A_gate; A_up], and B is block-diagonal. Experts without factors get zeros.

To find out whether an operation only moves rows, it is applied to a weight of three numbered
columns. If the result has these columns in order, or transposed, then it moves the rows of B as it
moves those of W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BaseMismatch
from ..lowrank import LowRank, concat
from .loading import Loading
from .sum_error import error_of_sum

__all__ = ["Conversion", "Increment"]

_COLUMNS = torch.arange(3.0, device="cpu")


class Increment(NamedTuple):
    """A part of the increment of a stored parameter: scale · left @ right."""

    parameter: str
    left: Tensor
    right: Tensor
    scale: float


class _Placement(NamedTuple):
    """The place of a conversion's sources in one parameter.

    Args:
        experts: the expert of each matrix in the parameter, (batch,); None if the conversion has no
            experts.
        is_transposed: whether the parameter holds the transpose.
    """

    experts: Tensor | None
    is_transposed: bool


class Conversion:
    """The values of the modules that one conversion joins into one parameter, or several.

    Args:
        first: the first of its parameters, which is transformers' name for the conversion.
        converter: transformers' own object.
    """

    def __init__(self, first: str, converter: Any) -> None:
        self.first, self._converter = first, converter
        self.names: list[str] = []
        """The names that the modules had."""
        # source → number of the expert (0 if there are none) → the values to add up
        self._values: dict[str, dict[int, list[LowRank]]] = {}
        # (source, number) → the relative errors of these values
        self._errors: dict[tuple[str, int], list[float]] = {}
        self._sources: list[str] = list(converter.source_patterns)
        self._counts_experts = any("*" in source for source in self._sources)

    def add(
        self, name: str, source: str, number: int, value: LowRank, *, error: float = 0.0
    ) -> None:
        """Add a module's value: a matrix, or a batch for a source without experts.

        Args:
            name: the module's name in the adapter.
            source: the pattern of its source in the conversion.
            number: of its expert, from 0.
            value: the module's increment.
            error: its relative error.
        """
        self._errors.setdefault((source, number), []).append(error)
        self._values.setdefault(source, {}).setdefault(number, []).append(value)
        self.names.append(name)

    def error(self) -> float:
        """Return an upper bound on the relative error of each parameter that is made.

        Its parts are different rows or experts. So they are orthogonal, and the relative error of
        the whole is at most the largest of theirs. But two names may mean one part.
        """
        found = 0.0
        for (source, number), errors in self._errors.items():
            parts = zip(self._values[source][number], errors, strict=True)
            found = max(found, error_of_sum(list(parts)))
        return found

    def increments(self, loading: Loading) -> Iterator[Increment]:
        """Yield the increments of the stored parameters, source by source.

        Raises:
            BaseMismatch: a module adds a bias; or the base has no parameter for its experts, or has
                fewer experts; or the conversion does more than move rows.
        """
        self._check_no_bias()
        target = loading.parameters.get(self.first)
        experts = self._count_experts(target)
        # First one value per source: the rows of a source without factors follow from the others'.
        values: dict[str, LowRank] = {}
        for source, numbered in self._values.items():
            if self._counts_experts:
                values[source] = _stack(numbered, experts)
            else:
                values[source] = concat(numbered[0])
        rows = self._rows(values, target)
        for source, value in values.items():
            placements = self._placements(loading, self._trial(value, rows, experts))
            made = loading.convert(
                self.first, self._converter, self._with_one_source(source, value, rows)
            )
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
        # Some conversions distribute the experts over several parameters.
        return target.shape[0] * len(self._converter.target_patterns)

    def _rows(self, values: Mapping[str, LowRank], target: Tensor | None) -> dict[str, int]:
        """Return source → the number of rows of its weight.

        A source without factors gets the number of the others, if these agree; otherwise an equal
        share of the target's larger dimension.
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

    def _with_one_source(
        self, source: str, value: LowRank, rows: Mapping[str, int]
    ) -> dict[str, Iterable[Tensor]]:
        """Return source → its tensors, with one source's B and zeros for the others."""
        *batch, _, rank = value.B.shape
        alone: dict[str, Iterable[Tensor]] = {}
        for other in self._sources:
            B = value.B
            if other != source:
                B = value.B.new_zeros(*batch, rows[other], rank)
            # The converter takes experts one by one: iterating over a batch yields its matrices.
            alone[other] = B if self._counts_experts else [B]
        return alone

    def _trial(
        self, value: LowRank, rows: Mapping[str, int], experts: int
    ) -> dict[str, Iterable[Tensor]]:
        """Return source → tensors of numbered columns, in the shapes of `_with_one_source`."""
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
        """Return parameter → the placement of the sources, found with numbered columns.

        Raises:
            BaseMismatch: the conversion mixes columns, so op(B) A would not be op(B A).
        """
        placements: dict[str, _Placement] = {}
        for parameter, made in loading.convert(self.first, self._converter, trial).items():
            is_transposed = False
            order = _order(made)
            if order is None:
                is_transposed = True
                order = _order(made.mT)
            if order is None:
                operations = [type(operation).__name__ for operation in self._converter.operations]
                raise BaseMismatch(
                    f"transformers makes {self.first} of it by {' and '.join(operations)}, "
                    "which has no low-rank form",
                    "merge the adapter into the base under the transformers that trained it",
                )
            placements[parameter] = _Placement(
                order if self._counts_experts else None, is_transposed
            )
        return placements


def _numbered(experts: int, rows: int) -> Tensor:
    """Return (experts, rows, 3), in which every number encodes its expert and its column."""
    each_expert = torch.arange(float(experts), device="cpu").mul(len(_COLUMNS)).reshape(-1, 1, 1)
    return (each_expert + _COLUMNS).expand(experts, rows, len(_COLUMNS))


def _order(made: Tensor) -> Tensor | None:
    """Return the expert of each matrix of `_numbered` after a conversion.

    None: the columns are not in their order any more.
    """
    if made.ndim != 3:
        made = made[None]
    if made.shape[-1] != len(_COLUMNS):
        return None
    # The first number of each matrix encodes its expert, which determines all others.
    order = made[:, 0, 0].div(len(_COLUMNS)).long()
    wanted = order.reshape(-1, 1, 1) * len(_COLUMNS) + _COLUMNS
    return order if bool((made == wanted).all()) else None


def _stack(numbered: Mapping[int, list[LowRank]], experts: int) -> LowRank:
    """Return the values of all experts as one batch of one rank; zeros for experts without a value.

    Raises:
        BaseMismatch: an expert's number is too large, or two values differ in shape.
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
    # Zero factors leave an expert unchanged.
    zero = next(iter(padded.values())).with_tensors(torch.zeros_like)
    batch = [padded.get(number, zero) for number in range(experts)]
    try:
        A = torch.stack([value.A for value in batch])
        B = torch.stack([value.B for value in batch])
    except RuntimeError:
        shapes = sorted({value.shape for value in batch})
        raise BaseMismatch(f"the experts' factors differ in shape: {shapes}") from None
    return LowRank(A, B, scale)
