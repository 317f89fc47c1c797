"""Whether a tree fits a base, and its nodes each other, asked of shapes alone.

No weight is read, and the base may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .adapter import Adapter
from .errors import LoraTreeError, ShapeMismatch
from .lowrank import LowRank, same_place
from .patterns import Patterns
from .sites import find_site
from .sites.targets import patterns_of_a_tree, target_names
from .tree import AdapterTree

__all__ = ["clashes", "misfits"]


def misfits(tree: AdapterTree, base: nn.Module) -> list[tuple[str, str]]:
    """Everything in a tree that does not fit a base: (node, what, with the node's name before it).

    Args:
        tree: of adapters that are not in memory only the headers are read.
        base: its modules are asked for kinds and shapes; ``with torch.device("meta")`` makes one of any size at once.

    >>> tree = AdapterTree(defaults=dict(target_modules=["1"]))
    >>> _ = tree.add("fr")
    >>> misfits(tree, nn.Sequential(nn.Linear(4, 3)))
    [('fr', "fr: target '1' matches nothing in the base\\n  the last parts of its names: none")]
    """
    patterns = patterns_of_a_tree()
    found = []
    for path in tree.paths():
        for error in _misfits(tree, path, base, patterns):
            found.append((path, f"{path}: {error}"))
    return found


def _misfits(tree: AdapterTree, path: str, base: nn.Module, patterns: Patterns) -> Iterator[LoraTreeError]:
    node = tree[path]
    try:
        adapter = tree.outline(path)
        if adapter is None and node.fresh is not None:
            for name in target_names(base, node.fresh.over(tree.defaults), patterns):
                yield from _unfit(base, name)
    except LoraTreeError as error:
        yield error
        return
    for name, value in adapter.modules.items() if adapter is not None else ():
        yield from _unfit(base, name, value)


def _unfit(base: nn.Module, name: str, value: LowRank | None = None) -> Iterator[LoraTreeError]:
    try:
        site = find_site(base, name)
        if value is not None:
            site.check_shape(value)
    except LoraTreeError as error:
        yield error


def clashes(tree: AdapterTree) -> list[tuple[str, str]]:
    """Every module in which a node does not add up with the nearest node above it that changes the same: (node, what).

    Raises:
        FormatError: the files of a node are gone or broken.

    >>> import torch
    >>> tree = AdapterTree()
    >>> for path, into in (("fr", 5), ("fr/legal", 6)):
    ...     q_proj = LowRank(torch.ones(1, into), torch.ones(4, 1))
    ...     _ = tree.add(path, adapter=Adapter({"q_proj": q_proj}))
    >>> clashes(tree)
    [('fr/legal', 'fr/legal: q_proj: (4, 6) (linear) here and (4, 5) (linear) in fr do not add up')]
    """
    outlines = {path: outline for path in tree.paths() if (outline := tree.outline(path)) is not None}
    return [(path, text) for path in outlines for text in _clashes(tree, path, outlines)]


def _clashes(tree: AdapterTree, path: str, outlines: dict[str, Adapter]) -> Iterator[str]:
    lineage = [above for above in tree.lineage(path) if above in outlines]
    certain = {m: o for n in lineage for m, o in outlines[n].nesting.items() if m not in outlines[n].assumed}
    mine, *above = ((n, outlines[n].renested(certain).modules) for n in reversed(lineage))  # as `combine` adds them up
    for module, value in mine[1].items():
        theirs = next(((n, modules[module]) for n, modules in above if module in modules), None)
        if theirs is None:
            continue
        try:
            same_place(value, theirs[1])
        except ShapeMismatch:
            yield (
                f"{path}: {module}: {value.shape} ({value.layout}) here and "
                f"{theirs[1].shape} ({theirs[1].layout}) in {theirs[0]} do not add up"
            )
