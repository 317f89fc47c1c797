"""Tell whether the numbers of an increment are finite, and fit into a dtype.

    max |scale · B A|  ≤  |scale| · r · max |A| · max |B|

Law: the answer is yes only if every number fits. The bound costs one pass over the factors and
nearly always decides; if it is too large, the product is computed in blocks of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..errors import SpecError

__all__ = ["all_finite", "check_has_numbers", "increment_fits", "spans"]


def check_has_numbers(A: Tensor) -> None:
    """Refuse a factor without numbers, on the meta device.

    Raises:
        SpecError: it is on the meta device.
    """
    if A.is_meta:
        raise SpecError(
            "the factors have no numbers: they are on the meta device",
            "load the adapter itself first",
        )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether tensors are free of NaN and infinities."""
    return all(_is_finite(t) for t in tensors)


def spans(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors, those that lie close together in one buffer as one: a call costs more than
    a gap.
    """
    buffers: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
    # An adapter that was read from a file lies in one buffer, a tree that was trained in many.
    for tensor in tensors:
        key = tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device
        buffers.setdefault(key, []).append(tensor.detach())
    for found in buffers.values():
        start = min(tensor.storage_offset() for tensor in found)
        end = max(tensor.storage_offset() + _reach(tensor) for tensor in found)
        if len(found) > 1 and end - start <= 2 * sum(tensor.numel() for tensor in found):
            yield found[0].as_strided((end - start,), (1,), start)
        else:
            yield from found


def increment_fits(
    most: float,
    scale: float,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    *,
    blocks: Iterable[Tensor],
) -> bool:
    """Return whether no number of scale · B, scale · bias and scale · B A is larger than ``most``.

    Args:
        most: the largest number of a dtype.
        scale: of the increment.
        A: (\\*batch, r, in).
        B: (\\*batch, out, r).
        bias: (batch · out,) or None.
        blocks: scale · B A in float64, in blocks; iterated only if the bound does not decide.
    """
    scale = abs(scale)
    a, b = _largest(A), _largest(B)
    sizes = [b] if bias is None else [b, _largest(bias)]
    # Comparisons with NaN are false, so a NaN fails here.
    if not all(scale * size <= most for size in sizes) or not math.isfinite(a):
        return False
    if scale * A.shape[-2] * a * b <= most:
        return True
    return all(bool((block.abs() <= most).all()) for block in blocks)


def _is_finite(t: Tensor) -> bool:
    if hasattr(t, "full_tensor"):
        # torch finds no extremes of a sharded tensor.
        return bool(t.isfinite().all())
    # For 16-bit numbers, finding the extremes takes a twentieth of the time of a mask.
    return not t.numel() or math.isfinite(_largest(t))


def _comparable(t: Tensor) -> Tensor:
    """Return the tensor in a dtype that torch can compare, which 8-bit floats are not."""
    return t.float() if t.element_size() == 1 else t


def _largest(t: Tensor) -> float:
    """Return max |x|; NaN if there is one."""
    least, most = torch.aminmax(_comparable(t.detach()))
    return float(torch.maximum(least.abs(), most.abs()))


def _reach(tensor: Tensor) -> int:
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
