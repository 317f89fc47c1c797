"""The methods that are compared: each turns flat adapters on the disk into fewer bytes.

    grow        a tree with what the adapters share in nodes above them      lora_tree
    by norm     the same, and an adapter of twice the norm counts four times
    bf16        the same by norm, and the factors are rounded to bfloat16
    moments     the same by norm, weighed by second moments of the inputs
    compress    every adapter alone, ranks chosen across all of them     lora_tree
    vlora       one basis of flattened factors per module and side, a mean, and k numbers each
    lorashare   one basis of directions per module and side, and a (k, r) matrix each

The two packages take a number of components; they get the largest one that fits the bytes. All
methods begin with the PEFT folders on disk and end with factors in memory; the CPU time of the
process between the two is reported.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_tree as lt
from lora_tree.errors import BudgetError

__all__ = ["Shrunk", "flat_bytes", "methods"]


@dataclass(frozen=True)
class Shrunk:
    """The result of a method.

    Args:
        adapters: name → the shrunk adapter.
        nbytes: the bytes of everything that has to be kept.
        cpu_s: seconds of CPU time.
    """

    adapters: Mapping[str, lt.Adapter]
    nbytes: int
    cpu_s: float


def flat_bytes(tree: lt.AdapterTree) -> int:
    """Return the bytes of all factors of flat adapters."""
    return sum(tree.flatten(path).nbytes for path in tree.paths())


def _grow(zoo: Path, budget_bytes: int, **options: Any) -> Shrunk | None:
    start = time.process_time()
    tree = lt.load(zoo)
    names = tree.paths()
    try:
        grown = lt.grow(tree, budget_bytes=budget_bytes, **options)
    except BudgetError:
        return None
    cpu_s = time.process_time() - start
    # A leaf keeps its name; only the nodes above it are new.
    path_of = {path.rpartition("/")[2]: path for path in tree.paths()}
    adapters = {name: tree.flatten(path_of[name]) for name in names}
    return Shrunk(adapters, grown.bytes_after, cpu_s)


def _compress(zoo: Path, budget_bytes: int) -> Shrunk | None:
    start = time.process_time()
    tree = lt.load(zoo)
    try:
        lt.compress(tree, budget_bytes=budget_bytes)
    except BudgetError:
        return None
    cpu_s = time.process_time() - start
    adapters = {path: tree.flatten(path) for path in tree.paths()}
    return Shrunk(adapters, flat_bytes(tree), cpu_s)


def _vlora(zoo: Path, budget_bytes: int) -> Shrunk | None:
    from vlora import SharedSubspace, load_adapter

    flat = lt.load(zoo)
    names = flat.paths()
    sizes = _side_sizes(flat)
    # k components and a mean of the flattened factors, and k numbers for each adapter.
    fixed = sum(4 * size for size, _ in sizes)
    each = sum(4 * (size + len(names)) for size, _ in sizes)
    k = min((budget_bytes - fixed) // each, len(names))
    if k < 1:
        return None
    start = time.process_time()
    adapters = [load_adapter(zoo / name) for name in names]
    shared = SharedSubspace.from_adapters(adapters, names, num_components=k)
    found = {name: shared.reconstruct(name) for name in names}
    cpu_s = time.process_time() - start
    nbytes = 4 * shared.compression_stats()["total_params_compressed"]
    made = {}
    for name, weights in found.items():
        made[name] = _like(flat.flatten(name), weights.lora_a, weights.lora_b)
    return Shrunk(made, nbytes, cpu_s)


def _lorashare(zoo: Path, budget_bytes: int) -> Shrunk | None:
    from lorashare import SHAREModel
    from lorashare.compression import reconstruct_adapter_weights

    flat = lt.load(zoo)
    names = flat.paths()
    sizes = _side_sizes(flat)
    # k directions, and a (k, r) matrix for each adapter.
    each = sum(4 * (size // rank + len(names) * rank) for size, rank in sizes)
    k = min(budget_bytes // each, min(size // rank for size, rank in sizes))
    if k < 1:
        return None
    start = time.process_time()
    shared = SHAREModel.from_adapters({name: str(zoo / name) for name in names}, num_components=k)
    found = {}
    for name in names:
        found[name] = reconstruct_adapter_weights(shared.components, shared.all_loadings[name])
    cpu_s = time.process_time() - start
    tensors = list(shared.components.values())
    for loadings in shared.all_loadings.values():
        tensors += loadings.values()
    made = {}
    for name, weights in found.items():
        sides: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
        for key, tensor in weights.items():
            module, _, side = key.removeprefix("base_model.model.").rpartition(".lora_")
            sides[side[0]][module] = tensor
        made[name] = _like(flat.flatten(name), sides["A"], sides["B"])
    return Shrunk(made, sum(tensor.nbytes for tensor in tensors), cpu_s)


def _side_sizes(flat: lt.AdapterTree) -> list[tuple[int, int]]:
    """Return (numbers, rank) of A and of B of every module; they are alike in all adapters."""
    adapter = flat.flatten(flat.paths()[0])
    found = []
    for value in adapter.modules.values():
        found += [(value.A.numel(), value.rank), (value.B.numel(), value.rank)]
    return found


def _like(old: lt.Adapter, A: Mapping[str, Any], B: Mapping[str, Any]) -> lt.Adapter:
    """Return an adapter with other factors and the scales of the old one."""
    modules = {}
    for name, value in old.modules.items():
        key = name if name in A else f"base_model.model.{name}"
        modules[name] = lt.LowRank(A[key], B[key], scale=value.scale)
    return lt.Adapter(modules)


Method = Callable[[Path, int], Shrunk | None]
"""A function of a zoo's folder and a number of bytes; it returns None if nothing fits."""


def _quietly(method: Method) -> Method:
    def run(zoo: Path, budget_bytes: int) -> Shrunk | None:
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return method(zoo, budget_bytes)
        finally:
            logging.disable(logging.NOTSET)

    return run


def methods(moments: Mapping[str, Tensor]) -> dict[str, Method]:
    """Return the methods by name.

    Args:
        moments: module → (in, in), for the method that weighs by them.
    """
    return {
        "grow": _grow,
        "by norm": partial(_grow, by_norm=True),
        "bf16": partial(_grow, by_norm=True, dtype=torch.bfloat16),
        "moments": partial(_grow, by_norm=True, moments=moments),
        "compress": _compress,
        "vlora": _quietly(_vlora),
        "lorashare": _quietly(_lorashare),
    }
