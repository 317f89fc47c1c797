"""FolderStorage: adapters and trees in files, for the values, which have a slot for it.

It installs itself in their slot when this module is imported (`lora_tree.storage`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..errors import FormatError
from ..formats.peft import peft_form
from ..provenance import SaveNote
from ..storage import install
from ..tree import AdapterTree
from .adapters.adapter_files import check_named
from .adapters.scan import find_files
from .adapters.source import FolderSource
from .hub_name import fetched, parse_hub_name
from .lockfile import HubLock
from .saving.other_formats import save_one_file
from .saving.save_tree import save_tree
from .saving.single_adapter import save_adapter

__all__ = ["FolderStorage"]


@dataclass(frozen=True)
class FolderStorage:
    """Adapters and trees in files; see `lora_tree.storage.Storage`."""

    def read_adapter(self, folder: Path) -> Adapter:
        """Read one adapter; see `Adapter.load`."""
        return FolderSource(_adapter_place(folder)[0]).load()

    def write_adapter(self, adapter: Adapter, folder: Path, form: str) -> None:
        """Write one adapter; see `Adapter.save`."""
        if form == "peft":
            save_adapter(adapter, folder)
        else:
            save_one_file(adapter, folder, form)

    def check_writable(self, adapter: Adapter) -> None:
        """Refuse an adapter that a save of a tree would refuse; nothing is written.

        Raises:
            FormatError: names the module and the reason.
        """
        peft_form(adapter)

    def source(self, folder: Path) -> FolderSource:
        """Return a source, which reads an adapter when first needed; the files have to exist now.

        Raises:
            FormatError: there is no whole adapter.
        """
        place, hub = _adapter_place(folder)
        files = find_files(place)
        if files.flaw is not None:
            raise FormatError(files.flaw)
        return FolderSource(place, stamps=files.stamps, hub=hub)

    def save_tree(
        self, tree: AdapterTree, folder: Path, *, copy: bool, note: SaveNote, dry_run: bool
    ) -> None:
        """Write a tree; see `AdapterTree.save`."""
        save_tree(tree, folder, copy=copy, note=note, dry_run=dry_run)


def _adapter_place(spelled: Path) -> tuple[str, HubLock | None]:
    """Return the absolute path of an adapter, and its place on the hub if it is named there.

    An adapter on the hub is fetched first.

    Raises:
        FormatError: something else has this name.
        HubError: the hub does not have it, or can't be asked.
    """
    text = os.fspath(spelled)
    name = parse_hub_name(text)
    if name is not None:
        got = fetched(name)
        return got.place, HubLock(adapter=text, commit=got.commit)
    place = os.path.abspath(spelled)
    check_named(place, text)
    return place, None


# The values may not import this room, because imports point inward. So the room registers itself
# when it is imported; without this `Adapter.load` would have nothing to read with.
install(FolderStorage())
