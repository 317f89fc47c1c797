"""The first use of a path that lies in files, beside PEFT's: one adapter of the same factors, loaded and made active.

The page cache is warm for both. PEFT reads one flattened adapter, of the rank of the whole lineage; we read a file for
every node on it, compare each with the lock by its hash, and lay the lineage out beside the weights.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import peft
import torch

import lora_tree as lt

from .common import Case, Result, interleaved
from .setting import FULL, Size, adapter, base

__all__ = ["run"]

DEPTH = 3


@torch.no_grad()
def run(size: Size = FULL) -> list[Result]:
    """A lineage that nobody used before, every round another one."""
    dtype, rounds = torch.bfloat16, size.repeats + 1
    mine, theirs = base(size, dtype), base(size, dtype)
    names = [f"t{i}" for i in range(rounds)]
    with tempfile.TemporaryDirectory() as folder:
        zoo = Path(folder) / "zoo"
        grown = lt.AdapterTree()
        for i, name in enumerate(names):
            path = name
            for depth in range(DEPTH):
                grown.add(path, adapter=adapter(mine, size, seed=DEPTH * i + depth, dtype=dtype))
                path += "/n"
            grown.flatten(grown.leaves()[-1]).to(dtype=dtype).save(Path(folder) / "flat" / name)
        grown.save(zoo)
        for file in Path(folder).rglob("*.safetensors"):
            file.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers has renamed
            wrapped = peft.PeftModel.from_pretrained(
                theirs, Path(folder) / "flat" / names[0], adapter_name="first", autocast_adapter_dtype=False
            )
        model = lt.attach(lt.load(zoo), mine, host_budget="8GiB")
        nbytes = sum(outline.nbytes for n in model.tree.lineage("t0/n/n") if (outline := model.tree.outline(n)))
        leaves, flat = iter(model.tree.leaves()), iter(names)

        def load_in_peft() -> None:
            name = next(flat)
            wrapped.load_adapter(Path(folder) / "flat" / name, adapter_name=name, autocast_adapter_dtype=False)
            wrapped.set_adapter(name)

        def forget_in_peft() -> None:
            wrapped.set_adapter("first")
            for name in set(wrapped.peft_config) - {"first"}:
                wrapped.delete_adapter(name)

        cases = {
            "first use": Case(lambda: model.activate(next(leaves), mode="unmerged"), model.deactivate),
            "PEFT load_adapter + set_adapter": Case(load_in_peft, forget_in_peft),
        }
        result = Result(f"first use, warm page cache; {size}, depth {DEPTH}, bf16", interleaved(cases, size.repeats))
    ours, peft_ms = (timing.ms for timing in result.timings.values())
    result.facts["factors of a lineage, MB"] = nbytes / 1e6
    result.aim("PEFT / ours", peft_ms / ours, at_least=5)
    return [result]
