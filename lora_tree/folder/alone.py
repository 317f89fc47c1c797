"""Saving one adapter by itself: a new folder appears whole, by one rename; in an old one both files change as one.

deep/one      .one.<id>/ beside it, filled and synced, then renamed
an old one    a transaction of its own, with its own ``.lora_tree`` (see `commit`)

Where the old one is a node's folder and the save was cut off, readers of the tree look through that record too; so a
save of the tree carries it out before it writes there itself (`finish_nodes`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from ..adapter import Adapter
from ..errors import LoraTreeError
from ..formats import peft
from . import disk
from .changes import Changes, NewFile
from .commit import writing
from .pending import leftovers, pending
from .scan import scan

__all__ = ["finish_nodes", "make_all", "save_adapter"]


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """See `Adapter.save`."""
    files = peft.render(adapter)
    where = Path(os.path.abspath(folder))
    if not os.path.lexists(where):
        _new_adapter(files, where)
        return
    with writing(where) as transaction:
        new = [NewFile.of(name, files[name]) for name in sorted(files)]
        transaction.apply(Changes(tuple(new)))


def _new_adapter(files: Mapping[str, bytes], where: Path) -> None:
    """A new folder, built under a hidden name beside its place."""
    with ExitStack() as undo:
        make_all(where.parent, undo)
        beside = where.with_name(f".{where.name}.{uuid.uuid4().hex}")
        disk.make(beside)
        undo.callback(disk.drop, beside)
        for name in sorted(files):
            undo.callback(_remove, beside / name)
            disk.write(beside / name, files[name])
        disk.sync(beside)
        disk.rename(beside, where)
        undo.pop_all()
        disk.sync(where.parent)


def _remove(file: Path) -> None:
    with suppress(LoraTreeError):
        disk.remove(file)


def make_all(folder: Path, undo: ExitStack) -> None:
    """Make a folder and those above it; ``undo`` takes back the ones that were made, as far as they are empty."""
    missing = [above for above in (folder, *folder.parents) if not os.path.lexists(above)]
    for above in reversed(missing):
        if disk.make(above):
            undo.callback(disk.drop, above)
            disk.sync(above.parent)


def finish_nodes(root: str) -> None:
    """Carry out, or sweep up, what cut-off saves of single adapters left in the folders of the nodes below ``root``.

    Raises:
        FolderError, SpecError: a record there can't be carried out, or not be trusted.
    """
    for path, files in scan(root, pending(root)).found.items():
        if path and leftovers(Path(files.folder)):
            with writing(Path(files.folder)):
                pass
