"""Find two names that look like spellings of one module, without a base that could tell.

    language_model.model.layers.0.mlp.up_proj       before transformers 4.52
    model.language_model.layers.0.mlp.up_proj       today
    layers.0.mlp.up_proj                            an adapter of the model without its head
    model.layers.0.block_sparse_moe.experts.3.w1    a Linear for each expert
    model.layers.0.mlp.experts.gate_up_proj         one parameter for all of them
    unet.mid_block.attentions.0.proj_in             as the base has it
    unet.mid_block_attentions_0_proj_in            underscores for dots, as in files of image makers

If a sum held a module twice, once under each name, PEFT and transformers would load one of the two
and drop the other. So without a base, which tells the name that counts, such a sum is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

__all__ = ["spelled_twice"]

_MOVED = {"model", "language_model"}
_RENAMED = {"block_sparse_moe": "mlp"}
_FLAT = re.compile(r"[a-z_0-9]+\.[^.]*_[0-9]+(?:_[^.]*)?")
"""A component, and a path in it that has the number of a block and no dot."""
_OF_AN_EXPERT = re.compile(r"(?P<holder>.*\bexperts)\.[0-9]+\.[^.]+\Z")
_OF_ALL_EXPERTS = re.compile(r"(?P<holder>.*\bexperts)\.[^.]+\Z")


def spelled_twice(
    names: Iterable[str], has: Callable[[str], bool] = lambda name: False
) -> tuple[str, str] | None:
    """Return the first two names that look like two spellings of one module; None if none do.

    Args:
        names: the names of modules and raw parameters.
        has: tells whether a base is known to have a module of that name; if it has both, they are
            two modules.

    >>> spelled_twice(["model.layers.0.q_proj", "model.language_model.layers.0.q_proj"])
    ('model.language_model.layers.0.q_proj', 'model.layers.0.q_proj')
    >>> spelled_twice(["vision_tower.layers.0.q_proj", "model.language_model.layers.0.q_proj"])
    >>> spelled_twice(["mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.experts.down_proj"])
    ('mlp.experts.0.up_proj', 'mlp.experts.down_proj')
    >>> spelled_twice(["unet.mid.0.to_q", "unet.mid_0_to_q"])
    ('unet.mid.0.to_q', 'unet.mid_0_to_q')
    """
    names = sorted(names)
    known: dict[str, tuple[str, str]] = {}
    for name in names:
        # Every name is compared with the first spelling of its place. The names are sorted, so the
        # error is always the same.
        place, spelling = _place(name)
        other, spelled = known.setdefault(place, (name, spelling))
        if spelled != spelling and not (has(other) and has(name)):
            return other, name
    return _spelled_flat(names, has)


def _spelled_flat(names: list[str], has: Callable[[str], bool]) -> tuple[str, str] | None:
    """Return the first two names of which one is the other with underscores for dots."""
    if not any(_FLAT.fullmatch(name) for name in names):
        return None  # names with dots are never compared: a_b and a.b may well be two modules
    known: dict[str, str] = {}
    for name in names:
        # CLIP's names began with text_model once, and those of files still do
        flat = name.replace(".", "_").replace("_text_model_", "_")
        other = known.setdefault(flat, name)
        either = _FLAT.fullmatch(other) or _FLAT.fullmatch(name)
        if other != name and either and not (has(other) and has(name)):
            return other, name
    return None


def _place(name: str) -> tuple[str, str]:
    """Return the part that two spellings of a module share, and one that tells them apart."""
    one = _OF_AN_EXPERT.match(name)
    every = _OF_ALL_EXPERTS.match(name)
    if one is not None:
        # Any expert stands for all: two of them are two modules in one spelling.
        return _common(one["holder"]), f"{one['holder']}.0"
    if every is not None:
        return _common(every["holder"]), every["holder"]
    return _common(name), name


def _common(name: str) -> str:
    """Return the name without the parts before its layers that have moved."""
    parts = name.split(".")
    # The first number is a layer's index. Parts after it name modules of a
    # layer, and are renamed, not moved.
    start = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    head = [part for part in parts[:start] if part not in _MOVED]
    rest = [_RENAMED.get(part, part) for part in parts[start:]]
    return ".".join([*head, *rest])
