"""The identity of a run: what makes two runs the same one, and what of them differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_tree.errors import SpecError
from lora_tree.runs import Row, Settings
from lora_tree.runs.identity import digest_of_rows, first_difference, refuse_other_run, run_identity
from lora_tree.runs.place import LastCheckpoint

ROWS = [Row("fr", (1, 23), (1, 23), "rows.jsonl:1")]
SETTINGS = Settings(steps=4)


def identity(**other: Any) -> dict[str, Any]:
    given = {"settings": SETTINGS, "nodes": ["fr"], "rows": ROWS} | other
    watched = given.pop("held_out", None)
    fresh, before = given.pop("fresh", False), given.pop("before", None)
    return run_identity(**given, held_out=watched, fresh=fresh, before=before)


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("settings", {"settings": replace(SETTINGS, lr=0.5)}),
        ("nodes", {"nodes": ["de"]}),
        ("rows", {"rows": [*ROWS, *ROWS]}),
        ("held_out", {"held_out": {"every": 2}}),
        ("fresh", {"fresh": True}),
    ],
)
def test_every_part_tells_two_runs_apart(what: str, other: dict[str, Any]) -> None:
    assert first_difference(identity(), identity()) is None
    assert first_difference(identity(), identity(**other)) == what


def test_rows_are_told_apart_by_where_their_tokens_end() -> None:
    apart = [replace(ROWS[0], ids=(12, 3), labels=(12, 3))]
    assert digest_of_rows(ROWS) == digest_of_rows(list(ROWS))
    assert digest_of_rows(ROWS) != digest_of_rows(apart)


def test_a_run_json_that_does_not_say_fresh_is_of_a_run_that_was_not() -> None:
    silent = LastCheckpoint(Path("checkpoint-2"), identity(), 2)
    told = LastCheckpoint(Path("checkpoint-2"), identity(fresh=True), 2)
    assert first_difference(silent.about, identity(before=silent)) is None
    assert first_difference(told.about, identity(before=told)) == "fresh"


def test_another_unfinished_run_is_refused_with_what_differs() -> None:
    before = LastCheckpoint(Path("run/checkpoint-2"), identity(), 2)
    refuse_other_run(before, identity())
    with pytest.raises(SpecError) as refused:
        refuse_other_run(before, identity(settings=replace(SETTINGS, lr=0.5)))
    assert str(refused.value).splitlines()[0] == (
        f"{Path('run/checkpoint-2')}: of a run with other settings: "
        f"lr was {SETTINGS.lr!r} and is 0.5"
    )
