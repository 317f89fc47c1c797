"""Sites of raw parameters: fused experts (E, out, in), and any 2-D parameter.

The module that holds the parameter reads it, or the module around that does (in DBRX the experts
read the parameters of their MLP).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import BaseMismatch
from ..lowrank import PARAMETER, Layout, LowRank
from .site import Site

__all__ = ["ParameterSite"]


class ParameterSite(Site):
    """A 2-D (out, in) or 3-D (E, out, in) parameter; (E, in, out) if the module ``is_transposed``.

    It is found by its name, so it is not in `KINDS`.

    Args:
        around: the nearest module around ``parent`` that has a forward; None: ``parent`` is the
            base.
    """

    is_raw = True

    def __init__(self, name: str, module: nn.Module, parent: str, around: str | None) -> None:
        module_name, _, self.weight_name = name.rpartition(".")
        self.bias_name = ""
        # Call `super` first: it sets module_name to the whole name, which is corrected below.
        super().__init__(name, module, parent)
        self.module_name = module_name
        self._around = around

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        return False

    @property
    def is_transposed(self) -> bool:
        """Return whether the module stores it as (E, in, out)."""
        assert self.weight is not None
        return self.weight.ndim == 3 and bool(getattr(self.module, "is_transposed", False))

    @property
    def layout(self) -> Layout:
        return PARAMETER

    def accepts(self, layout: Layout) -> bool:
        # A 1-D parameter, such as a gain, is not a matrix.
        is_matrix = self.weight is not None and self.weight.ndim in (2, 3)
        return layout == PARAMETER and is_matrix

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        assert self.weight is not None
        experts, a, b = self.rows(self.weight).shape
        return (experts, b, a) if self.is_transposed else (experts, a, b)

    @property
    def reader_names(self) -> tuple[str, ...]:
        return (self.parent,) if self._around is None else (self._around, self.parent)

    def check_shape(self, value: LowRank) -> None:
        super().check_shape(value)
        if value.bias is not None:
            raise BaseMismatch(
                f"{self.name}: the adapter adds a bias (lora_bias), and a parameter has none",
                "leave lora_bias out where parameters are adapted",
            )

    def rows(self, weight: Tensor) -> Tensor:
        return weight if weight.ndim == 3 else weight[None]

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        if self.is_transposed:
            return value.A.mT, value.B.mT
        return value.B, value.A
