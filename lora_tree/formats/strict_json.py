"""JSON from files that anybody may have written: one object, UTF-8, no key twice, no NaN, else a `FormatError`."""

from __future__ import annotations

import json
from typing import Any

from ..errors import FormatError
from .limits import JSON_DEPTH, JSON_VALUES

__all__ = ["loads"]


def loads(data: bytes, where: str) -> dict[str, Any]:
    """The object that ``data`` spells.

    Raises:
        FormatError: it is not UTF-8, not JSON, too large, nested too deeply, not an object, or says one key twice.

    >>> loads(b'{"r": 8}', "adapter_config.json")
    {'r': 8}
    """
    _check_size(data, where)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode(
                "utf-8"
            )  # half a surrogate pair is no text
    except UnicodeError as error:
        raise FormatError(f"{where}: not valid UTF-8: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{where}: nested too deeply to be a real file") from error
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
    if text.count("{") + text.count("[") > JSON_DEPTH:  # with fewer it can't be nested so deeply
        _check_depth(value, where)
    return value


def _check_size(data: bytes, where: str) -> None:
    """Refuse what would take minutes and gigabytes to parse: every value costs a comma or a bracket."""
    values = sum(data.count(sign) for sign in (b",", b"[", b"{"))
    if values > JSON_VALUES:
        raise FormatError(f"{where}: some {values:,} values; the most is {JSON_VALUES:,}")


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(JSON_DEPTH):
        inner: list[Any] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item)
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return
    raise FormatError(f"{where}: nested more than {JSON_DEPTH} levels deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} occurs twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
