"""Which folders below a tree's folder hold an adapter, and where its files are at the moment.

Nothing is read but names, sizes and times. Links between folders are not followed: a tree's folders are its own, and
what lives elsewhere is named in tree.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import LoraTreeError
from ..formats.peft import CONFIG, WEIGHTS
from ..formats.peft_read import PICKLE
from ..node_names import MAX_DEPTH
from . import disk
from .bounds import leaves
from .disk import Stamp
from .pending import Pending, pending
from .record import HIDDEN

__all__ = ["FILES", "Files", "Scan", "look", "scan"]

FILES = (CONFIG, WEIGHTS)
_NAMES = frozenset((CONFIG, WEIGHTS, PICKLE))
_MOST_FOLDERS = 1_000_000


@dataclass(frozen=True)
class Files:
    """The files of one adapter: name → where it is now, and what can be seen of it."""

    folder: str
    now: Mapping[str, tuple[str, Stamp]]

    @cached_property
    def stamps(self) -> dict[str, Stamp]:
        """Name → size and time of the two files that count."""
        return {name: self.now[name][1] for name in FILES if name in self.now}

    @property
    def flaw(self) -> str | None:
        """Why this is no whole adapter, and what to do; None where it is one."""
        missing = [name for name in FILES if name not in self.now]
        if not missing:
            return None
        if WEIGHTS in missing and PICKLE in self.now:
            return f"{self.folder}: {PICKLE} is a pickle, which can run code; load it in PEFT and save it as {WEIGHTS}"
        if len(missing) == 2:
            return f"{self.folder}: no adapter there: expected {CONFIG} and {WEIGHTS}"
        half = next(iter(self.now))
        return f"{self.folder}: half an adapter: {half} without {missing[0]}; copy the other half, or move it away"


@dataclass(frozen=True)
class Scan:
    """The findings below a folder: relative path → its adapter's files; folder links; and problems with their paths."""

    found: dict[str, Files] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    wrong: list[tuple[str, str]] = field(default_factory=list)


def look(folder: str, root: str | None = None) -> Files:
    """The files of one adapter, through whatever a cut-off save of it, or of the tree in ``root``, left to be done.

    Raises:
        SpecError: a commit record that can't be trusted.
    """
    own, whole = pending(folder), pending(root) if root is not None else Pending()
    above = os.path.relpath(folder, root) if whole and root is not None else ""

    def places(name: str) -> Iterator[str]:
        plain = os.path.join(folder, name)
        place = own.resolve(folder, name) if own else plain
        if whole and root is not None and place == plain:
            place = whole.resolve(root, name if above == "." else f"{above}/{name}")
        if place is not None and place != plain:
            yield place
        if place is not None:
            yield plain  # a file that waits may be carried to its place between two looks at it

    now: dict[str, tuple[str, Stamp]] = {}
    for name in (*FILES, PICKLE):
        if name == PICKLE and len(now) == len(FILES):
            break  # asked only to explain what is missing
        for at in places(name):
            stamp = disk.stamp(at)
            if stamp is not None and not leaves(at, root):
                now[name] = at, stamp
                break
    return Files(folder, now)


def scan(root: str, decided: Pending) -> Scan:
    """Every adapter below ``root``, as it is once ``decided`` is carried out; the top folder's own is under ``""``."""
    result = Scan()
    found: dict[str, dict[str, tuple[str, Stamp]]] = {}
    stack = [("", 0)]
    seen = 0
    while stack:
        above, depth = stack.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > _MOST_FOLDERS:
            limit = (
                f"deeper than {MAX_DEPTH} levels"
                if depth > MAX_DEPTH
                else f"more than {_MOST_FOLDERS} folders"
            )
            text = f"{os.path.join(root, above)}: {limit}; is this the folder of a tree?"
            result.wrong.append((above if seen <= _MOST_FOLDERS else "", text))
            if seen > _MOST_FOLDERS:
                break
            continue
        here, below = _one(root, above, result)
        if here:
            found[above] = here
        stack.extend((path, depth + 1) for path in below)
    for place, staged in decided.staged.items():
        above, _, name = place.rpartition("/")
        stamp = disk.stamp(staged) if disk.exists(staged) else None
        if name in _NAMES and stamp is not None:
            found.setdefault(above, {})[name] = staged, stamp
    for place in decided.deleted:
        above, _, name = place.rpartition("/")
        found.get(above, {}).pop(name, None)
    for above in sorted(found, key=lambda path: path.split("/")):
        if found[above]:
            result.found[above] = Files(os.path.join(root, above) if above else root, found[above])
    return result


def _one(root: str, above: str, result: Scan) -> tuple[dict[str, tuple[str, Stamp]], list[str]]:
    """Return the adapter files in one folder, and the folders below it.

    A folder or file that another process removes after it was listed is absent, as if it had been removed before.
    """
    folder = os.path.join(root, above) if above else root
    here: dict[str, tuple[str, Stamp]] = {}
    below: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{above}/{entry.name}" if above else entry.name
                if entry.name.startswith("."):
                    if entry.name == HIDDEN and above:
                        here.update(_replaced(folder))
                elif entry.is_dir(follow_symlinks=False):
                    below.append(path)
                elif entry.is_symlink() and entry.is_dir():
                    result.links[path] = os.path.realpath(entry.path)
                elif entry.name in _NAMES and entry.name not in here:
                    if entry.is_symlink() and leaves(entry.path, root):
                        text = f"{entry.path}: a link that leads out of {root}, to {os.path.realpath(entry.path)}"
                        todo = "name that folder in tree.yaml, or copy the file here"
                        result.wrong.append((above, f"{text}; {todo}"))
                    elif entry.is_file():
                        with suppress(FileNotFoundError):
                            stat = entry.stat()
                            here[entry.name] = entry.path, Stamp(stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        if above and isinstance(error, FileNotFoundError | NotADirectoryError):
            return {}, []
        result.wrong.append((above, f"{folder}: can't be read: {error.strerror or error}"))
    except LoraTreeError as error:
        result.wrong.append((above, str(error)))
    return here, below


def _replaced(folder: str) -> dict[str, tuple[str, Stamp]]:
    """The files that a cut-off `Adapter.save` into this very folder has decided on."""
    return {name: seen for name, seen in look(folder).now.items() if f"/{HIDDEN}/" in seen[0]}
