"""The base that a command runs, by transformers: its tokenizer and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import SpecError
from ..export.unloaded_base import class_of, skeleton
from ..extras import need, open_pretrained
from ..integrations import diffusers as pipelines
from ..tree import AdapterTree

__all__ = ["open_model", "open_tokenizer", "skeleton_of"]


def skeleton_of(base: str, *, what: str, trust_remote_code: bool = False) -> Any:
    """Return a base with shapes and no memory: a model, or the pipeline in a diffusers folder.

    Raises:
        MissingExtra, SpecError: as `skeleton`.
    """
    # A pipeline has a model_index.json and no config.json beside it, so `skeleton` would refuse it.
    if pipelines.is_pipeline(base):
        return pipelines.pipeline_skeleton(base)
    return skeleton(base, what=what, trust_remote_code=trust_remote_code)


def open_tokenizer(
    tree: AdapterTree,
    folder: Path,
    base: str | None,
    *,
    what: str,
    trust_remote_code: bool = False,
) -> tuple[str, Any]:
    """Return the base's name, the user's or the tree's own, and its tokenizer.

    Args:
        tree: its base counts where the user names none.
        folder: of the tree, for the message.
        base: the one that the user named.
        what: the command, for the message.
        trust_remote_code: run the base's own code, where it brings some.

    Raises:
        MissingExtra: transformers is not installed.
        SpecError: neither the user nor the tree names a base, or it can't be opened.
    """
    transformers = need("transformers", extra="transformers", what=what)
    # Its progress bars would appear between our lines, even where stderr is a file.
    transformers.utils.logging.disable_progress_bar()
    name = base or tree.base
    if name is None:
        raise SpecError(f"{folder} names no base", "name one: --base MODEL")
    tokenizer = open_pretrained(
        transformers.AutoTokenizer,
        name,
        failed="transformers can't open its tokenizer",
        trust_remote_code=trust_remote_code,
    )
    return name, tokenizer


def open_model(name: str, *, trust_remote_code: bool = False) -> Any:
    """Return the model, in the class that its config.json names, on a GPU if there is one.

    A config that names none is opened as a language model.

    Raises:
        SpecError: it can't be opened.
    """
    transformers = need("transformers", extra="transformers", what="a base")
    failed = "transformers can't open the model"
    _, kind = class_of(name, transformers, failed=failed, trust_remote_code=trust_remote_code)
    model = open_pretrained(
        kind or transformers.AutoModelForCausalLM,
        name,
        failed=failed,
        trust_remote_code=trust_remote_code,
    ).eval()
    return model.to("cuda") if torch.cuda.is_available() else model
