"""Two names that look like one module's, where no base is at hand to tell.

    language_model.model.layers.0.mlp.up_proj       before transformers 4.52
    model.language_model.layers.0.mlp.up_proj       today
    layers.0.mlp.up_proj                            an adapter of the model without its head
    model.layers.0.block_sparse_moe.experts.3.w1    a Linear for each expert
    model.layers.0.mlp.experts.gate_up_proj         one parameter for all of them

A sum that holds a module twice, once under each name, is loaded by PEFT or transformers with one of the
two missing. So such a sum is not made without a base: a base says which name counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

__all__ = ["spelled_twice"]

_MOVED = {"model", "language_model"}
_RENAMED = {"block_sparse_moe": "mlp"}
_OF_AN_EXPERT = re.compile(r"(?P<holder>.*\bexperts)\.[0-9]+\.[^.]+\Z")
_OF_ALL_EXPERTS = re.compile(r"(?P<holder>.*\bexperts)\.[^.]+\Z")


def spelled_twice(
    names: Iterable[str], has: Callable[[str], bool] = lambda name: False
) -> tuple[str, str] | None:
    """The first two names that look like two spellings of one module; None where none do.

    Args:
        names: of modules and raw parameters.
        has: whether a base is known to have one of that name; two that it has are two modules.

    >>> spelled_twice(["model.layers.0.q_proj", "model.language_model.layers.0.q_proj"])
    ('model.language_model.layers.0.q_proj', 'model.layers.0.q_proj')
    >>> spelled_twice(["vision_tower.layers.0.q_proj", "model.language_model.layers.0.q_proj"])
    >>> spelled_twice(["mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.experts.down_proj"])
    ('mlp.experts.0.up_proj', 'mlp.experts.down_proj')
    """
    known: dict[str, tuple[str, str]] = {}
    for name in sorted(names):
        place, spelling = _place(name)
        other, spelled = known.setdefault(place, (name, spelling))
        if spelled != spelling and not (has(other) and has(name)):
            return other, name
    return None


def _place(name: str) -> tuple[str, str]:
    """Return what two spellings of a module have in common, and what tells them apart."""
    one = _OF_AN_EXPERT.match(name)
    every = _OF_ALL_EXPERTS.match(name)
    if one is not None:
        return _common(one["holder"]), f"{one['holder']}.0"
    if every is not None:
        return _common(every["holder"]), every["holder"]
    return _common(name), name


def _common(name: str) -> str:
    """The name without the parts around its layers that have moved."""
    parts = name.split(".")
    start = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    head = [part for part in parts[:start] if part not in _MOVED]
    rest = [_RENAMED.get(part, part) for part in parts[start:]]
    return ".".join([*head, *rest])
