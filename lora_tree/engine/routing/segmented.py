"""segmented    two launches of our own kernels, which read each node's factors where they lie.

    segments of the batch (index lists)  ─┐
    table of the site (addresses)        ─┼─▶ shrink ─▶ expand
    input, output of the site            ─┘

Nothing is stacked and no row is moved. The lists are made once for a batch and shared by all sites
with the same nodes, and the tables once for a plan, so that a new batch over known nodes costs a
copy of its lists. The backward takes the same two kernels with the sides exchanged, and one more
for each of A and B of the nodes that train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import InPlace, Segments, Tiling, routed_kernels, routes
from ..rows.batch import Batch
from .owed import Owed
from .sum_form import SumForm

__all__ = ["NARROW", "SegmentedForm", "route_dtype"]

NARROW = (torch.bfloat16, torch.float16, torch.float32)

_Size: TypeAlias = tuple[torch.dtype, torch.dtype, torch.dtype, int, int]
"""The dtypes of the products, of an input and of an output; how many numbers the input has; and the
index of the output's device.
"""


class SegmentedForm(SumForm):
    """Our own kernels, on devices on which they run."""

    widens = False
    lays_out = False

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._kind = owed.device.type
        self._batch = owed.batch
        self._known: tuple[_Size, InPlace] | None = None
        """The size of the last call, and its launches."""
        self._table = None if owed.live else owed.table
        """The addresses of factors that are frozen."""
        self._parameters: list[Tensor] = []
        if owed.live:
            for value in owed.values:
                self._parameters += [value.A, value.B]

    def over(self, batch: Batch) -> SegmentedForm:
        """Return the form for another batch of the same nodes.

        It costs a copy of a dictionary, so that a new batch does not decide, site by site, what the
        batches before it have decided. `owed` stays that of the first batch. Nothing that is read
        of it depends on the batch, unless there are biases, and a form with biases is not copied.
        """
        assert not self.owed.live
        assert not self._biased
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._batch, other._known = batch, None
        return other

    @property
    def frozen(self) -> Sequence[Tensor]:
        """A factor of each value that does not train; those of one adapter share their memory."""
        if self.owed.live:
            return ()
        values = self.owed.values
        key = "frozen", self.owed.site.name, len(values)
        return self.owed.tables.once(key, lambda: [value.A for value in values])

    @classmethod
    def suits(cls, owed: Owed, tokens: int) -> bool:
        if not owed.site.is_product or owed.dtype not in NARROW or not routes(owed.device):
            return False
        return owed.site.dtype in (None, *NARROW) and owed.table is not None

    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        out, x = out.contiguous(), x.contiguous()
        compute = route_dtype(self.owed.dtype, x.dtype, self._kind)
        segments, tiling = self._of(out, compute)
        parameters = self._parameters if torch.is_grad_enabled() else ()
        return _routed(out, x, self, segments, tiling, *parameters)

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        out, x = out.contiguous(), x.contiguous()
        self._launch(self._size(out, x), out, x)
        return out

    def _size(self, out: Tensor, x: Tensor) -> _Size:
        """Return the key under which calls may share their launches."""
        compute = route_dtype(self.owed.dtype, x.dtype, self._kind)
        return compute, x.dtype, out.dtype, x.numel(), out.get_device()

    def _launch(self, size: _Size, out: Tensor, x: Tensor) -> None:
        """Add the sum to ``out`` in place, by the launches of the last call if it had this size.

        Most forwards have inputs of the size of the last one, and finding the launches takes the
        host as long as launching them.
        """
        table = self._table or self.owed.table_now()
        known = self._known
        if known is None or known[0] != size:
            segments, tiling = self._of(out, size[0])
            known = size, routed_kernels().in_place(x, out, segments, table, tiling)
            # Factors that train may have another kind of table at the next call.
            self._known = known if self._table is not None else None
        known[1](x, out, table)

    def _of(self, out: Tensor, compute: torch.dtype) -> tuple[Segments, Tiling]:
        batch = self._batch
        tokens = out.numel() // (len(batch) * out.shape[-1])
        return batch.tiled(tokens, compute, self.owed.device)

    def write(
        self, x: Tensor, base: Tensor, out: Tensor, segments: Segments, tiling: Tiling
    ) -> Tensor:
        """Write the sum to ``out``, and return the narrow product: two launches."""
        kernels, table = routed_kernels(), self.owed.table_now()
        low = kernels.shrink(x, segments, table, 0, tiling)
        kernels.expand(low, base, out, segments, table, 1, tiling)
        return low


class _Routed(torch.autograd.Function):
    """The sum with its gradients: for the input, and for each factor that trains."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        form: SegmentedForm,
        segments: Segments,
        tiling: Tiling,
        *factors: Tensor,
    ) -> Tensor:
        after = torch.empty_like(out)
        low = form.write(x, out, after, segments, tiling)
        ctx.form, ctx.segments, ctx.tiling = form, segments, tiling
        # The factors are saved so that autograd raises in backward if they were written to, or if
        # the cache has evicted them.
        frozen = form.frozen
        ctx.trained = len(factors)
        ctx.save_for_backward(x, low, *factors, *frozen)
        return after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, low, *saved = ctx.saved_tensors
        factors = saved[: ctx.trained]
        segments, tiling = ctx.segments, ctx.tiling
        kernels, table = routed_kernels(), ctx.form.owed.table_now()
        grad = grad.contiguous()
        narrow = kernels.shrink(grad, segments, table, 1, tiling)
        to_input = None
        if ctx.needs_input_grad[1]:
            to_input = torch.empty_like(x)
            kernels.expand(narrow, None, to_input, segments, table, 0, tiling)
        to_factors: list[Tensor | None] = [None] * len(factors)
        for side, (narrow_sum, wide) in enumerate(((narrow, x), (low, grad))):
            side_factors = factors[side::2]
            if any(factor.requires_grad for factor in side_factors):
                grads = kernels.outer(narrow_sum, wide, segments, table, side, tiling)
                parts = torch.split(grads, [factor.numel() for factor in side_factors])
                for i, (factor, part) in enumerate(zip(side_factors, parts, strict=True)):
                    to_factors[2 * i + side] = part.view(factor.shape)
        return grad, to_input, None, None, None, *to_factors


_routed: Callable[..., Tensor] = _Routed.apply


def route_dtype(dtype: torch.dtype, given: torch.dtype, kind: str) -> torch.dtype:
    """Return the dtype that kernels multiply in: autocast's, or the wider of two.

    Args:
        dtype: of the side path.
        given: of the inputs.
        kind: of the device on which they are, as "cuda".
    """
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype if dtype == given else torch.promote_types(dtype, given)
