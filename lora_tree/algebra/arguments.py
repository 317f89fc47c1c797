"""Refuse what is neither a tree nor an adapter, where a verb takes one.

A folder is the usual mistake: a verb takes what `lora_tree.load` and `Adapter.load` return.
"""

from __future__ import annotations

from ..adapter import Adapter
from ..errors import SpecError
from ..tree import AdapterTree

__all__ = ["check_adapter", "check_tree"]


def check_tree(given: object, what: str = "tree") -> None:
    """Refuse a value that is no tree.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is something else.
    """
    _check(given, AdapterTree, what, "lora_tree.load('zoo/') opens a folder as one")


def check_adapter(given: object, what: str = "adapter") -> None:
    """Refuse a value that is no adapter.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is something else.
    """
    _check(given, Adapter, what, "lora_tree.Adapter.load('FOLDER') reads one")


def _check(given: object, kind: type, what: str, advice: str) -> None:
    if not isinstance(given, kind):
        raise SpecError(f"{what}: expected an {kind.__name__}, got {type(given).__name__}", advice)
