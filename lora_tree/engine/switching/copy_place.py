"""The places for copies of the base's own weights, and the bytes that the copies take there.

    device    beside the weight: a switch reads and writes at the speed of the device's memory
    host      in host memory, pinned where the weight is on CUDA: a switch is as fast as the bus
    log       no copy: two bits a number, beside the merged weights (`undo_log.py`, `tile_log.py`)
    none      nowhere: paths are added and subtracted in place
    auto      the device if it has room, else logs where a kernel writes them, else the host

Law: the copies of one switch go to one kind of memory, because a switch is as slow as its slowest
copy. What ``auto`` puts on a device leaves an eighth of the device's memory free.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...budget import format_bytes

__all__ = [
    "Copies",
    "CopyPlace",
    "can_copy_on_device",
    "copies_on_device",
    "copy_on_host",
    "has_own_memory",
]

CopyPlace: TypeAlias = Literal["auto", "device", "log", "host", "none"]

MARGIN = 8
"""``auto`` leaves 1/8 of a device's memory free for activations when it puts copies there."""


@dataclass(frozen=True)
class Copies:
    """The copies of the base's own weights: the bytes in each place.

    Args:
        requested: the argument ``pristine`` of `attach`: ``auto``, ``device``, ``log``, ``host`` or
            ``none``.
        device_bytes: bytes of copies beside the weights, on a device that has memory of its own.
        host_bytes: bytes of copies in host memory.
        log_bytes: bytes of undo logs, which are beside the weights.

    >>> Copies("auto", host_bytes=64).kind
    'host'
    """

    requested: CopyPlace
    device_bytes: int = 0
    host_bytes: int = 0
    log_bytes: int = 0

    @property
    def kind(self) -> str:
        """``device``, ``log``, ``host``, or several of these joined with a plus; ``none`` if
        nothing is kept, as before the first merge.
        """
        parts = {"device": self.device_bytes, "log": self.log_bytes, "host": self.host_bytes}
        return "+".join(name for name, nbytes in parts.items() if nbytes) or "none"

    @property
    def nbytes(self) -> int:
        """Bytes of all copies and logs."""
        return self.device_bytes + self.host_bytes + self.log_bytes


def can_copy_on_device(place: CopyPlace, parameters: Sequence[Tensor]) -> bool:
    """Return whether the copies of some weights go to the weights' own devices."""
    if place in ("host", "log", "none"):
        return False
    taken: dict[torch.device, int] = {}
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.element_size()
        taken[parameter.device] = taken.get(parameter.device, 0) + nbytes
    cards = [device for device in taken if has_own_memory(device)]
    if place == "device":
        return bool(cards)
    return bool(cards) and all(taken[device] <= _room_bytes(device) for device in cards)


def copies_on_device(parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Return copies where the parameters are; None, with a warning, if not all of them fit."""
    try:
        return [_copy(parameter, parameter.device) for parameter in parameters]
    except torch.OutOfMemoryError as error:
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        reason = str(error).partition("\n")[0]
    # Outside of the `except`: the exception's traceback held the copies made so far, and with it
    # gone their memory is free for the base.
    warnings.warn(
        f"no room on the device for {format_bytes(nbytes)} of copies of the base's own weights "
        f"({reason:.200}): "
        "undo logs take their place where a kernel writes them, and copies on the host elsewhere, "
        'where switches are slower; pristine="log" or "host" asks for that',
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def copy_on_host(parameter: Tensor) -> Tensor:
    """Return a copy in host memory."""
    return _copy(parameter, torch.device("cpu"))


def has_own_memory(device: torch.device) -> bool:
    """Return whether a device has memory of its own, and says how much of it is free."""
    return device.type == "cuda"


def _room_bytes(device: torch.device) -> int:
    """Return the bytes that copies may take on a device, which leaves a margin for activations."""
    free, total = torch.cuda.mem_get_info(device)
    # CUDA counts memory as taken that torch's allocator has reserved and does not use.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - total // MARGIN


def _copy(parameter: Tensor, device: torch.device) -> Tensor:
    # Pinned, so that a switch sends it to the device without waiting for the host.
    pinned = device.type == "cpu" and parameter.device.type == "cuda"
    copy = torch.empty_like(parameter, device=device, pin_memory=pinned, requires_grad=False)
    return copy.copy_(parameter)
