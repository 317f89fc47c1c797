"""Many paths in one batch: the time that each form and PEFT's mixed batch add to the bare base.

PEFT is given the same paths flattened: one adapter of rank 3·r for each, chosen row by row with
``adapter_names``. Rows are shuffled. "auto" is what `route` chooses.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

import lora_tree as lt
from lora_tree.engine.routing.forms import Strategy
from lora_tree.errors import plural

from .common import Case, Result, Stage, interleaved
from .setting import adapter, base, name_in_peft, with_peft
from .sizes import FULL, Size

__all__ = ["grown", "run"]

# (rows, distinct paths, nodes on the second level, tokens a row; the aim, as a part of what PEFT
# adds)
BATCHES: list[tuple[int, int, int, tuple[int, ...], float | None]] = [
    (8, 8, 2, (1, 16, 128), 0.5),
    (64, 8, 2, (1, 16), None),
    (64, 16, 4, (1, 16), None),
    (64, 64, 8, (1, 16), None),
]


def run(size: Size = FULL) -> list[Result]:
    """Return a table for each hidden size and batch."""
    return [
        result
        for hidden in (size.hidden // 2, size.hidden)
        for rows, paths, middle, tokens, aim in BATCHES
        for result in _batch(
            replace(size, hidden=hidden, layers=min(size.layers, 2)),
            rows,
            paths,
            middle,
            tokens,
            aim,
        )
    ]


@torch.no_grad()
def _batch(
    size: Size, rows: int, paths: int, middle: int, tokens: tuple[int, ...], aim: float | None
) -> list[Result]:
    model = base(size, torch.float32)
    tree = grown(model, size, paths, middle)
    flat = lt.AdapterTree()
    for i, leaf in enumerate(tree.leaves()):
        flat.add(f"leaf{i}", adapter=tree.flatten(leaf))
    with tempfile.TemporaryDirectory() as folder:
        theirs = with_peft(base(size, torch.float32), flat, Path(folder) / "flat")
    order = list(range(paths)) * (rows // paths)
    random.Random(0).shuffle(order)
    routed = [tree.leaves()[i] for i in order]
    named = [name_in_peft(f"leaf{i}") for i in order]
    attached = lt.attach(tree, model)
    results = [
        _one(
            size,
            model,
            theirs,
            attached,
            routed,
            named,
            middle,
            count,
            aim if count in tokens else None,
        )
        for count in tokens
    ]
    attached.detach()
    return results


def _one(
    size: Size, model: Any, theirs: Any, attached: lt.TreeModel,
    routed: list[str], named: list[str], middle: int,
    tokens: int, aim: float | None,
) -> Result:  # fmt: skip
    rows, paths = len(routed), len(set(routed))
    ids = torch.randint(256, (rows, tokens), generator=torch.Generator().manual_seed(0))
    draw, stage = random.Random(1), Stage()

    def ours() -> None:
        model(input_ids=ids, use_cache=False)

    def new_batch() -> None:
        with attached.route(draw.sample(routed, rows), batch_first=True):
            ours()

    def enter(strategy: Strategy) -> None:
        stage.enter(attached.route(routed, strategy=strategy, batch_first=True))
        ours()  # a batch is laid out once, here; only the last case times that too

    cases = {"bare": Case(ours, stage.leave)}
    for strategy in get_args(Strategy):
        cases[strategy] = Case(ours, lambda strategy=strategy: enter(strategy))  # type: ignore[misc]
    cases["auto, another batch each time"] = Case(new_batch, stage.leave)
    cases["PEFT"] = Case(lambda: theirs(input_ids=ids, use_cache=False, adapter_names=named))
    what = (
        f"{rows} rows over {paths} paths (1 → {middle} → {paths}), "
        f"{plural(tokens, 'token')} a row; {size}, fp32"
    )
    result = Result(what, interleaved(cases, size.repeats))
    stage.leave()
    times = result.timings
    added = {
        name: timing.over(times["bare"]) for name, timing in list(times.items()) if name != "bare"
    }
    for name, timing in added.items():
        times[f"added, {name}"] = timing
        if name == "auto" and aim is not None:
            result.aim("added, auto / PEFT", timing.ms / added["PEFT"].ms, at_most=aim)
        elif name != "PEFT":
            result.facts[f"added, {name} / PEFT"] = timing.ms / added["PEFT"].ms
    return result


def grown(
    model: Any, size: Size, leaves: int, middle: int, *, dtype: torch.dtype = torch.float32
) -> lt.AdapterTree:
    """Return a tree 1 → middle → leaves over a base."""
    tree = lt.AdapterTree()
    tree.add("r", adapter=adapter(model, size, seed=0, dtype=dtype))
    for i in range(middle):
        tree.add(f"r/m{i}", adapter=adapter(model, size, seed=1 + i, dtype=dtype))
    for i in range(leaves):
        path = f"r/m{i * middle // leaves}/l{i:02}"
        tree.add(path, adapter=adapter(model, size, seed=1 + middle + i, dtype=dtype))
    return tree
