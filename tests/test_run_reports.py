"""What a run did is drawn, listed, compared, and told to tensorboard, with the numbers of its
record.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import shell
import torch
from shell import Shell

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.demo.bytelevel import open_base
from lora_tree.drawn.curves import curves_picture
from lora_tree.runs import HeldOut, Run, Settings, compare_runs, loop, read_rows
from lora_tree.runs.step import take_step

PATHS = ("fr/legal", "fr/medical", "de")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with three runs: two that ended, with other rates, and one that was stopped."""
    folder = tmp_path_factory.mktemp("place")
    base = shell.save_base(folder / "base")
    zoo = shell.fresh_zoo(folder / "zoo", base, r=2, target_modules=["q_proj"])
    lines = [{"path": PATHS[i % 3], "text": f"row {i} {'of ' * (i % 4)}"} for i in range(12)]
    for name, some in (("rows", lines), ("held", lines[::2])):
        text = "".join(json.dumps(line) + "\n" for line in some)
        (folder / f"{name}.jsonl").write_text(text)
    for lr, steps in ((1e-2, 6), (3e-2, 6), (3e-2, 9)):
        trained(folder, zoo, lr=lr, steps=steps, stop=4 if steps == 9 else None)
    return folder


def trained(folder: Path, zoo: Path, *, lr: float, steps: int, stop: int | None) -> None:
    import transformers

    tree = lt.load(zoo)
    torch.manual_seed(0)
    model = lt.attach(tree, open_base(folder / "base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    rows = read_rows([folder / "rows.jsonl"], tree, tokenizer)
    held = read_rows([folder / "held.jsonl"], tree, tokenizer)
    run = Run(
        model,
        rows,
        Settings(steps=steps, batch=4, lr=lr, hold_back=0.0),
        zoo / f".run-{lr}-{steps}",
        held_out=HeldOut(every=2, rows=held),
        data=lt.data_files([folder / "rows.jsonl"], zoo),
        records=zoo,
        by=f"test --lr {lr}",
    )
    for step in run.steps():
        if step.number == stop:
            return
    run.save()
    model.trainable()
    tree.save(zoo, note=run.note("test"))
    run.finish()
    model.detach()


@pytest.fixture
def zoo(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place, tmp_path / "place")) / "zoo"


# ---------------------------------------------------------------------- curves
def test_every_node_is_a_line_through_its_losses_on_both_sides(zoo: Path) -> None:
    record = lt.run_records(zoo)[0]
    lines = lines_of(curves_picture([record]))
    assert len(lines) == 2 * len(PATHS)
    steps = {node: [m for m in record.metrics() if m.node == node] for node in record.nodes}
    for node, drawn in zip(record.nodes, lines[:3], strict=True):
        check_line(drawn, [(m.step, m.loss) for m in steps[node]], lines[:3])
    for node, drawn in zip(record.nodes, lines[3:], strict=True):
        mine = [(e.step, e.loss) for e in record.evaluations() if e.path == node]
        check_line(drawn, mine, lines[3:])
        assert record.node_evaluations()[node] == mine


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """The points of every line that is no part of the grid."""
    found = []
    for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline"):
        if line.get("stroke") != "#e4e8ec":
            pairs = (line.get("points") or "").split()
            found.append([tuple(map(float, pair.split(","))) for pair in pairs])
    return found  # type: ignore[return-value]


def check_line(drawn: Any, losses: Any, all_lines: Any) -> None:
    """The points are one straight map of steps and losses."""
    assert len(drawn) == len(losses)
    (x0, y0), (x1, _) = drawn[0], drawn[-1]
    low = max(range(len(losses)), key=lambda i: losses[i][1])
    high = min(range(len(losses)), key=lambda i: losses[i][1])
    slope = (drawn[high][1] - drawn[low][1]) / (losses[high][1] - losses[low][1])
    assert slope < 0, "a lower loss stands lower, and y grows downwards"
    for (x, y), (step, loss) in zip(drawn, losses, strict=True):
        part = (step - losses[0][0]) / (losses[-1][0] - losses[0][0])
        assert x == pytest.approx(x0 + part * (x1 - x0), abs=0.01)
        assert y == pytest.approx(y0 + slope * (loss - losses[0][1]), abs=0.05)
        assert 44 <= y <= 284


def test_a_picture_of_anything_is_whole_and_bounded(zoo: Path) -> None:
    record = lt.run_records(zoo)[0]
    long = [
        lt.NodeMetric(step, "de", math.nan if step % 7 == 0 else 1 / step, 3, 1.0, 0.1, 0.1)
        for step in range(1, 5001)
    ]

    class Long(lt.RunRecord):
        def metrics(self) -> list[lt.NodeMetric]:
            return long

        def evaluations(self) -> list[lt.PathMetric]:
            return [lt.PathMetric(0, "de", math.inf, 1)]

    told = vars(record) | {"nodes": ("de", "</text><script>"), "done": 5000}
    svg = curves_picture([Long(**told)])
    (line,) = lines_of(svg)
    assert len(line) <= 200
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg
    empty = replace(record, folder=zoo / "nowhere", done=0)
    ElementTree.fromstring(curves_picture([empty]))
    two = lt.run_records(zoo)[:2]
    names = [text.text for text in ElementTree.fromstring(curves_picture(two)).iter(f"{SVG}text")]
    assert {"1: de", "2: de"} <= set(names)


# ---------------------------------------------------------------------- the list
def test_runs_are_listed_told_and_compared(zoo: Path, capsys: Any) -> None:
    run = Shell(capsys)
    code, out, _ = run("runs", zoo)
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["run", "state", "began", "steps", "nodes", "loss", "held-out"]
    assert [(line[0], line[1], line[3]) for line in lines[1:]] == [
        ("1", "finished", "6/6"),
        ("2", "finished", "6/6"),
        ("3", "stopped", "4/9"),
    ]
    records = lt.run_records(zoo)
    outcomes = records[0].outcomes.values()
    mean = sum(one.after or 0 for one in outcomes) / len(outcomes)
    assert lines[1][-1] == f"{mean:.3f}"

    code, out, _ = run("runs", zoo, "2", "--picture", zoo / "two.svg")
    assert code == 0
    assert out.splitlines()[0] == "run 2: finished, 6 of 6 steps"
    assert "test --lr 0.03" in out
    assert (zoo / "two.svg").read_text() == curves_picture([records[1]])

    code, out, _ = run("runs", zoo, "1", "3")
    first, second = out.split("\n\n")
    table = {line.split()[0]: line.split()[1:] for line in first.splitlines()}
    assert table == {
        "setting": ["run", "1", "run", "3"],
        "steps": ["6", "9"],
        "lr": ["0.01", "0.03"],
    }
    losses = {line.split()[0]: line for line in second.splitlines()[1:]}
    for node in records[0].nodes:
        for record in (records[0], records[2]):
            one = record.outcomes[node]
            assert f"{one.last:.3f}, held-out {one.after:.3f} at {one.best_step}" in losses[node]
    told = shell.answer(run, "runs", zoo, "1", "3")
    assert told["comparison"]["differs"] == {"steps": [6, 9], "lr": [0.01, 0.03]}
    assert [one["number"] for one in told["runs"]] == [1, 3]
    assert told["runs"][0]["data"][0]["path"] == "../rows.jsonl"

    code, _, err = run("runs", zoo, "7")
    assert (code, err.strip()) == (1, "error: no run 7; the runs are 1, 2, 3")
    shutil.rmtree(zoo / ".runs")
    assert run("runs", zoo)[1].strip() == "no run of this tree is kept"
    assert shell.answer(run, "runs", zoo)["runs"] == []


def test_what_one_run_does_not_have_is_no_setting_of_it(zoo: Path) -> None:
    one, other, _ = lt.run_records(zoo)
    about = {key: value for key, value in other.about.items() if key != "held_out"}
    alone = replace(other, about=about, nodes=("de",), outcomes={"de": other.outcomes["de"]})
    compared = compare_runs([one, alone])
    assert compared.differs["eval every"] == (2, None)
    assert compared.differs["nodes"] == (list(one.nodes), ["de"])
    assert compared.outcomes["fr/legal"] == (one.outcomes["fr/legal"], None)
    assert compare_runs([one, one]).differs == {}


# ---------------------------------------------------------------------- trackers
def test_tensorboard_is_told_what_the_record_says_also_after_a_stop(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    zoo = Path(shutil.copytree(place, tmp_path / "place")) / "zoo"
    shutil.rmtree(zoo / ".runs")
    words = ("train", zoo, "--data", place / "rows.jsonl", "--eval-data", place / "held.jsonl",
             "--steps", "8", "--batch", "4", "--seed", "3", "--save-every", "3",
             "--report-to", "tensorboard", "--picture", tmp_path / "out.svg")  # fmt: skip

    class Killed(BaseException):
        pass

    def step_or_die(*args: Any, done: int, **more: Any) -> Any:
        if done == 5:
            raise Killed
        return take_step(*args, done=done, **more)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "take_step", step_or_die)
        with pytest.raises(Killed):
            main([str(word) for word in words])
    capsys.readouterr()
    code, _, err = Shell(capsys)(*words)
    assert code == 0, err
    (record,) = lt.run_records(zoo)
    assert (tmp_path / "out.svg").read_text() == curves_picture([record])
    events = EventAccumulator(str(record.folder / "tensorboard"))
    events.Reload()
    told = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    for name, word in (("loss", "loss"), ("grad_norm", "grad_norm"), ("learning_rate", "lr"),
                       ("tokens", "tokens")):  # fmt: skip
        for node in record.nodes:
            mine = [(m.step, single(getattr(m, word))) for m in record.metrics() if m.node == node]
            assert told[f"{name}/{node}"] == mine
    for path in PATHS:
        mine = [(e.step, single(e.loss)) for e in record.evaluations() if e.path == path]
        assert told[f"eval_loss/{path}"] == mine
        assert mine[0][0] == 0


def single(number: float) -> float:
    """A number as fp32, which event files hold."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def test_a_tracker_that_is_not_there_is_refused_before_anything_trains(
    place: Path, zoo: Path, capsys: Any
) -> None:
    run = Shell(capsys)
    words = ("train", zoo, "--data", place / "rows.jsonl", "--steps", "1", "--seed", "9")
    before = len(lt.run_records(zoo))
    if shutil.which("wandb") is None:
        code, _, err = run(*words, "--report-to", "wandb")
        assert code == 1
        assert "--report-to wandb needs wandb, which is not installed" in err
        assert "pip install wandb" in err
    code, _, err = run(*words, "--report-to", "paper")
    assert code == 2
    assert "paper" in err
    assert len(lt.run_records(zoo)) == before
