"""Merge a path into a sharded checkpoint, beside a copy of the same files with fsync: time, memory.

Both run in one separate process, in turn. Memory is the growth of its anonymous memory (RssAnon of
/proc/self/status, read every 2 ms) since everything was imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import lora_tree as lt
from lora_tree.folder import disk

from .common import Case, Result, Timing, interleaved
from .sizes import FULL, Size

__all__ = ["run"]

LAYER = {
    "self_attn.q_proj": (1, 1), "self_attn.k_proj": (1, 1),
    "self_attn.v_proj": (1, 1), "self_attn.o_proj": (1, 1),
    "mlp.gate_proj": (2.6875, 1), "mlp.up_proj": (2.6875, 1), "mlp.down_proj": (1, 2.6875),
}  # fmt: skip
VOCABULARY = 8000
DTYPE = torch.bfloat16
SPARE_BYTES = 200_000_000


def run(size: Size = FULL) -> list[Result]:
    """Merge a lineage of two into seven projections of every layer; each layer is a shard."""
    hidden, layers = (
        (2 * size.hidden, 10) if size.hidden >= FULL.hidden else (size.hidden, size.layers)
    )
    with tempfile.TemporaryDirectory(prefix="lora_tree-") as folder:
        at = Path(folder)
        nbytes, largest = _base(at / "base", hidden, layers)
        _tree(hidden, layers, size.r).save(at / "zoo")
        rounds = str(max(2, min(size.repeats, 3)))
        printed = subprocess.run(
            [sys.executable, "-m", "benchmarks.checkpoint", folder, rounds],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    told = json.loads(printed.splitlines()[-1])
    timings = {name: Timing(tuple(took)) for name, took in told["timings"].items()}
    result = Result(
        f"merge into a checkpoint of {nbytes / 1e9:.2f} GB, {layers + 1} shards, bf16, r={size.r}",
        timings,
    )
    result.facts["largest tensor, MB"] = largest / 1e6
    result.facts["growth of anonymous memory, MB"] = told["growth_bytes"] / 1e6
    result.facts["merged, MB/s"] = nbytes / 1e3 / timings["merged"].ms
    bound = (3 * largest + SPARE_BYTES) / 1e6
    result.aim("growth of anonymous memory", told["growth_bytes"] / 1e6, at_most=bound, unit="MB")
    result.aim(
        "speed, of copying", timings["copied, with fsync"].ms / timings["merged"].ms, at_least=0.5
    )
    return [result]


def _base(folder: Path, hidden: int, layers: int) -> tuple[int, int]:
    """Write a Llama's files layer by layer; return their bytes and those of the largest tensor."""
    folder.mkdir()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=_wide(hidden, 2.6875),
        num_hidden_layers=layers, num_attention_heads=max(hidden // 128, 1),
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    placed: dict[str, str] = {}
    nbytes = largest = 0
    for number in range(layers + 1):
        name, tensors = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors", {}
        if number == layers:
            outer = {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden)}
            tensors = {f"{module}.weight": _drawn(shape, draw) for module, shape in outer.items()}
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=DTYPE)
        else:
            for module, (out, into) in LAYER.items():
                shape = (_wide(hidden, out), _wide(hidden, into))
                tensors[f"model.layers.{number}.{module}.weight"] = _drawn(shape, draw)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{number}.{norm}.weight"] = torch.ones(hidden, dtype=DTYPE)
        save_file(tensors, folder / name, {"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
        nbytes += (folder / name).stat().st_size
        largest = max(largest, *(t.numel() * t.element_size() for t in tensors.values()))
    index = {"metadata": {"total_size": nbytes}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return nbytes, largest


def _tree(hidden: int, layers: int, r: int) -> lt.AdapterTree:
    draw = torch.Generator().manual_seed(1)
    tree = lt.AdapterTree()
    for path in ("a", "a/b"):
        modules = {}
        for number in range(layers):
            for module, (out, into) in LAYER.items():
                A = torch.randn(r, _wide(hidden, into), generator=draw)
                B = torch.randn(_wide(hidden, out), r, generator=draw) / hidden
                modules[f"model.layers.{number}.{module}"] = lt.LowRank(A.to(DTYPE), B.to(DTYPE))
        tree.add(path, adapter=lt.Adapter(modules))
    return tree


def _wide(hidden: int, times: float) -> int:
    return int(hidden * times)


def _drawn(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=draw) * 0.02).to(DTYPE)


# ---------------------------------------------------------------------- in a separate process
def _measure(folder: Path, rounds: int) -> None:
    tree = lt.load(folder / "zoo")
    assert transformers.LlamaForCausalLM  # imported before memory is measured
    grown: list[int] = []

    def merged() -> None:
        with _growth(grown):
            lt.export_model(tree, "a/b", folder / "merged", base=folder / "base")

    def clear() -> None:
        for name in ("merged", "copied"):
            shutil.rmtree(folder / name, ignore_errors=True)
        os.sync()

    cases = {
        "copied, with fsync": Case(lambda: _copied(folder / "base", folder / "copied"), clear),
        "merged": Case(merged, clear),
    }
    timings = interleaved(cases, rounds)
    told = {
        "timings": {name: t.rounds_ms for name, t in timings.items()},
        "growth_bytes": max(grown),
    }
    sys.stdout.write(json.dumps(told) + "\n")


def _copied(source: Path, to: Path) -> None:
    to.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, to / file.name)  # inside the kernel where the system can
        with (to / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
    disk.sync(to)


@contextmanager
def _growth(grown: list[int]) -> Iterator[None]:
    """Append the largest growth of this process's anonymous memory during the block."""
    before, done = _anonymous(), threading.Event()
    most = [before]

    def look() -> None:
        while not done.wait(0.002):
            most.append(max(most.pop(), _anonymous()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        grown.append(most[0] - before)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    _measure(Path(sys.argv[1]), int(sys.argv[2]))
