"""TreeTrainer: what transformers.Trainer does to each node is what it would do to it alone; runs
resume exactly.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import joint
import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from sampling import sampled, slow
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

import lora_tree as lt
from lora_tree.errors import (
    DivergedError,
    FolderError,
    FormatError,
    PathError,
    SpecError,
    StateError,
)
from lora_tree.integrations.transformers import TreeTrainer

MIXED = ["a/b/c", "d", "a/b/c", "", "a", "a/b", "d", "d", "a/b/c", "a/b", "a", "a", "", "", "", ""]


def run(
    folder: Path, *training: str, rows: Any = None, more: Any = None, **args: Any
) -> tuple[TreeTrainer, Any]:
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    groups = joint.groups(model, *training)
    rows = joint.rows(MIXED) if rows is None else rows
    made = TreeTrainer(
        model,
        joint.arguments(folder, **args),
        groups=groups,
        train_dataset=rows,
        **{"loss": "paths", **(more or {})},
    )
    return made, model


# ---------------------------------------------------------------------- each as alone
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_node_moves_as_by_itself(tmp_path: Path, checkpointing: bool) -> None:
    training, weights = ("a", "a/b/c", "d"), {"d": 3.0}
    trainer, model = run(
        tmp_path, *training, more=dict(path_weights=weights), activation_checkpointing=checkpointing
    )
    before = {n: p.clone() for n, p in model.base.named_parameters()}
    trainer.args.num_train_epochs = 2
    trainer.train()
    hand, rows = joint.ByHand(training, weights=weights), joint.rows(MIXED)
    for _ in range(2):
        for start in range(0, len(rows), 4):
            hand.step(rows[start : start + 4])
    hand.same_as(joint.factors(model.tree))
    assert all(torch.equal(p, before[n]) for n, p in model.base.named_parameters())
    for log, wanted in zip(
        [log for log in trainer.state.log_history if "loss" in log], hand.losses, strict=True
    ):
        told = {
            key.removeprefix("loss/"): value
            for key, value in log.items()
            if key.startswith("loss/")
        }
        assert told == pytest.approx(
            {path or "(base)": loss for path, loss in wanted.items()}, rel=1e-9
        )
        assert log["loss"] == pytest.approx(
            sum(weights.get(p, 1.0) * x for p, x in wanted.items()), rel=1e-5
        )
        assert {key for key in log if key.startswith("learning_rate/")} == {
            f"learning_rate/{p}" for p in training
        }


def test_what_a_group_does_not_say_is_as_the_arguments_say(tmp_path: Path) -> None:
    trainer, model = run(tmp_path, "a", "d", learning_rate=0.25)
    groups = model.trainable("a", "d")
    trainer = TreeTrainer(
        model,
        trainer.args,
        train_dataset=joint.rows(MIXED),
        groups=[{**groups[0], "clip_norm": None}, groups[1]],
    )
    made = trainer.create_optimizer().param_groups
    assert [(g["name"], g["lr"], g["weight_decay"], g["clip_norm"]) for g in made] == [
        ("a", 0.25, joint.DECAY, None),
        ("d", 0.25, joint.DECAY, joint.CLIP),
    ]
    alone = TreeTrainer(
        model,
        trainer.args,
        train_dataset=joint.rows(MIXED),
        optimizers=(torch.optim.SGD(groups, lr=1.0), None),
    )
    assert type(alone.create_optimizer()) is torch.optim.SGD


def test_evaluation_has_a_loss_for_every_path(tmp_path: Path) -> None:
    rows = joint.rows(["a/b/c", "d", "d", "", "a/b/c"], seed=9)
    trainer, model = run(
        tmp_path,
        "a",
        more=dict(eval_dataset=rows, path_weights={"d": 2.0}),
        per_device_eval_batch_size=2,
    )
    found = trainer.evaluate()
    with torch.no_grad():
        wanted = {path: float(loss) for path, loss in joint.ByHand(()).losses_of(rows).items()}
    assert {p: found[f"eval_loss/{p or '(base)'}"] for p in wanted} == pytest.approx(
        wanted, rel=1e-9
    )
    assert found["eval_loss"] == pytest.approx(
        wanted["a/b/c"] + 2 * wanted["d"] + wanted[""], rel=1e-9
    )
    assert model.state is lt.State.BARE
    out = trainer.predict(rows)
    assert out.predictions.shape == (5, joint.TOKENS, joint.VOCABULARY)
    assert out.metrics["test_loss/d"] == pytest.approx(wanted["d"], rel=1e-9)


def test_a_step_of_rows_that_train_nothing_moves_nothing(tmp_path: Path) -> None:
    trainer, model = run(tmp_path, "d", rows=joint.rows(["", "a", "a/b", ""]))
    before = joint.factors(model.tree)
    trainer.train()
    assert all(
        torch.equal(x, y)
        for path in before
        for x, y in zip(before[path], joint.factors(model.tree)[path], strict=True)
    )


def test_rows_are_drawn_by_node_with_a_temperature(tmp_path: Path) -> None:
    rows = joint.rows(["d"] * 60 + ["a"] * 4)
    trainer, _ = run(tmp_path, "a", rows=rows, more=dict(temperature=1e9), seed=5)
    drawn = [path for batch in trainer.get_train_dataloader() for path in batch["path"]]
    assert drawn == [
        rows[i]["path"] for i in lt.PathSampler([r["path"] for r in rows], temperature=1e9, seed=5)
    ]
    assert 16 < drawn.count("a") < 48
    with pytest.raises(PathError, match="no node 'a/x'"):
        run(tmp_path, "a", rows=joint.rows(["a/x"]), more=dict(temperature=1.0))


def test_columns_that_the_base_does_not_take_go_and_the_path_stays(tmp_path: Path) -> None:
    rows = [{**row, "note": "x", "source": 3} for row in joint.rows(MIXED)]
    seen = []

    def collate(given: list[dict[str, Any]]) -> Any:
        seen.extend(given)
        return default_data_collator(given)

    trainer, _ = run(tmp_path, "a", rows=rows, more=dict(data_collator=collate))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["path"] == MIXED[:2]
    assert set(batch) == {"path", "input_ids", "labels"}
    assert {key for row in seen for key in row} == {"input_ids", "labels"}
    assert set(rows[0]) == {
        "path",
        "input_ids",
        "labels",
        "note",
        "source",
    }  # the caller's rows are as they were


def test_it_mixes_with_other_trainers(tmp_path: Path) -> None:
    class Other(Trainer):  # type: ignore[misc]
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class Both(TreeTrainer, Other):
        pass

    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    model.trainable("a")
    both = Both(model, joint.arguments(tmp_path, max_steps=1), train_dataset=joint.rows(MIXED))
    both.train()
    assert both.steps == 2


@pytest.mark.parametrize("alpha", [1e-9, 5.0])
def test_neftune_adds_its_noise_to_the_embeddings_of_training_steps_alone(
    tmp_path: Path, alpha: float
) -> None:
    """Uniform, of magnitude alpha / sqrt(tokens · width): https://arxiv.org/abs/2310.05914 §2."""
    rows = joint.rows(MIXED)
    trainer, model = run(
        tmp_path, "a", "d", neftune_noise_alpha=alpha, more=dict(eval_dataset=rows)
    )
    table, far = model.base.get_input_embeddings(), {True: 0.0, False: 0.0}

    def decoder_sees(module: Any, args: Any, kwargs: Any) -> None:
        embeds = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        clean = table.weight[seen[-1]]
        far[module.training] = max(
            far[module.training], float((embeds - clean).abs().max().detach())
        )

    seen: list[torch.Tensor] = []
    hooks = [
        table.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        model.base.model.layers[0].register_forward_pre_hook(decoder_sees, with_kwargs=True),
    ]
    trainer.args.num_train_epochs = 1
    trainer.train()
    trainer.evaluate()
    for hook in hooks:
        hook.remove()
    most = alpha / (joint.TOKENS * table.weight.shape[1]) ** 0.5
    assert 0.5 * most < far[True] <= most * (1 + 1e-6)
    assert far[False] == 0.0
    assert not table._forward_hooks
    hand = joint.ByHand(("a", "d"))
    for start in range(0, len(rows), 4):
        hand.step(rows[start : start + 4])
    off = max(
        float((x - y.detach()).abs().max())
        for path in ("a", "d")
        for x, y in zip(joint.factors(model.tree)[path], hand.factors[path], strict=True)
    )
    assert (off < 1e-6) == (alpha < 1)  # noise that vanishes trains as none does


def test_an_argument_that_asks_the_base_for_what_it_lacks_is_refused(tmp_path: Path) -> None:
    for argument, value in (("neftune_noise_alpha", 5.0), ("activation_checkpointing", True)):
        base = torch.nn.Sequential(
            torch.nn.Embedding(joint.VOCABULARY, 8), torch.nn.Linear(8, joint.VOCABULARY)
        )
        tree = lt.AdapterTree(defaults=dict(r=2, target_modules=["1"]))
        tree.add("a")
        model = lt.attach(tree, base)
        model.trainable("a")
        with pytest.raises(SpecError, match=f"{argument}: Sequential has no "):
            TreeTrainer(
                model,
                joint.arguments(tmp_path, **{argument: value}),
                train_dataset=joint.rows(["a"]),
            )


# ---------------------------------------------------------------------- checkpoints
SETTING: dict[str, Any] = dict(
    num_train_epochs=3,
    save_strategy="steps",
    save_steps=2,
    train_sampling_strategy="random",
    lr_scheduler_type="linear",
)


class KillAt(TrainerCallback):  # type: ignore[misc]
    """A power cut, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(folder: Path, temperature: float | None, **more: Any) -> tuple[TreeTrainer, Any]:
    """Three epochs of four steps, with dropout, as one run of the resumption tests."""
    base = joint.base(torch.float32)
    model = lt.attach(joint.tree(base, torch.float32), base)
    groups = model.trainable("a", "a/b/c", "d", dropout=0.2)
    args = joint.arguments(folder, **SETTING)
    return TreeTrainer(
        model, args, groups=groups, train_dataset=joint.rows(MIXED), temperature=temperature, **more
    ), model


def killed_run(folder: str, temperature: str) -> None:
    trainer, _ = resumable(
        Path(folder), float(temperature) if temperature else None, callbacks=[KillAt(7)]
    )
    trainer.train()


@slow
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, temperature: float | None) -> None:
    code = "import sys, conftest, test_trainer as t; t.killed_run(*sys.argv[1:])"
    killed = Forked(code, tmp_path / "cut", temperature or "")
    assert killed.end(300)[0] == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    whole, straight = resumable(tmp_path / "whole", temperature)
    whole.train()
    torch.manual_seed(12345)  # whatever happened before, the run's own state counts
    again, resumed = resumable(tmp_path / "cut", temperature)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 12
    wanted, got = joint.factors(straight.tree), joint.factors(resumed.tree)
    assert all(
        torch.equal(x, y) for path in wanted for x, y in zip(wanted[path], got[path], strict=True)
    )
    states = [
        [o.state[p] for g in o.param_groups for p in g["params"]]
        for o in (whole.optimizer, again.optimizer)
    ]
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    for name in ("optimizer.pt", "scheduler.pt", "factors.safetensors", "rng_state.pth"):
        last = [(tmp_path / run / "checkpoint-12" / name).read_bytes() for run in ("whole", "cut")]
        assert name == "rng_state.pth" or last[0] == last[1], name


def test_a_checkpoint_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = resumable(tmp_path, None)
    real = Trainer._save_rng_state

    def breaks(self: Trainer, folder: str) -> None:
        if "checkpoint-4" in folder:
            raise KeyboardInterrupt
        real(self, folder)

    monkeypatch.setattr(Trainer, "_save_rng_state", breaks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".unfinished", "checkpoint-2"]
    monkeypatch.undo()
    again, _ = resumable(tmp_path, None)
    again.args.save_total_limit = 2
    again.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_checkpoint_over_the_limit_loses_its_name_before_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    class Killed(BaseException):
        """What no cleanup may survive."""

    real = shutil.rmtree

    def remove(folder: Any, *args: Any, **more: Any) -> None:
        if "checkpoint-" in Path(folder).name:
            assert Path(folder).parent.name == ".unfinished"
            if killed:
                (Path(folder) / "factors.safetensors").unlink()
                raise Killed
        real(folder, *args, **more)

    trainer, _ = resumable(tmp_path, None)
    trainer.args.save_total_limit = 2
    monkeypatch.setattr(shutil, "rmtree", remove)
    if killed:
        with pytest.raises(Killed):
            trainer.train()
    else:
        trainer.train()
    there = sorted(p.name for p in tmp_path.iterdir() if p.name != ".unfinished")
    assert there == (
        ["checkpoint-4", "checkpoint-6"] if killed else ["checkpoint-10", "checkpoint-12"]
    )
    assert all((tmp_path / name / "factors.safetensors").is_file() for name in there)


@pytest.mark.parametrize("named", [True, False])
def test_it_resumes_from_a_checkpoint_that_it_was_killed_at_replacing(
    tmp_path: Path, named: bool
) -> None:
    trainer, _ = run(tmp_path, "d", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / "checkpoint-1").rename(tmp_path / ".unfinished/checkpoint-1.replaced")
    again, resumed = run(tmp_path, "d", max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if named else True)
    whole, straight = run(tmp_path / "whole", "d", max_steps=2)
    whole.train()
    assert again.state.global_step == whole.state.global_step == 2
    wanted, got = joint.factors(straight.tree), joint.factors(resumed.tree)
    assert all(
        torch.equal(x, y) for path in wanted for x, y in zip(wanted[path], got[path], strict=True)
    )


def test_the_best_checkpoint_is_known_by_its_own_name_and_comes_back(tmp_path: Path) -> None:
    evaluated: dict[str, Any] = dict(
        eval_strategy="steps", eval_steps=2, metric_for_best_model="loss/d"
    )
    saved: dict[str, Any] = dict(
        save_strategy="steps", save_steps=2, save_total_limit=1, load_best_model_at_end=True
    )
    more = dict(eval_dataset=joint.rows(["d"] * 3, 8))
    trainer, _ = run(
        tmp_path, "d", more=more, max_steps=8, greater_is_better=True, **evaluated, **saved
    )
    trainer.train()  # greater is better: the first one is the best, since training goes down
    best = trainer.state.best_model_checkpoint
    assert [str(p) for p in tmp_path.iterdir()] == [best]
    told = [log["eval_loss/d"] for log in trainer.state.log_history if "eval_loss/d" in log]
    assert trainer.evaluate()["eval_loss/d"] == max(told) != told[-1]
    assert json.loads(Path(best, "trainer_state.json").read_text())["best_model_checkpoint"] == best


def test_it_trains_in_bf16(tmp_path: Path) -> None:
    trainer, model = run(tmp_path, "a", "d", bf16=True, max_steps=2)
    before = joint.factors(model.tree)
    model.base.to(torch.bfloat16)
    trainer.train()
    after = joint.factors(model.tree)
    assert not torch.equal(before["a"][0], after["a"][0])
    assert torch.equal(before["a/b"][0], after["a/b"][0])
    assert {p.dtype for p in model.factors.of("a")} == {torch.float64}  # as they were


def test_encoders_and_decoders_train_too(tmp_path: Path) -> None:
    sizes = dict(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**sizes))
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=["q", "v"]))
    tree.add("a")
    model = lt.attach(tree, base)
    model.trainable("a")
    rows = joint.rows(["a", "", "a", "a"])
    trainer = TreeTrainer(
        model, joint.arguments(tmp_path, max_steps=1), train_dataset=rows, eval_dataset=rows
    )
    found = trainer.evaluate()
    for path, mine in (("a", [rows[0], rows[2], rows[3]]), ("(base)", [rows[1]])):
        batch = {key: torch.tensor([row[key] for row in mine]) for key in ("input_ids", "labels")}
        with torch.no_grad():  # B is zero still: the base's own loss over these rows
            assert found[f"eval_loss/{path}"] == pytest.approx(float(base(**batch).loss), rel=1e-5)
    trainer.train()
    adapter = tree.adapter("a")
    assert adapter is not None
    assert all(bool(v.B.any()) for v in adapter.modules.values())


def test_a_base_of_ones_own_trains_too(tmp_path: Path) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.table(input_ids))
            return out

    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=["head"]))
    tree.add("a")
    model = lt.attach(tree, Own())
    model.trainable("a")
    rows = joint.rows(["a", "", "a", "a"])
    trainer = TreeTrainer(
        model, joint.arguments(tmp_path, num_train_epochs=20), train_dataset=rows, eval_dataset=rows
    )
    before = trainer.evaluate()
    assert trainer.predict(rows).predictions.shape == (4, joint.TOKENS, 20)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss/a"] < before["eval_loss/a"]
    assert after["eval_loss/(base)"] == before["eval_loss/(base)"]


def test_a_node_of_a_checkpoint_can_be_promoted_and_the_tree_is_saved(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    joint.tree(joint.base()).save(zoo)
    more = dict(save_to=tmp_path / "trained")
    trainer, model = run(
        tmp_path / "run", "a/b", "d", more=more, save_strategy="steps", save_steps=2
    )
    trainer.train()
    trained = joint.factors(model.tree)
    nodes = tmp_path / "run/checkpoint-12/nodes"
    assert sorted(str(p.parent.relative_to(nodes)) for p in nodes.rglob("*.safetensors")) == [
        "a/b",
        "d",
    ]
    tree = lt.load(zoo)
    tree.update("a/b", adapter=nodes / "a/b")
    assert all(
        torch.equal(x, y) for x, y in zip(joint.factors(tree)["a/b"], trained["a/b"], strict=True)
    )
    saved = joint.factors(lt.load(tmp_path / "trained"))
    assert all(
        torch.equal(x, y)
        for path in trained
        for x, y in zip(saved[path], trained[path], strict=True)
    )


def test_a_checkpoint_of_other_nodes_changes_nothing(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, "a", save_strategy="steps", save_steps=4)
    trainer.train()
    other, model = run(tmp_path, "a", "d")
    before = joint.factors(model.tree)
    told = r"it holds a, and a, d train now\n  resume with the nodes that trained then"
    with pytest.raises(FormatError, match=told):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-99").mkdir()
    with pytest.raises(FolderError, match=r"no factors.safetensors, so no checkpoint of a tree"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-99").rmdir()
    child, _ = run(tmp_path / "child", "a/b", save_strategy="steps", save_steps=4, max_steps=4)
    child.train()
    again, model_again = run(tmp_path / "child", "a/b", max_steps=8)
    model_again.tree.update("a", weight=0.5)
    with pytest.raises(FormatError, match="a/b: a frozen ancestor, or a weight, has changed since"):
        again.train(resume_from_checkpoint=True)
    narrow, narrow_model = run(tmp_path, "a")
    narrow_model.trainable("a", dtype=None)
    for parameter in narrow_model.factors.of("a"):
        parameter.data = parameter.data.float()
    with pytest.raises(FormatError, match=r"torch.float64, the node has .* torch.float32"):
        narrow.train(resume_from_checkpoint=True)
    assert all(
        torch.equal(x, y)
        for p in before
        for x, y in zip(before[p], joint.factors(model.tree)[p], strict=True)
    )


def test_a_run_that_diverges_stops_at_its_step_saves_nothing_and_gives_back_what_it_began_with(
    tmp_path: Path,
) -> None:
    zoo = tmp_path / "zoo"
    joint.tree(joint.base()).save(zoo)
    good = {file: file.read_bytes() for file in zoo.rglob("*") if file.is_file()}
    more = dict(save_to=zoo)
    trainer, model = run(
        tmp_path / "run", "a/b", "d", more=more, save_strategy="steps", save_steps=1
    )
    for group in trainer._groups:
        group["lr"] = 1e200
    before = joint.factors(model.tree)
    with pytest.raises(
        DivergedError,
        match=r"^(a/b|d|a/b, d|.*): step [23]: the (loss is|factors are) not finite; losses of",
    ):
        trainer.train()
    after = joint.factors(model.tree)
    assert all(
        torch.equal(x, y) for path in before for x, y in zip(before[path], after[path], strict=True)
    )
    assert {file: file.read_bytes() for file in good} == good
    for kept in (tmp_path / "run").rglob("factors.safetensors"):
        assert all(t.isfinite().all() for t in load_file(kept).values())


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("package", sampled(["transformers", "accelerate"], ["transformers"]))
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; import lora_tree.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith(
        f"MissingExtra: TreeTrainer needs {package}, which is not installed\n"
        "  pip install 'lora_tree[train]'\n"
    )


def test_a_trainer_of_the_bare_base_is_refused_while_nodes_train(tmp_path: Path) -> None:
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    with pytest.raises(SpecError, match="TreeTrainer was given LlamaForCausalLM, not a TreeModel"):
        TreeTrainer(base, joint.arguments(tmp_path))
    with pytest.raises(StateError, match="no node trains"):
        TreeTrainer(model, joint.arguments(tmp_path), train_dataset=joint.rows(["a"]))
    TreeTrainer(model, joint.arguments(tmp_path))  # to evaluate only
    model.trainable("a")
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in joint.rows(["a"] * 4)]
    plain = Trainer(base, joint.arguments(tmp_path), train_dataset=rows)
    refused = pytest.raises(
        StateError, match=r"a Trainer was given the bare base while nodes train: it would move no"
    )
    with refused, model.using("a", mode="unmerged"):
        plain.train()
    with refused:
        plain.train()
    with model.using("a", mode="unmerged"):  # by hand the base is as good
        base(**default_data_collator(rows)).loss.backward()
    assert all(p.grad is not None for p in model.factors.of("a"))
    assert not base._forward_pre_hooks
    model.trainable()
    assert not base._forward_pre_hooks


def test_what_would_not_hold_node_by_node_is_refused(tmp_path: Path) -> None:
    for wrong in (dict(label_smoothing_factor=0.1), dict(torch_compile=True)):
        with pytest.raises(SpecError, match=f"TreeTrainer takes no {next(iter(wrong))}"):
            run(tmp_path, "a", **wrong)
    with pytest.raises(SpecError, match="takes no compute_loss_func"):
        run(tmp_path, "a", more=dict(compute_loss_func=lambda *_: None))
    trainer, model = run(tmp_path, "a", "d")
    with pytest.raises(SpecError, match="groups are of a, and a, d train"):
        TreeTrainer(model, trainer.args, groups=joint.groups(model, "a", "d")[:1])
    with pytest.raises(SpecError, match="save_model has no folder"):
        trainer.save_model()
    with pytest.raises(PathError, match="no node 'x'"):
        run(tmp_path, "a", more=dict(path_weights={"x": 1.0}))


def test_rows_without_a_path_or_labels_are_refused(tmp_path: Path) -> None:
    rows = joint.rows(MIXED)
    bare = [{key: value for key, value in row.items() if key != "path"} for row in rows]
    with pytest.raises(
        SpecError, match=r"a row of the data has no 'path'; it has input_ids, labels"
    ):
        run(tmp_path, "a", rows=bare)[0].train()
    with pytest.raises(SpecError, match=r"row 0 of the data has no 'path'"):
        run(tmp_path, "a", rows=bare, more=dict(temperature=1.0))
    mute = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    with pytest.raises(SpecError, match="a batch has no labels; it has input_ids"):
        run(tmp_path, "a", rows=mute)[0].train()
    with pytest.raises(PathError, match="no node 'a/x'"):
        run(tmp_path, "a", rows=joint.rows(["a/x"] * 4))[0].train()
