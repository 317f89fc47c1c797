"""Factors in the formats of image models: a pair for each module, and an alpha beside it.

    key             Linear      ConvNd
    down, lora_A    (r, in)     (r, in, *kernel)
    up, lora_B      (out, r)    (out, r, 1, …)
    mid             —           (r, r, *kernel)     Tucker; down is (r, in, 1, …) then
    alpha           a number: scale = alpha / r     without it the scale is 1

A Tucker convolution also has rank r,
ΔW[o, i, k] = Σ_p up[o, p] Σ_q mid[p, q, k] down[q, i], so when the file is read, mid and down are
contracted over q into A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError, LoraTreeError
from ..lowrank import LINEAR, Layout, LowRank

__all__ = ["ModuleTensors", "alpha_of", "as_lowrank", "down_and_up"]

# The dimensions of a Conv3d's kernel; torch has no convolution of more.
MOST_KERNEL = 3


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors that a file holds for one module: part → tensor.

    Args:
        module: its name, for the adapter.
        named: its name in the file, for messages.
        parts: ``down`` and ``up``; optionally ``mid``, ``alpha``, ``bias``.
    """

    module: str
    named: str
    parts: Mapping[str, Tensor]


def as_lowrank(module_tensors: ModuleTensors, *, scale: float | None = None) -> LowRank:
    """Return one module's increment.

    Args:
        scale: the scale, if the file states it elsewhere; None: from the tensors' own alpha.

    Raises:
        FormatError: half a pair, or shapes that don't fit; names the module.
    """
    missing = [part for part in ("down", "up") if part not in module_tensors.parts]
    if missing:
        raise FormatError(
            f"{module_tensors.named}: no {' and no '.join(missing)} factor: half a pair"
        )
    down, up = module_tensors.parts["down"], module_tensors.parts["up"]
    mid = module_tensors.parts.get("mid")
    _check_shapes(module_tensors.named, down, up, mid)
    rank = up.shape[1]
    if scale is None:
        scale = alpha_of(module_tensors, rank) / rank
    B = up.flatten(1)
    kernel = tuple((down if mid is None else mid).shape[2:])
    if mid is None:
        A = down.flatten(1)
    else:
        # In fp16 or bf16 the contraction would round every sum to few digits.
        wide = torch.promote_types(torch.promote_types(mid.dtype, down.dtype), torch.float32)
        # (p, q, *k) with (q, i) → (p, i, *k), in the order of a kernel's numbers in its weight
        A = torch.einsum("pqk,qi->pik", mid.flatten(2).to(wide), down.flatten(1).to(wide))
        A = A.flatten(1)
    layout = Layout("conv", kernel) if kernel else LINEAR
    try:
        return LowRank(A, B, scale, module_tensors.parts.get("bias"), layout)
    # The tensors come from a file, so a value that can't be built is an error of the file.
    except LoraTreeError as error:
        raise FormatError(f"{module_tensors.named}: {error.what}", *error.todo) from error


def alpha_of(module_tensors: ModuleTensors, rank: int) -> float:
    """Return the module's alpha, or its rank if the file has no alpha.

    Raises:
        FormatError: it is not one finite number.
    """
    alpha = module_tensors.parts.get("alpha")
    if alpha is None:
        return float(rank)
    if alpha.numel() != 1:
        raise FormatError(
            f"{module_tensors.named}: alpha is {tuple(alpha.shape)}, expected one number"
        )
    if alpha.is_meta:
        return float(rank)  # an outline has no numbers
    number = float(alpha)
    if not math.isfinite(number):
        raise FormatError(f"{module_tensors.named}: alpha is {number}, expected a finite number")
    return number


def down_and_up(value: LowRank) -> tuple[Tensor, Tensor]:
    """Return A and B in the shapes of the file, with the dimensions of the module's kernel.

    Raises:
        FormatError: these formats can't hold factors of this kind of layer.
    """
    kind, kernel = value.layout.kind, value.layout.kernel
    if kind not in ("linear", "conv") or value.A.ndim != 2:
        raise FormatError(
            f"{kind} factors of {tuple(value.A.shape)}: no key of this format holds them"
        )
    A, B = value.A, value.B
    if kernel:
        A = A.reshape(len(A), -1, *kernel)  # (r, in, *kernel)
        B = B.reshape(*B.shape, *(1 for _ in kernel))  # (out, r, 1, …)
    return A, B


def _check_shapes(named: str, down: Tensor, up: Tensor, mid: Tensor | None) -> None:
    """Refuse factors that don't multiply, before they are reshaped."""
    shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
    if mid is not None:
        shapes += f", mid {tuple(mid.shape)}"
    flat_up = up.ndim >= 2 and all(size == 1 for size in up.shape[2:])
    dimensions = range(2, 3 + MOST_KERNEL)
    fits = flat_up and down.ndim in dimensions and up.ndim in dimensions
    if fits and mid is None:
        fits = down.shape[0] == up.shape[1]
    elif fits and mid is not None:
        flat_down = all(size == 1 for size in down.shape[2:])
        fits = (
            flat_down
            and mid.ndim in range(3, 3 + MOST_KERNEL)
            and mid.shape[:2] == (up.shape[1], down.shape[0])
        )
    if not fits:
        raise FormatError(
            f"{named}: {shapes} do not multiply",
            "down is (r, in, *kernel) and up is (out, r, 1, …); with mid (r, r, *kernel) down is "
            "(r, in, 1, …)",
        )
