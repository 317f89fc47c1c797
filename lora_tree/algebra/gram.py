"""Gram: the inner products of all pairs of many adapters, from their factors.

    exact      ⟨ΔW_x, ΔW_y⟩ = Σ (B_xᵀ B_y) ∘ (A_x A_yᵀ)    all pairs in two products of (Σr, Σr)
    sketched   ⟨S ΔW_x T, S ΔW_y T⟩    S: (k, out)   T: (in, k)   Gaussian, seeded by module

The exact method multiplies every rank with every other one: 10¹³ multiplications for a thousand
adapters. A sketch (Johnson–Lindenstrauss on both sides, https://arxiv.org/abs/1411.4357 §2) costs
one small product per adapter and reads each adapter once, so the adapters are never in memory
together. Norms are computed from the factors in both.

Law: neither result depends on the order of the adapters, nor on the gauge (B R) (R⁻¹ A) of their
factors.
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
from ..lowrank.qr_core import MOST_NORM
from .core import check_readable, scaled_bias
from .deviation import call_named

__all__ = ["Gram", "gram"]

EXACT_STEPS = 5e10
"""The sketch is used if the exact method needs more multiplications (seconds on a few cores)."""

_MOST_SIDE = 64
_SKETCH_NUMBERS = 250_000_000  # in the sketches of all adapters together: 1 GB in fp32
_LEAST_PLAIN, _MOST_PLAIN = 1e-4, 1e4  # the largest number of a factor that needs no other unit
_CHUNK = 64  # adapters whose products with all others are in memory at once

Outline = tuple[tuple[int, ...], int]
"""(shape, rank) of a module, as its file's header states them."""


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
        """(n, n): 1 on the diagonal, 0 between a zero adapter and any other."""
        # Divided by one norm after the other, because the product of two tiny ones would be zero.
        lengths = torch.where(self.norms > 0, self.norms, torch.inf)
        found = self.inner / lengths[:, None] / lengths[None, :]
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
        read: name → adapter. For sketches it is called once per name, and no adapter is kept.
        outline: name → adapter, possibly without numbers (on the meta device).
        exact: True or False; None: exact if that takes at most a few seconds.

    Raises:
        ShapeMismatch: two adapters change one module in different shapes; names both and the
            module.
        SpecError: a factor is not finite; names the adapter and the module.
    """
    outlines: dict[str, dict[str, Outline]] = {}
    for name in names:
        modules = outline(name).modules
        outlines[name] = {module: (value.shape, value.rank) for module, value in modules.items()}
    # Shapes are compared before any numbers are read, so adapters of two bases fail at once.
    places = _places(outlines)
    if exact is None:
        exact = _steps(outlines) <= EXACT_STEPS
    return _exact(names, read) if exact else _sketched(names, read, places)


def _places(outlines: Mapping[str, Mapping[str, Outline]]) -> dict[str, tuple[int, ...]]:
    """Return module → its shape, which all adapters must agree on."""
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
    """Return the number of multiplications of the exact method."""
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
            # `_places` compared shapes only; this compares the layouts as well.
            call_named(module, same_place, values[0], value)
        at = torch.tensor(rows)
        inner[at[:, None], at[None, :]] += _products(values)
    # Rounding may leave a squared norm slightly below zero.
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
    products = torch.zeros(len(values), len(values), dtype=torch.float64)
    left = torch.cat([_flat(v.B, batch) * v.scale for v in values], dim=-1)  # (batch, out, Σr)
    right = torch.cat([_flat(v.A, batch) for v in values], dim=-2)  # (batch, Σr, in)
    ranks = torch.tensor([value.rank for value in values])
    # A chunk bounds the products that are in memory at once: (its ranks, all ranks).
    ends = ranks.cumsum(0).tolist()
    whose = torch.repeat_interleave(torch.arange(len(values)), ranks)
    for first in range(0, len(values), _CHUNK):
        last = min(first + _CHUNK, len(values))
        chunk = slice(ends[first - 1] if first else 0, ends[last - 1])
        # The upper triangle is enough: the matrix is symmetric.
        upper = slice(chunk.start, None)
        overlap = left[..., chunk].mT @ left[..., upper]
        overlap *= right[..., chunk, :] @ right[..., upper, :].mT
        overlap = overlap.sum(0)  # (ranks of the chunk, ranks of the rest)
        rows = overlap.new_zeros(last - first, overlap.shape[1])
        rows.index_add_(0, whose[chunk] - first, overlap)
        sums = rows.new_zeros(last - first, len(values) - first)
        sums.index_add_(1, whose[upper] - first, rows)
        products[first:last, first:] = sums.cpu()
        products[first:, first:last] = sums.mT.cpu()
    return products + _biases(values)


def _flat(factor: Tensor, batch: tuple[int, ...]) -> Tensor:
    wide = factor.detach().to(device="cpu", dtype=torch.float64)
    return wide.reshape(math.prod(batch), *factor.shape[-2:])


def _biases(values: Sequence[LowRank]) -> Tensor:
    if all(value.bias is None for value in values):
        return torch.zeros((), dtype=torch.float64)
    stacked = torch.stack([_bias(value) for value in values])
    return stacked @ stacked.mT


def _bias(value: LowRank) -> Tensor:
    """Return the bias (out,) times its scale; zeros if there is none."""
    if value.bias is None:
        return torch.zeros(math.prod(value.B.shape[:-1]), dtype=torch.float64)
    return value.bias.detach().cpu().double() * value.scale


def _check(names: Sequence[str], adapters: Iterable[Adapter]) -> None:
    for name, adapter in zip(names, adapters, strict=True):
        for module, value in adapter.modules.items():
            call_named(f"{name}: {module}", check_readable, value)
            call_named(f"{name}: {module}", scaled_bias, value, value)


# ---------------------------------------------------------------------- sketched
def _sketched(
    names: Sequence[str], read: Callable[[str], Adapter], places: Mapping[str, tuple[int, ...]]
) -> Gram:
    side = _sketch_rows(len(names), len(places))
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    starts: dict[str, int] = {}
    width = 0
    for name, shape in places.items():
        # Each module's sketch has a fixed slice of the row, zero for adapters that lack the module.
        S, T = maps[name] = _map(name, shape, side)
        starts[name] = width
        width += S.shape[-2] * T.shape[-2]
    sketches = torch.zeros(len(names), width)
    norms = torch.zeros(len(names), dtype=torch.float64)  # squared, without biases, in units²
    units = torch.zeros_like(norms)
    biases: dict[str, dict[int, Tensor]] = {}
    for i, name in enumerate(names):
        # One adapter at a time: all of them may be larger than memory, their sketches are not.
        adapter = read(name)
        _check([name], [adapter])
        made: dict[str, tuple[Tensor, float, float]] = {}
        for module, value in adapter.modules.items():
            made[module] = call_named(f"{name}: {module}", _sketch_value, value, *maps[module])
            if value.bias is not None:
                biases.setdefault(module, {})[i] = _bias(value)
        unit = max((size for _, _, size in made.values()), default=0.0)
        if unit == 0.0:
            continue
        # A row is in units of its largest module, so that it neither overflows fp32 nor vanishes.
        units[i] = unit
        squares = []
        for module, (small, square, size) in made.items():
            row = slice(starts[module], starts[module] + small.numel())
            sketches[i, row] = (small * (size / unit)).flatten()
            squares.append(square * (size / unit) ** 2)
        norms[i] = math.fsum(squares)
    inner = (sketches @ sketches.mT).double()
    error = _standard_error(inner.diagonal(), norms)
    inner.diagonal().copy_(norms)  # the squared norms are known exactly
    inner *= units[:, None] * units[None, :]
    for having in biases.values():
        # Biases are short and rare, so their products are computed exactly.
        stacked = torch.stack(list(having.values()))
        at = torch.tensor(list(having))
        inner[at[:, None], at[None, :]] += stacked @ stacked.mT
    return Gram(tuple(names), inner, inner.diagonal().clamp(min=0.0).sqrt(), error)


def _standard_error(sketched: Tensor, known: Tensor) -> float:
    """Return the root mean square of the sketch's relative errors in the known squared norms."""
    there = known > 0
    if not bool(there.any()):
        return 0.0
    return float((sketched[there] / known[there] - 1.0).square().mean().sqrt())


def _sketch_rows(adapters: int, modules: int) -> int:
    """Return the number of rows of one module's sketch, so that all sketches fit into memory."""
    room = _SKETCH_NUMBERS / max(1, adapters * modules)
    return max(4, min(_MOST_SIDE, int(math.sqrt(room))))


def _map(name: str, shape: tuple[int, ...], side: int) -> tuple[Tensor, Tensor]:
    """Return S (batch, k, out) and T (batch, k, in) of a module; the identity if that is no larger.

    They are seeded by the module's name and shape alone, so another run, or another set of
    adapters, gets the same ones.
    """
    seed = int.from_bytes(hashlib.sha256(f"{name} {shape}".encode()).digest()[:7], "big")
    draw = torch.Generator().manual_seed(seed)
    batch, out, into = math.prod(shape[:-2]), shape[-2], shape[-1]
    maps = []
    for size in (out, into):
        # A batch is summed into one sketch: with identities its matrices could not be told apart.
        if size <= side and batch == 1:
            maps.append(torch.eye(size)[None])
        else:
            maps.append(torch.randn(batch, side, size, generator=draw) / math.sqrt(side))
    return maps[0], maps[1]


def _sketch_value(value: LowRank, S: Tensor, T: Tensor) -> tuple[Tensor, float, float]:
    """Return S ΔW Tᵀ / u (k, k), ‖ΔW / u‖² without the bias, and the unit u.

    Raises:
        SpecError: the factors are not finite, or their product is too large.
    """
    batch = math.prod(value.shape[:-2])
    B, b = _in_units(value.B.reshape(batch, *value.B.shape[-2:]))
    A, a = _in_units(value.A.reshape(batch, *value.A.shape[-2:]))
    unit = abs(value.scale) * a * b  # NaN if a factor has one
    if not unit <= MOST_NORM:
        value.core()  # it raises with the reason
        raise SpecError("the factors are too large for float64")
    if batch == 1:
        B, A, S, T = B[0], A[0], S[0], T[0]  # a plain product is faster than a batch of one
    sketch = (S @ B) @ (T @ A.mT).mT  # (k, r) (r, k)
    square = ((B.mT @ B).double() * (A @ A.mT).double()).sum()
    sketch = sketch.reshape(batch, *sketch.shape[-2:]).sum(0) * math.copysign(1.0, value.scale)
    return sketch, max(float(square), 0.0), unit


def _in_units(factor: Tensor) -> tuple[Tensor, float]:
    """Return a factor in fp32, in units in which products fit, and the unit: nearly always 1."""
    factor = factor.detach().cpu()
    if factor.element_size() == 1:
        factor = factor.float()  # torch finds no largest number among 8-bit floats
    largest = float(factor.abs().max())
    if _LEAST_PLAIN < largest < _MOST_PLAIN:
        return factor.float(), 1.0
    if largest == 0.0 or not math.isfinite(largest):
        return factor.float(), largest
    return (factor.double() / largest).float(), largest
