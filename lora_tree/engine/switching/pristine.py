"""Pristine: copies of the base's own weights, from which every merged weight is computed.

A copy is taken of a weight when a path is first merged into it. `copy_place.py` says where it goes;
instead of a copy there may be an undo log.

A copy counts as long as only we write to its weight. `watch.py` notices other writes, and
`Pristine.verify` asks it before every switch.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from ...errors import ForeignWrite, StateError, listing
from ...sites import Site
from ..arithmetic import Scratch, exact_mode
from ..kernels import logs
from .copy_place import (
    Copies,
    CopyPlace,
    can_copy_on_device,
    copies_on_device,
    copy_on_host,
    has_own_memory,
)
from .switches import Switch, Writes
from .tile_log import TileLog
from .undo_log import UndoLog, can_log
from .watch import Watch, WatchedWeight

__all__ = ["Pristine", "Source"]

LARGEST_LOG = 0.5
"""A log that takes more than this fraction of its weight's bytes is replaced by a copy."""


Source: TypeAlias = Tensor | UndoLog
"""The source of a tensor's new numbers: a copy of the base's own, or the log that brings them back.
"""


@dataclass(eq=False)
class _PristineCopy:
    """The base's own value of one weight.

    Args:
        weight: the weight, as the watch knows it.
        copy: its own numbers; or the log that brings them back.
        on_device: the copy is beside the weight, on a device that has memory of its own.
        merged: a path is written into the weight now.
        logged: it has a log, or had one.
    """

    weight: WatchedWeight
    copy: Source
    on_device: bool
    merged: bool = False
    logged: bool = False

    @property
    def nbytes(self) -> int:
        if isinstance(self.copy, UndoLog):
            return self.copy.nbytes
        return self.copy.numel() * self.copy.element_size()

    def fits(self) -> bool:
        """Return whether the copy can be put back into the module's present weight."""
        now = getattr(self.weight.module, self.weight.attribute, None)
        return isinstance(now, Tensor) and now.shape == self.weight.shape

    def own(self) -> Tensor:
        """Return the base's own numbers; from a log, in new memory."""
        if not isinstance(self.copy, UndoLog):
            return self.copy
        now: Tensor = getattr(self.weight.module, self.weight.attribute)
        return self.copy.own(now)


@dataclass(frozen=True, eq=False)
class _Begun:
    """The sources of a switch, as `Pristine.begin` found them.

    Args:
        copies: of all tensors that are written, and whether a path is in each afterwards.
        sources: what the writes are computed from.
    """

    copies: list[tuple[_PristineCopy, bool]]
    sources: Mapping[tuple[int, str], Source]


class Pristine:
    """The copies of one base's own weights, by (module, attribute).

    Args:
        place: where copies go: ``device``, ``host``, or ``auto``, which takes the device if there
            is room, else logs where a kernel writes them, else the host; or ``log``. A base in host
            memory has its copies there in any case.
    """

    def __init__(self, place: CopyPlace = "auto") -> None:
        self._place = place
        self._scratch = Scratch()
        # By the module's id. The copy holds the module, so its id is not given to another object.
        self._kept: dict[tuple[int, str], _PristineCopy] = {}
        self._watch = Watch()
        self._changes = 0
        """The number of times that copies were made or dropped."""
        self._begun: weakref.WeakKeyDictionary[Switch, _Begun] = weakref.WeakKeyDictionary()
        """The sources of the last switches, until a copy is made or dropped."""
        self.has_logged = False
        """True: a log was made for some weight."""

    @property
    def number(self) -> int:
        """A number that changes when a copy is made or dropped, or when a weight that has one is
        found at another address; launches hold the addresses of both.
        """
        # Both summands only grow, so no sum occurs twice.
        return self._changes + self._watch.moves

    @property
    def keeps(self) -> bool:
        """True: copies or logs are kept."""
        return self._place != "none"

    def verify(self, replaced: Sequence[str] = ()) -> None:
        """Check that only we have written to the weights that have copies.

        If other code wrote to a bare weight, its copy is dropped.

        Args:
            replaced: merged weights whose module the base does not have any more.

        Raises:
            ForeignWrite: other code wrote to, or replaced, a weight while a path was merged into
                it.
        """
        touched = self._watch.touched([kept.weight for kept in self._kept.values()])
        if not touched and not replaced:
            return
        changed = [key for key, kept in self._kept.items() if kept.weight in touched]
        lost = list(replaced)
        for key in changed:
            if self._kept[key].merged:
                lost.append(self._kept[key].weight.name)
        if lost:
            raise ForeignWrite(
                f"{listing(dict.fromkeys(lost))}: written or replaced by other code while a "
                "path was merged",
                'model.trust("pristine") puts the base\'s own weights back',
                'model.trust("weights") takes the weights as they are now for the base',
                "next time: model.deactivate() before loading, casting or resizing the base",
            )
        # Nothing is merged into these, so the owner of the base has given them new values of their
        # own. They are copied again when a path is merged into them next.
        for key in changed:
            del self._kept[key]
        if changed:
            self._changed()

    def begin(self, switch: Switch) -> Mapping[tuple[int, str], Source]:
        """Return what brings the base's own values of some weights back, before any is written.

        Weights that have no copy or log yet get one: all, or on an error none. `look` has to follow
        once everything is written.

        Args:
            switch: what is about to be written.

        Returns:
            (id of the module, which of its tensors) → the copy or the log.

        Raises:
            MemoryError, RuntimeError: no memory for the copies, neither on the device nor on the
                host.
        """
        begun = self._begun.get(switch)
        if begun is None:
            self._keep(switch.all)
            begun = self._begun[switch] = self._copies_for(switch)
        # Nothing fails any more until the first write.
        for kept, merged in begun.copies:
            kept.merged = merged
        return begun.sources

    def _copies_for(self, switch: Switch) -> _Begun:
        copies: list[tuple[_PristineCopy, bool]] = []
        sources: dict[tuple[int, str], Source] = {}
        for writes, merged in ((switch.bare, False), (switch.merged, True)):
            for write in writes.site_writes:
                for attribute in write.tensors:
                    key = id(write.site.module), attribute
                    copies.append((self._kept[key], merged))
                    sources[key] = self._kept[key].copy
        return _Begun(copies, sources)

    def _keep(self, writes: Writes) -> None:
        missing: list[WatchedWeight] = []
        can_be_logged: dict[WatchedWeight, Site] = {}
        for write in writes.site_writes:
            for attribute in write.tensors:
                kept = self._kept.get((id(write.site.module), attribute))
                if kept is None:
                    watched = _watched(write.site, attribute)
                    if write.is_sum(attribute) and can_log(write.site, watched.parameter):
                        can_be_logged[watched] = write.site
                    missing.append(watched)
                elif isinstance(kept.copy, UndoLog) and not write.is_sum(attribute):
                    # An override leaves nothing of the base's numbers in the weight, so a log can't
                    # bring them back.
                    self._copied(kept)
        if not missing:
            return
        on_device = can_copy_on_device(self._place, [weight.parameter for weight in missing])
        if not on_device:
            missing = self._without_logged(missing, can_be_logged)
        parameters = [weight.parameter for weight in missing]
        # All copies are made before the first is kept, so that an error leaves none behind.
        copies = copies_on_device(parameters) if on_device else None
        if copies is None:
            if on_device:
                missing = self._without_logged(missing, can_be_logged)
            on_device = False
            copies = [copy_on_host(weight.parameter) for weight in missing]
        for weight, copy in zip(missing, copies, strict=True):
            is_on_device = on_device and has_own_memory(weight.parameter.device)
            self._kept[id(weight.module), weight.attribute] = _PristineCopy(
                weight, copy, is_on_device
            )
        self._changed()
        # The watch has to know the new weights before they are written.
        self.look()

    def _without_logged(
        self, missing: Sequence[WatchedWeight], can_be_logged: Mapping[WatchedWeight, Site]
    ) -> list[WatchedWeight]:
        """Give logs to the weights that take one, and return the others."""
        others = []
        for weight in missing:
            site, has_kernel = can_be_logged.get(weight), logs(weight.parameter.device)
            wants_log = self._place == "log" or (self._place == "auto" and has_kernel)
            if site is None or not wants_log:
                others.append(weight)
                continue
            make = TileLog if has_kernel else UndoLog
            kept = _PristineCopy(weight, make(site, weight.parameter), False, logged=True)
            self._kept[id(weight.module), weight.attribute] = kept
            self.has_logged = True
        return others

    def is_logged(self, module: nn.Module, attribute: str) -> bool:
        """Return whether a tensor has, or had, a log: then sums from its copy need a log's bits."""
        kept = self._kept.get((id(module), attribute))
        return kept is not None and kept.logged

    def known(self, module: nn.Module, attribute: str) -> Tensor | None:
        """Return the base's own value of ``module.attribute``; None if there is no copy or log."""
        kept = self._kept.get((id(module), attribute))
        if kept is None:
            return None
        with exact_mode(kept.weight.parameter.device):
            return kept.own()

    def settle(self) -> None:
        """Replace the logs that have become too large by copies, after a switch."""
        large = []
        for kept in self._kept.values():
            weight = kept.weight.parameter
            limit = LARGEST_LOG * weight.numel() * weight.element_size()
            if isinstance(kept.copy, UndoLog) and kept.copy.nbytes > limit:
                large.append(kept)
        for kept in large:
            self._copied(kept)
        if large:
            warnings.warn(
                f"{listing([kept.weight.name for kept in large])}: the increments are so large "
                "beside the weights that an undo log would take more than half of their memory: "
                "copies on the host are kept instead",
                RuntimeWarning,
                stacklevel=2,
            )

    def _copied(self, kept: _PristineCopy) -> None:
        """Put a copy in the place of a log."""
        copy = copy_on_host(kept.own())
        kept.copy = copy
        self._changed()

    def look(self) -> None:
        """Note the present state of every weight with a copy, so that `verify` recognises it."""
        self._watch.look([kept.weight for kept in self._kept.values()])

    def restore(self, replaced: Iterable[str] = ()) -> None:
        """Put the base's own values back over every weight with a path in it.

        Args:
            replaced: merged weights whose module the base does not have any more.

        Raises:
            ForeignWrite: a weight was replaced or resized, and its copy no longer fits; nothing was
                written.
        """
        merged = [kept for kept in self._kept.values() if kept.merged]
        lost = [*replaced, *(kept.weight.name for kept in merged if not kept.fits())]
        if lost:
            raise ForeignWrite(
                f"{listing(dict.fromkeys(lost))}: replaced or resized while a path was merged: "
                "the base's own values no longer fit there",
                "put the old module back and call this again, or load the base again",
                'model.trust("weights") takes the present weights, with the path in them, for '
                "the base",
            )
        logged = [kept for kept in merged if isinstance(kept.copy, UndoLog)]
        written = self._watch.touched([kept.weight for kept in logged])
        if written:
            raise StateError(
                f"{listing([weight.name for weight in written])}: an undo log brings back only "
                "what it wrote itself",
                'model.trust("weights") takes the weights as they are now for the base, or load '
                "the base again",
            )
        # Into the tensor that the module shows now, which may be another parameter.
        for kept in merged:
            target = getattr(kept.weight.module, kept.weight.attribute)
            if isinstance(kept.copy, UndoLog):
                with exact_mode(target.device):
                    kept.copy.write(target, (), self._scratch)
            else:
                target.copy_(kept.copy)
        self.forget()

    def forget(self) -> None:
        """Drop every copy; the weights as they are now are the base's own."""
        self._kept.clear()
        self._watch.forget()
        self._changed()

    @property
    def copies(self) -> Copies:
        """The place and the size of the copies."""
        on_device = on_host = logged = 0
        for kept in self._kept.values():
            if isinstance(kept.copy, UndoLog):
                logged += kept.nbytes
            elif kept.on_device:
                on_device += kept.nbytes
            else:
                on_host += kept.nbytes
        return Copies(self._place, device_bytes=on_device, host_bytes=on_host, log_bytes=logged)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return self.copies.nbytes

    # ------------------------------------------------------------------ private
    def _changed(self) -> None:
        """Note that copies were made or dropped."""
        self._changes += 1
        # These hold copies that may be dropped now.
        self._begun.clear()


def _watched(site: Site, attribute: str) -> WatchedWeight:
    weight: Tensor = getattr(site.module, attribute)
    return WatchedWeight(f"{site.module_name}.{attribute}", site.module, attribute, weight)
