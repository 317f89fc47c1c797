"""Decode steps of a large mixed batch: each form, eager and compiled, beside the bare base.

Flattened adapters are timed as well.

Meant for a GPU (`torch.cuda` is used if there is one): hidden 4096, bf16, 64 rows over 1 → 8 → 64
nodes, one token a row. There is no key/value cache, so the time is that of the linear layers, where
the adapters are. "flattened" is the same 64 paths as 64 single adapters of rank 3·r without a tree.
The bytes are those of the factors that a step reads.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, get_args

import torch

import lora_tree as lt
from lora_tree.engine.routing.forms import Strategy

from .common import Case, Result, Stage, interleaved
from .routed import grown
from .setting import base
from .sizes import FULL, Size

__all__ = ["run"]

ROWS, MIDDLE = 64, 8


@torch.no_grad()
def run(size: Size = FULL) -> list[Result]:
    """Return one table; on a GPU hidden is doubled."""
    cuda = torch.cuda.is_available()
    device, dtype = (
        torch.device("cuda" if cuda else "cpu"),
        torch.bfloat16 if cuda else torch.float32,
    )
    size = replace(
        size, hidden=2 * size.hidden if cuda else size.hidden // 2, layers=min(size.layers, 2)
    )
    tree, twin = (grown(base(size, dtype), size, ROWS, MIDDLE, dtype=dtype) for _ in range(2))
    flat = lt.AdapterTree()
    for i, leaf in enumerate(tree.leaves()):
        flat.add(f"leaf{i}", adapter=tree.flatten(leaf, dtype=dtype))
    order = random.Random(0).sample(range(ROWS), ROWS)
    routed, flattened = [tree.leaves()[i] for i in order], [flat.leaves()[i] for i in order]
    ids = torch.randint(256, (ROWS, 1), generator=torch.Generator().manual_seed(0)).to(device)
    models = [lt.attach(t, base(size, dtype).to(device)) for t in (tree, flat, twin)]
    models[2].prepare(max_rank=size.r * (1 + MIDDLE + ROWS))
    compiled: Any = torch.compile(models[2].base) if cuda else models[2].base
    stage = Stage()

    def enter(
        model: lt.TreeModel, paths: list[str], call: Any, strategy: Strategy = "auto"
    ) -> None:
        stage.enter(model.route(paths, strategy=strategy, batch_first=True))
        step(call)  # lays the batch out, and compiles

    def step(call: Any) -> None:
        call(input_ids=ids, use_cache=False)
        if cuda:
            torch.cuda.synchronize()

    cases = {"bare": Case(lambda: step(models[0].base), stage.leave)}
    for strategy in get_args(Strategy):
        inside = lambda s=strategy: enter(models[0], routed, models[0].base, s)  # noqa: E731
        cases[strategy] = Case(lambda: step(models[0].base), inside)
    cases["flattened"] = Case(
        lambda: step(models[1].base), lambda: enter(models[1], flattened, models[1].base)
    )
    how = "compiled" if cuda else "prepared, not compiled"
    cases[f"bare, {how}"] = Case(lambda: step(compiled), stage.leave)
    cases[f"matrix, {how}"] = Case(
        lambda: step(compiled), lambda: enter(models[2], routed, compiled)
    )
    where = torch.cuda.get_device_name() if cuda else "CPU"
    title = (
        f"a decode step, {ROWS} rows over 1 → {MIDDLE} → {ROWS} nodes; "
        f"{size}, {str(dtype)[6:]}, {where}"
    )
    result = Result(title, interleaved(cases, size.repeats))
    stage.leave()
    for name, timing in list(result.timings.items()):
        if not name.startswith("bare"):
            bare = result.timings[f"bare, {how}" if how in name else "bare"]
            result.facts[f"{name} / bare"] = timing.ms / bare.ms
    nodes, leaves = tree.paths(), flat.paths()
    result.facts["MB of factors read, each node once"] = _megabytes(tree, nodes)
    result.facts["MB of factors read, each path's own"] = _megabytes(flat, leaves)
    for model in models:
        model.detach()
    return [result]


def _megabytes(tree: lt.AdapterTree, paths: list[str]) -> float:
    adapters = [tree.adapter(path) for path in paths]
    return sum(adapter.nbytes for adapter in adapters if adapter is not None) / 1e6
