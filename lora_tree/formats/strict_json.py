"""Parse untrusted JSON: one object, UTF-8, no duplicate keys, no NaN, of bounded size and depth.

Python's own parser accepts NaN, and takes the last of two equal keys where another program may take
the first: a file could show one value to us and another one to PEFT or to safetensors.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import FormatError
from .limits import JSON_DEPTH, JSON_VALUES

__all__ = ["loads"]

_JSON_NAMES = {list: "a list", str: "a string", int: "a number", float: "a number"}
DAMAGED = "correct it there; or, if a program wrote the file, download it or save it again"


def loads(data: bytes, where: str) -> dict[str, Any]:
    """Return the object in ``data``.

    Raises:
        FormatError: it is not UTF-8, not JSON, too large, nested too deeply, not an object, or has
            a duplicate key.

    >>> loads(b'{"r": 8}', "adapter_config.json")
    {'r': 8}
    """
    _check_size(data, where)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
        if "\\u" in text:
            # JSON escapes can spell half a surrogate pair. Python reads it, but UTF-8 can't encode
            # it: find out now, not when the value is written again.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    # UnicodeError is a ValueError, so it comes first: below it would be reported as broken JSON.
    except UnicodeError as error:
        raise FormatError(f"{where}: not valid UTF-8: {error}", DAMAGED) from error
    except RecursionError as error:
        raise FormatError(f"{where}: nested too deeply to be a real file", DAMAGED) from error
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON: {error}", DAMAGED) from error
    if not isinstance(value, dict):
        kind = _JSON_NAMES.get(type(value), type(value).__name__)
        raise FormatError(f"{where}: expected a JSON object, got {kind}", DAMAGED)
    # A text with fewer brackets can't be nested so deeply: skip the walk for it.
    if text.count("{") + text.count("[") > JSON_DEPTH:
        _check_depth(value, where)
    return value


def _check_size(data: bytes, where: str) -> None:
    """Refuse a text that would take minutes and gigabytes to parse.

    Every value costs a comma or a bracket, and counting these takes milliseconds.
    """
    values = sum(data.count(sign) for sign in (b",", b"[", b"{"))
    if values > JSON_VALUES:
        raise FormatError(
            f"{where}: some {values:,} values; the most is {JSON_VALUES:,}",
            "is it the right file? no adapter needs so many",
        )


def _check_depth(value: Any, where: str) -> None:
    # Level by level in a loop: a recursion would fail on exactly the texts that it looks for.
    level = [value]
    for _ in range(JSON_DEPTH):
        inner: list[Any] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item)
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return
    raise FormatError(f"{where}: nested more than {JSON_DEPTH} levels deep", DAMAGED)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} occurs twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
