"""Scan: the folders below a tree's folder that hold an adapter, and where its files are now.

Only names, sizes and times are read. Links between folders are not followed: a tree's folders are
its own, and adapters that lie elsewhere are named in tree.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from ...errors import LoraTreeError
from ...formats.peft import CONFIG, FILES, WEIGHTS
from ...formats.peft_read import PICKLE
from ...formats.recognise import DIFFUSERS_WEIGHTS, MLX_WEIGHTS
from ...node_names import MAX_DEPTH
from .. import disk
from ..bounds import leaves
from ..disk import Stamp
from ..transactions.pending import Pending, pending
from ..transactions.record import HIDDEN

__all__ = ["SINGLE", "Files", "Scan", "find_files", "scan"]

SINGLE = ".safetensors"
_NAMES = frozenset((CONFIG, WEIGHTS, PICKLE))
# A user may name a home folder or a whole disk by mistake. The limit ends such a scan with a
# message instead of letting it run for hours.
_MOST_FOLDERS = 1_000_000

Found: TypeAlias = dict[str, tuple[str, Stamp]]
"""The files of one adapter: name → its path at the moment, and its stamp."""


@dataclass(frozen=True)
class Files:
    """The files of one adapter.

    Args:
        folder: where they belong; for a single file that is named itself, that file.
        now: name → its path at the moment, which may be in the stage of a save, and its stamp.
        single: its factors are one file, in another program's format; mlx-lm writes a config too.
    """

    folder: str
    now: Mapping[str, tuple[str, Stamp]]
    single: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files that make up such an adapter."""
        if not self.single:
            return FILES
        return tuple(self.now)

    @property
    def around(self) -> str:
        """The folder in which the files lie."""
        is_named_itself = self.single and self.folder.endswith(SINGLE)
        return os.path.dirname(self.folder) if is_named_itself else self.folder

    @cached_property
    def stamps(self) -> dict[str, Stamp]:
        """Name → size and time of these files."""
        return {name: self.now[name][1] for name in self.names if name in self.now}

    @property
    def weights_bytes(self) -> int:
        """The size of PEFT's weights; 0 for an adapter in another format."""
        return self.stamps[WEIGHTS].size if WEIGHTS in self.stamps else 0

    @property
    def flaw(self) -> str | None:
        """The reason why the adapter is not whole, and what to do; None if it is whole."""
        missing = [name for name in self.names if name not in self.now]
        if self.single and not any(name.endswith(SINGLE) for name in self.now):
            return f"{self.folder}: no such file"
        if not missing:
            return None
        if WEIGHTS in missing and PICKLE in self.now:
            return (
                f"{self.folder}: {PICKLE} is a pickle, which can run code; "
                f"load it in PEFT and save it as {WEIGHTS}"
            )
        if len(missing) == 2:
            return f"{self.folder}: no adapter there: expected {CONFIG} and {WEIGHTS}"
        half = next(iter(self.now))
        return (
            f"{self.folder}: half an adapter: {half} without {missing[0]}; "
            "copy the other half, or move it away"
        )


@dataclass(frozen=True)
class Scan:
    """The findings below a folder; paths are relative to it.

    Args:
        found: path → the adapter's files there.
        links: path of a link to a folder → the folder that it leads to.
        single: paths of other .safetensors files, which may be adapters of other programs.
        wrong: (path, problem).
    """

    found: dict[str, Files] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    single: list[str] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)


# ---------------------------------------------------------------------- one adapter
def find_files(folder: str, root: str | None = None) -> Files:
    """Find the files of one adapter, also those that a cut-off save left in its stage.

    Args:
        folder: where the files belong; or one file in another program's format.
        root: the folder of its tree, whose pending save may have decided on these files, too.

    Raises:
        SpecError: a commit record can't be trusted.
    """
    if folder.endswith(SINGLE) and not os.path.isdir(folder):
        around, name = os.path.split(folder)
        return Files(folder, _stamped(around, _with_config(name)), single=True)
    saves = _Saves(folder, root)
    now: Found = {}
    for name in FILES:
        place = saves.find(name)
        if place is not None:
            now[name] = place
    if WEIGHTS not in now:
        # mlx-lm and diffusers write folders too, in which one file has the factors. mlx-lm's config
        # has the name of PEFT's.
        for name in (MLX_WEIGHTS,) if CONFIG in now else (MLX_WEIGHTS, DIFFUSERS_WEIGHTS):
            files = _stamped(folder, _with_config(name))
            if name in files:
                return Files(folder, files, single=True)
    if len(now) < len(FILES):
        # A pickle counts for nothing. It is looked for only to explain what is missing.
        pickle = saves.find(PICKLE)
        if pickle is not None:
            now[PICKLE] = pickle
    return Files(folder, now)


def _with_config(name: str) -> tuple[str, ...]:
    """Return the files that an adapter in a single file consists of, by its name."""
    return (CONFIG, name) if name == MLX_WEIGHTS else (name,)


def _stamped(folder: str, names: Iterable[str]) -> Found:
    """Return the files of these names that are there."""
    found: Found = {}
    for name in names:
        at = os.path.join(folder, name)
        stamp = disk.stamp(at)
        if stamp is not None:
            found[name] = at, stamp
    return found


class _Saves:
    """The two saves that may have decided on a folder's files: of the adapter, and of its tree."""

    def __init__(self, folder: str, root: str | None) -> None:
        self._folder, self._root = folder, root
        self._of_adapter = pending(folder)
        self._of_tree = Pending() if root is None else pending(root)
        self._path = ""
        if root is not None and self._of_tree:
            self._path = os.path.relpath(folder, root)

    def find(self, name: str) -> tuple[str, Stamp] | None:
        """Return where a file of the adapter is, and its stamp; None if it is nowhere."""
        for at in self._candidates(name):
            # Only files in this tree's folder count, wherever a link of that name leads.
            stamp = disk.stamp(at)
            if stamp is not None and not leaves(at, self._root):
                return at, stamp
        return None

    def _candidates(self, name: str) -> Iterator[str]:
        """Yield the paths at which a file may be, the likelier one first."""
        plain = os.path.join(self._folder, name)
        place = self._of_adapter.resolve(self._folder, name) if self._of_adapter else plain
        if self._root is not None and self._of_tree and place == plain:
            own = name if self._path == "." else f"{self._path}/{name}"
            place = self._of_tree.resolve(self._root, own)
        if place is None:
            return  # a save has decided to delete it
        if place != plain:
            yield place
        # A file that waits in a stage may be carried to its place between two looks at it.
        yield plain


# ---------------------------------------------------------------------- all below a folder
def scan(root: str, decided: Pending) -> Scan:
    """Find every adapter below a folder.

    Args:
        root: the folder; an adapter in it itself has the path ``""``.
        decided: a save of the tree that is not wholly carried out. The result is as if it were.
    """
    result = Scan()
    files_in: dict[str, Found] = {}
    stack = [("", 0)]
    seen = 0
    while stack:
        above, depth = stack.pop()
        seen += 1
        if seen > _MOST_FOLDERS:
            _note_limit(result, root, above, "", f"more than {_MOST_FOLDERS} folders")
            break
        if depth > MAX_DEPTH:
            _note_limit(result, root, above, above, f"deeper than {MAX_DEPTH} levels")
            continue
        files, below = _look_into(root, above, result)
        if files:
            files_in[above] = files
        # A stack, not recursion: a stranger's folders may be nested deeper than Python allows.
        stack.extend((path, depth + 1) for path in below)
    _apply_pending(files_in, decided)
    for above in sorted(files_in, key=lambda path: path.split("/")):
        if files_in[above]:
            result.found[above] = Files(
                os.path.join(root, above) if above else root, files_in[above]
            )
    return result


def _note_limit(result: Scan, root: str, above: str, node: str, limit: str) -> None:
    text = f"{os.path.join(root, above)}: {limit}; is this the folder of a tree?"
    result.wrong.append((node, text))


def _apply_pending(found: dict[str, Found], decided: Pending) -> None:
    """Apply a pending save: staged files take their places, files to be deleted are left out."""
    for place, staged in decided.staged.items():
        above, _, name = place.rpartition("/")
        stamp = disk.stamp(staged) if disk.exists(staged) else None
        if name in _NAMES and stamp is not None:
            found.setdefault(above, {})[name] = staged, stamp
    for place in decided.deleted:
        above, _, name = place.rpartition("/")
        found.get(above, {}).pop(name, None)


def _look_into(root: str, above: str, result: Scan) -> tuple[Found, list[str]]:
    """Return the adapter files in one folder, and the folders below it."""
    folder = os.path.join(root, above) if above else root
    files: Found = {}
    below: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{above}/{entry.name}" if above else entry.name
                # The record of the top folder is in ``decided`` already, so only those of folders
                # below are read.
                if entry.name == HIDDEN and above:
                    files.update(_decided_alone(folder))
                elif entry.name.startswith("."):
                    continue
                elif entry.is_dir(follow_symlinks=False):
                    below.append(path)
                elif entry.is_symlink() and entry.is_dir():
                    result.links[path] = os.path.realpath(entry.path)
                # The system lists names in any order. A staged file has to win over the one at its
                # place even if the hidden folder was listed first.
                elif entry.name in _NAMES:
                    if entry.name not in files:
                        _look_at(entry, root, above, files, result)
                elif entry.name.endswith(SINGLE) and entry.is_file(follow_symlinks=False):
                    result.single.append(path)
    except OSError as error:
        # A folder that another process removes after it was listed is absent, as if it had been
        # removed before. The top folder itself has to be there.
        if above and isinstance(error, FileNotFoundError | NotADirectoryError):
            return {}, []
        result.wrong.append((above, f"{folder}: can't be read: {error.strerror or error}"))
    except LoraTreeError as error:
        result.wrong.append((above, str(error)))
    return files, below


def _look_at(entry: os.DirEntry[str], root: str, above: str, here: Found, result: Scan) -> None:
    """Note a file of an adapter, or that it is a link out of the tree's folder."""
    if entry.is_symlink() and leaves(entry.path, root):
        target = os.path.realpath(entry.path)
        text = f"{entry.path}: a link that leads out of {root}, to {target}"
        todo = "name that folder in tree.yaml, or copy the file here"
        result.wrong.append((above, f"{text}; {todo}"))
    elif entry.is_file():
        with suppress(FileNotFoundError):  # removed since it was listed
            stat = entry.stat()
            here[entry.name] = entry.path, Stamp(stat.st_size, stat.st_mtime_ns)


def _decided_alone(folder: str) -> Found:
    """Return the files that a cut-off `Adapter.save` into this folder has decided on."""
    now = find_files(folder).now
    return {name: found for name, found in now.items() if f"/{HIDDEN}/" in found[0]}
