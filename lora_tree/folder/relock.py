"""Relock: the lock that says what is in a folder now, and what it accepts that the old one did not say.

Law: a lock vouches only for files that were read whole. And what a node was trained on goes with its content, not with
its place: files that were moved on the disk stay as stale, or as fresh, as they were.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import BudgetError, FormatError, LoraTreeError
from .bases import base_lock
from .lockfile import NodeLock, TreeLock
from .opening import Opened, base_at_hand
from .source import Examined, examine
from .trained import TOP, Trained, lineage_locks, node_lock, stale_text, trained

__all__ = ["Relocked", "relocked"]


@dataclass
class Relocked:
    """A new lock, and how it differs from the one before.

    Args:
        lock: the new one.
        accepted: the nodes whose files were not those of the old lock, or not in it.
        moved: of those, node → the node that had the same content in the old lock.
        gone: the nodes of the old lock that have no adapter any more.
        stale: node → why it is stale under the new lock.
    """

    lock: TreeLock
    accepted: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    stale: dict[str, str] = field(default_factory=dict)


def relocked(opened: Opened, *, accept_stale: bool) -> Relocked:
    """Make the lock for a folder as it is.

    Args:
        opened: the folder.
        accept_stale: whether every node counts as trained on its lineage as it is now.

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
    for path, entry in opened.entries.items():
        above = lineages[path.rpartition("/")[0]]
        content = opened.contents.get(path)
        if entry.files is not None:
            new = examined.get(path)
            if new is not None:
                content = new.content
                result.accepted.append(path)
            assert content is not None
            before = _same_content(old, path, content, opened)
            if before is not None and before != path:
                result.moved[path] = before
            on = Trained(above, base, new.untrained if new is not None else False)
            if before is not None and not accept_stale:
                on = trained(old.nodes[before], old)
            elif before is not None and new is None:
                on = Trained(above, base, old.nodes[before].untrained)
            written = before == path and old.nodes[path].written
            mentioned.append(on)
            stale = stale_text(path, on, above, base)
            if stale is not None:
                result.stale[path] = stale
            nodes[path] = node_lock(entry.files.stamps, content, on, base, written=written)
        lineages[path] = above.below(content, entry.weight, path)
    result.gone = [path for path in old.nodes if path not in nodes]
    result.lock = TreeLock(base=base, yaml=old.yaml, nodes=nodes, lineages=lineage_locks(mentioned))
    return result


def _examined(opened: Opened) -> dict[str, Examined]:
    """Read every adapter that the old lock does not vouch for."""
    found: dict[str, Examined] = {}
    broken: list[LoraTreeError] = []
    for path, entry in opened.entries.items():
        if entry.files is None or path in opened.contents:
            continue
        try:
            found[path] = examine(entry.files)
        except (BudgetError, FormatError) as error:
            broken.append(error.within(path))
    if broken:
        kind = (
            FormatError if any(isinstance(error, FormatError) for error in broken) else BudgetError
        )
        raise kind(*_lines(broken))
    return found


def _lines(errors: Iterable[LoraTreeError]) -> list[str]:
    return [line for error in errors for line in (error.what, *error.todo)]


def _same_content(old: TreeLock, path: str, content: str, opened: Opened) -> str | None:
    """The node of the old lock that had this content: that of the same path, or one that was moved or copied."""
    known = old.nodes.get(path)
    if known is not None and known.content == content:
        return path
    had = sorted(name for name, node in old.nodes.items() if node.content == content)
    # A node that is still where it was has been copied; one that is not has been moved, and is the likelier origin.
    moved = [name for name in had if opened.contents.get(name) != content]
    return next(iter([*moved, *had]), None)
