"""Rows of a data set: JSON lines, each with a path and one of three ways to say what is learnt.

    {"path": "fr/legal", "text": …}                          every token is learnt
    {"path": "fr/legal", "prompt": …, "completion": …}       the completion's tokens are
    {"path": "fr/legal", "messages": [{"role": …, "content": …}, …]}     those of the assistant's turns are

A row that is too long is cut at its end, and columns of the user's own are not read; which and how many, the caller can
see. A mistake is told with its file and line.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FolderError, LoraTreeError, SpecError, listing, suggest
from ..extras import foreign
from ..formats import strict_json
from ..storage import as_path
from ..training.losses import IGNORED
from ..tree import AdapterTree

__all__ = ["Row", "padded", "read_rows"]

WAYS = ({"text"}, {"prompt", "completion"}, {"messages"})


@dataclass(frozen=True)
class Row:
    """One row as tokens.

    Args:
        path: whose row it is; ``""`` is the bare base.
        ids: its tokens.
        labels: the same, −100 where nothing is learnt.
        where: file and line, for messages.
        cut: it was longer.
        extra: columns that were not read, by name.
    """

    path: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str
    cut: bool = False
    extra: tuple[str, ...] = ()

    @property
    def learnt(self) -> int:
        """Tokens that are learnt: the first of a row never is."""
        return sum(label != IGNORED for label in self.labels[1:])


def read_rows(
    files: Iterable[str | os.PathLike[str]],
    tree: AdapterTree,
    tokenizer: Any,
    *,
    max_length: int = 1024,
) -> list[Row]:
    """All rows of some files of JSON lines, in order.

    Args:
        files: read one after the other; empty lines are passed over.
        tree: whose paths the rows may have.
        tokenizer: of transformers; its end of text, where it has one, is learnt at the end of ``text`` and completions.
        max_length: tokens to keep of a row.

    Raises:
        FolderError: a file can't be read.
        FormatError: a line is no JSON object; names the file and the line.
        SpecError: a row says nothing that can be learnt, or too much; or a path is not in the tree.
    """
    if max_length < 2:
        raise SpecError(
            f"max_length must be at least 2, got {max_length}: a token is learnt from those before it"
        )
    rows = []
    for file in files:
        for where, line in _lines(as_path(file)):
            data = strict_json.loads(line, where)
            try:
                rows.append(_row(data, where, tree, tokenizer, max_length))
            except LoraTreeError as error:
                raise error.within(where) from error
    if not rows:
        raise SpecError(
            f"{listing(map(str, files)) or 'no file'}: no rows",
            'a row is {"path": "fr", "text": "…"}',
        )
    return rows


def padded(rows: Sequence[Row], *, device: torch.device, pad: int = 0) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` of a batch, each (rows, longest), int64; filled up at the end.

    >>> rows = [Row("fr", (1, 2, 3), (-100, 2, 3), "x:1"), Row("de", (4,), (4,), "x:2")]
    >>> batch = padded(rows, device=torch.device("cpu"))
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[1, 2, 3], [4, 0, 0]], [[-100, 2, 3], [4, -100, -100]])
    """
    longest = max(len(row.ids) for row in rows)

    def filled(of: Iterable[Sequence[int]], with_: int) -> Tensor:
        lines = [[*line, *[with_] * (longest - len(line))] for line in of]
        return torch.tensor(lines, dtype=torch.int64, device=device)

    return {
        "input_ids": filled((row.ids for row in rows), pad),
        "attention_mask": filled(([1] * len(row.ids) for row in rows), 0),
        "labels": filled((row.labels for row in rows), IGNORED),
    }


# ---------------------------------------------------------------------- one row
def _lines(file: Any) -> Iterator[tuple[str, bytes]]:
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:  # some editors and exports begin a UTF-8 file with a mark
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{file}:{number}", line
    except OSError as error:
        raise FolderError(
            f"{file}: can't be read: {error.strerror}", "name a file of JSON lines"
        ) from error


def _row(
    data: Mapping[str, Any], where: str, tree: AdapterTree, tokenizer: Any, max_length: int
) -> Row:
    keys, extra = _way(data)
    path = data.get("path")
    if not isinstance(path, str):
        near = (
            next((hint for key in sorted(extra) if (hint := suggest(key, ["path"]))), "")
            if path is None
            else ""
        )
        it_has = f"; this has {listing(sorted(data))}{near}" if near else ""
        raise SpecError(f"'path' must be a string like 'fr/legal', got {path!r}{it_has}")
    tree.lineage(path)
    for key in keys - {"messages"}:
        if not isinstance(data[key], str):
            raise SpecError(f"{key!r} must be a string, got {type(data[key]).__name__}")
    with foreign("the tokenizer can't read it"):
        if "text" in keys:
            ids = _ended(_ids(tokenizer, data["text"]), tokenizer)
            labels = list(ids)
        elif "prompt" in keys:
            start = _ids(tokenizer, data["prompt"])
            rest = _ended(
                list(tokenizer(data["completion"], add_special_tokens=False)["input_ids"]),
                tokenizer,
            )
            ids, labels = start + rest, [IGNORED] * len(start) + rest
        else:
            ids, labels = _turns(data["messages"], tokenizer)
    kept = tuple(ids[:max_length]), tuple(labels[:max_length])
    row = Row(path, *kept, where, len(ids) > max_length, tuple(sorted(extra)))
    if not row.learnt:
        cut = f" in its first {max_length} tokens" if row.cut else ""
        raise SpecError(
            f"nothing is learnt from it{cut}", "a row needs two tokens, the second one learnt"
        )
    return row


def _way(data: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The columns by which a row says what is learnt, and those that are the user's own.

    Raises:
        SpecError: it says so in no way, in several, or in half of one.
    """
    words = set().union(*WAYS)
    keys = words & set(data)
    extra = set(data) - words - {"path"}
    if keys not in WAYS:
        near = next((hint for key in sorted(extra) if (hint := suggest(key, words - keys))), "")
        raise SpecError(
            f"a row has a path and text, or prompt and completion, or messages; this has {listing(sorted(data))}{near}"
        )
    return keys, extra


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _turns(messages: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and as labels those of the assistant's turns."""
    whole = isinstance(messages, list) and bool(messages)
    if not whole or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise SpecError('\'messages\' must be a list of {"role": …, "content": …}')
    if not getattr(tokenizer, "chat_template", None):
        raise SpecError(
            "the tokenizer has no chat template to write messages with",
            "give prompt and completion",
        )
    text = ""
    ids: list[int] = []
    labels: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(tokenizer, messages[:i], asked=True)
        after = _templated(tokenizer, messages[: i + 1], asked=False)
        if not (before.startswith(text) and after.startswith(before)):
            raise SpecError(
                f"the chat template writes what came before otherwise when turn {i + 1} follows, so that turn has no "
                "text of its own",
                "give prompt and completion",
            )
        asked = _grown(ids, text, before, tokenizer)
        answered = _grown(asked, before, after, tokenizer)
        labels += [IGNORED] * (len(asked) - len(ids)) + answered[len(asked) :]
        text, ids = after, answered
    if not ids:
        raise SpecError("no turn of the messages is the assistant's, so there is nothing to learn")
    return ids, labels


def _grown(ids: list[int], text: str, longer: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that begins with ``text``, whose tokens are ``ids``.

    Where the tokenizer would join what stands on both sides of the border into one token, it is given each side alone:
    a model that is asked has read the text up to the border as tokens of its own, and answers with the next ones.

    Raises:
        SpecError: it writes what comes after the border otherwise than it stands there.
    """
    whole = _tokens(tokenizer, longer)
    if whole[: len(ids)] == ids:
        return whole
    apart = ids + _tokens(tokenizer, longer[len(text) :])
    if _read_back(tokenizer, apart) != _read_back(tokenizer, whole):
        raise SpecError(
            f"the tokenizer joins what stands before and after a turn's border, at {longer[len(text) :][:20]!r}, into "
            "one token, and reads the part after it otherwise when it stands alone",
            "give prompt and completion",
        )
    return apart


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _read_back(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _templated(tokenizer: Any, messages: list[Any], *, asked: bool) -> str:
    """The text of some messages; ``asked``: up to where the assistant begins to answer."""
    if not messages:
        return ""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked))
