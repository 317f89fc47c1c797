"""Keep flattened paths in a folder for engines that read adapters from a disk.

    tree, "fr/legal" ──▶ content 1f0c… ──▶ cache/1f0c…/    made if missing, then served from there

A content names a folder (`content.py`), so a changed tree gives another folder. A folder that was
given out never changes, and an engine's own caches never hold a stale one. Two names that mean the
same share a folder. `usage.py` knows what this process uses, `shared_folder.py` what the others do.

Law: the folder never holds more than its budget. An adapter that a request may still read is not
evicted. A refused name leaves neither a file nor an open file behind.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ...blend import Blend
from ...errors import BudgetError, FolderError, LoraTreeError, SpecError, UnlockedError, plural
from ...export import Portable, portable
from ...folder import Problem
from ...storage import as_path
from ...tree import AdapterTree
from .content import Contents, FlatContent, FlatForm, is_blend, lineages
from .shared_folder import SharedFolder
from .usage import Usage

__all__ = ["ROUNDING", "FlatCache", "Flattened", "NoRoom", "TooLarge", "name_of"]

V = TypeVar("V")

CONFIG_BYTES = 1 << 20
"""Bytes allowed for the config and the header, beside the factors."""
MOST_BLENDS = 64
"""The largest number of blends that a process serves at once: clients make up their names."""
MOST_REMEMBERED = 1024
ROUNDING = 1e-6
"""Relative errors below this come from fp32's rounding, not from a recompression."""


class NoRoom(FolderError):
    """Everything in the cache is in use; there may be room in a moment."""


class TooLarge(FolderError):
    """The adapter is larger than all that the cache may hold for it."""


@dataclass(frozen=True)
class Flattened:
    """A flattened path in the cache.

    Args:
        path: as it was asked for.
        content: the name of the folder.
        folder: where the adapter is.
        stale: the lock's texts about nodes of its lineages that are stale.
        error: the relative error that recompression left; None where the folder was there already.
        nodes: each node of its lineages with an adapter → the hash of its files.
    """

    path: str
    content: str
    folder: Path
    stale: tuple[str, ...] = ()
    error: float | None = None
    nodes: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The path with its content, ``fr/legal@1f0c…``: another content is another name."""
        return name_of(self.path, self.content)


def name_of(path: str, content: str) -> str:
    """Return the name by which an engine knows a path of one content.

    >>> name_of("fr/legal", "1f0c" * 8)
    'fr/legal@1f0c1f0c1f0c1f0c'
    """
    return f"{path}@{content[:16]}"


class FlatCache:
    """A cache folder that any number of threads and processes may use at once.

    Args:
        folder: made where missing; nothing else should live there.
        budget_bytes: the most that it holds. Blends that are in use take at most half of it.
        form: how paths are flattened.
        grace_s: how long a folder stays after its last use, for requests that are on their way to
            the engine.
        unload: called when there is no room, with a path whose last use is longer ago than that.
            It stops serving the path and returns True, or returns False if requests are running.
        is_read: tells whether running requests use a content.
        on_evict: called after an adapter was removed to make room.
        on_resize: called with the bytes of the folder after an adapter was added.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        budget_bytes: int,
        form: FlatForm,
        grace_s: float = 60.0,
        unload: Callable[[str], bool] | None = None,
        is_read: Callable[[str], bool] | None = None,
        on_evict: Callable[[], None] = lambda: None,
        on_resize: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.folder = Path(os.path.abspath(as_path(folder)))  # engines want an absolute one
        self.budget_bytes = budget_bytes
        self.form = form
        self._unload = unload or (lambda _: True)
        self._on_evict = on_evict
        self._on_resize = on_resize
        self._contents = Contents(form)
        self._usage = Usage(grace_s=grace_s, is_read=is_read or (lambda _: False))
        self._refused: OrderedDict[str, LoraTreeError] = OrderedDict()  # content → why
        self._needs: OrderedDict[str, int] = OrderedDict()  # content → bytes, if it was made once
        self._disk = SharedFolder(self.folder)

    # ------------------------------------------------------------------ what a path is now
    def content(self, tree: AdapterTree, problems: list[Problem], path: Blend) -> FlatContent:
        """Return the content of a path as the tree is now.

        Raises:
            LoraTreeError: as `Contents.of`.
        """
        return self._contents.of(tree, problems, path)

    def get(self, tree: AdapterTree, problems: list[Problem], path: str) -> Flattened:
        """Flatten a path of a tree unless the folder has it already, and serve it from now on.

        Args:
            tree, problems: the tree as `lora_tree.folder.survey` saw it.
            path: a path, or a blend in its one spelling.

        Raises:
            NoRoom: everything in the cache is in use.
            UnlockedError: the tree has changed since it was seen.
            LoraTreeError: as `content`; or the path can't be flattened.
        """
        now = self.content(tree, problems, path)
        content = now.name
        if content in self._refused:
            raise _without_traceback(self._refused[content])
        if is_blend(path):
            self._make_room_for_blend(path)
        with self._usage.keep_in_use(content, for_blend=is_blend(path)):
            error = self._ensure(tree, problems, path, content)
            self._usage.serve(path, content)
        return Flattened(path, content, self.folder / content, now.stale, error, now.nodes)

    @property
    def served(self) -> dict[str, str]:
        """Path → the content that this process serves it with."""
        return self._usage.served

    @property
    def in_use(self) -> dict[str, bool]:
        """Content → whether this process uses it for blends alone."""
        return self._usage.in_use()

    def replacing(self, path: str) -> AbstractContextManager[None]:
        """Keep a path's content until the block ends, and for the grace from then on.

        If the block fails, the path goes on being served with it.
        """
        return self._usage.replacing(path)

    def use(self, path: str) -> None:
        """Note that a request for a path came in; takes no lock."""
        self._usage.note(path)

    def is_idle(self, path: str) -> bool:
        """Tell whether the last use of a path is longer ago than the grace."""
        return self._usage.is_idle(path)

    def forget(self, path: str) -> None:
        """Stop serving a path; its folder may go once the grace is over."""
        self._usage.forget(path)

    def report_use(self) -> None:
        """Tell other processes what this one uses now; to be called regularly."""
        for path, content in self.served.items():
            self._disk.note_use(content, self._usage.idle_s(path))
        if self.in_use != self._disk.listed:
            with self._disk.alone():
                self._disk.write_list(self.in_use)  # read again: it may have changed meanwhile

    def close(self) -> None:
        """Give up all that this process uses; the cache must not be used afterwards."""
        self._disk.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters in the folder."""
        return sum(self._disk.sizes().values())

    # ------------------------------------------------------------------ private: making
    def _ensure(
        self, tree: AdapterTree, problems: list[Problem], path: str, content: str
    ) -> float | None:
        """Make sure that a content is in the folder and listed as in use.

        Returns:
            its error if it was made here, else None.
        """
        if self._is_there(content):
            return None
        with self._disk.making(content):
            if self._is_there(content):  # another thread or process made it meanwhile
                return None
            if content in self._needs:
                # It was flattened before, and there was no room for it. Room is made first now, so
                # that it is not flattened in vain again.
                with self._disk.alone():
                    self._make_room(self._needs[content], for_blend=is_blend(path))
            made = self._flattened(tree, problems, path, content)
            needs = made.adapter.nbytes + CONFIG_BYTES
            _remember(self._needs, content, needs)
            with self._disk.alone():
                self._make_room(needs, for_blend=is_blend(path))
                made.save(self.folder / content)
                # Under the same lock: no process may find it unused in between.
                self._disk.write_list(self.in_use)
            self._on_resize(self.nbytes)
            return made.error

    def _is_there(self, content: str) -> bool:
        with self._disk.alone():
            if not self._disk.has(content):
                return False
            self._disk.write_list(self.in_use)  # before another process may evict it
            return True

    def _flattened(
        self, tree: AdapterTree, problems: list[Problem], path: str, content: str
    ) -> Portable:
        """Read and flatten. A content that can't be served is remembered: another attempt would
        cost the same and fail the same.

        Raises:
            SpecError: it loses more than is allowed, or its numbers are not finite.
            UnlockedError: the files have changed since the tree was seen.
            LoraTreeError: as `portable`.
        """
        try:
            made = self._in_form(lineages(tree, path), path)
        except (FolderError, BudgetError):
            raise  # another time it may succeed
        except LoraTreeError as error:
            if self._contents.has_content(content, tree, problems, path):
                # Without its traceback, whose frames would keep the adapters alive.
                _remember(self._refused, content, _without_traceback(error))
            raise
        # The tree may have changed during the read; the folder would then hold another content.
        if not self._contents.has_content(content, tree, problems, path):
            raise UnlockedError(f"{path}: the tree changed while it was read", "try again")
        return made

    def _in_form(self, tree: AdapterTree, path: str) -> Portable:
        form = self.form
        made = portable(tree, path, rank=form.max_rank, base=form.base)
        if form.max_error is None or made.worst <= form.max_error + ROUNDING:
            return made
        # Given both bounds, `portable` raises, and says which module loses how much and which rank
        # would do.
        portable(tree, path, rank=form.max_rank, max_error=form.max_error, base=form.base)
        raise SpecError(
            f"{path}: relative error {made.worst:.3g} at rank {made.rank}, "
            f"allowed: {form.max_error:g}"
        )

    # ------------------------------------------------------------------ private: making room
    def _make_room(self, nbytes: int, *, for_blend: bool) -> None:
        """Evict the contents used longest ago until there is room; the caller holds the lock.

        Clients make up blends. So a blend never pushes out a path, and blends in use take at most
        half of the budget.

        Raises:
            NoRoom: everything that is left is in use.
            TooLarge: it is larger than the budget.
        """
        self._disk.sweep()
        most = self.budget_bytes // 2 if for_blend else self.budget_bytes
        if nbytes > most:
            whose = "the half of it that blends may use" if for_blend else "all of it"
            raise TooLarge(
                f"{self.folder}: no room for {nbytes:,} bytes: {whose} is {most:,}",
                "give the cache more bytes: vllm-args --cache-gb",
            )
        sizes = self._disk.sizes()
        elsewhere, in_use_here = self._disk.in_use_elsewhere(), self.in_use

        def is_full() -> bool:
            return sum(sizes.values()) + nbytes > self.budget_bytes

        def has_its_share() -> bool:
            in_use = elsewhere | in_use_here
            blends = sum(size for content, size in sizes.items() if in_use.get(content))
            return for_blend and blends + nbytes > most

        for content in sorted(sizes, key=self._unused_s, reverse=True):
            if not is_full() and not has_its_share():
                return
            if content in elsewhere or (for_blend and in_use_here.get(content) is False):
                continue
            if not is_full() and content not in in_use_here:
                continue  # it would not help: only the share of blends in use is used up
            if self._give_up(content) and self._disk.remove(content):
                in_use_here.pop(content, None)
                del sizes[content]
                self._on_evict()
        if is_full() or has_its_share():
            take = plural(
                len(sizes), "adapter that is in use takes", "adapters that are in use take"
            )
            raise NoRoom(
                f"{self.folder}: no room for {nbytes:,} bytes: "
                f"{take} {sum(sizes.values()):,} of {self.budget_bytes:,}",
                f"they stay for {self._usage.grace_s:.0f} s after their last use; "
                "or give the cache more bytes: vllm-args --cache-gb",
            )

    def _give_up(self, content: str) -> bool:
        """Stop using a content, and return True, unless a request of this process may need it.

        Also True if the content was not in use.
        """
        paths = self._usage.holders(content)
        if paths is None:
            return False
        for path in paths:
            if not self._unload(path):
                return False
            self._usage.forget(path)
        # `forget` began a grace, which can end now: the engine has said that it reads it no longer.
        self._usage.free(content)
        return True

    def _make_room_for_blend(self, path: str) -> None:
        """Make room for one more blend among the `MOST_BLENDS` that are served at once.

        Raises:
            NoRoom: all are in use.
        """
        blends = self._usage.oldest_blends()
        if path in blends or len(blends) < MOST_BLENDS:
            return
        for one in blends:
            if self._usage.is_idle(one) and self._unload(one):
                self._usage.forget(one)
                return
        raise NoRoom(
            f"{plural(len(blends), 'blend')} are in use, the most that are served at once",
            "send the request again in a moment",
        )

    def _unused_s(self, content: str) -> float:
        """Return the seconds since the last use of a content, as far as this process knows."""
        own = self._usage.unused_s(content)
        return self._disk.unused_s(content) if own is None else own


def _remember(known: OrderedDict[str, V], content: str, value: V) -> None:
    known[content] = value
    while len(known) > MOST_REMEMBERED:
        known.popitem(last=False)


def _without_traceback(error: LoraTreeError) -> LoraTreeError:
    """Return the same error without its traceback."""
    return type(error)(error.what, *error.todo)
