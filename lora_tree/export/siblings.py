"""Projections that engines fuse, complete: zero factors for those of q, k, v and gate, up that no node changes.

    q_proj  k_proj  v_proj      one matrix in an engine's memory: SGLang wants v beside q
    gate_proj  up_proj          and the same here

A missing module needs a shape. Where the base is not at hand, an adapter elsewhere in the tree that changes it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..errors import BaseMismatch, FormatError, listing
from ..lowrank import LINEAR, LowRank
from ..tree import AdapterTree

__all__ = ["GROUPS", "Shapes", "completed", "missing", "shapes_in_tree"]

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Shapes = Callable[[str], tuple[int, int] | None]
"""The name of a module → its (out, in), or None where nobody knows."""


def missing(modules: Mapping[str, LowRank]) -> list[str]:
    """The modules that the groups of these are short of, by name.

    >>> missing({"layers.0.q_proj": LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    ['layers.0.k_proj', 'layers.0.v_proj']
    """
    wanted = set()
    for name, value in modules.items():
        before, dot, leaf = name.rpartition(".")
        for group in GROUPS:
            if leaf in group and value.layout == LINEAR:
                wanted |= {f"{before}{dot}{other}" for other in group}
    return sorted(wanted - set(modules))


def completed(modules: Mapping[str, LowRank], shapes: Shapes) -> dict[str, LowRank]:
    """The modules with zero factors of rank 1 for `missing` ones.

    Raises:
        FormatError: nobody knows the shape of one; names it and says how to give a base.
        BaseMismatch: its input is not as wide as that of its sibling, so the two are not one matrix.
    """
    made = dict(modules)
    unknown = []
    for name in missing(modules):
        shape = shapes(name)
        if shape is None:
            unknown.append(name)
            continue
        sibling = next(n for n in _group(name) if n in modules)
        into = modules[sibling].A.shape[-1]
        if shape[1] != into:
            raise BaseMismatch(f"{name}: the base has {shape} there, but {sibling} reads {into} numbers")
        dtype = modules[sibling].dtype
        A, B = (torch.zeros(size, dtype=dtype, device="cpu") for size in ((1, shape[1]), (shape[0], 1)))
        made[name] = LowRank(A, B)
    if unknown:
        raise FormatError(
            f"{listing(unknown, most=3)}: engines want q, k and v together, and gate and up; no node here changes "
            "these, so nothing says their shapes",
            "name the base, whose config or weights say them: --base FOLDER_OR_ID, base=…",
            "or leave them out, which PEFT and vLLM accept: --incomplete, complete=False",
        )
    return made


def shapes_in_tree(tree: AdapterTree) -> Shapes:
    """What the adapters of a tree say about the shapes of its base; only headers are read, and only when asked."""
    known: dict[str, tuple[int, int]] = {}
    ahead = iter(tree.paths())

    def shape(name: str) -> tuple[int, int] | None:
        while name not in known and (path := next(ahead, None)) is not None:
            outline = tree.outline(path)
            for module, value in outline.modules.items() if outline is not None else ():
                if value.layout == LINEAR:
                    known.setdefault(module, (value.shape[-2], value.shape[-1]))
        return known.get(name)

    return shape


def _group(name: str) -> list[str]:
    before, dot, leaf = name.rpartition(".")
    return [f"{before}{dot}{other}" for group in GROUPS if leaf in group for other in group]
