"""A run that diverges because of what is frozen: the error names that, and not what trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import joint
import pytest
import torch

import lora_tree as lt
from lora_tree.errors import DivergedError
from lora_tree.integrations.transformers import TreeTrainer
from lora_tree.runs import Row, Run, Settings, bisect, blame

HUGE = 1e27  # a finite number of fp32, as its square times an input is not


def model(huge: str | None = None, *, base: bool = False) -> lt.TreeModel:
    """A model over a → b → c, and d; one node's factors are enormous, or the base's head is
    infinite."""
    of = joint.base(torch.float32)
    tree = joint.tree(of, torch.float32)
    if huge is not None:
        adapter = tree.adapter(huge)
        assert adapter is not None
        tree.update(huge, adapter=adapter.with_tensors(lambda tensor: tensor * HUGE))
    if base:
        with torch.no_grad():
            of.lm_head.weight[0] = torch.inf
    return lt.attach(tree, of)


def rows(*paths: str) -> list[Row]:
    made = []
    for i, row in enumerate(joint.rows(paths)):
        made.append(Row(row["path"], tuple(row["input_ids"]), tuple(row["labels"]), f"rows:{i}"))
    return made


def diverged_run(of: lt.TreeModel, folder: Path, rows: list[Row], *nodes: str) -> str:
    settings = Settings(steps=2, batch=2, lr=1e-3)
    with pytest.raises(DivergedError) as caught:
        list(Run(of, rows, settings, folder, nodes=nodes).steps())
    return str(caught.value)


def diverged_trainer(of: lt.TreeModel, folder: Path, rows: list[Row], *nodes: str) -> str:
    plain = [{"path": r.path, "input_ids": list(r.ids), "labels": list(r.labels)} for r in rows]
    trainer = TreeTrainer(
        of, joint.arguments(folder), groups=joint.groups(of, *nodes), train_dataset=plain
    )
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    return str(caught.value)


WAYS = pytest.mark.parametrize("way", [diverged_run, diverged_trainer])


@WAYS
@pytest.mark.parametrize("huge", ["a", "a/b"])
def test_a_frozen_ancestor_is_named_and_not_the_node_that_trains(
    tmp_path: Path, way: Any, huge: str
) -> None:
    of = model(huge)
    before = [p.clone() for p in of.trainable("a/b/c") for p in p["params"]]
    told = way(of, tmp_path, rows("a/b/c", "a/b/c", "d", "d"), "a/b/c", "d")
    assert re.match(
        rf"{huge}: step [12]: this frozen part alone makes the outputs not finite, "
        r"without the nodes that train; losses of this step: ",
        told,
    )
    assert "a/b/c nan" in told
    assert "smaller learning rate" not in told
    assert "put an earlier version of it back" in told
    for mine, wanted in zip(of.factors.of("a/b/c"), before, strict=True):
        assert torch.equal(mine, wanted)


@WAYS
def test_the_base_is_named_where_its_own_outputs_are_not_finite(tmp_path: Path, way: Any) -> None:
    told = way(model(base=True), tmp_path, rows("a/b/c", "a/b/c"), "a/b/c")
    assert told.startswith("(base): step 1: this frozen part alone makes the outputs not finite")
    assert "look at its files and at the rows" in told


@WAYS
@pytest.mark.parametrize("huge", ["a/b/c", "d"])
def test_a_node_that_trains_is_named_itself(tmp_path: Path, way: Any, huge: str) -> None:
    told = way(model(huge), tmp_path, rows(huge, huge), huge)
    assert told.startswith(f"{huge}: step 1: the factors are not finite; losses of this step: ")


def test_a_frozen_node_below_one_that_trains_is_not_judged(tmp_path: Path) -> None:
    told = diverged_run(model("a/b"), tmp_path, rows("a/b/c", "a/b/c"), "a")
    assert told.startswith("a: step 1: the factors are not finite")


def test_blame_begins_with_the_node_without_which_the_loss_is_finite() -> None:
    found = blame(model("a/b"), "a/b/c", rows("a/b/c", "a/b/c"))
    assert not found.loss < float("inf")
    assert [part.node for part in found.parts] == ["a/b", "a", "a/b/c"]
    assert found.parts[0].loss < float("inf")


def test_bisect_names_the_step_at_which_the_loss_is_no_longer_finite() -> None:
    assert bisect(model("a/b"), "a/b/c", rows("a/b/c", "a/b/c")).worst == "a/b"
    assert bisect(model("a/b"), {"x": "a/b", "y": "a"}, rows("a", "a")).worst is None
