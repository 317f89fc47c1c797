"""A conversation as tokens: every turn of the assistant is learnt, everything else is read.

    <user> Hi <assistant> Hello! <end> <user> Bye <assistant> Goodbye! <end>
                          learnt                              learnt

A chat template writes text, and does not say where a turn begins in it. So it is asked for the
text up to each turn and for the text with it; the difference is the turn.
"""

from __future__ import annotations

from typing import Any

from ..errors import SpecError
from ..training.losses import IGNORED

__all__ = ["tokens_of_messages"]

PROMPT_INSTEAD = "write the row with prompt and completion instead of messages"


def tokens_of_messages(
    messages: Any, tokenizer: Any, *, before: int = 0
) -> tuple[list[int], list[int]]:
    """Return a conversation's tokens, and as labels those of the assistant's turns.

    Args:
        messages: ``[{"role": …, "content": …}, …]``.
        tokenizer: of transformers, with a chat template.
        before: the number of messages at the beginning that are only read, not learnt.

    Raises:
        SpecError: it is no conversation; the template has no place where an answer begins; or
            there is nothing to learn from it.
    """
    _check(messages, tokenizer)
    text = ""
    ids: list[int] = []
    labels: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt_text = _templated(tokenizer, messages[:i], add_generation_prompt=True)
        after = _templated(tokenizer, messages[: i + 1], add_generation_prompt=False)
        # Some templates drop an earlier turn's reasoning once another turn follows. Such a turn
        # has no text of its own in the whole, so its tokens can't be told from the others.
        if not (prompt_text.startswith(text) and after.startswith(prompt_text)):
            raise SpecError(
                f"the chat template changes the earlier turns when turn {i + 1} follows, "
                "so the text of that turn can't be found",
                PROMPT_INSTEAD,
            )
        prompt = _grown(ids, text, prompt_text, tokenizer)
        answered = _grown(prompt, prompt_text, after, tokenizer)
        learnt = answered[len(prompt) :]
        labels += [IGNORED] * (len(prompt) - len(ids))
        labels += learnt if i >= before else [IGNORED] * len(learnt)
        text, ids = after, answered
    if not ids:
        raise SpecError("no turn of the messages is the assistant's, so there is nothing to learn")
    return ids, labels


def _check(messages: Any, tokenizer: Any) -> None:
    is_list = isinstance(messages, list) and bool(messages)
    if not is_list or not all(_is_message(message) for message in messages):
        raise SpecError('\'messages\' must be a list of {"role": …, "content": …}')
    if not getattr(tokenizer, "chat_template", None):
        raise SpecError("the tokenizer has no chat template to write messages with", PROMPT_INSTEAD)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _grown(ids: list[int], text: str, longer: str, tokenizer: Any) -> list[int]:
    """Return the tokens of ``longer``, which begins with ``text``, whose tokens are ``ids``.

    A tokenizer may join characters on both sides of the border into one token. Then each side is
    tokenized separately, as in use: the model has read the text up to the border as tokens, and
    answers with new ones.

    Raises:
        SpecError: the part after the border, tokenized alone, decodes to another text.
    """
    whole = _tokens(tokenizer, longer)
    if whole[: len(ids)] == ids:
        return whole
    after = longer[len(text) :]
    apart = ids + _tokens(tokenizer, after)
    # Sentencepiece tokenizers add a space before a separate text, which the whole does not have.
    if _read_back(tokenizer, apart) != _read_back(tokenizer, whole):
        raise SpecError(
            f"the tokenizer joins text across a turn's border, at {after[:20]!r}, into one token, "
            "so the turn's own tokens can't be found",
            PROMPT_INSTEAD,
        )
    return apart


def _tokens(tokenizer: Any, text: str) -> list[int]:
    # The template writes special tokens as text; the tokenizer must not add them once more.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _read_back(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _templated(tokenizer: Any, messages: list[Any], *, add_generation_prompt: bool) -> str:
    """Return the text of some messages, with the words that begin an answer if requested."""
    if not messages:
        return ""
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )
