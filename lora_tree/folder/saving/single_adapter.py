"""Save one adapter by itself: a new folder appears whole, in an old one both files change as one.

    a new folder    filled under a hidden name and renamed (`atomic_folders`)
    an old one      a transaction of its own, with its own ``.lora_tree`` (`commit`)

If an old folder is a node's and the save was cut off, readers of the tree follow its record,
too. So a save of the tree first carries that record out (`finish_nodes`).
"""

from __future__ import annotations

import os
from pathlib import Path

from ...adapter import Adapter
from ...formats import peft
from .. import disk
from ..adapters.scan import scan
from ..atomic_folders import new_folder
from ..transactions.changes import Changes, NewFile
from ..transactions.commit import writing
from ..transactions.pending import leftovers, pending

__all__ = ["finish_nodes", "save_adapter"]


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write one adapter into a folder of its own; see `Adapter.save`."""
    files = peft.render(adapter)
    place = Path(os.path.abspath(folder))
    if os.path.lexists(place):
        new = [NewFile.of(name, files[name]) for name in sorted(files)]
        with writing(place) as transaction:
            transaction.apply(Changes(tuple(new)))
        return
    with new_folder(place) as stage:
        for name in sorted(files):
            disk.write(stage / name, files[name])


def finish_nodes(root: str) -> None:
    """Finish the cut-off saves of single adapters in nodes' folders: carry them out, or sweep up.

    Args:
        root: the folder of the tree; a cut-off save of the tree itself is not touched.

    Raises:
        FolderError, SpecError: a record there can't be carried out, or not be trusted.
    """
    for path, files in scan(root, pending(root)).found.items():
        # The empty path is the tree's own folder. The caller holds the lock of that folder already,
        # so to ask for it again here would wait until the time-out.
        if path and leftovers(Path(files.folder)):
            # Nothing is written here: on entry, `writing` finishes what earlier writers left.
            with writing(Path(files.folder)):
                pass
