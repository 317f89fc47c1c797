"""Sites of convolutions in one, two and three dimensions: the delta is two convolutions in a row.

    ΔW = B · A      A: a kernel of the module's own size, to r channels
                    B: a 1×1 kernel, to the output's channels

A has the module's stride, padding, padding mode and dilation. If the module has groups, PEFT groups
only B, and A reads all input channels: such a delta does not fit into the kernel (out, in / groups,
…), so it runs only as a side path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from ..lowrank import LINEAR, Layout, LowRank
from .site import Site

__all__ = ["ConvSite"]

_CALLS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class ConvSite(Site):
    """Conv1d, Conv2d, Conv3d."""

    layers = "Conv1d/2d/3d"

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        return isinstance(module, tuple(_CALLS))

    @property
    def conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """The module."""
        assert isinstance(self.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return self.module

    @staticmethod
    def in_own_layout(module: nn.Module, value: LowRank) -> LowRank:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if module.groups == 1 and value.layout == LINEAR and value.A.ndim == 2:
            return replace(value, layout=Layout("conv", tuple(module.kernel_size)))
        return value

    @property
    def layout(self) -> Layout:
        return Layout("conv", tuple(self.conv.kernel_size))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        conv = self.conv
        into = conv.in_channels * math.prod(conv.kernel_size)
        if conv.groups == 1:
            return conv.out_channels, into
        return conv.groups, conv.out_channels // conv.groups, into

    @property
    def groups(self) -> int:
        return self.conv.groups

    def why_unmerged_only(self, value: LowRank) -> str | None:
        if self.conv.groups > 1:
            return (
                f"with groups={self.conv.groups} the delta reaches channels "
                "that the grouped kernel does not"
            )
        return super().why_unmerged_only(value)

    @property
    def why_merged_only(self) -> str | None:
        if type(self.module).forward in (kind.forward for kind in _CALLS):
            return None
        return (
            f"{type(self.module).__name__} has a forward of its own, "
            "which may pad its input or change its weight"
        )

    def rows(self, weight: Tensor) -> Tensor:
        # (1, out, in · kernel). In the channels-last memory format it is a copy, which the engine
        # writes back.
        return weight.flatten(1)[None]

    @property
    def channels(self) -> int:  # type: ignore[override]
        return -1 - len(self.conv.kernel_size)

    @property
    def _call(self) -> Callable[..., Tensor]:
        return next(call for cls, call in _CALLS.items() if isinstance(self.conv, cls))

    def token_axes(self, x: Tensor) -> Sequence[int] | None:
        has_rows = (
            x.ndim == len(self.conv.kernel_size) + 2
        )  # (rows, channels, …), not (channels, …)
        return None if has_rows else x.shape

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        conv = self.conv
        padding = conv.padding
        if conv.padding_mode != "zeros":
            # F.conv pads only with zeros, so pad the input first, as the module does.
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0,) * len(conv.kernel_size)
        down = A.reshape(-1, conv.in_channels, *conv.kernel_size)  # (groups · r, in, *kernel)
        return self._call(x, down, None, conv.stride, padding, conv.dilation)

    def up(self, low: Tensor, B: Tensor) -> Tensor:
        ones = [1] * len(self.conv.kernel_size)
        up = B.reshape(self.conv.out_channels, -1, *ones)  # (out, r, 1, …)
        return self._call(low, up, None, groups=self.conv.groups)
