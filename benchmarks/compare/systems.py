"""The systems that are compared: their ranks, and the settings that are tried for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import lora_tree as lt
from lora_tree.demo.bytelevel import TARGETS
from lora_tree.training.levels import SHRINKAGE

__all__ = ["FULL", "SMALL", "SYSTEMS", "Outcome", "Setting", "Size", "System", "tree_of"]


@dataclass(frozen=True)
class Size:
    """The amount of training and measuring."""

    hidden: int
    layers: int
    base_steps: int
    steps: int
    batch: int
    windows: int
    seeds: int
    rates: tuple[float, ...]
    leaves: int = 99
    length: int = 128
    base_batch: int = 8
    curve: tuple[int, ...] = (30, 60, 120, 240, 480)
    shares: tuple[float, ...] = (0.01, 0.05, 0.2)


FULL = Size(
    hidden=192,
    layers=4,
    base_steps=480,
    steps=120,
    batch=8,
    windows=16,
    seeds=3,
    rates=(3e-3, 8e-3),
)
SMALL = Size(
    hidden=32,
    layers=1,
    base_steps=2,
    steps=2,
    batch=4,
    windows=1,
    seeds=2,
    rates=(5e-3,),
    leaves=4,
    curve=(1, 2),
    shares=(0.5,),
)


@dataclass(frozen=True)
class Setting:
    """A learning rate to try, and the part of a factor that decays in a step, by depth."""

    rate: float
    shrinkage: tuple[float, ...]

    @property
    def decay_by_depth(self) -> tuple[float, ...]:
        """The decays for AdamW, whose step takes rate · decay off a factor."""
        return tuple(part / self.rate for part in self.shrinkage)


@dataclass(frozen=True)
class System:
    """One way to share adapters: the ranks of a root, of each group and of each leaf; 0: no node.

    Args:
        over: whether the loss is a mean over rows or paths.
        shrinkages: decays to try, by depth.
    """

    name: str
    root: int
    group: int
    leaf: int
    over: Literal["rows", "paths"] = "rows"
    shrinkages: tuple[tuple[float, ...], ...] = ((0.0,), (0.008,))

    def parameters(self, groups: int, leaves: int) -> int:
        """Return the trained parameters, in units of one rank of one adapter."""
        return self.root + groups * self.group + leaves * self.leaf

    @property
    def on_path(self) -> int:
        """The rank on the path of a leaf."""
        return self.root + self.group + self.leaf

    def settings(self, rates: Sequence[float]) -> list[Setting]:
        """Return the settings to try; their number is the same for every system."""
        return [Setting(rate, parts) for rate, parts in product(rates, self.shrinkages)]


_HALF = tuple(part / 2 for part in SHRINKAGE)


def _tree(root: int, group: int, leaf: int) -> System:
    return System("tree", root, group, leaf, shrinkages=(SHRINKAGE, _HALF))


def _alone(root: int, group: int, leaf: int) -> System:
    return System("tree, alone", root, group, leaf, over="paths")


# Three groups and eight leaves: 88 = 8·11 = 8 + 3·8 + 8·7 = 48 + 3·8 + 8·2
SYSTEMS: Mapping[str, tuple[System, ...]] = {
    "equal parameters": (
        System("pooled", 88, 0, 0),
        System("flat", 0, 0, 11, over="paths"),
        _alone(8, 8, 7),
        _tree(48, 8, 2),
    ),
    "equal rank on a path": (
        System("pooled", 16, 0, 0),
        System("flat", 0, 0, 16, over="paths"),
        _alone(5, 5, 6),
        _tree(12, 2, 2),
    ),
}


@dataclass
class Outcome:
    """One system in one comparison."""

    comparison: str
    data: str
    system: System
    setting: Setting
    parameters: int
    bits: list[float] = field(default_factory=list)  # seed → mean over leaves
    of_leaves: list[list[float]] = field(default_factory=list)  # seed → leaf


def tree_of(system: System, leaves: Sequence[str]) -> lt.AdapterTree:
    """Return the tree of a system: ``all``, groups, leaves; a node of rank 0 is a group."""
    tree = lt.AdapterTree(defaults={"target_modules": TARGETS})
    for path, rank in _nodes(system, leaves).items():
        if rank:
            tree.add(path, r=rank, lora_alpha=2.0 * rank)
        else:
            tree.add(path, group=True)
    return tree


def _nodes(system: System, leaves: Sequence[str]) -> dict[str, int]:
    nodes = {"all": system.root}
    if system.group or system.leaf:
        nodes |= {f"all/{leaf.partition('/')[0]}": system.group for leaf in leaves}
        nodes |= {f"all/{leaf}": system.leaf for leaf in leaves}
    return nodes
