"""``lora-tree log``: the earlier versions of a tree's nodes, numbered, each with its origin."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ...budget import format_bytes
from ...errors import PathError, agreeing, plural, printable, suggest_path
from ...folder import Version, history
from ...weights import plain_weight
from ..arguments import AsJson, Folder, Nodes
from ..console import out, print_json

__all__ = ["list_versions"]

SHORT = 8  # digits of a content, which is enough to name a version by


def list_versions(folder: Folder, nodes: Nodes = None, as_json: AsJson = False) -> None:
    """List the versions of nodes, of removed ones too: when, by which command, from which data."""
    found = history(folder)
    wanted = _chosen(found, nodes or [])
    if as_json:
        versions = {path: _plain_versions(found[path]) for path in wanted}
        print_json({"folder": str(folder), "nodes": versions})
        return
    # Without names, nodes that have never changed are left out: they would only fill the screen.
    shown = [path for path in wanted if nodes or len(found[path]) > 1 or _is_removed(found[path])]
    for path in shown:
        _tell(path, found[path])
    if not shown:
        out().print("no node has an earlier version")
    elif not nodes and len(shown) < len(found):
        rest = len(found) - len(shown)
        have = plural(rest, "more node has", "more nodes have")
        out().print(f"{have} one version; name {agreeing(rest, 'it', 'them')} to see it")


def _chosen(found: dict[str, list[Version]], patterns: list[str]) -> list[str]:
    """Return the nodes that paths or patterns name.

    Raises:
        PathError: a path or pattern matches no node.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [pattern] if pattern in found else fnmatch.filter(found, pattern)
        if not hits:
            raise PathError(f"no versions of {pattern!r} are kept{suggest_path(pattern, found)}")
        chosen.update(hits)
    return [path for path in found if path in chosen or not patterns]


def _is_removed(versions: list[Version]) -> bool:
    return not versions[-1].is_present


def _tell(path: str, versions: list[Version]) -> None:
    last = versions[-1]
    removal = ""
    if last.until is not None:
        removal = f": removed {last.until} by {last.ended_by}"
    out().print(f"{path}{removal}", soft_wrap=True)
    if sys.stdout.isatty():
        _tell_in_lines(versions)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("", justify="right")
    for heading in ("when", "content", "weight", "loss", "size", "trained on", "data", "by"):
        table.add_column(heading, no_wrap=True)
    for number, version in enumerate(versions, 1):
        table.add_row(str(number), *(printable(text) for text in _cells(version)))
    out().print(table)


def _tell_in_lines(versions: list[Version]) -> None:
    """Print each version in two lines, which a terminal can wrap.

    A table would be cut at the terminal's edge, and with it the number that ``restore`` asks for.
    """
    for number, version in enumerate(versions, 1):
        when, content, weight, loss, size, on, data, by = map(printable, _cells(version))
        facts = [f"{number:>3}", when, content, f"weight {weight}", size]
        if loss:
            facts.append(f"loss {loss}")
        out().print("   ".join(facts), soft_wrap=True)
        origin = f"by {by}, on {on}" + (f", from {data}" if data else "")
        out().print(f"      {origin}", style="dim", soft_wrap=True)


def _cells(version: Version) -> list[str]:
    losses, training = version.losses, version.training
    loss = f"{losses[0]:.3f} → {losses[1]:.3f}" if losses is not None else ""
    data = ", ".join(file.path for file in training.data) if training is not None else ""
    return [
        version.when or "?",
        version.content[:SHORT],
        f"{version.weight:g}",
        loss,
        format_bytes(version.nbytes),
        _lineage(version),
        data,
        version.by or "?",
    ]


def _lineage(version: Version) -> str:
    """Say on which ancestors a version was trained, by their names at the time."""
    if version.on is None:
        return "?"
    steps = version.on.on.steps
    if steps is None:
        return f"lineage {version.on.on.digest[:SHORT]}"
    return " > ".join(f"{step.node} {step.content[:SHORT]}" for step in steps) or "the base"


def _plain_versions(versions: Sequence[Version]) -> list[dict[str, Any]]:
    return [_plain(version, number) for number, version in enumerate(versions, 1)]


def _plain(version: Version, number: int) -> dict[str, Any]:
    training, on = version.training, version.on
    steps = None if on is None else on.on.steps
    return {
        "number": number,
        "present": version.is_present,
        **version.as_dict(),
        "base": None if on is None else on.base.name,
        "trained_on": None
        if steps is None
        else [
            {"node": step.node, "content": step.content, "weight": plain_weight(step.weight)}
            for step in steps
        ],
        "training": None if training is None else training.model_dump(mode="json"),
    }
