"""``lora-tree generate``: print text that a transformers model writes at a path."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import torch
import typer

from ...errors import SpecError
from ...extras import foreign
from ...folder import load_versions
from ...model import attach
from ..arguments import Folder, On, SkipBroken, TrustRemoteCode
from ..console import print_text
from ..open_base import open_model, open_tokenizer

__all__ = ["generate"]


class Mode(StrEnum):
    """The modes in which a path can be active."""

    merged = "merged"
    unmerged = "unmerged"


def generate(
    folder: Folder,
    path: Annotated[
        str,
        typer.Argument(
            help="Write at this path or blend; '' is the bare base.", metavar="PATH_OR_BLEND"
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Continue this text.", metavar="TEXT")],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base; the tree's own without it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Add at most this many tokens.")] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, help="Draw tokens at this temperature; 0 takes the likeliest every time."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Draw from this seed, at temperatures above 0.")] = 0,
    mode: Annotated[
        Mode, typer.Option(help="Write the path into the weights, or run it as a side path.")
    ] = Mode.merged,
    on: On = None,
    trust_remote_code: TrustRemoteCode = False,
    skip_broken: SkipBroken = False,
) -> None:
    """Generate text with the base at a path, and print it."""
    tree, (path, *_) = load_versions(folder, path, *(on or ()), skip_broken=skip_broken)
    # Checked before a model is loaded, which takes minutes: a typo is reported at once.
    if "+" in path or ":" in path:
        tree.coefficients(path)
    else:
        tree.lineage(path)
    name, tokenizer = open_tokenizer(
        tree, folder, base, what="generate", trust_remote_code=trust_remote_code
    )
    with foreign("the tokenizer can't read the prompt"):
        tokens = tokenizer(prompt, return_tensors="pt")
    if tokens["input_ids"].numel() == 0:
        raise SpecError(
            "the prompt has no tokens, so there is nothing to continue",
            "give it a word: --prompt TEXT",
        )
    model = open_model(name, trust_remote_code=trust_remote_code)
    if not model.can_generate():
        raise SpecError(
            f"{name}: its config.json names {type(model).__name__}, which can't generate text",
            "name a base with a language model's head: --base MODEL",
        )
    attached = attach(tree, model)
    attached.activate(path, mode=mode.value)
    # transformers draws from torch's own generator.
    torch.manual_seed(seed)
    with foreign(f"{name}: the model can't continue the prompt"):
        # The model may be on a GPU; the tokenizer's tensors are on the CPU.
        tokens = tokens.to(model.device)
        text = _continue(model, tokenizer, tokens, max_new_tokens, temperature)
    print_text(text)


def _continue(
    model: Any, tokenizer: Any, tokens: Any, max_new_tokens: int, temperature: float
) -> str:
    # Some bases' generation_config samples; a temperature of 0 must not.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    pad = tokenizer.pad_token_id
    if pad is None:  # one row needs no padding, but transformers warns without a token for it
        pad = tokenizer.eos_token_id
    ids = model.generate(
        input_ids=tokens["input_ids"],
        # With the padding token above, transformers can't tell padding from the end of a text, and
        # warns unless it is told which tokens count.
        attention_mask=tokens["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **sampling,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
