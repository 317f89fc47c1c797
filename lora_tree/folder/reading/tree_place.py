"""TreePlace: the folder of a tree, and the names of the two files that describe it.

zoo/                    the user names the folder: tree.yaml and tree.lock
zoo/other.yaml          the user names a YAML file in it: other.yaml and other.lock
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...errors import FolderError, LoraTreeError, suggest
from ...formats.peft import CONFIG, WEIGHTS
from ...storage import as_path
from ..bounds import hub_hint
from ..transactions.pending import Pending, pending

__all__ = ["YAML", "TreePlace", "place_of"]

YAML = "tree.yaml"
_YAML_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class TreePlace:
    """A folder, and the name of the YAML file in it that counts (which may be absent)."""

    folder: str
    yaml: str = YAML

    @property
    def lock(self) -> str:
        """The name of the lock that goes with the YAML file."""
        stem, ending = os.path.splitext(self.yaml)
        # other.yml.lock, for other.lock belongs to other.yaml, which may lie beside it.
        return f"{stem if ending == '.yaml' else self.yaml}.lock"

    @property
    def yaml_file(self) -> str:
        """The path of the YAML file."""
        return os.path.join(self.folder, self.yaml)

    @property
    def lock_file(self) -> str:
        """The path of the lock."""
        return os.path.join(self.folder, self.lock)

    @property
    def spelled(self) -> str:
        """The place as its user would write it."""
        return self.folder if self.yaml == YAML else self.yaml_file


def place_of(path: str | os.PathLike[str], *, make: bool = False) -> TreePlace:
    """Return the place that a user means: a folder, or a YAML file in it.

    Args:
        path: the user's spelling.
        make: accept a place that does not exist yet.

    Raises:
        FolderError: nothing lies there, or something else.
    """
    where = os.path.abspath(as_path(path))
    folder, name = os.path.split(where)
    if os.path.isdir(where):
        return TreePlace(where)
    if name.endswith(_YAML_ENDINGS) and (make or _is_there(folder, name)):
        if make and name.startswith("."):
            text = f"{where}: a tree is not saved into a hidden file"
            raise FolderError(text, f"name it {name.lstrip('.')}")
        return TreePlace(folder, name)
    if os.path.isfile(where):
        raise _not_a_tree(where)
    if make:
        return TreePlace(where)
    raise _nothing_there(where, os.fspath(path))


def _is_there(folder: str, name: str) -> bool:
    """Tell whether a file is there, or will be once a pending save is carried out."""
    try:
        decided = pending(folder)
    except LoraTreeError:
        decided = Pending()  # a broken record is reported when the folder is opened
    file = decided.resolve(folder, name)
    return file is not None and os.path.lexists(file)


def _not_a_tree(file: str) -> FolderError:
    folder, name = os.path.split(file)
    todo = "give the folder of a tree, or its tree.yaml"
    if name in (CONFIG, WEIGHTS):
        todo = f"a single adapter: Adapter.load({folder!r})"
    return FolderError(f"{file}: a file, but neither a folder nor a YAML file", todo)


def _nothing_there(where: str, spelled: str) -> FolderError:
    folder, name = os.path.split(where)
    # The part that is missing may be further up than the last name.
    near = f"; nor is there a folder {folder}"
    if os.path.isdir(folder):
        near = suggest(name, os.listdir(folder))
    hub = hub_hint(spelled)
    todo = [] if hub is None else [hub]
    return FolderError(f"{where}: no such folder or tree.yaml{near}", *todo)
