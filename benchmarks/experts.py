"""A small mixture of experts beside its weights, and in PEFT: a forward, a batch of paths, a step.

PEFT adds B A of every expert to the fused weights in each forward (`ParamWrapper`); here the
factors are multiplied with the tokens that were sent to each expert. The batch of paths has no
counterpart in PEFT, so it is timed beside the same forward under one path.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import lora_tree as lt

from .common import Case, Result, interleaved
from .memory import peak_bytes
from .sizes import FULL, Size

__all__ = ["run"]

EXPERTS, CHOSEN = 32, 4
PATHS = tuple(f"leaf{i}" for i in range(8))
WAYS = ("eager", "grouped_mm")


def run(size: Size = FULL) -> list[Result]:
    """Return two tables for each way in which transformers runs experts."""
    results = []
    for way in WAYS:
        base = _base(size, way)
        tree = _tree(base, size)
        ids = torch.randint(
            256, (8, max(8, size.tokens // 4)), generator=torch.Generator().manual_seed(0)
        )
        results += [_forwards(base, tree, size, way, ids), _steps(base, tree, size, way, ids)]
    return results


def _base(size: Size, way: str) -> Any:
    torch.manual_seed(0)
    hidden = max(64, size.hidden // 8)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=hidden // 2,
    )
    base = transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    base.set_experts_implementation(way)
    return base


def _tree(base: Any, size: Size) -> lt.AdapterTree:
    """Return a tree of eight leaves with random factors on every expert."""
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    tree = lt.AdapterTree(defaults=dict(r=size.r, lora_alpha=size.r, target_parameters=targets))
    for path in PATHS:
        tree.add(path)
    lt.attach(tree, base).detach()
    for path in PATHS:
        adapter = tree.adapter(path)
        assert adapter is not None
        tree.update(path, adapter=adapter.map(_drawn))
    return tree


def _drawn(value: lt.LowRank) -> lt.LowRank:
    return lt.LowRank(value.A, torch.randn_like(value.B) * 1e-3, value.scale, None, value.layout)


def _in_peft(base: Any, tree: lt.AdapterTree, *, trains: bool) -> Any:
    adapter = tree.adapter(PATHS[0])
    assert adapter is not None
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "leaf")
        wrapped = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), Path(folder) / "leaf", is_trainable=trains
        )
    return wrapped.train(trains)


def _forwards(base: Any, tree: lt.AdapterTree, size: Size, way: str, ids: Tensor) -> Result:
    theirs = _in_peft(base, tree, trains=False)
    model = lt.attach(tree, base)

    @torch.no_grad()
    def forward(of: Any = base) -> None:
        of(input_ids=ids, use_cache=False)

    def routed(paths: tuple[str, ...]) -> None:
        with model.route(list(paths), batch_first=True):
            forward()

    active = partial(model.activate, PATHS[0], mode="unmerged")
    cases = {
        "bare": Case(forward, model.deactivate),
        "one path": Case(forward, active),
        "8 rows on 8 paths": Case(partial(routed, PATHS), model.deactivate),
        "PEFT, one adapter": Case(partial(forward, theirs), model.deactivate),
    }
    result = Result(_what("forward", base, size, way, ids), interleaved(cases, size.repeats))
    times = result.timings
    added = times["one path"].over(times["bare"]).ms
    result.aim(
        "PEFT / ours, one path", times["PEFT, one adapter"].ms / times["one path"].ms, at_least=1.0
    )
    result.facts["added time, ours / PEFT"] = (
        added / times["PEFT, one adapter"].over(times["bare"]).ms
    )
    result.facts["8 paths / one path"] = times["8 rows on 8 paths"].ms / times["one path"].ms
    active()
    result.facts["most memory, one path, MiB"] = peak_bytes(forward) / 2**20
    model.detach()
    result.facts["most memory, PEFT, MiB"] = peak_bytes(partial(forward, theirs)) / 2**20
    return result


def _steps(base: Any, tree: lt.AdapterTree, size: Size, way: str, ids: Tensor) -> Result:
    theirs = _in_peft(base, tree, trains=True)
    model = lt.attach(tree, base)
    groups = model.trainable(PATHS[0])
    ours = _step(model, groups)
    factors = [p for p in theirs.parameters() if p.requires_grad]
    cases = {
        "one node": Case(partial(ours, ids), partial(model.activate, PATHS[0], mode="unmerged")),
        "PEFT": Case(partial(_step(theirs, factors), ids)),
    }
    result = Result(_what("a step", base, size, way, ids), interleaved(cases, size.repeats))
    times = result.timings
    result.aim("PEFT / ours", times["PEFT"].ms / times["one node"].ms, at_least=1.0)
    for name, case in cases.items():
        case.prepare()
        result.facts[f"most memory, {name}, MiB"] = peak_bytes(case.run) / 2**20
    model.detach()
    return result


def _step(model: Any, factors: Any) -> Callable[[Tensor], None]:
    optimizer = torch.optim.AdamW(factors, lr=1e-5)

    def step(ids: Tensor) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _what(task: str, base: Any, size: Size, way: str, ids: Tensor) -> str:
    rows, tokens = ids.shape
    return (
        f"{task}, {rows} × {tokens} tokens; 2-layer Qwen3-MoE, hidden {base.config.hidden_size}, "
        f"{CHOSEN} of {EXPERTS} experts, r={size.r} on both of their weights, fp32, {way}"
    )
