"""Complete the projections that engines fuse: add zero factors for those that an adapter lacks.

    q_proj  k_proj  v_proj      one matrix in an engine's memory
    gate_proj  up_proj          and the same here

vLLM and llama.cpp fill in missing projections by themselves. SGLang (0.5) fills in a missing k, but
can't load q without v. The shape of an added module comes from the base or from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..errors import BaseMismatch, FormatError, SpecError, listing
from ..lowrank import LINEAR, LowRank

__all__ = ["GROUPS", "Shapes", "add_missing", "missing", "shape_lookup", "without_v"]

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Shapes = Callable[[str], tuple[int, int] | None]
"""The name of a module → its (out, in), or None if that is not known."""


def missing(modules: Mapping[str, LowRank]) -> list[str]:
    """Return the names of the modules that are missing in the groups of the given ones.

    >>> missing({"layers.0.q_proj": LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    ['layers.0.k_proj', 'layers.0.v_proj']
    """
    wanted: set[str] = set()
    for name, value in modules.items():
        # a convolution may be called q_proj too, but no engine fuses it
        if value.layout == LINEAR:
            wanted.update(_group(name))
    return sorted(wanted - set(modules))


def add_missing(modules: Mapping[str, LowRank], shapes: Shapes) -> dict[str, LowRank]:
    """Return the modules, and `missing` ones with zero factors of rank 1.

    Raises:
        FormatError: the shape of one is not known; names it and says how to give a base.
        BaseMismatch: its input is not as wide as its sibling's, so the two can't be fused.
    """
    made = dict(modules)
    unknown: list[str] = []
    for name in missing(modules):
        shape = shapes(name)
        if shape is None:
            unknown.append(name)
            continue
        sibling = next(other for other in _group(name) if other in modules)
        width = modules[sibling].A.shape[-1]
        if shape[1] != width:
            raise BaseMismatch(
                f"{name}: it is said to be {shape}, which reads {shape[1]} numbers, but {sibling} "
                f"reads {width}",
                "the two are one matrix in an engine: correct the shape, or name the right base",
            )
        # The sibling's dtype, because engines refuse or cast an adapter with two dtypes.
        dtype = modules[sibling].dtype
        A = torch.zeros((1, shape[1]), dtype=dtype, device="cpu")  # (1, in)
        B = torch.zeros((shape[0], 1), dtype=dtype, device="cpu")  # (out, 1)
        made[name] = LowRank(A, B)
    if unknown:
        raise FormatError(
            f"{listing(unknown, most=3)}: no node on the path changes these, so their shapes are "
            "unknown",
            "name the base, whose config or weights say them: --base FOLDER_OR_ID, base=…",
            "or state them: --shape k_proj=1024x4096, shapes={'k_proj': (1024, 4096)}",
            "or leave them as they are, which is the default: PEFT, vLLM and llama.cpp take them "
            "so",
        )
    return made


def without_v(modules: Mapping[str, LowRank]) -> list[str]:
    """Return the q projections whose v projection is missing: SGLang (0.5) can't load them.

    >>> without_v({"layers.0.q_proj": LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    ['layers.0.q_proj']
    """
    lacking = [name for name in missing(modules) if _leaf(name) == "v_proj"]
    return sorted(_q_of(name) for name in lacking if _q_of(name) in modules)


def shape_lookup(shapes: Mapping[str, tuple[int, int]]) -> Shapes:
    """Turn the shapes that a caller states into a function of a module's full name.

    A shape is stated for a full name or for the end of one; the longest that fits counts.

    Raises:
        SpecError: a shape is no (out, in); names the module.

    >>> of = shape_lookup({"k_proj": (2, 8), "layers.0.k_proj": (4, 8)})
    >>> of("layers.0.k_proj"), of("layers.1.k_proj"), of("layers.1.v_proj")
    ((4, 8), (2, 8), None)
    """
    for name, shape in shapes.items():
        sizes: list[object] = list(shape) if isinstance(shape, (tuple, list)) else []
        whole = [size for size in sizes if type(size) is int and size > 0]
        if not isinstance(name, str) or not name or len(sizes) != 2 or len(whole) != 2:
            raise SpecError(
                f"shapes: {name!r:.80}: got {shape!r:.80}, expected two positive whole numbers, "
                "(out, in)",
                "name a module or the end of its name: shapes={'k_proj': (1024, 4096)}, --shape "
                "k_proj=1024x4096",
            )

    def shape_of(module: str) -> tuple[int, int] | None:
        fitting = [name for name in shapes if module == name or module.endswith(f".{name}")]
        if not fitting:
            return None
        out, into = shapes[max(fitting, key=len)]
        return int(out), int(into)

    return shape_of


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _q_of(v_proj: str) -> str:
    return v_proj.removesuffix("v_proj") + "q_proj"


def _group(name: str) -> list[str]:
    """Return the full names of all modules that an engine fuses with this one, and its own."""
    before, dot, leaf = name.rpartition(".")
    for group in GROUPS:
        if leaf in group:
            return [f"{before}{dot}{other}" for other in group]
    return []
