"""On one GPU, in bf16: switches, forwards, mixed batches, training and loads.

Each is compared with PEFT and with the floor that its bytes set.

The base is a Llama of random weights: 32 layers of hidden 4096 with 8 key/value heads (8B, 224
linear sites) for switches and unmerged forwards; a few layers of the same for the rest. A floor is
a copy, in the same run, of the bytes that have to be moved. All times end when the device is done.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import Tensor

import lora_tree as lt
from lora_tree.engine.kernels import routes
from lora_tree.engine.routing.forms import Strategy
from lora_tree.errors import plural
from lora_tree.formats.peft import WEIGHTS

from .by_polylora import is_installed, with_polylora
from .common import Case, Result, Stage, cycle, interleaved
from .routed import grown
from .setting import SIBLING, START, name_in_peft, tree, with_peft
from .sizes import FULL, Size
from .training import joint

__all__ = ["run"]

DTYPE = torch.bfloat16
ROUTED = (1, 16, 128)  # tokens a row
LEAVES, MIDDLE = 64, 8
NO_DEVICE = "no CUDA device here: benchmarks gpu was skipped"


@dataclass(frozen=True)
class Shape:
    """The sizes of the base."""

    hidden: int
    layers: int
    inner: int
    heads: int
    groups: int


def run(size: Size = FULL) -> list[Result]:
    """Return all tables; without a GPU, none, and print one line on stderr."""
    if not torch.cuda.is_available():
        sys.stderr.write(NO_DEVICE + "\n")
        return []
    full = size.hidden == FULL.hidden
    large = (
        Shape(4096, 32, 14336, 32, 8)
        if full
        else Shape(size.hidden, size.layers, 2 * size.hidden, 2, 1)
    )
    size = replace(size, hidden=large.hidden, layers=large.layers, repeats=min(size.repeats, 9))
    results = []
    for table in (_switches, _routed, _training, _loads):
        results += table(large, size)
        gc.collect()
        torch.cuda.empty_cache()
    where = torch.cuda.get_device_name()
    for result in results:
        result.title += f"; {where}"
    return results


def llama(shape: Shape) -> Any:
    """Make random weights on the device; with a small vocabulary the layers take the time."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=4096,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("cuda"):
            torch.manual_seed(0)
            return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------- switches and unmerged
# forwards
@torch.no_grad()
def _switches(shape: Shape, size: Size) -> list[Result]:
    model = llama(shape)
    adapters = tree(model, size, dtype=DTYPE)
    one = torch.randint(256, (1, 1), device="cuda")
    many = torch.randint(256, (8, size.tokens), device="cuda")
    bare = {
        "bare, 1 token": Case(_waited(lambda: model(input_ids=one, use_cache=False))),
        f"bare, 8 × {size.tokens}": Case(_waited(lambda: model(input_ids=many, use_cache=False))),
    }
    attached = lt.attach(adapters, model)
    first_ms = _once(lambda: attached.activate(START))
    start = _waited(
        lambda: attached.activate(START)
    )  # else its work on the device would count as the next case's
    switching = {
        "merged, siblings": Case(_waited(lambda: attached.activate(SIBLING)), start),
        "merged, deactivate": Case(_waited(attached.deactivate), start),
        "floor: copy of the weights": Case(_waited(_copied(model, adapters))),
    }
    switched = Result(f"merged switch; {size}, bf16, depth 3", interleaved(switching, size.repeats))
    switched.facts["first merge, ms"] = first_ms
    switched.facts[f"pristine on the {attached.pristine.kind}, GB"] = attached.pristine.nbytes / 1e9
    attached.deactivate()
    attached.activate(START, mode="unmerged")
    beside = {
        "unmerged, 1 token": bare["bare, 1 token"],
        f"unmerged, 8 × {size.tokens}": bare[f"bare, 8 × {size.tokens}"],
    }
    forward = Result(
        f"unmerged forward of a path of three; {size}, bf16", interleaved(beside, size.repeats)
    )
    hops = cycle(SIBLING, START)
    used = {
        "unmerged switch, used before": Case(
            _waited(lambda: attached.activate(hops(), mode="unmerged"))
        )
    }
    forward.timings |= interleaved(used, size.repeats)
    attached.deactivate()
    forward.timings |= interleaved(bare, size.repeats)
    captured = _captured(attached, model, one, size)
    attached.detach()
    _add_logged(switched, model, adapters)
    with tempfile.TemporaryDirectory() as folder:
        theirs = with_peft(model, adapters, Path(folder) / "tree").to("cuda")
    _peft_active(theirs, adapters, START)
    peft = {
        "PEFT, 1 token": Case(_waited(lambda: theirs(input_ids=one, use_cache=False))),
        f"PEFT, 8 × {size.tokens}": Case(_waited(lambda: theirs(input_ids=many, use_cache=False))),
    }
    forward.timings |= interleaved(peft, size.repeats)
    turns = cycle(SIBLING, START)
    theirs.base_model.merge_adapter(
        adapter_names=[name_in_peft(n) for n in adapters.lineage(START)]
    )

    def unmerge_and_merge() -> None:
        theirs.base_model.unmerge_adapter()
        path = turns()
        _peft_active(theirs, adapters, path)
        theirs.base_model.merge_adapter(
            adapter_names=[name_in_peft(n) for n in adapters.lineage(path)]
        )

    times = switched.timings
    times |= interleaved({"PEFT, siblings": Case(_waited(unmerge_and_merge))}, size.repeats)
    floor = times["floor: copy of the weights"].ms
    switched.aim("siblings / floor", times["merged, siblings"].ms / floor, at_most=1.2)
    switched.aim(
        "PEFT / ours, siblings",
        times["PEFT, siblings"].ms / times["merged, siblings"].ms,
        at_least=12,
    )
    switched.aim("first merge, s", first_ms / 1e3, at_most=0.3, unit="s")
    times = forward.timings
    for what, aim in (("1 token", 6.0), (f"8 × {size.tokens}", None)):
        added = times[f"unmerged, {what}"].ms - times[f"bare, {what}"].ms
        if aim is None:
            forward.facts[f"added, {what}, ms"] = added
        else:
            forward.aim(f"added, {what}", added, at_most=aim, unit="ms")
        forward.facts[f"added by PEFT, {what}, ms"] = (
            times[f"PEFT, {what}"].ms - times[f"bare, {what}"].ms
        )
    return [switched, forward, captured]


def _add_logged(result: Result, model: Any, adapters: lt.AdapterTree) -> None:
    """Add a switch with an undo log instead of copies, and the memory of the log."""
    # The aim holds for kernels that are compiled already.
    attached = lt.attach(adapters, model, pristine="log")
    attached.activate(START)
    attached.detach()
    torch.cuda.empty_cache()
    attached = lt.attach(adapters, model, pristine="log")
    first_ms = _once(lambda: attached.activate(START))
    start = _waited(lambda: attached.activate(START))
    switch = Case(_waited(lambda: attached.activate(SIBLING)), start)
    result.timings |= interleaved({"merged, siblings, undo log": switch}, 2)
    adapter = adapters.adapter(START)
    assert adapter is not None
    touched = sum(model.get_parameter(f"{name}.weight").nbytes for name in adapter.modules)
    floor = result.timings["floor: copy of the weights"].ms
    logged = result.timings["merged, siblings, undo log"].ms
    result.aim("siblings, undo log / floor", logged / floor, at_most=2)
    taken = 100 * attached.pristine.log_bytes / touched
    result.aim("undo log, % of the touched weights", taken, at_most=15)
    result.aim("first merge, undo log, s", first_ms / 1e3, at_most=0.5, unit="s")
    attached.detach()


def _captured(attached: lt.TreeModel, model: Any, ids: Tensor, size: Size) -> Result:
    """Time forwards of one token as CUDA graphs: bare, unmerged, merged under the bare graph."""

    attached.deactivate()
    bare = _graph_of(model, ids)
    attached.activate(START, mode="unmerged")
    beside = _graph_of(model, ids)
    cases = {"bare": Case(_waited(bare.replay)), "unmerged": Case(_waited(beside.replay))}
    result = Result(
        f"forward of 1 token captured in a CUDA graph; {size}, bf16",
        interleaved(cases, size.repeats),
    )
    result.aim(
        "unmerged / bare", result.timings["unmerged"].ms / result.timings["bare"].ms, at_most=1.08
    )
    attached.deactivate()
    return result


def _copied(model: Any, adapters: lt.AdapterTree) -> Callable[[], None]:
    """Return a function that copies every touched weight into other memory of the device."""
    adapter = adapters.adapter(START)
    assert adapter is not None
    weights = [model.get_submodule(name).weight for name in adapter.modules]
    copies = [torch.empty_like(weight) for weight in weights]

    def copy() -> None:
        for copy, weight in zip(
            copies, weights, strict=True
        ):  # one call for all takes a fifth longer
            copy.copy_(weight)

    return copy


def _peft_active(wrapped: Any, adapters: lt.AdapterTree, path: str) -> None:
    wrapped.base_model.set_adapter([name_in_peft(node) for node in adapters.lineage(path)])


# ---------------------------------------------------------------------- a path for every row
@torch.no_grad()
def _routed(shape: Shape, size: Size) -> list[Result]:
    size = replace(size, layers=min(shape.layers, 4))
    model = llama(replace(shape, layers=size.layers))
    paths = LEAVES if size.hidden >= FULL.hidden else 4
    nodes = grown(model, size, paths, MIDDLE if paths == LEAVES else 2, dtype=DTYPE)
    attached = lt.attach(nodes, model)
    leaves = nodes.leaves()
    rng = random.Random(0)
    order = rng.sample(leaves, len(leaves))
    stage, results = Stage(), []
    for tokens in ROUTED:
        ids = torch.randint(256, (len(order), tokens), device="cuda")
        call = _waited(partial(model, input_ids=ids, use_cache=False))

        def enter(strategy: Strategy, call: Callable[[], None] = call) -> None:
            stage.enter(attached.route(order, strategy=strategy, batch_first=True))
            call()

        def another(call: Callable[[], None] = call) -> None:
            with attached.route(rng.sample(leaves, len(leaves)), batch_first=True):
                call()

        def again(call: Callable[[], None] = call) -> None:
            with attached.route(order, batch_first=True):
                call()

        def used_before(again: Callable[[], None] = again) -> None:
            stage.leave()
            again()

        cases = {"bare": Case(call, stage.leave)}
        for strategy in get_args(Strategy):
            cases[strategy] = Case(call, partial(enter, strategy))
        cases["another batch each time"] = Case(another, stage.leave)
        cases["a batch used before"] = Case(again, used_before)
        layers = f"(1 → {MIDDLE} → {paths} nodes)"
        what = (
            f"{len(order)} rows over {paths} paths {layers}, {plural(tokens, 'token')} a row; "
            f"{size}, bf16"
        )
        result = Result(what, interleaved(cases, min(size.repeats, 7)))
        stage.leave()
        bare = result.timings["bare"].ms
        added = result.timings["auto"].ms - bare
        result.aim(
            "added",
            added,
            at_most=dict(zip(ROUTED, (1.2, 2.0, 3.0), strict=True))[tokens],
            unit="ms",
        )
        new = result.timings["another batch each time"].ms
        before = result.timings["a batch used before"].ms
        result.aim("another batch − one used before", new - before, at_most=1.0, unit="ms")
        result.facts["another batch − one that is routed, ms"] = new - result.timings["auto"].ms
        results.append(result)
    attached.detach()
    captured = []
    if routes(torch.device("cuda", torch.cuda.current_device())):
        captured = [_captured_batch(model, nodes, order, rng, size)]
    flat = _peft_mixed(model, nodes, order, size, results)
    if is_installed():
        del model
        _polylora_mixed(llama(replace(shape, layers=size.layers)), flat, ROUTED, "cuda", results)
    else:
        sys.stderr.write("polylora is not installed: routed rows stand beside PEFT alone\n")
    return results + captured


def _captured_batch(
    model: Any, nodes: lt.AdapterTree, order: list[str], rng: random.Random, size: Size
) -> Result:
    """Time a batch of 1 token a row as a CUDA graph over a prepared base.

    It is timed bare, routed, and with another batch written under the captured graph each time.
    """
    ids = torch.randint(256, (len(order), 1), device="cuda")
    bare = _graph_of(model, ids)
    attached = lt.attach(nodes, model)
    attached.prepare()
    stage = Stage()
    stage.enter(attached.route(order, batch_first=True))
    routed = _graph_of(model, ids)
    stage.leave()

    def another() -> None:
        with attached.route(rng.sample(order, len(order)), batch_first=True):
            routed.replay()

    def routing() -> None:
        stage.enter(attached.route(order, batch_first=True))

    cases = {
        "bare": Case(_waited(bare.replay)),
        "routed": Case(_waited(routed.replay), routing),
        "another batch each time": Case(_waited(another), stage.leave),
    }
    what = f"{len(order)} rows over as many paths, 1 token, captured in a CUDA graph; {size}, bf16"
    result = Result(what, interleaved(cases, min(size.repeats, 7)))
    stage.leave()
    times = result.timings
    result.aim("routed / bare", times["routed"].ms / times["bare"].ms, at_most=1.35)
    attached.detach()
    return result


def _graph_of(model: Any, ids: Tensor) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of a forward."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(input_ids=ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(input_ids=ids, use_cache=False)
    return graph


def _peft_mixed(
    model: Any, nodes: lt.AdapterTree, order: list[str], size: Size, results: list[Result]
) -> lt.AdapterTree:
    """Add PEFT's mixed batch over the same paths, flattened, to the existing tables.

    Return the flattened adapters.
    """
    flat = lt.AdapterTree()
    for i, leaf in enumerate(order):
        flat.add(f"leaf{i}", adapter=nodes.flatten(leaf, dtype=DTYPE).to(device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        theirs = with_peft(model, flat, Path(folder) / "flat").to("cuda")
    named = [name_in_peft(f"leaf{i}") for i in range(len(order))]
    for tokens, result in zip(ROUTED, results, strict=True):
        ids = torch.randint(256, (len(order), tokens), device="cuda")
        call = _waited(partial(theirs, input_ids=ids, adapter_names=named, use_cache=False))
        result.timings |= interleaved({"PEFT's mixed batch": Case(call)}, 2)
    return flat


def _polylora_mixed(
    model: Any, flat: lt.AdapterTree, tokens: Sequence[int], device: str, results: Sequence[Result]
) -> None:
    """Add polylora's mixed batch over the same paths, flattened, to the existing tables.

    Args:
        model: a separate bare base, which polylora changes for good.
        flat: an adapter for each row.
        tokens: inputs a row, of each table.
        device: of the base.
        results: the tables; each has the times of "bare" and "auto" already.
    """
    with tempfile.TemporaryDirectory() as folder:
        theirs = with_polylora(model, flat, Path(folder) / "flat")
    named = flat.paths()
    for count, result in zip(tokens, results, strict=True):
        ids = torch.randint(256, (len(named), count), device=device)
        call = _waited(partial(theirs, input_ids=ids, adapter_ids=named, use_cache=False))
        times = result.timings
        times |= interleaved({"polylora's mixed batch": Case(call)}, 7)
        added = times["polylora's mixed batch"].ms - times["bare"].ms
        result.facts["added by polylora, ms"] = added
        ours = times["auto"].ms - times["bare"].ms
        result.aim("added, ours / polylora", ours / added, at_most=0.2)


# ---------------------------------------------------------------------- training
def _training(shape: Shape, size: Size) -> list[Result]:
    """Time a joint step over eight leaves beside eight steps in PEFT; see training.py."""
    return joint(
        replace(size, layers=min(shape.layers, 2), repeats=min(size.repeats, 7)),
        DTYPE,
        torch.device("cuda"),
        for_gpu=True,
    )


# ---------------------------------------------------------------------- loads
@torch.no_grad()
def _loads(shape: Shape, size: Size) -> list[Result]:
    model = llama(shape)
    adapters = lt.AdapterTree()
    names = [f"n{i}" for i in range(4 * (size.repeats + 2))]
    with tempfile.TemporaryDirectory() as folder:
        one = tree(model, size, dtype=DTYPE).adapter(START)
        assert one is not None
        shown = {name: value.to(device="cuda") for name, value in one.modules.items()}
        for name in names[: size.repeats + 2]:
            drawn = {
                n: v.with_tensors(lambda t: torch.randn_like(t).mul_(0.01).cpu())
                for n, v in shown.items()
            }
            adapters.add(name, adapter=lt.Adapter(drawn))
        adapters.save(Path(folder) / "zoo")
        nbytes = one.nbytes
        count = len(adapters.paths())
        opened = lt.load(Path(folder) / "zoo")
        attached = lt.attach(
            opened, model, host_budget=(count + 1) * nbytes, device_budget=6 * nbytes
        )
        fresh = iter(opened.paths())
        weights = (Path(folder) / "zoo" / names[0] / WEIGHTS).read_bytes()
        times = {
            "first use, page cache": Case(
                _waited(lambda: attached.activate(next(fresh), mode="unmerged"))
            ),
            "SHA-256 of it, in one thread": Case(lambda: hashlib.sha256(weights).digest()),
        }
        result = Result(
            f"loads of an adapter of {nbytes / 1e6:.0f} MB; {size}, bf16",
            interleaved(times, count - 2),
        )
        again = itertools.cycle(
            opened.paths()
        )  # more than the device tier holds, so each comes from the host
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        ids = torch.randint(256, (1, 512), device="cuda")

        def ready() -> None:
            attached.deactivate()
            path = next(again)
            attached.prefetch([path])
            model(input_ids=ids, use_cache=False)
            attached.cache.wait(10)
            torch.cuda.synchronize()
            prefetched.append(path)

        def idle() -> None:
            attached.deactivate()
            attached.cache.wait(10)

        def compute() -> None:
            model(input_ids=ids, use_cache=False)

        def both() -> None:
            path = next(again)
            attached.prefetch([path])
            compute()
            attached.activate(path, mode="unmerged")

        prefetched: list[str] = []
        result.timings |= interleaved(
            {
                "host tier → active": Case(
                    _waited(lambda: attached.activate(next(again), mode="unmerged"))
                ),
                "floor: one pinned copy": Case(
                    _waited(lambda: there.copy_(host, non_blocking=True))
                ),
                "the same compute, with no prefetch beside it": Case(_waited(compute), idle),
                "compute, prefetched beside it and then activated": Case(_waited(both), idle),
                "prefetched, then activated": Case(
                    _waited(lambda: attached.activate(prefetched[-1], mode="unmerged")), ready
                ),
            },
            size.repeats,
        )
        times_now = result.timings
        ratio = times_now["host tier → active"].ms / times_now["floor: one pinned copy"].ms
        result.aim("host tier → active / one copy", ratio, at_most=1.25)
        first = times_now["first use, page cache"].ms
        result.aim("first use", first, at_most=40, unit="ms")
        hidden = times_now["compute, prefetched beside it and then activated"]
        alone = times_now["the same compute, with no prefetch beside it"]
        over = hidden.ms - alone.ms
        result.aim("prefetched and activated − compute", over, at_most=0.5, unit="ms")
        attached.detach()
    # The tree that was saved still holds its adapters as CPU tensors that were never sent.
    attached = lt.attach(adapters, model)
    unsent = iter(adapters.paths())
    result.timings |= interleaved(
        {
            "first use, of CPU tensors": Case(
                _waited(lambda: attached.activate(next(unsent), mode="unmerged"))
            )
        },
        count - 2,
    )
    attached.detach()
    return [result]


# ---------------------------------------------------------------------- helpers
def _waited(call: Callable[[], object]) -> Callable[[], None]:
    """Return a function that runs ``call`` and waits for the device."""

    def waited() -> None:
        call()
        torch.cuda.synchronize()

    return waited


def _once(call: Callable[[], object]) -> float:
    """Return the milliseconds of one call, including the compilation of kernels."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
