"""Sites of linear layers: nn.Linear and quantised ones, (out, in), and HF's Conv1D, (in, out)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..lowrank import LINEAR, Layout, LowRank
from .site import Site

__all__ = ["Conv1DSite", "LinearSite"]


class LinearSite(Site):
    """``y = x Wᵀ``; also quantised layers, whose weight is no plain tensor."""

    layers = "Linear"
    is_product = True

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        if isinstance(module, nn.Linear):
            return True
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        weight = getattr(module, "weight", None)
        # Another class with these sizes and a plain weight may use it in any way, so it is not
        # claimed.
        is_quantised = not isinstance(weight, Tensor) or not weight.is_floating_point()
        return all(isinstance(n, int) for n in sizes) and is_quantised

    @staticmethod
    def is_linear(module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        # A lazy module has no sizes yet. Target it, so that it is refused with a reason instead of
        # being skipped silently.
        return module.in_features * module.out_features > 0 or is_lazy(module.weight)

    @staticmethod
    def in_own_layout(module: nn.Module, value: LowRank) -> LowRank:
        if isinstance(module, nn.Linear) and set(value.layout.kernel) == {1}:
            return replace(value, layout=LINEAR)
        return value

    @property
    def layout(self) -> Layout:
        return LINEAR

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        # The module's sizes, not the weight's shape, which differs if it is quantised.
        out_features, in_features = self.module.out_features, self.module.in_features
        assert isinstance(out_features, int) and isinstance(in_features, int)  # noqa: PT018
        return out_features, in_features

    @property
    def has_new_output(self) -> bool:
        # Check `vars` too: a wrapper may have set a forward on the instance, and it may return its
        # input.
        return type(self.module).forward is nn.Linear.forward and "forward" not in vars(self.module)

    @property
    def why_no_rows(self) -> str | None:
        return None

    def with_rows(
        self, out: Tensor, x: Tensor, rows: Tensor, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        # A row of the weight computes one feature of the output.
        row_bias = None if bias is None else bias[rows]
        made = F.linear(x, values, row_bias).to(out.dtype)
        return out.index_copy(-1, rows, made)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)  # (…, in) → (…, r)

    def up(self, low: Tensor, B: Tensor) -> Tensor:
        return F.linear(low, B)  # (…, r) → (…, out)

    def onto(self, out: Tensor, low: Tensor, B: Tensor, *, scale: float, spare: bool) -> Tensor:
        """Add the product to ``out`` in one call, which rounds once and allocates no delta."""
        dtype = out.dtype
        if low.dtype != dtype or B.dtype != dtype:
            # Under autocast the product and the output may have different dtypes.
            dtype = torch.promote_types(dtype, low.dtype)
            out, low, B = out.to(dtype), low.to(dtype), B.to(dtype)
        low = low.reshape(-1, low.shape[-1])  # (rows, r)
        if spare and out.is_contiguous():
            out.view(-1, out.shape[-1]).addmm_(low, B.mT, alpha=scale)
            return out
        return torch.addmm(out.reshape(-1, out.shape[-1]), low, B.mT, alpha=scale).view(out.shape)


class Conv1DSite(LinearSite):
    """HF's Conv1D of GPT-2: ``y = x W``, stored as (in, out); the delta is written transposed."""

    layers = "Conv1D"

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        # Recognised by its class name, because transformers is not imported here.
        return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)

    @staticmethod
    def is_linear(module: nn.Module) -> bool:
        return True

    @property
    def why_no_rows(self) -> str | None:
        return "Conv1D stores it transposed, and its rows are the inputs"

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        assert self.weight is not None
        return self.weight.shape[1], self.weight.shape[0]

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        return value.A.mT[None], value.B.mT[None]
