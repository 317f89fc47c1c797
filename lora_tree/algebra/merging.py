"""Merge several adapters into one, by the methods of `elementwise`, in one of three spaces.

    core     M_i = U_Bᵀ ΔW_i U_A    (k, l), k, l ≤ Σr: in the singular bases of all increments
    knots    V_i = Σ⁻¹ U_Bᵀ ΔW_i    (k, in): their rows in those bases (KnOTS, arXiv 2410.19735)
    dense    ΔW_i                   (out, in): the definition, for weights that are small enough

Which numbers are large, and which signs agree, depends on the basis. The singular bases of
[ΔW_1 … ΔW_n] and of [ΔW_1ᵀ … ΔW_nᵀ] depend on the increments alone, so neither the adapters' order
nor the gauge of their factors changes a merge. (A basis vector may change its sign, but that flips
the same numbers in all tensors.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..adapter import Adapter
from ..combining import combine
from ..errors import SpecError, listing, plural
from ..given import check_iterable, unchecked
from ..lowrank import LowRank
from ..lowrank.promoting import promoted
from ..tree import AdapterTree
from ..weights import GivenWeight, Weight, as_weight, weight_at
from .aligning import aligned
from .arguments import check_tree
from .core import Joint, joint
from .deviation import Deviation, Shortening, call_named, deviation
from .edit import Edited, check_path_free, check_savable, stale_notes
from .elementwise import Method, check_method, merged
from .replacing import refuse_overrides
from .sums import added_up, check_spelling, difference_terms

__all__ = ["Merged", "Recipe", "Space", "cores_and_biases", "merge", "merge_paths", "widest_dtype"]

Space: TypeAlias = Literal["core", "knots", "dense"]
SPACES = ("core", "knots", "dense")

MOST_DENSE = 2**24
"""The largest weight, in numbers, that ``dense`` merges: 128 MiB in float64."""


@dataclass(frozen=True)
class Merged:
    """The outcome of `merge`.

    Args:
        adapter: the merged adapter.
        cut: the error of the cut to a rank, compared with the merge at its full rank.
        distances: ‖merged − ΔW_i‖ / ‖ΔW_i‖ for each of the adapters.
    """

    adapter: Adapter
    cut: Deviation
    distances: tuple[float, ...]


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[GivenWeight] | None = None,
    *,
    method: Method = "ties",
    density: float = 1.0,
    space: Space = "core",
    rank: int | None = None,
    max_error: float | None = None,
    seed: int = 0,
    names: Sequence[str] = (),
) -> Merged:
    """Merge adapters of one base into one.

    Args:
        adapters: at least one. A module that one of them lacks is zero there.
        weights: one for each, a number or a number for each module; None: 1 for all.
        method: ``linear``, ``magnitude_prune``, ``ties``, ``dare_linear``, ``dare_ties`` or
            ``sce``.
        density: the fraction of each adapter's numbers that is kept.
        space: ``core`` and ``knots`` never build an (out, in) matrix; ``dense`` does.
        rank: the largest rank in any module. ``dense`` needs it or ``max_error``, because its
            results have full rank.
        max_error: the largest relative error of the cut in any module.
        seed: for the methods that drop at random.
        names: what to call the adapters in errors.

    Raises:
        SpecError: an argument is not valid; or a weight is too large for ``dense``.
        ShapeMismatch, BaseMismatch: the adapters are not of one base; names them and the module.

    >>> x = LowRank(torch.eye(1, 4), torch.eye(3, 1))
    >>> y = LowRank(torch.eye(1, 4), 3 * torch.eye(3, 1))
    >>> found = merge([Adapter({"q": x}), Adapter({"q": y})], method="ties")
    >>> round(found.adapter.modules["q"].norm(), 6), found.distances[0]
    (2.0, 1.0)
    """
    recipe = Recipe(method, density, space, seed)
    check_iterable(adapters, "adapters: expected a list of adapters")
    adapters = list(adapters)
    given = _checked(adapters, weights)
    names = _names_of(names, len(adapters))
    if space == "dense" and rank is None and max_error is None:
        raise SpecError(
            "space='dense': the result has full rank, so it has to be cut",
            "give rank= or max_error= (--rank, --max-error)",
        )
    refuse_overrides(zip(names, adapters, strict=True), "merged")
    check_spelling([(name, 1.0, each) for name, each in zip(names, adapters, strict=True)])
    # The plain sum refuses adapters that don't fit together, and has the result's base, config and
    # carried tensors.
    plain_sum = combine(list(zip(adapters, given, strict=True)), names=names)
    aligned_adapters = aligned(adapters)
    values: dict[str, LowRank] = {}
    for name in plain_sum.modules:
        parts = [adapter.modules.get(name) for adapter in aligned_adapters]
        numbers = [weight_at(weight, name) for weight in given]
        values[name] = call_named(name, recipe.module, name, parts, numbers)
    full = replace(plain_sum, modules=values, errors={}, rounded=frozenset())
    short, error = Shortening(rank, max_error, widest_dtype(plain_sum)).of(full)
    # The merge ran in float64, so none of the caller's own factors was rounded.
    short = replace(short, rounded=frozenset())
    distances = tuple(deviation(adapter, short).relative_error for adapter in aligned_adapters)
    return Merged(short, error, distances)


def merge_paths(
    tree: AdapterTree,
    paths: Sequence[str],
    *,
    to: str,
    weights: Sequence[GivenWeight] | None = None,
    method: Method = "ties",
    density: float = 1.0,
    space: Space = "core",
    rank: int | None = None,
    max_error: float | None = None,
    seed: int = 0,
) -> tuple[Edited, Merged]:
    """Add a node that merges what some paths add to the parent of the new node.

    `lora_tree.hoist` makes a parent of siblings instead, and keeps their effective weights.

    Args:
        tree: changed in memory.
        paths: usually siblings of the new node, but any paths will do.
        to: the new node.
        weights, method, density, space, rank, max_error, seed: as `merge`.

    Raises:
        PathError: a node, or the one above ``to``, does not exist.
        TreeError: ``to`` exists.
        SpecError, ShapeMismatch, BaseMismatch: as `merge`.
        FormatError: the merge can't be saved as one adapter; names the module.
    """
    check_tree(tree)
    check_iterable(paths, "paths: expected a list of paths")
    check_path_free(tree, to)
    parent = to.rpartition("/")[0]
    # Each path less the new node's parent, because the new node inherits that.
    adapters = [added_up(difference_terms(tree, path, parent)) for path in paths]
    result = merge(
        adapters,
        weights,
        method=method,
        density=density,
        space=space,
        rank=rank,
        max_error=max_error,
        seed=seed,
        names=paths,
    )
    if not result.adapter.modules:
        raise SpecError(
            f"{listing(paths)}: they add nothing to the nodes above {to}",
            "add a group instead: tree.add(path, group=True), or lora-tree add FOLDER PATH --group",
        )
    check_savable(tree, {to: result.adapter}, paths)
    tree.add(to, adapter=result.adapter)
    notes = stale_notes(tree, paths)
    return Edited(added=(to,), errors={to: result.cut}, notes=notes), result


@dataclass(frozen=True)
class Recipe:
    """The arguments of a merge, checked by the constructor.

    Args:
        method, density, space, seed: as `merge`.
    """

    method: Method
    density: float
    space: Space
    seed: int

    def __post_init__(self) -> None:
        check_method(self.method, self.density)
        if self.space not in SPACES:
            raise SpecError(f"space: expected one of {', '.join(SPACES)}, got {self.space!r}")

    def module(
        self, name: str, parts: Sequence[LowRank | None], weights: Sequence[float]
    ) -> LowRank:
        """Merge the increments of one module; None is zero. The result is in float64.

        Raises:
            SpecError: a factor is not finite, or the weight is too large for ``dense``.
        """
        # Each module's seed comes from its name, so the result doesn't depend on other modules.
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        both = joint([part for part in parts if part is not None])
        cores, biases = cores_and_biases(both, parts)
        # The bias draws its random numbers first, so they are the same in every space.
        bias = None
        if any(own is not None for own in both.biases):
            bias = self._merged(list(biases), weights, draw)
        if self.space == "dense":
            return self._dense(both, cores, weights, draw, bias)
        U, S = _left(torch.cat(list(cores), dim=-1))  # (k, m) (m,)
        if self.space == "knots":
            # The singular values go to B, so that all rows have comparable magnitudes.
            rows = _knot(U, S, cores) @ both.Q_A.mT  # (n, *batch, m, in)
            A = self._merged(list(rows), weights, draw)
            B = both.Q_B @ (U * S[..., None, :])
            return LowRank(A.contiguous(), B.contiguous(), 1.0, bias, both.like.layout)
        W, _ = _left(torch.cat(list(cores.mT), dim=-1))  # (l, m)
        core = self._merged(list(U.mT @ cores @ W), weights, draw)
        return both.value(U @ core @ W.mT, bias)

    def _merged(
        self, tensors: Sequence[Tensor], weights: Sequence[float], draw: torch.Generator
    ) -> Tensor:
        return merged(tensors, weights, method=self.method, density=self.density, draw=draw)

    def _dense(
        self,
        both: Joint,
        cores: Tensor,
        weights: Sequence[float],
        draw: torch.Generator,
        bias: Tensor | None,
    ) -> LowRank:
        shape = both.like.shape
        if math.prod(shape) > MOST_DENSE:
            raise SpecError(
                f"space='dense': a weight of {' × '.join(map(str, shape))} is too large for it",
                "space='core' and space='knots' build no matrix of that size",
            )
        dense = self._merged(list(both.Q_B @ cores @ both.Q_A.mT), weights, draw)
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        B = U * S[..., None, :]
        return LowRank(Vh.contiguous(), B.contiguous(), 1.0, bias, both.like.layout)


def cores_and_biases(both: Joint, parts: Sequence[LowRank | None]) -> tuple[Tensor, Tensor]:
    """Return all parts' cores (n, \\*batch, k, l) and biases (n, out); None is zero in both."""
    cores = both.Q_B.new_zeros(len(parts), *both.cores[0].shape)
    biases = both.Q_B.new_zeros(len(parts), math.prod(both.Q_B.shape[:-1]))
    present = iter(zip(both.cores, both.biases, strict=True))
    for i, part in enumerate(parts):
        if part is None:
            continue
        # The joint bases have a core for every part that is not None, in order.
        cores[i], bias = next(present)
        if bias is not None:
            biases[i] = bias
    return cores, biases


def widest_dtype(adapter: Adapter) -> torch.dtype:
    """Return the dtype that holds the numbers of all modules, at least fp32."""
    dtype = torch.float32
    for value in adapter.modules.values():
        dtype = promoted(dtype, value.dtype)
    return dtype


def _left(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors (k, m) and values (m,), without those that are zero."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    # Singular values that are only rounding would make large numbers of noise when divided by.
    largest = S.max()
    there = int((S > largest * 1e-12).reshape(-1, S.shape[-1]).any(0).sum())
    return U[..., : max(there, 1)], S[..., : max(there, 1)]


def _knot(U: Tensor, S: Tensor, core: Tensor) -> Tensor:
    """Return Σ⁻¹ Uᵀ M, with zeros in the rows of singular values that are zero."""
    inverse = torch.where(S > 0, 1.0 / S.clamp(min=1e-300), 0.0)
    return inverse[..., :, None] * (U.mT @ core)


def _names_of(names: Sequence[str], count: int) -> list[str]:
    """Return a name for each adapter; raises as `merge`."""
    check_iterable(names, "names: expected a name for each adapter")
    names = list(names) or [f"adapter {i}" for i in range(count)]
    if len(names) != count:
        raise SpecError(f"{plural(count, 'adapter')}, but {plural(len(names), 'name')}")
    return names


def _checked(adapters: Sequence[Adapter], weights: Sequence[GivenWeight] | None) -> list[Weight]:
    """Return the weights, one for each adapter; raises as `merge`."""
    weights = [1.0] * len(adapters) if weights is None else weights
    check_iterable(weights, "weights: expected a weight for each adapter")
    weights = list(weights)
    strange = [each for each in adapters if not isinstance(unchecked(each), Adapter)]
    if strange or not adapters:
        raise SpecError(f"merge takes a list of adapters, got {adapters!r:.80}")
    if len(weights) != len(adapters):
        raise SpecError(f"{plural(len(adapters), 'adapter')}, but {plural(len(weights), 'weight')}")
    return [as_weight(weight, "weights: each") for weight in weights]
