"""Seen: a tree's folders as it saw them last, so that no save undoes another process's.

    one opens zoo           another opens zoo
    adds x, saves
                            adds y, saves: x would go, which this tree never saw: refused

Law: a tree may delete or replace what lies in a folder only if it is still what the tree saw there,
when it was opened or when it was last saved there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ...tree import AdapterTree
from ..adapters.examine import hashed
from ..adapters.scan import Files
from ..disk import Stamp
from .opening import Opened
from .tree_place import TreePlace

__all__ = ["Seen", "recall", "remember", "yaml_sha256"]


@dataclass(frozen=True)
class Seen:
    """A folder as a tree saw it last.

    Args:
        files: path of an adapter → size and time of its files, and the hash of its content if that
            was known.
        yaml: name of a YAML file that was opened → SHA-256 of its bytes; None if there was none.
    """

    files: Mapping[str, tuple[Mapping[str, Stamp], str | None]] = field(default_factory=dict)
    yaml: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: Opened) -> Seen:
        """Return the folder as it was opened."""
        files: dict[str, tuple[Mapping[str, Stamp], str | None]] = {}
        for path, found in opened.scan.found.items():
            files[path] = found.stamps, opened.contents.get(path)
        return cls(files, {opened.place.yaml: yaml_sha256(opened.yaml_bytes)})

    def __bool__(self) -> bool:
        # A tree that was opened or saved here has an entry for its tree.yaml, even if there was
        # none.
        return bool(self.yaml)

    def is_unchanged(self, path: str, files: Files) -> bool:
        """Tell whether the files of a path are unchanged."""
        stamps, content = self.files.get(path, ({}, None))
        if files.stamps == stamps:
            return True
        # Another time alone may come from a copy, or from a save that wrote the same.
        return content is not None and files.flaw is None and hashed(files) == content


# Trees are held weakly: what a tree has seen goes with the tree.
_trees: WeakKeyDictionary[AdapterTree, dict[str, Seen]] = WeakKeyDictionary()


def recall(tree: AdapterTree, place: TreePlace) -> Seen:
    """Return the folder as ``tree`` saw it last; empty if it was never opened or saved there."""
    return _trees.get(tree, {}).get(os.path.realpath(place.folder), Seen())


def remember(tree: AdapterTree, place: TreePlace, seen: Seen) -> None:
    """Record ``seen`` as the folder in the state in which ``tree`` saw it last."""
    _trees.setdefault(tree, {})[os.path.realpath(place.folder)] = seen


def yaml_sha256(data: bytes | None) -> str | None:
    """Return the SHA-256 of a tree.yaml's bytes; None if there is none."""
    return hashlib.sha256(data).hexdigest() if data is not None else None
