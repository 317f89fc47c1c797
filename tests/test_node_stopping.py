"""TreeTrainer with patience: each node ends as it was at its own best evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import joint
import pytest
import torch
from safetensors.torch import load_file
from sampling import sampled
from transformers import TrainerCallback

import lora_tree as lt
from lora_tree.errors import FormatError, SpecError
from lora_tree.integrations.transformers import TreeTrainer

MIXED = ["a/b/c", "d", "a/b/c", "d", "", "d", "a/b/c", "d"]
EVAL: dict[str, Any] = dict(eval_strategy="steps", eval_steps=2, eval_on_start=True)


class Seen(TrainerCallback):  # type: ignore[misc]
    """The factors at every evaluation."""

    def __init__(self, model: lt.TreeModel) -> None:
        self.model, self.at = model, {}  # type: ignore[var-annotated]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = joint.factors(self.model.tree)


def trained(
    folder: Path,
    patience: int | None,
    *,
    resume: bool = False,
    stop: int | None = None,
    records: Path | None = None,
    **more: Any,
) -> tuple[TreeTrainer, lt.TreeModel, Seen]:
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    groups = [{**group, "lr": 0.05} for group in joint.groups(model, "a/b/c", "d")]
    arguments = dict(max_steps=24, save_strategy="steps", save_steps=3, save_total_limit=1)
    trainer = TreeTrainer(
        model,
        joint.arguments(folder, **{**EVAL, **arguments, **more}),
        groups=groups,
        train_dataset=joint.rows(MIXED),
        eval_dataset=joint.rows(["d", "a/b/c", "d", "a/b/c", ""], 8),
        temperature=1.0,
        loss="paths",
        patience=patience,
        records=records,
    )
    seen = Seen(model)
    trainer.add_callback(seen)
    if stop is not None:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer, model, seen


class StopAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def logged(trainer: TreeTrainer, path: str) -> list[tuple[int, float]]:
    name = f"eval_loss/{path}"
    return [(log["step"], log[name]) for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("patience", sampled([1, 2], [2]))
def test_every_node_ends_with_the_very_bits_of_its_best_evaluation(
    tmp_path: Path, patience: int
) -> None:
    plain, _, seen = trained(tmp_path / "plain", None)
    trainer, model, _ = trained(tmp_path / "run", patience)
    told = trainer.node_outcomes()
    for node in ("a/b/c", "d"):  # siblings: neither is on the other's path
        best, best_step, waited, stopped = float("inf"), 0, 0, None
        for step, loss in logged(plain, node):
            if loss < best:
                best, best_step, waited = loss, step, 0
                continue
            waited += 1
            if waited == patience:
                stopped = step
                break
        one = told[node]
        assert (one.best_step, one.stopped_at) == (best_step, stopped)
        assert one.after == pytest.approx(best, rel=1e-12)
        for own, other in zip(
            joint.factors(model.tree)[node], seen.at[best_step][node], strict=True
        ):
            assert torch.equal(own, other)
    steps = {one.stopped_at for one in told.values()}
    assert steps != {None}, "else nothing is tested"
    stops = [log for log in trainer.state.log_history if any("stopped/" in key for key in log)]
    assert len(stops) == len(steps - {None})


@pytest.mark.parametrize("every", sampled([3, 5], [3]))  # before a node has stopped, and after
def test_a_run_with_patience_that_was_cut_off_goes_on_to_the_same_bits(
    tmp_path: Path, every: int
) -> None:
    whole, straight, _ = trained(tmp_path / "whole", 2, save_steps=every)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 2, stop=5, save_steps=every)
    assert [p.name for p in (tmp_path / "cut").iterdir()] == [f"checkpoint-{every}"]
    again, resumed, _ = trained(tmp_path / "cut", 2, resume=True, save_steps=every)
    assert again.node_outcomes() == whole.node_outcomes()
    wanted, got = joint.factors(straight.tree), joint.factors(resumed.tree)
    for path in wanted:
        assert all(torch.equal(x, y) for x, y in zip(wanted[path], got[path], strict=True))
    (kept,) = (tmp_path / "cut").iterdir()
    assert set(load_file(kept / "best.safetensors")) == set(load_file(kept / "factors.safetensors"))
    (kept / "node_stopping.json").write_text(json.dumps({"d": 3}))
    with pytest.raises(FormatError, match=r"node_stopping.json: not the state of a run"):
        trained(tmp_path / "cut", 2, resume=True, max_steps=30, save_steps=every)


def test_what_would_not_stop_node_by_node_is_refused(tmp_path: Path) -> None:
    for more, match in (
        (dict(eval_strategy="no", eval_on_start=False), "the arguments ask for none"),
        (dict(load_best_model_at_end=True, eval_steps=3), "leave one of them out"),
    ):
        with pytest.raises(SpecError, match="patience"):
            try:
                trained(tmp_path, 1, **more)
            except SpecError as error:
                assert match in str(error)
                raise
    with pytest.raises(SpecError, match="patience must be a whole number from 1, got 0"):
        trained(tmp_path, 0)


# ---------------------------------------------------------------------- what is noted
def test_every_step_is_noted_as_the_trainer_logs_it_also_after_a_stop(tmp_path: Path) -> None:
    for name in ("zoo", "other"):
        (tmp_path / name).mkdir()
    whole, _, _ = trained(tmp_path / "whole", 2, records=tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 2, stop=5, records=tmp_path / "zoo")
    (record,) = lt.run_records(tmp_path / "zoo")
    assert (record.state, record.done) == ("stopped", 5)
    trained(tmp_path / "cut", 2, resume=True, records=tmp_path / "zoo")
    (record,), (other,) = lt.run_records(tmp_path / "zoo"), lt.run_records(tmp_path / "other")
    assert record.state == other.state == "trained"
    assert record.outcomes == other.outcomes == whole.node_outcomes()
    assert record.evaluations() == other.evaluations()
    mine, theirs = [[vars(m) | {"time_s": 0} for m in r.metrics()] for r in (record, other)]
    assert mine == theirs
    told = {(m.step, m.node): m for m in other.metrics()}
    seen = 0
    for log in whole.state.log_history:
        for node in ("a/b/c", "d"):
            line = told.get((log["step"], node))
            if f"loss/{node}" in log and line is not None:
                assert line.loss == pytest.approx(log[f"loss/{node}"], rel=1e-9)
                assert line.lr == 0.05
                seen += 1
    assert seen == len(told) > 5
    # The Trainer's own norm is that of all nodes together, before they were clipped.
    for log in whole.state.log_history:
        norms = [m.grad_norm for m in other.metrics() if m.step == log["step"]]
        if "grad_norm" in log and len(norms) == 2:
            assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(
                log["grad_norm"], rel=1e-5
            )
    losses = {(e.step, e.path): e.loss for e in other.evaluations()}
    for node in ("a/b/c", "d"):
        assert [(step, losses[step, node]) for step, _ in logged(whole, node)] == logged(
            whole, node
        )
