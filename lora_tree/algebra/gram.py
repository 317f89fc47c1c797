"""Gram: the inner products of all pairs of many adapters, from their factors.

    exact      ⟨ΔW_x, ΔW_y⟩ = Σ (B_xᵀ B_y) ∘ (A_x A_yᵀ)    all pairs in two products of (Σr, Σr)
    sketched   ⟨S ΔW_x T, S ΔW_y T⟩    S: (k, out)   T: (in, k)   Gaussian, drawn by the name

The exact way multiplies every rank with every other one: with a thousand adapters that is 10¹³
steps. A sketch (Johnson–Lindenstrauss on both sides, https://arxiv.org/abs/1411.4357 §2) costs one
small product an adapter and reads each adapter once, so the adapters need never be in memory
together. Norms are not estimated.

Law: neither way changes with the order of adapters or with the gauge of their factors, (B R) (R⁻¹
    A).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import ShapeMismatch, SpecError, listing
from ..lowrank import LowRank, same_place
from .core import check_readable
from .deviation import call_named

__all__ = ["Gram", "gram"]

EXACT_STEPS = 5e10
"""Multiplications of the exact way above which the sketch is used: seconds on a few cores."""

_MOST_SIDE = 64
_SKETCH_NUMBERS = 250_000_000  # of all adapters together: 1 GB in fp32
_CHUNK = 64  # adapters whose products with all others are in memory at once

Outline = tuple[tuple[int, ...], int]
"""(shape, rank) of a module, which a header tells."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Inner products of adapters.

    Args:
        names: of the adapters, in the order of rows and columns.
        inner: (n, n) in float64.
        norms: (n,) ‖ΔW‖ over all modules.
        error: the standard error of a cosine: 0 for exact products; for sketched ones the root mean
            square of ‖S ΔW T‖² / ‖ΔW‖² − 1 over these adapters.
    """

    names: tuple[str, ...]
    inner: Tensor
    norms: Tensor
    error: float = 0.0

    @property
    def cosines(self) -> Tensor:
        """(n, n): 1 on the diagonal, 0 beside an adapter that is zero."""
        lengths = self.norms[:, None] * self.norms[None, :]
        found = torch.where(lengths > 0, self.inner / lengths.clamp(min=1e-300), 0.0)
        found = found.clamp(-1.0, 1.0)
        return found.fill_diagonal_(1.0)


def gram(
    names: Sequence[str],
    read: Callable[[str], Adapter],
    outline: Callable[[str], Adapter],
    *,
    exact: bool | None = None,
) -> Gram:
    """Multiply all pairs of adapters.

    Args:
        names: the adapters' names; the result keeps their order.
        read: name → adapter. Sketched, it is called once a name, and nothing of it is kept.
        outline: name → adapter, whose numbers may be missing.
        exact: True or False; None takes the exact way where that takes some seconds at most.

    Raises:
        ShapeMismatch: two adapters change one module in different shapes; names both and the
            module.
        SpecError: a factor has no finite numbers; names the adapter and the module.
    """
    outlines: dict[str, dict[str, Outline]] = {}
    for name in names:
        modules = outline(name).modules
        outlines[name] = {module: (value.shape, value.rank) for module, value in modules.items()}
    # Shapes are compared before a number is read: a zoo of two bases is refused at once.
    places = _places(outlines)
    if exact is None:
        exact = _steps(outlines) <= EXACT_STEPS
    return _exact(names, read) if exact else _sketched(names, read, places)


def _places(outlines: Mapping[str, Mapping[str, Outline]]) -> dict[str, tuple[int, ...]]:
    """Module → its shape, which all adapters must agree on."""
    whose: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter, modules in outlines.items():
        for name, (shape, _) in modules.items():
            first = whose.setdefault(name, adapter)
            if shapes.setdefault(name, shape) != shape:
                raise ShapeMismatch(
                    f"{first} and {adapter}: {name}: {shapes[name]} and {shape} are not increments "
                    "of one weight",
                    "compare adapters of one base",
                )
    return shapes


def _steps(outlines: Mapping[str, Mapping[str, Outline]]) -> float:
    """The multiplications of the exact way."""
    ranks: dict[str, int] = {}
    widths: dict[str, int] = {}
    for modules in outlines.values():
        for name, (shape, rank) in modules.items():
            ranks[name] = ranks.get(name, 0) + rank
            widths[name] = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
    steps = 0.0
    for name, rank in ranks.items():
        steps += widths[name] * float(rank) ** 2
    return steps


# ---------------------------------------------------------------------- exact
def _exact(names: Sequence[str], read: Callable[[str], Adapter]) -> Gram:
    adapters = [read(name) for name in names]
    _check(names, adapters)
    inner = torch.zeros(len(names), len(names), dtype=torch.float64)
    having: dict[str, list[int]] = {}
    for i, adapter in enumerate(adapters):
        for module in adapter.modules:
            having.setdefault(module, []).append(i)
    for module, rows in sorted(having.items()):
        values = [adapters[i].modules[module] for i in rows]
        for value in values[1:]:
            # Layouts too: outlines were compared by shape alone.
            call_named(module, same_place, values[0], value)
        at = torch.tensor(rows)
        inner[at[:, None], at[None, :]] += _products(values)
    # Rounding may leave a square of zero slightly below it.
    norms = inner.diagonal().clamp(min=0.0).sqrt()
    broken = [names[i] for i in (~norms.isfinite()).nonzero().flatten().tolist()]
    if broken:
        raise SpecError(
            f"{listing(broken)}: the factors are not finite, so they have no norm",
            "name the other nodes; lora-tree check FOLDER says which modules are meant",
        )
    return Gram(tuple(names), inner, norms)


def _products(values: Sequence[LowRank]) -> Tensor:
    """(n, n): all inner products of one module's increments."""
    batch = values[0].shape[:-2]
    found = torch.zeros(len(values), len(values), dtype=torch.float64)
    left = torch.cat([_flat(v.B, batch) * v.scale for v in values], dim=-1)  # (batch, out, Σr)
    right = torch.cat([_flat(v.A, batch) for v in values], dim=-2)  # (batch, Σr, in)
    ranks = torch.tensor([value.rank for value in values])
    # A chunk bounds the products that are in memory at once: (its ranks, all ranks).
    ends = ranks.cumsum(0).tolist()
    whose = torch.repeat_interleave(torch.arange(len(values)), ranks)
    for first in range(0, len(values), _CHUNK):
        last = min(first + _CHUNK, len(values))
        some = slice(ends[first - 1] if first else 0, ends[last - 1])
        # The upper triangle is enough: what lies below the diagonal is its mirror image.
        rest = slice(some.start, None)
        both = left[..., some].mT @ left[..., rest]
        both *= right[..., some, :] @ right[..., rest, :].mT
        both = both.sum(0)  # (ranks of some, ranks of the rest)
        rows = both.new_zeros(last - first, both.shape[1])
        rows.index_add_(0, whose[some] - first, both)
        sums = rows.new_zeros(last - first, len(values) - first)
        sums.index_add_(1, whose[rest] - first, rows)
        found[first:last, first:] = sums.cpu()
        found[first:, first:last] = sums.mT.cpu()
    return found + _biases(values)


def _flat(factor: Tensor, batch: tuple[int, ...]) -> Tensor:
    wide = factor.detach().to(device="cpu", dtype=torch.float64)
    return wide.reshape(math.prod(batch), *factor.shape[-2:])


def _biases(values: Sequence[LowRank]) -> Tensor:
    if all(value.bias is None for value in values):
        return torch.zeros((), dtype=torch.float64)
    stacked = torch.stack([_bias(value) for value in values])
    return stacked @ stacked.mT


def _bias(value: LowRank) -> Tensor:
    """(out,) with the scale in it; zeros where there is none."""
    if value.bias is None:
        return torch.zeros(math.prod(value.B.shape[:-1]), dtype=torch.float64)
    return value.bias.detach().cpu().double() * value.scale


def _check(names: Sequence[str], adapters: Iterable[Adapter]) -> None:
    for name, adapter in zip(names, adapters, strict=True):
        for module, value in adapter.modules.items():
            call_named(f"{name}: {module}", check_readable, value)


# ---------------------------------------------------------------------- sketched
def _sketched(
    names: Sequence[str], read: Callable[[str], Adapter], places: Mapping[str, tuple[int, ...]]
) -> Gram:
    side = _side(len(names), len(places))
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    starts: dict[str, int] = {}
    width = 0
    for name, shape in places.items():
        # A module's sketch has its own place in the row, zero for adapters that lack the module.
        S, T = maps[name] = _map(name, shape, side)
        starts[name] = width
        width += S.shape[-2] * T.shape[-2]
    sketches = torch.zeros(len(names), width)
    norms = torch.zeros(len(names), dtype=torch.float64)  # squared, without biases
    biases: dict[str, dict[int, Tensor]] = {}
    for i, name in enumerate(names):
        # One adapter at a time: a zoo may be larger than memory, and its sketches are not.
        adapter = read(name)
        _check([name], [adapter])
        squares = []
        for module, value in adapter.modules.items():
            small, square = _small(value, *maps[module])
            if not math.isfinite(square):
                call_named(f"{name}: {module}", value.core)  # it raises with the reason
            sketches[i, starts[module] : starts[module] + small.numel()] = small.flatten()
            squares.append(square)
            if value.bias is not None:
                biases.setdefault(module, {})[i] = _bias(value)
        norms[i] = math.fsum(squares)
    inner = (sketches @ sketches.mT).double()
    error = _standard_error(inner.diagonal(), norms)
    inner.diagonal().copy_(norms)  # these are known, so nothing is estimated here
    for having in biases.values():
        # Biases are short and few adapters have any, so their products are exact.
        stacked = torch.stack(list(having.values()))
        at = torch.tensor(list(having))
        inner[at[:, None], at[None, :]] += stacked @ stacked.mT
    return Gram(tuple(names), inner, inner.diagonal().clamp(min=0.0).sqrt(), error)


def _standard_error(sketched: Tensor, known: Tensor) -> float:
    """The root mean square of what the sketch makes of known squares, relative to these."""
    there = known > 0
    if not bool(there.any()):
        return 0.0
    return float((sketched[there] / known[there] - 1.0).square().mean().sqrt())


def _side(adapters: int, modules: int) -> int:
    """How many rows a sketch of one module gets, so that all sketches fit into memory."""
    room = _SKETCH_NUMBERS / max(1, adapters * modules)
    return max(4, min(_MOST_SIDE, int(math.sqrt(room))))


def _map(name: str, shape: tuple[int, ...], side: int) -> tuple[Tensor, Tensor]:
    """S (batch, k, out) and T (batch, k, in) of a module; the identity where that is no larger.

    They are drawn from the module's name alone, so that another run, or another set of adapters,
    gets the same ones.
    """
    seed = int.from_bytes(hashlib.sha256(f"{name} {shape}".encode()).digest()[:7], "big")
    draw = torch.Generator().manual_seed(seed)
    batch, out, into = math.prod(shape[:-2]), shape[-2], shape[-1]
    maps = []
    for size in (out, into):
        # A batch is summed up in one sketch: with identities its matrices would run together.
        if size <= side and batch == 1:
            maps.append(torch.eye(size)[None])
        else:
            maps.append(torch.randn(batch, side, size, generator=draw) / math.sqrt(side))
    return maps[0], maps[1]


def _small(value: LowRank, S: Tensor, T: Tensor) -> tuple[Tensor, float]:
    """(k, k): S ΔW T; and ‖ΔW‖², biases not included."""
    batch = math.prod(value.shape[:-2])
    B = value.B.detach().cpu().float().reshape(batch, *value.B.shape[-2:])
    A = value.A.detach().cpu().float().reshape(batch, *value.A.shape[-2:])
    if batch == 1:
        B, A, S, T = B[0], A[0], S[0], T[0]  # a plain product is faster than a batch of one
    sketch = ((S @ B) @ (T @ A.mT).mT) * value.scale  # (k, r) (r, k)
    square = ((B.mT @ B).double() * (A @ A.mT).double()).sum() * value.scale**2
    return sketch.reshape(batch, *sketch.shape[-2:]).sum(0), max(float(square), 0.0)
