"""Raw parameters: fused experts (E, out, in), and any 2-D parameter; they are read by their module, so merged only."""

from __future__ import annotations

from torch import Tensor, nn

from ..lowrank import PARAMETER, Layout, LowRank
from .site import Site

__all__ = ["ParameterSite"]


class ParameterSite(Site):
    """A 2-D (out, in) or 3-D parameter; a module with ``is_transposed`` stores its 3-D one as (E, in, out)."""

    kind = "parameter"

    def __init__(self, name: str, module: nn.Module, parent: str) -> None:
        module_name, _, self.weight_name = name.rpartition(".")
        self.bias_name = ""
        super().__init__(name, module, parent)
        self.module_name = module_name

    @property
    def is_transposed(self) -> bool:
        """Whether the module stores it as (E, in, out)."""
        assert self.weight is not None
        return self.weight.ndim == 3 and bool(getattr(self.module, "is_transposed", False))

    def accepts(self, layout: Layout) -> bool:
        return layout == PARAMETER and self.weight is not None and self.weight.ndim in (2, 3)

    def expected(self, value: LowRank) -> tuple[int, ...]:
        assert self.weight is not None
        experts, a, b = self.rows(self.weight).shape
        return (experts, b, a) if self.is_transposed else (experts, a, b)

    @property
    def why_merged_only(self) -> str | None:
        return f"{type(self.module).__name__} reads this parameter itself"

    def rows(self, weight: Tensor) -> Tensor:
        return weight if weight.ndim == 3 else weight[None]

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        return (value.A.mT, value.B.mT) if self.is_transposed else (value.B, value.A)
