"""Keep bitsandbytes from repacking its 4-bit weights while something trains beside them.

On a CPU with AVX512-BF16, a 4-bit layer of bitsandbytes repacks its weight in the first forward of
an evaluation, in place and for good. The new layout is for inference: its product passes no
gradient on, and the backward of an earlier forward reads it wrongly. There is no error, and an
evaluation between two steps, or a reference beside a policy, would end the training of every layer
below.

A flag on each layer allows it. This module clears the flag; bitsandbytes itself is not imported.
"""

from __future__ import annotations

from torch import nn

from ..errors import StateError

__all__ = ["Packing", "forbid_packing"]

_ALLOWED = "support_avx512bf16_for_cpu"
_PACKED = "packing_format_for_cpu"


def forbid_packing(module: nn.Module) -> None:
    """Keep a layer from repacking its weight; other modules are left alone."""
    if vars(module).get(_ALLOWED):
        setattr(module, _ALLOWED, False)


class Packing:
    """The layers of one base that may lay out their weights for inference.

    Args:
        base: the model.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._held: list[nn.Module] = []

    @property
    def forbidden(self) -> bool:
        """True: layers are kept from repacking now."""
        return bool(self._held)

    def check(self) -> None:
        """Refuse to train beside weights that are laid out for inference already.

        Raises:
            StateError: names the first such layer.
        """
        for name, module in self._base.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if getattr(state, _PACKED, False):
                raise StateError(
                    f"{name}: bitsandbytes has laid its 4-bit weight out for inference, and "
                    "gradients stop there",
                    "load the base again, and call trainable before the first evaluation",
                )

    def forbid(self, wanted: bool) -> None:
        """Clear the flag of every layer that has it, or set it again on those that had it.

        Args:
            wanted: repacking is forbidden from now on.
        """
        if not wanted:
            while self._held:
                setattr(self._held.pop(), _ALLOWED, True)
            return
        for module in self._base.modules():
            if vars(module).get(_ALLOWED):
                forbid_packing(module)
                self._held.append(module)
