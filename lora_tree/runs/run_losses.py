"""RunLosses: the first and the last loss of every path of a run, and those of its nodes.

    step     fr/legal  de        first                      last
    1        2.0       ·         fr/legal 2.0               fr/legal 2.0
    2        1.5       3.0       fr/legal 2.0, de 3.0       fr/legal 1.5, de 3.0

A path may have no row in the first step, so each has a first loss of its own. The loss of a node is
the mean over the paths that go through it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..tree import AdapterTree

__all__ = ["RunLosses", "read_losses"]


class RunLosses:
    """The losses of one run so far.

    Attributes:
        first, last: path → its loss in the first and in the last step that had rows of it.
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def note(self, losses: Mapping[str, float]) -> None:
        """Add the losses of a step, by path."""
        self.first = {**losses, **self.first}
        self.last.update(losses)

    def of_nodes(self, tree: AdapterTree, nodes: Iterable[str]) -> dict[str, tuple[float, float]]:
        """Return node → (first, last); a node is left out if no path with a loss goes through it.

        >>> tree, losses = AdapterTree(), RunLosses()
        >>> for path in ("fr", "fr/legal"): _ = tree.add(path)
        >>> losses.note({"fr": 3.0, "fr/legal": 2.0}); losses.note({"fr/legal": 1.0})
        >>> losses.of_nodes(tree, tree.paths())
        {'fr': (2.5, 2.0), 'fr/legal': (2.0, 1.0)}
        """
        nodes = list(nodes)
        first = _means(tree, nodes, self.first)
        last = _means(tree, nodes, self.last)
        return {node: (first[node], last[node]) for node in first}

    # ------------------------------------------------------------------ in a checkpoint
    def plain(self) -> dict[str, dict[str, float]]:
        """Return the losses as plain data, for run.json."""
        return {"first": self.first, "last": self.last}

    def resume(self, about: Mapping[str, Any], known: set[str]) -> None:
        """Go on from the losses in a checkpoint's run.json, those of ``known`` paths alone."""
        self.first.update(read_losses(about, "first", known))
        self.last.update(read_losses(about, "last", known))


def read_losses(about: Mapping[str, Any], which: str, known: set[str]) -> dict[str, float]:
    """Return the losses in a run.json: ``which`` is ``first`` or ``last``.

    Anything in the file that is no loss of a known path is ignored: the losses are only shown, and
    nothing is computed from them.
    """
    losses = about.get("losses")
    recorded = losses.get(which) if isinstance(losses, Mapping) else None
    if not isinstance(recorded, Mapping):
        return {}
    found = {}
    for path, loss in recorded.items():
        if path in known and isinstance(loss, (int, float)):
            found[path] = float(loss)
    return found


def _means(
    tree: AdapterTree, nodes: Iterable[str], by_path: Mapping[str, float]
) -> dict[str, float]:
    """Return node → the mean loss of the paths that go through it, if any has a loss."""
    found = {}
    for node in nodes:
        own_losses = [loss for path, loss in by_path.items() if path and node in tree.lineage(path)]
        if own_losses:
            found[node] = sum(own_losses) / len(own_losses)
    return found
