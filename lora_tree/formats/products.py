"""LoHa and LoKr as exact factors: products of two small increments are low-rank themselves.

    LoHa   ΔW = (B₁A₁) ∘ (B₂A₂)     B's columns are the products b₁ᵢ ∘ b₂ⱼ, A's rows a₁ᵢ ∘ a₂ⱼ
    LoKr   ΔW = W₁ ⊗ W₂             (U₁V₁) ⊗ (U₂V₂) = (U₁ ⊗ U₂)(V₁ ⊗ V₂)

The rank is r₁·r₂. If a LoKr stores one half whole, it is factored as W·I or I·W, whichever has the
smaller rank. A Tucker core (``t``) is contracted with the factor beside it:
W[p, c, k] = Σᵢ a[i, p] Σⱼ t[i, j, k] b[j, c].

Each number is a product of two, or for a Tucker core a sum of such products, in fp32 or wider,
where the product of two fp16 or bf16 numbers is exact. The ranks are large: a caller may cut them
with `lora_tree.Adapter.truncate`, which returns the error.

References: FedPara, https://arxiv.org/abs/2108.06098 (LoHa's Hadamard product); KronA,
https://arxiv.org/abs/2212.10650; LyCORIS, https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError
from ..lowrank import LINEAR, Layout, LowRank
from ..system.memory import check_fits
from .pairs import ModuleTensors, alpha_of

__all__ = ["PRODUCT_PARTS", "as_product", "is_product"]

HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
HADAMARD_CORES = ("hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
PRODUCT_PARTS = (*HADAMARD, *HADAMARD_CORES, *KRONECKER)
"""The last parts of keys, in PEFT's files as in LyCORIS' own."""


class _Factored(NamedTuple):
    """One half of a product as W = U V.

    Args:
        U: (out, r).
        V: (r, in · kernel).
        kernel: of a convolution; () for a plain matrix.
        is_full: the file holds W itself, and U or V is the identity.
    """

    U: Tensor
    V: Tensor
    kernel: tuple[int, ...] = ()
    is_full: bool = False


def is_product(parts: Collection[str]) -> bool:
    """Return whether a module's tensors belong to a LoHa or a LoKr."""
    return any(part in PRODUCT_PARTS for part in parts)


def as_product(module_tensors: ModuleTensors, *, scale: float | None = None) -> LowRank:
    """Return one module's increment as factors.

    Args:
        module_tensors: the parts of a LoHa or a LoKr, optionally with an ``alpha``.
        scale: from a config; None: as in LyCORIS, from alpha and the rank of the halves.

    Raises:
        FormatError: parts are missing, or don't fit together; names the module.
        BudgetError: the factors would take more memory than is available.
    """
    parts = module_tensors.parts
    others = [part for part in parts if part not in PRODUCT_PARTS and part != "alpha"]
    is_hadamard = any(part.startswith("hada_") for part in parts)
    if others or (is_hadamard and any(part.startswith("lokr_") for part in parts)):
        raise FormatError(
            f"{module_tensors.named}: parts of several kinds: {', '.join(sorted(parts))}"
        )
    wide = torch.float32
    for tensor in parts.values():
        wide = torch.promote_types(wide, tensor.dtype)
    widened = {part: tensor.to(wide) for part, tensor in parts.items()}
    if is_hadamard:
        first = _half(module_tensors, widened, "hada_w1", core="hada_t1")
        second = _half(module_tensors, widened, "hada_w2", core="hada_t2")
        A, B = _hadamard(module_tensors.named, first, second)
        rank: int | None = second.V.shape[0]
    else:
        first = _half(module_tensors, widened, "lokr_w1", core=None)
        second = _half(module_tensors, widened, "lokr_w2", core="lokr_t2")
        A, B = _kronecker(module_tensors.named, first, second)
        ranks = [half.V.shape[0] for half in (second, first) if not half.is_full]
        # LyCORIS applies alpha only if a half is factored: two full halves have no rank.
        rank = ranks[0] if ranks else None
    if scale is None:
        scale = 1.0 if rank is None else alpha_of(module_tensors, rank) / rank
    kernel = second.kernel
    layout = Layout("conv", kernel) if kernel else LINEAR
    return LowRank(A, B, scale, layout=layout)


def _half(
    module_tensors: ModuleTensors, parts: Mapping[str, Tensor], name: str, *, core: str | None
) -> _Factored:
    """Return one of the two matrices of a product, as factors.

    Raises:
        FormatError: a part is missing, or the parts don't multiply.
    """
    full, a, b = (parts.get(part) for part in (name, f"{name}_a", f"{name}_b"))
    t = parts.get(core) if core is not None else None
    if full is not None:
        if a is not None or b is not None or t is not None:
            raise FormatError(f"{module_tensors.named}: {name} both whole and in factors")
        return _full(module_tensors, full, name)
    if a is None or b is None:
        raise FormatError(
            f"{module_tensors.named}: no {name if a is None and b is None else f'{name}_a or _b'}"
        )
    if a.ndim != 2 or b.ndim != 2:
        raise FormatError(
            f"{module_tensors.named}: {name}_a {tuple(a.shape)}, {name}_b {tuple(b.shape)}"
        )
    if t is None:
        if a.shape[1] != b.shape[0]:
            raise _misfit(module_tensors, name, a, b)
        return _Factored(a, b)
    if t.ndim not in (3, 4, 5) or t.shape[:2] != (a.shape[0], b.shape[0]):
        raise _misfit(module_tensors, name, a, b, t)
    kernel = tuple(t.shape[2:])
    check_fits(a.shape[0] * b.shape[1] * math.prod(kernel) * a.element_size(), module_tensors.named)
    V = torch.einsum("ijk,jc->ick", t.flatten(2), b).flatten(1)  # (r, in · kernel)
    return _Factored(a.mT, V, kernel)


def _full(found: ModuleTensors, full: Tensor, name: str) -> _Factored:
    """Factor a half that the file holds whole, with the identity of its shorter side."""
    if full.ndim not in (2, 3, 4, 5) or (name == "lokr_w1" and full.ndim != 2):
        raise FormatError(f"{found.named}: {name} is {tuple(full.shape)}, expected a matrix")
    kernel = tuple(full.shape[2:])
    W = full.flatten(1)
    rows, columns = W.shape
    eye = torch.eye(min(rows, columns), dtype=W.dtype, device=W.device)
    if rows <= columns:
        return _Factored(eye, W, kernel, is_full=True)
    return _Factored(W, eye, kernel, is_full=True)


def _hadamard(named: str, first: _Factored, second: _Factored) -> tuple[Tensor, Tensor]:
    """Return A and B of an elementwise product: the Khatri–Rao products of the factors."""
    if first.U.shape[0] != second.U.shape[0] or first.V.shape[1] != second.V.shape[1]:
        raise FormatError(
            f"{named}: the two matrices of a LoHa differ in shape: {_shapes(first, second)}"
        )
    if first.kernel != second.kernel:
        raise FormatError(f"{named}: kernels of {first.kernel} and {second.kernel}")
    rank = first.V.shape[0] * second.V.shape[0]
    _check_room(named, rank, first.U.shape[0], first.V.shape[1], first.U)
    # b₁ᵢ ∘ b₂ⱼ and a₁ᵢ ∘ a₂ⱼ in the same order of the pairs (i, j)
    B = (first.U[:, :, None] * second.U[:, None, :]).flatten(1)  # (out, r₁·r₂)
    A = (first.V[:, None, :] * second.V[None, :, :]).flatten(0, 1)  # (r₁·r₂, in)
    return A, B


def _kronecker(named: str, first: _Factored, second: _Factored) -> tuple[Tensor, Tensor]:
    """Return A and B of a Kronecker product: the Kronecker products of the factors."""
    rank = first.V.shape[0] * second.V.shape[0]
    out = first.U.shape[0] * second.U.shape[0]
    into = first.V.shape[1] * second.V.shape[1]
    _check_room(named, rank, out, into, first.U)
    return _kron(first.V, second.V), _kron(first.U, second.U)


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """Return x ⊗ y. torch.kron fails on a transposed matrix with an axis of size 1."""
    blocks = x[:, None, :, None] * y[None, :, None, :]  # (x rows, y rows, x columns, y columns)
    return blocks.flatten(2).flatten(0, 1)


def _check_room(named: str, rank: int, out: int, into: int, like: Tensor) -> None:
    """Refuse factors that memory can't hold, before they are allocated.

    The factors of a product are larger than those in the file, so a small file may need much.
    """
    check_fits(rank * (out + into) * like.element_size(), named)


def _shapes(first: _Factored, second: _Factored) -> str:
    """Return the (out, in) of both halves, as text."""
    shapes = [(half.U.shape[0], half.V.shape[1]) for half in (first, second)]
    return f"{shapes[0]} and {shapes[1]}"


def _misfit(found: ModuleTensors, name: str, a: Tensor, b: Tensor, *core: Tensor) -> FormatError:
    shapes = f"{name}_a {tuple(a.shape)}, {name}_b {tuple(b.shape)}"
    for t in core:
        shapes += f", core {tuple(t.shape)}"
    return FormatError(
        f"{found.named}: {shapes} do not multiply",
        "a is (out, r) and b is (r, in); with a core (r, r, *kernel) a is (r, out)",
    )
