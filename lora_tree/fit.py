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
from .renaming import Renaming
from .sites import find_site
from .sites.targets import patterns_of_a_tree, target_names
from .spelling import spelled_twice
from .tree import AdapterTree

__all__ = ["clashes", "misfits"]


def misfits(tree: AdapterTree, base: nn.Module) -> list[tuple[str, str]]:
    """Everything in a tree that does not fit a base: (node, what, with the node's name before it).

    Args:
        tree: of adapters that are not in memory only the headers are read.
        base: its modules are asked for kinds and shapes; ``with torch.device("meta")`` makes one of
            any size at once.

    >>> tree = AdapterTree(defaults=dict(target_modules=["1"]))
    >>> _ = tree.add("fr")
    >>> misfits(tree, nn.Sequential(nn.Linear(4, 3)))
    [('fr', "fr: target '1' matches nothing in the base\\n  the last parts of its names: none")]
    """
    patterns, renaming = patterns_of_a_tree(), Renaming(base)
    found = []
    for path in tree.paths():
        for error in _misfits(tree, path, base, patterns, renaming):
            found.append((path, f"{path}: {error}"))
    return found


def _misfits(
    tree: AdapterTree, path: str, base: nn.Module, patterns: Patterns, renaming: Renaming
) -> Iterator[LoraTreeError]:
    node = tree[path]
    try:
        adapter = tree.outline(path)
        if adapter is not None:
            adapter = renaming.bound(adapter)
        elif node.fresh is not None:
            spec = tree.defaults.complete(node.fresh, path)
            for name in target_names(base, spec, patterns):
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


def clashes(tree: AdapterTree, base: nn.Module | None = None) -> list[tuple[str, str]]:
    """Every module in which a node does not add up with the nearest node above it that changes the
    same: (node, what).

    Two names that look like one module's, as an earlier transformers named it and as today's does,
    are told as well.

    Args:
        base: says how the modules are named today, so that two names of one module are one; on the
            meta device as well.

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
    outlines = {}
    renaming = None if base is None else Renaming(base)
    for path in tree.paths():
        outline = tree.outline(path)
        if outline is not None:
            outlines[path] = outline if renaming is None else _bound(renaming, outline)
    found = []
    for path in outlines:
        found += [(path, text) for text in _clashes(tree, path, outlines)]
        if base is None:
            found += [(path, text) for text in _two_names(tree, path, outlines)]
    return found


def _bound(renaming: Renaming, outline: Adapter) -> Adapter:
    """The outline in the base's names; as it is where it does not fit, which `misfits` tells."""
    try:
        return renaming.bound(outline)
    except LoraTreeError:
        return outline


def _two_names(tree: AdapterTree, path: str, outlines: dict[str, Adapter]) -> Iterator[str]:
    """One module under two names, of which this node has at least one; told once, where the second
    comes in.
    """
    lineage = [above for above in tree.lineage(path) if above in outlines]
    names = [name for above in lineage for name in outlines[above].modules]
    twice = spelled_twice(names)
    if twice is None:
        return
    mine = [name for name in twice if name in outlines[path].modules]
    if not mine:
        return  # told of a node above
    other = twice[0] if mine[0] == twice[1] else twice[1]
    whose = next((above for above in reversed(lineage) if other in outlines[above].modules), path)
    yield (
        f"{path}: {mine[0]} here and {other} in {whose} look like two names of one module: "
        "a base says which counts (lora-tree check --base FOLDER_OR_ID)"
    )


def _clashes(tree: AdapterTree, path: str, outlines: dict[str, Adapter]) -> Iterator[str]:
    lineage = [above for above in tree.lineage(path) if above in outlines]
    certain = {
        m: o
        for n in lineage
        for m, o in outlines[n].nesting.items()
        if m not in outlines[n].assumed
    }
    mine, *above = (
        (n, outlines[n].renested(certain).modules) for n in reversed(lineage)
    )  # as `combine` adds them up
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
