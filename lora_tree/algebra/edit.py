"""Edited: the result of a verb on a tree, and the steps that all verbs share.

A verb first computes every adapter, and then changes the tree in this order: the step that the tree
may refuse (a name that is taken, a node that is in use), then the steps that can't fail. So no
error leaves a tree half changed. Nor does a verb leave an adapter that can't be saved: what fits
into the PEFT files of two nodes may not fit into those of one (`check_savable`).

If a verb keeps a node's effective weight, the node still fits its lineage, although that lineage
has changed. `mark_fitting` records this, because the next save would otherwise mark the node stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..adapter import Adapter
from ..errors import FolderError, FormatError, SpecError, TreeError, listing
from ..node_names import check_path
from ..storage import storage
from ..tree import AdapterTree
from ..weights import weight_within
from .deviation import Deviation

__all__ = [
    "Edited",
    "check_changeable",
    "check_has_adapter",
    "check_path_free",
    "check_savable",
    "is_savable",
    "mark_fitting",
    "put_adapter",
    "refuse_fresh",
    "savable_error",
    "stale_notes",
    "together_advice",
]


@dataclass(frozen=True)
class Edited:
    """The outcome of a verb on a tree. `AdapterTree.save` writes the tree.

    Args:
        added: new nodes.
        changed: nodes with another adapter than before.
        moved: old path → new path, of the nodes that moved.
        errors: node → how far its increments are from the exact ones, which would keep every
            effective weight.
        notes: sentences to show to the user.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    moved: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, Deviation] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """The largest relative error of a node; 0 where nothing was cut."""
        return max((each.relative_error for each in self.errors.values()), default=0.0)

    def as_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return {
            "added": list(self.added),
            "changed": list(self.changed),
            "moved": dict(self.moved),
            "errors": {path: each.as_dict() for path, each in self.errors.items()},
            "notes": list(self.notes),
        }


def check_changeable(tree: AdapterTree, paths: Iterable[str]) -> None:
    """Refuse nodes that an attached model is using, before anything is computed or changed.

    Raises:
        PathError: a node does not exist.
        TreeError: a model is using one.
    """
    for path in paths:
        # Setting a node's own weight again is a no-op, but every attached model must allow it.
        tree.update(path, weight=tree[path].weight)


def check_savable(tree: AdapterTree, made: Mapping[str, Adapter], of: Iterable[str]) -> None:
    """Refuse new adapters that a save of the tree would refuse, before the tree is changed.

    If the tree could not be saved even before the verb, nothing is refused: such a tree is only
    used in memory.

    Args:
        tree: not changed yet.
        made: node → its new adapter.
        of: the nodes that these adapters are computed from, for the error.

    Raises:
        FormatError: PEFT's files can't hold one; names the node, the module and the reason.
    """
    advice = together_advice(of)
    for path, adapter in made.items():
        error = savable_error(path, adapter, *advice)
        if error is not None:
            if not is_savable(tree):
                return
            raise error


def savable_error(where: str, adapter: Adapter, *advice: str) -> FormatError | None:
    """Return the error for a new adapter that can't be saved; None if it can.

    Args:
        where: its node, with which the error begins.
        adapter: the new one.
        advice: lines that say how to make one that can be saved.
    """
    try:
        storage().check_writable(adapter)
    except FormatError as error:
        explained = FormatError(f"{where}: {error.what}", *error.todo, *advice)
        explained.__cause__ = error
        return explained
    return None


def together_advice(of: Iterable[str]) -> tuple[str, ...]:
    """Return the advice for an adapter that can't hold the increments of several nodes.

    Nothing for the increments of one: there is nothing to leave out of it.
    """
    nodes = list(of)
    if len(nodes) < 2:
        return ()
    return (
        f"one adapter can't hold what {listing(nodes)} have together: leave one of them out, "
        "or move modules to a node of their own first: lora-tree split, "
        "lora_tree.split(tree, path, to=…, modules=…)",
    )


def is_savable(tree: AdapterTree) -> bool:
    """Return whether PEFT's files can hold every node; reads only the headers of files."""
    for path in tree.paths():
        try:
            outline = tree.outline(path)
            if outline is not None:
                storage().check_writable(outline)
        except (FormatError, FolderError):
            return False
    return True


def put_adapter(tree: AdapterTree, path: str, adapter: Adapter) -> None:
    """Give a node another adapter, and drop the patterns of its weight that match no module of it.

    These patterns had an effect only on modules that are gone, and would be an error now.
    """
    tree.update(
        path, adapter=adapter, weight=weight_within(tree[path].weight, adapter.module_names)
    )


def mark_fitting(tree: AdapterTree, paths: Iterable[str]) -> None:
    """Record for the next save that these nodes fit their present lineages.

    A node that was stale before stays stale: its cause has not gone away.
    """
    for path in paths:
        node = tree[path]
        # Only a source from a locked folder records its training lineage; others fit any lineage.
        trained = getattr(node.source, "trained", None)
        if node.source is None or node.stale is not None or trained is None:
            continue
        if node.home is None and (node.loaded is None or node.rereadable):
            # The user named a folder outside the tree's own: a save writes its name, not its files.
            tree.update(path, adapter=node.source.where)
        else:
            tree.update(path, adapter=tree.adapter(path))


def refuse_fresh(tree: AdapterTree, path: str) -> None:
    """Refuse a fresh node, whose adapter does not exist before the tree is attached.

    Raises:
        SpecError: it is fresh.
    """
    node = tree[path]
    spec = None if node.fresh is None else node.fresh.over(tree.defaults)
    if spec is not None and spec.has_targets:
        raise SpecError(
            f"{path}: a fresh node: its adapter is made when the tree is attached to its base",
            "attach the tree and save it first, or take the node out",
        )


def check_has_adapter(tree: AdapterTree, path: str) -> None:
    """Refuse a node without an adapter.

    Raises:
        SpecError: it is fresh.
        TreeError: it is a group.
    """
    refuse_fresh(tree, path)
    if not tree[path].has_adapter:
        raise TreeError(
            f"{path}: a group: it has no adapter of its own", "name a node that has one"
        )


def stale_notes(tree: AdapterTree, paths: Iterable[str]) -> tuple[str, ...]:
    """Return a sentence for each of these nodes that is stale."""
    return tuple(f"stale: {tree[path].stale}" for path in paths if tree[path].stale is not None)


def check_path_free(tree: AdapterTree, path: str) -> None:
    """Refuse a path at which no new node can be added, with the errors of `AdapterTree.add`.

    Raises:
        PathError: the name is not valid, or the node above is missing.
        TreeError: the node exists, or one that differs only by case does.
    """
    check_path(path)
    # The tree decides: adding a group and removing it again leaves no trace.
    tree.add(path, group=True)
    tree.remove(path)
