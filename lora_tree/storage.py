"""Slots through which values get at files, and at a base's names, without importing either.

`Adapter.load` and `AdapterTree.save` belong on the values, where users look for them; the formats
belong at the edge. The edge (``folder/``) puts itself into a slot when it is imported, and the
values call it through the slot, so that imports still point inward. `AdapterTree.flatten` asks for
a base's names of modules in the same way (``renaming``).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor, nn

from .errors import FolderError

# For a type checker alone: both modules import this one, so at run time it would be a cycle.
if TYPE_CHECKING:
    from .adapter import Adapter
    from .provenance import SaveNote
    from .tree import AdapterTree

__all__ = [
    "Allocate",
    "Names",
    "Source",
    "Storage",
    "Unhashed",
    "Witness",
    "as_path",
    "install",
    "install_names",
    "names_of",
    "storage",
]

Allocate: TypeAlias = Callable[[int], Tensor]
"""Allocate memory for one adapter: bytes → a uint8 tensor of that length; may raise."""

Witness: TypeAlias = Callable[[str, memoryview], object]
"""Called with every byte that a reader uses: (file name, bytes), in order. It may keep views of a
PEFT folder's weights, which stay unchanged until the reader's caller hands the adapter out, and of
no other bytes."""


Unhashed: TypeAlias = "Callable[[Adapter], object]"
"""Called with an adapter that was read but whose hash is not known yet. It may prepare for the use
of the adapter, as by sending it to a device, but must not let a computation of the user's read it:
if the hash is wrong, the load raises."""


class Source(Protocol):
    """An adapter that is not in memory yet: where it lives, and how to get it."""

    @property
    def key(self) -> Hashable | None:
        """A key for its content, which is the same at every read; None if no lock says so."""
        ...

    @property
    def where(self) -> Path:
        """The folder, for messages and for tree.yaml."""
        ...

    def load(self, allocate: Allocate | None = None, unhashed: Unhashed | None = None) -> Adapter:
        """Read, check and return the adapter; a new value at every call.

        Args:
            allocate: called once for the memory of all its numbers, before any is read; None:
                ordinary memory.
            unhashed: called with the adapter if there is time until its hash is known; called again
                if the files had to be read again.

        Raises:
            FolderError, FormatError: the files are gone, broken, or differ from the lock.
        """
        ...

    def outline(self) -> Adapter:
        """Return the adapter's shapes, ranks and scales without its numbers; reads only headers.

        Raises:
            FormatError: the files are gone or broken.
        """
        ...


class Storage(Protocol):
    """The functions that the edge offers to the values."""

    def read_adapter(self, folder: Path) -> Adapter: ...

    def write_adapter(self, adapter: Adapter, folder: Path, form: str) -> None: ...

    def check_writable(self, adapter: Adapter) -> None: ...

    def source(self, folder: Path) -> Source: ...

    def save_tree(
        self, tree: AdapterTree, folder: Path, *, copy: bool, note: SaveNote, dry_run: bool
    ) -> None: ...


class Names(Protocol):
    """Translates the module names of an adapter into those of a base."""

    def bound(self, adapter: Adapter) -> Adapter:
        """Return the adapter in the base's names; the same object if it has them already."""
        ...

    def has(self, name: str) -> bool:
        """Return whether the base has a module, or a raw parameter, of that name."""
        ...


# Lists, so that a slot is filled in place: a name that was imported from here would keep the old
# value.
_slot: list[Storage] = []
_names: list[Callable[[nn.Module], Names]] = []


def install(edge: Storage) -> None:
    """Install the edge; a later one replaces it."""
    _slot[:] = [edge]


def storage() -> Storage:
    """Return the edge; import it now if a program has imported nothing but values so far."""
    if not _slot:
        # The edge fills the slot while it is imported. An import statement at the top of this file
        # would make the values depend on the edge, and on every format.
        importlib.import_module(".folder", __package__)
    return _slot[0]


def install_names(of: Callable[[nn.Module], Names]) -> None:
    """Install the function that returns a base's `Names`; a later one replaces it."""
    _names[:] = [of]


def names_of(base: nn.Module) -> Names:
    """Return the `Names` of a base; the code for it is imported at the first use."""
    if not _names:
        importlib.import_module(".renaming", __package__)
    return _names[0](base)


def as_path(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that a user named, with ``~`` expanded.

    Raises:
        FolderError: it is no name of a folder, or ``~name``, and there is no user of that name.
    """
    if folder == "":
        # Python takes it for the current folder; in a script it is a variable that was not set.
        raise FolderError("'' is not the name of a folder", "the current folder is called .")
    try:
        return Path(folder).expanduser()
    except (TypeError, ValueError) as error:
        raise FolderError(f"{folder!r:.80} is not the name of a folder: {error}") from error
    # pathlib raises a plain RuntimeError for ~name where the system knows no such user.
    except RuntimeError as error:
        raise FolderError(
            f"{folder}: no such user: {error}", "write the folder out, or ./~name for one here"
        ) from error
