"""Opening a folder of many nodes, and importing the package: both without reading a weight."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

import lora_tree as lt
from lora_tree.folder import load

from .common import Case, Result, interleaved
from .sizes import FULL, Size

__all__ = ["run"]


def run(size: Size = FULL) -> list[Result]:
    """Time the opening of a folder with and without its lock, then the imports."""
    repeats = max(2, size.repeats // 3)
    with tempfile.TemporaryDirectory() as folder:
        locked, plain = Path(folder) / "locked", Path(folder) / "plain"
        for zoo in (locked, plain):
            _grow(size.nodes).save(zoo)
        (plain / "tree.lock").unlink()
        (plain / "tree.yaml").unlink(missing_ok=True)
        opening = {
            "with tree.lock": Case(lambda: load(locked)),
            "bare folders": Case(lambda: load(plain)),
        }
        result = Result(f"open a folder of {size.nodes:,} nodes", interleaved(opening, repeats))
    for name, timing in list(result.timings.items()):
        result.aim(name, timing.ms / 1e3, at_most=1.5, unit="s")
    modules = ("torch", "lora_tree")
    imports = {f"import {name}": Case(partial(_import, name)) for name in modules}
    second = Result("import in a fresh process", interleaved(imports, repeats))
    torch_ms, ours_ms = (timing.ms for timing in second.timings.values())
    second.aim("import lora_tree / import torch", ours_ms / torch_ms, at_most=1.5)
    return [result, second]


def _grow(nodes: int) -> lt.AdapterTree:
    """Return a tree of three levels; the upper two have up to ten nodes each."""
    value = lt.Adapter({"layer": lt.LowRank(torch.zeros(2, 8), torch.zeros(8, 2))})
    grown = lt.AdapterTree()
    for i in range(nodes):
        digits = f"{i:04}"
        path = "/".join((f"a{digits[:2]}", f"b{digits[2]}", f"c{digits[3]}"))
        for ancestor in (path.rpartition("/")[0].rpartition("/")[0], path.rpartition("/")[0], path):
            if ancestor not in grown and len(grown) < nodes:
                grown.add(ancestor, adapter=value)
    return grown


def _import(name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
