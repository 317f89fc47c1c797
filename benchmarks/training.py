"""One step over eight leaves at once, beside eight steps in PEFT; and the cost of frozen ancestors.

Both learn the same rows, with the same loss, in fp32 factors, with AdamW: here one forward, one
backward and one step over eight groups; in PEFT eight of each, with `set_adapter` before. The last
table is a step of a child on one frozen ancestor and on three.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_tree as lt
from lora_tree.errors import plural

from .common import Case, Result, interleaved
from .memory import keep_memory, peak_bytes
from .setting import adapter, base, name_in_peft, with_peft
from .sizes import FULL, Size

__all__ = ["joint", "run"]

LEAVES = 8
PARTS = 4
TOKENS = 32
MICRO = 1.3


@dataclass(frozen=True)
class StepAim:
    """A batch, and its aim: how many times faster than PEFT a joint step over it should be.

    Args:
        rows: of each leaf.
        cpu, gpu: the aims on two cores and on an H100.
        keeps: the C library keeps freed memory; on a CPU only.
    """

    rows: int
    cpu: float
    gpu: float
    keeps: bool = False


BATCHES = [
    StepAim(1, cpu=1.5, gpu=4.0),
    StepAim(4, cpu=1.0, gpu=3.0),
    StepAim(16, cpu=1.0, gpu=2.4),
    StepAim(16, cpu=1.0, gpu=2.4, keeps=True),
]


def run(size: Size = FULL) -> list[Result]:
    """Return a table for each number of rows, and one for frozen ancestors; on a GPU in bf16."""
    size = replace(size, layers=min(size.layers, 2))
    dtype = torch.float32
    if torch.cuda.is_available() and size.hidden == FULL.hidden:
        size, dtype = replace(size, hidden=4096), torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [*joint(size, dtype, device), _ancestors(size, dtype, device)]


def joint(
    size: Size, dtype: torch.dtype, device: torch.device, *, for_gpu: bool | None = None
) -> list[Result]:
    """Return a table for each number of rows a leaf.

    Args:
        size, dtype, device: of the base.
        for_gpu: print the aims and the rows of a GPU; None: if ``device`` is one.
    """
    if for_gpu is None:
        for_gpu = device.type == "cuda"
    tree = lt.AdapterTree()
    for i in range(LEAVES):
        tree.add(f"leaf{i}", adapter=adapter(base(size, dtype), size, seed=i, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        theirs = with_peft(base(size, dtype), tree, Path(folder) / "tree").to(device)
    model = lt.attach(tree, base(size, dtype).to(device)).train()
    optimizer = torch.optim.AdamW(model.trainable("*"), lr=1e-5)
    model.follow(optimizer)
    steps = [_peft_step(theirs, path) for path in tree.paths()]
    results = []
    for batch in BATCHES:
        if batch.keeps and not (device.type == "cpu" and keep_memory()):
            continue
        rows = batch.rows
        ids = _ids(LEAVES * rows, TOKENS, device)
        paths = [path for path in tree.paths() for _ in range(rows)]
        parts = torch.split(ids, rows)

        def ours(ids: Tensor = ids, paths: list[str] = paths) -> None:
            _step(model, optimizer, ids, paths)

        def in_parts(ids: Tensor = ids, paths: list[str] = paths) -> None:
            _step_in_parts(model, optimizer, ids, paths)

        def small(ids: Tensor = ids, paths: list[str] = paths) -> None:
            for start in range(PARTS):
                _step(model, optimizer, ids[start::PARTS], paths[start::PARTS])

        def peft(parts: Any = parts) -> None:
            for step, part in zip(steps, parts, strict=True):
                step(part)

        what = (
            f"a step of {LEAVES} leaves, {plural(rows, 'row')} each, "
            f"{plural(TOKENS, 'token')} a row; "
            f"{size}, {str(dtype)[6:]} base"
        )
        what += ", memory kept" * batch.keeps
        cases = {
            "together": Case(_waited(ours, device)),
            f"PEFT, {LEAVES} steps": Case(_waited(peft, device)),
        }
        micro, steps_of_parts = f"together, in {PARTS} micro-batches", f"{PARTS} small steps"
        if rows >= PARTS:
            cases[micro] = Case(_waited(in_parts, device))
        if rows >= PARTS and for_gpu:
            cases[steps_of_parts] = Case(_waited(small, device))
        result = Result(what, interleaved(cases, size.repeats))
        times = result.timings
        ratio = times[f"PEFT, {LEAVES} steps"].ms / times["together"].ms
        result.aim("PEFT / ours", ratio, at_least=batch.gpu if for_gpu else batch.cpu)
        if steps_of_parts in times:
            ratio = times[micro].ms / times[steps_of_parts].ms
            result.aim(f"{PARTS} micro-batches / {steps_of_parts}", ratio, at_most=MICRO)
        if micro in cases:
            result.facts[f"PEFT / ours, {micro}"] = (
                times[f"PEFT, {LEAVES} steps"].ms / times[micro].ms
            )
            result.facts[f"most memory, {micro}, MiB"] = peak_bytes(cases[micro].run) / 2**20
        result.facts["most memory, together, MiB"] = peak_bytes(ours) / 2**20
        result.facts["most memory, PEFT, MiB"] = peak_bytes(peft) / 2**20
        results.append(result)
    model.detach()
    return results


def _ancestors(size: Size, dtype: torch.dtype, device: torch.device) -> Result:
    tree = lt.AdapterTree()
    for seed, path in enumerate(("a", "a/b", "a/b/c", "a/b/c/deep", "a/shallow")):
        tree.add(path, adapter=adapter(base(size, dtype), size, seed=seed, dtype=torch.float32))
    model = lt.attach(tree, base(size, dtype).to(device)).train()
    ids = _ids(4, 32, device)
    runs: dict[str, Callable[[], None]] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}

    def prepare(path: str) -> None:
        groups = model.trainable(path)
        optimizers[path] = torch.optim.AdamW(groups, lr=1e-5)
        model.activate(path, mode="unmerged")
        model.follow(optimizers[path])
        runs[path]()  # makes the optimiser's state and the path's layout, once

    for path in ("a/shallow", "a/b/c/deep"):
        runs[path] = lambda path=path: _step(model, optimizers[path], ids, None)  # type: ignore[misc]
    cases = {path: Case(_waited(runs[path], device), partial(prepare, path)) for path in runs}
    what = (
        "a step of a leaf on one frozen ancestor (shallow) and on three (deep), "
        f"4 rows of 32 tokens; {size}"
    )
    result = Result(what, interleaved(cases, size.repeats))
    peaks = {}
    for path in runs:
        prepare(path)
        peaks[path] = peak_bytes(runs[path])
        result.facts[f"most memory, {path}, MiB"] = peaks[path] / 2**20
    result.aim("most memory, deep / shallow", peaks["a/b/c/deep"] / peaks["a/shallow"], at_most=1.0)
    result.facts["time, deep / shallow"] = (
        result.timings["a/b/c/deep"].ms / result.timings["a/shallow"].ms
    )
    model.detach()
    return result


def _step(
    model: lt.TreeModel, optimizer: torch.optim.Optimizer, ids: Tensor, paths: list[str] | None
) -> None:
    if paths is None:
        loss = _loss(model(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()  # type: ignore[no-untyped-call]
    else:
        with model.route(paths, batch_first=True):
            logits = model(input_ids=ids, use_cache=False).logits
            lt.path_loss(logits, ids, paths).total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _step_in_parts(
    model: lt.TreeModel, optimizer: torch.optim.Optimizer, ids: Tensor, paths: list[str]
) -> None:
    """Take the same step in micro-batches, each with rows of every leaf."""
    counts = lt.token_counts(model.tree, [(ids, paths)])
    for start in range(PARTS):
        part, of = ids[start::PARTS], paths[start::PARTS]
        with model.route(of, batch_first=True):
            logits = model(input_ids=part, use_cache=False).logits
            total = lt.path_loss(logits, part, of, counts=counts).total
            total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _peft_step(wrapped: Any, path: str) -> Callable[[Tensor], None]:
    name = name_in_peft(path)
    wrapped.set_adapter(name)
    factors = [p for n, p in wrapped.named_parameters() if f".{name}." in n]
    optimizer = torch.optim.AdamW(factors, lr=1e-5)

    def step(ids: Tensor) -> None:
        wrapped.set_adapter(name)
        loss = _loss(wrapped(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _ids(rows: int, tokens: int, device: torch.device) -> Tensor:
    return torch.randint(256, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def _waited(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a function that runs ``run`` and waits for the device."""
    if device.type == "cpu":
        return run

    def whole() -> None:
        run()
        torch.cuda.synchronize()

    return whole
