"""The few operations by which this library changes a disk; a process may be killed at each.

Everything that is written goes through here, in this order: a new file is written whole and synced
under a name that no reader looks for, then renamed; a folder is synced after its content has
changed names. What the operating system refuses arrives as a `FolderError` that names the file.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError
from ..system.durable import sync_file
from ..system.durable import sync_folder as sync
from ..system.flags import NO_FOLLOW, PLAIN
from ..system.named import named
from ..system.reading import Inside, is_file, open_plain, stat_of

__all__ = [
    "Glimpse",
    "Stamp",
    "check_parent",
    "copy",
    "digest",
    "drop",
    "exists",
    "glimpse",
    "link",
    "make",
    "make_inside",
    "mode_of",
    "named",
    "read_file",
    "refuse",
    "remove",
    "rename",
    "replace",
    "stamp",
    "sync",
    "write",
]

# Files are hashed and copied in blocks, because a weights file may be larger than the free memory.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Stamp:
    """The size and time of a file, which are seen without reading it."""

    size: int
    mtime_ns: int


Glimpse = tuple[int, int, int]
"""Inode, size and modification time (ns). If two differ, the file or folder has changed."""


def refuse(error: OSError) -> None:
    """Raise for a folder that can't be looked into, which `os.walk` would skip.

    Raises:
        FolderError: always.
    """
    raise FolderError(f"{error.filename}: can't look into it: {error.strerror}") from error


def stamp(path: str | Path) -> Stamp | None:
    """Return size and time of a plain file, links followed; None if there is none.

    Raises:
        FolderError: the system does not tell.
    """
    seen = stat_of(path)
    if seen is None or not stat.S_ISREG(seen.st_mode):
        return None
    return Stamp(seen.st_size, seen.st_mtime_ns)


def glimpse(path: str | Path) -> Glimpse | None:
    """Stat a file or folder without following a link; None if it can't be looked at."""
    try:
        seen = os.lstat(path)
    except OSError:
        return None
    return seen.st_ino, seen.st_size, seen.st_mtime_ns


def exists(path: str | Path) -> bool:
    """Tell whether a plain file has this name, no link, folder or device; raises like `stamp`."""
    return is_file(path, follow=False)


def read_file(
    path: str | Path, *, most: int | None = None, follow: bool = True, inside: Inside | None = None
) -> bytes:
    """Return a file's bytes.

    Args:
        most: refuse a file with more bytes.
        follow: follow a link; otherwise a link is refused.
        inside: tells where the file may lie.

    Raises:
        FolderError: the file is refused, or can't be read.
    """
    with named("read it", path), open_plain(path, follow=follow, inside=inside) as file:
        # The size is the open file's: the name may have belonged to another file a moment ago.
        size = os.fstat(file).st_size
        if most is not None and size > most:
            raise FolderError(f"{path}: {size:,} bytes; the most is {most:,}")
        return b"".join(_blocks(file))


def digest(
    path: str | Path,
    *,
    follow: bool = True,
    witness: Callable[[memoryview], object] | None = None,
) -> str:
    """Return the SHA-256 of a file's bytes.

    Args:
        follow: follow a link; otherwise a link is refused.
        witness: called with the bytes too, in order.
    """
    sha256 = hashlib.sha256()
    with named("read it", path), open_plain(path, follow=follow) as file:
        for block in _blocks(file):
            sha256.update(block)
            if witness is not None:
                witness(memoryview(block))
    return sha256.hexdigest()


def mode_of(path: str | Path) -> int:
    """Return the mode that a file of this name has, or will get from its folder.

    If the folder does not exist yet, the nearest one above it that does counts. Only the owner may
    write a new file and, if the folder allows it, the group.
    """
    with suppress(OSError, ValueError):
        seen = os.lstat(path).st_mode
        if stat.S_ISREG(seen):
            return stat.S_IMODE(seen) & 0o777
    for above in Path(os.path.abspath(path)).parents:
        with suppress(OSError, ValueError):
            return stat.S_IMODE(os.stat(above).st_mode) & 0o664 | 0o600
    return 0o600


def write(path: str | Path, data: bytes, *, mode: int | None = None) -> Stamp:
    """Make a new file, whole and synced; its mode follows its folder unless one is given."""
    with named("write it", path), _created(path, mode) as file:
        return _fill(file, data)


def replace(path: str | Path, data: bytes) -> None:
    """Make or replace a file atomically: its bytes are synced before it gets the name.

    Raises:
        FolderError: the folder of ``path`` is missing, or the system refuses; it names ``path``.
    """
    check_parent(path)
    # Beside it, because a rename does not cross file systems.
    temporary = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}")
    try:
        # Errors name ``path``, because the caller does not know of the file beside it.
        with named("write it", path):
            with _created(temporary, mode_of(path)) as file:
                _fill(file, data)
            _rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    # The rename itself lasts only once the folder is synced. Without this a power cut could bring
    # the old file back after this function had returned.
    sync(Path(path).absolute().parent)


def check_parent(path: str | Path) -> None:
    """Refuse a file whose folder is missing; a command asks before it works for minutes.

    Raises:
        FolderError: the folder of ``path`` does not exist.

    >>> check_parent("missing/picture.svg")
    Traceback (most recent call last):
    lora_tree.errors.FolderError: missing/picture.svg: can't write it: there is no folder missing
      create the folder first: mkdir -p missing
    """
    parent = Path(path).parent
    if not os.path.lexists(parent):
        raise FolderError(
            f"{path}: can't write it: there is no folder {parent}",
            f"create the folder first: mkdir -p {shlex.quote(str(parent))}",
        )


def copy(
    source: str | Path,
    path: str | Path,
    *,
    mode: int | None = None,
    inside: Inside | None = None,
) -> tuple[Stamp, str]:
    """Copy a file to a new one, synced; return the new file's stamp and its SHA-256.

    Args:
        mode: see `write`.
        inside: where ``source`` may lie when it is opened.
    """
    digest = hashlib.sha256()
    with (
        named(f"copy {source} to it", path),
        open_plain(source, inside=inside) as origin,
        _created(path, mode) as file,
    ):
        # The copied bytes themselves are hashed. A second read of the source could see other bytes,
        # because another process may write it meanwhile.
        for block in _blocks(origin):
            digest.update(block)
            _write_all(file, block)
        return _fill(file, b""), digest.hexdigest()


def link(path: str | Path, to: str | Path) -> bool:
    """Give a file a second name, a hard link; return False if the file system refuses."""
    try:
        os.link(path, to, follow_symlinks=False)
    # A link costs nothing but is never needed: whatever the reason, the caller copies the file,
    # and an error that matters (a full disk) comes again there.
    except (AttributeError, NotImplementedError, OSError):
        return False
    return True


def rename(path: str | Path, to: str | Path) -> None:
    """Rename a file or folder, replacing a file that has the new name."""
    with named(f"rename {path} to it", to):
        _rename(path, to)


def remove(path: str | Path) -> None:
    """Remove a file; a no-op if it is gone already."""
    with named("remove it", path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return


def make(folder: str | Path) -> bool:
    """Make one folder; return False if it exists already."""
    return _make(folder, 0o777)


def make_inside(folder: str | Path) -> bool:
    """Make one folder, with no more permissions than the one around it; see `make`."""
    made = _make(folder, 0o700)
    if made:
        with suppress(OSError):  # a file system without modes
            around = stat.S_IMODE(os.stat(Path(folder).parent).st_mode)
            # The set-group-id bit stays: by it new files take their group from the folder.
            special = stat.S_IMODE(os.stat(folder).st_mode) & ~0o777
            os.chmod(folder, special | around & 0o775 | 0o700)
    return made


def _make(folder: str | Path, mode: int) -> bool:
    with named("make the folder", folder):
        while True:
            try:
                os.mkdir(folder, mode)
                return True
            except FileExistsError:
                with suppress(FileNotFoundError):  # another process has removed it since: make it
                    if stat.S_ISDIR(os.lstat(folder).st_mode):
                        return False
                    raise FolderError(
                        f"{folder}: a file or a link lies where a folder belongs", "move it away"
                    ) from None


def drop(folder: str | Path) -> bool:
    """Remove an empty folder; return False if it is not empty, or gone."""
    try:
        os.rmdir(folder)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------- private
def _rename(path: str | Path, to: str | Path) -> None:
    if os.name == "nt":  # whose rename refuses a name that is taken
        os.replace(path, to)
    else:
        os.rename(path, to)


@contextmanager
def _created(path: str | Path, mode: int | None) -> Iterator[int]:
    mode = mode_of(path) if mode is None else mode
    # 0o600 first: no other user may read it before it has its mode. O_EXCL: never over a file or a
    # link that is there.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN | NO_FOLLOW, 0o600)
    try:
        with suppress(OSError, AttributeError):  # a file system, or a Windows, without modes
            os.fchmod(file, mode)
        yield file
    finally:
        os.close(file)


def _blocks(file: int) -> Iterator[bytes]:
    while block := os.read(file, _BLOCK):
        yield block


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a write may take less than it was given
        view = view[os.write(file, view) :]


def _fill(file: int, data: bytes) -> Stamp:
    _write_all(file, data)
    sync_file(file)
    # After the sync, so that the time is that of the last write.
    seen = os.fstat(file)
    return Stamp(seen.st_size, seen.st_mtime_ns)
