"""Linear layers: nn.Linear and its kin (out, in), and HF's Conv1D, which stores (in, out)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lowrank import LINEAR, Layout, LowRank
from .site import Site, in_dtype, recorded, wider_of

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

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)  # (…, in) → (…, r)

    def up(self, low: Tensor, B: Tensor) -> Tensor:
        return F.linear(low, B)  # (…, r) → (…, out)

    def onto(self, out: Tensor, low: Tensor, B: Tensor, *, scale: float, spare: bool) -> Tensor:
        """The product adds itself to ``out`` and rounds once: no delta of out's size is made, nor a sum of it."""
        low = low.reshape(-1, low.shape[-1])  # (rows, r); autocast may have made it narrower
        dtype = wider_of(out.dtype, low.dtype)
        if out.dtype != dtype:
            out, spare = out.to(dtype), True
        low, right = in_dtype(low, dtype), in_dtype(B, dtype).mT
        if spare and not recorded(out, low, right) and out.is_contiguous():
            out.view(-1, out.shape[-1]).addmm_(low, right, alpha=scale)
            return out
        return torch.addmm(out.reshape(-1, out.shape[-1]), low, right, alpha=scale).view(out.shape)


class Conv1DSite(LinearSite):
    """HF's Conv1D of GPT-2: ``y = x W``, stored as (in, out), so the delta is written transposed."""

    kind = "Conv1D"

    @staticmethod
    def claims(module: nn.Module) -> bool:
        return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)

    def expected(self, value: LowRank) -> tuple[int, ...]:
        assert self.weight is not None
        return self.weight.shape[1], self.weight.shape[0]

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        return value.A.mT[None], value.B.mT[None]
