"""Refuse a run that could not train as asked, before it changes the model.

Each check here reads the tree, the rows and the settings, and writes nothing: a run that is refused
leaves no trace. The checks that compare a run with the checkpoint of an earlier one are in
`identity.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapter import Adapter
from ..errors import SpecError, listing
from ..model import TreeModel
from ..tree import AdapterTree
from ..weights import weight_at
from .forecast import why_not_fresh
from .preferences import check_references
from .rows import Row
from .settings import Settings

__all__ = [
    "check_drawable",
    "check_names",
    "check_preferences",
    "check_weights",
    "refuse_encoder",
]


def refuse_encoder(model: TreeModel) -> None:
    """Refuse a base with an encoder: a run trains models that continue their input.

    Raises:
        SpecError: names the base's class, and the trainer that can.
    """
    if getattr(getattr(model.base, "config", None), "is_encoder_decoder", False):
        raise SpecError(
            f"{type(model.base).__name__} has an encoder and a decoder; "
            "a run trains causal language models only",
            "train it with lora_tree.integrations.transformers.TreeTrainer "
            "and a collator for encoder-decoder models",
        )


def check_drawable(tree: AdapterTree, nodes: Sequence[str]) -> None:
    """Refuse new factors for nodes that replace tensors of the base.

    Raises:
        SpecError: names the node.
    """
    for node in nodes:
        reason = why_not_fresh(tree, node)
        if reason is not None:
            raise SpecError(
                f"{node}: {reason}", "train it as it is, or add a new node in its place"
            )


def check_names(settings: Settings, nodes: Sequence[str], tree: AdapterTree) -> None:
    """Refuse a rate or decay of a node that does not train, and a weight of an unknown path.

    Raises:
        SpecError: names the setting and the path.
    """
    known = {"lr_of": set(nodes), "decay_of": set(nodes), "weights": {"", *tree}}
    for what, names in known.items():
        for path in getattr(settings, what):
            if path not in names:
                raise SpecError(f"{what} names {path!r}; what trains: {listing(nodes)}")


def check_preferences(
    rows: Sequence[Row], nodes: Sequence[str], settings: Settings, tree: AdapterTree
) -> None:
    """Refuse preferences that would compare a node with anything but its frozen parent.

    Raises:
        SpecError: a parent trains too, or dropout is on.
    """
    check_references(rows, nodes, tree)
    if settings.dropout:
        raise SpecError(
            f"dropout is {settings.dropout:g}, and the rows are preferences: the reference has no "
            "dropout, so DPO would compare dropout masks",
            "leave dropout out (--dropout 0)",
        )


def check_weights(tree: AdapterTree, nodes: Sequence[str]) -> None:
    """Refuse a node of weight 0: no gradient would come back to it, and nothing would train.

    Raises:
        SpecError: names the node, and its modules if only some have weight 0.
    """
    for path in nodes:
        if tree[path].weight == 0:
            raise SpecError(
                f"{path} has weight 0, so no row can train it",
                f"tree.update({path!r}, weight=1.0), or weight: 1 in tree.yaml",
            )
        adapter = tree.adapter(path) or Adapter({})
        frozen = [name for name in adapter.modules if weight_at(tree[path].weight, name) == 0]
        if frozen:
            raise SpecError(
                f"{path} has weight 0 at {listing(frozen, most=2)}, so no row can train it there",
                f"give those modules another weight: tree.update({path!r}, weight=…)",
            )
