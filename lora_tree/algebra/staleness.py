"""Which nodes a change of a tree makes stale, told before anything is saved.

A node's files are stale where its lineage is not the one that it was trained on: other ancestors,
other contents of them, or other weights. A save finds that by hashes; here the same is asked of two
trees in memory, one a copy of the other from before the change.
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
    copies that do not fit the lineage that they were put on.

    Args:
        before: the tree before the change: ``copy.copy(tree)``.
        after: the tree after it.
        moved: old path → new path, of the nodes that have another one.
    """
    renamed = moved or {}
    found: list[str] = []
    for path in before.paths():
        now = renamed.get(path, path)
        if now not in after or before[path].stale is not None:
            continue
        trained = getattr(after[now].source, "trained", None)
        # An adapter in memory alone, or one that never trained, fits any lineage when it is saved.
        if trained is None or getattr(trained, "untrained", False):
            continue
        if _ancestors(before, path) != _ancestors(after, now):
            found.append(now)
    found += _copies(before, after, set(renamed.values()))
    return [path for path in after.paths() if path in found]


def _copies(before: AdapterTree, after: AdapterTree, moved: Set[str]) -> list[str]:
    """The new nodes with files of a trained node, on other ancestors than that one has."""
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
            # Another tree's nodes come with their ancestors; nothing may stand above those.
            above = [each for each in after.lineage(path)[:-1] if each not in added]
            fits = not any(after[each].has_adapter for each in above)
        if not fits:
            found.append(path)
    return found


def _ancestors(tree: AdapterTree, path: str) -> list[tuple[object, Weight]]:
    """The adapters above a node, as what they came from, and their weights. Names don't count."""
    found: list[tuple[object, Weight]] = []
    for above in tree.lineage(path)[:-1]:
        node = tree[above]
        # Files before memory: an adapter that was only read since is the one that it was.
        if node.source is not None:
            found.append((id(node.source), node.weight))
        elif node.loaded is not None:
            found.append((id(node.loaded), node.weight))
    return found
