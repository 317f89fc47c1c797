"""Raw parameters: fused experts (E, out, in), and any 2-D parameter.

Their module reads them itself: merged only.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..lowrank import PARAMETER, Layout, LowRank
from .site import Site

__all__ = ["ParameterSite"]


class ParameterSite(Site):
    """A 2-D (out, in) or 3-D (E, out, in) parameter; (E, in, out) if the module ``is_transposed``.

    It is found by its name, and stands in no row of `KINDS`.
    """

    is_raw = True

    def __init__(self, name: str, module: nn.Module, parent: str) -> None:
        module_name, _, self.weight_name = name.rpartition(".")
        self.bias_name = ""
        # `super` first: it takes the adapter's name for the module's.
        super().__init__(name, module, parent)
        self.module_name = module_name

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        return False

    @property
    def is_transposed(self) -> bool:
        """Whether the module stores it as (E, in, out)."""
        assert self.weight is not None
        return self.weight.ndim == 3 and bool(getattr(self.module, "is_transposed", False))

    @property
    def layout(self) -> Layout:
        return PARAMETER

    def accepts(self, layout: Layout) -> bool:
        # A router or a gain may be 1-D, which is no matrix.
        is_matrix = self.weight is not None and self.weight.ndim in (2, 3)
        return layout == PARAMETER and is_matrix

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        assert self.weight is not None
        experts, a, b = self.rows(self.weight).shape
        return (experts, b, a) if self.is_transposed else (experts, a, b)

    @property
    def why_merged_only(self) -> str | None:
        return f"{type(self.module).__name__} reads this parameter itself"

    def rows(self, weight: Tensor) -> Tensor:
        return weight if weight.ndim == 3 else weight[None]

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        if self.is_transposed:
            return value.A.mT, value.B.mT
        return value.B, value.A
