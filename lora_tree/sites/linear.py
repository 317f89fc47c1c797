"""Linear layers: nn.Linear and its kin (out, in), and HF's Conv1D, which stores (in, out)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lowrank import LINEAR, Layout, LowRank
from .base import Site

__all__ = ["Conv1DSite", "LinearSite"]


class LinearSite(Site):
    """``y = x Wᵀ``; also layers that only look like it from outside (quantised ones with ``in_features``)."""

    kind = "linear"

    @staticmethod
    def claims(module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            return True
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        weight = getattr(module, "weight", None)
        quantised = not isinstance(weight, Tensor) or not weight.is_floating_point()
        return all(isinstance(n, int) for n in sizes) and quantised

    def accepts(self, layout: Layout) -> bool:
        return layout == LINEAR

    @property
    def makes_its_output(self) -> bool:
        return type(self.module).forward is nn.Linear.forward and "forward" not in vars(self.module)

    def expected(self, value: LowRank) -> tuple[int, ...]:
        out_features, in_features = self.module.out_features, self.module.in_features
        assert isinstance(out_features, int) and isinstance(in_features, int)  # noqa: PT018
        return out_features, in_features

    def side(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)  # (…, in) → (…, r) → (…, out)

    def onto(self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scale: float, spare: bool) -> Tensor:
        return _onto(out, x, A, B, scale, spare)


class Conv1DSite(Site):
    """HF's Conv1D of GPT-2: ``y = x W``, stored as (in, out), so the delta is written transposed."""

    kind = "Conv1D"

    @staticmethod
    def claims(module: nn.Module) -> bool:
        return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)

    def accepts(self, layout: Layout) -> bool:
        return layout == LINEAR

    def expected(self, value: LowRank) -> tuple[int, ...]:
        assert self.weight is not None
        return self.weight.shape[1], self.weight.shape[0]

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        return value.A.mT[None], value.B.mT[None]

    def side(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)

    def onto(self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scale: float, spare: bool) -> Tensor:
        return _onto(out, x, A, B, scale, spare)


def _onto(out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, spare: bool) -> Tensor:
    """The second product adds itself to ``out`` and rounds once: no delta of out's size is made, nor a sum of it."""
    low = F.linear(x, A).reshape(-1, A.shape[0])  # (rows, r); autocast may make it narrower
    dtype = torch.promote_types(out.dtype, low.dtype)
    if out.dtype != dtype:
        out, spare = out.to(dtype), True
    low, right = low.to(dtype), B.to(dtype).mT
    recorded = torch.is_grad_enabled() and (out.requires_grad or low.requires_grad or right.requires_grad)
    if spare and not recorded and out.is_contiguous():
        out.view(-1, out.shape[-1]).addmm_(low, right, alpha=scale)
        return out
    return torch.addmm(out.reshape(-1, out.shape[-1]), low, right, alpha=scale).view(out.shape)
