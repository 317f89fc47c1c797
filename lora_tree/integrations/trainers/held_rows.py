"""Rows of a Trainer's data that are held back, and the verdicts on leaves that they give.

    train_dataset   fr/legal × 40, de × 10     ─→  38 + 10 rows train, 2 of fr/legal judge
    after training  fr/legal at 0 and at 1     ─→  worse than fr: 0.25, 0.5 and 0.75 too; the best
                                                   of them stays

The rule is that of `lora_tree.runs.held_back`. The rows go through the Trainer's own evaluation, so
its collator, its devices and its ranks are those of the training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import Subset

from ...blend import Blend
from ...errors import SpecError, plural
from ...runs.held_back import Verdict, at_part, judge, places_held_back
from ...training.diverged import BASE_LABEL
from ...tree import AdapterTree
from .row_paths import paths_of

__all__ = ["HELD_BACK", "HeldRows", "Losses", "held_rows"]

HELD_BACK = 0.05
"""The share that is held back by default where several levels train."""

Losses = Callable[[Any, Mapping[str, Blend]], Mapping[str, float]]
"""(rows, path → the blend that serves its rows) → the loss of each path."""

# Below transformers' own logger, whose level and handler the user sets.
_log = logging.getLogger("transformers.lora_tree")


@dataclass(frozen=True)
class HeldRows:
    """Rows that are not trained on.

    Args:
        data: the data set that contains them.
        places: path → the indices of its rows in the data set.
    """

    data: Any
    places: Mapping[str, Sequence[int]]

    def verdicts(self, tree: AdapterTree, nodes: Sequence[str], losses: Losses) -> list[Verdict]:
        """Give every leaf that does not beat its parent the best smaller weight, and log that.

        Args:
            tree: its weights are changed.
            nodes: the nodes that trained.
            losses: measures rows; if there are several ranks, each has to call it.
        """

        def measure(part: float, leaves: Sequence[str]) -> Mapping[str, float]:
            places = [place for leaf in leaves for place in self.places[leaf]]
            return losses(_rows(self.data, places), {leaf: at_part(leaf, part) for leaf in leaves})

        counts = {path: len(places) for path, places in self.places.items()}
        verdicts = judge(tree, nodes, counts, measure)
        for verdict in verdicts:
            if verdict.is_reweighed:
                # `update` refuses nodes that train, and a Trainer's nodes still do. A new weight is
                # safe here: no path is active, and the next batch makes a new route.
                tree.replace(replace(tree[verdict.node], weight=verdict.weight))
            # A changed weight is logged as a warning, because the user did not ask for it.
            _log.log(logging.INFO if verdict.beats_parent else logging.WARNING, str(verdict))
        return verdicts


def held_rows(
    data: Any, column: str, tree: AdapterTree, share: float | None
) -> tuple[Any, HeldRows | None]:
    """Split a data set into the rows to train on, and those to judge the leaves.

    Args:
        data: of the Trainer; a ``datasets.Dataset``, or anything with rows in order.
        column: the column that holds a row's path.
        tree: of the paths.
        share: of each path's rows, rounded down; None: `HELD_BACK`, where the data have an
            order, else nothing.

    Returns:
        the data and None if no row is held back.

    Raises:
        SpecError: the share is not from 0 to below 1, or it was asked of data without an order.
        SpecError: a row has no path.
        PathError: the tree has no such path.
    """
    is_requested = share is not None
    share = HELD_BACK if share is None else share
    if not 0 <= share < 1:
        raise SpecError(f"hold_back must be from 0 to below 1, got {share!r}")
    if share == 0 or data is None:
        return data, None
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        if is_requested:
            raise SpecError(
                f"hold_back={share}: a {type(data).__name__} has no order to take rows from",
                "give a data set with a length, or leave hold_back out",
            )
        return data, None
    paths = paths_of(data, column, tree)
    held = places_held_back(paths, share)
    if not held:
        return data, None
    places: dict[str, list[int]] = {}
    for place in held:
        places.setdefault(paths[place], []).append(place)
    left_out = set(held)
    kept = [place for place in range(len(paths)) if place not in left_out]
    counts_text = ", ".join(
        f"{len(own)} of {path or BASE_LABEL}" for path, own in sorted(places.items())
    )
    _log.info("held back: %s, to judge the leaves: %s", plural(len(held), "row"), counts_text)
    return _rows(data, kept), HeldRows(data, places)


def _rows(data: Any, places: Sequence[int]) -> Any:
    """Return some rows of a data set, of the same kind if it has a ``select``."""
    # A datasets.Dataset: the Trainer knows its columns, and a Subset would hide them.
    if hasattr(data, "select"):
        return data.select(places)
    return Subset(data, places)
