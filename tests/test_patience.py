"""A node that stopped improving on held-out rows is again what it was at its best, while its
siblings go on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import shell
import torch
import torch.nn.functional as F

import lora_tree as lt
from lora_tree.demo.bytelevel import open_base
from lora_tree.errors import FormatError, SpecError
from lora_tree.runs import HeldOut, Row, Run, Settings, read_rows
from lora_tree.training.patience import NodePatience

PATHS = ("fr/legal", "fr/medical", "de")
HELD = ("row 1 of legal things", "something else entirely: 17", "row 12 of of")


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


def written(file: Path, lines: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def begun(zoo: Path, tokenizer: Any, *, folder: str = ".training", **more: Any) -> Run:
    tree = lt.load(zoo)
    torch.manual_seed(0)
    model = lt.attach(tree, open_base(Path(str(tree.base))))
    lines = [{"path": PATHS[i % 3], "text": f"row {i} {'of ' * (i % 4)}"} for i in range(12)]
    rows = read_rows([written(zoo.parent / "rows.jsonl", lines)], tree, tokenizer)
    lines = [{"path": path, "text": text} for path, text in zip(PATHS, HELD, strict=True)]
    held = read_rows([written(zoo.parent / "held.jsonl", lines)], tree, tokenizer)
    held_out = HeldOut(every=2, rows=held, patience=more.pop("patience", 2))
    settings = dict(steps=24, batch=2, accumulate=2, lr=5e-2, schedule="constant", hold_back=0.0)
    settings |= more.pop("settings", {})
    return Run(
        model, rows, Settings(**settings), zoo / folder, records=zoo, held_out=held_out, **more
    )


def factors(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.factors.named_parameters()}


def values(run: Run, node: str) -> list[torch.Tensor]:
    adapter = run.model.tree.adapter(node)
    assert adapter is not None
    return [tensor.detach().clone() for _, tensor in adapter.named_tensors()]


# ---------------------------------------------------------------------- against an obvious loop
class ByHand:
    """A plain base with hooks, an AdamW for each node, and the rule written out."""

    def __init__(self, run: Run, patience: int) -> None:
        self.run, self.patience = run, patience
        tree = run.model.tree
        self.plain = open_base(Path(str(tree.base)))
        self.factors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor, float]]] = {}
        self.optimizers = {}
        for group in run.optimizer.param_groups:
            node = group["name"]
            self.factors[node] = {}
            for name, value in tree.adapter(node).modules.items():  # type: ignore[union-attr]
                A, B = (t.detach().clone().requires_grad_() for t in (value.A, value.B))
                self.factors[node][name] = A, B, value.scale
            self.optimizers[node] = torch.optim.AdamW(
                self.of(node), lr=run.settings.lr, weight_decay=group["weight_decay"]
            )
        self.lineage: list[str] = []
        for name in self.factors["de"]:
            self.plain.get_submodule(name).register_forward_hook(self.side(name))
        self.before: dict[str, float] = {}
        self.best: dict[str, tuple[float, int, list[torch.Tensor]]] = {}
        self.waited = dict.fromkeys(self.factors, 0)
        self.moved: set[str] = set()
        self.stopped: dict[str, int] = {}
        self.held: dict[tuple[int, str], float] = {}

    def of(self, node: str) -> list[torch.Tensor]:
        return [t for A, B, _ in self.factors[node].values() for t in (A, B)]

    def side(self, name: str) -> Any:
        def add(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            for node in self.lineage:
                A, B, scale = self.factors[node][name]
                out = out + scale * F.linear(F.linear(args[0], A), B)
            return out

        return add

    def through(self, path: str) -> list[str]:
        return [node for node in self.factors if f"{path}/".startswith(f"{node}/")]

    def losses(self, row: Row) -> torch.Tensor:
        self.lineage[:] = self.through(row.path)
        ids = torch.tensor([row.ids])
        return F.cross_entropy(self.plain(ids).logits[0, :-1], ids[0, 1:], reduction="none")

    @torch.no_grad()
    def mean(self, node: str) -> float:
        assert self.run._watch is not None
        held = [row for rows in self.run._watch._by_path.values() for row in rows]
        mine = [row for row in held if node in self.through(row.path)]
        return float(torch.cat([self.losses(row) for row in mine]).mean())

    @torch.no_grad()
    def bring_back(self, node: str, step: int) -> None:
        _, best_step, values = self.best[node]
        if best_step == step:
            return
        here = [t.detach().clone() for t in self.of(node)]
        without = self.mean(node)
        for own, value in zip(self.of(node), values, strict=True):
            own.copy_(value)
        if self.mean(node) <= without:
            return
        for own, value in zip(self.of(node), here, strict=True):
            own.copy_(value)
        self.best[node] = without, step, here

    def evaluate(self, step: int) -> None:
        for node in self.factors:
            loss = self.mean(node)
            if node.count("/") or node == "de":
                self.held[step, node] = loss
        stopping = []
        for node in self.factors:
            if node in self.stopped:
                continue
            loss = self.mean(node)
            self.before.setdefault(node, loss)
            if node not in self.best or loss < self.best[node][0]:
                self.best[node] = loss, step, [t.detach().clone() for t in self.of(node)]
                self.waited[node] = 0
            else:
                self.waited[node] += node in self.moved
                stopping += [node] if self.waited[node] >= self.patience else []
        self.moved.clear()
        for node in stopping:
            self.bring_back(node, step)
            self.stopped[node] = step

    def train(self, *, over_rows: bool) -> None:
        run, settings = self.run, self.run.settings
        order, size = run._order(), settings.rows_a_step
        self.evaluate(0)
        for step in range(settings.steps):
            if len(self.stopped) == len(self.factors):
                return
            each: dict[str, list[torch.Tensor]] = {}
            for i in order[step * size : (step + 1) * size]:
                row = run.rows[i]
                if set(self.through(row.path)) - set(self.stopped):
                    each.setdefault(row.path, []).append(self.losses(row))
            if over_rows and each:
                torch.cat([t for losses in each.values() for t in losses]).mean().backward()
            elif each:
                means = [torch.cat(losses).mean() for losses in each.values()]
                torch.stack(means).sum().backward()
            for node, optimizer in self.optimizers.items():
                if node not in self.stopped and any(node in self.through(path) for path in each):
                    torch.nn.utils.clip_grad_norm_(self.of(node), 1.0)
                    optimizer.step()
                    self.moved.add(node)
                optimizer.zero_grad()
            if (step + 1) % 2 == 0:
                self.evaluate(step + 1)
        for node in self.factors:
            if node not in self.stopped:
                self.bring_back(node, settings.steps)


@pytest.mark.parametrize(("patience", "with_ancestors"), [(2, False), (1, True), (3, True)])
def test_nodes_stop_and_come_back_as_an_obvious_loop_says(
    zoo: Path, tokenizer: Any, patience: int, with_ancestors: bool
) -> None:
    run = begun(zoo, tokenizer, patience=patience, with_ancestors=with_ancestors)
    hand = ByHand(run, patience)
    hand.train(over_rows=with_ancestors)
    assert hand.stopped, "else nothing is tested"
    for _ in run.steps():
        pass
    told = run.outcomes()
    assert {node: one.stopped_at for node, one in told.items() if one.stopped_at} == hand.stopped
    for node, one in told.items():
        assert one.best_step == hand.best[node][1]
        assert one.before == pytest.approx(hand.before[node], rel=1e-4)
        assert one.after == pytest.approx(hand.mean(node), rel=1e-3)
        for own, other in zip(values(run, node), hand.of(node), strict=True):
            torch.testing.assert_close(own, other.detach(), rtol=1e-2, atol=2e-3)
    (record,) = lt.run_records(zoo)
    lines = {(line.step, line.path): line.loss for line in record.evaluations()}
    assert lines == {key: pytest.approx(loss, rel=1e-3) for key, loss in hand.held.items()}
    last = {node: max(m.step for m in record.metrics() if m.node == node) for node in told}
    assert all(last[node] <= step for node, step in hand.stopped.items())


def test_a_node_that_stopped_has_the_very_bits_of_its_best_step_and_its_siblings_go_on(
    zoo: Path, tokenizer: Any
) -> None:
    plain = begun(zoo, tokenizer, folder=".plain", patience=None)
    at: dict[int, dict[str, list[torch.Tensor]]] = {0: {p: values(plain, p) for p in PATHS}}
    for step in plain.steps():
        at[step.number] = {path: values(plain, path) for path in PATHS}
    run = begun(zoo, tokenizer, patience=2)
    list(run.steps())
    stopped = {node: one for node, one in run.outcomes().items() if one.stopped_at}
    first = min(stopped, key=lambda node: stopped[node].stopped_at or 0)
    assert len(stopped) < len(PATHS) or len({one.stopped_at for one in stopped.values()}) > 1
    best = at[stopped[first].best_step or 0][first]
    for own, other in zip(values(run, first), best, strict=True):
        assert torch.equal(own, other)
    # Before the first one stopped, to be watched has changed no bit of any node.
    assert run.outcomes()[first].before == plain.outcomes()[first].before
    assert plain.outcomes()[first].stopped_at is None
    assert plain.taken == plain.settings.steps


@pytest.mark.parametrize("with_ancestors", [False, True])
def test_a_watched_run_that_was_stopped_goes_on_to_the_same_bits_and_lines(
    zoo: Path, tokenizer: Any, with_ancestors: bool
) -> None:
    whole = begun(zoo, tokenizer, folder=".whole", with_ancestors=with_ancestors)
    list(whole.steps())
    for stop in (1, 7, 10, 16):
        run = begun(zoo, tokenizer, with_ancestors=with_ancestors)
        for step in run.steps(save_every=3):
            if step.number == stop:
                if stop != 10:  # killed: it goes on from the checkpoint of a step before
                    run.save()
                break
        run.model.detach()
    run = begun(zoo, tokenizer, with_ancestors=with_ancestors)
    list(run.steps())
    mine, theirs = factors(run), factors(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert run.outcomes() == whole.outcomes()
    one, other = lt.run_records(zoo)
    assert one.evaluations() == other.evaluations()
    assert [(m.step, m.node, m.loss, m.grad_norm) for m in one.metrics()] == [
        (m.step, m.node, m.loss, m.grad_norm) for m in other.metrics()
    ]
    assert one.done == other.done == run.taken


def test_a_run_whose_nodes_have_all_stopped_is_over_and_finished(zoo: Path, tokenizer: Any) -> None:
    run = begun(zoo, tokenizer, patience=1, settings=dict(steps=400))
    list(run.steps())
    assert run.taken < 400 == run.done
    run.save()
    run.model.trainable()
    run.model.tree.save(zoo, note=run.note("test"))
    run.finish()
    (record,) = lt.run_records(zoo)
    assert (record.state, record.done, record.steps) == ("finished", run.taken, 400)
    for node, one in record.outcomes.items():
        assert one.stopped_at is not None
        assert one.best_step is not None
        assert one.after is not None
        assert one.before is not None
        assert one.after <= one.before, node
    run.model.detach()
    assert begun(zoo, tokenizer, patience=1, settings=dict(steps=400)).was_over


# ---------------------------------------------------------------------- the rule by itself
def test_what_would_make_a_node_worse_is_not_brought_back() -> None:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter({"q": lt.LowRank(torch.ones(1, 4), torch.zeros(4, 1))}))
    model = lt.attach(tree, torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}))
    model.trainable("fr")

    def fill(value: float) -> None:
        with torch.no_grad():
            model.factors.of("fr")[1].fill_(value)

    now = {"fr": (0.0, 5)}
    for with_best, kept in ((0.5, 0.0), (3.0, 1.0), (math.nan, 1.0)):
        fill(0.0)
        rule = NodePatience(model.factors, tree, ["fr"], patience=1)
        assert rule.judge(0, {"fr": (1.0, 5)}, lambda _: now) == []
        fill(1.0)
        assert rule.judge(5, {"fr": (2.0, 5)}, lambda _: now) == [], "it took no step"
        rule.note_moved(["fr"])
        measure = Mock(side_effect=[{"fr": (2.0, 5)}, {"fr": (with_best, 5)}])
        assert rule.judge(10, {"fr": (2.0, 5)}, measure) == ["fr"]
        assert float(model.factors.of("fr")[1].detach().max()) == kept
        one = rule.courses["fr"]
        assert (one.best_step, one.now) == ((0, 0.5) if kept == 0.0 else (10, 2.0))
        assert rule.stopped == {"fr"}
        assert rule.all_stopped_at == 10
    rule = NodePatience(model.factors, tree, ["fr"], patience=1)
    rule.judge(0, {"fr": (math.nan, 5)}, lambda _: now)
    assert json.loads(json.dumps(rule.plain(), allow_nan=False))["fr"]["now"] is None


def test_what_can_not_be_watched_is_refused(zoo: Path, tokenizer: Any) -> None:
    for wrong in (dict(every=0), dict(every=1, patience=0), dict(every=True)):
        with pytest.raises(SpecError, match="must be a whole number from 1"):
            HeldOut(**wrong)
    run = begun(zoo, tokenizer)
    rows, settings, model = run.rows, run.settings, run.model
    del run
    bare = Row("", (1, 2), (1, 2), "x:1")
    prefers = Row("de", (1, 2), (1, 2), "y:1", rejected=bare)
    for held, match in (
        (HeldOut(1, [bare]), r"no held-out row goes through"),
        (HeldOut(1), r"needs held-out rows to measure on"),
        (HeldOut(1, [prefers]), r"y:1: the held-out rows are of another kind"),
    ):
        with pytest.raises(SpecError, match=match):
            Run(model, rows, settings, zoo / ".other", held_out=held)
    run = begun(zoo, tokenizer, folder=".cut")
    for _ in run.steps():
        break
    file = run.save() / "run.json"
    about = json.loads(file.read_text())
    with pytest.raises(SpecError, match=r"other held_out: patience was 2 and is 3"):
        begun(zoo, tokenizer, folder=".cut", patience=3)
    file.write_text(json.dumps(about | {"watch": {"de": {"sold": 1}}}))
    with pytest.raises(FormatError, match=r"run.json: watch: not what a run writes"):
        begun(zoo, tokenizer, folder=".cut")


# ---------------------------------------------------------------------- the command
def test_the_shell_measures_stops_and_tells_and_trains_again_in_the_same_way(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell_ = shell.Shell(capsys)
    lines = [{"path": PATHS[i % 3], "text": f"row {i} {'of ' * (i % 4)}"} for i in range(12)]
    data = written(zoo.parent / "rows.jsonl", lines)
    lines = [{"path": path, "text": text} for path, text in zip(PATHS, HELD, strict=True)]
    held = written(zoo.parent / "held.jsonl", lines)
    words = ("--data", data, "--steps", "24", "--batch", "2", "--lr", "0.05")
    watch = ("--eval-data", held, "--eval-every", "2", "--patience", "1", "--hold-back", "0")
    code, out, err = shell_("train", zoo, *words, *watch, "--run", zoo / ".first")
    assert code == 0
    assert "measured during training: 3 held-out rows" in err
    (record,) = lt.run_records(zoo)
    table = [line.split() for line in out.splitlines()[:4]]
    assert " ".join(table[0]) == (
        "node first loss last loss held-out before after best step stopped at"
    )
    for node, *cells in table[1:]:
        one = record.outcomes[node]
        assert [float(cell) for cell in cells[:4]] == [
            pytest.approx(loss, abs=6e-4) for loss in (one.first, one.last, one.before, one.after)
        ]
        assert [int(cell) for cell in cells[4:]] == [
            step for step in (one.best_step, one.stopped_at) if step is not None
        ]
    noted = lt.history(zoo)["de"][-1].training
    assert noted is not None
    assert noted.held_out is not None
    assert noted.held_out.model_dump() == {
        "data": [file.model_dump() for file in lt.data_files([held], zoo)],
        "every": 2,
        "patience": 1,
    }
    again = shell.answer(shell_, "retrain", zoo, "de", "--yes", "--quiet")
    assert again["outcomes"]["de"]["before"] is not None
    assert again["jobs"][0]["held_out"] == [str(held)]
    assert [one.about["held_out"]["every"] for one in lt.run_records(zoo)] == [2, 2]
    held.unlink()
    code, out, _ = shell_("retrain", zoo, "de", "--dry-run")
    assert (code, "its rows are gone: ../held.jsonl" in out) == (1, True)


def test_the_rows_held_back_measure_where_no_others_are_given(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell_ = shell.Shell(capsys)
    lines = [{"path": PATHS[i % 3], "text": f"row {i} {'of ' * (i % 4)}"} for i in range(12)]
    data = written(zoo.parent / "rows.jsonl", lines)
    words = ("train", zoo, "--data", data, "--steps", "20", "--batch", "2", "--hold-back", "0.3")
    told = shell.answer(shell_, *words, "--patience", "3", "--quiet")
    (record,) = lt.run_records(zoo)
    assert told["run"] == 1
    assert {line.step for line in record.evaluations()} == {*range(0, 21, 2)}
    assert told["outcomes"]["fr/legal"]["before"] is not None
    assert record.about["held_out"]["patience"] == 3
    code, _, err = shell_(*words[:-1], "0", "--patience", "3", "--run", zoo / ".other")
    assert code == 1
    assert "needs held-out rows to measure on" in err
    assert "--eval-data" in err
