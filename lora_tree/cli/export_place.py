"""The folder that ``lora-tree export`` may write to: outside the tree's own."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..errors import SpecError
from ..storage import as_path
from ..tree import AdapterTree

__all__ = ["check_place"]


def check_place(tree: AdapterTree, folder: Path, to: str) -> None:
    """Refuse to write where the tree lives: an adapter there becomes a node, or replaces one.

    Args:
        tree: its nodes' files may lie anywhere.
        folder: of the tree, or its tree.yaml.
        to: the folder to write.

    Raises:
        SpecError: it is empty, in the tree's folder, a node's own, or the base's.
    """
    if not to.strip():  # Path("") would be the current folder
        raise SpecError("--out is empty", "name a folder for the adapter: --out export/legal")
    # Links are resolved on both sides: one that lies outside of the tree may lead into it.
    where = as_path(to).resolve()
    home = as_path(folder).resolve()
    if _lies_in(where, home if home.is_dir() else home.parent):
        raise SpecError(
            f"--out {to} is in the tree's own folder, where an adapter is a node",
            "write it elsewhere, or add it to the tree: "
            f"lora-tree squash {shlex.quote(str(folder))} PATH --to NODE",
        )
    if tree.base is not None and _same(where, as_path(tree.base).resolve()):
        raise SpecError(
            f"--out {to} is the base's own folder: an adapter there counts as one of the base's "
            "files, and transformers loads it with the base",
            "write it elsewhere",
        )
    for path in tree.paths():
        source = tree[path].source
        if source is not None and _same(where, source.where.resolve()):
            raise SpecError(
                f"--out {to} would write over the files of {path}, {source.where}",
                "write it elsewhere",
            )


def _lies_in(where: Path, folder: Path) -> bool:
    return any(_same(above, folder) for above in (where, *where.parents))


def _same(one: Path, other: Path) -> bool:
    """Tell whether two paths are one place; the file system may know one by two spellings."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
