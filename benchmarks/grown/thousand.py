"""``python -m benchmarks.grown.thousand FOLDER``: grow 1,000 adapters under a limit on memory.

    rank 16 of each module  =  6 shared by all  +  4 of a group of 40  +  6 of the adapter alone

The adapters are drawn, not trained: only their number and size count here. They are written once
and kept in the folder; a command that was stopped goes on writing there, and grows from the
beginning. The time and memory of each pass over the files are printed when
it is done.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

import lora_tree as lt
from lora_tree.budget import parse_bytes

__all__ = ["Grew", "ThousandSize", "adapter_of", "grew", "write_adapters"]

GROUP = 40  # adapters
RANKS = (6, 4, 6)  # shared by all, of a group, of an adapter alone
SIZES = (1.0, 0.7, 0.4)  # scales of the numbers in each of these


@dataclass(frozen=True)
class ThousandSize:
    """The number of the adapters, and their size.

    Args:
        adapters: how many.
        modules: in each adapter, all of one shape.
        hidden: rows and columns of each module's weight.
    """

    adapters: int = 1000
    modules: int = 28
    hidden: int = 1024


@dataclass(frozen=True)
class Grew:
    """The outcome of a run.

    Args:
        passes: how many times all modules were fitted, each at a few prices of a byte.
        cpu_s: seconds of CPU time of `grow` alone.
        peak_bytes: the most resident memory of the process, the import of torch included.
        bytes_before, bytes_after: the bytes of the flat adapters and of the tree.
        relative_error: of the increments.
        shared: how many shared nodes there are.
    """

    passes: int
    cpu_s: float
    peak_bytes: int
    bytes_before: int
    bytes_after: int
    relative_error: float
    shared: int


def adapter_of(index: int, size: ThousandSize) -> lt.Adapter:
    """Draw an adapter; the same number gives the same adapter in every process."""
    modules: dict[str, lt.LowRank] = {}
    for module in range(size.modules):
        name = f"model.layers.{module // 7}.m{module % 7}"
        shared = _part(0, module, RANKS[0], SIZES[0], size.hidden)
        group = _part(1 + index // GROUP, module, RANKS[1], SIZES[1], size.hidden)
        own = _drawn(1_000_000 + index, module, RANKS[2], SIZES[2], size.hidden)
        modules[name] = lt.concat([shared, group, own]).to(dtype=torch.bfloat16)
    return lt.Adapter(modules)


@lru_cache(maxsize=4096)
def _part(seed: int, module: int, rank: int, scale: float, hidden: int) -> lt.LowRank:
    return _drawn(seed, module, rank, scale, hidden)


def _drawn(seed: int, module: int, rank: int, scale: float, hidden: int) -> lt.LowRank:
    draw = torch.Generator().manual_seed(1000 * seed + module)
    A = torch.randn(rank, hidden, generator=draw) / hidden**0.5
    B = torch.randn(hidden, rank, generator=draw) * scale / hidden**0.5
    return lt.LowRank(A, B)


def write_adapters(folder: Path, size: ThousandSize) -> None:
    """Write the adapters that are missing in a folder, each under another name first."""
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    numbers = range(size.adapters)
    for index in track(numbers, "writing", console=console, disable=not console.is_terminal):
        place = folder / f"n{index:04}"
        if place.is_dir():
            continue
        # A dot hides the unfinished folder from `load`.
        stage = folder / f".{place.name}"
        shutil.rmtree(stage, ignore_errors=True)
        adapter_of(index, size).save(stage)
        stage.rename(place)


def grew(folder: Path, max_error: float, working_bytes: int | str = "2GiB") -> Grew:
    """Grow the adapters in a folder, and measure what that took."""
    start, passes = time.process_time(), 0
    console = Console(stderr=True, highlight=False)

    def tell(done: int, total: int) -> None:
        nonlocal passes
        if done == total:
            passes += 1
            spent, peak = time.process_time() - start, _peak_bytes() / 1e9
            console.print(f"pass {passes}: {spent:,.0f} s of CPU time, at most {peak:.2f} GB")

    tree = lt.load(folder)
    grown = lt.grow(tree, max_error=max_error, working_bytes=working_bytes, progress=tell)
    return Grew(
        passes,
        time.process_time() - start,
        _peak_bytes(),
        grown.bytes_before,
        grown.bytes_after,
        grown.relative_error,
        len(grown.edited.added),
    )


def _peak_bytes() -> int:
    """Return the most memory that this process ever had resident; Linux counts it in KiB."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(
    folder: Annotated[Path, typer.Argument(help="Keeps the adapters.")],
    adapters: Annotated[int, typer.Option(min=2)] = 1000,
    modules: Annotated[int, typer.Option(min=1)] = 28,
    hidden: Annotated[int, typer.Option(min=16)] = 1024,
    max_error: Annotated[float, typer.Option(help="Of the increments, relative.")] = 0.1,
    limit: Annotated[str, typer.Option(help="More memory than that is refused.")] = "8GB",
    working_bytes: Annotated[str, typer.Option(help="Of grow, for stacks of modules.")] = "2GiB",
) -> None:
    """Write adapters, grow them within a limit on memory, and print the figures as JSON."""
    size = ThousandSize(adapters, modules, hidden)
    place = folder / f"{adapters}-{modules}-{hidden}"
    write_adapters(place, size)
    # The kernel refuses an allocation past this one, so a run that ends has kept within it.
    most = parse_bytes(limit)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    found = grew(place, max_error, working_bytes)
    sys.stdout.write(json.dumps({**asdict(size), **asdict(found)}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
