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
    if not isinstance(given, AdapterTree):
        raise SpecError(
            f"{what}: expected an AdapterTree, got {type(given).__name__}",
            "lora_tree.load('zoo/') opens a folder as one",
        )


def check_adapter(given: object, what: str = "adapter") -> None:
    """Refuse a value that is no adapter.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is something else.
    """
    if not isinstance(given, Adapter):
        raise SpecError(
            f"{what}: expected an Adapter, got {type(given).__name__}",
            "lora_tree.Adapter.load('FOLDER') reads one",
        )
