"""Arguments and options that several commands have."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FormatError, SpecError, plural
from ..weights import Weight, parse_weight
from .console import keep_quiet, stdout_is_json

__all__ = [
    "AsJson",
    "Base",
    "BatchSize",
    "Data",
    "Folder",
    "Length",
    "MeasuredBeta",
    "Nodes",
    "On",
    "Quiet",
    "SkipBroken",
    "TrustRemoteCode",
    "WeightText",
    "advise_skip",
    "file_name",
    "parse_weight_option",
]


def _only_json(context: typer.Context, wanted: bool) -> bool:
    """Keep stdout for the JSON document alone until the command is done."""
    # Done in the option's callback, not in each command: an import or a warning may print before a
    # command's first line, and that must stay off stdout, too.
    if wanted:
        context.with_resource(stdout_is_json())
    return wanted


def file_name(text: str) -> Path:
    """Return the path that a word of the command line names.

    An empty word is wrong usage. A shell passes one where a variable is not set (``lora-tree rm
    "$ZOO" fr``), and ``Path("")`` would be the current folder.
    """
    if not text:
        raise typer.BadParameter(
            "'' is not the name of a folder or a file; is a variable of your shell not set? "
            "the current folder is '.'"
        )
    return Path(text)


def parse_weight_option(texts: Sequence[str] | None, option: str = "--weight") -> Weight | None:
    """Return the weight that an option says; None if it was not given.

    Raises:
        SpecError: the text is no weight, or the option was given twice; the error names the option.
    """
    if not texts:
        return None
    if len(texts) > 1:
        # Command lines usually let the last one count, and ignore the others silently.
        raise SpecError(
            f"{option} was given {plural(len(texts), 'time')}",
            f"write one: {option} {','.join(texts)!r}",
        )
    return parse_weight(texts[0], option)


@contextmanager
def advise_skip(folder: Path, *, skips: bool) -> Iterator[None]:
    """Add to a broken adapter's error the advice that the command can go on without it.

    `load` gives that advice itself, for the problems that it finds. But it reads no weights, so a
    truncated file fails only later, with an error that names the first such node alone.

    Args:
        folder: of the tree.
        skips: the user gave --skip-broken.
    """
    try:
        yield
    except FormatError as error:
        if skips:
            raise
        raise error.advised(
            f"lora-tree check {shlex.quote(str(folder))} lists all that is broken; "
            "to go on without it: --skip-broken"
        ) from error


def _no_progress(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        # The context is closed when the command ends, by an error too, so the next command that
        # this process runs prints its progress again.
        context.with_resource(keep_quiet())
    return wanted


def _check_versions(names: list[str] | None) -> list[str]:
    """Refuse a name without a version, which would change nothing."""
    for name in names or ():
        if "@" not in name:
            raise SpecError(f"--on {name} names no version", "write fr@2; see lora-tree log")
    return names or []


AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, for programs.", callback=_only_json)
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", help="Print no progress and no notes.", callback=_no_progress),
]
Folder = Annotated[
    Path,
    typer.Argument(
        help="A folder of adapters, or a tree.yaml.", metavar="FOLDER", parser=file_name
    ),
]
Nodes = Annotated[
    list[str] | None,
    typer.Argument(help="Take these nodes: paths, or patterns like 'fr/*'.", metavar="NODES"),
]
On = Annotated[
    list[str] | None,
    typer.Option(
        help="Read the tree with this version of a node in place: fr@2.",
        metavar="NODE@VERSION",
        callback=_check_versions,
    ),
]
Data = Annotated[
    list[Path],
    typer.Option(
        help="Read rows from this file of JSON lines; see lora-tree help data.",
        metavar="FILE",
        parser=file_name,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="Use this base, a folder or a hub id; without it the one that the tree names.",
        metavar="MODEL",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that the base brings along."),
]
SkipBroken = Annotated[
    bool,
    typer.Option(
        "--skip-broken", help="Leave out nodes that can't be used, and everything below them."
    ),
]
WeightText = Annotated[
    list[str] | None,
    typer.Option(
        help="Factor on its increments: a number, or '*.down_proj=0.5,default=1'.",
        metavar="WEIGHT",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Run this many rows at once.")]
MeasuredBeta = Annotated[
    float,
    typer.Option(help="DPO's beta, for rows with chosen and rejected; the one of their training."),
]
Length = Annotated[int, typer.Option(min=2, help="Cut each row after this many tokens.")]
