"""Check that A, B and a bias make one increment: their types, shapes and device.

Every value is checked when it is made, and opening a tree makes thousands. So the checks read no
numbers, and take only a few comparisons.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ShapeMismatch, SpecError
from ..given import unchecked

__all__ = ["check_one_device", "check_shapes", "check_tensors"]


def check_tensors(A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """Refuse factors that are not dense floating point tensors.

    Raises:
        SpecError: one is not.
    """
    is_bias = bias is None or isinstance(unchecked(bias), Tensor)
    if not (isinstance(unchecked(A), Tensor) and isinstance(unchecked(B), Tensor) and is_bias):
        raise SpecError(
            f"factors must be torch tensors, got A {type(A).__name__}, B {type(B).__name__}"
            f", bias {type(bias).__name__}",
            "torch.from_numpy makes one of a numpy array",
        )
    if not (A.is_floating_point() and B.is_floating_point()):
        raise SpecError(f"factors must be floating point, got A {A.dtype}, B {B.dtype}")
    if bias is not None and not bias.is_floating_point():
        raise SpecError(f"factors must be floating point, got a bias of {bias.dtype}")
    for tensor in (A, B) if bias is None else (A, B, bias):
        # torch has neither a QR nor a stack of sparse tensors.
        if tensor.layout is not torch.strided:
            raise SpecError(
                f"factors must be dense tensors, got one of {tensor.layout}", "tensor.to_dense()"
            )


def check_shapes(a: torch.Size, b: torch.Size, bias: Tensor | None) -> None:
    """Refuse factors that do not multiply to an (out, in), or have no numbers.

    Args:
        a: the shape of A, (*batch, r, in).
        b: the shape of B, (*batch, out, r).
        bias: (batch · out,), or None.

    Raises:
        ShapeMismatch: they do not fit together; the error has all shapes.
    """
    # Only shapes are compared, so factors on the meta device pass too.
    is_product = len(a) >= 2 and len(a) == len(b) and a[-2] == b[-1]
    # Slicing a torch.Size is slow, and nearly all factors have no batch dimension.
    if not is_product or (len(a) > 2 and a[:-2] != b[:-2]):
        raise ShapeMismatch(
            f"A is {tuple(a)}, B is {tuple(b)}: they do not multiply to an (out, in)",
            "A is (*batch, r, in) and B is (*batch, out, r)",
        )
    if 0 in a or 0 in b:
        raise ShapeMismatch(
            f"A is {tuple(a)}, B is {tuple(b)}: empty factors, expected sizes of at least 1",
            "leave the module out of the adapter",
        )
    if bias is None:
        return
    outputs = math.prod(b[:-1])  # batch · out
    if bias.shape != (outputs,):
        raise ShapeMismatch(f"bias is {tuple(bias.shape)}, expected ({outputs},)")


def check_one_device(A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """Refuse factors that are on several devices.

    Raises:
        SpecError: they are; the error has each one's device.
    """
    if A.device == B.device and (bias is None or bias.device == A.device):
        return
    where = f"A is on {A.device}, B on {B.device}"
    if bias is not None:
        where += f", the bias on {bias.device}"
    raise SpecError(f"{where}: expected one device for all", "move them first: B.to(A.device)")
