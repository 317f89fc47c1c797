"""A checkpoint's node becomes a node of a tree."""

from __future__ import annotations

import os
import warnings

from ..adapter import Adapter
from ..errors import FolderError, FormatError, PathError, listing, suggest
from ..folder import StaleWarning, disk
from ..integrations.checkpoint import NODES, ancestors_now, ancestors_then, where_it_lies
from ..spec import check_path
from ..storage import as_path
from ..system.reading import is_folder
from ..tree import AdapterTree, Node

__all__ = ["promote"]


def promote(
    tree: AdapterTree, path: str, checkpoint: str | os.PathLike[str], *, node: str | None = None
) -> Node:
    """Make what a node was at a checkpoint the adapter of a node of a tree, which is added where it is not there.

    Warns (`StaleWarning`) where it was trained on other ancestors than it has now.

    Args:
        tree: changed in memory; `AdapterTree.save` writes it.
        path: the node to give it to.
        checkpoint: a folder ``checkpoint-N`` of a `Run` or a `TreeTrainer`.
        node: which of the checkpoint's nodes; None: the one called ``path``.

    Raises:
        FolderError: it is no checkpoint of a tree.
        PathError: the checkpoint has no such node, or the node above ``path`` is not in the tree.
        FormatError: its files are broken, or its factors are not finite.
        TreeError: an attached model is using the node.
    """
    folder, name = where_it_lies(as_path(checkpoint)) / NODES, path if node is None else node
    check_path(name)
    if not is_folder(folder):
        raise FolderError(
            f"{checkpoint}: no folder {NODES}/ in it", "name a checkpoint-N of a run over a tree"
        )
    found = sorted(
        os.path.relpath(where, folder).replace(os.sep, "/")
        for where, _, files in os.walk(folder, onerror=disk.refuse)
        if "adapter_config.json" in files
    )
    if name not in found:
        raise PathError(
            f"{checkpoint}: no node {name!r} in it{suggest(name, found)}",
            f"it has: {listing(found)}",
        )
    adapter = Adapter.load(folder / name)
    broken = [module for module, value in adapter.modules.items() if not value.is_finite]
    if broken:
        raise FormatError(
            f"{checkpoint}: {name}: {listing(broken)}: the factors are not finite",
            "promote an earlier checkpoint",
        )
    then, now = ancestors_then(folder.parent, name), ancestors_now(tree, path)
    if list(then.values()) != list(now.values()):
        others = [above for above, told in now.items() if then.get(above, told) != told]
        warnings.warn(
            f"{path}: {name} was trained on {listing(then) or 'the bare base'}, and stands on "
            f"{listing(now) or 'the bare base'} now"
            + (f", with other numbers in {listing(others)}" if others else ""),
            StaleWarning,
            stacklevel=2,
        )
    return tree.update(path, adapter=adapter) if path in tree else tree.add(path, adapter=adapter)
