"""NodeGraph: the nodes of a tree by their paths, and the one order in which they come.

    ""                    the root: the bare base, without a `Node`
    ├── de                1
    └── fr                2     parents before children, children by name
        ├── fr/legal      3
        └── fr/medical    4

Law: the order depends on the names alone, never on the order in which nodes were added. Every
node's parent is there, and no two siblings differ only by case: in a saved tree paths are folders,
and many disks do not tell case apart.

The graph knows nothing of what a node holds. A change can be checked apart from making it, so that
the tree may ask its attached models in between.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import replace

import networkx as nx

from .errors import PathError, TreeError, listing, suggest_path
from .given import check_iterable
from .node import Node
from .node_names import check_path

__all__ = ["NodeGraph"]


class NodeGraph:
    """The nodes of one tree, and the root; `AdapterTree` has its public verbs."""

    def __init__(self) -> None:
        self._graph: nx.DiGraph[str] = nx.DiGraph()
        # With the root in the graph, a node at the top has a parent like any other, and walks need
        # no case of their own for it. It has no `Node`, so lookups leave it out.
        self._graph.add_node("")

    def copy(self) -> NodeGraph:
        """Return a graph of its own with the same nodes."""
        made = NodeGraph()
        made._graph = self._graph.copy()
        return made

    def frozen(self) -> nx.DiGraph[str]:
        """Return a copy as a frozen networkx graph, with each `Node` under ``node``."""
        copy: nx.DiGraph[str] = nx.freeze(self._graph.copy())
        return copy

    # ------------------------------------------------------------------ looking
    def __contains__(self, path: object) -> bool:
        return path in self._graph

    def __len__(self) -> int:
        return len(self._graph)

    def __getitem__(self, path: str) -> Node:
        self._known(path)
        if path == "":
            raise PathError("the root is the bare base and has no node")
        node: Node = self._graph.nodes[path]["node"]
        return node

    def get(self, path: str) -> Node | None:
        """Return the node of a path; None for the root, or if there is none."""
        node: Node | None = self._graph.nodes.get(path, {}).get("node")
        return node

    def paths(self, under: str = "") -> list[str]:
        """Return every path below ``under``, in order; raises `PathError` if it is not there."""
        self._known(under)
        found: list[str] = []
        # Reversed, because a stack gives back the last entry first and children come by name.
        stack = self.children(under)[::-1]
        while stack:
            path = stack.pop()
            found.append(path)
            stack.extend(self.children(path)[::-1])
        return found

    def children(self, path: str) -> list[str]:
        """Return the paths one step below, by name; raises `PathError` if it is not there."""
        self._known(path)
        # networkx gives children in the order in which they were added, and a sum in that order
        # would change its last bits when a saved tree is opened again.
        return sorted(self._graph.successors(path))

    def leaves(self) -> list[str]:
        """Return the paths without children, in order."""
        return [path for path in self.paths() if not self._graph.out_degree(path)]

    def parent(self, path: str) -> str:
        """Return the path one step up; raises `PathError` if ``path`` is not there."""
        self._known(path)
        return path.rpartition("/")[0]

    def lineage(self, path: str) -> list[str]:
        """Return the nodes from the root down; raises `PathError` if ``path`` is not there."""
        self._known(path)
        # A node's names were checked when it came into the tree, so its path is only taken apart.
        names = path.split("/") if path else []
        return ["/".join(names[: i + 1]) for i in range(len(names))]

    def common_ancestor(self, paths: Iterable[str]) -> str:
        """Return the deepest node on all lineages; raises `PathError` if a path is not there."""
        lineages = [self.lineage(path) for path in paths]
        shared = ""
        # zip ends with the shortest lineage: no common ancestor lies deeper than any of the paths.
        for level in zip(*lineages, strict=False):
            if len(set(level)) > 1:
                break
            shared = level[0]
        return shared

    def matching(self, patterns: Iterable[str]) -> list[str]:
        """Return the nodes that paths or patterns like ``fr/*`` name, in order.

        Raises:
            PathError: one matches no node.
            SpecError: they are no list.
        """
        if isinstance(patterns, str):
            # Its letters would be taken for patterns, one by one.
            raise PathError(f"expected a list of paths or patterns, got the string {patterns!r}")
        check_iterable(patterns, "expected a list of paths or patterns")
        paths = self.paths()
        chosen: set[str] = set()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise PathError(
                    f"a path or pattern is a string like 'fr/*', got {pattern!r:.80}",
                    "several are given one by one: trainable('fr', 'de')",
                )
            # A node that has the very name comes first, then the pattern is tried.
            is_node = self.get(pattern) is not None
            hits = {pattern} if is_node else set(fnmatch.filter(paths, pattern))
            if not hits:
                raise PathError(f"{pattern!r} matches no node{suggest_path(pattern, paths)}")
            chosen |= hits
        return [path for path in paths if path in chosen]

    # ------------------------------------------------------------------ checking a change
    def check_new(self, path: str) -> None:
        """Check that a node may come into the tree.

        Raises:
            PathError: the name is not valid, or the node above is missing.
            TreeError: the node exists, or one that differs only by case does.
        """
        names = check_path(path)
        if not names:
            raise PathError("the root is the bare base; add nodes below it, like 'fr'")
        self._check_place(path, "/".join(names[:-1]))

    def check_move(self, path: str, to: str) -> None:
        """Check that a node may have another path; its own one is no change, and allowed.

        Raises:
            PathError: ``path``, or the node above ``to``, is not there; or ``to`` is not valid.
            TreeError: ``to`` exists or lies below ``path``.
        """
        self[path]  # raises if it is not there
        names = check_path(to)
        if not names:
            raise PathError("the root is the bare base and can't be moved to")
        if to == path:
            return
        # With the slashes, or "french" would be taken for a node below "fr".
        if (to + "/").startswith(path + "/"):
            raise TreeError(f"{path} can't be moved below itself, to {to}")
        # A node is not in its own way, so that a name may change in its case alone.
        self._check_place(to, "/".join(names[:-1]), but=path)

    # ------------------------------------------------------------------ changing
    def put(self, node: Node) -> None:
        """Hold a node, in place of the one that has its path; its parent is there."""
        # networkx adds a missing end of an edge by itself, and that node would have no `Node`. So
        # callers put parents before children.
        self._graph.add_node(node.path, node=node)
        self._graph.add_edge(node.path.rpartition("/")[0], node.path)

    def remove(self, paths: Iterable[str]) -> None:
        """Take nodes out; every node below one of them is given as well."""
        self._graph.remove_nodes_from(paths)

    def move(self, path: str, to: str) -> None:
        """Give a node another path, and those below it with it; raises as `check_move`."""
        self.check_move(path, to)
        # Read before they leave the graph, which drops their values. Parents stand before children,
        # and go back in that order: see `put`.
        nodes = [self[p] for p in (path, *self.paths(path))]
        self.remove([node.path for node in nodes])
        for node in nodes:
            self.put(replace(node, path=to + node.path[len(path) :]))

    # ------------------------------------------------------------------ private
    def _known(self, path: str) -> None:
        if not isinstance(path, str):
            raise PathError(f"a path is a string like 'fr/legal', got {path!r}")
        if path not in self._graph:
            raise PathError(
                f"no node {path!r} in the tree{suggest_path(path, self._graph)}",
                f"the tree has: {listing(self.paths()) or 'no nodes yet'}",
            )

    def _check_place(self, path: str, parent: str, but: str | None = None) -> None:
        """Check that a path has a parent in the tree, and no sibling of its name.

        Args:
            path: of the node that comes.
            parent: of ``path``.
            but: a sibling that is about to leave.

        Raises:
            PathError: the parent is missing; says how to make it.
            TreeError: a sibling has the name, or one that differs only by case.
        """
        # The parent first: for one that is not there networkx would raise an error of its own.
        if parent not in self._graph:
            raise PathError(
                f"no node {parent!r} in the tree, below which {path} would lie"
                f"{suggest_path(parent, self._graph)}",
                f"add it first, without an adapter: tree.add({parent!r}, group=True), "
                f"or lora-tree add FOLDER {parent} --group",
            )
        folded = path.casefold()
        for sibling in self._graph.successors(parent):
            if sibling != but and sibling.casefold() == folded:
                detail = f"differs from {sibling} only by case"
                if sibling == path:
                    detail = "exists already"
                raise TreeError(f"{path} {detail}", "remove or rename the other one first")
