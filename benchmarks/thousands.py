"""Ten thousand nodes on disk: opening them, the first use of a path, memory under traffic.

Each part is measured in a fresh process. Memory is anonymous resident bytes, as Linux counts them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_tree as lt

from .common import Result, Timing
from .policies import tree_of, zipf
from .sizes import FULL, Size

__all__ = ["run"]

WIDTH = 1024
SITES = 4
R = 8
PART = 0.05
SKEW = 1.0
FIRST_USES = 40
LEAST = 4 * 4  # nodes: room for two lineages and their layouts


def run(size: Size = FULL) -> list[Result]:
    """Return a table of opening and first uses, and one of traffic."""
    with tempfile.TemporaryDirectory() as folder:
        zoo, small = Path(folder) / "zoo", Path(folder) / "small"
        _grow(zoo, size.nodes * 10)
        _grow(small, max(size.nodes // 10, 10))
        opened = [_child("opening", str(zoo)) for _ in range(min(size.repeats, 3))]
        result = Result(
            f"{size.nodes * 10:,} nodes of depth 4, {_bytes_of_a_node() >> 10} KiB each",
            {"opening": Timing(tuple(1e3 * each["seconds"] for each in opened))},
        )
        result.aim("opening", result.timings["opening"].ms / 1e3, at_most=3.0, unit="s")
        above = max(each["anonymous_bytes"] for each in opened) / 1e6
        result.aim("anonymous memory above the import", above, at_most=100, unit="MB")
        for nodes, where in ((size.nodes * 10, zoo), (max(size.nodes // 10, 10), small)):
            for memory, used in _child("first_uses", str(where)).items():
                mine, floor = Timing(tuple(used["activate_ms"])), Timing(tuple(used["read_ms"]))
                name = f"{nodes:,} nodes, memory {memory}"
                result.timings[f"first use, {name}"] = mine
                result.timings[f"reading and hashing its files, {name}"] = floor
                result.aim(
                    f"first use − reading and hashing, {name}",
                    mine.over(floor).ms,
                    at_most=5.0,
                    unit="ms",
                )
        traffic = _child("traffic", str(zoo), size.nodes * 50)
    second = Result(
        f"{size.nodes * 50:,} requests, Zipf {SKEW}, budget {PART:.0%} of all nodes' bytes; "
        "unmerged"
    )
    second.facts["budget, MB"] = traffic["budget_bytes"] / 1e6
    for key in ("served", "requests_per_s", "loaded_bytes", "evictions"):
        second.facts[key.replace("_", " ")] = traffic[key]
    growth = traffic["growth_bytes"] / traffic["budget_bytes"]
    second.aim("growth of anonymous memory / budget", growth, at_most=1.05)
    return [result, second]


# ---------------------------------------------------------------------- in a separate process
def opening(folder: str) -> dict[str, Any]:
    """Return the seconds that opening takes, and the growth of memory."""
    before, start = _anonymous(), time.perf_counter()
    tree = lt.load(folder)
    seconds = time.perf_counter() - start
    assert len(tree)
    return {"seconds": seconds, "anonymous_bytes": _anonymous() - before}


@torch.no_grad()
def first_uses(folder: str) -> dict[str, Any]:
    """Return the ms of activating paths for the first time, and of reading and hashing their files.

    Both are measured in memory that is new to the process, and in the memory of the path before, as
    in a full cache.
    """
    return {
        "new": _first_uses(folder, handed_on=False),
        "handed on": _first_uses(folder, handed_on=True),
    }


def _first_uses(folder: str, *, handed_on: bool) -> dict[str, list[float]]:
    tree = lt.load(folder)
    model = lt.attach(tree, _base(), host_budget="1GiB")
    leaves = tree.leaves()
    leaves = (leaves[:: max(1, len(leaves) // FIRST_USES)] * 3)[: FIRST_USES + 1]
    activate_ms, read_ms = [], []
    for path in leaves:
        lineage = tree.lineage(path)
        files = [Path(folder) / node / name for node in lineage for name in _FILES]
        for file in files:
            file.read_bytes()  # the page cache is warm for both
        start = time.perf_counter()
        for file in files:
            hashlib.sha256(file.read_bytes()).hexdigest()
        read_ms.append(1e3 * (time.perf_counter() - start))
        model.cache._loader.tiers[0].clear()  # as if no node had been used or hashed
        for node in lineage:
            object.__setattr__(tree[node].source, "_hashed", None)
        if handed_on:
            model._planner.forget()
            model._stage.side_hooks.forget()
        start = time.perf_counter()
        model.activate(path, mode="unmerged")
        activate_ms.append(1e3 * (time.perf_counter() - start))
        model.deactivate()
    model.detach()
    return {"activate_ms": activate_ms[1:], "read_ms": read_ms[1:]}


@torch.no_grad()
def traffic(folder: str, requests: int) -> dict[str, Any]:
    """Make requests one after the other; return how far memory grew after the first one."""
    tree = lt.load(folder)
    budget = int(max(PART * len(tree), LEAST) * _bytes_of_a_node())
    model, base_x = lt.attach(tree, (base := _base()), host_budget=budget), torch.randn(1, WIDTH)
    asked = zipf(tree.paths(), SKEW, requests)
    model.activate(asked[0], mode="unmerged")
    base(base_x)
    model.deactivate()
    before, most, start = _anonymous(), 0, time.perf_counter()
    for i, path in enumerate(asked):
        model.activate(path, mode="unmerged")
        base(base_x)
        if i % 100 == 0 or i == len(asked) - 1:
            most = max(most, _anonymous())
            assert model.cache.stats().tiers[0].held_bytes <= budget
    seconds, stats = time.perf_counter() - start, model.cache.stats()
    return {
        "budget_bytes": budget,
        "growth_bytes": most - before,
        "served": stats.hit_rate,
        "requests_per_s": requests / seconds,
        "loaded_bytes": stats.tiers[0].loaded_bytes,
        "evictions": stats.tiers[0].evictions,
    }


# ---------------------------------------------------------------------- helpers
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def _child(name: str, *arguments: object) -> Any:
    code = (
        "import json; from benchmarks import thousands; "
        f"print(json.dumps(thousands.{name}(*{arguments!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(SITES)))


def _bytes_of_a_node() -> int:
    return SITES * R * 2 * WIDTH * 4


def _grow(folder: Path, nodes: int) -> None:
    """Write a folder of ``nodes`` nodes; all have the same numbers, which do not matter here."""
    value = lt.Adapter(
        {
            str(i): lt.LowRank(torch.randn(R, WIDTH) * 0.01, torch.randn(WIDTH, R) * 0.01)
            for i in range(SITES)
        }
    )
    tree = lt.AdapterTree()
    for path in tree_of(nodes):
        tree.add(path, adapter=value)
    tree.save(folder)


def _anonymous() -> int:
    """Return the anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon: this is measured on Linux")
