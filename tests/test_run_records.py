"""A run can be read after it ended: its lines are those of a loop by hand, also after a kill."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shell
import torch
import torch.nn.functional as F
from forked import Forked
from sampling import slow
from shell import Shell

import lora_tree as lt
from lora_tree.demo.bytelevel import open_base
from lora_tree.errors import DivergedError, FolderError
from lora_tree.folder.past import run_store
from lora_tree.folder.past.run_records import RUN_LOCK
from lora_tree.runs import Run, Settings, read_rows
from lora_tree.system import locks

PATHS = ("fr/legal", "fr/medical", "de")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shell.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(base)


@pytest.fixture
def zoo(tmp_path: Path, base: Path) -> Path:
    return shell.fresh_zoo(tmp_path / "zoo", base, r=2, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [{"path": PATHS[i % 3], "text": f"row {i} {'of ' * (i % 4)}"} for i in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def begun(zoo: Path, data: Path, tokenizer: Any, **more: Any) -> Run:
    """A run that is kept in the zoo."""
    tree = lt.load(zoo)
    torch.manual_seed(0)
    model = lt.attach(tree, open_base(Path(str(tree.base))))
    settings = dict(steps=6, batch=2, accumulate=2, lr=1e-2, warm_up=2, temperature=2.0)
    settings |= more.pop("settings", {})
    folder = more.pop("folder", zoo / ".training")
    rows = read_rows([data], tree, tokenizer)
    return Run(model, rows, Settings(**settings), folder, records=zoo, by="test", **more)


def timeless(record: lt.RunRecord) -> list[lt.NodeMetric]:
    return [replace(metric, time_s=0.0) for metric in record.metrics()]


# ---------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("with_ancestors", [False, True])
def test_the_lines_are_those_of_a_loop_by_hand(
    zoo: Path, data: Path, tokenizer: Any, with_ancestors: bool
) -> None:
    clipping = dict(clip_norm=0.05)  # lower than the norms, which are told as they were before
    run = begun(zoo, data, tokenizer, with_ancestors=with_ancestors, settings=clipping)
    expected = by_hand(run)
    for _ in run.steps():
        pass
    (record,) = lt.run_records(zoo)
    told = record.metrics()
    keys = [(metric.step, metric.node) for metric in told]
    assert keys == list(expected)
    assert len({step for step, _ in keys}) == 6
    for metric in told:
        loss, tokens, norm, lr = expected[metric.step, metric.node]
        assert metric.tokens == tokens
        assert metric.loss == pytest.approx(loss, rel=2e-5)
        assert metric.grad_norm == pytest.approx(norm, rel=2e-3)
        assert metric.lr == pytest.approx(lr, rel=1e-12)
        assert metric.time_s > 0


def by_hand(run: Run) -> dict[tuple[int, str], tuple[float, int, float, float]]:
    """(step, node) → loss, tokens, gradient norm and rate, over a base with hooks of its own."""
    tree, settings = run.model.tree, run.settings
    plain = open_base(Path(str(tree.base)))
    factors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor, float]]] = {}
    optimizers = {}
    for group in run.optimizer.param_groups:
        node = group["name"]
        factors[node] = {}
        for name, value in tree.adapter(node).modules.items():  # type: ignore[union-attr]
            A, B = (t.detach().clone().requires_grad_() for t in (value.A, value.B))
            factors[node][name] = A, B, value.scale
        mine = [t for A, B, _ in factors[node].values() for t in (A, B)]
        optimizers[node] = torch.optim.AdamW(mine, lr=1.0, weight_decay=group["weight_decay"])
    lineage: list[str] = []

    def side(module: Any, args: Any, out: torch.Tensor, name: str) -> torch.Tensor:
        for node in lineage:
            A, B, scale = factors[node][name]
            out = out + scale * F.linear(F.linear(args[0], A), B)
        return out

    for name in factors["de"]:
        module = plain.get_submodule(name)
        module.register_forward_hook(lambda m, a, o, name=name: side(m, a, o, name))
    order, told, size = run._order(), {}, settings.rows_a_step
    over_rows = any(node.startswith(other + "/") for node in factors for other in factors)
    for step in range(settings.steps):
        each: dict[str, list[torch.Tensor]] = {}
        for i in order[step * size : (step + 1) * size]:
            row = run.rows[i]
            lineage[:] = [node for node in factors if f"{row.path}/".startswith(f"{node}/")]
            ids = torch.tensor([row.ids])
            losses = F.cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            each.setdefault(row.path, []).append(losses)
        tokens = {path: torch.cat(losses) for path, losses in each.items()}
        if over_rows:
            torch.cat(list(tokens.values())).mean().backward()
        else:
            sum(losses.mean() for losses in tokens.values()).backward()  # type: ignore[union-attr]
        for node, optimizer in optimizers.items():
            through = [t for path, t in tokens.items() if f"{path}/".startswith(f"{node}/")]
            if not through:
                continue
            mine = torch.cat(through).detach()
            mine_to_clip = optimizer.param_groups[0]["params"]
            norm = torch.nn.utils.clip_grad_norm_(mine_to_clip, settings.clip_norm or 1.0)
            rate = settings.lr * settings.rate_at(step)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            told[step + 1, node] = float(mine.mean()), len(mine), float(norm), rate
        for optimizer in optimizers.values():
            optimizer.zero_grad()
    return told


# ---------------------------------------------------------------------- stops and kills
def test_a_run_that_was_stopped_anywhere_has_the_lines_of_one_that_was_not(
    tmp_path: Path, zoo: Path, data: Path, tokenizer: Any
) -> None:
    whole = begun(shutil.copytree(zoo, tmp_path / "other"), data, tokenizer)
    list(whole.steps())
    expected = timeless(lt.run_records(tmp_path / "other")[0])
    for stop, is_saved in ((1, True), (4, False), (5, True), (6, True)):
        run = begun(zoo, data, tokenizer)
        for step in run.steps(save_every=3):
            if step.number == stop:
                if is_saved:
                    run.save()
                break
        (record,) = lt.run_records(zoo)
        assert record.state == ("trained" if stop == 6 else "stopped")
        assert record.done == stop
        assert timeless(record) == [line for line in expected if line.step <= stop]
    assert timeless(record) == expected
    run.model.trainable()
    run.model.tree.save(zoo, note=run.note("test"))
    run.finish()
    (record,) = lt.run_records(zoo)
    assert (record.state, record.by, record.nodes) == ("finished", "test", tuple(run.nodes))
    assert record.outcomes["de"].first == run.losses()["de"][0]
    assert record.outcomes["de"].last == run.losses()["de"][1]
    assert lt.check(zoo) == []
    assert lt.load(zoo, strict=True).paths() == ["de", "fr", "fr/legal", "fr/medical"]
    # It is over: the next run of the same settings is another one, where the tree has changed.
    again = begun(zoo, data, tokenizer)
    list(again.steps())
    assert [one.number for one in lt.run_records(zoo)] == [1] if again.was_over else [1, 2]


@slow
def test_a_run_that_is_killed_has_the_lines_of_one_that_was_not(
    tmp_path: Path, zoo: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spare = shutil.copytree(zoo, tmp_path / "spare")
    words = ("--data", data, "--steps", 90, "--batch", 4, "--lr", 0.01, "--save-every", 7)
    code = "import sys; from lora_tree.cli import main; main(sys.argv[1:])"
    running = Forked(code, "train", zoo, *words, errors_too=True)
    end = time.monotonic() + 120
    while records_done(zoo) < 10 and time.monotonic() < end:
        time.sleep(0.005)
    assert lt.run_records(zoo)[0].state == "running"
    assert running.kill()[0] == -signal.SIGKILL
    (record,) = lt.run_records(zoo)
    assert record.state == "cut off"
    assert record.done >= 10
    for folder in (zoo, spare):
        assert Shell(capsys)("train", folder, *map(str, words))[0] == 0
    killed, whole = lt.run_records(zoo), lt.run_records(spare)
    assert len(killed) == len(whole) == 1
    assert killed[0].state == whole[0].state == "finished"
    assert timeless(killed[0]) == timeless(whole[0])


def records_done(zoo: Path) -> int:
    return max((record.done for record in lt.run_records(zoo)), default=0)


def test_a_line_that_was_cut_short_is_passed_over_and_written_again(
    zoo: Path, data: Path, tokenizer: Any
) -> None:
    run = begun(zoo, data, tokenizer)
    for step in run.steps(save_every=2):
        if step.number == 3:
            break
    (record,) = lt.run_records(zoo)
    file = record.folder / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert timeless(record) == timeless(lt.run_records(zoo)[0])
    assert len(record.metrics()) == whole.count(b"\n") - 1
    again = begun(zoo, data, tokenizer)
    assert again.done == 2
    list(again.steps())
    assert [line.step for line in record.metrics()] == sorted(
        line.step for line in record.metrics()
    )
    assert {line.step for line in record.metrics()} == {1, 2, 3, 4, 5, 6}


def test_a_run_that_diverges_is_told_so(zoo: Path, data: Path, tokenizer: Any) -> None:
    run = begun(zoo, data, tokenizer, settings=dict(lr=1e30, clip_norm=None, warm_up=0))
    with pytest.raises(DivergedError):
        list(run.steps())
    (record,) = lt.run_records(zoo)
    assert record.state == "diverged"
    assert all(math.isfinite(line.loss) for line in record.metrics())


def test_two_processes_do_not_write_one_record(zoo: Path, data: Path, tokenizer: Any) -> None:
    run = begun(zoo, data, tokenizer)
    for _ in run.steps():
        break
    (record,) = lt.run_records(zoo)
    with locks.holding(record.folder / RUN_LOCK):
        assert lt.run_records(zoo)[0].state == "stopped", "which the file says"
        list(begun(zoo, data, tokenizer).steps())
    assert [one.number for one in lt.run_records(zoo)] == [1, 2]


# ---------------------------------------------------------------------- room
def test_old_runs_make_room_and_numbers_are_never_given_twice(
    zoo: Path, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "RUNS_KEPT", 2)
    monkeypatch.setattr(run_store.spare_runs, "__kwdefaults__", {"most": 2})
    for seed in range(4):
        run = begun(zoo, data, tokenizer, folder=zoo / f".run-{seed}", settings=dict(seed=seed))
        next(run.steps())
    assert [record.number for record in lt.run_records(zoo)] == [3, 4]
    kept = zoo / ".runs"
    # A run that a process is taking steps of stays; what a killed clean-up left goes.
    (kept / ".gone-1").mkdir()
    with locks.holding(kept / "3" / RUN_LOCK):
        assert lt.gc(zoo, runs=1).runs == {}
    freed = lt.gc(zoo, runs=1, dry_run=True)
    assert (list(freed.runs), freed.nbytes) == ([3], sum(freed.runs.values()))
    assert freed.nbytes > 100
    assert lt.gc(zoo, runs=1).runs == freed.runs
    assert sorted(p.name for p in kept.iterdir()) == ["4", "lock"]
    assert lt.gc(zoo, runs=0).runs == {}, "the next run must not be a second number 4"


def test_another_yaml_of_the_folder_has_runs_of_its_own(
    zoo: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(zoo / "tree.yaml", zoo / "other.yaml")
    words = ("--data", data, "--steps", 1, "--batch", 4, "--quiet")
    code, _, err = Shell(capsys)("train", zoo / "other.yaml", *map(str, words))
    assert code == 0, err
    assert lt.run_records(zoo) == []
    (record,) = lt.run_records(zoo / "other.yaml")
    assert record.folder == zoo / ".runs-other.yaml" / "1"
    assert record.by.startswith("lora-tree train ")
    assert record.about["data"] == [{**vars(lt.data_files([data], zoo)[0])}]


def test_what_can_not_be_read_hides_no_other_run(zoo: Path, data: Path, tokenizer: Any) -> None:
    run = begun(zoo, data, tokenizer)
    next(run.steps())
    kept = zoo / ".runs"
    for number, text in ((2, "{"), (3, '{"state": "sold"}'), (4, "[1]")):
        (kept / str(number)).mkdir()
        (kept / str(number) / "run.json").write_text(text)
    (kept / "5").mkdir()
    assert [record.number for record in lt.run_records(zoo)] == [1]
    (kept / "1/metrics.jsonl").write_text('{"step": 1, "node": "fr"}\n')
    with pytest.raises(lt.errors.FormatError, match=r"metrics.jsonl:1: not the line of a step"):
        lt.run_records(zoo)[0].metrics()


def test_a_run_that_is_refused_or_over_leaves_no_record(
    zoo: Path, data: Path, tokenizer: Any
) -> None:
    run = begun(zoo, data, tokenizer)
    assert lt.run_records(zoo) == []
    list(run.steps())
    run.save()
    run.model.trainable()
    run.model.tree.save(zoo)
    run.finish()
    before = (zoo / ".runs/1/run.json").read_bytes()
    run.model.detach()
    again = begun(zoo, data, tokenizer)
    assert again.was_over
    list(again.steps())
    assert (zoo / ".runs/1/run.json").read_bytes() == before
    shutil.rmtree(zoo / ".runs")
    (zoo / ".runs").write_text("")
    other = begun(zoo, data, tokenizer, settings=dict(seed=5), folder=zoo / ".other")
    with pytest.raises(FolderError, match=r"\.runs: a file or a link lies where a folder belongs"):
        list(other.steps())


def test_the_shell_cleans_up_runs(zoo: Path, data: Path, capsys: Any) -> None:
    run = Shell(capsys)
    for seed in (0, 1):
        train = ("train", zoo, "--data", data, "--steps", "1", "--seed", str(seed), "--quiet")
        assert run(*train)[0] == 0
    assert [record.state for record in lt.run_records(zoo)] == ["finished", "finished"]
    code, out, _ = run("gc", zoo, "--runs", "1")
    assert (code, out.splitlines()[0]) == (0, "1 record of runs")
    assert [record.number for record in lt.run_records(zoo)] == [2]
