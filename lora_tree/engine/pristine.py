"""Pristine: the base's own weights, from which every merged weight is computed, and the watch over them.

A copy is taken of a weight when a path is first merged into it:

    device    beside the weight: a switch reads and writes at the speed of the device's memory
    host      in host memory, pinned where the weight is on CUDA: a switch is as fast as the bus

A copy is trusted only while nobody but us has written to the weight: the parameter object, its version counter and a
sample of its numbers are compared before every switch. The samples of all weights are gathered into one buffer, so
that the host waits for a device once a switch, not once a weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..budget import format_bytes
from ..errors import ForeignWrite, listing
from .kernels import sampler, usable

__all__ = ["Copies", "Place", "Pristine"]

Place: TypeAlias = Literal["auto", "device", "host", "none"]

SAMPLES = 64

MARGIN = 8
"""One part in so many of a device's memory stays free for activations when ``auto`` puts copies there."""


@dataclass(frozen=True)
class Copies:
    """Where the base's own weights are kept now.

    Args:
        asked: what `attach` was told: ``auto``, ``device``, ``host`` or ``none``.
        device_bytes: bytes of copies beside the weights, on a device that has memory of its own.
        host_bytes: bytes of copies in host memory.

    >>> Copies("auto", host_bytes=64).kind
    'host'
    """

    asked: Place
    device_bytes: int = 0
    host_bytes: int = 0

    @property
    def kind(self) -> str:
        """``device``, ``host``, ``device+host``, or ``none`` where nothing is kept, as before the first merge."""
        parts = {"device": self.device_bytes, "host": self.host_bytes}
        return "+".join(name for name, nbytes in parts.items() if nbytes) or "none"

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.device_bytes + self.host_bytes


@dataclass(eq=False)
class _Kept:
    """One parameter: where it is, the base's own value, and how it looked when we last wrote it."""

    name: str
    module: nn.Module
    attribute: str
    parameter: Tensor
    copy: Tensor
    on_device: bool
    merged: bool = False
    version: int = -1

    @property
    def nbytes(self) -> int:
        return self.copy.numel() * self.copy.element_size()

    def fits(self) -> bool:
        """Whether the copy can be put back, whatever else was done to the weight."""
        now = getattr(self.module, self.attribute, None)
        return isinstance(now, Tensor) and now.shape == self.copy.shape

    def same_object(self) -> bool:
        """No write was counted, and no other parameter put here. A move to another device alone is no write."""
        now = getattr(self.module, self.attribute, None)
        p = self.parameter
        if now is not p or p.dtype != self.copy.dtype or p.shape != self.copy.shape:
            return False
        return bool(p._version == self.version)


class Pristine:
    """The kept copies, by (module, attribute).

    Args:
        place: where copies go: ``device``, ``host``, or ``auto``, which takes the device where there is room. A base in
            host memory has its copies there, whatever it is.
    """

    def __init__(self, place: Place = "auto") -> None:
        self._place = place
        self._kept: dict[tuple[int, str], _Kept] = {}
        self._looked: _Look | None = None
        self.number = 0
        """Another one whenever a copy was made or dropped."""

    def verify(self, replaced: Iterable[str] = ()) -> None:
        """That every kept copy is still what it was taken from; copies of weights that are bare now are retaken later.

        Args:
            replaced: weights with a path merged into them whose module is not in the base any more.

        Raises:
            ForeignWrite: somebody else wrote to, or replaced, a weight while a path was merged into it.
        """
        changed = self._changed()
        lost = [*replaced, *(kept.name for kept in changed.values() if kept.merged)]
        if lost:
            raise ForeignWrite(
                f"{listing(dict.fromkeys(lost))}: written or replaced by somebody else while a path was merged",
                'model.trust("pristine") puts the base\'s own weights back',
                'model.trust("weights") takes the weights as they are now for the base',
                "next time: model.deactivate() before loading, casting or resizing the base",
            )
        for key in changed:
            del self._kept[key]
            self.number += 1

    def keep(self, wanted: Iterable[tuple[str, nn.Module, str]]) -> None:
        """Copy what is not kept yet, before anything of it is written: all of it, or on an error none.

        Args:
            wanted: (the module's name, the module, which of its tensors), of everything that a switch will write.

        Raises:
            MemoryError, RuntimeError: no memory for the copies, neither on the device nor on the host.
        """
        missing = []
        for name, module, attribute in wanted:
            if (id(module), attribute) not in self._kept:
                missing.append((name, module, attribute, getattr(module, attribute)))
        parameters = [parameter for *_, parameter in missing]
        if not parameters:
            return
        on_device = self._goes_beside(parameters)
        copies = _beside(parameters) if on_device else None
        if copies is None:
            on_device = False
            copies = [_on_host(parameter) for parameter in parameters]
        for (name, module, attribute, parameter), copy in zip(missing, copies, strict=True):
            beside = on_device and _is_apart(parameter.device)
            kept = _Kept(f"{name}.{attribute}", module, attribute, parameter, copy, beside)
            self._kept[id(module), attribute] = kept
        self.number += 1
        self.look()

    def of(self, module: nn.Module, attribute: str) -> Tensor:
        """The base's own value of ``module.attribute``, which is kept."""
        return self._kept[id(module), attribute].copy

    def known(self, module: nn.Module, attribute: str) -> Tensor | None:
        """The base's own value of ``module.attribute``, where it is kept."""
        kept = self._kept.get((id(module), attribute))
        return None if kept is None else kept.copy

    def wrote(self, module: nn.Module, attribute: str, *, merged: bool) -> None:
        """We write to it; once everything is written, `look` notes how it looks."""
        self._kept[id(module), attribute].merged = merged

    def look(self) -> None:
        """Note how every kept weight looks now, so that `verify` knows it again."""
        kept = list(self._kept.values())
        for each in kept:
            each.version = each.parameter._version
        self._looked = _Look(kept, self._looked)

    def restore(self, replaced: Iterable[str] = ()) -> None:
        """Put the base's own values back wherever a path is merged, whatever stands there now.

        Args:
            replaced: weights with a path merged into them whose module is not in the base any more.

        Raises:
            ForeignWrite: a weight was replaced or resized, and its copy fits no more; nothing was written.
        """
        merged = [kept for kept in self._kept.values() if kept.merged]
        lost = [*replaced, *(kept.name for kept in merged if not kept.fits())]
        if lost:
            raise ForeignWrite(
                f"{listing(dict.fromkeys(lost))}: replaced or resized while a path was merged: "
                "the base's own values do not fit there any more",
                "put the old module back and call this again, or load the base again",
                'model.trust("weights") takes the weights as they are now, the path in them, for the base',
            )
        for kept in merged:
            getattr(kept.module, kept.attribute).copy_(kept.copy)
        self.forget()

    def forget(self) -> None:
        """Drop every copy; the weights as they are now are the base's own."""
        self._kept.clear()
        self._looked = None
        self.number += 1

    @property
    def copies(self) -> Copies:
        """Where they are, and how large."""
        beside = sum(kept.nbytes for kept in self._kept.values() if kept.on_device)
        return Copies(
            self._place, beside, sum(kept.nbytes for kept in self._kept.values()) - beside
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return self.copies.nbytes

    # ------------------------------------------------------------------ private
    def _changed(self) -> dict[tuple[int, str], _Kept]:
        """The weights that somebody else wrote to or replaced."""
        changed = {key: kept for key, kept in self._kept.items() if not kept.same_object()}
        others = {kept: key for key, kept in self._kept.items() if key not in changed}
        if others and self._looked is not None:
            for kept in _Look(list(others), self._looked).differing(self._looked):
                changed[others[kept]] = kept
        return changed

    def _goes_beside(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the copies of some weights go where these are."""
        if self._place in ("host", "none"):
            return False
        taken: dict[torch.device, int] = {}
        for parameter in parameters:
            nbytes = parameter.numel() * parameter.element_size()
            taken[parameter.device] = taken.get(parameter.device, 0) + nbytes
        cards = [device for device in taken if _is_apart(device)]
        if self._place == "device":
            return bool(cards)
        return bool(cards) and all(taken[device] <= _room_bytes(device) for device in cards)


# ---------------------------------------------------------------------- where copies go
def _is_apart(device: torch.device) -> bool:
    """Whether a device has memory of its own, of which we can ask how much is free."""
    return device.type == "cuda"


def _room_bytes(device: torch.device) -> int:
    """Bytes that copies may take on a device: what is free there, without a margin for what the base computes."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - total // MARGIN


def _beside(parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Copies where the parameters are; None, with a warning, where there is no room for all of them."""
    try:
        return [_copy(parameter, parameter.device) for parameter in parameters]
    except torch.OutOfMemoryError as error:
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        reason = str(error).partition("\n")[0]
    # Here the exception, whose traceback holds the copies made so far, is gone.
    warnings.warn(
        f"no room on the device for {format_bytes(nbytes)} of copies of the base's own weights ({reason:.200}): "
        'they are kept on the host, and switches are slower; pristine="host" asks for that',
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _on_host(parameter: Tensor) -> Tensor:
    return _copy(parameter, torch.device("cpu"))


def _copy(parameter: Tensor, device: torch.device) -> Tensor:
    pinned = device.type == "cpu" and parameter.device.type == "cuda"
    copy = torch.empty_like(parameter, device=device, pin_memory=pinned, requires_grad=False)
    return copy.copy_(parameter)


# ---------------------------------------------------------------------- how a weight looks
class _Look:
    """How some weights look: a sample of each, in one buffer for every device and dtype.

    Args:
        kept: the weights.
        before: an earlier look, whose tables serve again where it was at the same weights in the same places.
    """

    def __init__(self, kept: Sequence[_Kept], before: _Look | None = None) -> None:
        self._kept = kept
        self._places = [each.parameter.data_ptr() for each in kept]
        alike = before is not None and before._kept == kept and before._places == self._places
        self._groups: list[_Group] = (
            before._groups if before is not None and alike else _grouped(kept)
        )
        self._buffers = [group.take() for group in self._groups]

    def differing(self, before: _Look) -> list[_Kept]:
        """The weights of this look that looked otherwise before."""
        if self._groups is before._groups and all(map(torch.equal, self._buffers, before._buffers)):
            return []  # the host waited once for each buffer
        now, then = self._pieces(), before._pieces()
        return [kept for kept, sample in now.items() if not _same(sample, then.get(kept))]

    def _pieces(self) -> dict[_Kept, Tensor]:
        """Each weight's own sample, on the host."""
        found: dict[_Kept, Tensor] = {}
        for group, buffer in zip(self._groups, self._buffers, strict=True):
            found.update(zip(group.kept, torch.split(buffer.cpu(), group.lengths), strict=True))
        return found


@dataclass(frozen=True, eq=False)
class _Group:
    """Weights of one dtype on one device, and what samples them: a launch, or None for a view of each."""

    kept: Sequence[_Kept]
    lengths: list[int]
    sampler: Callable[[], Tensor] | None

    def take(self) -> Tensor:
        """The samples of all of them, as integers, one after the other."""
        if self.sampler is not None:
            return self.sampler()
        # The views are not kept: they would hold a weight's memory, also where the weight goes elsewhere.
        return _bits(torch.cat([_sample(each.parameter) for each in self.kept]))


def _grouped(kept: Sequence[_Kept]) -> list[_Group]:
    by_kind: dict[tuple[torch.device, torch.dtype], list[_Kept]] = {}
    for each in kept:
        by_kind.setdefault((each.parameter.device, each.parameter.dtype), []).append(each)
    groups = []
    for (device, dtype), group in by_kind.items():
        weights = [each.parameter for each in group]
        steps = [_step(weight) for weight in weights]
        lengths = [-(-weight.numel() // step) for weight, step in zip(weights, steps, strict=True)]
        plain = all(weight.is_contiguous() and weight.numel() for weight in weights)
        launched = plain and dtype.itemsize in (2, 4) and usable(device)
        groups.append(_Group(group, lengths, sampler(weights, steps) if launched else None))
    return groups


def _same(now: Tensor, then: Tensor | None) -> bool:
    return then is not None and now.dtype == then.dtype and torch.equal(now, then)


def _sample(tensor: Tensor) -> Tensor:
    """About `SAMPLES` of its numbers; an odd step, so that they do not all lie in the first column."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return flat[:: _step(tensor)]


def _step(tensor: Tensor) -> int:
    return max(tensor.numel() // SAMPLES, 1) | 1


def _bits(tensor: Tensor) -> Tensor:
    """The same numbers as integers, so that NaN equals NaN and 0 differs from −0."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
