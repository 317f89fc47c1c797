"""The base that a command runs, by transformers: its tokenizer and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import SpecError
from ..extras import foreign, need
from ..tree import AdapterTree
from .console import OTHER_BASE

__all__ = ["open_model", "open_tokenizer"]


def open_tokenizer(tree: AdapterTree, folder: Path, base: str | None, *, what: str) -> tuple[str, Any]:
    """The base's name, asked for or the tree's own, and its tokenizer.

    Args:
        tree: which may name a base.
        folder: of the tree, for the message.
        base: what the user asked for.
        what: the command, for the message.

    Raises:
        MissingExtra: transformers is not installed.
        SpecError: nobody named a base, or it can't be opened.
    """
    transformers = need("transformers", extra="transformers", what=what)
    transformers.utils.logging.disable_progress_bar()
    name = base or tree.base
    if name is None:
        raise SpecError(f"{folder} names no base", "name one: --base MODEL")
    with foreign(f"{name}: transformers can't open its tokenizer", OTHER_BASE):
        return name, transformers.AutoTokenizer.from_pretrained(name)


def open_model(name: str) -> Any:
    """The model, on a GPU where there is one.

    Raises:
        SpecError: it can't be opened.
    """
    transformers = need("transformers", extra="transformers", what="a base")
    with foreign(f"{name}: transformers can't open the model", OTHER_BASE):
        model = transformers.AutoModelForCausalLM.from_pretrained(name).eval()
        return model.to("cuda") if torch.cuda.is_available() else model
