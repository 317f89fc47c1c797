"""What a tree knows of the folders it was opened from or saved into, so that no save undoes somebody else's.

    one opens zoo           another opens zoo
    adds x, saves
                            adds y, saves: x would go, which this tree never saw: refused

Law: what lies in a folder is a tree's to delete or replace only where it is still what the tree saw there when it was
opened, or when it was last saved there. Trees are held weakly: what is known goes with the tree.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ..tree import AdapterTree
from .disk import Stamp
from .opening import Opened, Place
from .scan import Files
from .source import hashed

__all__ = ["Seen", "recall", "remember"]


@dataclass(frozen=True)
class Seen:
    """A folder as a tree saw it last.

    Args:
        files: path of an adapter → size and time of its files, and the hash of its content where that was known.
        yaml: name of a YAML file that was opened → SHA-256 of its bytes; None where there was none.
    """

    files: Mapping[str, tuple[Mapping[str, Stamp], str | None]] = field(default_factory=dict)
    yaml: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: Opened) -> Seen:
        """What opening a folder shows."""
        files = {
            path: (files.stamps, opened.contents.get(path))
            for path, files in opened.scan.found.items()
        }
        return cls(files, {opened.place.yaml: digest(opened.yaml_bytes)})

    def __bool__(self) -> bool:
        return bool(self.yaml)

    def knows(self, path: str, files: Files) -> bool:
        """The files of that path are still what they were."""
        stamps, content = self.files.get(path, ({}, None))
        if files.stamps == stamps:
            return True
        return content is not None and files.flaw is None and hashed(files) == content


_trees: WeakKeyDictionary[AdapterTree, dict[str, Seen]] = WeakKeyDictionary()


def recall(tree: AdapterTree, place: Place) -> Seen:
    """What ``tree`` knows of the folder; nothing where it was neither opened from there nor saved there."""
    return _trees.get(tree, {}).get(os.path.realpath(place.folder), Seen())


def remember(tree: AdapterTree, place: Place, seen: Seen) -> None:
    """From now on ``tree`` knows this of the folder."""
    _trees.setdefault(tree, {})[os.path.realpath(place.folder)] = seen


def digest(data: bytes | None) -> str | None:
    """SHA-256 of a file's bytes, where there are any."""
    return hashlib.sha256(data).hexdigest() if data is not None else None
