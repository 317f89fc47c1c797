"""The first use of a path from files, beside PEFT, which loads the same adapters.

The page cache is warm for all. We read a file for every node of the path, compare each with the
lock by its hash, and lay the lineage out beside the weights; PEFT reads the same files. PEFT is
also timed with one adapter of the whole lineage's rank, as if every path had been flattened
beforehand.

In the first table both free what was used before: our cache is full, and PEFT's adapters are
deleted (untimed), so both reuse memory. In the second both keep everything, and have to ask the
system for more.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch

import lora_tree as lt

from .common import Case, Result, interleaved
from .setting import adapter, base, name_in_peft
from .sizes import FULL, Size

__all__ = ["run"]

DEPTH = 3
ROOM = 4  # times a lineage's bytes: one in use and the one before, both laid out


@torch.no_grad()
def run(size: Size = FULL) -> list[Result]:
    """Time the first use of a lineage, another one in every round."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT reads an attribute that transformers has renamed
        zoo, flat = _written(Path(folder), size)
        return [_timed(zoo, flat, size, keeping=keeping) for keeping in (False, True)]


def _written(folder: Path, size: Size) -> tuple[Path, Path]:
    """Write a tree with a lineage for each round, and a folder with each of them flattened."""
    zoo, flat, of = folder / "zoo", folder / "flat", base(size, torch.bfloat16)
    grown = lt.AdapterTree()
    for i in range(size.repeats + 1):
        path = name = f"t{i}"
        for depth in range(DEPTH):
            grown.add(path, adapter=adapter(of, size, seed=DEPTH * i + depth, dtype=torch.bfloat16))
            path += "/n"
        grown.flatten(grown.leaves()[-1]).to(dtype=torch.bfloat16).save(flat / name)
    grown.save(zoo)
    for file in folder.rglob("*.safetensors"):
        file.read_bytes()
    return zoo, flat


def _timed(zoo: Path, flat: Path, size: Size, *, keeping: bool) -> Result:
    tree = lt.load(zoo)
    nbytes = sum(
        outline.nbytes
        for n in tree.lineage(tree.leaves()[0])
        if (outline := tree.outline(n)) is not None
    )
    model = lt.attach(
        tree, base(size, torch.bfloat16), host_budget="8GiB" if keeping else ROOM * nbytes
    )
    leaves = iter(tree.leaves())
    nodes = (
        {name_in_peft(node): zoo / node for node in tree.lineage(path)} for path in tree.leaves()
    )
    whole = ({folder.name: folder} for folder in sorted(flat.iterdir()))
    cases = {
        "first use": Case(lambda: model.activate(next(leaves), mode="unmerged"), model.deactivate),
        "PEFT, load_adapter of each node + set_adapter": _peft_case(flat, nodes, size, keeping),
        "PEFT, the same of one flattened adapter": _peft_case(flat, whole, size, keeping),
    }
    way = "everything used before is kept" if keeping else "what was used before makes room"
    title = f"first use, warm page cache, {way}; {size}, depth {DEPTH}, bf16"
    result = Result(title, interleaved(cases, size.repeats))
    ours, nodes_ms, flat_ms = (timing.ms for timing in result.timings.values())
    result.facts["factors of a lineage, MB"] = nbytes / 1e6
    result.aim("PEFT / ours, the same files", nodes_ms / ours, at_least=5)
    result.facts["PEFT / ours, flattened beforehand"] = flat_ms / ours
    return result


def _peft_case(flat: Path, adapters: Iterator[dict[str, Path]], size: Size, keeping: bool) -> Case:
    """Return a case of PEFT over a separate base that loads some adapters in every round."""
    first = next(flat.iterdir())
    wrapped: Any = peft.PeftModel.from_pretrained(
        base(size, torch.bfloat16), first, adapter_name="first", autocast_adapter_dtype=False
    )

    def load() -> None:
        files = next(adapters)
        for name, where in files.items():
            wrapped.load_adapter(where, adapter_name=name, autocast_adapter_dtype=False)
        wrapped.base_model.set_adapter(list(files))

    def leave() -> None:
        wrapped.set_adapter("first")
        for name in () if keeping else set(wrapped.peft_config) - {"first"}:
            wrapped.delete_adapter(name)

    return Case(load, leave)
