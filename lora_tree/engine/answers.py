"""The attributes that a `TreeModel` answers for its base, and those that it refuses.

One rule: an attribute that a `TreeModel` does not have is its base's, to read and to set. Trainers,
pipelines and loops ask a model for ``config``, ``generation_config``, ``get_input_embeddings``,
``dtype``, ``device``, … and the base knows.

The exceptions are names by which a caller would save, publish or change the base in the belief that
it is the model. They raise an `AttributeError`, so that ``hasattr`` returns False and a trainer
falls back to code without them; the message says what to do instead. Names with two underscores at
both ends are Python's own protocols, and are never forwarded.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import StateError

__all__ = ["REFUSED", "AnswersForBase", "RefusedAttribute"]

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
_QUANTISED = (
    "the base may be quantised, the factors that train are not, and a trainer that believed it "
    "would round them: ask model.base.{name}"
)

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
    **dict.fromkeys(("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"), _QUANTISED),
}
"""Name → what to do instead."""


class RefusedAttribute(StateError, AttributeError):
    """The error for an attribute of the base that the model refuses to forward.

    Both a `StateError`, for callers of this library, and an `AttributeError`, for ``hasattr``.
    """


class AnswersForBase(nn.Module):
    """A module that answers for the one in its ``base``, to read and to set."""

    _answers = False
    """True: a missing attribute is looked up on the base. A subclass sets it at the end of its
    ``__init__``: before, a missing attribute is a mistake in there, which the base would hide.
    """

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base, if this object has none of that name.

        Raises:
            AttributeError: the base has none either, or it is one of the refused names (then it is
                a `StateError`, too).
        """
        # nn.Module keeps parameters, buffers and submodules outside of `__dict__`. So Python also
        # comes here for this model's own ones, and they have to be found before the base's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self._answering_base
            if base is None or _is_protocol(name):
                raise
        kind = type(self).__name__
        if name in REFUSED and hasattr(base, name):
            raise RefusedAttribute(
                f"a {kind} does not answer {name!r} for its {type(base).__name__}",
                REFUSED[name].format(name=name),
            )
        try:
            return getattr(base, name)
        except AttributeError as error:
            # torch's own text names the base's class alone, and the caller asked this object.
            raise AttributeError(f"neither {kind} nor its base has {name!r}: {error}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of this object; or the base's, if only the base has one of that name."""
        base = self._answering_base
        is_answered = base is not None and name not in REFUSED and not _is_protocol(name)
        if is_answered and not self._is_own(name) and hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _answering_base(self) -> nn.Module | None:
        """The base once `__init__` is over; None before, when every attribute is this object's."""
        # `__dict__` and not getattr: `__init__` may be so early that there are no `_modules` yet.
        return self._modules["base"] if "_answers" in self.__dict__ else None

    def _is_own(self, name: str) -> bool:
        held = self.__dict__, self._parameters, self._buffers, self._modules
        # The class is asked and not the object: hasattr(self, name) would run properties, and
        # through `__getattr__` it would find the base's attribute and take it for this object's.
        return hasattr(type(self), name) or any(name in of for of in held)


def _is_protocol(name: str) -> bool:
    # Python looks these up on the class, and copy, pickle and torch would find the base's.
    return name.startswith("__") and name.endswith("__")
