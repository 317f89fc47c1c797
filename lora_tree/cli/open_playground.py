"""Open the playground of a command: a base with its tree attached, which answers prompts."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import SpecError
from ..explore.answering import Answering, AnsweringModel, AnsweringPipeline
from ..explore.answers import Answerer
from ..explore.pictures import Painter
from ..explore.playground import Playground
from ..extras import need, open_pretrained
from ..integrations import diffusers as pipelines
from ..model import attach
from ..tree import AdapterTree
from .open_base import open_model, open_tokenizer

__all__ = ["open_playground"]


def open_playground(
    tree: AdapterTree, folder: Path, base: str, *, trust_remote_code: bool = False
) -> Playground:
    """Open a base and return a playground over it.

    Args:
        tree: its paths answer.
        folder: of the tree, for messages.
        base: a folder or hub id of a language model, or the folder of a diffusers pipeline.
        trust_remote_code: run the base's own code, where it brings some.

    Raises:
        MissingExtra: gradio, transformers or diffusers is not installed.
        SpecError: the base can't be opened, or writes no text.
        BaseMismatch: the tree does not fit it.
    """
    # Checked first: a base takes minutes to open, and a missing extra is reported at once.
    need("gradio", extra="explore", what="the playground")
    answering: Answering
    if pipelines.is_pipeline(base):
        answering = _pipeline(tree, base, trust_remote_code=trust_remote_code)
    else:
        answering = _language_model(tree, folder, base, trust_remote_code=trust_remote_code)
    return Playground(answering)


def _language_model(
    tree: AdapterTree, folder: Path, base: str, *, trust_remote_code: bool
) -> AnsweringModel:
    name, tokenizer = open_tokenizer(
        tree, folder, base, what="the playground", trust_remote_code=trust_remote_code
    )
    model = open_model(name, trust_remote_code=trust_remote_code)
    if not model.can_generate():
        raise SpecError(
            f"{name}: its config.json names {type(model).__name__}, which can't generate text",
            "name a base with a language model's head: --base MODEL",
        )
    return AnsweringModel(Answerer(attach(tree, model), tokenizer))


def _pipeline(tree: AdapterTree, base: str, *, trust_remote_code: bool) -> AnsweringPipeline:
    diffusers = need("diffusers", extra="diffusers", what="the playground of a pipeline")
    pipe = open_pretrained(
        diffusers.DiffusionPipeline,
        base,
        failed="diffusers can't open the pipeline",
        trust_remote_code=trust_remote_code,
    )
    # Its progress bars would appear between our lines; the page counts the steps.
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda")
    return AnsweringPipeline(Painter(pipelines.attach_pipeline(tree, pipe), pipe))
