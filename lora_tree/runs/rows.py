"""Rows from JSON lines: a path, and one of four ways to say what is learnt.

    {"path": "fr/legal", "text": …}                                    every token
    {"path": "fr/legal", "prompt": …, "completion": …}                 the completion's
    {"path": "fr/legal", "messages": [{"role": …, "content": …}, …]}   the assistant's turns
    {"path": "fr/legal", "prompt": …, "chosen": …, "rejected": …}      to prefer one answer

The two answers are text, or both are messages and so is the prompt.

A row that is too long is cut at its end. Other columns are the user's own and are not read. Each
row says whether it was cut and which columns were passed over, so that a caller can tell the user.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FolderError, LoraTreeError, SpecError, listing, suggest
from ..extras import foreign
from ..formats import strict_json
from ..storage import as_path
from ..training.losses import IGNORED
from ..tree import AdapterTree
from .turns import tokens_of_messages

__all__ = ["Row", "padded", "read_rows"]

PREFERENCE = {"prompt", "chosen", "rejected"}
WAYS = ({"text"}, {"prompt", "completion"}, {"messages"}, PREFERENCE)
WORDS = {"text", "prompt", "completion", "messages", "chosen", "rejected"}


@dataclass(frozen=True)
class Row:
    """One row as tokens.

    Args:
        path: the node that it is for; ``""`` is the bare base.
        ids: its tokens.
        labels: the same, −100 where nothing is learnt.
        where: file and line, for messages.
        cut: the row was longer, and its end was cut off.
        extra: columns that were not read, by name.
        rejected: of a preference, the same prompt with the answer that is not preferred; the row
            itself has the preferred one. None: the row is learnt by itself.
        slice: the value of the column that names its slice; empty where it has none.
    """

    path: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str
    cut: bool = False
    extra: tuple[str, ...] = ()
    rejected: Row | None = None
    slice: str = ""

    @property
    def learnt(self) -> int:
        """Tokens that are learnt: the first of a row never is, since nothing comes before it."""
        return sum(label != IGNORED for label in self.labels[1:])


def read_rows(
    files: Iterable[str | os.PathLike[str]],
    tree: AdapterTree,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    slice_by: str | None = None,
) -> list[Row]:
    """Read all rows of some files of JSON lines, in order.

    Args:
        files: read one after the other; empty lines are passed over.
        tree: a row's path must be in it.
        tokenizer: of transformers. If it has an end-of-text token, that is learnt at the end of
            ``text`` and of completions.
        max_length: tokens to keep of a row.
        slice_by: the column whose value is the row's slice.

    Raises:
        FolderError: a file can't be read.
        FormatError: a line is no JSON object; names the file and the line.
        SpecError: a row has nothing to learn from, or has it in several ways; or no row has the
            column ``slice_by``.
        PathError: a row's path is not in the tree.
    """
    if max_length < 2:
        raise SpecError(
            f"max_length must be at least 2, got {max_length}: "
            "a token is learnt from those before it"
        )
    rows = []
    for file in files:
        for where, line in _lines(as_path(file)):
            if line.lstrip().startswith(b"["):
                # Many data sets come as one JSON list, over one line or several.
                raise SpecError(
                    f"{where}: a JSON list, but a file of rows has one JSON object on each line",
                    "jq -c '.[]' FILE > FILE.jsonl turns a list into such a file",
                )
            data = strict_json.loads(line, where)
            try:
                row = _row(data, where, tree, tokenizer, max_length)
            except LoraTreeError as error:
                raise error.within(where) from error
            rows.append(row if slice_by is None else _sliced(row, data, slice_by))
    if not rows:
        raise SpecError(
            f"{listing(map(str, files)) or 'no file'}: no rows",
            'a row is {"path": "fr", "text": "…"}',
        )
    if slice_by is not None and not any(row.slice for row in rows):
        raise SpecError(f"no row has a column {slice_by!r} that could name its slice")
    return rows


def _sliced(row: Row, data: Mapping[str, Any], column: str) -> Row:
    """Return a row with the value of a column as its slice; "" if it has no such column."""
    extra = tuple(name for name in row.extra if name != column)
    return replace(row, slice=str(data.get(column, "")), extra=extra)


def padded(rows: Sequence[Row], *, device: torch.device, pad: int = 0) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels`` of a batch, padded at the end.

    Each is (rows, longest), int64.

    >>> rows = [Row("fr", (1, 2, 3), (-100, 2, 3), "x:1"), Row("de", (4,), (4,), "x:2")]
    >>> batch = padded(rows, device=torch.device("cpu"))
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[1, 2, 3], [4, 0, 0]], [[-100, 2, 3], [4, -100, -100]])
    """
    # Padded to the longest row of this batch: a fixed length would waste most of it on padding.
    longest = max(len(row.ids) for row in rows)

    def filled(lines: Iterable[Sequence[int]], filler: int) -> Tensor:
        # At the end, since positions count from the first token and attention is causal.
        whole = [[*line, *[filler] * (longest - len(line))] for line in lines]
        return torch.tensor(whole, dtype=torch.int64, device=device)

    return {
        "input_ids": filled((row.ids for row in rows), pad),
        "attention_mask": filled(([1] * len(row.ids) for row in rows), 0),
        "labels": filled((row.labels for row in rows), IGNORED),
    }


# ---------------------------------------------------------------------- one row
def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the lines of a file that are not blank, each with its place."""
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    # Some editors and spreadsheets begin a UTF-8 file with a byte order mark.
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
    keys, extra = _split_columns(data)
    path = _path(data, extra)
    tree.lineage(path)  # raises if it is not in the tree
    made = []
    for answer in _answers(data, keys):
        # A tokenizer of the user's, or its chat template, may raise anything.
        with foreign("the tokenizer can't read it"):
            ids, labels = _tokens_and_labels(answer, tokenizer)
        is_cut = len(ids) > max_length
        row = Row(
            path,
            tuple(ids[:max_length]),
            tuple(labels[:max_length]),
            where,
            is_cut,
            tuple(sorted(extra)),
        )
        if not row.learnt:
            place = f" in its first {max_length} tokens" if is_cut else ""
            raise SpecError(
                f"nothing is learnt from it{place}",
                "a row needs two tokens, the second one learnt",
            )
        made.append(row)
    if len(made) == 1:
        return made[0]
    chosen, rejected = made
    if chosen.ids == rejected.ids:
        raise SpecError(
            "chosen and rejected are the same, so nothing is preferred", "leave this row out"
        )
    return replace(chosen, cut=chosen.cut or rejected.cut, rejected=rejected)


def _answers(data: Mapping[str, Any], keys: set[str]) -> list[dict[str, Any]]:
    """Return a row's data in one of the first three ways; for a preference twice, once with each
    answer, the preferred one first.

    Raises:
        SpecError: a column has the wrong type.
    """
    if keys == PREFERENCE and isinstance(data["prompt"], list):
        for key in ("chosen", "rejected"):
            if not isinstance(data[key], list):
                raise SpecError(
                    f"'prompt' is messages, and {key!r} is a {type(data[key]).__name__}",
                    "give all three as messages, or all three as text",
                )
        before = len(data["prompt"])
        answers = []
        for key in ("chosen", "rejected"):
            answers.append({"messages": data["prompt"] + data[key], "before": before})
        return answers
    for key in sorted(keys - {"messages"}):
        if not isinstance(data[key], str):
            raise SpecError(f"{key!r} must be a string, got {type(data[key]).__name__}")
    if keys == PREFERENCE:
        prompt = data["prompt"]
        return [{"prompt": prompt, "completion": data[key]} for key in ("chosen", "rejected")]
    return [{key: data[key] for key in keys}]


def _split_columns(data: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Return the columns by which a row says what is learnt, and those that are the user's own.

    Raises:
        SpecError: its columns are not those of exactly one way.
    """
    keys = WORDS & set(data)
    extra = set(data) - WORDS - {"path"}
    if keys not in WAYS:
        near = _nearest(extra, WORDS - keys)
        raise SpecError(
            "a row has a path and text, or prompt and completion, or messages, or prompt, chosen "
            f"and rejected; this has {listing(sorted(data))}{near}"
        )
    return keys, extra


def _path(data: Mapping[str, Any], extra: set[str]) -> str:
    path = data.get("path")
    if isinstance(path, str):
        return path
    # A misspelt "path" is the likeliest mistake: it is among the columns that are not read.
    if "path" not in data:
        near = _nearest(extra, {"path"})
        raise SpecError(
            f"the row has no 'path', which says its node; it has {listing(sorted(data))}{near}"
        )
    raise SpecError(f"'path' must be a string like 'fr/legal', got {path!r}")


def _nearest(columns: set[str], known: set[str]) -> str:
    """Return a suggestion for the first column that looks like a known word, or an empty string."""
    for column in sorted(columns):
        hint = suggest(column, known)
        if hint:
            return hint
    return ""


def _tokens_and_labels(data: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    if "messages" in data:
        return tokens_of_messages(data["messages"], tokenizer, before=data.get("before", 0))
    if "text" in data:
        ids = _ended(_ids(tokenizer, data["text"]), tokenizer)
        return ids, list(ids)
    start = _ids(tokenizer, data["prompt"])
    # A completion goes on from the prompt, so it must not begin with a begin-of-text token.
    rest = list(tokenizer(data["completion"], add_special_tokens=False)["input_ids"])
    rest = _ended(rest, tokenizer)
    return start + rest, [IGNORED] * len(start) + rest


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Add the end-of-text token, unless there is none or the tokenizer has added it already."""
    end = tokenizer.eos_token_id
    # A slice, not an index, because an empty text has no last token.
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
