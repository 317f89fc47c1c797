"""What is stale is trained again with what it was trained with; a checkpoint is promoted if it is
better.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shell
import torch
import transformers
from zoo import listing, opened

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.demo.bytelevel import new_base, open_base, save_base
from lora_tree.errors import SpecError
from lora_tree.runs import (
    Comparison,
    Run,
    Settings,
    SliceLosses,
    compare_trees,
    plan_retraining,
    read_rows,
)
from lora_tree.runs.evaluation import evaluate_at

SMALL = ("--steps", 2, "--batch", 2, "--lr", 0.01, "--hold-back", 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_base(new_base(hidden=32, layers=1, window=64), folder)
    return folder


def rows(file: Path, *paths: str) -> Path:
    lines = []
    for path in paths:
        for n in range(4):
            row = {"path": path, "text": f"row {n} of {path}", "kind": "even" if n % 2 else "odd"}
            lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))
    return file


def run(*arguments: object, code: int = 0) -> None:
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("ignore", lt.StaleWarning)
        main([str(argument) for argument in arguments])
    assert (left.value.code or 0) == code


@pytest.fixture(scope="module")
def stages(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose fr was trained, then its children together, then fr again: they are stale."""
    place = tmp_path_factory.mktemp("project")
    zoo = shell.fresh_zoo(place / "zoo", base, r=2, target_modules=["q_proj"])
    fr, below = (
        rows(place / "fr.jsonl", "fr"),
        rows(place / "below.jsonl", "fr/legal", "fr/medical"),
    )
    run("train", zoo, "--data", fr, *SMALL, "--quiet")
    run("train", zoo, "--data", below, *SMALL, "--lr-of", "fr/legal=0.02", "--quiet")
    run("train", zoo, "--data", fr, *SMALL, "--seed", 1, "--quiet")
    return place


@pytest.fixture
def project(stages: Path, tmp_path: Path) -> Path:
    """A copy, which is found by the same relative paths."""
    return Path(shutil.copytree(stages, tmp_path / "project"))


def stale(zoo: Path) -> list[str]:
    tree = opened(zoo)
    return [path for path in tree.paths() if tree[path].stale]


# ---------------------------------------------------------------------- the plan
def test_what_one_run_trained_is_one_run_again_and_a_dry_run_changes_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = project / "zoo"
    assert stale(zoo) == ["fr/legal", "fr/medical"]
    before = listing(project)
    run("retrain", zoo, "--stale", "--dry-run", "--json")
    told = json.loads(capsys.readouterr().out)
    assert [job["nodes"] for job in told["jobs"]] == [["fr/legal", "fr/medical"]]
    assert told["jobs"][0]["settings"]["lr_of"] == {"fr/legal": 0.02}
    assert (told["jobs"][0]["changed"], told["left"]) == ([], {})
    assert listing(project) == before


def test_parents_come_first_and_what_becomes_stale_with_them_follows(project: Path) -> None:
    plan = plan_retraining(opened(project / "zoo"), ["fr"])
    assert [job.nodes for job in plan.jobs] == [("fr",), ("fr/legal", "fr/medical")]
    one = plan_retraining(opened(project / "zoo"), ["fr/medical"])
    assert [job.nodes for job in one.jobs] == [("fr/medical",)]
    assert one.jobs[0].settings.lr_of == {}, "what is said of a node that does not train"


def test_levels_that_were_trained_together_are_trained_together(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = project / "zoo"
    run("train", zoo, "fr/**", "fr", "--data", project / "below.jsonl", *SMALL, "--quiet")
    plan = plan_retraining(opened(zoo), ["fr"])
    assert [job.nodes for job in plan.jobs] == [("fr", "fr/legal", "fr/medical")]


def test_a_run_is_cut_where_another_one_lies_between_its_levels(project: Path) -> None:
    zoo = project / "zoo"
    training = lt.history(zoo)["fr"][-1].training
    assert training is not None
    both = training.model_copy(update={"nodes": ["fr", "fr/legal/deep"]})
    tree = opened(zoo)
    tree.update("fr", adapter=tree.adapter("fr/medical"))
    tree.add("fr/legal/deep", adapter=tree.adapter("fr/legal"))
    tree.save(zoo, note=lt.SaveNote(training={"fr": both, "fr/legal/deep": both}))
    plan = plan_retraining(opened(zoo), ["fr"])
    assert [job.nodes for job in plan.jobs] == [
        ("fr",),
        ("fr/legal", "fr/medical"),
        ("fr/legal/deep",),
    ]


# ---------------------------------------------------------------------- the training
def test_it_comes_to_the_bits_of_the_same_commands_by_hand(project: Path, tmp_path: Path) -> None:
    by_hand = Path(shutil.copytree(project, tmp_path / "by_hand"))
    run("train", by_hand / "zoo", "--data", by_hand / "below.jsonl", *SMALL,
        "--lr-of", "fr/legal=0.02", "--quiet")  # fmt: skip
    run("retrain", project / "zoo", "--stale", "--yes", "--quiet")
    assert stale(project / "zoo") == []
    for path in ("fr", "fr/legal", "fr/medical"):
        name = f"zoo/{path}/adapter_model.safetensors"
        assert (project / name).read_bytes() == (by_hand / name).read_bytes()
    present = lt.history(project / "zoo")["fr/legal"][-1]
    assert present.by is not None
    assert present.by.startswith("lora-tree retrain")
    assert present.training is not None
    assert present.training.data == lt.data_files([project / "below.jsonl"], project / "zoo")


def one_node(base: Path, place: Path, **spec: Any) -> Path:
    """A tree of one new node, and rows of it beside."""
    (place / "zoo").mkdir(parents=True)
    told = {"version": 1, "base": str(base), "tree": {"fr": {"r": 2, **spec}}}
    (place / "zoo" / "tree.yaml").write_text(json.dumps(told))
    rows(place / "fr.jsonl", "fr")
    return place / "zoo"


WEIGHTS = "fr/adapter_model.safetensors"


def test_fresh_comes_to_the_bits_of_a_new_node_and_the_history_keeps_the_old(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = one_node(base, tmp_path / "twice", target_modules=["q_proj", "v_proj"])
    again = (*SMALL, "--seed", 4, "--quiet")
    run("train", zoo, "--data", zoo.parent / "fr.jsonl", *SMALL, "--quiet")
    run("train", zoo, "--data", zoo.parent / "fr.jsonl", *again)
    new = one_node(base, tmp_path / "once", target_modules=["q_proj", "v_proj"])
    run("train", new, "--data", new.parent / "fr.jsonl", *again)
    was = (zoo / WEIGHTS).read_bytes()
    assert was != (new / WEIGHTS).read_bytes()
    before = listing(zoo)
    capsys.readouterr()
    run("retrain", zoo, "fr", "--fresh", "--dry-run")
    assert "would train again, from new factors:\n  fr: 2 steps on" in capsys.readouterr().out
    run("retrain", zoo, "fr", "--fresh", code=1)
    assert "retrain asks before it trains" in capsys.readouterr().err
    assert listing(zoo) == before
    run("retrain", zoo, "fr", "--fresh", "--yes")
    assert "fr: from new factors, on the bare base; 4 rows" in capsys.readouterr().err
    assert (zoo / WEIGHTS).read_bytes() == (new / WEIGHTS).read_bytes()
    capsys.readouterr()
    run("retrain", zoo, "fr", "--fresh", "--yes")  # the same run, which is over
    said = capsys.readouterr()
    assert said.err.endswith("left as it is: fr\n")
    assert "trained fr" not in said.err
    assert "first loss" not in said.out  # the losses of the run before are none of this command's
    assert (zoo / WEIGHTS).read_bytes() == (new / WEIGHTS).read_bytes()
    run("restore", zoo, "fr@2")
    assert (zoo / WEIGHTS).read_bytes() == was


def test_a_fresh_run_that_was_cut_off_goes_on_as_one_and_as_no_other(
    base: Path, tmp_path: Path
) -> None:
    zoo = one_node(base, tmp_path, target_modules=["q_proj"])
    run("train", zoo, "--data", tmp_path / "fr.jsonl", *SMALL, "--quiet")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def begin(where: str, *, fresh: bool = True) -> Run:
        tree = lt.load(zoo)
        own = read_rows([tmp_path / "fr.jsonl"], tree, tokenizer)
        torch.manual_seed(9)
        model = lt.attach(tree, open_base(base))
        settings = Settings(steps=3, batch=2, lr=0.01, dropout=0.5)
        return Run(model, own, settings, tmp_path / where, nodes=["fr"], fresh=fresh)

    def numbers(done: Run) -> list[Any]:
        adapter = done.model.tree.adapter("fr")
        assert adapter is not None
        return [tensor.tolist() for _, tensor in adapter.named_tensors()]

    whole = begin("whole")
    list(whole.steps())
    cut = begin("cut")
    next(cut.steps())
    cut.save()
    with pytest.raises(SpecError, match="of a run with other fresh: was True and is False"):
        begin("cut", fresh=False)
    going_on = begin("cut")
    assert going_on.done == 1
    list(going_on.steps())
    assert numbers(going_on) == numbers(whole)


def test_a_node_that_replaces_tensors_can_not_begin_anew(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = one_node(base, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    run("train", zoo, "--data", tmp_path / "fr.jsonl", *SMALL, "--quiet")
    before = listing(zoo)
    capsys.readouterr()
    run("retrain", zoo, "fr", "--fresh", "--yes", code=1)
    said = "can't train fr: it replaces lm_head.weight, and only factors can be drawn anew"
    assert said in capsys.readouterr().out
    assert listing(zoo) == before


def test_it_asks_and_does_nothing_where_nobody_can_answer(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(project)
    run("retrain", project / "zoo", "--stale", code=1)
    printed = capsys.readouterr()
    assert "fr/legal, fr/medical: 2 steps on" in printed.out
    assert "--yes trains without asking" in printed.err
    assert listing(project) == before
    run("retrain", project / "zoo", code=1)
    assert "--stale" in capsys.readouterr().err


def test_nothing_stale_is_nothing_to_do(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lt.lock(project / "zoo", accept_stale=True)
    run("retrain", project / "zoo", "--stale")
    assert "nothing is stale" in capsys.readouterr().out


def test_data_that_changed_is_said_and_data_that_is_gone_holds_back_all_below(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = project / "zoo"
    with open(project / "below.jsonl", "a") as file:
        file.write(json.dumps({"path": "fr/legal", "text": "one more"}) + "\n")
    run("retrain", zoo, "--stale", "--dry-run")
    assert f"changed since it was trained: {project / 'below.jsonl'}" in capsys.readouterr().out
    (project / "fr.jsonl").unlink()
    run("retrain", zoo, "fr", "--dry-run", code=1)
    told = capsys.readouterr().out
    assert "can't train fr: its rows are gone: ../fr.jsonl" in told
    assert "can't train fr/legal: it stands on fr, which can't be trained again" in told


def test_a_dry_run_refuses_rows_that_the_run_refuses(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = project / "zoo"
    with open(project / "below.jsonl", "a") as file:
        file.write("{not json\n")
    told = []
    for option in ("--dry-run", "--yes"):
        run("retrain", zoo, "--stale", option, code=1)
        told.append(capsys.readouterr().err)
    assert "below.jsonl" in told[0]
    assert told[0] == told[1]


def test_what_nobody_noted_is_said(project: Path) -> None:
    zoo = project / "zoo"
    tree = opened(zoo)
    tree.update("fr/legal", adapter=tree.adapter("fr/medical"))
    tree.move("fr/medical", "fr/doctors")
    tree.save(zoo)
    plan = plan_retraining(opened(zoo), ["fr/*"])
    assert plan.left["fr/legal"] == "no save recorded how it was trained"
    assert "trained as fr/legal, fr/medical" in plan.left["fr/doctors"]
    with pytest.raises(SpecError, match="was not opened from a folder"):
        plan_retraining(lt.AdapterTree())


def test_a_node_below_that_never_trained_is_left_alone(project: Path) -> None:
    zoo = project / "zoo"
    tree = opened(zoo)
    fresh = tree.adapter("fr/legal")
    assert fresh is not None
    zeros = {n: replace(v, B=torch.zeros_like(v.B)) for n, v in fresh.modules.items()}
    tree.add("fr/legal/next", adapter=lt.Adapter(zeros))
    tree.save(zoo)
    plan = plan_retraining(opened(zoo), ["fr/legal"])
    assert (plan.nodes, dict(plan.left)) == (["fr/legal"], {})
    # It is told about if it is named.
    plan = plan_retraining(opened(zoo), ["fr/legal/next"])
    assert plan.left == {"fr/legal/next": "no save recorded how it was trained"}


# ---------------------------------------------------------------------- promoted if it is better
def test_it_is_better_if_the_whole_falls_and_no_slice_rises() -> None:
    fell, rose, same = SliceLosses(2, 2.0, 1.0), SliceLosses(2, 1.0, 2.0), SliceLosses(2, 1.0, 1.0)
    assert Comparison("fr", fell, {}).is_better
    assert Comparison("fr", fell, {"a": fell, "b": same}).is_better
    assert not Comparison("fr", same, {}).is_better
    assert not Comparison("fr", rose, {}).is_better
    uneven = Comparison("fr", fell, {"a": fell, "b": rose})
    assert (uneven.is_better, uneven.worse) == (False, ["b"])
    assert not Comparison("fr", SliceLosses(1, 1.0, float("nan")), {}).is_better


def test_losses_are_those_of_each_row_at_its_own_path(project: Path, base: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    before, after = opened(project / "zoo"), opened(project / "zoo")
    after.update("fr", weight=3.0)
    legal = after.adapter("fr/legal")
    assert legal is not None
    after.add("fr/tax", adapter=legal.with_tensors(torch.clone))
    file = rows(project / "held-out.jsonl", "fr", "fr/legal", "fr/tax", "de")
    read = read_rows([file], after, tokenizer, slice_by="kind")
    model = open_base(base)
    found = compare_trees(before, after, "fr", model, read)
    assert found.whole.rows == 12, "those of de do not go through fr"
    assert set(found.slices) == {"even", "odd"}
    for tree, which in ((before, "before"), (after, "after")):
        attached = lt.attach(tree, model)
        for name, own in [*found.slices.items(), ("", found.whole)]:
            mine = [row for row in read if row.path != "de" and name in ("", row.slice)]
            # A node that is yet to come counts as its parent.
            paths = [row.path if row.path in tree else "fr" for row in mine]
            sums = [
                evaluate_at(attached, [row], path) * row.learnt
                for row, path in zip(mine, paths, strict=True)
            ]
            mean = sum(sums) / sum(row.learnt for row in mine)
            assert getattr(own, which) == pytest.approx(mean, rel=1e-5)
        attached.detach()
    with pytest.raises(SpecError, match="no row has a column 'topic'"):
        read_rows([file], after, tokenizer, slice_by="topic")


def test_promote_takes_what_is_better_and_exits_1_where_it_is_not(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo, held = project / "zoo", rows(project / "held-out.jsonl", "fr")
    run("train", zoo, "fr", "--data", project / "fr.jsonl", *SMALL, "--steps", 40, "--quiet")
    tree = opened(zoo)
    good = tree.adapter("fr")
    (last,) = (zoo / ".training").glob("checkpoint-*")
    promoted = ("promote", zoo, "fr", "--from", last, "--if-better", "--data", held)
    before = listing(zoo)
    run(*promoted, "--slice", "kind", code=1)
    printed = capsys.readouterr()
    assert "fr: not better; the tree stays as it is" in printed.err, "it has just these numbers"
    assert "even" in printed.out
    assert listing(zoo) == before
    lt.restore(zoo, "fr@1")
    run(*promoted, "--slice", "kind", "--json")
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (told["promoted"], told["better"], told["worse"]) == (True, True, [])
    assert told["whole"]["after"] < told["whole"]["before"]
    now = opened(zoo).adapter("fr")
    assert now is not None
    assert good is not None
    for name, value in good.modules.items():
        assert torch.equal(value.B, now.modules[name].B)
    present = lt.history(zoo)["fr"][-1]
    assert present.training is not None
    assert present.losses is not None
    assert present.training.settings["steps"] == 40, "promoted with what its run trained with"
    run("promote", zoo, "fr", "--from", last, "--if-better", code=1)
    assert "--data" in capsys.readouterr().err
