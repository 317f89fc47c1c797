"""The edge: what the values call for files. It puts itself into their slot when it is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..errors import FormatError
from ..formats.recognise import recognise
from ..provenance import SaveNote
from ..storage import install
from ..tree import AdapterTree
from .alone import save_adapter
from .bounds import no_folder
from .foreign import ForeignSource
from .one_file import save_one_file
from .saving import save_tree
from .scan import find_files
from .source import FolderSource

__all__ = ["FolderStorage"]


@dataclass(frozen=True)
class FolderStorage:
    """Adapters and trees in files; see `lora_tree.storage.Storage`."""

    def read_adapter(self, folder: Path) -> Adapter:
        """Read one adapter; see `Adapter.load`."""
        # A file of another program's format is told by its content, before a folder is expected.
        found = recognise(Path(os.path.abspath(folder)))
        if found.file is not None:
            return ForeignSource(found).load()
        return FolderSource(_adapter_folder(folder)).load()

    def write_adapter(self, adapter: Adapter, folder: Path, form: str) -> None:
        """Write one adapter; see `Adapter.save`."""
        if form == "peft":
            save_adapter(adapter, folder)
        else:
            save_one_file(adapter, folder, form)

    def source(self, folder: Path) -> FolderSource | ForeignSource:
        """Return an adapter that is read when it is first needed; its files have to be there now.

        Raises:
            FormatError: there is no whole adapter.
        """
        found = recognise(Path(os.path.abspath(folder)))
        if found.file is not None:
            return ForeignSource(found)
        place = _adapter_folder(folder)
        files = find_files(place)
        if files.flaw is not None:
            raise FormatError(files.flaw)
        return FolderSource(place, stamps=files.stamps)

    def save_tree(self, tree: AdapterTree, folder: Path, *, copy: bool, note: SaveNote) -> None:
        """Write a tree; see `AdapterTree.save`."""
        save_tree(tree, folder, copy=copy, note=note)


def _adapter_folder(folder: Path) -> str:
    """Return an adapter's folder as an absolute path; refuse a name that something else has."""
    place = os.path.abspath(folder)
    wrong = no_folder(place, os.fspath(folder))
    if wrong is not None:
        raise FormatError(*wrong)
    return place


# The values may not import this room, because imports point inward. So the room registers itself
# when it is imported; without this `Adapter.load` would have nothing to read with.
install(FolderStorage())
