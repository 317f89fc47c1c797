"""Find the nodes that do not fit a base, or do not fit each other, by their shapes alone.

No weight is read, and the base may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from .adapter import Adapter
from .errors import LoraTreeError, ShapeMismatch
from .lowrank import LowRank, same_place
from .nesting import Nesting
from .override import counted_modules
from .patterns import Patterns
from .renaming import Renaming
from .sites import find_site, find_tensor_site
from .sites.targets import patterns_of_a_tree, target_names
from .spelling import spelled_twice
from .tree import AdapterTree

__all__ = ["clashes", "dropped", "misfits"]


def misfits(tree: AdapterTree, base: nn.Module) -> list[tuple[str, str]]:
    """Return everything in a tree that does not fit a base.

    Args:
        tree: an adapter that is not in memory is judged by its files' headers.
        base: only kinds and shapes of its modules are used; ``with torch.device("meta")`` makes a
            base of any size at once.

    >>> tree = AdapterTree(defaults=dict(target_modules=["1"]))
    >>> _ = tree.add("fr")
    >>> misfits(tree, nn.Sequential(nn.Linear(4, 3)))
    [('fr', "fr: target '1' matches nothing in the base\\n  the last parts of its names: none")]
    """
    # One budget of work for the patterns of all nodes.
    patterns, renaming = patterns_of_a_tree(), Renaming(base)
    misfitting = []
    for path in tree.paths():
        for error in _misfits(tree, path, base, patterns, renaming):
            misfitting.append((path, f"{path}: {error}"))
    return misfitting


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
                yield from _fit_errors(base, name)
    except LoraTreeError as error:
        yield error
        return
    if adapter is None:
        return  # a group, or a fresh node, which was checked above
    for name, value in adapter.modules.items():
        yield from _fit_errors(base, name, value)
    for tensor, override in adapter.overrides.items():
        try:
            site, attribute = find_tensor_site(base, tensor)
            site.check_override_shape(attribute, override)
        except LoraTreeError as error:
            yield error


def _fit_errors(
    base: nn.Module, name: str, value: LowRank | None = None
) -> Iterator[LoraTreeError]:
    try:
        site = find_site(base, name)
        if value is not None:
            site.check_shape(value)
    except LoraTreeError as error:
        yield error


def dropped(tree: AdapterTree) -> list[str]:
    """Return a line for each increment that an override below it drops, from headers alone.

    This is no fault, since an override is meant to replace. But such an increment counts only on
    paths without the override.

    >>> import torch
    >>> from lora_tree import Override
    >>> tree = AdapterTree()
    >>> score = LowRank(torch.ones(1, 4), torch.ones(2, 1))
    >>> _ = tree.add("fr", adapter=Adapter({"score": score}))
    >>> head = {"score.weight": Override(torch.ones(2, 4))}
    >>> _ = tree.add("fr/legal", adapter=Adapter({}, overrides=head))
    >>> dropped(tree)
    ['fr: score: fr/legal overrides score.weight']
    """
    outlines = {}
    for path in tree.paths():
        outline = tree.outline(path)
        if outline is not None:
            outlines[path] = outline
    lines: dict[str, None] = {}
    for path, own in outlines.items():
        effective = {tensor: ((path, override),) for tensor, override in own.overrides.items()}
        for above in tree.lineage(path)[:-1]:
            if effective and above in outlines:
                _, dropped_lines = counted_modules(above, outlines[above].modules, effective)
                lines |= dict.fromkeys(dropped_lines)
    return list(lines)


def clashes(tree: AdapterTree, base: nn.Module | None = None) -> list[tuple[str, str]]:
    """Return every module in which a node does not add up with a node above it.

    A module is compared with the nearest node above that changes it. Without a base, two names that
    look like an old and a new name of one module (transformers renames some) are listed as well.

    Args:
        base: if given, its module names replace those of the adapters first, so that an old and a
            new name of one module are the same; it may be on the meta device.

    Returns:
        (node, error text) for each.

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
    clashing = []
    for path in outlines:
        # The outlines from the root down to this node. A group has none.
        above = {node: outlines[node] for node in tree.lineage(path) if node in outlines}
        for text in _clashes(path, above):
            clashing.append((path, text))
        # With a base the outlines have today's names, so two names are two modules. An outline that
        # does not fit the base is listed by `misfits`.
        if base is None:
            for text in _two_names(path, above):
                clashing.append((path, text))
    return clashing


def _bound(renaming: Renaming, outline: Adapter) -> Adapter:
    """Return the outline in the base's names; unchanged if it does not fit (see `misfits`)."""
    try:
        return renaming.bound(outline)
    except LoraTreeError:
        return outline


def _two_names(path: str, lineage: Mapping[str, Adapter]) -> Iterator[str]:
    """Yield an error if a lineage names one module in two ways, one of them at this node.

    Args:
        path: the last node of the lineage.
        lineage: node → its outline, from the root down.
    """
    names: list[str] = []
    for outline in lineage.values():
        names += outline.modules
    twice = spelled_twice(names)
    if twice is None:
        return
    own_names = [name for name in twice if name in lineage[path].modules]
    if not own_names:
        return  # both names stand further up, and were listed there
    other = twice[0] if own_names[0] == twice[1] else twice[1]
    whose = path
    for node, outline in lineage.items():
        if other in outline.modules:
            whose = node  # the nearest one counts, and comes last
    yield (
        f"{path}: {own_names[0]} here and {other} in {whose} look like two names of one module: "
        "a base says which counts (lora-tree check --base FOLDER_OR_ID)"
    )


def _clashes(path: str, lineage: Mapping[str, Adapter]) -> Iterator[str]:
    """Yield an error for each module of a node that does not add up with the nearest one above.

    Args:
        path: the last node of the lineage.
        lineage: node → its outline, from the root down.
    """
    # A file may not say in which order the base registers a module's raw parameters. `combine`
    # takes the order from a node on the lineage that does say, and so does this.
    certain: dict[str, tuple[str, ...]] = {}
    for outline in lineage.values():
        certain |= Nesting(outline.nesting, outline.assumed).certain
    modules = {node: outline.renested(certain).modules for node, outline in lineage.items()}
    for module, value in modules[path].items():
        nearest = None
        for node in modules:
            if node != path and module in modules[node]:
                nearest = node  # from the root down, so the nearest comes last
        if nearest is None:
            continue
        inherited = modules[nearest][module]
        try:
            same_place(value, inherited)
        except ShapeMismatch:
            yield (
                f"{path}: {module}: {value.shape} ({value.layout}) here and "
                f"{inherited.shape} ({inherited.layout}) in {nearest} do not add up"
            )
