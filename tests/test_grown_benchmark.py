"""The benchmark of many adapters runs at toy size and goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sampling import slow
from typer import Typer
from typer.testing import CliRunner

import lora_tree as lt
from benchmarks.grown import __main__ as command
from benchmarks.grown import thousand
from benchmarks.grown.measure import relative_error
from benchmarks.grown.methods import flat_bytes, methods
from benchmarks.grown.tables import Point, least_bytes

SIZE = thousand.ThousandSize(adapters=5, modules=2, hidden=16)


def test_a_command_that_was_stopped_goes_on_writing_and_grows(tmp_path: Path) -> None:
    thousand.write_adapters(tmp_path, SIZE)
    kept = tmp_path / "n0001" / "adapter_model.safetensors"
    lost = tmp_path / "n0003" / "adapter_model.safetensors"
    before, when = lost.read_bytes(), kept.stat().st_mtime_ns
    # A stop in the midst of an adapter leaves its files under the other name.
    lost.parent.rename(tmp_path / ".n0003")
    thousand.write_adapters(tmp_path, SIZE)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == when
    assert lt.load(tmp_path).paths() == [f"n000{i}" for i in range(5)]
    found = thousand.grew(tmp_path, 0.1)
    assert found.bytes_before == 5 * 2 * 16 * 32 * 2
    assert found.bytes_after < found.bytes_before
    assert 0 < found.relative_error <= 0.1
    assert found.passes > 1
    assert found.peak_bytes > 10**7


def test_drawn_adapters_share_what_is_said_of_them() -> None:
    size = thousand.ThousandSize(modules=1, hidden=64)

    def dense(index: int) -> torch.Tensor:
        value = thousand.adapter_of(index, size).modules["model.layers.0.m0"]
        return value.B.double() @ value.A.double()

    def rank_of_difference(one: int, other: int) -> int:
        sizes = torch.linalg.svdvals(dense(one) - dense(other))
        # Factors are rounded to bf16, all in the same way, so what is shared goes exactly.
        return int((sizes > 1e-6 * sizes[0]).sum())

    assert rank_of_difference(0, thousand.GROUP - 1) == 2 * 6
    assert rank_of_difference(0, thousand.GROUP) == 2 * (4 + 6)


@pytest.mark.parametrize("method", ["grow", "compress"])
def test_a_method_keeps_within_the_bytes(tmp_path: Path, method: str) -> None:
    thousand.write_adapters(tmp_path, SIZE)
    flat = lt.load(tmp_path)
    whole = flat_bytes(flat)
    made = methods({})[method](tmp_path, whole // 2)
    assert made is not None
    assert made.nbytes <= whole // 2
    assert sorted(made.adapters) == flat.paths()
    assert 0.0 < relative_error(made.adapters, flat) < 1.0


def test_the_least_bytes_lie_between_two_budgets() -> None:
    points = [
        Point("flat", 1.0, 1.0, 0.0, 2.0),
        Point("grow", 0.1, 0.1, 0.5, 2.04),
        Point("grow", 0.3, 0.3, 0.1, 2.0),
    ]
    assert least_bytes(points, "grow") == pytest.approx(0.2)


@slow
def test_the_command_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BUDGETS", (0.5,))
    app = Typer()
    app.command()(command.main)
    given = [str(tmp_path), "--small", "--kind", "known", "--json"]
    first = CliRunner().invoke(app, given)
    assert first.exit_code == 0, first.output
    kept = tmp_path / "known-6.json"
    when = kept.stat().st_mtime_ns
    second = CliRunner().invoke(app, given)
    assert second.exit_code == 0, second.output
    assert kept.stat().st_mtime_ns == when
    points = json.loads(second.stdout)["6 adapters, known"]
    assert {"base", "flat", "grow", "compress"} <= {point["method"] for point in points}
