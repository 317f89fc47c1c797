"""Examine an adapter's files: hash them, and tell whether they are whole and add anything."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ...adapter import Adapter
from ...errors import FormatError, UnsupportedAdapter
from ...formats.safetensors import read_tensors
from ...nonfinite import broken_tensors, listed_broken
from ...system.memory import check_fits
from .. import disk
from ..lockfile import content
from .adapter_files import read_files
from .hashing import ContentHash
from .scan import Files

__all__ = [
    "Examined",
    "adds_nothing",
    "broken_text",
    "check_numbers",
    "examine",
    "examine_numbers",
    "hashed",
]


def hashed(files: Files) -> str:
    """Hash an adapter's content, from its files.

    Raises:
        FolderError: a file can't be read.
        BudgetError: a file is larger than all memory. It could not be used, so it is not read.
    """
    # Before a byte is read: to hash hundreds of GB that can't be used would only take time.
    for name in files.names:
        check_fits(files.now[name][1].size, os.path.join(files.around, name), free=False)
    return content(*(disk.digest(files.now[name][0]) for name in files.names))


@dataclass(frozen=True)
class Examined:
    """The findings in an adapter's files.

    Args:
        content: the hash of their content.
        pieces: the hash by pieces of the weights; None if they are small.
        untrained: the increments are zero.
    """

    content: str
    pieces: str | None
    untrained: bool


def examine(files: Files, *, is_new: bool = False) -> Examined:
    """Read an adapter's files whole, as a lock has to before it vouches for them.

    An adapter of a kind that this library can't add up passes: its files are whole, and it is
    refused by its name when it is used.

    Args:
        files: whole.
        is_new: refuse numbers that are not finite as well.

    Raises:
        FormatError: a file is broken: cut short, a Git LFS pointer, a header that does not fit; or
            as `check_numbers`.
    """
    hashing = ContentHash(files.names, pieces=True, nbytes=files.weights_bytes)
    try:
        adapter = read_files(files, witness=hashing)
        if is_new:
            check_numbers(adapter, files.folder)
        return Examined(hashing.content(), hashing.pieces(), adds_nothing(adapter))
    except UnsupportedAdapter:
        # The reader stopped before the hash had all bytes, so the files are hashed again.
        weights = files.names[-1]
        read_tensors(files.now[weights][0], os.path.join(files.around, weights), outline=True)
        return Examined(hashed(files), None, untrained=False)
    finally:
        hashing.close()


def examine_numbers(files: Files) -> None:
    """Read an adapter's files, whose bytes are known, and refuse numbers that are not finite.

    An adapter of a kind that this library can't add up passes, as with `examine`.

    Raises:
        FormatError: as `check_numbers`, or a file is broken.
    """
    try:
        adapter = read_files(files)
    except UnsupportedAdapter:
        return
    check_numbers(adapter, files.folder)


def broken_text(files: Files, *, unknown_kinds: bool = False) -> str | None:
    """Say why an adapter's files are broken, as far as headers and sizes show it; None if whole.

    Args:
        files: those of an adapter of which none is missing.
        unknown_kinds: whether an adapter of a kind that this library can't add up is broken, too.
    """
    try:
        read_files(files, outline=True)
    except UnsupportedAdapter as error:
        return str(error) if unknown_kinds else None
    except FormatError as error:
        return str(error)
    return None


def check_numbers(adapter: Adapter, folder: str | None = None) -> None:
    """Refuse an adapter with numbers that are not finite: every output below it would be NaN.

    Args:
        adapter: as it was read.
        folder: or the file, for the message; None: it is in memory alone.

    Raises:
        FormatError: there are some; names the modules, their tensors and the overrides.
    """
    broken = broken_tensors(adapter)
    if broken:
        where = "" if folder is None else f": {folder}"
        raise FormatError(
            f"{listed_broken(broken)}: a factor holds NaN or an infinity, as a training that "
            f"diverged leaves it{where}",
            "nothing was saved; train it again, or put back an earlier version of its files",
        )


def adds_nothing(adapter: Adapter) -> bool:
    """Tell whether all increments are zero, as a fresh adapter's are: A is drawn, B is zero."""
    if adapter.overrides:
        return False  # what they replace is not known here
    for value in adapter.modules.values():
        if value.bias is not None and torch.count_nonzero(value.bias):
            return False
        # An increment is the product B A, so one zero factor is enough. B comes first: it is the
        # zero one in a fresh adapter, and A is not counted then.
        if torch.count_nonzero(value.B) and torch.count_nonzero(value.A):
            return False
    return True
