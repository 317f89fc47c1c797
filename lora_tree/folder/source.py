"""FolderSource: an adapter in files, with what its folder's lock says about them.

Law: what is used is what was hashed. The very bytes that are read are hashed, and nothing about the files may have
changed meanwhile; so an adapter is never half of one save and half of another. Read again, they are hashed again only
where size, times or place are not those that were hashed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch

from ..adapter import Adapter
from ..errors import FolderError, FormatError, LoraTreeError, UnlockedError, UnsupportedAdapter
from ..formats import peft
from ..formats.peft import WEIGHTS
from ..formats.safetensors import read_tensors
from ..storage import Allocate, Witness
from ..system.memory import check_fits
from . import disk
from .bounds import homes, inside, lies_in
from .disk import Stamp
from .lockfile import content
from .scan import FILES, Files, find_files
from .trained import Trained

__all__ = ["Examined", "FolderSource", "adds_nothing", "broken_text", "examine", "hashed"]

_TRIES = 5
_TICK_NS = 2_000_000_000  # two writes within it may leave one time, on some file systems

_Identity = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class FolderSource:
    """An adapter that is read when it is asked for; a `lora_tree.storage.Source`.

    Args:
        folder: where its two files belong.
        root: the folder of the tree that it is a part of; None where its user named it.
        stamps: size and time of the files when the tree was opened.
        content: the hash that the lock gives them; None where there is no lock.
        trained: what the lock says it was trained on.
        within: the folder that its files may not lead out of, at any read; None where they may.
    """

    folder: str
    root: str | None = None
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    content: str | None = None
    trained: Trained | None = None
    within: str | None = None
    # the files as they were when their hash was found to be right; not a part of the value
    _hashed: int | None = field(default=None, init=False, repr=False)

    @property
    def where(self) -> Path:
        return Path(self.folder)

    @property
    def key(self) -> tuple[str, str] | None:
        """Folder and content, where the lock says that."""
        return None if self.content is None else (self.folder, self.content)

    def files(self) -> Files:
        """Where its files are now.

        Raises:
            FormatError: they are gone, or not whole.
        """
        files = find_files(self.folder, self.root)
        # A save that removes them may have been seen between two of its steps; the next look sees all of it.
        while files.flaw is not None:
            again = find_files(self.folder, self.root)
            if again == files:
                raise FormatError(files.flaw)
            files = again
        if self.within is not None:
            _check_inside(files, self.within)
        return files

    def gone(self) -> bool:
        """One of its files, or both, are not there any more."""
        return find_files(self.folder, self.root).flaw is not None

    def load(self, allocate: Allocate | None = None) -> Adapter:
        """Read and check the adapter; a new value at every call.

        Args:
            allocate: makes the one buffer of all its numbers; None: ordinary memory.

        Raises:
            FormatError: the files are gone, broken or incomplete.
            UnlockedError: they are not what the lock said when the tree was opened.
        """
        for _ in range(_TRIES):
            files, hashing = self.files(), None
            try:
                before = _identity(files)
                known = self.content is None or self._hashed == hash(before)
                hashing = None if known else _Hashing()
                adapter = self._parse(files, allocate=allocate, witness=hashing)
                found = self.content if hashing is None else hashing.content()
                after = _identity(files)
            except (LoraTreeError, OSError) as error:
                replaced = hashing is not None and self._replaced(files)
                if find_files(self.folder, self.root) != files:
                    continue  # a save moved them meanwhile
                if replaced:
                    raise _not_even_whole(self.folder, error) from error
                raise
            if before != after:
                continue
            self._locked(found)
            if found is not None and all(time.time_ns() - ctime > _TICK_NS for *_, ctime in after):
                object.__setattr__(self, "_hashed", hash(after))
            return adapter
        raise self._restless()

    def _replaced(self, files: Files) -> bool:
        """Return whether the files can be read and are not those that the lock speaks of."""
        try:
            return hashed(files) != self.content
        except LoraTreeError:
            return False

    def _restless(self) -> UnlockedError:
        return UnlockedError(
            f"{self.folder}: its files keep changing while they are read", "wait for the writer"
        )

    def _locked(self, found: str | None) -> None:
        """That this is the content which the lock speaks of, where there is a lock."""
        if self.content is not None and found != self.content:
            raise UnlockedError(
                f"{self.folder}: not the files that tree.lock speaks of: expected content "
                f"{self.content[:12]}…, got {str(found)[:12]}…",
                "if a save replaced them, open the tree again; if they are right, accept them: lora-tree lock",
            )

    def outline(self) -> Adapter:
        """The adapter without its numbers, from the headers; not compared with the lock.

        Raises:
            FormatError: the files are gone, broken or incomplete.
        """
        for _ in range(_TRIES):
            files = self.files()
            try:
                return self._parse(files, outline=True)
            except LoraTreeError:
                if find_files(self.folder, self.root) == files:
                    raise
        raise self._restless()

    def unchanged(self, files: Files) -> str:
        """The hash of the files, known to be what they were when the tree was opened.

        Raises:
            UnlockedError: they are not.
        """
        if self.content is None:
            return hashed(files)
        if files.stamps != self.stamps and hashed(files) != self.content:
            raise UnlockedError(
                f"{self.folder}: its files have changed since the tree was opened",
                "open the tree again; if the files are right, accept them first: lora-tree lock",
            )
        return self.content

    def _parse(
        self,
        files: Files,
        *,
        outline: bool = False,
        allocate: Allocate | None = None,
        witness: Witness | None = None,
    ) -> Adapter:
        config, weights = (files.now[name][0] for name in FILES)
        home = self.within or self.root
        return peft.read_adapter(
            config,
            weights,
            where=self.folder,
            outline=outline,
            allocate=allocate,
            witness=witness,
            inside=None if home is None else partial(_belongs, home),
        )


def _belongs(root: str, real: str) -> bool:
    """A real path lies in the tree's folder; where that is a link, it may lead elsewhere than it did."""
    return lies_in(real, _homes(root)) or lies_in(real, homes(root))


_homes = lru_cache(maxsize=64)(homes)  # asked for each file that is read


class _Hashing:
    """The hash of an adapter's content, from the bytes that its reader used."""

    def __init__(self) -> None:
        self._hashes = {name: hashlib.sha256() for name in FILES}

    def __call__(self, name: str, data: memoryview) -> None:
        self._hashes[name].update(data)

    def content(self) -> str:
        return content(*(self._hashes[name].hexdigest() for name in FILES))


def _not_even_whole(folder: str, error: LoraTreeError | OSError) -> UnlockedError:
    """The complaint about files that are not what the lock says, and broken: to accept them would be no help."""
    what, todo = (error.what, error.todo) if isinstance(error, LoraTreeError) else (str(error), ())
    return UnlockedError(
        f"{folder}: not the files that tree.lock speaks of, and they can't be used: {what}", *todo
    )


def _check_inside(files: Files, folder: str) -> None:
    """Refuse files that links lead out of the folder, whenever those links were made."""
    for at, _ in files.now.values():
        if not inside(at, folder):
            raise FormatError(
                f"{at}: leads out of {folder}, to {os.path.realpath(at)}",
                "the tree was opened with outside=False, which refuses that",
            )


def hashed(files: Files) -> str:
    """The hash of an adapter's content, from its files.

    Raises:
        FolderError: a file can't be read.
        BudgetError: it is larger than all memory, so it could not be used, and is not worth hashing.
    """
    for name in FILES:
        check_fits(files.now[name][1].size, os.path.join(files.folder, name), free=False)
    return content(*(disk.digest(files.now[name][0]) for name in FILES))


@dataclass(frozen=True)
class Examined:
    """The findings in an adapter's files.

    Args:
        content: the hash of their content.
        untrained: the increments are zero.
    """

    content: str
    untrained: bool


def examine(files: Files) -> Examined:
    """Read an adapter's files whole, as a lock has to before it vouches for them.

    An adapter of a kind that this library can't add up passes: its files are whole, and it is refused by its name
    where it is used.

    Raises:
        FormatError: a file is broken: cut short, a Git LFS pointer, a header that does not fit.
    """
    config, weights = (files.now[name][0] for name in FILES)
    hashing = _Hashing()
    try:
        adapter = peft.read_adapter(config, weights, where=files.folder, witness=hashing)
    except UnsupportedAdapter:
        read_tensors(weights, os.path.join(files.folder, WEIGHTS), outline=True)
        return Examined(hashed(files), untrained=False)
    return Examined(hashing.content(), adds_nothing(adapter))


def broken_text(files: Files, *, unknown_kinds: bool = False) -> str | None:
    """Say why an adapter's files are broken, as far as their headers and sizes show it; None where they are whole.

    Args:
        files: both of them.
        unknown_kinds: whether an adapter of a kind that this library can't add up counts as well.
    """
    config, weights = (files.now[name][0] for name in FILES)
    try:
        peft.read_adapter(config, weights, where=files.folder, outline=True)
    except UnsupportedAdapter as error:
        return str(error) if unknown_kinds else None
    except FormatError as error:
        return str(error)
    return None


def adds_nothing(adapter: Adapter) -> bool:
    """Whether all increments are zero, as those of a fresh adapter are: A is drawn, B is zero."""
    for value in adapter.modules.values():
        if value.bias is not None and torch.count_nonzero(value.bias):
            return False
        if torch.count_nonzero(value.B) and torch.count_nonzero(value.A):
            return False
    return True


def _identity(files: Files) -> _Identity:
    try:
        seen = [os.stat(files.now[name][0]) for name in FILES]
    except OSError as error:  # by hand: every load comes by here twice
        raise FolderError(
            f"{error.filename}: can't look at it: {error.strerror or error}"
        ) from error
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in seen)
