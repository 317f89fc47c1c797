"""The options of ``lora-tree train`` that are read from text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import SpecError
from ..folder.reading.tree_place import YAML
from ..provenance import data_files
from ..runs import HeldOut, Row

__all__ = ["numbers", "numbers_by_depth", "read_held_out_options", "run_folder"]

EVALUATIONS = 10
"""Measurements in a run, if the user does not say how often."""


def read_held_out_options(
    files: Sequence[Path] | None,
    every: int | None,
    patience: int | None,
    *,
    steps: int,
    read: Callable[[Sequence[Path]], list[Row]],
    home: Path,
) -> HeldOut | None:
    """Return the held-out settings of a run; None if no option asks for any.

    Args:
        files: of --eval-data.
        every: of --eval-every.
        patience: of --patience.
        steps: of the run.
        read: reads rows.
        home: the tree's folder.

    Raises:
        LoraTreeError: a file or a row can't be read.
    """
    if not files and every is None and patience is None:
        return None
    often = every if every is not None else max(1, steps // EVALUATIONS)
    rows = read(files) if files else None
    return HeldOut(often, rows, patience, data_files(files or (), home))


def run_folder(folder: Path, run: Path | None) -> Path:
    """Return where checkpoints go, so that they are not taken for nodes of the tree.

    Raises:
        SpecError: the user named a folder in which they would be.
    """
    zoo = folder if folder.is_dir() else folder.parent
    if run is None:
        # Each YAML file of a folder is a separate tree, with separate runs.
        is_main = folder in (zoo, zoo / YAML)
        return zoo / (".training" if is_main else f".training-{folder.name}")
    # Both are resolved first: a link, or a "..", may lead into the tree from a path that looks as
    # if it lay outside.
    if run.resolve().is_relative_to(zoo.resolve()):
        inside = run.resolve().relative_to(zoo.resolve()).parts
        # Opening a folder skips every name that begins with a dot, and all below it. So one such
        # name anywhere in the path keeps the checkpoints out of the tree.
        if not any(part.startswith(".") for part in inside):
            raise SpecError(
                f"--run {run} lies in {zoo}, where folders of adapters are nodes of the tree",
                f"name one beside it, or {zoo}/.{run.name}, which the tree passes over",
            )
    return run


def numbers(pairs: list[str] | None, option: str) -> dict[str, float]:
    """Read ``fr=1e-5`` as fr: 1e-5.

    Raises:
        SpecError: a text has another form; the error names the option.
    """
    found = {}
    for pair in pairs or ():
        path, equals, number = pair.rpartition("=")
        try:
            found[path] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise SpecError(f"{option} {pair}: expected a path and a number, like fr/legal=0.5")
    return found


def numbers_by_depth(text: str | None) -> tuple[float, ...] | None:
    """Read ``0,1,3`` as a number for each depth.

    Raises:
        SpecError: the text has another form.
    """
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise SpecError(
            f"--decay-by-depth {text}: expected numbers with commas between, like 0,1,3"
        ) from None
