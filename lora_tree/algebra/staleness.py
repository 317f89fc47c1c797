"""Find the nodes that a change of a tree makes stale, before anything is saved.

A node is stale if its lineage is not the one that it was trained on: other ancestors, or other
contents or weights of these. A save detects that by hashes. Here the tree in memory is compared
with a copy from before the change.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from ..tree import AdapterTree
from ..weights import Weight

__all__ = ["made_stale"]


def made_stale(
    before: AdapterTree, after: AdapterTree, moved: Mapping[str, str] | None = None
) -> list[str]:
    """Return the paths in ``after`` of nodes that fitted their lineage and no longer do, and of
    copies that do not fit the lineage at their new place.

    Args:
        before: the tree before the change: ``copy.copy(tree)``.
        after: the tree after it.
        moved: old path → new path, of the nodes that moved.
    """
    renamed = moved or {}
    found: list[str] = []
    for path in before.paths():
        now = renamed.get(path, path)
        if now not in after or before[path].stale is not None:
            continue
        trained = getattr(after[now].source, "trained", None)
        # An adapter that is only in memory, or was never trained, fits any lineage when saved.
        if trained is None or getattr(trained, "untrained", False):
            continue
        if _ancestors(before, path) != _ancestors(after, now):
            found.append(now)
    found += _copies(before, after, set(renamed.values()))
    return [path for path in after.paths() if path in found]


def _copies(before: AdapterTree, after: AdapterTree, moved: Set[str]) -> list[str]:
    """Return the new nodes that are copies of a trained node, but have other ancestors."""
    origins: dict[int, str] = {}
    for path in before.paths():
        origins.setdefault(id(before[path].source), path)
    added = [path for path in after.paths() if path not in before and path not in moved]
    found: list[str] = []
    for path in added:
        node = after[path]
        trained = getattr(node.source, "trained", None)
        if node.stale is not None or trained is None or getattr(trained, "untrained", False):
            continue
        origin = origins.get(id(node.source))
        if origin is not None:
            fits = _ancestors(before, origin) == _ancestors(after, path)
        else:
            # Nodes of another tree come with their ancestors: only adapters above these matter.
            above = [each for each in after.lineage(path)[:-1] if each not in added]
            fits = not any(after[each].has_adapter for each in above)
        if not fits:
            found.append(path)
    return found


def _ancestors(tree: AdapterTree, path: str) -> list[tuple[object, Weight]]:
    """Return the identities and weights of the adapters above a node; names are ignored."""
    found: list[tuple[object, Weight]] = []
    for above in tree.lineage(path)[:-1]:
        node = tree[above]
        # The source comes first: reading an adapter into memory in between is no change.
        if node.source is not None:
            found.append((id(node.source), node.weight))
        elif node.loaded is not None:
            found.append((id(node.loaded), node.weight))
    return found
