"""W ← round_once( W0 + left · right ), never with a second weight-sized tensor.

The sum is computed in fp32, or in fp64 if the base or a factor is, and rounded once into W's dtype:

    same dtype    W is fp32 or fp64, or bf16 with bf16 factors on a machine whose bf16 product is
                  fast and accumulates in fp32: one stock product reads W0 and writes W
    wider         a block of W0 is widened into a buffer, the product is added there, and the block
                  is rounded into W; where oneDNN's fp32 product is the faster one, W0 is added to
                  a block of the product instead

Law: block sizes are constants, so the bits of a result depend on W0, left and right alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..lowrank import LowRank, concat, stacked
from ..sites import Site
from .unpromised import fp32_product, slow_on_cpu

__all__ = [
    "LARGE_BLOCK",
    "SLOW_ON_CPU",
    "Scratch",
    "add_bias",
    "add_weight",
    "compute_dtype",
    "exact_mode",
    "write_sum",
]

BLOCK = 1 << 21
"""Numbers in a block: 8 MiB of fp32, which stays in a cache, and large enough to pay for the calls.
"""

LARGE_BLOCK = 1 << 24
"""The same on a device with memory of its own, where a call costs more and caches help less."""

PRODUCT_BLOCK = 1 << 19
"""The same if each block is a product of its own: 2 MiB, because a product takes new memory."""

SLOW_ON_CPU = slow_on_cpu()
"""The dtypes for which a CPU is faster with fp32 products."""


def compute_dtype(weight: torch.dtype, *factors: torch.dtype) -> torch.dtype:
    """Return fp64 if the weight or a factor is fp64, else fp32."""
    return torch.float64 if torch.float64 in (weight, *factors) else torch.float32


class Scratch:
    """The buffers in which blocks are widened, one for each dtype and device; kept, because fresh
    memory is slow.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def block(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory of ``like``'s shape and device; the next call may return it
        again.
        """
        key = dtype, like.device
        held = self._held.get(key)
        if held is None or held.numel() < like.numel():
            size = max(like.numel(), BLOCK)
            held = self._held[key] = torch.empty(size, dtype=dtype, device=like.device)
        return held[: like.numel()].view(like.shape)


# ---------------------------------------------------------------------- a site's weight and bias
def add_weight(
    site: Site, target: Tensor, source: Tensor, values: Sequence[LowRank], scratch: Scratch
) -> None:
    """``target ← round_once(source + Σ values)``; ``source`` may be ``target`` itself.

    Args:
        site: says how a delta lies in such a weight. Its own weight may be another one, on the meta
            device for example.
        target: the weight to write.
        source: the numbers to which the values are added.
        values: on ``target``'s device.
        scratch: the buffers.
    """
    dtypes: set[torch.dtype] = set()
    for value in values:
        dtypes |= {value.A.dtype, value.B.dtype}
    wide = compute_dtype(target.dtype, *dtypes)
    if target.dtype != wide and dtypes == {target.dtype}:
        # `folded` widens only if a scale has to be rounded. Narrow factors may take the one stock
        # product.
        value = concat(values).folded()
    else:
        value = stacked(values, dtype=wide, device=target.device)
    rows = site.rows(target)
    write_sum(rows, site.rows(source), *site.sides_of(value), scratch)
    if rows.data_ptr() != target.data_ptr():
        # The weight is not laid out row by row, so `site.rows` returned a copy, and the sum is in
        # that.
        target.copy_(rows.reshape(target.shape))


def add_bias(target: Tensor, source: Tensor, values: Sequence[LowRank]) -> None:
    """``target ← round_once(source + Σ biases)``, in fp64: a bias is small enough."""
    total = source.to(device=target.device, dtype=torch.float64)
    for value in values:
        if value.bias is not None:
            total = total + value.bias.double() * value.scale
    target.copy_(total)


# ---------------------------------------------------------------------- the product
def write_sum(
    weight: Tensor, pristine: Tensor, left: Tensor, right: Tensor, scratch: Scratch
) -> None:
    """``weight ← round_once(pristine + left @ right)``, in place.

    Args:
        weight: (batch, rows, cols), any floating dtype; a view is fine.
        pristine: (batch, rows, cols), weight's dtype, on any device; may be ``weight`` itself.
        left: (batch, rows, R), on weight's device.
        right: (batch, R, cols), on weight's device.
        scratch: the buffers.
    """
    wide = compute_dtype(weight.dtype, left.dtype, right.dtype)
    if weight.dtype == wide:
        left, right = left.to(wide), right.to(wide)
    is_one_dtype = left.dtype == right.dtype == weight.dtype
    # Not in blocks: one call is faster than many, because torch starts its threads for each call.
    if is_one_dtype and (weight.dtype == wide or _bf16_rounds_once(weight)):
        if pristine.device != weight.device:
            pristine = weight.copy_(pristine, non_blocking=True)
        _fused(pristine, left, right, weight)
        return
    left, right = left.to(wide), right.to(wide)
    product = _block_product(weight, wide)
    if product is not None:
        left, right = left.contiguous(), right.mT.contiguous().mT
    numbers = BLOCK if product is None else PRODUCT_BLOCK
    if weight.device.type != "cpu":
        numbers = LARGE_BLOCK
    for w, w0, lft, rgt in _blocks(weight, pristine, left, right, numbers):
        if product is not None and w.ndim == 2:
            w.copy_(product(lft, rgt.mT).add_(w0))
            continue
        block = scratch.block(w, wide)
        block.copy_(w0, non_blocking=True)
        if w.ndim == 3:
            block.baddbmm_(lft, rgt)
        else:
            block.addmm_(lft, rgt)
        w.copy_(block)


def _fused(pristine: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    if len(out) == 1:
        torch.addmm(pristine[0], left[0], right[0], out=out[0])
    else:
        torch.baddbmm(pristine, left, right, out=out)


def _blocks(
    weight: Tensor, pristine: Tensor, left: Tensor, right: Tensor, numbers: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of about ``numbers`` numbers: several matrices of the batch, or several rows of
    one matrix.
    """
    batch, rows, cols = weight.shape
    several = numbers // max(rows * cols, 1)
    if batch > 1 and several > 1:
        for i in range(0, batch, several):
            part = slice(i, i + several)
            yield weight[part], pristine[part], left[part], right[part]
        return
    step = max(numbers // max(cols, 1), 1)
    for b in range(batch):
        for i in range(0, rows, step):
            part = slice(i, i + step)
            yield weight[b, part], pristine[b, part], left[b, part], right[b]


def _block_product(weight: Tensor, wide: torch.dtype) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the product x @ w.mT that blocks are made of; None: blocks of W0 are widened first."""
    # Measured only on a processor with narrow products, where it takes half of MKL's time.
    if weight.device.type != "cpu" or wide != torch.float32 or torch.bfloat16 in SLOW_ON_CPU:
        return None
    product = fp32_product()
    return product if product is not None and _onednn_is_fp32() else None


@functools.cache
def _onednn_is_fp32() -> bool:
    """Return whether oneDNN's product runs here, and with fp32's own precision."""
    product = fp32_product()
    assert product is not None, "asked for where there is one"
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 48, generator=generator, device="cpu") for _ in range(2))
    try:
        result = product(x, w)
    except (RuntimeError, TypeError):  # a signature of another torch
        return False
    exact = x.double() @ w.double().mT
    return bool(((result - exact).abs() <= 2**-18 * (x.double().abs() @ w.double().abs().mT)).all())


def _bf16_rounds_once(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu"
    return weight.dtype == torch.bfloat16 and on_cpu and _cpu_bf16_rounds_once()


@functools.cache
def _cpu_bf16_rounds_once() -> bool:
    """Return whether this machine's bf16 products keep their sums in fp32 until the end.

    torch does not say, so two small products are compared with fp64 once. A product that rounds
    between its partial sums is wrong in far more than one number of a thousand.
    """
    if torch.bfloat16 in SLOW_ON_CPU:
        return False
    generator = torch.Generator().manual_seed(0)
    W0, left, right = (
        torch.randn(shape, generator=generator, device="cpu").to(torch.bfloat16)
        for shape in ((3, 256, 256), (3, 256, 96), (3, 96, 256))
    )
    exact = (W0.double() + left.double() @ right.double()).to(torch.bfloat16)
    result = torch.empty_like(W0)
    wrong_numbers = 0
    for part in (slice(0, 1), slice(0, 3)):  # one matrix and a batch: torch has a kernel for each
        _fused(W0[part], left[part], right[part], result[part])
        wrong_numbers = max(wrong_numbers, int((result[part] != exact[part]).sum()))
    return wrong_numbers <= 256 * 256 // 1000


@contextlib.contextmanager
def exact_mode(*devices: torch.device) -> Iterator[None]:
    """Turn off everything that changes bits or records a graph, for the length of a ``with``.

    That is autograd, autocast, inference tensors, and TF32 or bf16 in place of fp32 products.
    """
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        # A setting of the whole process: it is touched only if it has to be, and put back after an
        # exception too.
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if precision != "highest":
                torch.set_float32_matmul_precision(precision)
