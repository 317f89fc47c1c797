"""Edited: the result of a verb on a tree, and the steps that all verbs share.

A verb computes every adapter first and changes the tree last, in this order: the step that the tree
may refuse (a name that is taken, a node that is in use), then the steps that can't fail. So a tree
is never left half changed. Nor is it left with an adapter that no save takes: PEFT's files can't
hold everything that two nodes hold apart (`check_savable`).

A node whose effective weight a verb keeps still fits its lineage, though the lineage is another one
now. `still_fits` says so to the next save, which would otherwise mark the node stale.
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
    "changeable",
    "check_savable",
    "free",
    "made",
    "own",
    "put_adapter",
    "stale_notes",
    "still_fits",
]


@dataclass(frozen=True)
class Edited:
    """The outcome of a verb on a tree. `AdapterTree.save` writes the tree.

    Args:
        added: new nodes.
        changed: nodes with another adapter than before.
        moved: old path → new path, of the nodes that have another one.
        errors: node → how far its increments are from those that would keep every effective weight.
        notes: sentences about what a user should know.
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


def changeable(tree: AdapterTree, paths: Iterable[str]) -> None:
    """Refuse nodes that an attached model is using, before anything is computed or changed.

    Raises:
        PathError: a node is not there.
        TreeError: a model is using one.
    """
    for path in paths:
        # Giving a node the weight that it has changes nothing, and asks every model.
        tree.update(path, weight=tree[path].weight)


def check_savable(tree: AdapterTree, made: Mapping[str, Adapter], of: Iterable[str]) -> None:
    """Refuse new adapters that a save of the tree would refuse, before the tree is changed.

    If the tree can't be saved as it is, nothing is refused: such a tree is used in memory alone.

    Args:
        tree: as it is before the verb.
        made: node → its new adapter.
        of: the nodes that these are made of, for the error.

    Raises:
        FormatError: PEFT's files can't hold one; names the node, the module and the reason.
    """
    for path, adapter in made.items():
        try:
            storage().check_writable(adapter)
        except FormatError as error:
            if not _is_savable(tree):
                return
            raise FormatError(
                f"{path}: {error.what}",
                *error.todo,
                f"one adapter can't hold what {listing(of)} have together: leave one of them out, "
                "or move modules to a node of their own first: lora-tree split, "
                "lora_tree.split(tree, path, to=…, modules=…)",
            ) from error


def _is_savable(tree: AdapterTree) -> bool:
    """Return whether PEFT's files can hold every node; of files only headers are read."""
    for path in tree.paths():
        try:
            outline = tree.outline(path)
            if outline is not None:
                storage().check_writable(outline)
        except (FormatError, FolderError):
            return False
    return True


def put_adapter(tree: AdapterTree, path: str, adapter: Adapter) -> None:
    """Give a node another adapter; its weight loses the patterns that match no module of that.

    Those had an effect only on modules that are gone, so no effective weight depends on them.
    """
    tree.update(
        path, adapter=adapter, weight=weight_within(tree[path].weight, adapter.module_names)
    )


def still_fits(tree: AdapterTree, paths: Iterable[str]) -> None:
    """Say to the next save that these nodes fit the lineages that they have now.

    A node that was stale before stays stale: the reason for it is still there.
    """
    for path in paths:
        node = tree[path]
        # Only a source out of a locked folder knows what it was trained on; others fit anything.
        trained = getattr(node.source, "trained", None)
        if node.source is None or node.stale is not None or trained is None:
            continue
        if node.home is None and (node.loaded is None or node.rereadable):
            # Its user named a folder elsewhere: only the name is written, and its files stay there.
            tree.update(path, adapter=node.source.where)
        else:
            tree.update(path, adapter=tree.adapter(path))


def made(tree: AdapterTree, path: str) -> None:
    """Refuse a fresh node, whose adapter is made when the tree is attached.

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


def own(tree: AdapterTree, path: str) -> None:
    """Refuse a node without an adapter.

    Raises:
        SpecError: it is fresh.
        TreeError: it is a group.
    """
    made(tree, path)
    if not tree[path].has_adapter:
        raise TreeError(
            f"{path}: a group: it has no adapter of its own", "name a node that has one"
        )


def stale_notes(tree: AdapterTree, paths: Iterable[str]) -> tuple[str, ...]:
    """A sentence for every node among these that no longer fits its lineage."""
    return tuple(f"stale: {tree[path].stale}" for path in paths if tree[path].stale is not None)


def free(tree: AdapterTree, path: str) -> None:
    """Refuse a place for a new node early, in the words of `AdapterTree.add`.

    Raises:
        PathError: the name is not valid, or the node above is missing.
        TreeError: the node exists, or one that differs only by case does.
    """
    check_path(path)
    # The tree itself knows which names it takes; a group that comes and goes leaves no trace.
    tree.add(path, group=True)
    tree.remove(path)
