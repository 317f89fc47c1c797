"""The benchmarks run, at toy size, and tell what they timed; how fast is nothing for a test."""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling import sampled, slow

from benchmarks import (
    checkpoint,
    compare,
    decode,
    experts,
    first_use,
    flatten,
    forms,
    hooks,
    opening,
    page_locking,
    policies,
    returning,
    routed,
    switch,
    switching,
    thousands,
    training,
    trips,
    unmerged,
)
from benchmarks.common import Case, Form, Result, Timing, cycle, interleaved, tell
from benchmarks.compare import decays
from benchmarks.compare.corpora import LANGUAGES, SECTIONS, find_manuals
from benchmarks.compare.kept import Kept
from benchmarks.compare.tables import markdown_of_curve, markdown_of_late, markdown_of_rules
from benchmarks.host_link import HostLink
from benchmarks.sizes import SMALL

SIZE = replace(SMALL, hidden=32, layers=1)

# One batch with an aim and one without, one with a path for each row and one with fewer: the others
# at full size are the same function with other numbers.
FEW_BATCHES = [(8, 8, 2, (1, 16), 0.5), (16, 8, 2, (1,), None)]


@cache
def results_of(module: Any) -> list[Result]:
    """The tables of a benchmark, made once for all tests that look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed, "BATCHES", FEW_BATCHES)
        found: list[Result] = module.run(SIZE)
    return found


TIMED: list[tuple[Any, int, set[str]]] = [
    (switch, 3, {"siblings", "cousins", "PEFT, siblings", "PEFT, cousins", "floor"}),
    (
        unmerged,
        3,
        {
            "new path",
            "used before, 10 nodes",
            "used before, 20 nodes",
            "PEFT set_adapter, 10 adapters",
        },
    ),
    (flatten, 1, {"ours", "PEFT, svd"}),
    (opening, 2, {"with tree.lock", "bare folders"}),
    (routed, 6, {"bare", "auto", "nodes", "paths", "grouped", "matrix", "added, PEFT"}),
    (decode, 1, {"bare", "auto", "flattened"}),
    (training, 5, {"together", "PEFT, 8 steps"}),
    (experts, 4, {"bare", "one path", "8 rows on 8 paths", "PEFT, one adapter"}),
    (checkpoint, 1, {"merged", "copied, with fsync"}),
    (first_use, 2, {"first use", "PEFT, load_adapter of each node + set_adapter"}),
    (
        thousands,
        2,
        {
            "opening",
            "first use, 200 nodes, memory new",
            "first use, 10 nodes, memory handed on",
        },
    ),
]
"""A benchmark, how many tables it makes, and some of what its first table times."""

QUICK = [each for each in TIMED if each[0] in (switch, unmerged, flatten, routed, training)]
"""Those whose tables other tests look at, too, and the one of routed batches."""


@pytest.mark.parametrize(
    ("module", "tables", "timed"),
    sampled(TIMED, QUICK),
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else None,
)
def test_a_benchmark_times_what_it_names(
    module: object, tables: int, timed: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    results = results_of(module)
    assert len(results) == tables
    assert timed <= set(results[0].timings)
    tell(results, Form.json)
    assert [table["title"] for table in json.loads(capsys.readouterr().out)] == [
        result.title for result in results
    ]


def test_no_hook_is_left_while_merged_and_flattening_is_no_worse_than_peft() -> None:
    forward = results_of(unmerged)[1]
    assert forward.facts["hooks left while merged"] == 0
    (flat,) = results_of(flatten)
    assert flat.facts["relative error, ours"] <= 1.0001 * flat.facts["relative error, PEFT"]


def test_frozen_ancestors_take_no_memory_in_a_step_of_training() -> None:
    table = results_of(training)[-1]
    (ratio,) = table.ratios
    assert ratio.what == "most memory, deep / shallow"
    assert ratio.met


def test_systems_are_compared_at_equal_parameters_and_at_equal_rank_on_a_path() -> None:
    for name, systems in compare.SYSTEMS.items():
        cost = {s.parameters(3, 8) if name == "equal parameters" else s.on_path for s in systems}
        assert len(cost) == 1
        for system in systems:
            tree = compare.tree_of(system, ["g/a", "g/b", "h/c"])
            rank = {node: tree[node].fresh.r for node in tree if tree[node].fresh is not None}
            leaf = next(p for p in tree.leaves() if p in ("all", "all/g/b"))
            assert sum(rank.get(node, 0) for node in tree.lineage(leaf)) == system.on_path


@slow
def test_a_comparison_trains_every_system_on_the_same_rows_and_tells_every_table() -> None:
    leaves, outcomes = compare.compare(compare.SMALL)
    told = compare.markdown(leaves, outcomes)
    assert len(outcomes) == 1 + 2 * 2 * 4
    assert all(len(o.bits) == 2 and len(set(o.bits)) == 2 for o in outcomes[1:])
    assert told.count("\n### ") == 4
    assert told.count("\n| leaf | pooled | flat | tree, alone | tree |") == 4
    assert all(told.count(f"\n| {leaf} | ") == 4 for leaf in leaves)
    assert all(
        told.count(f"\n| {name} |") == 4 for name in ("pooled", "flat", "tree, alone", "tree")
    )


@slow
def test_a_comparison_that_was_stopped_goes_on_and_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, made = Kept(tmp_path / "kept"), []
    train = compare.runs.trained

    def at_most(limit: int) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if len(made) == limit:
                raise KeyboardInterrupt
            made.append(args)
            return train(*args, **kwargs)

        return run

    monkeypatch.setattr(compare.runs, "trained", at_most(9))
    with pytest.raises(KeyboardInterrupt):
        compare.compare(compare.SMALL, kept=kept)
    files = set((tmp_path / "kept").iterdir())
    assert len(files) == 1 + 9  # the base, and a file for each run
    monkeypatch.setattr(compare.runs, "trained", at_most(-1))
    stopped = compare.compare(compare.SMALL, kept=kept)
    total = len(made)
    assert compare.compare(compare.SMALL, kept=kept) == stopped
    assert len(made) == total  # nothing is trained a second time
    assert compare.compare(compare.SMALL) == stopped
    assert len(made) == 2 * total
    assert files < set((tmp_path / "kept").iterdir())


def test_every_policy_serves_no_more_than_the_one_that_knows_the_future_without_a_clock() -> None:
    (table,) = policies.run(SIZE)
    assert policies.run(SIZE)[0].facts == table.facts
    for skew in policies.SKEWS:
        found = {name: table.facts[f"skew {skew}: {name}: served"] for name in policies.POLICIES}
        loaded = {name: table.facts[f"skew {skew}: {name}: loaded"] for name in policies.POLICIES}
        assert max(found.values()) == found["nodes, offline"]
        assert min(loaded.values()) == loaded["nodes, offline"]
        assert found["nodes, LRU, leaves first"] == found["nodes, LRU"]


def test_rounds_are_interleaved_and_the_first_does_not_count() -> None:
    calls: list[str] = []
    cases = {
        "a": Case(lambda: calls.append("a"), lambda: calls.append("prepare a")),
        "b": Case(lambda: calls.append("b")),
    }
    timings = interleaved(cases, 2)
    assert calls == ["prepare a", "a", "b"] * 3
    assert all(len(timing.rounds_ms) == 2 for timing in timings.values())


def test_what_one_adds_over_another_is_taken_round_by_round() -> None:
    slow, fast = Timing((10.0, 30.0, 20.0)), Timing((9.0, 28.0, 17.0))
    assert slow.over(fast).rounds_ms == (1.0, 2.0, 3.0)
    assert slow.over(fast).ms == 2.0
    assert slow.plus(fast).ms == 37.0


def test_a_missed_aim_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result("title", {"x": Timing((1.0, 2.0, 3.0))})
    result.aim("slower", 3.0, at_most=2.0)
    result.aim("faster", 30.0, at_least=25.0)
    tell([result])
    printed = capsys.readouterr().out
    assert printed.count("missed") == 1
    assert "1.500 – 2.500" in printed


def test_a_cycle_starts_again() -> None:
    following = cycle("a", "b")
    assert [following() for _ in range(5)] == ["a", "b", "a", "b", "a"]


def test_the_forms_of_a_sum_are_timed_beside_the_one_that_is_taken() -> None:
    told = forms.measured((8, 4, 2, 3), (32, 48), 0.0)
    names = {"auto", "nodes", "paths", "grouped", "matrix"}
    assert told.timed.keys() == told.laid_out.keys() == names
    assert told.over_fastest >= 1.0
    assert str(told).startswith("8 rows over 4 paths, 3 tokens a row, 32 → 48: ")


def test_a_switch_changes_files_half_as_often_as_it_did() -> None:
    moves = {trip.name: trip.moves for trip in trips.trips()}
    # Half of what they were when they were first counted: 104, 147, 193 and 19.
    most = {
        "activate merged, a path seen before": 52,
        "activate unmerged, first": 73,
        "route of four rows and a forward, again": 96,
        "forward unmerged, again": 9,
    }
    assert moves.keys() == most.keys()
    assert {name: count for name, count in moves.items() if count > most[name]} == {}


def test_the_hosts_part_of_a_forward_is_taken_for_a_path_and_for_batches() -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    assert hooks.hooked(sites=3, rounds=1).keys() == {"path", "batch", "another batch"}


def test_what_comes_back_to_a_device_is_sent_and_nothing_is_laid_out() -> None:
    seen = returning.returned(2, sites=3, rounds=1)
    assert (seen.transfers, len(seen.seconds), seen.laid_out_bytes) == (2 * 2 * 11, 11, 0)


def test_a_switch_seen_before_lays_nothing_out_and_is_timed_on_both_sides_of_its_launch() -> None:
    seen = switching.switched(1, repeats=4)
    assert (seen.laid_out, len(seen.before), len(seen.after)) == (2, 4, 4)
    assert min(seen.before) > 0.0
    if importlib.util.find_spec("triton") is not None:
        logged = switching.switched(1, repeats=4, logged=True)
        assert (len(logged.before), len(logged.after)) == (4, 4)


def test_manual_pages_that_are_not_installed_are_skipped(tmp_path: Path) -> None:
    assert find_manuals(8, tmp_path) == []
    for language in LANGUAGES:
        for section in SECTIONS:
            folder = tmp_path / language / f"man{section}"
            folder.mkdir(parents=True)
            for page in range(10):
                text = f"{language} {section} {page} ".encode() * 1000
                (folder / f"{page}.gz").write_bytes(gzip.compress(text))
    found = find_manuals(8, tmp_path)
    assert [leaf.path for leaf in found] == [f"{x}/{y}" for x in LANGUAGES for y in SECTIONS]
    assert [(len(leaf.train), len(leaf.held_out)) for leaf in found] == [(8, 2)] * 8


def test_a_rule_by_rows_decays_a_leaf_with_few_rows_more() -> None:
    rows = {"g/a": torch.zeros(100), "g/b": torch.zeros(400)}
    found = decays.shrinkages(rows, decays.RULES["by rows"])
    # The geometric mean of the leaves is 200.
    assert found == pytest.approx(
        {"all": 0.0, "all/g": 0.008, "all/g/a": 0.024 * 2, "all/g/b": 0.024 / 2}
    )
    told = decays.decay_rules(compare.SMALL)
    assert [(name, len(bits)) for name, bits in told] == [(name, 2) for name in decays.RULES]
    assert markdown_of_rules(told).count("\n") == 2 + len(decays.RULES)


def test_longer_training_and_a_late_leaf_are_told_as_tables() -> None:
    points = compare.curve(compare.SMALL)
    assert [steps for steps, _, _ in points] == [1, 2] * 4
    assert markdown_of_curve(points).count("\n") == 4
    late = compare.late_leaf(compare.SMALL)
    told = markdown_of_late(late)
    assert told.startswith(
        "| share of its data | parent | leaf | leaf, fitted | flat | pooled, on |"
    )
    assert all(leaf.bits["wide leaf"] > 0 for leaf in late)
    assert all(leaf.bits["leaf, fitted"] > 0 for leaf in late)


def test_page_locking_prints_a_line_for_each_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page_locking.main()
    assert capsys.readouterr().out == "no CUDA device here: nothing was measured\n"
    # Host memory plays the device, and copies are done at once.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(page_locking, "NBYTES", 1 << 20)
    monkeypatch.setattr(page_locking, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(page_locking, "CudaLink", lambda device: HostLink())
    monkeypatch.setattr(page_locking, "_copy", _copied)
    monkeypatch.setattr(
        page_locking, "_locked_by_torch", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)
    )
    page_locking.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.endswith(" ms") for line in lines)


def _copied(to: torch.Tensor, stage: torch.Tensor) -> None:
    to.copy_(stage)
