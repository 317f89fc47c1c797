"""Options and output of the commands that change a tree."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..algebra import Edited, made_stale
from ..base_names import other_base
from ..errors import SpecError, listing, plural
from ..tree import AdapterTree
from .command_notes import command_note
from .console import out, print_json

__all__ = ["DryRun", "MaxError", "Rank", "Work", "adapter_text", "check_only_with_keep_effective"]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would change, and write nothing.")
]
Rank = Annotated[int | None, typer.Option(help="The largest rank in a module; exact without it.")]
MaxError = Annotated[
    float | None,
    typer.Option(help="The largest relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ allowed in a module."),
]

ROUNDING = 1e-6
"""Relative errors below this come from factors in fp32, not from a cut."""


def check_only_with_keep_effective(
    keep_effective: bool, rank: int | None, max_error: float | None
) -> None:
    """Refuse bounds on new increments in a command that makes none.

    Raises:
        SpecError: one was given without ``--keep-effective``.
    """
    if not keep_effective and (rank, max_error) != (None, None):
        raise SpecError(
            "--rank and --max-error are for --keep-effective; without it nothing is cut",
            "give --keep-effective as well, or leave them out; lora-tree compress cuts nodes",
        )


class Work:
    """One command's change of a tree: made in memory, saved as one transaction, and reported.

    Args:
        tree: as it was opened. The command changes it after this.
        folder: of the tree.
        dry_run: save nothing, and refuse what the save would refuse.
    """

    def __init__(self, tree: AdapterTree, folder: Path, *, dry_run: bool) -> None:
        self.tree, self.folder, self.dry_run = tree, folder, dry_run
        # The copy shares the adapters and costs next to nothing. The command changes `tree` only.
        self._before = copy.copy(tree)

    def finish(
        self, edited: Edited, *, as_json: bool, copy_files: bool = False, **more: Any
    ) -> None:
        """Save the tree, and say what happened to it.

        Args:
            edited: what the command changed.
            as_json: print one JSON document.
            copy_files: bring adapters that live elsewhere into the folder.
            more: further figures, for the JSON document alone.
        """
        # Computed before the save, which updates the marks that `made_stale` reads.
        stale = made_stale(self._before, self.tree, edited.moved)
        removed = [p for p in self._before.paths() if edited.moved.get(p, p) not in self.tree]
        note = command_note(moved=edited.moved)
        self.tree.save(self.folder, copy=copy_files, note=note, dry_run=self.dry_run)
        if as_json:
            document = {"folder": str(self.folder), "dry_run": self.dry_run}
            effects = {"removed": removed, "stale": stale}
            print_json(document | edited.as_dict() | effects | more)
            return
        # After the save: no line may say "added" above an error that says that nothing was saved.
        for line in self._lines(edited, removed, stale):
            out().print(line, soft_wrap=True)

    def _lines(self, edited: Edited, removed: list[str], stale: list[str]) -> list[str]:
        lines = [f"added {path}: {adapter_text(self.tree, path)}" for path in edited.added]
        for old, new in edited.moved.items():
            lines.append(f"moved {old} to {new}")
        for path in removed:
            lines.append(f"removed {path}")
        for path in edited.changed:
            lines.append(f"changed {path}: {adapter_text(self.tree, path)}")
        lines += _errors(edited)
        for note in edited.notes:
            lines.append(f"note: {note}")
        if stale:
            lines.append(f"stale from now on: {listing(stale)}: trained on another lineage")
        if self.dry_run:
            lines.append("dry run: nothing was written")
        return lines


def adapter_text(tree: AdapterTree, path: str) -> str:
    """Describe a node and its content in a few words."""
    node, adapter = tree[path], tree.outline(path)
    weight = "" if node.weight == 1.0 else f", weight {node.weight:g}"
    if adapter is None:
        kind = "a group" if node.fresh is None else "fresh, made when the tree is attached"
        return kind + weight
    ranks = "/".join(map(str, sorted(set(adapter.ranks.values()))))
    of = f", made for {adapter.base}" if other_base(adapter.base, tree.base) else ""
    size = f"{plural(len(adapter), 'module')}, r={ranks}, {plural(adapter.nbytes, 'byte')}"
    return f"an adapter of {size}{weight}{of}"


def _errors(edited: Edited) -> list[str]:
    lines = []
    for path, deviation in edited.errors.items():
        if deviation.error == 0.0:
            lines.append(f"error of {path}: none, exact")
            continue
        if deviation.worst < ROUNDING:
            lines.append(f"error of {path}: none beyond rounding")
            continue
        worst = max(deviation.relative, key=lambda name: deviation.relative[name])
        text = f"error of {path}: {deviation.relative_error:.2g} of its norm"
        if math.isinf(deviation.worst):
            # The norm before was 0, so no relative error can be given, however small the change.
            text += f"; {worst} had no increment before, and has one now"
        else:
            text += f", at most {deviation.worst:.2g} in a module ({worst})"
        lines.append(text)
    return lines
