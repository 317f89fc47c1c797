"""Ownership: which files in a folder a save may replace or delete, and the refusals for the rest.

    a save wrote them, and they are still what it wrote      the library's own: may go
    the node was opened from these files                     the node's own: it may replace them
    anything else                                            they stay, or the save is refused

In each case the tree must have seen the files: a save must not undo what another process wrote
since the tree was opened or saved here (`Seen`).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import FolderError, listing
from ...tree import AdapterTree, Node
from ..adapters.examine import hashed
from ..adapters.scan import Files
from ..lockfile import FileLock
from ..reading.last_seen import Seen, yaml_sha256
from ..reading.opening import Opened
from ..reading.training_steps import step_of
from ..transactions.changes import KeptAdapter

__all__ = ["Ownership"]


@dataclass(frozen=True)
class Ownership:
    """The rights of one save.

    Args:
        opened: the folder as it is now.
        seen: the folder as the tree saw it last.
    """

    opened: Opened
    seen: Seen

    def is_ours(self, path: str, files: Files) -> bool:
        """Tell whether a save wrote these files, and they are still what it wrote."""
        known = self.opened.lock.nodes.get(path) if self.opened.lock else None
        if known is None or not known.written or files.flaw is not None:
            return False
        if len(known.files) != len(files.names):
            return False
        locked = dict(zip(files.names, known.files, strict=True))
        unchanged = all(FileLock.of(stamp) == locked[name] for name, stamp in files.stamps.items())
        # Another time alone is no other content: a copy of the folder has new times.
        return unchanged or hashed(files) == known.content

    def check_present(self, node: Node) -> None:
        """Refuse to save a node that another process removed: the save would undo that.

        Raises:
            FolderError: it was there when the tree was opened, and now neither files nor lock have
                it.
        """
        path, lock = node.path, self.opened.lock
        here = path in self.opened.scan.found or lock is None or path in lock.nodes
        if node.has_adapter and path in self.seen.files and not here:
            raise self.undoing([os.path.join(self.opened.place.folder, path)], "taken out")

    def check_replace(self, node: Node, content: str | None) -> None:
        """Refuse to write an adapter over one that is not this tree's to replace.

        Args:
            node: the node whose files are to be written.
            content: the hash of the new content. Files that hold it already may be anybody's.

        Raises:
            FolderError: no save wrote what lies there, or this tree has not seen it.
        """
        present = self.opened.scan.found.get(node.path)
        if present is None:
            return
        if not self.is_ours(node.path, present) and not _is_home(node, present.folder):
            raise FolderError(
                f"{present.folder}: an adapter that no save wrote lies where this node's files "
                "belong",
                "move it away, or save to another folder",
            )
        # Files of a save are not enough: another process may have made that save since this tree
        # was opened, and this one would undo it unseen.
        if self.seen.is_unchanged(node.path, present):
            return
        if present.flaw is not None or content != hashed(present):
            raise self.undoing([present.folder], "written")

    def check_yaml(self, old: bytes) -> None:
        """Refuse to replace a tree.yaml that this tree has not seen as it is now.

        Args:
            old: the bytes that lie there.

        Raises:
            FolderError: it is of another tree, or another process has changed it.
        """
        place, sha256 = self.opened.place, yaml_sha256(old)
        if sha256 == self.seen.yaml.get(place.yaml):
            return
        ours = self.opened.lock is not None and self.opened.lock.yaml == sha256
        if not self.seen and not ours:
            raise FolderError(
                f"{place.yaml_file}: belongs to another tree, and no save wrote it",
                "move it away, or save to another folder",
            )
        raise self.undoing([place.yaml_file], "written")

    def leaving(self, tree: AdapterTree, kept: Mapping[str, KeptAdapter]) -> list[str]:
        """Return the paths of adapters that no node has any more, whose files have to be deleted.

        Args:
            tree: the tree that is saved.
            kept: node → its adapter as the folder will hold it.

        Raises:
            FolderError: the files of one have to stay, so that it would come back when the folder
                is opened.
        """
        going, unseen, back = [], [], []
        folder = self.opened.place.folder
        # A tree.yaml may name a folder inside of the tree's own. The adapter there belongs to the
        # node that names it, so it stays.
        named = {os.path.relpath(own.folder, folder) for own in kept.values() if own.named}
        for path, files in self.opened.scan.found.items():
            if self._is_kept(path, kept, named):
                continue
            if not self.is_ours(path, files):
                # A line of tree.yaml can say that a node has no adapter, also if one lies in its
                # folder.
                is_group = path in tree and not tree[path].has_adapter and tree[path].fresh is None
                if not is_group:
                    back.append(files.folder)
            elif self.seen.is_unchanged(path, files):
                going.append(path)
            else:
                unseen.append(files.folder)
        if unseen:
            raise self.undoing(unseen, "written")
        if back:
            raise FolderError(
                f"{listing(back)}: the tree no longer has this node, but no save wrote its files, "
                "so they stay, and would be a node again when the folder is opened",
                "move them out of the folder, save the tree elsewhere, or open the tree again "
                "with that node; or work on copies, which a tree may move: "
                f"lora-tree init NEW --from {shlex.quote(self.opened.place.folder)}",
            )
        return going

    def _is_kept(self, path: str, kept: Mapping[str, KeptAdapter], named: set[str]) -> bool:
        """Tell whether the adapter in a folder is a node's, or a step of a run whose node stays."""
        if (path or ".") in named or (path in kept and not kept[path].named):
            return True
        # A step of such a run is passed over again when the folder is opened.
        run = step_of(path) if path in self.opened.passed else None
        return run is not None and (run in named or run in kept)

    def undoing(self, what: list[str], how: str) -> FolderError:
        """Return the error for a save over files that this tree has not seen."""
        if self.seen:
            return FolderError(
                f"{listing(what)}: {how} by another writer since this tree was opened or saved, "
                "and this save would undo that",
                f"open the tree again, lt.load({self.opened.place.folder!r}), and change that one; "
                "or save into another folder",
            )
        return FolderError(
            f"{listing(what)}: belongs to another tree, and this save would overwrite it",
            "save into another folder; or open that tree and change it; or remove its files first",
        )


def _is_home(node: Node, folder: str) -> bool:
    """Tell whether a node was opened from this folder."""
    return node.home is not None and os.path.realpath(node.home) == os.path.realpath(folder)
