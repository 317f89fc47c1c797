"""A base and many small adapters over it, each trained on another text.

    known      trained as a tree of three levels (all, the package, the file), then flattened,
               so the shared parts are known
    unknown    every adapter trained alone, from other random factors

The texts are the largest files of the Python standard library. The last fifth of each is held out.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_tree as lt
from lora_tree.demo.bytelevel import TARGETS, new_base, open_base, save_base
from lora_tree.demo.corpus import find_corpus
from lora_tree.demo.learning import as_one_row, evenly_spread, train_base, train_tree

__all__ = ["Kind", "Leaf", "ZooSize", "opened_base", "opened_zoo", "texts"]

LARGEST = 40_000  # bytes read of a file; more would only lengthen the training


class Kind(StrEnum):
    """A way in which the adapters were trained."""

    known = "known"
    unknown = "unknown"


@dataclass(frozen=True)
class ZooSize:
    """The amount of training and measuring.

    Args:
        leaves: the number of adapters.
        hidden, layers, base_steps: size and training of the base.
        rows: rows that each adapter trains on, of ``length`` bytes.
        windows: windows held out of each text.
        ranks: ranks of a known tree's nodes, by depth; an adapter trained alone has their sum.
    """

    leaves: int
    hidden: int = 128
    layers: int = 2
    base_steps: int = 400
    rows: int = 96
    batch: int = 32
    length: int = 128
    windows: int = 8
    ranks: tuple[int, ...] = (4, 4, 4)


@dataclass(frozen=True)
class Leaf:
    """A text: a path of package and file, tokens to train on, and windows held out of it."""

    path: str
    train: Tensor
    held_out: Tensor

    @property
    def name(self) -> str:
        """The path, written as the name of a flat adapter."""
        return self.path.replace("/", "-")


def texts(size: ZooSize) -> list[Leaf]:
    """Return the largest files of the standard library as leaves, in the order of their paths.

    A file of a package with less than four such files belongs to the package ``others``.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in stdlib.rglob("*.py") if "site-packages" not in file.parts]
    # By size and then by name, so that every machine with this Python takes the same ones.
    files.sort(key=lambda file: (-file.stat().st_size, str(file)))
    chosen = files[: size.leaves]
    packages = [file.relative_to(stdlib).parts[0] for file in chosen]
    found = []
    for file, package in zip(chosen, packages, strict=True):
        group = package if packages.count(package) >= 4 else "others"
        name = "_".join(file.relative_to(stdlib).with_suffix("").parts)
        text = file.read_bytes()[:LARGEST]
        cut = len(text) * 4 // 5
        held_out = evenly_spread(as_one_row([text[cut:]]), windows=size.windows, length=size.length)
        found.append(Leaf(f"{group}/{name}", as_one_row([text[:cut]]), held_out))
    return sorted(found, key=lambda leaf: leaf.path)


def opened_base(folder: Path, size: ZooSize, tick: Callable[[], object] = lambda: None) -> Any:
    """Return the base in a folder; train it first if it is missing."""
    if not folder.is_dir():
        torch.manual_seed(0)
        model = new_base(hidden=size.hidden, layers=size.layers, window=size.length)
        domain, _ = find_corpus()
        train_base(
            model,
            as_one_row(domain.train),
            steps=size.base_steps,
            batch=8,
            length=size.length,
            lr=3e-3,
            seed=0,
            tick=tick,
        )
        _appear(folder, lambda stage: save_base(model, stage))
    return open_base(folder).eval()


def opened_zoo(
    folder: Path,
    kind: Kind,
    base: Any,
    leaves: Sequence[Leaf],
    size: ZooSize,
    tick: Callable[[], object] = lambda: None,
) -> lt.AdapterTree:
    """Return the flat adapters in a folder; train them first if they are missing."""
    if not folder.is_dir():
        flat = _trained(kind, base, leaves, size, tick)
        _appear(folder, flat.save)
    return lt.load(folder)


def _trained(
    kind: Kind, base: Any, leaves: Sequence[Leaf], size: ZooSize, tick: Callable[[], object]
) -> lt.AdapterTree:
    torch.manual_seed(1)
    tree = lt.AdapterTree(defaults={"target_modules": TARGETS})
    path_of = {leaf.path: leaf.name for leaf in leaves}
    if kind is Kind.known:
        path_of = {leaf.path: f"all/{leaf.path}" for leaf in leaves}
    rank = sum(size.ranks)
    for path in path_of.values():
        above = path.split("/")[:-1]
        for depth in range(len(above)):
            node = "/".join(above[: depth + 1])
            if node not in tree:
                tree.add(node, r=size.ranks[depth], lora_alpha=2.0 * size.ranks[depth])
        own = size.ranks[-1] if kind is Kind.known else rank
        tree.add(path, r=own, lora_alpha=2.0 * own)
    model = lt.attach(tree, base)
    train_tree(
        model,
        tree.paths(),
        {leaf.path: (path_of[leaf.path], leaf.train) for leaf in leaves},
        steps=len(leaves) * size.rows // size.batch,
        batch=size.batch,
        length=size.length,
        lr=5e-3,
        seed=1,
        tick=tick,
    )
    model.detach()
    flat = lt.AdapterTree()
    for leaf in leaves:
        flat.add(leaf.name, adapter=tree.flatten(path_of[leaf.path]))
    return flat


def _appear(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under another name and rename it, so that it appears only when complete."""
    stage = folder.with_name(folder.name + ".part")
    shutil.rmtree(stage, ignore_errors=True)
    write(stage)
    stage.rename(folder)
