"""Keep flattened paths in a folder for engines that read adapters from a disk.

The content of a path is a hash over the content and the coefficient of every node on the way, and
over the form; it names the folder. So another tree is another folder: nothing that was given out
ever changes, and an engine's own caches never meet a stale one. Two names that mean the same share
a folder.

Law: the folder never holds more than its budget. An adapter that a request may still read is not
taken away. A name that is refused leaves nothing behind, neither a file nor an open one.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..blend import Blend, parse_blend
from ..errors import (
    BudgetError,
    FolderError,
    FormatError,
    LoraTreeError,
    SpecError,
    UnlockedError,
    listing,
)
from ..export import Portable, portable
from ..folder import Problem
from ..folder.problem import HARMLESS
from ..folder.source import FolderSource
from ..storage import as_path
from ..tree import AdapterTree
from .shared_folder import SharedFolder

__all__ = ["FlatCache", "FlatForm", "Flattened", "NoRoom", "name_of"]

V = TypeVar("V")

VERSION = "lora_tree flattened 2"
CONFIG_BYTES = 1 << 20
"""Room for what lies beside the factors: the config, the header."""
MOST_BLENDS = 64
"""How many blends a process serves at once: clients make up their names."""
MOST_REMEMBERED = 1024
ROUNDING = 1e-6
"""An error below it is that of fp32's rounding, not of a recompression."""


class NoRoom(FolderError):
    """Everything in the cache is in use; there may be room in a moment."""


@dataclass(frozen=True)
class FlatForm:
    """How paths are flattened.

    Args:
        max_rank: the engine's; a lineage of more is recompressed to it.
        max_error: refuse a path that loses more in any module by that.
        base: a folder with the base's weights, to compare with tensors of the base that an adapter
            carries.
    """

    max_rank: int
    max_error: float | None = None
    base: str | None = None


@dataclass(frozen=True)
class Flattened:
    """A path as the cache has it.

    Args:
        path: as it was asked for.
        content: the name of the folder.
        folder: where the adapter is.
        stale: what the lock says about nodes that no longer fit their lineage.
        error: the relative error that recompression left; None where the folder was there already.
    """

    path: str
    content: str
    folder: Path
    stale: tuple[str, ...] = ()
    error: float | None = None

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
        let_go: called with a path whose last use is longer ago than that, when there is no room:
            stop serving it from here, and say True; or say False, because requests are running.
        is_read: tells whether running requests use a content.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        budget_bytes: int,
        form: FlatForm,
        grace_s: float = 60.0,
        let_go: Callable[[str], bool] | None = None,
        is_read: Callable[[str], bool] | None = None,
    ) -> None:
        self.folder = Path(os.path.abspath(as_path(folder)))  # engines want an absolute one
        self.budget_bytes = budget_bytes
        self.form = form
        self._grace_s = grace_s
        self._let_go = let_go or (lambda _: True)
        self._is_read = is_read or (lambda _: False)
        self._lock = threading.Lock()
        self._served: dict[str, str] = {}  # path → content
        self._used: dict[str, float] = {}  # path → when it was last used, by the monotonic clock
        self._asked: Counter[tuple[str, bool]] = (
            Counter()
        )  # (content, for a blend) → requests under way
        self._released: dict[str, float] = {}  # content → when this process stopped serving it
        self._refused: OrderedDict[str, LoraTreeError] = OrderedDict()  # content → why
        self._needs: OrderedDict[str, int] = OrderedDict()  # content → bytes, as far as it was made
        self._hashes: dict[
            str, tuple[object, str]
        ] = {}  # folder of a node → (its files' stamps, their hash)
        self._disk = SharedFolder(self.folder)

    # ------------------------------------------------------------------ what a path is now
    def content(
        self, tree: AdapterTree, problems: list[Problem], path: Blend
    ) -> tuple[str, tuple[str, ...]]:
        """Return the content of a path as the tree is now, and what is stale on its way, without
        reading weights.

        Raises:
            PathError, SpecError: there is no such path, or it says nothing that can be served.
            FolderError, FormatError: a node on its way is broken, or not what the lock says.
        """
        on_the_way = _on_the_way(path)
        broken = [p for p in problems if p.node in on_the_way and p.kind not in HARMLESS]
        if broken:
            raise FolderError(listing([str(problem) for problem in broken], most=3))
        coefficients = tree.coefficients(path)
        parts = [
            (self._hash(tree, node), c.hex())
            for node, c in coefficients.items()
            if tree[node].has_adapter
        ]
        if not parts:
            raise FormatError(
                "there is nothing to serve: no node on the way has an adapter",
                "ask for the base itself",
            )
        said = json.dumps([VERSION, parts, self.form.max_rank, self.form.max_error])
        stale = tuple(p.text for p in problems if p.node in on_the_way and p.kind == "stale")
        return hashlib.sha256(said.encode()).hexdigest()[:32], stale

    def get(self, tree: AdapterTree, problems: list[Problem], path: str) -> Flattened:
        """Flatten a path of a tree, write it where it is not there yet, and serve it from now on.

        Args:
            tree, problems: the tree as `lora_tree.folder.survey` saw it.
            path: a path, or a blend in its one spelling.

        Raises:
            NoRoom: everything that is there is in use.
            UnlockedError: the tree has changed since it was seen.
            LoraTreeError: as `content`; or the path can't be flattened.
        """
        content, stale = self.content(tree, problems, path)
        if content in self._refused:
            raise _anew(self._refused[content])
        is_blend = _is_blend(path)
        if is_blend:
            self._one_blend_more(path)
        with self._asking(content, is_blend):
            error = self._ensure(tree, problems, path, content)
            self._serve(path, content)
        return Flattened(path, content, self.folder / content, stale, error)

    @property
    def served(self) -> dict[str, str]:
        """Path → the content that this process serves it with."""
        with self._lock:
            return dict(self._served)

    @contextmanager
    def replacing(self, path: str) -> Iterator[None]:
        """Keep what a path is served with until the block ends, and for the grace from then on.

        If the block fails, the path goes on being served with it.
        """
        with self._lock:
            before = self._served.get(path)
        if before is None:
            yield
            return
        with self._asking(before, _is_blend(path)):
            try:
                yield
            except BaseException:
                with self._lock:
                    if path in self._served:
                        self._served[path] = before
                        self._released.pop(before, None)
                raise
            with self._lock:
                if before in self._released:
                    self._released[before] = time.monotonic()

    def use(self, path: str) -> None:
        """Note that a request for a path came in; takes no lock and no time."""
        if path in self._served:
            self._used[path] = time.monotonic()

    def is_idle(self, path: str) -> bool:
        """Tell whether the last use of a path is longer ago than the grace."""
        return time.monotonic() - self._used.get(path, 0.0) >= self._grace_s

    def forget(self, path: str) -> None:
        """Stop serving a path; its folder may go once the grace is over."""
        with self._lock:
            content = self._served.pop(path, None)
            self._used.pop(path, None)
            if content is not None and content not in self._served.values():
                self._released[content] = time.monotonic()

    def tend(self) -> None:
        """Tell other processes what this one has used and no longer uses; to be called now and then."""
        for path, content in self.served.items():
            self._disk.note_use(content, time.monotonic() - self._used.get(path, 0.0))
        if self._in_use() != self._disk.told:
            with self._disk.alone():
                self._disk.tell(self._in_use())

    def close(self) -> None:
        """Hold nothing any more; the cache is not to be used afterwards."""
        self._disk.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is there."""
        return sum(self._disk.sizes().values())

    # ------------------------------------------------------------------ private: making
    def _ensure(
        self, tree: AdapterTree, problems: list[Problem], path: str, content: str
    ) -> float | None:
        """Have a content in the folder, listed as in use; return its error if it was made here."""
        if self._is_there(content):
            return None
        with self._disk.making(content):
            if self._is_there(content):  # another thread or process made it meanwhile
                return None
            if (
                content in self._needs
            ):  # there was no room for it a moment ago: don't make it in vain
                with self._disk.alone():
                    self._make_room(self._needs[content], for_blend=_is_blend(path))
            made = self._flattened(tree, problems, path, content)
            needs = made.adapter.nbytes + CONFIG_BYTES
            _remember(self._needs, content, needs)
            with self._disk.alone():
                self._make_room(needs, for_blend=_is_blend(path))
                made.save(self.folder / content)
                self._disk.tell(self._in_use())
            return made.error

    def _is_there(self, content: str) -> bool:
        with self._disk.alone():
            if not self._disk.has(content):
                return False
            self._disk.tell(self._in_use())  # before another process may take it away
            return True

    def _flattened(
        self, tree: AdapterTree, problems: list[Problem], path: str, content: str
    ) -> Portable:
        """Read and flatten. A content that can't be served is remembered: asking again would cost
        the same.

        Raises:
            SpecError: it loses more than is allowed, or its numbers are not finite.
            UnlockedError: the files have changed since the tree was seen.
            LoraTreeError: as `portable`.
        """
        alone = _lineages(
            tree, path
        )  # what is read is let go of with it, and nothing depends on its neighbours
        try:
            made = self._in_form(alone, path)
        except (FolderError, BudgetError):
            raise  # another time it may succeed
        except LoraTreeError as error:
            if self._is_still(content, tree, problems, path):
                # without its traceback, in which the adapters are
                _remember(self._refused, content, _anew(error))
            raise
        if not self._is_still(content, tree, problems, path):
            raise UnlockedError(f"{path}: the tree was changed while it was read", "ask again")
        return made

    def _in_form(self, tree: AdapterTree, path: str) -> Portable:
        form = self.form
        made = portable(tree, path, rank=form.max_rank, base=form.base)
        if form.max_error is None or made.worst <= form.max_error + ROUNDING:
            return made
        # asked for both, it says which module loses how much, and which rank would do
        portable(tree, path, rank=form.max_rank, max_error=form.max_error, base=form.base)
        raise SpecError(
            f"{path}: relative error {made.worst:.3g} at rank {made.rank}, allowed: {form.max_error:g}"
        )

    def _is_still(
        self, content: str, tree: AdapterTree, problems: list[Problem], path: str
    ) -> bool:
        try:
            return self.content(tree, problems, path)[0] == content
        except LoraTreeError:
            return False

    def _serve(self, path: str, content: str) -> None:
        with self._lock:
            before = self._served.get(path)
            self._served[path] = content
            self._used[path] = time.monotonic()
            self._released.pop(content, None)
            if before is not None and before != content and before not in self._served.values():
                self._released[before] = time.monotonic()

    @contextmanager
    def _asking(self, content: str, is_blend: bool) -> Iterator[None]:
        """Let no process take a content away meanwhile."""
        with self._lock:
            self._asked[content, is_blend] += 1
        try:
            yield
        finally:
            with self._lock:
                self._asked[content, is_blend] -= 1
                if not self._asked[content, is_blend]:
                    del self._asked[content, is_blend]

    # ------------------------------------------------------------------ private: making room
    def _make_room(self, nbytes: int, *, for_blend: bool) -> None:
        """Take away what was used longest ago, until there is room; the caller holds the budget.

        A blend never pushes out a path, and blends in use take at most half of the budget: clients
        make up blends.

        Raises:
            NoRoom: everything that is left is in use.
        """
        self._disk.sweep()
        most = self.budget_bytes // 2 if for_blend else self.budget_bytes
        if nbytes > most:
            whose = "the half of it that blends may use" if for_blend else "all of it"
            raise FolderError(
                f"{self.folder}: no room for {nbytes:,} bytes: {whose} is {most:,}",
                "give the cache more bytes",
            )
        sizes = self._disk.sizes()
        elsewhere, here = self._disk.in_use_elsewhere(), self._in_use()

        def is_full() -> bool:
            return sum(sizes.values()) + nbytes > self.budget_bytes

        def has_its_share() -> bool:
            in_use = elsewhere | here
            blends = sum(size for content, size in sizes.items() if in_use.get(content))
            return for_blend and blends + nbytes > most

        for content in sorted(sizes, key=self._unused_s, reverse=True):
            if not is_full() and not has_its_share():
                return
            if content in elsewhere or (for_blend and here.get(content) is False):
                continue
            if not is_full() and content not in here:
                continue  # taking it away would not help: only what blends may have in use is used up
            if self._give_up(content) and self._disk.remove(content):
                here.pop(content, None)
                del sizes[content]
        if is_full() or has_its_share():
            raise NoRoom(
                f"{self.folder}: no room for {nbytes:,} bytes: {len(sizes)} adapters that are in use take "
                f"{sum(sizes.values()):,} of {self.budget_bytes:,}",
                f"they stay for {self._grace_s:.0f} s after their last use; or give the cache more bytes",
            )

    def _give_up(self, content: str) -> bool:
        """Stop using a content, if no request of this process can need it; True as well where it was not in use."""
        with self._lock:
            asked = any(content == one for one, _ in self._asked)
            names = [path for path, served in self._served.items() if served == content]
            in_grace = not all(self.is_idle(path) for path in names)
            if content in self._released:
                in_grace |= time.monotonic() - self._released[content] < self._grace_s
        if asked or in_grace or self._is_read(content):
            return False
        for path in names:
            if not self._let_go(path):
                return False
            self.forget(path)
        with self._lock:
            self._released.pop(content, None)
        return True

    def _one_blend_more(self, path: str) -> None:
        """Keep the number of blends that are served within its bound.

        Raises:
            NoRoom: all are in use.
        """
        with self._lock:
            blends = [one for one in self._served if _is_blend(one)]
            if path in self._served or len(blends) < MOST_BLENDS:
                return
        for one in sorted(blends, key=lambda one: self._used.get(one, 0.0)):
            if self.is_idle(one) and self._let_go(one):
                self.forget(one)
                return
        raise NoRoom(
            f"{len(blends)} blends are in use, and no more are served at once",
            "ask again in a moment",
        )

    # ------------------------------------------------------------------ private: who uses what
    def _in_use(self) -> dict[str, bool]:
        """Content → whether it is in use for blends alone, in this process."""
        now = time.monotonic()
        found: dict[str, bool] = {}
        with self._lock:
            for content, when in list(self._released.items()):
                if now - when >= self._grace_s and not self._is_read(content):
                    del self._released[content]
            held = [(content, is_blend) for content, is_blend in self._asked]
            held += [(content, _is_blend(path)) for path, content in self._served.items()]
            held += [(content, True) for content in self._released]
        for content, is_blend in held:
            found[content] = found.get(content, True) and is_blend
        return found

    def _unused_s(self, content: str) -> float:
        """Seconds since the last use of a content, as far as this process knows."""
        with self._lock:
            own = [
                self._used.get(path, 0.0)
                for path, served in self._served.items()
                if served == content
            ]
        return time.monotonic() - max(own) if own else self._disk.unused_s(content)

    def _hash(self, tree: AdapterTree, node: str) -> str:
        source = tree[node].source
        if not isinstance(source, FolderSource):
            raise SpecError(f"{node}: it is in memory alone", "save the tree")
        files = source.files()
        if source.content is not None:
            return source.unchanged(files)
        stamps = sorted(files.stamps.items())
        known = self._hashes.get(source.folder)
        if known is None or known[0] != stamps:
            known = self._hashes[source.folder] = stamps, source.unchanged(files)
        return known[1]


def _remember(known: OrderedDict[str, V], content: str, value: V) -> None:
    known[content] = value
    while len(known) > MOST_REMEMBERED:
        known.popitem(last=False)


def _anew(error: LoraTreeError) -> LoraTreeError:
    """The same error without its traceback."""
    return type(error)(error.what, *error.todo)


def _is_blend(path: str) -> bool:
    return ":" in path or "+" in path


def _on_the_way(path: Blend) -> set[str]:
    """The nodes from the root to each path, whether they are in a tree or not."""
    found: set[str] = set()
    for one in parse_blend(path):
        names = one.split("/")
        found.update("/".join(names[:depth]) for depth in range(1, len(names) + 1))
    return found


def _lineages(tree: AdapterTree, path: Blend) -> AdapterTree:
    """A tree of the nodes on the way alone."""
    on_the_way = _on_the_way(path)
    nodes = [tree[node] for node in tree.paths() if node in on_the_way]
    return AdapterTree.from_nodes(nodes, base=tree.base, home=tree.home)
