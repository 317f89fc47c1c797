"""The identity of a run: the part of run.json that is equal for two runs if they are the same.

    version, settings, nodes, rows, held_out, fresh     what the run is
    step, losses, saved, …                              how far it has come

Law: two runs of one identity come to the same bits, given the same base. So a run goes on from a
checkpoint of its own identity, and from no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SpecError
from .place import LastCheckpoint
from .rows import Row
from .settings import Settings

__all__ = ["digest_of_rows", "first_difference", "refuse_other_run", "run_identity"]


def run_identity(
    settings: Settings,
    nodes: Sequence[str],
    rows: Sequence[Row],
    *,
    held_out: Mapping[str, Any] | None,
    fresh: bool,
    before: LastCheckpoint | None,
) -> dict[str, Any]:
    """Return the identity of a run, as plain data.

    Args:
        settings: how it trains.
        nodes: the nodes that train, in the order of the tree.
        rows: those that it trains on.
        held_out: how it is watched; None: it is not.
        fresh: it begins from new factors.
        before: the last checkpoint in its folder, with which the identity will be compared.
    """
    identity: dict[str, Any] = {
        "version": 1,
        "settings": settings.plain(),
        "nodes": nodes,
        "rows": digest_of_rows(rows),
    }
    if held_out is not None:
        identity["held_out"] = held_out
    # A run.json without this key is of a run that was not fresh; that run may go on.
    if fresh or (before is not None and "fresh" in before.about):
        identity["fresh"] = fresh
    return identity


def digest_of_rows(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of the tokens, labels and paths, row by row."""
    hashed = hashlib.sha256()
    for row in rows:
        # JSON, not the raw bytes: it tells apart [1, 23] and [12, 3].
        content = [row.path, row.ids, row.labels]
        if row.rejected is not None:
            content += [row.rejected.ids, row.rejected.labels]
        hashed.update(json.dumps(content).encode())
    return hashed.hexdigest()


def refuse_other_run(before: LastCheckpoint, identity: Mapping[str, Any]) -> None:
    """Refuse to begin a run where another one is unfinished.

    Raises:
        SpecError: the two differ; the error says in which key.
    """
    what = first_difference(before.about, identity)
    if what is not None:
        raise SpecError(
            f"{before.folder}: of a run with other {what}: "
            f"{_difference(before.about.get(what), identity[what])}",
            "that run is not finished: to go on with it, repeat the command that began it "
            "(lora-tree runs FOLDER lists runs)",
            "or keep the checkpoints of this run in another folder: --run DIR",
            "or give that run up: delete its checkpoint",
        )


def first_difference(about: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """Return the first key of a run.json that differs from ``identity``; None if it is the same."""
    for what, value in identity.items():
        if about.get(what) != value:
            return what
    return None


def _difference(recorded: Any, current: Any) -> str:
    if not (isinstance(recorded, dict) and isinstance(current, dict)):
        return f"was {recorded!r} and is {current!r}"
    differences = []
    for key in sorted({*recorded, *current}):
        was, now = recorded.get(key), current.get(key)
        if was != now:
            differences.append(f"{key} was {was!r} and is {now!r}")
    return "; ".join(differences)
