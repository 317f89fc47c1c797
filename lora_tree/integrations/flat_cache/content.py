"""The content of a flattened path: a hash that names it before it is made.

    fr ── hash of its files, coefficient 1.0 ──┐
    fr/legal ── hash, coefficient 0.8 ─────────┼─→ 1f0c…  the folder's name
    the form: rank and error bound ────────────┘

Law: two paths with the same content give the same adapter, bit for bit. A changed node, or another
form, gives another content. No weights are read to compute it if the lock has the files' hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ...blend import Blend, parse_blend
from ...errors import FolderError, FormatError, LoraTreeError, SpecError, listing
from ...folder import Problem
from ...folder.adapters.source import FolderSource
from ...folder.problem import HARMLESS
from ...tree import AdapterTree
from ...weights import weight_digest

__all__ = ["Contents", "FlatContent", "FlatForm", "is_blend", "lineages"]

VERSION = "lora_tree flattened 2"


@dataclass(frozen=True)
class FlatForm:
    """The form into which paths are flattened.

    Args:
        max_rank: the engine's; a lineage of a higher rank is recompressed to it.
        max_error: refuse a path whose recompression loses more than this in any module.
        base: a folder with the base's weights, to compare with tensors of the base that an adapter
            carries.
    """

    max_rank: int
    max_error: float | None = None
    base: str | None = None


@dataclass(frozen=True)
class FlatContent:
    """A path as the tree is now.

    Args:
        name: the hash that names it.
        stale: the lock's texts about nodes of its lineages that are stale.
        nodes: each node of its lineages with an adapter → the hash of its files.
    """

    name: str
    stale: tuple[str, ...]
    nodes: Mapping[str, str]


class Contents:
    """The contents of paths in one form. Hashes of files are remembered until the files change.

    Args:
        form: how paths are flattened.
    """

    def __init__(self, form: FlatForm) -> None:
        self._form = form
        # folder of a node → (its files' stamps, their hash)
        self._hashes: dict[str, tuple[object, str]] = {}

    def of(self, tree: AdapterTree, problems: list[Problem], path: Blend) -> FlatContent:
        """Return the content of a path as the tree is now.

        Raises:
            PathError: there is no such path.
            SpecError: the blend makes no sense, or a node of its lineages is in memory alone.
            FolderError, FormatError: a node of its lineages is broken or differs from the lock, or
                none of them has an adapter.
        """
        on_the_way = _on_the_way(path)
        own_problems = [problem for problem in problems if problem.node in on_the_way]
        broken = [str(problem) for problem in own_problems if problem.kind not in HARMLESS]
        if broken:
            raise FolderError(listing(broken, most=3))
        parts, nodes = [], {}
        for node, coefficient in tree.coefficients(path).items():
            if tree[node].has_adapter:
                nodes[node] = self._hash(tree, node)
                # The digest writes floats in hexadecimal, which keeps every bit.
                parts.append((nodes[node], weight_digest(coefficient)))
        if not parts:
            raise FormatError(
                "there is nothing to serve: no node on the path has an adapter",
                "request the base itself",
            )
        digest_input = json.dumps([VERSION, parts, self._form.max_rank, self._form.max_error])
        stale = tuple(problem.text for problem in own_problems if problem.kind == "stale")
        return FlatContent(hashlib.sha256(digest_input.encode()).hexdigest()[:32], stale, nodes)

    def has_content(
        self, content: str, tree: AdapterTree, problems: list[Problem], path: str
    ) -> bool:
        """Tell whether a path still has this content."""
        try:
            return self.of(tree, problems, path).name == content
        except LoraTreeError:
            return False

    def _hash(self, tree: AdapterTree, node: str) -> str:
        source = tree[node].source
        if not isinstance(source, FolderSource):
            raise SpecError(f"{node}: its adapter is only in memory", "save the tree first")
        files = source.files()
        if source.content is not None:
            return source.unchanged(files)  # the lock's hash, if the files are still those
        # Without a lock the files are hashed, which reads them whole: once for each change.
        stamps = sorted(files.stamps.items())
        known = self._hashes.get(source.folder)
        if known is None or known[0] != stamps:
            known = self._hashes[source.folder] = stamps, source.unchanged(files)
        return known[1]


def is_blend(name: str) -> bool:
    """Tell whether a name in its one spelling is a blend."""
    return ":" in name or "+" in name


def lineages(tree: AdapterTree, path: Blend) -> AdapterTree:
    """Return a tree of only the nodes on a path's lineages.

    Adapters that are read for them are freed with that tree, and no other node can fail the
    request.
    """
    on_the_way = _on_the_way(path)
    nodes = [tree[node] for node in tree.paths() if node in on_the_way]
    return AdapterTree.from_nodes(nodes, base=tree.base, home=tree.home)


def _on_the_way(path: Blend) -> set[str]:
    """Return the nodes from the root to each path, whether they are in a tree or not."""
    found: set[str] = set()
    for one in parse_blend(path):
        names = one.split("/")
        for depth in range(1, len(names) + 1):
            found.add("/".join(names[:depth]))
    return found
