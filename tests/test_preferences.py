"""Rows that prefer one answer: a run learns them by DPO against each path's parent, as dense
algebra does by hand.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import joint
import pytest
import torch
import torch.nn.functional as F
from test_runs import CHAT, base, data, lora_tree, tokenizer, zoo  # noqa: F401  (fixtures)
from torch import Tensor
from torch.func import functional_call

import lora_tree as lt
from lora_tree.errors import SpecError
from lora_tree.runs import Row, Run, Settings, evaluate, read_rows
from lora_tree.runs.held_back import loss_of_rows

TRAINING = ("a/b/c", "d")
BETA = 0.3


def answer(path: str, prompt: list[int], ids: list[int]) -> Row:
    return Row(path, (*prompt, *ids), (*[-100] * len(prompt), *ids), "x:1")


def pairs(paths: list[str], seed: int = 5) -> list[Row]:
    """Preferences of different lengths, so that batches have padding."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(0, joint.VOCABULARY, (length,), generator=draw).tolist()

    made = []
    for i, path in enumerate(paths):
        prompt = ids(1 + i % 3)
        worse = answer(path, prompt, ids(3))
        made.append(replace(answer(path, prompt, ids(2 + i % 2)), rejected=worse))
    return made


def by_hand(hand: joint.ByHand, path: str, row: Row, factors: bool = True) -> Tensor:
    """log p(answer) by a dense model."""
    weights = hand.dense(path)
    if not factors:
        weights = {name: weight.detach() for name, weight in weights.items()}
    inputs = dict(input_ids=torch.tensor([row.ids]))
    logits = functional_call(hand.model, weights, kwargs=inputs).logits[0]
    picked = [
        logits[t - 1].log_softmax(-1)[row.labels[t]]
        for t in range(1, len(row.ids))
        if row.labels[t] != -100
    ]
    return torch.stack(picked).sum()


def loss_by_hand(hand: joint.ByHand, row: Row) -> Tensor:
    parent = row.path.rpartition("/")[0]
    ratios = []
    for one in (row, row.rejected):
        assert one is not None
        ratios.append(by_hand(hand, row.path, one) - by_hand(hand, parent, one, factors=False))
    return -F.logsigmoid(BETA * (ratios[0] - ratios[1]))


def test_many_nodes_at_once_learn_what_each_learns_by_dense_algebra(tmp_path: Path) -> None:
    of = joint.base()
    model = lt.attach(joint.tree(of), of)
    rows = pairs(["a/b/c", "d", "a/b/c", "a/b/c", "d", "a/b/c"])
    settings = Settings(
        steps=3,
        batch=2,
        accumulate=3,
        lr_of={node: joint.RATES[node] for node in TRAINING},
        weight_decay=joint.DECAY,
        clip_norm=joint.CLIP,
        schedule="constant",
        hold_back=0,
        beta=BETA,
        weights={"d": 0.5},
    )
    run = Run(model, rows, settings, tmp_path / "run", nodes=TRAINING)
    assert run.prefers
    hand = joint.ByHand(TRAINING)
    seen: set[str] = set()
    drawn = [run.rows[i] for i in run._order()]
    for step in run.steps():
        losses: dict[str, list[Tensor]] = {}
        for row in drawn[6 * (step.number - 1) : 6 * step.number]:
            losses.setdefault(row.path, []).append(loss_by_hand(hand, row))
        means = {path: torch.stack(mine).mean() for path, mine in losses.items()}
        wanted = {path: float(mean.detach()) for path, mean in means.items()}
        assert step.losses == pytest.approx(wanted, rel=1e-9)
        seen.update(means)
        torch.stack(
            [(0.5 if path == "d" else 1.0) * means[path] for path in means]
        ).sum().backward()
        for path, optimizer in hand.optimizers.items():
            if path in means:
                torch.nn.utils.clip_grad_norm_(hand.factors[path], joint.CLIP)
                optimizer.step()
            optimizer.zero_grad()
    assert seen == set(TRAINING)
    hand.same_as(joint.factors(model.tree))
    model.trainable()
    # Evaluated, each domain is compared with its own path's parent; a parent's loss is log 2.
    found = evaluate(model, rows, beta=BETA, batch=4)
    with torch.no_grad():
        own = {row.path: [] for row in rows}  # type: ignore[var-annotated]
        for row in rows:
            own[row.path].append(float(loss_by_hand(hand, row)))
    for path, domain in (("a/b/c", "a/b/c"), ("d", "d")):
        cell = found.losses[found.paths.index(path)][found.domains.index(domain)]
        assert cell == pytest.approx(sum(own[domain]) / len(own[domain]), rel=1e-6)
    assert found.losses[found.paths.index("a/b")][0] == pytest.approx(0.6931471806)
    assert found.unit == "nats per preference"
    # By which a run tells its best checkpoint: each row at its own path.
    whole = [loss for losses in own.values() for loss in losses]
    loss = loss_of_rows(model, rows, beta=BETA, batch=4)
    assert loss == pytest.approx(sum(whole) / len(whole), rel=1e-6)


def test_stopped_and_resumed_it_comes_to_the_same_bits(tmp_path: Path) -> None:
    rows = pairs(["d", "a/b/c"] * 4)
    settings = Settings(steps=4, batch=2, lr=0.05, warm_up=2, beta=BETA, hold_back=0)
    factors = []
    for stops in (False, True):
        of = joint.base()
        model = lt.attach(joint.tree(of), of)
        run = Run(model, rows, settings, tmp_path / f"{stops}")
        for step in run.steps():
            if stops and step.number == 2:
                run.save()
                break
        if stops:
            of = joint.base()
            model = lt.attach(joint.tree(of), of)
            run = Run(model, rows, settings, tmp_path / f"{stops}")
            assert run.done == 2
            list(run.steps())
        factors.append(joint.factors(model.tree))
    for path in TRAINING:
        for x, y in zip(factors[0][path], factors[1][path], strict=True):
            assert torch.equal(x, y)


def test_what_would_compare_with_something_else_than_the_parent_is_refused(tmp_path: Path) -> None:
    of = joint.base()
    model = lt.attach(joint.tree(of), of)
    rows = pairs(["a/b/c", "d"])

    def refused(match: str, rows: list[Row] = rows, nodes: Any = (), **settings: Any) -> None:
        with pytest.raises(SpecError, match=match):
            Run(model, rows, Settings(**settings), tmp_path / "run", nodes=nodes)
        assert not model.factors.training_paths

    refused(r"x:1: a/b is the reference for rows of a/b/c, and a/b trains", nodes=("a/b", "a/b/c"))
    refused("a/b is the reference for rows of a/b/c, and a trains", nodes=("a",))
    refused("dropout is 0.1, and the rows are preferences", dropout=0.1)
    refused("x:1 is a preference .*, and y:2 is not", [*rows, _text("d", "y:2")])
    with pytest.raises(SpecError, match="beta must be a positive number"):
        Settings(beta=0)


def _text(path: str, where: str) -> Row:
    return Row(path, (1, 2, 3), (1, 2, 3), where)


def test_what_is_preferred_is_what_the_row_says(
    tmp_path: Path,
    zoo: Path,  # noqa: F811
    base: Path,  # noqa: F811
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)  # noqa: F811
    tokenizer.chat_template = CHAT
    tree = lt.load(zoo)

    def said(**row: Any) -> Row:
        return read_rows([data(tmp_path, {"path": "fr", **row})], tree, tokenizer)[0]

    row = said(prompt="ab", chosen="c", rejected="de")
    assert (row.ids, row.labels) == ((97, 98, 99, 256), (-100, -100, 99, 256))
    assert row.rejected is not None
    assert row.rejected.ids == (97, 98, 100, 101, 256)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    yes, no = ([{"role": "assistant", "content": content}] for content in ("d", "e"))
    row = said(prompt=prompt, chosen=yes, rejected=no)
    assert bytes(row.ids).decode() == "[user]a[assistant]b[user]c[assistant]d"
    # The assistant's turn in the prompt is read, not learnt.
    assert bytes(label for label in row.labels if label >= 0) == b"d"
    assert row.rejected is not None
    assert bytes(row.rejected.ids).decode().endswith("[assistant]e")
    for bad, match in (
        (dict(prompt="a", chosen="b"), "prompt, chosen and rejected"),
        (dict(prompt="a", chosen="b", rejected="b"), "chosen and rejected are the same"),
        (dict(prompt="a", chosen="b", rejected=3), "'rejected' must be a string, got int"),
        (dict(prompt=prompt, chosen=yes, rejected="no"), "'rejected' is a str"),
        (dict(prompt="a", chosen="b", rejected="c", text="d"), "this has"),
    ):
        with pytest.raises(SpecError, match=rf"rows.jsonl:1: .*{match}"):
            said(**bad)


def test_the_command_trains_a_node_against_its_parent_and_measures_it(
    tmp_path: Path,
    zoo: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = data(
        tmp_path,
        *(
            {"path": "fr/legal", "prompt": f"row {i}: ", "chosen": "yes", "rejected": "no"}
            for i in range(20)
        ),
    )
    word = ("--data", rows, "--steps", 6, "--lr", 1e-2, "--batch", 4, "--beta", 0.5)
    lora_tree("train", zoo, *word)
    printed = capsys.readouterr()
    assert "DPO, beta 0.5: each node against its frozen parent" in printed.err
    assert re.search(r"^fr/legal +0\.693 ", printed.out, re.MULTILINE)
    verdict = next(line for line in printed.out.splitlines() if "held-back" in line)
    assert "its parent 0.693" in verdict
    lora_tree("eval", zoo, "--data", rows, "--beta", 0.5, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["unit"] == "nats per preference"
    assert told["losses"]["fr"]["fr/legal"] == pytest.approx(0.693147, rel=1e-5)
    assert told["losses"]["fr/legal"]["fr/legal"] < 0.69
