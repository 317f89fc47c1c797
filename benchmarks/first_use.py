"""The first use of a path that lies in files, beside PEFT's: the same adapters, loaded and made active together.

The page cache is warm for all. We read a file for every node of the path, compare each with the lock by its hash, and
lay the lineage out beside the weights; PEFT reads the very same files. For whoever flattened every path beforehand
there is the time of PEFT with one adapter of the whole lineage's rank.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import peft
import torch

import lora_tree as lt

from .common import Case, Result, interleaved
from .setting import FULL, Size, adapter, base, name_in_peft

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
        leaves, others, flat = iter(model.tree.leaves()), iter(model.tree.leaves()), iter(names)

        def load_in_peft(files: Mapping[str, Path]) -> None:
            for name, where in files.items():
                wrapped.load_adapter(where, adapter_name=name, autocast_adapter_dtype=False)
            wrapped.base_model.set_adapter(list(files))

        def load_nodes() -> None:
            path = next(others)
            load_in_peft({name_in_peft(node): zoo / node for node in model.tree.lineage(path)})

        def load_flat() -> None:
            name = next(flat)
            load_in_peft({name: Path(folder) / "flat" / name})

        def forget_in_peft() -> None:
            wrapped.set_adapter("first")
            for name in set(wrapped.peft_config) - {"first"}:
                wrapped.delete_adapter(name)

        cases = {
            "first use": Case(lambda: model.activate(next(leaves), mode="unmerged"), model.deactivate),
            "PEFT, load_adapter of each node + set_adapter": Case(load_nodes, forget_in_peft),
            "PEFT, the same of one flattened adapter": Case(load_flat, forget_in_peft),
        }
        result = Result(f"first use, warm page cache; {size}, depth {DEPTH}, bf16", interleaved(cases, size.repeats))
    ours, nodes_ms, flat_ms = (timing.ms for timing in result.timings.values())
    result.facts["factors of a lineage, MB"] = nbytes / 1e6
    result.aim("PEFT / ours, the same files", nodes_ms / ours, at_least=5)
    result.facts["PEFT / ours, flattened beforehand"] = flat_ms / ours
    return [result]
