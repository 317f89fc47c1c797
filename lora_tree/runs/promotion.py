"""Promote a checkpoint's node to a node of a tree."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from pydantic import ValidationError

from ..adapter import Adapter
from ..errors import FolderError, FormatError, PathError, listing, suggest_path
from ..folder import StaleWarning, disk
from ..formats import strict_json
from ..node_names import check_path
from ..nonfinite import broken_tensors, listed_broken
from ..provenance import SaveNote, TrainedWith
from ..storage import as_path
from ..system.reading import is_file, is_folder
from ..tree import AdapterTree, Node
from .checkpoint_factors import NODES, current_ancestors, recorded_ancestors
from .checkpoint_place import locate_checkpoint
from .place import ABOUT
from .run_losses import read_losses

__all__ = ["promote", "promotion_note"]


def promote(
    tree: AdapterTree, path: str, checkpoint: str | os.PathLike[str], *, node: str | None = None
) -> Node:
    """Make a checkpoint's node the adapter of a node of a tree, which is added if it is missing.

    Warns (`StaleWarning`) if it was trained on other ancestors than it has now.

    Args:
        tree: changed in memory; `AdapterTree.save` writes it.
        path: the node to give it to.
        checkpoint: a folder ``checkpoint-N`` of a `Run` or a `TreeTrainer`.
        node: the checkpoint's node to take; None: the one called ``path``.

    Raises:
        FolderError: it is no checkpoint of a tree.
        PathError: the checkpoint has no such node, or the node above ``path`` is not in the tree.
        FormatError: its files are broken, or its factors are not finite.
        TreeError: an attached model is using the node.
    """
    name = path if node is None else node
    # The name becomes a part of a file's path below, so it is checked as text first.
    check_path(name)
    folder = locate_checkpoint(as_path(checkpoint)) / NODES
    if not is_folder(folder):
        raise FolderError(
            f"{checkpoint}: no folder {NODES}/ in it", "name a checkpoint-N of a run over a tree"
        )
    names = _nodes_in(folder)
    if name not in names:
        raise PathError(
            f"{checkpoint}: no node {name!r} in it{suggest_path(name, names)}",
            f"it has: {listing(names)}",
        )
    adapter = Adapter.load(folder / name)
    # A diverged run may have left such a checkpoint before it was noticed.
    broken = broken_tensors(adapter)
    if broken:
        raise FormatError(
            f"{checkpoint}: {name}: {listed_broken(broken)}: the factors are not finite",
            "promote an earlier checkpoint",
        )
    recorded, current = recorded_ancestors(folder.parent, name), current_ancestors(tree, path)
    # Compared by content: a parent that was renamed since is the same model.
    if list(recorded.values()) != list(current.values()):
        warnings.warn(_other_ancestors(path, name, recorded, current), StaleWarning, stacklevel=2)
    if path in tree:
        return tree.update(path, adapter=adapter)
    return tree.add(path, adapter=adapter)


def promotion_note(
    by: str, path: str, checkpoint: str | os.PathLike[str], *, node: str | None = None
) -> SaveNote:
    """Return the note of the save after `promote`, with the data and settings of the run.

    Args:
        by: the command, or the name of the program.
        path, checkpoint, node: as for `promote`.

    Raises:
        FolderError, FormatError: the checkpoint's run.json can't be read.
    """
    file = locate_checkpoint(as_path(checkpoint)) / ABOUT
    if not is_file(file):  # a TreeTrainer's checkpoint has none
        return SaveNote(by=by)
    about = strict_json.loads(disk.read_file(file), str(file))
    name = path if node is None else node
    losses: dict[str, tuple[float, float]] = {}
    first, last = (read_losses(about, which, {name}).get(name) for which in ("first", "last"))
    if first is not None and last is not None:
        losses[path] = first, last
    try:
        training = {path: TrainedWith.model_validate(about["training"])}
    except (KeyError, ValidationError):
        training = {}  # of an earlier version, or of rows that came from no file
    return SaveNote(by=by, training=training, losses=losses)


def _nodes_in(folder: Path) -> list[str]:
    """Return the paths of the nodes that a checkpoint holds."""
    found = []
    for where, _, files in os.walk(folder, onerror=disk.refuse):
        if "adapter_config.json" in files:
            # A node's path has slashes on every system, while Windows separates the names of
            # folders by a backslash.
            found.append(os.path.relpath(where, folder).replace(os.sep, "/"))
    return sorted(found)


def _other_ancestors(path: str, name: str, then: dict[str, str], now: dict[str, str]) -> str:
    changed = [above for above, content in now.items() if then.get(above, content) != content]
    numbers = f", with other numbers in {listing(changed)}" if changed else ""
    return (
        f"{path}: {name} was trained on {listing(then) or 'the bare base'}, and stands on "
        f"{listing(now) or 'the bare base'} now{numbers}"
    )
