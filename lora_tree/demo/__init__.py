"""The package's main job on real input: train, reopen, switch, measure and export a tree.

    stdlib → base       net → net/email, net/asyncio       gui → gui/tkinter, …     all at once

The real input is the Python standard library that is installed. Every number in the report is
measured in the run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ..errors import plural
from ..extras import need
from ..folder import load
from ..model import TreeModel, attach
from ..tree import AdapterTree
from .bytelevel import TARGETS, new_base, open_base, save_base
from .corpus import Domain, find_corpus
from .learning import as_one_row, bits_per_byte, evenly_spread, train_base, train_tree
from .report import BASE_ROW, Report
from .staging import demo_folders

__all__ = ["FULL", "QUICK", "Report", "Size", "run"]


@dataclass(frozen=True)
class Size:
    """The amount of training and of measuring."""

    hidden: int
    layers: int
    r: int
    base_steps: int
    tree_steps: int
    windows: int  # held-out windows of each domain
    leaves: int  # at most; the first ones
    length: int = 128  # bytes in a window
    batch: int = 8
    tree_batch: int = 16


FULL = Size(hidden=192, layers=4, r=8, base_steps=480, tree_steps=180, windows=24, leaves=99)
QUICK = Size(hidden=64, layers=2, r=4, base_steps=60, tree_steps=60, windows=4, leaves=4)


def run(out: Path, *, size: Size = FULL, console: Console | None = None, seed: int = 0) -> Report:
    """Train, save, reopen, measure and export, below ``out``, ``out``-base and ``out``-export.

    Raises:
        MissingExtra: transformers or peft is not installed.
        FolderError: one of the folders exists and the demo did not make it, or the standard library
            has no sources.
    """
    console = console or Console()
    # PEFT is used only at the end. It is imported first, so that a missing package is reported
    # before minutes of training.
    need("peft", extra="peft", what="the demo")
    need("transformers", extra="transformers", what="the demo").utils.logging.disable_progress_bar()
    targets = [out, out.with_name(f"{out.name}-base"), out.with_name(f"{out.name}-export")]
    clock = _Clock()
    with (
        demo_folders(targets) as (zoo, base, export),
        # The seed below must not change a caller's random numbers. No device is listed, because the
        # demo runs on the CPU, and asking for the state of a GPU would start CUDA.
        torch.random.fork_rng(devices=[]),
        _progress(console) as bar,
    ):
        torch.manual_seed(seed)
        corpus, leaves = find_corpus()
        leaves = leaves[: size.leaves]
        model = new_base(hidden=size.hidden, layers=size.layers, window=size.length)
        with clock("base"):
            _train_base(model, corpus, size, seed, bar)
            save_base(model, base)
        with clock("adapters"):
            # The tree names its base by a relative path: both folders lie in a hidden one now, and
            # an absolute path would be wrong once the folders are moved to their places.
            _train_tree(model, leaves, size, seed, bar, base=f"../{base.name}").save(zoo)
        # The files are opened again, so that the figures below are those of a user who opens them.
        with clock("reopening"):
            model = open_base(base).eval()
            tree = load(zoo)
            attached = attach(tree, model)
        held_out = {}
        for domain in (corpus, *leaves):
            tokens = as_one_row(domain.held_out)
            windows = evenly_spread(tokens, windows=size.windows, length=size.length)
            held_out[domain.path] = windows
        with clock("measuring"):
            bits = _bits(attached, model, held_out, bar)
            switch_ms = {}
            for mode in ("merged", "unmerged"):
                switch_ms[mode] = _switch_ms(attached, tree.leaves(), mode)
        with clock("exporting"):
            leaf = "net/email" if "net/email" in tree else tree.leaves()[0]
            flat = tree.flatten(leaf)
            flat.save(export)
            difference, largest = _compare(attached, model, leaf, base, export, held_out[leaf])
    return Report(
        folders=(targets[0], targets[1], targets[2]),
        domains=tuple(held_out),
        bits=bits,
        switch_ms=switch_ms,
        leaf=leaf,
        leaf_rank=max(flat.ranks.values()),
        peft_difference=difference,
        peft_largest=largest,
        seconds=clock.seconds,
    )


# ---------------------------------------------------------------------- the phases
def _train_base(model: Any, corpus: Domain, size: Size, seed: int, bar: Progress) -> None:
    count = sum(p.numel() for p in model.parameters())
    with _task(bar, f"base ({count / 1e6:.1f} M parameters)", size.base_steps) as tick:
        train_base(
            model,
            as_one_row(corpus.train),
            steps=size.base_steps,
            batch=size.batch,
            length=size.length,
            lr=3e-3,
            seed=seed,
            tick=tick,
        )


def _train_tree(
    model: Any, leaves: Sequence[Domain], size: Size, seed: int, bar: Progress, *, base: str
) -> AdapterTree:
    """Train all nodes at once: a leaf on its own rows, a group on those of all its children."""
    tree = AdapterTree(
        base=base, defaults={"r": size.r, "lora_alpha": 2 * size.r, "target_modules": TARGETS}
    )
    for leaf in leaves:
        group = leaf.path.partition("/")[0]
        if group not in tree:
            tree.add(group)
        tree.add(leaf.path)
    attached = attach(tree, model)
    streams = {leaf.path: (leaf.path, as_one_row(leaf.train)) for leaf in leaves}
    with _task(bar, f"{plural(len(tree), 'node')} at once", size.tree_steps) as tick:
        train_tree(
            attached,
            tree.paths(),
            streams,
            steps=size.tree_steps,
            batch=size.tree_batch,
            length=size.length,
            lr=5e-3,
            # Another seed than the base's, so that the two draw their windows independently.
            seed=seed + 1,
            tick=tick,
        )
    attached.detach()
    return tree


def _bits(
    attached: TreeModel, model: Any, held_out: Mapping[str, Tensor], bar: Progress
) -> dict[str, tuple[float, ...]]:
    """Return the bits per byte of every node, and of the bare base, on every domain."""
    paths = ["", *attached.tree.paths()]
    bits: dict[str, tuple[float, ...]] = {}
    with _task(bar, "held-out bits per byte", len(paths)) as tick:
        for path in paths:
            with attached.using(path):
                measured = [bits_per_byte(model, windows) for windows in held_out.values()]
            bits[path or BASE_ROW] = tuple(measured)
            tick()
    return bits


def _switch_ms(attached: TreeModel, leaves: Sequence[str], mode: Any, rounds: int = 5) -> float:
    """Return the median milliseconds of one switch from leaf to leaf."""
    times = []
    # The first round reads the adapters and lays out the paths; it is not counted.
    for count in range(rounds + 1):
        for path in leaves:
            start = time.perf_counter()
            attached.activate(path, mode=mode)
            if count:
                times.append(time.perf_counter() - start)
    attached.deactivate()
    return 1e3 * median(times)


@torch.no_grad()
def _compare(
    attached: TreeModel, model: Any, leaf: str, base: Path, export: Path, windows: Tensor
) -> tuple[float, float]:
    """Compare the merged leaf with its export in PEFT.

    Returns:
        the largest |difference| of a logit, and the largest |logit|.
    """
    peft = need("peft", extra="peft", what="the demo")
    with attached.using(leaf):
        tree_logits = model(input_ids=windows).logits
    with warnings.catch_warnings():
        # PEFT 0.20 reads an attribute that transformers 5 has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        # PEFT replaces modules inside the model that it is given, so it gets a second base. The
        # tree is still attached to the first one.
        wrapped = peft.PeftModel.from_pretrained(open_base(base), export).eval()
    peft_logits = wrapped(input_ids=windows).logits
    return float((tree_logits - peft_logits).abs().max()), float(peft_logits.abs().max())


# ---------------------------------------------------------------------- clock and progress
class _Clock:
    """The seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def _progress(console: Console) -> Progress:
    """Return bars for a terminal. Elsewhere they are off, and `_task` prints a line for each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def _task(bar: Progress, what: str, total: int) -> Iterator[Callable[[], object]]:
    task, start = bar.add_task(what, total=total), time.perf_counter()
    yield lambda: bar.advance(task)
    if bar.disable:
        bar.console.print(f"{what}: {time.perf_counter() - start:.1f} s", highlight=False)
