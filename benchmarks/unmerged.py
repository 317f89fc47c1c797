"""Unmerged: the cost of a switch in a small and a large tree, and of a side path of depth 3."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import lora_tree as lt

from .common import Case, Result, cycle, interleaved
from .setting import START, adapter, base, name_in_peft, tree, with_peft
from .sizes import FULL, Size

__all__ = ["run"]

FEW = 10


def run(size: Size = FULL) -> list[Result]:
    """Return a table of switches, then tables of forwards."""
    return [_switches(size), _forward(size, torch.float32), _forward(size, torch.bfloat16)]


@torch.no_grad()
def _switches(size: Size) -> Result:
    dtype = torch.bfloat16
    model, shared = (
        base(size, dtype),
        [adapter(base(size, dtype), size, seed=s, dtype=dtype) for s in range(3)],
    )
    few, many = _wide_tree(FEW, shared), _wide_tree(size.nodes, shared)
    with tempfile.TemporaryDirectory() as folder:
        theirs = with_peft(base(size, dtype), _wide_tree(FEW, shared), Path(folder) / "tree")
    small, large = lt.attach(few, model), lt.attach(many, base(size, dtype))
    few_pair, many_pair = cycle(*few.leaves()[:2]), cycle(*many.leaves()[:2])
    new, names = iter(many.leaves()[2:]), cycle(*map(name_in_peft, few.paths()))
    factors = [
        t for _, _, a in many.terms(many.leaves()[0]) for v in a.modules.values() for t in v.tensors
    ]
    copies: list[
        list[torch.Tensor]
    ] = []  # kept like a path's stacks, so that both fill fresh memory
    cases = {
        f"used before, {FEW} nodes": Case(lambda: small.activate(few_pair(), mode="unmerged")),
        f"used before, {size.nodes} nodes": Case(
            lambda: large.activate(many_pair(), mode="unmerged")
        ),
        "new path": Case(lambda: large.activate(next(new), mode="unmerged")),
        "copy of a lineage's factors": Case(lambda: copies.append([t.clone() for t in factors])),
        f"PEFT set_adapter, {FEW} adapters": Case(lambda: theirs.set_adapter(names())),
    }
    result = Result(f"unmerged switch; {size}, bf16", interleaved(cases, size.repeats))
    used, used_many, fresh, copy, peft = (t.ms for t in result.timings.values())
    result.aim("used before / PEFT", used / peft, at_most=0.1)
    result.aim(f"{size.nodes} nodes / {FEW} nodes", used_many / used, at_most=1.2)
    result.aim("(new path − used before) / copy", (fresh - used_many) / copy, at_most=2.0)
    return result


def _wide_tree(nodes: int, shared: list[lt.Adapter]) -> lt.AdapterTree:
    """Return a tree of two inner nodes and leaves; factors are shared, weights differ by path."""
    grown = lt.AdapterTree()
    grown.add("a", adapter=shared[0])
    grown.add("a/b", adapter=shared[1])
    for i in range(nodes - 2):
        grown.add(f"a/b/n{i:04}", adapter=lt.Adapter(shared[2].modules), weight=1 + i / nodes)
    return grown


@torch.no_grad()
def _forward(size: Size, dtype: torch.dtype) -> Result:
    model = base(size, dtype)
    adapters = tree(model, size, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs = with_peft(base(size, dtype), adapters, Path(folder) / "tree")
    theirs.base_model.set_adapter([name_in_peft(path) for path in adapters.lineage(START)])
    ids = torch.randint(256, (size.rows, size.tokens), generator=torch.Generator().manual_seed(0))
    attached = lt.attach(adapters, model)
    cases = {
        "bare": Case(lambda: _call(model, ids), attached.deactivate),
        "merged": Case(lambda: _call(model, ids), lambda: attached.activate(START)),
        "unmerged": Case(
            lambda: _call(model, ids), lambda: attached.activate(START, mode="unmerged")
        ),
        "PEFT, three active": Case(lambda: _call(theirs, ids)),
    }
    what = f"forward, {size.rows} × {size.tokens} tokens; {size}, depth 3; {str(dtype)[6:]}"
    result = Result(what, interleaved(cases, size.repeats))
    times = result.timings
    times["added, unmerged"] = times["unmerged"].over(times["bare"])
    times["added, PEFT"] = times["PEFT, three active"].over(times["bare"])
    result.aim(
        "added, unmerged / PEFT", times["added, unmerged"].ms / times["added, PEFT"].ms, at_most=0.4
    )
    result.facts["merged / bare"] = times["merged"].ms / times["bare"].ms
    attached.activate(START)
    result.facts["hooks left while merged"] = sum(len(m._forward_hooks) for m in model.modules())
    attached.detach()
    return result


def _call(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False)
