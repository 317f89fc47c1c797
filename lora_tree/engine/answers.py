"""The attributes that a `TreeModel` answers for its base, and those that it refuses.

One rule: an attribute that a `TreeModel` does not have is its base's, to read and to set. Trainers,
pipelines and loops ask a model for ``config``, ``generation_config``, ``get_input_embeddings``,
``dtype``, ``device``, … and the base knows.

The exceptions are names by which a caller would save, publish or change the base and believe
that this was the model. They raise an `AttributeError`, so that ``hasattr`` says no and a trainer
takes its other way; read by name they say what to do. Names with two underscores at both ends are
Python's own protocols, and never pass.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import StateError

__all__ = ["REFUSED", "RefusedAttribute", "base_attribute", "is_answered"]

_SAVES = (
    "it would write the base and none of its nodes: tree.save(folder); "
    "or model.base.{name} for the base alone"
)
_ADAPTERS = (
    "it would put other adapters into the base: add nodes to the tree, "
    "and choose one with model.activate(path)"
)
_RESIZES = (
    "it would exchange a weight under the adapters: model.detach(), change the base, "
    "and attach again"
)
_QUANTISED = "the base may be quantised, the factors that train are not: ask model.base.{name}"

REFUSED = {
    **dict.fromkeys(("save_pretrained", "push_to_hub"), _SAVES),
    **dict.fromkeys(
        (
            "active_adapter",
            "active_adapters",
            "add_adapter",
            "delete_adapter",
            "disable_adapters",
            "enable_adapters",
            "get_adapter_state_dict",
            "load_adapter",
            "merge_and_unload",
            "set_adapter",
        ),
        _ADAPTERS,
    ),
    **dict.fromkeys(
        ("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings"), _RESIZES
    ),
    "is_quantized": _QUANTISED,
}
"""Name → what to do instead."""


class RefusedAttribute(StateError, AttributeError):
    """An attribute of the base that the model refuses to answer in its name.

    Both a `StateError`, for callers of this library, and an `AttributeError`, for ``hasattr``.
    """


def is_answered(base: nn.Module | None, name: str) -> bool:
    """Return whether an attribute that a `TreeModel` does not have is answered by its base."""
    # Python looks protocols up on the class, and copy, pickle and torch would find the base's.
    is_protocol = name.startswith("__") and name.endswith("__")
    return base is not None and not is_protocol and name not in REFUSED and hasattr(base, name)


def base_attribute(base: nn.Module, name: str) -> Any:
    """Return the base's attribute.

    Raises:
        RefusedAttribute: it is one of those that do not pass.
        AttributeError: the base has none of that name.
    """
    if name in REFUSED and hasattr(base, name):
        raise RefusedAttribute(
            f"a TreeModel does not answer {name!r} for its {type(base).__name__}",
            REFUSED[name].format(name=name),
        )
    try:
        return getattr(base, name)
    except AttributeError as error:
        # torch's own text names the base's class alone, and the caller asked a TreeModel.
        raise AttributeError(f"neither TreeModel nor its base has {name!r}: {error}") from None
