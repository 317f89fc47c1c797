"""Relocked: the lock for a folder's present files, and the files that only the new lock accepts.

Law: a lock vouches only for files that were read whole. And what a node was trained on goes with
its content, not with its place: files that were moved on the disk stay as stale, or as fresh, as
before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...errors import BudgetError, FormatError, LoraTreeError
from ..adapters.examine import Examined, examine
from ..lockfile import NodeLock, TreeLock
from ..reading.bases import base_lock
from ..reading.opening import Opened, base_at_hand
from ..trained import TOP, Trained, lineage_locks, node_lock, stale_text, trained, training_locks

__all__ = ["Relocked", "relocked"]


@dataclass
class Relocked:
    """A new lock, and how it differs from the one before.

    Args:
        lock: the new one.
        accepted: the nodes whose files differ from the old lock, or are not in it.
        moved: node → the node that had the same content in the old lock, if it was another one.
        gone: the nodes of the old lock that have no adapter any more.
        stale: node → why it is stale under the new lock.
    """

    lock: TreeLock
    accepted: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    stale: dict[str, str] = field(default_factory=dict)


def relocked(opened: Opened, *, accept_stale: bool) -> Relocked:
    """Make the lock for a folder's present files.

    Args:
        opened: the folder.
        accept_stale: every node counts as trained on its present lineage.

    Raises:
        FormatError: files are broken; names every node whose files are.
        BudgetError: files are larger than the memory that is free.
    """
    old = opened.lock or TreeLock()
    examined = _examined(opened)
    base = base_lock(base_at_hand(opened), opened.base_spelled, [old.base])
    result = Relocked(old)
    lineages = {"": TOP}
    mentioned: list[Trained] = []
    nodes: dict[str, NodeLock] = {}
    for path, entry in opened.entries.items():  # parents first: lineages are made of those above
        above = lineages[path.rpartition("/")[0]]
        new = examined.get(path)
        content = opened.contents.get(path) if new is None else new.content
        lineages[path] = above.below(content, entry.weight, path)
        if entry.files is None:
            continue
        assert content is not None, "a node with files is in the old lock, or was examined"
        before = _same_content(old, path, content, opened)
        if new is not None:
            result.accepted.append(path)
        if before is not None and before != path:
            result.moved[path] = before
        now = Trained(above, base, _is_untrained(new, old, before))
        keeps = before is not None and not accept_stale
        was = None if before is None else trained(old.nodes[before], old)
        if was is not None:
            # Another lineage is accepted, but how the content came to be stays true.
            now = replace(now, made=was.made)
        on = was if was is not None and keeps else now
        mentioned.append(on)
        stale = stale_text(path, on, above, base)
        if stale is not None:
            result.stale[path] = stale
        # A later save may delete files that are marked as written. Files that their user moved here
        # or changed are the user's, so they lose the mark.
        written = before == path and old.nodes[path].written
        pieces = None
        if new is not None:
            pieces = new.pieces
        elif before is not None:
            pieces = old.nodes[before].pieces
        nodes[path] = node_lock(
            entry.files.stamps,
            content,
            on,
            base,
            pieces=pieces,
            written=written,
            hub=entry.hub,
        )
    result.gone = [path for path in old.nodes if path not in nodes]
    lineage_table = lineage_locks(mentioned)
    trainings = training_locks(mentioned)
    result.lock = TreeLock(
        base=base, yaml=old.yaml, nodes=nodes, lineages=lineage_table, trainings=trainings
    )
    return result


def _is_untrained(new: Examined | None, old: TreeLock, before: str | None) -> bool:
    """Tell whether increments are zero: as they were read just now, or as the old lock says."""
    if new is not None:
        return new.untrained
    return before is not None and old.nodes[before].untrained


def _examined(opened: Opened) -> dict[str, Examined]:
    """Read every adapter that the old lock does not vouch for."""
    examined: dict[str, Examined] = {}
    broken: list[LoraTreeError] = []
    for path, entry in opened.entries.items():
        if entry.files is None or path in opened.contents:
            continue
        try:
            examined[path] = examine(entry.files)
        except (BudgetError, FormatError) as error:
            broken.append(error.within(path))  # all of them are reported at once
    if not broken:
        return examined
    lines: list[str] = []
    for mistake in broken:
        lines += [mistake.what, *mistake.todo]
    is_format = any(isinstance(mistake, FormatError) for mistake in broken)
    raise (FormatError if is_format else BudgetError)(*lines)


def _same_content(old: TreeLock, path: str, content: str, opened: Opened) -> str | None:
    """Return the node of the old lock that had this content; None if none had.

    It is that of the same path, or one that was moved or copied.
    """
    known = old.nodes.get(path)
    if known is not None and known.content == content:
        return path
    had = sorted(name for name, node in old.nodes.items() if node.content == content)
    # A node that is still where it was has been copied. One that is not has been moved, and is the
    # likelier origin.
    moved = [name for name in had if opened.contents.get(name) != content]
    return next(iter([*moved, *had]), None)
