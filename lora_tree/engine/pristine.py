"""Pristine: the base's own weights, from which every merged weight is computed, and the watch over them.

A copy is taken of a weight when a path is first merged into it, on the host, pinned where the weight is on CUDA. It is
trusted only while nobody but us has written to the weight: the parameter object, its version counter and a sample of
its numbers are compared before every switch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ForeignWrite, listing

__all__ = ["Pristine"]

SAMPLES = 64


@dataclass(eq=False)
class _Kept:
    """One parameter: where it is, the base's own value, and how it looked when we last wrote it."""

    module: nn.Module
    attribute: str
    parameter: Tensor
    copy: Tensor
    merged: bool = False
    version: int = -1
    sample: Tensor | None = None

    def look(self) -> None:
        self.version, self.sample = self.parameter._version, _sample(self.parameter)

    def fits(self) -> bool:
        """Whether the copy can be put back, whatever else was done to the weight."""
        now = getattr(self.module, self.attribute, None)
        return isinstance(now, Tensor) and now.shape == self.copy.shape

    def untouched(self) -> bool:
        """Nobody else wrote to it. A move to another device alone is no write; the numbers are the same there."""
        now = getattr(self.module, self.attribute, None)
        p, sample = self.parameter, self.sample
        assert sample is not None
        if now is not p or p.dtype != self.copy.dtype or p.shape != self.copy.shape or p._version != self.version:
            return False
        return torch.equal(_bits(_sample(p)), _bits(sample))


class Pristine:
    """The kept copies, by (module, attribute)."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], _Kept] = {}
        self._names: dict[tuple[int, str], str] = {}

    def verify(self, replaced: Iterable[str] = ()) -> None:
        """That every kept copy is still what it was taken from; copies of weights that are bare now are retaken later.

        Args:
            replaced: weights with a path merged into them whose module is not in the base any more.

        Raises:
            ForeignWrite: somebody else wrote to, or replaced, a weight while a path was merged into it.
        """
        changed = [key for key, kept in self._kept.items() if not kept.untouched()]
        lost = [*replaced, *(self._names[key] for key in changed if self._kept[key].merged)]
        if lost:
            raise ForeignWrite(
                f"{listing(dict.fromkeys(lost))}: written or replaced by somebody else while a path was merged",
                'model.trust("pristine") puts the base\'s own weights back',
                'model.trust("weights") takes the weights as they are now for the base',
                "next time: model.deactivate() before loading, casting or resizing the base",
            )
        for key in changed:
            del self._kept[key]

    def keep(self, name: str, module: nn.Module, attribute: str) -> Tensor:
        """The base's own value of ``module.attribute``, copied now if it was not kept yet. On the host."""
        key = (id(module), attribute)
        kept = self._kept.get(key)
        if kept is None:
            parameter = getattr(module, attribute)
            pinned = parameter.device.type == "cuda"
            copy = torch.empty_like(parameter, device="cpu", pin_memory=pinned, requires_grad=False)
            copy.copy_(parameter)
            kept = self._kept[key] = _Kept(module, attribute, parameter, copy)
            self._names[key] = f"{name}.{attribute}"
            kept.look()
        return kept.copy

    def wrote(self, module: nn.Module, attribute: str, *, merged: bool) -> None:
        """We wrote to it, and this is how it looks now."""
        kept = self._kept[(id(module), attribute)]
        kept.merged = merged
        kept.look()

    def restore(self, replaced: Iterable[str] = ()) -> None:
        """Put the base's own values back wherever a path is merged, whatever stands there now.

        Args:
            replaced: weights with a path merged into them whose module is not in the base any more.

        Raises:
            ForeignWrite: a weight was replaced or resized, and its copy fits no more; nothing was written.
        """
        merged = {key: kept for key, kept in self._kept.items() if kept.merged}
        lost = [*replaced, *(self._names[key] for key, kept in merged.items() if not kept.fits())]
        if lost:
            raise ForeignWrite(
                f"{listing(dict.fromkeys(lost))}: replaced or resized while a path was merged: "
                "the base's own values do not fit there any more",
                "put the old module back and call this again, or load the base again",
                'model.trust("weights") takes the weights as they are now, the path in them, for the base',
            )
        for kept in merged.values():
            getattr(kept.module, kept.attribute).copy_(kept.copy)
        self.forget()

    def forget(self) -> None:
        """Drop every copy; the weights as they are now are the base's own."""
        self._kept.clear()
        self._names.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held on the host."""
        return sum(kept.copy.numel() * kept.copy.element_size() for kept in self._kept.values())


def _sample(tensor: Tensor) -> Tensor:
    """About `SAMPLES` of its numbers, copied; an odd step, so that they do not all lie in the first column."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return flat[:: max(flat.numel() // SAMPLES, 1) | 1].to("cpu", copy=True)


def _bits(tensor: Tensor) -> Tensor:
    """The same numbers as integers, so that NaN equals NaN and 0 differs from −0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
