"""ForeignSource: an adapter in one file of another program's format, read when it is needed.

A tree keeps such a file where it is and copies nothing until it is saved. A save writes a PEFT
folder, as for any adapter that memory has. So no lock speaks of the file itself, and it is read as
it is at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..formats.recognise import Recognised
from ..formats.single import read_single
from ..storage import Allocate

__all__ = ["ForeignSource"]


@dataclass(frozen=True, eq=False)
class ForeignSource:
    """A `lora_tree.storage.Source`.

    Args:
        found: the file, and the format that it was recognised as.
    """

    found: Recognised

    @property
    def where(self) -> Path:
        assert self.found.file is not None
        return self.found.file

    @property
    def key(self) -> None:
        """Nothing says that the file holds the same whenever it is read."""
        return None

    def load(self, allocate: Allocate | None = None) -> Adapter:
        """Read the adapter; a new value at every call.

        Args:
            allocate: makes the one buffer of all its numbers; None: ordinary memory.

        Raises:
            FormatError: the file is gone, broken or incomplete.
        """
        return read_single(self.found, allocate=allocate)

    def outline(self) -> Adapter:
        """Return the adapter without its numbers. The whole file is read: it holds the scales."""
        return read_single(self.found, outline=True)
