"""Sites of nn.MultiheadAttention, which reads the weights of both projections and calls neither."""

from __future__ import annotations

from torch import nn

from ..errors import BaseMismatch
from ..lowrank import LINEAR, Layout, LowRank
from .linear import LinearSite
from .site import Site

__all__ = ["InProjectionSite", "OutProjectionSite"]


class InProjectionSite(Site):
    """The stacked q, k, v projection (3·dim, dim), under the attention's own name."""

    layers = "MultiheadAttention"
    is_read_by_parent = True
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @property
    def layout(self) -> Layout:
        return LINEAR

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        assert self.weight is not None, "`check` was there before"
        return tuple(self.weight.shape)

    def check(self, value: LowRank) -> None:
        if self.weight is None:
            raise BaseMismatch(
                f"{self.name}: the attention has separate q, k, v weights "
                "(kdim or vdim differ from embed_dim)",
                "target q_proj_weight, k_proj_weight and v_proj_weight as parameters instead",
            )
        super().check(value)

    @property
    def reader_names(self) -> tuple[str, ...]:
        return (self.name,)


class OutProjectionSite(LinearSite):
    """``out_proj``: a Linear whose forward is never called."""

    layers = ""
    is_read_by_parent = True

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        return (
            isinstance(holder, nn.MultiheadAttention) and holder._modules.get("out_proj") is module
        )

    @property
    def reader_names(self) -> tuple[str, ...]:
        return (self.parent,)
