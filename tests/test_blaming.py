"""Blame and bisect: each part left out, against a base with dense float64 sums without that
part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import joint
import oracle
import pytest
import torch
from shell import Shell, answer, save_base
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import PathError, SpecError
from lora_tree.runs import Row, bisect, blame

PATHS = ("fr", "fr/legal", "fr/legal/x")


def tree_over(base: nn.Module) -> lt.AdapterTree:
    """Three nodes below each other; the middle one has other modules than those around it."""
    tree = lt.AdapterTree()
    for i, path in enumerate(PATHS):
        ends = ("q_proj", "up_proj") if i == 1 else ("q_proj", "v_proj")
        shapes = oracle.shapes_of(base, *ends)
        modules = {}
        for j, (name, (out, into)) in enumerate(shapes.items()):
            value = oracle.low_rank(out, into, 2, seed=100 * i + j, scale=0.3)
            modules[name] = value.to(dtype=torch.float64)
        tree.add(path, adapter=lt.Adapter(modules), weight=(1.0, 0.5, 1.0)[i])
    return tree


def rows(lengths: Sequence[int] = (5, 9, 7)) -> list[Row]:
    draw = torch.Generator().manual_seed(1)
    made = []
    for i, length in enumerate(lengths):
        ids = tuple(torch.randint(3, joint.VOCABULARY, (length,), generator=draw).tolist())
        labels = (-100, -100, *ids[2:])
        made.append(Row("fr", ids, labels, f"rows:{i}"))
    return made


def chances(base: nn.Module, tree: lt.AdapterTree, path: str) -> list[Tensor]:
    """The log probabilities at every learnt token, row by row, from a base with the dense sum."""
    told = []
    with torch.no_grad():
        summed = oracle.with_sum(base, tree, path)
        for row in rows():
            logits = summed(input_ids=torch.tensor([row.ids])).logits[0, 1:-1]
            told.append(logits.log_softmax(-1))
    return told


def loss(told: Sequence[Tensor]) -> float:
    sums = [
        -each[torch.arange(len(each)), torch.tensor(row.ids[2:])].sum()
        for each, row in zip(told, rows(), strict=True)
    ]
    return float(sum(sums)) / sum(row.learnt for row in rows())


def apart(whole: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    sums = [float((p.exp() * (p - q)).sum()) for p, q in zip(whole, other, strict=True)]
    return math.fsum(sums) / sum(row.learnt for row in rows())


def without(tree: lt.AdapterTree, node: str, modules: Sequence[str]) -> lt.AdapterTree:
    """The tree with some modules of a node at zero."""
    other = lt.AdapterTree()
    for path in tree.paths():
        adapter = tree.adapter(path)
        assert adapter is not None
        if path == node:
            zeros = {name: replace(adapter.modules[name], scale=0.0) for name in modules}
            adapter = replace(adapter, modules={**adapter.modules, **zeros})
        other.add(path, adapter=adapter, weight=tree[path].weight)
    return other


@pytest.mark.parametrize("by", ["nodes", "kinds", "layers", "modules"])
@pytest.mark.parametrize("batch", [32, 3])
def test_blame_is_what_a_base_without_that_part_does(by: Any, batch: int) -> None:
    base = joint.base()
    tree = tree_over(base)
    model = lt.attach(tree, base)
    found = blame(model, "fr/legal/x", rows(), by=by, batch=batch)
    assert found.tokens == 5 + 9 + 7 - 6
    plain = joint.base()
    whole = chances(plain, tree, "fr/legal/x")
    assert found.loss == pytest.approx(loss(whole), rel=1e-6)
    parts: dict[tuple[str, str], list[str]] = {}
    for path in PATHS:
        adapter = tree.adapter(path)
        assert adapter is not None
        for name in adapter.modules:
            label = {
                "nodes": "",
                "kinds": name.rpartition(".")[2],
                "layers": f"layer {name.split('.')[2]}",
                "modules": name,
            }[by]
            parts.setdefault((path, label), []).append(name)
    assert {(part.node, part.part) for part in found.parts} == set(parts)
    for part in found.parts:
        told = chances(plain, without(tree, part.node, parts[part.node, part.part]), "fr/legal/x")
        assert part.loss == pytest.approx(loss(told), rel=1e-6)
        # The model's norms round to fp32, and rows that are padded are rounded otherwise: so much
        # of a loss of 5 is noise.
        assert part.change == pytest.approx(loss(told) - loss(whole), rel=1e-4, abs=1e-8)
        assert part.divergence == pytest.approx(apart(whole, told), rel=1e-4, abs=1e-9)
    changes = [abs(part.change) for part in found.parts]
    assert changes == sorted(changes, reverse=True)


def test_blame_of_one_node_leaves_the_base_as_it_was() -> None:
    base = joint.base()
    model = lt.attach(tree_over(base), base)
    model.train()
    model.activate("fr")
    found = blame(model, "fr/legal/x", rows(), nodes=["fr/legal"])
    assert [part.node for part in found.parts] == ["fr/legal"]
    assert model.active == "fr"
    assert model.training


def test_bisect_names_the_step_that_made_it_worse() -> None:
    base = joint.base()
    tree = tree_over(base)
    model = lt.attach(tree, base)
    found = bisect(model, "fr/legal/x", rows())
    plain = joint.base()
    wanted = [loss(chances(plain, tree, path)) for path in ("", *PATHS)]
    assert found.steps == ("", *PATHS)
    assert list(found.losses) == pytest.approx(wanted, rel=1e-6)
    rises = [after - before for before, after in pairwise(wanted)]
    assert found.worst == PATHS[rises.index(max(rises))]
    falling = bisect(model, {"first": found.worst or "", "then": "fr"}, rows())
    assert falling.steps == ("first", "then")


@pytest.mark.parametrize(
    ("path", "given", "error", "says"),
    [
        ("fr/x", {}, PathError, "fr/x"),
        ("fr", {"nodes": ["fr/legal"]}, PathError, "not on the lineage"),
        ("fr", {"by": "heads"}, SpecError, "nodes, kinds, layers, modules"),
        ("fr", {"rows": []}, SpecError, "no rows"),
        ("fr", {"rows": [replace(rows()[0], rejected=(1, 2))]}, SpecError, "prefers one answer"),
        ("fr", {"batch": 0}, SpecError, "batch"),
        ("", {}, SpecError, "no node"),
    ],
)
def test_what_can_not_be_blamed_is_refused(
    path: str, given: dict[str, Any], error: type[Exception], says: str
) -> None:
    base = joint.base()
    model = lt.attach(tree_over(base), base)
    some = given.pop("rows", rows())
    with pytest.raises(error, match=says):
        blame(model, path, some, **given)
    with pytest.raises(SpecError, match="two steps"):
        bisect(model, {"one": "fr"}, rows())


def test_the_commands_tell_parts_and_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base")
    zoo, data = tmp_path / "zoo", tmp_path / "rows.jsonl"
    tree = lt.AdapterTree(base=str(base))
    for i, path in enumerate(("fr", "fr/legal")):
        value = oracle.low_rank(32, 32, 2, seed=i)
        tree.add(path, adapter=lt.Adapter({"model.layers.0.self_attn.q_proj": value}))
    tree.save(zoo)
    adapter = tree.adapter("fr/legal")
    assert adapter is not None
    tree.update("fr/legal", adapter=adapter.scaled(-3.0))
    tree.save(zoo)
    data.write_text('{"path": "fr/legal", "text": "article 1382"}\n')
    shell = Shell(capsys)
    told = answer(shell, "blame", zoo, "fr/legal", "--data", data)
    assert {part["node"] for part in told["parts"]} == {"fr", "fr/legal"}
    code, out, _ = shell("blame", zoo, "fr/legal", "--data", data, "--by", "kinds", "--most", "1")
    assert code == 0
    assert "q_proj" in out
    assert "and 1 more part: " in out
    told = answer(shell, "bisect", zoo, "fr/legal", "--data", data)
    assert list(told["losses"]) == ["", "fr", "fr/legal"]
    told = answer(shell, "bisect", zoo, "fr/legal", "--data", data, "--versions")
    assert list(told["losses"]) == ["fr/legal@1", "fr/legal@2"]
    code, _, err = shell("bisect", zoo, "fr", "--data", data, "--versions")
    assert code != 0
    assert "no earlier version is kept" in err
