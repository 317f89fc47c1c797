"""Valid names and paths of nodes: a saved node is a folder of its name.

    fr            a name: letters, digits, "-", "_" and ".", at most 128
    fr/legal      a path: the names from the top of the tree down; the root's path is ""

Law: a valid name is a file name on every operating system, and not the name of a file that an
adapter or a tree keeps in the same folder.
"""

from __future__ import annotations

import re

from .errors import PathError, plural

__all__ = ["MAX_DEPTH", "NAME", "check_name", "check_path", "is_pattern"]

NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}"
"""The characters of a name. A leading dot would hide the folder."""

MAX_DEPTH = 64
"""The most levels of a tree: trees come from strangers, and systems bound the length of a path."""

_NAME = re.compile(rf"{NAME}\Z")  # \Z: $ would let a name end in a newline
# Windows opens a device by these names, in every folder and with any ending.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?\Z", re.IGNORECASE)
_OF_A_NODE = frozenset(("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"))
_OF_A_TREE = (".yaml", ".yml", ".lock")
_SIGNS = frozenset("*?[")


def is_pattern(text: str) -> bool:
    """Return whether a text is a pattern like ``fr/*``, which no path is.

    >>> is_pattern("fr/*"), is_pattern("fr/legal")
    (True, False)
    """
    return not _SIGNS.isdisjoint(text)


def check_name(name: str) -> str:
    """Return a node's own name if it is valid.

    Raises:
        PathError: it is no file name that is safe on every system, or an adapter has a file of that
            name.
    """
    is_spelled_right = isinstance(name, str) and _NAME.match(name) is not None
    if isinstance(name, str) and is_pattern(name):
        raise PathError(
            f"{name!r} is not a valid node name, but a pattern",
            "one path is wanted here; where several nodes may be named, a pattern is taken",
        )
    # Windows drops a dot at the end of a name, so two nodes would have one folder.
    if not is_spelled_right or name.endswith(".") or _RESERVED.match(name):
        raise PathError(
            f"{name!r} is not a valid node name",
            "a name has letters from a to z and A to Z, digits, '-', '_' and '.', at most 128 of "
            "them; a dot is not first or last, and it is no device name like 'con'",
        )
    if name.lower() in _OF_A_NODE:  # many file systems do not tell capitals apart
        raise PathError(
            f"{name!r} is not a valid node name: it is that of an adapter's file in the folder of "
            "the node above",
            "choose another name",
        )
    return name


def check_path(path: str) -> tuple[str, ...]:
    """Return the names on a path: ``"fr/legal"`` has ``("fr", "legal")``, ``""`` has none.

    Raises:
        PathError: a name is not valid, or the path is too deep.
    """
    if not isinstance(path, str):
        raise PathError(
            f"a path is a string like 'fr/legal', got {path!r}", "join the names with '/'"
        )
    names = tuple(path.split("/")) if path else ()
    if len(names) > MAX_DEPTH:
        raise PathError(
            f"{path[:60]}…: {plural(len(names), 'level')} deep, the most is {MAX_DEPTH}",
            "put nodes that only group others together: a level costs nothing but its name",
        )
    for name in names:
        try:
            check_name(name)
        except PathError as error:
            # a path of one name is named by the error already
            raise error if len(names) == 1 else error.within(repr(path)) from error
    if names and names[0].lower().endswith(_OF_A_TREE):
        raise PathError(
            f"{names[0]!r} is not a valid name for a node at the top: a tree's own files lie "
            f"there, which end in {', '.join(_OF_A_TREE)}",
            "choose another name",
        )
    return names
