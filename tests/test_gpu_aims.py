"""The aims that a GPU run of the benchmarks prints are those of docs/benchmarks.md."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sampling import slow

from benchmarks import gpu, training
from benchmarks.sizes import SMALL

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
JOINT = r"\[a step of 8 leaves with 1, 4 and 16 rows each, PEFT / ours\]"


def aims_of(row: str) -> list[float]:
    """The numbers in the last cell of a table's row, which is found by its beginning."""
    (line,) = re.findall(rf"^\| {row}.*$", PAGE, re.MULTILINE)
    aims = re.sub(r"\(.*?\)", "", line.strip("| ").split("|")[-1])
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", aims)]


def aimed() -> dict[str, list[float]]:
    """Return the name of each row of benchmarks/gpu.py → its aims, as they are written there."""
    found: dict[str, list[float]] = {}
    for node in ast.walk(ast.parse(Path(gpu.__file__).read_text())):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(".aim"):
            continue
        for keyword in node.keywords:
            if keyword.arg in ("at_least", "at_most"):
                bounds = ast.unparse(keyword.value).split("zip(ROUTED, ")[-1].split(", strict")[0]
                numbers = re.findall(r"\d+(?:\.\d+)?", bounds)
                found[ast.unparse(node.args[0]).strip("'")] = [float(each) for each in numbers]
    return found


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("PEFT / ours, siblings", r"\[how fast is a merged switch\? PEFT / ours\]\(#merged-sw"),
        ("siblings / floor", r"\[the same beside a copy of the weights, ours / copy\]"),
        ("siblings / floor", r"\[H100: merged switch / a copy of the weights\]"),
        ("siblings, undo log / floor", r"\[H100: undo log, first form of its kernel"),
        ("undo log, % of the touched weights", "memory of the undo log"),
        ("first merge, s", "first merge, kernels compiled before"),
        ("unmerged / bare", r"\[H100: the same in a CUDA graph / bare\]"),
        ("added", r"\[H100: 64 rows on 64 paths, 1, 16 and 128 tokens a row, with"),
        ("another batch − one used before", r"\[H100: another such batch instead"),
        ("host tier → active / one copy", r"\[host tier → active, ours / one copy\]"),
        ("host tier → active / one copy", r"\[H100: host tier → active / one copy\]"),
        ("first use", r"\[H100: first use of an adapter of 84 MB\]"),
    ],
)
def test_a_row_has_the_aim_of_the_document(name: str, row: str) -> None:
    # Behind the aim of a first merge stands what it took under a profiler.
    aims = aims_of(row)[:1] if name == "first merge, s" else aims_of(row)
    assert aimed()[name] == aims


def test_an_unmerged_forward_has_the_aim_of_the_document() -> None:
    (aim,) = aims_of(r"\[H100: an unmerged forward of 1 token adds\]")
    assert f'(("1 token", {aim})' in Path(gpu.__file__).read_text()


@slow
def test_a_joint_step_on_a_gpu_has_the_aims_of_the_document() -> None:
    aims = aims_of(JOINT)
    assert aims == [4.0, 3.0, 2.4]
    assert "and micro-batches at 1.3 × four small steps" in PAGE
    size = replace(SMALL, hidden=32, layers=1)
    tables = training.joint(size, torch.float32, torch.device("cpu"), for_gpu=True)[:3]
    told = [{ratio.what: ratio.bound for ratio in table.ratios} for table in tables]
    assert [each["PEFT / ours"] for each in told] == aims
    micro = "4 micro-batches / 4 small steps"
    assert [each.get(micro) for each in told] == [None, 1.3, 1.3]
    assert [micro.split(" / ")[1] in table.timings for table in tables] == [False, True, True]


@slow
def test_a_joint_step_on_a_cpu_has_its_own_aims() -> None:
    size = replace(SMALL, hidden=32, layers=1)
    tables = training.joint(size, torch.float32, torch.device("cpu"))[:3]
    assert [[ratio.bound for ratio in table.ratios] for table in tables] == [[1.5], [1.0], [1.0]]
    assert aims_of(r"\[a training step of 8 leaves with 1 row each, PEFT / ours\]") == [1.5]
