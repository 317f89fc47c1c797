"""Read the adapter in some files, whichever format they are of."""

from __future__ import annotations

from pathlib import Path

from ...adapter import Adapter
from ...errors import FormatError
from ...formats import peft
from ...formats.peft import FILES
from ...formats.recognise import recognise
from ...formats.single import read_single
from ...storage import Allocate, Witness
from ...system.reading import Inside
from ..bounds import no_folder
from .scan import Files

__all__ = ["check_named", "read_files"]


def read_files(
    files: Files,
    *,
    outline: bool = False,
    allocate: Allocate | None = None,
    witness: Witness | None = None,
    inside: Inside | None = None,
) -> Adapter:
    """Return the adapter in some files.

    Args:
        files: those of a whole adapter.
        outline: leave the numbers out.
        allocate: called once for the buffer of all its numbers; None: ordinary memory.
        witness: called with every byte that is read.
        inside: where the files may lie, all links followed; None: anywhere.

    Raises:
        FormatError: a file is broken, or not what its format says.
    """
    if files.single:
        return read_single(
            recognise(Path(files.now[files.names[-1]][0])),
            outline=outline,
            allocate=allocate,
            witness=witness,
            inside=inside,
        )
    config, weights = (files.now[name][0] for name in FILES)
    return peft.read_adapter(
        config,
        weights,
        where=files.folder,
        outline=outline,
        allocate=allocate,
        witness=witness,
        inside=inside,
    )


def check_named(place: str, spelled: str, above: str = "") -> None:
    """Refuse a name that leads to no adapter; the error says what lies there.

    Args:
        place: the absolute path.
        spelled: as the user wrote it.
        above: the folder that the spelling is relative to; the working directory where empty.

    Raises:
        FormatError: a file of no known format, a pickle, or nothing under what looks like a hub id.
    """
    if recognise(Path(place)).file is not None:
        return
    wrong = no_folder(place, spelled, above)
    if wrong is not None:
        raise FormatError(*wrong)
