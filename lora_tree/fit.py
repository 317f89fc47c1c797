"""Whether a tree fits a base, asked of shapes alone: no weight is read, and the base may be on the meta device."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .errors import LoraTreeError
from .sites import find_site
from .sites.targets import target_names
from .tree import AdapterTree

__all__ = ["misfits"]


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
    return [(path, f"{path}: {error}") for path in tree.paths() for error in _misfits(tree, path, base)]


def _misfits(tree: AdapterTree, path: str, base: nn.Module) -> Iterator[LoraTreeError]:
    node = tree[path]
    try:
        adapter = tree.outline(path)
        if adapter is None and node.fresh is not None:
            target_names(base, node.fresh.over(tree.defaults))
    except LoraTreeError as error:
        yield error
        return
    for name, value in adapter.modules.items() if adapter is not None else ():
        try:
            find_site(base, name).check_shape(value)
        except LoraTreeError as error:
            yield error
