"""Several levels that train at once: the loss over rows, ranks and decays by depth, in runs and in
the Trainer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joint
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.demo.bytelevel import new_base, save_base
from lora_tree.errors import SpecError
from lora_tree.integrations.transformers import TreeTrainer
from lora_tree.runs import Run, Settings, read_rows
from lora_tree.training.levels import SHRINKAGE, over_of, several_levels

PATHS = ["all/fr", "all/fr", "all/fr", "all/de"]


def labels(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    made = torch.randint(0, joint.VOCABULARY, (4, 9), generator=g)
    made[0, 3:] = -100  # rows of different lengths: a mean over rows' means would show
    made[3, 6:] = -100
    return made


# ---------------------------------------------------------------------- the loss over rows
def test_over_rows_it_is_torchs_mean_over_all_tokens() -> None:
    logits = torch.randn(4, 9, joint.VOCABULARY, dtype=torch.float64)
    made = lt.path_loss(logits, labels(), PATHS, over="rows")
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels()[:, 1:].flatten())
    torch.testing.assert_close(made.total, expected)
    alone = lt.path_loss(logits, labels(), PATHS)
    assert made.by_path.keys() == alone.by_path.keys()
    for path, loss in made.by_path.items():
        torch.testing.assert_close(loss, alone.by_path[path])


def test_over_rows_micro_batches_add_up_to_the_step() -> None:
    logits = torch.randn(4, 9, joint.VOCABULARY, dtype=torch.float64)
    whole = lt.path_loss(logits, labels(), PATHS, over="rows", weights={"all/de": 3.0})
    halves = [(logits[:1], labels()[:1], PATHS[:1]), (logits[1:], labels()[1:], PATHS[1:])]
    tree = lt.AdapterTree()
    counts = lt.token_counts(tree, [(some, paths) for _, some, paths in halves])
    total = torch.zeros((), dtype=torch.float64)
    for part, some, paths in halves:
        weights = {"all/de": 3.0}
        total += lt.path_loss(part, some, paths, counts=counts, over="rows", weights=weights).total
    torch.testing.assert_close(total, whole.total)


def test_a_shared_node_gets_the_gradient_of_a_single_adapter_for_all_rows() -> None:
    """Fresh leaves add nothing, so to the root its children's rows are rows of its own."""

    def gradients(paths: list[str], over: Any) -> list[Tensor]:
        base = joint.base()
        tree = lt.AdapterTree(defaults={"r": 2, "target_modules": ["q_proj", "down_proj"]})
        for path in ("all", "all/fr", "all/de"):
            torch.manual_seed(5)
            tree.add(path)
        model = lt.attach(tree, base)
        model.trainable("all", dtype=torch.float64)
        with model.route(paths):
            logits = model(input_ids=labels().clamp(min=0)).logits
            lt.path_loss(logits, labels(), paths, over=over).total.backward()
        return [
            p.grad for p in model.factors.parameters() if p.requires_grad and p.grad is not None
        ]

    torch.manual_seed(5)
    pooled = gradients(["all"] * 4, "paths")
    torch.manual_seed(5)
    shared = gradients(PATHS, "rows")
    torch.manual_seed(5)
    by_path = gradients(PATHS, "paths")
    assert len(pooled) == len(shared) > 0
    for one, other in zip(pooled, shared, strict=True):
        torch.testing.assert_close(one, other)
    assert max(t.abs().max() for t in by_path) > 1.5 * max(t.abs().max() for t in pooled)


def test_another_mean_is_refused() -> None:
    with pytest.raises(SpecError, match="over must be paths or rows, got 'tokens'"):
        lt.path_loss(torch.zeros(4, 9, 20), labels(), PATHS, over="tokens")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="loss must be auto, rows or paths, got 'tokens'"):
        over_of("tokens", ["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "several"),
    [
        (["fr", "fr/legal"], True),
        (["fr/legal", "fr/legal/x/y"], True),
        (["fr/legal", "fr/medical", "de"], False),
        (["fr", "fr-ca"], False),
        (["fr/a", "fr/a-b"], False),
        (["fr"], False),
    ],
)
def test_several_levels(nodes: list[str], several: bool) -> None:
    assert several_levels(nodes) is several
    assert over_of("auto", nodes) == ("rows" if several else "paths")


# ---------------------------------------------------------------------- ranks and decays by depth
def made_fresh(tree: lt.AdapterTree) -> dict[str, tuple[set[int], set[float]]]:
    lt.attach(tree, joint.base())
    found = {}
    for path in tree.paths():
        adapter = tree.adapter(path)
        assert adapter is not None
        values = adapter.modules.values()
        found[path] = {value.rank for value in values}, {value.scale for value in values}
    return found


def test_ranks_follow_the_depth_and_every_scale_is_two() -> None:
    tree = lt.AdapterTree(
        defaults={"rank_by_depth": [6, 3, 2], "target_modules": ["q_proj", "v_proj"]}
    )
    for path in ("a", "a/b", "a/b/c", "a/b/c/d"):
        tree.add(path)
    tree.add("a/own", r=5)
    tree.add("a/scaled", lora_alpha=3.0)
    assert made_fresh(tree) == {
        "a": ({6}, {2.0}),
        "a/b": ({3}, {2.0}),
        "a/b/c": ({2}, {2.0}),
        "a/b/c/d": ({2}, {2.0}),
        "a/own": ({5}, {2.0}),
        "a/scaled": ({3}, {1.0}),
    }


def test_they_stand_in_a_tree_yaml_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "tree.yaml"
    file.write_text(
        "version: 1\n"
        "defaults: {rank_by_depth: [6, 2], decay_by_depth: [0, 1.5], target_modules: [q_proj]}\n"
        "tree: {a: {children: {b: {}}}}\n"
    )
    tree = lt.load(tmp_path)
    assert {path: ranks for path, (ranks, _) in made_fresh(tree).items()} == {"a": {6}, "a/b": {2}}
    tree.save(tmp_path / "copy")
    again = lt.load(tmp_path / "copy")
    assert again.defaults == tree.defaults
    assert lt.weight_decays(again, ["a", "a/b"], {"a": 1.0, "a/b": 1.0}) == {"a": 0, "a/b": 1.5}


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (
            {"rank_by_depth": [8, 2], "r": 4},
            "sets r or lora_alpha beside rank_by_depth; set those at single",
        ),
        ({"rank_by_depth": [8, 2], "lora_alpha": 4.0}, "set those at single nodes, or leave"),
        ({"rank_by_depth": []}, "rank_by_depth"),
        ({"rank_by_depth": [0]}, "rank_by_depth"),
        ({"decay_by_depth": [-1]}, "decay_by_depth"),
        ({"rank_by_dept": [8]}, "did you mean 'rank_by_depth'"),
    ],
)
def test_defaults_that_make_no_sense_are_refused(defaults: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        lt.AdapterTree(defaults=defaults)
    assert lt.AdapterTree(defaults=lt.LoraSpec(r=4)).defaults.r == 4


def test_a_node_has_no_ranks_by_depth() -> None:
    with pytest.raises(SpecError, match="rank_by_depth"):
        lt.AdapterTree().add("a", rank_by_depth=[1])


def test_decays_come_from_the_node_the_caller_the_tree_and_the_depth() -> None:
    tree = lt.AdapterTree()
    nodes = ["a", "a/b", "a/b/c"]
    for path in nodes:
        tree.add(path)
    rates = {"a": 1e-2, "a/b": 1e-2, "a/b/c": 5e-3}
    shrinks = [
        rate * decay
        for rate, decay in zip(
            rates.values(), lt.weight_decays(tree, nodes, rates).values(), strict=True
        )
    ]
    assert shrinks == pytest.approx(SHRINKAGE)
    assert set(lt.weight_decays(tree, ["a/b"], rates).values()) == {0.0}
    told = lt.weight_decays(tree, nodes, rates, by_depth=[0.5, 2], of_node={"a/b": 7})
    assert told == {"a": 0.5, "a/b": 7, "a/b/c": 2}


def test_decay_moves_a_node_as_adamw_says() -> None:
    """The product of many steps without a gradient is (1 − rate · decay) for each."""
    factor = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    tree = lt.AdapterTree()
    for path in ("a", "a/b", "a/b/c"):
        tree.add(path)
    decay = lt.weight_decays(tree, tree.paths(), dict.fromkeys(tree.paths(), 8e-3))["a/b/c"]
    optimizer = torch.optim.AdamW([factor], lr=8e-3, weight_decay=decay)
    for _ in range(10):
        factor.grad = torch.zeros_like(factor)
        optimizer.step()
    torch.testing.assert_close(factor.detach(), torch.full_like(factor, (1 - 0.024) ** 10))


# ------------------------------------------------------------------- runs, the command, the Trainer
@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_base(new_base(hidden=32, layers=1, window=64), folder)
    return folder


@pytest.fixture
def zoo(tmp_path: Path, base: Path) -> Path:
    folder = tmp_path / "zoo"
    folder.mkdir()
    spec = {
        "version": 1,
        "base": str(base),
        "defaults": {"rank_by_depth": [4, 2], "target_modules": ["q_proj", "down_proj"]},
        "tree": {"fr": {"children": {"legal": {}, "medical": {}}}},
    }
    (folder / "tree.yaml").write_text(json.dumps(spec))  # JSON is YAML
    texts = {"fr/legal": "Le bail est nul.", "fr/medical": "La fièvre monte. Le pouls aussi."}
    lines = [json.dumps({"path": path, "text": text}) for path, text in texts.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return folder


def code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return int(exit_.value.code or 0)


def opened_run(zoo: Path, base: Path, where: Path, nodes: list[str], **settings: Any) -> Run:
    import transformers

    from lora_tree.demo.bytelevel import open_base

    torch.manual_seed(1)
    tree = lt.load(zoo)
    rows = read_rows(
        [zoo.parent / "rows.jsonl"], tree, transformers.AutoTokenizer.from_pretrained(base)
    )
    model = lt.attach(tree, open_base(base).eval())
    return Run(model, rows, Settings(steps=2, batch=2, lr=1e-2, **settings), where, nodes=nodes)


def test_a_run_over_several_levels_takes_the_mean_over_rows_and_decays_by_depth(
    zoo: Path, base: Path, tmp_path: Path
) -> None:
    """The same two steps by hand: torch's own mean over all tokens, and AdamW with these decays."""
    run = opened_run(zoo, base, tmp_path / "run", ["fr", "fr/*"])
    model, nodes = run.model, ["fr", "fr/legal", "fr/medical"]
    start = {path: copy.deepcopy(run.model.factors.of(path)) for path in nodes}
    list(run.steps())
    ran = {path: [p.detach().clone() for p in model.factors.of(path)] for path in nodes}
    decays = dict(zip(nodes, (0.0, 0.8, 0.8), strict=True))
    groups = model.trainable(*nodes)
    for path in nodes:
        for parameter, value in zip(model.factors.of(path), start[path], strict=True):
            parameter.data.copy_(value.data)
    for group in groups:
        group["weight_decay"] = decays[group["name"]]
    hand = torch.optim.AdamW(groups, lr=1e-2)
    order = run._order()
    model.train()
    for step in range(2):
        rows = [run.rows[i] for i in order[2 * step : 2 * step + 2]]
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows])
        learnt = torch.tensor([[*row.labels, *[-100] * (longest - len(row.ids))] for row in rows])
        mask = torch.tensor(
            [[*[1] * len(row.ids), *[0] * (longest - len(row.ids))] for row in rows]
        )
        for group in hand.param_groups:
            group["lr"] = 1e-2 * run.settings.rate_at(step)
        with model.route([row.path for row in rows]):
            logits = model(input_ids=ids, attention_mask=mask).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), learnt[:, 1:].flatten()).backward()
        for path in nodes:
            with_rows = any(path in (row.path, row.path.split("/")[0]) for row in rows)
            parameters = model.factors.of(path)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for parameter in parameters:
                parameter.grad = parameter.grad if with_rows else None
        hand.step()
        hand.zero_grad()
    for path in nodes:
        for parameter, value in zip(model.factors.of(path), ran[path], strict=True):
            torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize(
    ("nodes", "settings", "decays"),
    [
        (["fr", "fr/*"], {}, [0.0, 0.8, 0.8]),
        (["fr/*"], {}, [0.0, 0.0]),
        (["fr", "fr/*"], {"weight_decay": 0.0}, [0.0, 0.0, 0.0]),
        (["fr", "fr/*"], {"decay_by_depth": (0.1, 3)}, [0.1, 3, 3]),
        (["fr", "fr/*"], {"decay_of": {"fr/legal": 0.5}}, [0.0, 0.5, 0.8]),
        (["fr", "fr/*"], {"lr_of": {"fr/legal": 2e-2}}, [0.0, 0.4, 0.8]),
    ],
)
def test_what_a_run_decays(
    zoo: Path, base: Path, tmp_path: Path, nodes: list[str], settings: Any, decays: list[float]
) -> None:
    run = opened_run(zoo, base, tmp_path / "run", nodes, **settings)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == pytest.approx(decays)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SpecError, match="give one"):
        Settings(weight_decay=0.1, decay_by_depth=(0, 1))
    with pytest.raises(SpecError, match="loss must be auto, rows or paths, got 'tokens'"):
        Settings(loss="tokens")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="a decay by depth must be 0 or more, got -1"):
        Settings(decay_by_depth=(0, -1))


def test_the_command_takes_them(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(tmp_path / "rows.jsonl")
    common = ["train", str(zoo), "--data", rows, "--steps", "1", "--json", "--with-ancestors"]
    assert code(*common, "--loss", "rows", "--decay-by-depth", "0,2", "--decay-of", "fr=0.1") == 0
    assert set(json.loads(capsys.readouterr().out)["nodes"]) == {"fr", "fr/legal", "fr/medical"}
    assert code(*common, "--decay-by-depth", "0;1") == 1
    assert "expected numbers with commas between, like 0,1,3" in capsys.readouterr().err
    assert code(*common, "--decay-of", "de=1") == 1
    assert "decay_of names 'de'" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["auto", "rows", "paths"])
def test_the_trainer_takes_the_same_mean(tmp_path: Path, loss: Any) -> None:
    """Its first loss is torch's own over the first batch, and its groups decay by depth."""
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    rows = joint.rows(["a/b/c", "a", "a/b", "a/b/c"])
    model.trainable("a", "a/b/c", dtype=None)
    trainer = TreeTrainer(
        model,
        joint.arguments(tmp_path, learning_rate=1e-2, weight_decay=0.0),
        train_dataset=rows,
        loss=loss,
    )
    trainer.train()
    logged = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    fresh = joint.base()
    untrained = lt.attach(joint.tree(fresh), fresh)
    ids = torch.tensor([row["input_ids"] for row in rows])
    learnt = torch.tensor([row["labels"] for row in rows])
    paths = [row["path"] for row in rows]
    with torch.no_grad(), untrained.route(paths):
        logits = untrained(input_ids=ids).logits
    if loss == "paths":
        expected = float(lt.path_loss(logits, learnt, paths).total)
    else:
        expected = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), learnt[:, 1:].flatten()))
    assert logged == pytest.approx(expected, rel=1e-5)
    decays = {group["name"]: group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == pytest.approx({"a": 0.0, "a/b/c": 2.4})


# ---------------------------------------------------------------------- rows held back
def one_leaf(zoo: Path, base: Path, where: Path, texts: list[str], **settings: Any) -> Run:
    import transformers

    from lora_tree.demo.bytelevel import open_base

    tree = lt.load(zoo)
    lines = [json.dumps({"path": "fr/legal", "text": text}) for text in texts]
    (zoo.parent / "leaf.jsonl").write_text("\n".join(lines))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = read_rows([zoo.parent / "leaf.jsonl"], tree, tokenizer)
    torch.manual_seed(1)
    model = lt.attach(tree, open_base(base).eval())
    return Run(model, rows, Settings(batch=4, **settings), where, nodes=["fr/legal"])


def test_rows_are_held_back_evenly_and_few_rows_are_not(
    zoo: Path, base: Path, tmp_path: Path
) -> None:
    texts = [f"row number {i}" for i in range(40)]
    run = one_leaf(zoo, base, tmp_path / "run", texts, steps=1)
    assert [row.where.rpartition(":")[2] for row in run.held_back] == ["11", "31"]
    assert len(run.rows) == 38
    assert not set(run.rows) & set(run.held_back)
    assert one_leaf(zoo, base, tmp_path / "few", texts[:19], steps=1).held_back == []
    assert one_leaf(zoo, base, tmp_path / "none", texts, steps=1, hold_back=0.0).held_back == []


def test_a_leaf_that_learnt_the_wrong_thing_is_kept_at_the_weight_that_does_best(
    zoo: Path, base: Path, tmp_path: Path
) -> None:
    """Rows held back are nothing like the others, so what is learnt from those does harm."""
    texts = ["zzzz qqqq zzzz qqqq"] * 30 + ["Le bail est nul."] * 10
    run = one_leaf(zoo, base, tmp_path / "run", texts, steps=30, lr=2e-2, hold_back=0.0)
    run.rows, run.held_back = run.rows[:30], run.rows[30:]
    list(run.steps())
    tree = run.model.tree
    (verdict,) = run.reweigh_leaves()
    assert not verdict.beats_parent
    assert verdict.trained > verdict.parent
    assert tree["fr/legal"].weight == verdict.weight < 1
    losses = {}
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        tree.update("fr/legal", weight=part)
        losses[part] = dense_loss(run, tree, run.held_back)
    assert verdict.weight == min(losses, key=losses.__getitem__)
    assert verdict.parent == pytest.approx(losses[0.0], rel=1e-4)
    assert verdict.trained == pytest.approx(losses[1.0], rel=1e-4)
    assert verdict.kept == pytest.approx(losses[verdict.weight], rel=1e-4)


def test_a_leaf_that_helps_keeps_its_weight(zoo: Path, base: Path, tmp_path: Path) -> None:
    texts = ["Le bail est nul."] * 40
    run = one_leaf(zoo, base, tmp_path / "run", texts, steps=20, lr=1e-2)
    list(run.steps())
    (verdict,) = run.reweigh_leaves()
    assert verdict.beats_parent
    assert verdict.weight == run.model.tree["fr/legal"].weight == 1.0


def test_a_node_of_weight_0_is_refused(zoo: Path, base: Path, tmp_path: Path) -> None:
    file = zoo / "tree.yaml"
    file.write_text(file.read_text().replace('"legal": {}', '"legal": {"weight": 0}'))
    with pytest.raises(SpecError, match="fr/legal has weight 0, so no row can train it"):
        one_leaf(zoo, base, tmp_path / "run", ["abc"], steps=1)


def dense_loss(run: Run, tree: lt.AdapterTree, rows: list[Any]) -> float:
    """Return the loss of the base with W + w·s·B·A written into its weights by hand, in float64."""
    model = copy.deepcopy(run.model.base).double()
    node = tree["fr/legal"]
    adapter = tree.adapter("fr/legal")
    assert adapter is not None
    for name, value in adapter.modules.items():
        delta = node.weight * value.scale * value.B.double() @ value.A.double()
        model.get_submodule(name).weight.data += delta
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += len(row.ids) - 1
    return total / tokens


# ---------------------------------------------------------------------- and from a Trainer
def misled(folder: Path, **more: Any) -> tuple[TreeTrainer, list[dict[str, Any]]]:
    """Train a and a/b/c on one row over and over; those to be held back are mostly unlike it."""
    model = lt.attach(joint.tree(base := joint.base()), base)
    rows, held = joint.misleading_rows()
    groups = [{**group, "lr": 0.1} for group in joint.groups(model, "a", "a/b/c")]
    trainer = TreeTrainer(
        model,
        joint.arguments(folder, max_steps=20),
        groups=groups,
        train_dataset=rows,
        **more,
    )
    return trainer, held


class Endless(torch.utils.data.IterableDataset[Any]):
    """Rows in no order."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from joint.rows(["a/b/c"])


def by_hand(tree: lt.AdapterTree, rows: list[dict[str, Any]]) -> dict[float, float]:
    """Return the loss of a/b/c's rows with the leaf at each part of its weight, from dense W."""
    hand = joint.ByHand(())
    hand.factors = joint.factors(tree)
    found = {}
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        hand.tree.update("a/b/c", weight=part)
        found[part] = float(hand.losses_of(rows)["a/b/c"])
    return found


def test_a_trainer_keeps_a_leaf_at_the_weight_that_does_best_by_hand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, held = misled(tmp_path / "run", hold_back=0.25, save_to=tmp_path / "zoo")
    trained = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    assert len(trained) == 30
    assert trained == [trained[0]] * 30
    before = joint.factors(trainer.tree_model.tree)
    trainer.train()
    tree = trainer.tree_model.tree
    losses = by_hand(tree, held)
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < 1
    (verdict,) = trainer.verdicts
    assert (verdict.node, verdict.rows, verdict.weight) == ("a/b/c", 10, best)
    assert verdict.parent == pytest.approx(losses[0.0], rel=1e-9)
    assert verdict.trained == pytest.approx(losses[1.0], rel=1e-9)
    assert verdict.kept == pytest.approx(losses[best], rel=1e-9)
    assert tree["a/b/c"].weight == lt.load(tmp_path / "zoo")["a/b/c"].weight == best
    assert str(verdict) in caplog.messages
    served = trainer.evaluate(held)["eval_loss/a/b/c"]
    assert served == pytest.approx(verdict.kept, rel=1e-9)
    assert any(
        not torch.equal(x, y) for x, y in zip(before["a"], joint.factors(tree)["a"], strict=True)
    )


def test_a_trainer_holds_rows_back_over_several_levels_unless_it_is_told_otherwise(
    tmp_path: Path,
) -> None:
    trainer, _ = misled(tmp_path)
    assert len(trainer.train_dataset) == 38  # one in twenty
    trainer, _ = misled(tmp_path, hold_back=0.0)
    assert len(trainer.train_dataset) == 40
    trainer.train()
    assert trainer.verdicts == []
    assert trainer.tree_model.tree["a/b/c"].weight == 1.0
    model = trainer.tree_model
    rows = joint.rows(["a/b/c"] * 40)
    groups = model.trainable("a/b/c")
    one = TreeTrainer(model, joint.arguments(tmp_path), groups=groups, train_dataset=rows)
    assert one.train_dataset is rows
    stream = Endless()
    args = joint.arguments(tmp_path, max_steps=1)
    TreeTrainer(model, args, groups=groups, train_dataset=stream)
    with pytest.raises(SpecError, match="a Endless has no order to take rows from"):
        TreeTrainer(model, args, groups=groups, train_dataset=stream, hold_back=0.1)
    with pytest.raises(SpecError, match="hold_back must be from 0 to below 1, got 1"):
        TreeTrainer(model, args, groups=groups, train_dataset=rows, hold_back=1)
