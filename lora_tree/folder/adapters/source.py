"""FolderSource: an adapter in files, with what its folder's lock says about them.

Law: the bytes that are used are the bytes that were hashed: those that the reader read, of files
that did not change meanwhile. So an adapter is never half of one save and half of another. When
it is read again, it is hashed again only if size, times or inode are not those that were hashed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from ...adapter import Adapter
from ...errors import FolderError, FormatError, LoraTreeError, UnlockedError
from ...storage import Allocate, Unhashed, Witness
from ..bounds import homes, inside, is_in_folders
from ..disk import Stamp
from ..lockfile import HubLock
from ..trained import Trained
from .adapter_files import read_files
from .examine import hashed
from .hashing import ContentHash
from .scan import Files, find_files

__all__ = ["FolderSource"]

_TRIES = 5
_TICK_NS = 2_000_000_000  # two writes within it may leave the same time, on some file systems

_Identity = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class FolderSource:
    """An adapter that is read when it is needed; a `lora_tree.storage.Source`.

    Args:
        folder: where its files belong; or the one file that it is.
        root: the folder of the tree that it is a part of; None if its user named it.
        stamps: size and time of the files when the tree was opened.
        content: the hash that the lock gives them; None if there is no lock.
        pieces: the hash by pieces of the weights; None if the lock has none.
        trained: the lineage and base that it was trained on, as the lock says.
        within: the folder that its files may not lead out of, at any read; None if they may.
        hub: where it is on the model hub; None if it is not from there.
    """

    folder: str
    root: str | None = None
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    content: str | None = None
    trained: Trained | None = None
    within: str | None = None
    hub: HubLock | None = None
    pieces: str | None = None
    # the files as they were when their hash was found to be right; not a part of the value
    _hashed: int | None = field(default=None, init=False, repr=False)

    @property
    def where(self) -> Path:
        """The folder, for messages."""
        return Path(self.folder)

    @property
    def key(self) -> tuple[str, str] | None:
        """Folder and content, if the lock says what the content is."""
        return None if self.content is None else (self.folder, self.content)

    def files(self) -> Files:
        """Return where its files are now.

        Raises:
            FormatError: they are gone, or not whole.
        """
        files = find_files(self.folder, self.root)
        # This look may have fallen between two steps of a save that removes them. If a second look
        # agrees with it, it did not.
        while files.flaw is not None:
            again = find_files(self.folder, self.root)
            if again == files:
                todo = []
                if self.stamps and not files.now:
                    todo = [
                        "it was there when the tree was opened: "
                        "if a save has removed it since, open the tree again"
                    ]
                raise FormatError(files.flaw, *todo)
            files = again
        if self.within is not None:
            _check_inside(files, self.within)
        return files

    def has_missing_files(self) -> bool:
        """Tell whether any of its files is missing now."""
        return find_files(self.folder, self.root).flaw is not None

    def load(self, allocate: Allocate | None = None, unhashed: Unhashed | None = None) -> Adapter:
        """Read and check the adapter; a new value at every call.

        Args:
            allocate: called once for the buffer of all its numbers; None: ordinary memory.
            unhashed: called with the adapter while a thread still hashes what was read.

        Raises:
            FormatError: the files are gone, broken or incomplete.
            UnlockedError: they differ from the lock that was read when the tree was opened.
        """
        by_pieces = self.content is not None and self.pieces is not None
        for _ in range(_TRIES):
            files = self.files()
            hashing = None
            try:
                before = _identity(files)
                if self.content is not None and self._hashed != hash(before):
                    hashing = ContentHash(
                        files.names,
                        whole=not by_pieces,
                        pieces=by_pieces,
                        nbytes=files.weights_bytes,
                    )
                adapter = self._parse(files, allocate=allocate, witness=hashing)
                after = _identity(files)
                if before != after:
                    continue  # what was read may be half of one save and half of another
                content = self.content
                if hashing is not None:
                    if unhashed is not None and hashing.is_threaded:
                        unhashed(adapter)
                    if not by_pieces:
                        content = hashing.content()
                    elif hashing.pieces() != self.pieces:
                        # The files are read again and hashed whole: by that hash they are known,
                        # and the error names it.
                        by_pieces = False
                        continue
            except (LoraTreeError, OSError) as error:
                is_other = hashing is not None and self._is_other_content(files)
                if find_files(self.folder, self.root) != files:
                    continue  # a save moved them meanwhile
                if is_other:
                    raise _broken_files_error(self.folder, error) from error
                raise
            finally:
                # On any way out, an interrupt too: a thread may be hashing what was read.
                if hashing is not None:
                    hashing.close()
            self._check_content(content)
            self._note_hashed(content, after)
            return adapter
        raise self._changing_files_error()

    def _note_hashed(self, found: str | None, files: _Identity) -> None:
        """Remember that these files have the right hash; the next read need not hash them."""
        # A file that is as young as a tick of the clock could be written again within that tick.
        is_settled = all(time.time_ns() - ctime_ns > _TICK_NS for *_, ctime_ns in files)
        if found is not None and is_settled:
            object.__setattr__(self, "_hashed", hash(files))

    def _is_other_content(self, files: Files) -> bool:
        """Tell whether the files can be read and are not those of the lock."""
        try:
            return hashed(files) != self.content
        except LoraTreeError:
            return False

    def _changing_files_error(self) -> UnlockedError:
        text = f"{self.folder}: its files keep changing while they are read"
        return UnlockedError(text, "wait for the writer")

    def _check_content(self, found: str | None) -> None:
        """Refuse files whose content is not the lock's."""
        if self.content is not None and found != self.content:
            raise UnlockedError(
                f"{self.folder}: not the files that tree.lock speaks of: expected content "
                f"{self.content[:12]}…, got {str(found)[:12]}…",
                "if a save replaced them, open the tree again; "
                "if they are right, accept them: lora-tree lock",
            )

    def outline(self) -> Adapter:
        """Return the adapter without its numbers, from the headers; not compared with the lock.

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
        raise self._changing_files_error()

    def unchanged(self, files: Files) -> str:
        """Return the hash of the files, and refuse files that changed since the tree was opened.

        Raises:
            UnlockedError: they have changed.
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
        home = self.within or self.root
        return read_files(
            files,
            outline=outline,
            allocate=allocate,
            witness=witness,
            inside=None if home is None else partial(_belongs, home),
        )


def _belongs(root: str, real: str) -> bool:
    """Tell whether a real path lies in the tree's folder."""
    # The cached answer saves resolving the folder's links for each file that is read. If it is no,
    # the folder may be a link that leads elsewhere by now, so it is resolved again.
    return is_in_folders(real, _homes(root)) or is_in_folders(real, homes(root))


_homes = lru_cache(maxsize=64)(homes)


def _broken_files_error(folder: str, error: LoraTreeError | OSError) -> UnlockedError:
    """Return the error for files that differ from the lock and are broken as well."""
    # The advice to accept them with `lock` is left out: it would refuse them too.
    what = str(error)
    todo: tuple[str, ...] = ()
    if isinstance(error, LoraTreeError):
        what, todo = error.what, error.todo
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


def _identity(files: Files) -> _Identity:
    try:
        seen = [os.stat(files.now[name][0]) for name in files.names]
    except OSError as error:
        # Without `disk.named`, which takes as long as the calls: every load comes by here twice.
        raise FolderError(
            f"{error.filename}: can't tell whether it exists: {error.strerror or error}"
        ) from error
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in seen)
