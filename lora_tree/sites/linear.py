"""Linear layers: nn.Linear and its kin (out, in), and HF's Conv1D, which stores (in, out)."""

from __future__ import annotations

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

    def expected(self, value: LowRank) -> tuple[int, ...]:
        out_features, in_features = self.module.out_features, self.module.in_features
        assert isinstance(out_features, int) and isinstance(in_features, int)  # noqa: PT018
        return out_features, in_features

    def side(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)  # (…, in) → (…, r) → (…, out)


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
