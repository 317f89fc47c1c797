"""Flattened paths in a folder, under a name that says their content: for engines that read adapters from a disk.

    cache/fr.legal-<content>/adapter_config.json, adapter_model.safetensors
    cache/.locks/<content>        held shared by every process that serves it, alone by who takes it away
    cache/.locks/budget           held by the one who writes or takes away

The content is a hash over the content and the coefficient of every node on the way, and over the form. So another tree
is another folder: nothing that was given out ever changes, and an engine's own caches never meet a stale one.

Law: the folder never holds more than its budget. What is served is not taken away for it; who can't make room is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..blend import Blend, parse_blend
from ..errors import FolderError, FormatError, SpecError, listing
from ..export import portable
from ..folder import Problem, disk, survey
from ..folder.source import FolderSource
from ..storage import as_path
from ..system import locks
from ..tree import AdapterTree

__all__ = ["FlatCache", "Flattened", "Form", "name_of"]

VERSION = "lora_tree flattened 1"
CONFIG_BYTES = 1 << 20
"""Room for what lies beside the factors: the config, the header."""

_ENTRY = re.compile(r"[A-Za-z0-9._-]{1,80}-[0-9a-f]{32}\Z")
_STAGED = re.compile(r"\..*\.[0-9a-f]{32}\Z")


@dataclass(frozen=True)
class Form:
    """How paths are flattened.

    Args:
        max_rank: the engine's; a lineage of more is recompressed to it.
        max_error: refuse a path that loses more in any module by that.
        base: a folder with the base's weights, for shapes; q, k, v and gate, up are completed only with it.
    """

    max_rank: int
    max_error: float | None = None
    base: str | None = None


@dataclass(frozen=True)
class Flattened:
    """A path as the cache has it.

    Args:
        path: as it was asked for.
        content: what the folder's name says.
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
    """What an engine calls a path of one content.

    >>> name_of("fr/legal", "1f0c" * 8)
    'fr/legal@1f0c1f0c1f0c1f0c'
    """
    return f"{path}@{content[:16]}"


class FlatCache:
    """A cache folder that any number of threads and processes may use at once.

    Args:
        folder: made where missing; nothing else should live there.
        budget_bytes: the most that it holds.
        form: how paths are flattened.
        grace_s: how long a folder stays after this process has let go of it, for requests on their way.
        let_go: called with a path that should no longer be served from here, to make room; nothing can be made without.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        budget_bytes: int,
        form: Form,
        grace_s: float = 60.0,
        let_go: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = Path(os.path.abspath(as_path(folder)))
        self.budget_bytes = budget_bytes
        self.form = form
        self._grace_s = grace_s
        self._let_go = let_go
        self._lock = threading.Lock()
        self._held: dict[str, locks.Held] = {}  # content → its lock, shared
        self._served: OrderedDict[str, str] = OrderedDict()  # path → content, the longest unasked first
        self._asked: Counter[str] = Counter()  # content → requests for it that are under way
        self._released: dict[str, float] = {}  # content → when it was let go; always held
        self._hashes: dict[tuple[object, ...], str] = {}
        disk.make(self.folder)
        disk.make(self.folder / ".locks")

    # ------------------------------------------------------------------ what a path is now
    def content(self, tree: AdapterTree, problems: list[Problem], path: Blend) -> tuple[str, tuple[str, ...]]:
        """(The content of a path as the tree is now, what is stale on its way), without reading weights.

        Raises:
            PathError, SpecError: there is no such path, or it says nothing that can be served.
            FolderError, FormatError: a node on its way is broken, or not what the lock says.
        """
        coefficients = tree.coefficients(path)
        on_the_way = {node for one in parse_blend(path) for node in tree.lineage(one)}
        broken = [p for p in problems if p.node in on_the_way and p.kind not in ("stale", "leftover")]
        if broken:
            raise FolderError(listing([str(problem) for problem in broken], most=3))
        parts = [(self._hash(tree, node), c.hex()) for node, c in coefficients.items() if tree[node].has_adapter]
        if not parts:
            raise FormatError("there is nothing to serve: no node on the way has an adapter", "ask for the base itself")
        said = json.dumps([VERSION, parts, self.form.max_rank, self.form.max_error, self.form.base is not None])
        stale = tuple(p.text for p in problems if p.node in on_the_way and p.kind == "stale")
        return hashlib.sha256(said.encode()).hexdigest()[:32], stale

    def get(self, zoo: str | os.PathLike[str], path: str) -> Flattened:
        """A path of the tree in ``zoo`` as it is now, flattened, written where it is not there yet, and held.

        Raises:
            LoraTreeError: as `content`; or the path can't be flattened; or there is no room for it.
        """
        tree, problems = survey(zoo)
        content, stale = self.content(tree, problems, path)
        folder = self.folder / f"{_safe(path)}-{content}"
        with self._holding(content):
            error = None if (folder / "adapter_config.json").is_file() else self._make(zoo, tree, path, folder)
            with self._lock:
                before = self._served.get(path)
                self._served[path] = content
                self._served.move_to_end(path)
                self._released.pop(content, None)
                if before is not None and before != content and before not in self._served.values():
                    self._released[before] = time.monotonic()
        with suppress(OSError):
            os.utime(self.folder / ".locks" / content)
        return Flattened(path, content, folder, stale, error)

    @property
    def served(self) -> dict[str, str]:
        """Path → the content that this process serves it with."""
        with self._lock:
            return dict(self._served)

    def forget(self, path: str) -> None:
        """This process serves a path no longer; its folder may go once the grace is over."""
        with self._lock:
            content = self._served.pop(path, None)
            if content is not None and content not in self._served.values():
                self._released[content] = time.monotonic()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is there."""
        return sum(_size(entry) for entry in self._entries())

    # ------------------------------------------------------------------ private
    def _make(self, zoo: str | os.PathLike[str], tree: AdapterTree, path: str, folder: Path) -> float | None:
        """Flatten and write; one process at a time for one content, one writer at a time for the folder."""
        content = folder.name[-32:]
        with locks.holding(self.folder / ".locks" / f"{content}.make"):
            if (folder / "adapter_config.json").is_file():
                return None
            base = self.form.base
            made = portable(
                tree,
                path,
                rank=self.form.max_rank,
                max_error=self.form.max_error,
                base=base,
                complete=base is not None,
            )
            if self.content(*survey(zoo), path)[0] != content:
                raise FolderError(f"{path}: the tree was changed while it was read", "ask again")
            with locks.holding(self.folder / ".locks" / "budget"):
                self._make_room(made.adapter.nbytes + CONFIG_BYTES)
                made.save(folder)
            return made.error

    def _make_room(self, nbytes: int) -> None:
        for name in os.listdir(self.folder):
            if _STAGED.match(name):  # a writer that was killed: the only living one holds the budget
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self._close_released()
        sizes = {entry: _size(entry) for entry in self._entries()}
        for entry in sorted(sizes, key=self._last_asked):
            if sum(sizes.values()) + nbytes <= self.budget_bytes:
                return
            if self._take_away(entry):
                del sizes[entry]
        if sum(sizes.values()) + nbytes <= self.budget_bytes:
            return
        if nbytes <= self.budget_bytes:
            for path in list(self.served)[: max(len(self.served) // 4, 1)]:
                self.forget(path)
                if self._let_go is not None:
                    self._let_go(path)
        raise FolderError(
            f"{self.folder}: no room for {nbytes:,} bytes: {len(sizes)} adapters that are being served take "
            f"{sum(sizes.values()):,} of {self.budget_bytes:,}",
            f"those asked for longest ago are let go within {self._grace_s:.0f} s; or give the cache more bytes",
        )

    def _take_away(self, entry: Path) -> bool:
        """Remove an entry that no process holds."""
        held = locks.attempt(self._lock_file(entry.name[-32:]))
        if held is None:
            return False
        try:
            gone = self.folder / f".gone.{entry.name[-32:]}"
            os.rename(entry, gone)
            shutil.rmtree(gone, ignore_errors=True)
        except OSError:
            return False
        finally:
            held.release()
        return True

    @contextmanager
    def _holding(self, content: str) -> Iterator[None]:
        """No process takes a content away meanwhile; nor afterwards, where it is served by then."""
        with self._lock:
            if content not in self._held:
                held = locks.acquire(self._lock_file(content), shared=True)
                assert held is not None  # it waits for ever
                self._held[content] = held
            self._released.pop(content, None)
            self._asked[content] += 1
        try:
            yield
        finally:
            with self._lock:
                self._asked[content] -= 1
                if not self._asked[content]:
                    del self._asked[content]
                    if content not in self._served.values():
                        self._released.setdefault(content, time.monotonic() - self._grace_s)

    def _close_released(self) -> None:
        with self._lock:
            for content, when in list(self._released.items()):
                if time.monotonic() - when >= self._grace_s and content not in self._asked:
                    del self._released[content]
                    self._held.pop(content).release()

    def _entries(self) -> Iterator[Path]:
        return (self.folder / name for name in sorted(os.listdir(self.folder)) if _ENTRY.match(name))

    def _lock_file(self, content: str) -> Path:
        return self.folder / ".locks" / content

    def _last_asked(self, entry: Path) -> float:
        try:
            return self._lock_file(entry.name[-32:]).stat().st_mtime
        except OSError:
            return 0.0

    def _hash(self, tree: AdapterTree, node: str) -> str:
        source = tree[node].source
        if not isinstance(source, FolderSource):
            raise SpecError(f"{node}: it is in memory alone", "save the tree")
        files = source.files()
        key = (source.folder, *sorted(files.stamps.items()))
        if source.content is not None:
            return source.unchanged(files)
        if key not in self._hashes:
            self._hashes[key] = source.unchanged(files)
        return self._hashes[key]


def _safe(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", ".", path)[:80] or "."


def _size(entry: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in entry.iterdir())
    return 0
