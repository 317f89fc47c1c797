"""What is optional is imported here, when it is first used, or its absence is told with the line that repairs it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .errors import MissingExtra

__all__ = ["need"]


def need(module: str, *, extra: str, what: str) -> Any:
    """The module, imported now.

    Args:
        module: its name, ``transformers``.
        extra: the extra of lora_tree that brings it.
        what: what is being done, for the message.

    Raises:
        MissingExtra: it is not installed.

    >>> need("no_such_module", extra="peft", what="the demo")
    Traceback (most recent call last):
    lora_tree.errors.MissingExtra: the demo needs no_such_module, which is not installed
      pip install 'lora_tree[peft]'
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(f"{what} needs {module}, which is not installed", f"pip install 'lora_tree[{extra}]'")
    return importlib.import_module(module)
