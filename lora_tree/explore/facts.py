"""Everything that the page of a tree shows, as one value that becomes JSON.

    folder ──▶ nodes, problems, versions, runs     headers, lock, history, records
           ──▶ norms, module by module             every adapter is read once, and not kept
           ──▶ likeness of some nodes              cosines of their increments
           ──▶ losses, path by path                the output of `lora-tree eval --json`, if given

Law: nothing is written, and a damaged node's facts are left out with the reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..algebra import Likeness, similar
from ..algebra.sums import read_uncached
from ..drawn.node_lines import NodeLine, lines_of
from ..drawn.stale_words import short_stale_text
from ..errors import FormatError, LoraTreeError, plural
from ..folder import (
    Problem,
    RunRecord,
    Version,
    check,
    disk,
    history,
    run_records,
    survey,
)
from ..formats import strict_json
from ..tree import AdapterTree
from ..weights import plain_weight
from .curves import plain_run

__all__ = ["MOST_ALIKE", "ExploreFacts", "explore_facts", "read_evaluation"]

MOST_ALIKE = 200
"""The most nodes of which all pairs are compared by default: n² numbers."""

MOST_NORMS = 1_000_000
"""The most norms of single modules that a page holds, some six megabytes."""

RUNS = 30
"""The number of a tree's last runs that a page holds."""

DIGITS = 12
"""Digits of a content that are enough to name a version."""

_EVALUATION_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class ExploreFacts:
    """The facts of one tree.

    Args:
        folder: as the user named it.
        base: of the tree.
        lines: the nodes, depth first, broken ones too.
        problems: as `lora_tree.check` found them; without norms, as `survey` did.
        modules: the names of all modules that any node adapts, sorted.
        norms: node → ‖weight · ΔW‖ by module, in the order of ``modules``; NaN: not adapted.
        likeness: cosines of some nodes; None if there are fewer than two, or too many.
        versions: node → its versions, the oldest first; only nodes with more than one.
        made: node → its present version, with the time and the command of its making.
        runs: the last runs, as plain data with their curves.
        evaluation: losses by path and domain; None if no file was given.
        notes: sentences about omissions.
    """

    folder: str
    base: str | None
    lines: tuple[NodeLine, ...]
    problems: tuple[Problem, ...]
    modules: tuple[str, ...]
    norms: Mapping[str, Sequence[float]]
    likeness: Likeness | None
    versions: Mapping[str, Sequence[Version]]
    made: Mapping[str, Version]
    runs: tuple[Mapping[str, Any], ...]
    evaluation: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as plain data, for JSON; numbers that are not finite become None."""
        reasons = {problem.node: problem for problem in reversed(self.problems) if problem.node}
        nodes = [self._node(line, reasons.get(line.path)) for line in self.lines]
        norms = {}
        for path, row in self.norms.items():
            norms[path] = [_rounded(number) for number in row]
        problems = []
        for problem in self.problems:
            problems.append({"node": problem.node, "kind": problem.kind, "text": problem.text})
        versions = {}
        for path, node_versions in self.versions.items():
            versions[path] = [
                {**version.as_dict(), "content": version.content[:DIGITS]}
                for version in node_versions
            ]
        return {
            "folder": self.folder,
            "base": self.base,
            "nodes": nodes,
            "problems": problems,
            "modules": list(self.modules),
            "norms": norms,
            "likeness": None if self.likeness is None else _plain_likeness(self.likeness),
            "versions": versions,
            "runs": list(self.runs),
            "evaluation": self.evaluation,
            "notes": list(self.notes),
        }

    def _node(self, line: NodeLine, problem: Problem | None) -> dict[str, Any]:
        row = [number for number in self.norms.get(line.path, ()) if not math.isnan(number)]
        made = self.made.get(line.path)
        losses = None if made is None else made.losses
        return {
            "path": line.path,
            "kind": line.kind,
            "weight": plain_weight(line.weight),
            "modules": line.modules,
            "ranks": line.ranks,
            "parameters": line.parameters,
            "bytes": line.bytes,
            "stale": None if line.stale is None else short_stale_text(line.path, line.stale),
            "overrides": list(line.overrides),
            "norm": _rounded(math.hypot(*row)) if row else None,
            "loss": None if losses is None else _rounded(losses[1]),
            "made": None if made is None else {"when": made.when, "by": made.by},
            "problem": None if problem is None else problem.kind,
        }


def explore_facts(
    folder: str | os.PathLike[str],
    *,
    alike: Sequence[str] | None = None,
    norms: bool = True,
    evaluation: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ExploreFacts:
    """Collect the facts of a tree.

    Args:
        folder: of the tree, or a YAML file in it.
        alike: the nodes whose increments are compared with each other, as paths or patterns; all of
            them where None, if they are no more than `MOST_ALIKE`.
        norms: read every adapter and measure its modules; without it only headers are read.
        evaluation: losses, as `read_evaluation` returns them.
        progress: called with (nodes read, nodes in all).

    Raises:
        FolderError, SpecError: there is no such folder, or it is no tree.
        PathError: a pattern of ``alike`` matches no node.

    >>> # page = explore_page(explore_facts("zoo/").as_dict())
    """
    tree, survey_problems = survey(folder)
    lines, _ = lines_of(tree, survey_problems)
    notes: list[str] = []
    measured: dict[str, dict[str, float]] = {}
    if norms:
        measured = _measured(tree, lines, notes, progress)
    modules = sorted({module for row in measured.values() for module in row})
    table: dict[str, list[float]] = {}
    if len(measured) * len(modules) <= MOST_NORMS:
        for path, row in measured.items():
            table[path] = [row.get(module, math.nan) for module in modules]
    else:
        # Too many for a page: one number a node still gives the tree its colours.
        notes.append("norms of single modules are left out: there are too many for one page")
        modules = ["all modules"]
        table = {path: [math.hypot(*row.values())] for path, row in measured.items()}
    likeness = _likeness(tree, lines, alike, notes) if norms else None
    # `check` reads every adapter, too. Without norms only the headers and the lock are looked at.
    problems = check(folder) if norms else survey_problems
    versions_by_node = history(folder)
    versions = {path: own for path, own in versions_by_node.items() if len(own) > 1}
    made = {path: own[-1] for path, own in versions_by_node.items() if own and own[-1].is_present}
    records = run_records(folder)
    if len(records) > RUNS:
        notes.append(f"the last {RUNS} of {plural(len(records), 'run')} are shown")
    return ExploreFacts(
        folder=os.fspath(folder),
        base=tree.base,
        lines=tuple(lines),
        problems=tuple(problems),
        modules=tuple(modules),
        norms=table,
        likeness=likeness,
        versions=versions,
        made=made,
        runs=tuple(_plain_runs(records[-RUNS:], notes)),
        evaluation=evaluation,
        notes=tuple(notes),
    )


def read_evaluation(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the losses in a file that ``lora-tree eval --json`` wrote.

    Raises:
        FolderError: it can't be read.
        FormatError: it holds something else.
    """
    found = strict_json.loads(
        disk.read_file(Path(file), most=_EVALUATION_BYTES, follow=True), str(file)
    )
    losses = found.get("losses")
    rows = list(losses.values()) if isinstance(losses, dict) else []
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise FormatError(
            f"{file}: expected the losses that lora-tree eval --json prints",
            "write the file: lora-tree eval FOLDER --data rows.jsonl --base MODEL --json > FILE",
        )
    return {"unit": str(found.get("unit", "")), "losses": losses}


def _measured(
    tree: AdapterTree,
    lines: Sequence[NodeLine],
    notes: list[str],
    progress: Callable[[int, int], object],
) -> dict[str, dict[str, float]]:
    """Return node → module → ‖weight · ΔW‖; add a note for each node that can't be read."""
    readable = [line.path for line in lines if line.kind == "adapter"]
    measured = {}
    for done, path in enumerate(readable):
        progress(done, len(readable))
        try:
            adapter = read_uncached(tree, path).weighed(tree[path].weight)
            measured[path] = {name: value.norm() for name, value in adapter.modules.items()}
        except LoraTreeError as error:
            notes.append(f"{path} was not measured: {str(error).splitlines()[0]}")
    progress(len(readable), len(readable))
    return measured


def _likeness(
    tree: AdapterTree, lines: Sequence[NodeLine], patterns: Sequence[str] | None, notes: list[str]
) -> Likeness | None:
    chosen = [line.path for line in lines if line.kind == "adapter"]
    if patterns is not None:
        named = set(tree.matching(patterns))
        chosen = [path for path in chosen if path in named]
    elif len(chosen) > MOST_ALIKE:
        notes.append(
            f"{plural(len(chosen), 'node')} are too many to compare all pairs: "
            "name some with --similar"
        )
        return None
    if len(chosen) < 2:
        return None
    try:
        return similar(tree, chosen)
    except LoraTreeError as error:
        notes.append(f"the nodes were not compared: {str(error).splitlines()[0]}")
        return None


def _plain_runs(records: Sequence[RunRecord], notes: list[str]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for record in records:
        try:
            found.append(plain_run(record))
        except LoraTreeError as error:
            notes.append(f"run {record.number} was not read: {str(error).splitlines()[0]}")
    return found


def _plain_likeness(likeness: Likeness) -> dict[str, Any]:
    rows = [[round(cosine, 3) for cosine in row] for row in likeness.cosines.tolist()]
    return {
        "names": list(likeness.names),
        "order": likeness.order(),
        "cosines": rows,
        "error": likeness.error,
    }


def _rounded(number: float) -> float | None:
    """Round to the four digits that a page shows, which take a third of the bytes."""
    return float(f"{number:.4g}") if math.isfinite(number) else None
