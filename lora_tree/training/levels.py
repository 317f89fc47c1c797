"""Training several levels of a tree at once: the mean that the loss is, and the decay of factors.

    all              decay 0        every row of the tree trains it
    ├── fr           decay 0.8 %    its factors shrink by that in a step, at the full learning rate
    │   └── legal    decay 2.4 %    few rows train it: the rest falls back on its parent

Two things let a tree do at least as well as one adapter that all rows train:

- **Every row weighs alike.** The loss is the mean over all tokens of a step. Were it the sum of the
  paths' own means, a shared node would get gradients several times as large, and a leaf with few
  rows in a batch would weigh as much as one with many.
- **Nodes shrink toward their parents.** A node's increment is what its rows add to its parent.
  Decay pulls it to zero, the more the deeper it is and the fewer rows it has: partial pooling.

`docs/comparison.md` has the measurements that these defaults come from. Where only one level
trains, each node learns as if it trained alone, without decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from ..errors import SpecError
from ..spec import at_depth
from ..tree import AdapterTree

__all__ = ["SHRINKAGE", "Over", "over_of", "several_levels", "weight_decays"]

Over = Literal["auto", "rows", "paths"]

SHRINKAGE = (0.0, 0.008, 0.024)
"""The part of a factor that decays in a step at the full learning rate, at depth 0, 1 and below."""


def several_levels(nodes: Iterable[str]) -> bool:
    """Return whether one of the nodes lies above another.

    >>> several_levels(["fr", "fr/legal"]), several_levels(["fr/legal", "de/legal"])
    (True, False)
    """
    names = set(nodes)
    for path in names:
        steps = path.split("/")
        if any("/".join(steps[:i]) in names for i in range(1, len(steps))):
            return True
    return False


def over_of(requested: Over, nodes: Iterable[str]) -> Literal["rows", "paths"]:
    """Return the unit over which the loss is averaged, for the nodes that train.

    Args:
        requested: "rows", "paths", or "auto": rows where several levels train, else paths.

    Raises:
        SpecError: it is another word.
    """
    if requested == "auto":
        return "rows" if several_levels(nodes) else "paths"
    if requested not in ("rows", "paths"):
        raise SpecError(f"loss must be auto, rows or paths, got {requested!r}")
    return requested


def weight_decays(
    tree: AdapterTree,
    nodes: Sequence[str],
    rates: Mapping[str, float],
    *,
    by_depth: Sequence[float] | None = None,
    of_node: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the weight decay of every node that trains, for AdamW.

    AdamW takes ``rate · weight_decay`` of a parameter away in a step. So the decay that shrinks a
    node by a given part is that part over its rate, and means the same at every rate.

    Args:
        tree: its defaults may have ``decay_by_depth``.
        nodes: the nodes that train.
        rates: node → its full learning rate.
        by_depth: the decay at depth 0, 1, …, the last one also below. None: as the tree's
            defaults say; if they say nothing, `SHRINKAGE` over several levels, and no decay over
            one.
        of_node: node → its own decay, which comes first.

    >>> tree = AdapterTree(); _ = tree.add("fr"); _ = tree.add("fr/legal")
    >>> weight_decays(tree, ["fr", "fr/legal"], {"fr": 8e-3, "fr/legal": 4e-3})
    {'fr': 0.0, 'fr/legal': 2.0}
    """
    depth_decays = by_depth if by_depth is not None else tree.defaults.decay_by_depth
    shrinks = several_levels(nodes)
    decays = {}
    for path in nodes:
        if of_node is not None and path in of_node:
            decays[path] = of_node[path]
        elif depth_decays is not None:
            decays[path] = at_depth(depth_decays, path)
        elif shrinks:
            decays[path] = at_depth(SHRINKAGE, path) / rates[path]
        else:
            decays[path] = 0.0
    return decays
