"""pydantic's errors about a value from a file, in the words of this library.

    tree.fr.children.legal.r: Input should be a valid integer    pydantic
    node fr/legal: r: got "16", which should be a valid integer  here

Law: one message for each place. Where a value may be of several kinds (a union), pydantic gives an
error for each; they become one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel, ValidationError

from .errors import nearest

__all__ = ["Loc", "describe_invalid", "node_path"]

Loc: TypeAlias = tuple[str | int, ...]
"""The way to a place in nested data: keys and indices."""

_MOST_HINTS = 50
"""The most unknown keys that get a hint: to compare each with every known word takes time."""

_SYNONYMS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "targets": "target_modules",
    "modules": "target_modules",
    "path": "adapter",
}
"""Words that people write for those of a LoraSpec, which are PEFT's."""


def describe_invalid(
    error: ValidationError, data: Any, top: type[BaseModel]
) -> list[tuple[Loc, str]]:
    """Say what pydantic found, one message for each place.

    Args:
        data: the value that was validated.
        top: the model that it was validated as.

    Returns:
        (the way to the value or key, the message), in pydantic's order.
    """
    texts_at: dict[tuple[Loc, str], list[str]] = {}
    hints = 0
    details = [
        (detail, *_inside(detail["loc"], data))
        for detail in error.errors(include_url=False, include_context=False)
    ]
    for detail, loc, value in details:
        if _is_other_member(detail, loc, value, details):
            continue
        hint = ""
        if detail["type"] == "extra_forbidden":
            hints += 1
            if hints <= _MOST_HINTS:
                hint = _outdented(loc, top) or _nearest(str(loc[-1]), loc, top)
        head, text = _message_parts(detail, loc, value, hint)
        # The members of a union share a place and a head.
        texts = texts_at.setdefault((loc, head), [])
        if text not in texts:
            texts.append(text)
    return [(loc, head + " or ".join(texts)) for (loc, head), texts in texts_at.items()]


def _is_other_member(
    detail: Mapping[str, Any], loc: Loc, value: Any, details: list[tuple[Any, Loc, Any]]
) -> bool:
    """Return whether an error comes from a member of a union that the author did not mean.

    For a mapping pydantic also reports that it is no number. The errors of the member that is a
    mapping name the real mistake.
    """
    is_scalars_error = detail["type"].endswith(("_type", "_parsing")) and isinstance(value, dict)
    if not is_scalars_error or detail["type"] in ("model_type", "dict_type"):
        return False
    others = [other for other, where, _ in details if where[: len(loc)] == loc]
    return any(other is not detail for other in others)


def _message_parts(detail: Mapping[str, Any], loc: Loc, value: Any, hint: str) -> tuple[str, str]:
    """Return the beginning of a message, which says where, and its end, which says what."""
    match detail["type"], detail["loc"][-1:]:
        case "extra_forbidden", _:
            return f"unknown key {loc[-1]!r}{_in_place(loc[:-1])}", hint
        case "missing", last:
            todo = "; write version: 1" if last == ("version",) else ""
            return f"{last[0]!r} is missing{_in_place(loc)}{todo}", ""
        case "model_type", () if value is None:
            return "the file is empty; a tree.yaml begins with version: 1", ""
        # pydantic says that a key does not match a pattern, which for a node's name is no help
        case _, ("[key]",) if loc[-2] not in ("tree", "children"):
            text = _in_lower_case(detail["msg"])
            return f"{_place(loc[:-1])}: the key {str(loc[-1])!r} {text}", ""
        case _, ("[key]",):
            head = f"{str(loc[-1])!r} is not a valid node name"
            if "/" in str(loc[-1]):
                return head, "; write fr/legal as {fr: {children: {legal: {}}}}"
            return head, ": a-z, A-Z, digits, '-', '_' and '.', at most 128, no leading dot"
        case kind, _:
            return f"{_place(loc)}: got {_short(value)}, which ", _mismatch_text(
                kind, detail, value
            )


def _mismatch_text(kind: str, detail: Mapping[str, Any], value: Any) -> str:
    if kind == "too_short":
        return "should have one entry at least"
    if kind not in ("model_type", "dict_type"):
        return _in_lower_case(detail["msg"])
    # "legal:" with nothing after it is null in YAML, which surprises its author
    is_empty_node = value is None and kind == "model_type"
    hint = "; write {} where there is nothing to say" if is_empty_node else ""
    return "should be a mapping" + hint


def node_path(loc: Loc) -> str:
    """Return the path of the node that a place in a tree.yaml belongs to.

    >>> node_path(("tree", "fr", "children", "legal", "r"))
    'fr/legal'
    """
    names: list[str] = []
    above = "tree"  # the key above the nodes at the top; below it is "children"
    for at in range(0, len(loc) - 1, 2):
        if loc[at] != above:
            break
        names.append(str(loc[at + 1]))
        above = "children"
    return "/".join(names)


def _inside(loc: Loc, data: Any) -> tuple[Loc, Any]:
    """Return the part of pydantic's location that leads into the data, and the value there.

    pydantic also names the members of a union and writes "[key]" for a key of a mapping.
    """
    inside: list[str | int] = []
    for step in loc:
        is_key = isinstance(data, dict) and step in data
        is_index = isinstance(data, list) and isinstance(step, int) and step < len(data)
        # Names of union members are left out. After that of a mapping, the mapping's keys follow.
        if not is_key and not is_index:
            continue
        inside.append(step)
        data = data[step]
    return tuple(inside), data


def _outdented(loc: Loc, top: type[BaseModel]) -> str:
    """Return a hint if the key lies below a word like ``children`` that stands for a node's name.

    ::

        tree:
          fr:
          children:       the author meant this one level deeper
            legal: {}
    """
    if len(loc) < 3 or loc[-3] not in ("tree", "children"):
        return ""
    name = str(loc[-2])
    if name not in _model_at(loc[:-1], top).model_fields:
        return ""
    return f"; {name!r} stands where the name of a node does: indent it below its node"


def _nearest(key: str, loc: Loc, top: type[BaseModel]) -> str:
    model = _model_at(loc[:-1], top)
    words = list(model.model_fields)
    # Only a LoraSpec has the fields that these words stand for.
    if "lora_alpha" in words:
        words += _SYNONYMS
    word = nearest(key, words)
    if word is None:
        return ""
    return f"; did you mean {_SYNONYMS.get(word, word)!r}?"


def _model_at(loc: Loc, model: type[BaseModel]) -> type[BaseModel]:
    """Return the model of a place; a step that is no field of a model is a key or an index."""
    for step in loc:
        field = model.model_fields.get(str(step))
        inner = None if field is None else _model_in(field.annotation)
        if inner is not None:
            model = inner
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation: that of ``dict[str, NodeSpec]`` is NodeSpec."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def _place(loc: Loc) -> str:
    node = node_path(loc)
    if not node:
        return ".".join(map(str, loc)) or "the file"
    rest = loc[2 * len(node.split("/")) :]
    return f"node {node}: {'.'.join(map(str, rest))}".removesuffix(": ")


def _in_place(loc: Loc) -> str:
    return f" in {_place(loc)}" if loc else ""


def _in_lower_case(text: str) -> str:
    """Return a message of pydantic's as the end of a sentence."""
    text = text.removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _short(value: Any) -> str:
    """Return a value as YAML spells it, cut if it is long."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, (str, float)):
        text = repr(value)
    else:
        text = str(value).lower().replace("none", "null")  # true, false, null, integers
    return text if len(text) <= 80 else f"{text[:77]}…"
