"""The portable adapter: a lineage as one adapter of the one form that every engine reads alike.

    uniform rank        short modules are padded with zeros
    lora_alpha = r      every scale is folded into B, so that alpha/r, alpha/√r and alpha over B's own rank agree
    nothing else        no rank or alpha patterns, no rslora, no biases, no tensors of the base
    on demand           q, k and v together, gate and up together: zero factors for those that no node changes

Law: the form of a path depends on its lineage and on what the caller names, never on what else lies
in the tree. Law: what the form costs is known. Every module's error is ‖ΔW − ΔW'‖ / ‖ΔW‖, from QR
cores in float64, against the exact sum of the lineage; it counts truncation, the folding of scales
and the rounding to a dtype alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import nn

from ..adapter import Adapter
from ..blend import Blend, spelled
from ..combining import combine
from ..errors import BaseMismatch, FormatError, LoraTreeError, SpecError, listing
from ..given import check_rank
from ..lowrank import LowRank, concat
from ..tree import AdapterTree
from .siblings import Shapes, completed, missing, stated
from .unloaded_base import Base

__all__ = ["ENGINE_RANKS", "Portable", "ceil_rank_of", "portable"]

ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``max_lora_rank`` may be (0.32): an adapter costs as much as the next of them."""

ROUNDING = 1e-6
"""What a ``max_error`` lets through for fp32's own rounding, which no rank can mend."""


@dataclass(frozen=True, eq=False)
class Portable:
    """A path or a blend in the portable form, and what that cost.

    Args:
        path: the path or blend in its one spelling.
        adapter: the adapter to save.
        rank: the one rank of all its modules, as PEFT counts it.
        errors: module → ‖ΔW − ΔW'‖ / ‖ΔW‖; 0.0 where nothing was cut or rounded.
        error: the same over all modules together.
        added: modules that only have zero factors, there to complete a group.
        incomplete: modules that q, k, v and gate, up are short of, left as they are.
    """

    path: str
    adapter: Adapter
    rank: int
    errors: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    added: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest error of a module."""
        return max(self.errors.values(), default=0.0)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the PEFT folder, whole or not at all; its bytes depend on the value alone.

        Raises:
            FolderError: the folder can't be written.
        """
        self.adapter.save(folder)


def portable(
    tree: AdapterTree,
    blend: Blend,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    ceil_rank: bool = False,
    dtype: torch.dtype | None = None,
    base: nn.Module | str | os.PathLike[str] | None = None,
    complete: bool = False,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> Portable:
    """A path or a blend as the one adapter that PEFT and the engines read alike.

    Args:
        rank: the largest rank to keep; exact, at the largest Σr of a module, without it and
            ``max_error``.
        max_error: the largest error allowed in any module; the smallest rank that reaches it
            everywhere is taken.
        ceil_rank: take the next of `ENGINE_RANKS`, which costs an engine no more and loses less.
        dtype: round the factors to it; fp32, or the factors' own where nothing has to be rounded,
            without it.
        base: the model, its folder or its hub id, for the names that modules have in it today and
            for the shapes of modules that no node changes; the tree's own folder without it.
        complete: give q, k, v and gate, up zero factors where some of them have factors. Engines
            fill these by themselves; SGLang can't load q without v.
        shapes: (out, in) of modules that no node changes, by name or by the end of it, for
            ``complete`` where no base is at hand.

    Raises:
        PathError, ShapeMismatch, BaseMismatch: as `AdapterTree.flatten`.
        SpecError: the bounds can't be met; names the module. Or a shape makes no sense.
        FormatError: the form has no way to say a module's increment (a bias), or its group can't be
            completed.

    >>> import torch
    >>> import lora_tree as lt
    >>> tree = lt.AdapterTree()
    >>> for path, name, r in (("fr", "up_proj", 2), ("fr/legal", "gate_proj", 3)):
    ...     value = lt.LowRank(torch.eye(r, 4), torch.eye(6, r), scale=0.5)
    ...     _ = tree.add(path, adapter=lt.Adapter({f"mlp.{name}": value}))
    >>> made = lt.portable(tree, "fr/legal", ceil_rank=True)
    >>> made.rank, made.adapter.ranks, made.error
    (8, {'mlp.gate_proj': 8, 'mlp.up_proj': 8}, 0.0)
    >>> lt.portable(tree, "fr").incomplete             # up_proj alone is left as it is
    ('mlp.gate_proj',)
    >>> full = lt.portable(tree, "fr", complete=True, shapes={"gate_proj": (6, 4)})
    >>> full.added, full.adapter.modules["mlp.gate_proj"].shape
    (('mlp.gate_proj',), (6, 4))
    """
    path = spelled(blend)
    if shapes and not complete:
        raise SpecError(
            "shapes= says how wide the modules are that complete=True adds",
            "complete=True, --complete",
        )
    told = stated(shapes or {})
    known = Base(tree.base if base is None else base, asked=base is not None)
    names = known.renamer(name for _, _, adapter in tree.terms(blend) for name in adapter.modules)
    flat = tree.flatten(blend, base=names)
    terms = tree.terms(blend, base=names)
    nodes = [node for node, _, _ in terms]
    if not flat.modules:
        raise FormatError(
            f"{path or 'the bare base'}: there is nothing to export, no node on the way has an "
            "adapter"
        )
    try:
        _plain(flat, terms, known)
        exact = combine(
            [(adapter.to(dtype=torch.float64), c) for _, c, adapter in terms], names=nodes
        )
        kept = _rank(exact.modules, rank, max_error, ceil_rank=ceil_rank)
        cut = {
            name: exact.modules[name].truncate(kept // _groups(value)).value
            if value.rank > kept // _groups(value)
            else value.folded()
            for name, value in flat.modules.items()
        }
        rounded = _in_one_dtype(cut, dtype).modules
        errors, error = _errors(exact.modules, rounded)
        _within(errors, max_error, dtype)
        full = completed(rounded, lambda name: _shape(name, known, told)) if complete else rounded
    except LoraTreeError as wrong:
        raise wrong.within(path) from wrong
    padded = {name: value.padded(kept // _groups(value)) for name, value in full.items()}
    config = {"task_type": flat.config.get("task_type")}
    made = Adapter(
        padded,
        base=flat.base or tree.base,
        config=config,
        nesting=flat.nesting,
        assumed=flat.assumed,
    )
    added = tuple(sorted(set(padded) - set(flat.modules)))
    left = tuple(missing(padded))
    return Portable(
        path, _with_targets(made, known), kept, MappingProxyType(errors), error, added, left
    )


def ceil_rank_of(rank: int) -> int:
    """The next rank that an engine allows.

    Raises:
        SpecError: there is none.

    >>> ceil_rank_of(17)
    32
    """
    found = next((allowed for allowed in ENGINE_RANKS if allowed >= rank), None)
    if found is None:
        raise SpecError(
            f"rank {rank} is over the largest that vLLM serves, {ENGINE_RANKS[-1]}",
            "cut it: rank=…",
        )
    return found


def _plain(flat: Adapter, terms: list[tuple[str, float, Adapter]], base: Base) -> None:
    """That the form can say it.

    Raises:
        FormatError: a module has a bias.
        SpecError: a factor is not finite.
        BaseMismatch: an adapter carries a tensor that is not the base's, or there is no base to
            tell.
    """
    for name, value in flat.modules.items():
        if not value.is_finite:
            raise SpecError(
                f"{name}: the factors are not finite: it has no norm, and no engine can use it"
            )
        if value.bias is not None:
            whose = [
                n for n, _, a in terms if name in a.modules and a.modules[name].bias is not None
            ]
            raise FormatError(
                f"{name}: it adds a bias (lora_bias), which vLLM refuses and an adapter of the "
                "portable "
                f"form can't hold; node {listing(whose)}",
                "write it for PEFT alone (--as peft, tree.flatten), or merged into a checkpoint "
                "(--as model)",
            )
    for name, tensor in flat.unchanged.items():
        base.check_unchanged(name, tensor)


def _shape(name: str, base: Base, stated: Shapes) -> tuple[int, int] | None:
    """Return the shape that the base has, or else the one that the caller stated.

    Raises:
        BaseMismatch: they say different things.
    """
    own, told = base.shape(name), stated(name)
    if own is not None and told is not None and own != told:
        raise BaseMismatch(
            f"{name}: the base has {own} there, and {told} was stated", "leave the stated shape out"
        )
    return own or told


def _groups(value: LowRank) -> int:
    """How many matrices share PEFT's r: the groups of a convolution."""
    return value.A.shape[0] if value.layout.kind == "conv" and value.A.ndim == 3 else 1


def _rank(
    modules: Mapping[str, LowRank], rank: int | None, max_error: float | None, *, ceil_rank: bool
) -> int:
    """The one rank to write, a multiple of every module's groups.

    Raises:
        SpecError: the bounds make no sense, or can't both be met; names the module.
    """
    step = math.lcm(*(_groups(value) for value in modules.values()))
    if rank is not None:
        check_rank(rank)
    if rank is not None and rank < step:
        raise SpecError(
            f"rank {rank} is less than the {step} groups of a convolution, which share it",
            "rank=… more",
        )
    needs = 1
    for name, value in modules.items():
        least = value.rank
        if max_error is not None:
            try:
                most = None if rank is None else rank // _groups(value)
                least = value.truncate(most, max_error=max_error).value.rank
            except SpecError as error:
                raise error.within(name) from error
        needs = max(needs, least * _groups(value))
    kept = needs if rank is None else min(rank, needs)
    kept = ceil_rank_of(kept) if ceil_rank else kept
    return math.ceil(kept / step) * step if rank is None or ceil_rank else kept // step * step


def _in_one_dtype(modules: Mapping[str, LowRank], dtype: torch.dtype | None) -> Adapter:
    """All in the dtype asked for, or else in one that every flat factor fits, at most fp32 where one was cut.

    Raises:
        SpecError: a factor is too large for it; names the module.
    """
    if dtype is None:
        dtype = (
            torch.bfloat16
            if all(value.dtype == torch.bfloat16 for value in modules.values())
            else None
        )
    if dtype is None:
        dtype = (
            torch.float16
            if all(value.dtype == torch.float16 for value in modules.values())
            else torch.float32
        )
    return Adapter(modules).to(dtype=dtype)


def _errors(
    exact: Mapping[str, LowRank], made: Mapping[str, LowRank]
) -> tuple[dict[str, float], float]:
    """(Module → relative error, the same over all of them), in float64."""
    errors: dict[str, float] = {}
    lost, whole = 0.0, 0.0
    for name, wanted in exact.items():
        got = made[name].to(dtype=torch.float64)
        norm = wanted.norm()
        lies = wanted.folded()
        same = (
            lies.A.shape == got.A.shape
            and torch.equal(lies.A, got.A)
            and torch.equal(lies.B, got.B)
        )
        off = 0.0 if same else concat([got.folded(), lies.scaled(-1.0)]).norm()
        errors[name] = off / norm if norm else (0.0 if off == 0.0 else math.inf)
        lost, whole = math.hypot(lost, off), math.hypot(whole, norm)
    return errors, lost / whole if whole else (0.0 if lost == 0.0 else math.inf)


def _within(
    errors: Mapping[str, float], max_error: float | None, dtype: torch.dtype | None
) -> None:
    """That no module is further off than was allowed, once its factors are rounded.

    Raises:
        SpecError: one is; names it.
    """
    for name, error in errors.items():
        if max_error is not None and error > max_error + ROUNDING:
            kind = str(dtype or torch.float32)[6:]
            raise SpecError(
                f"{name}: relative error {error:.3g} once the factors are rounded to {kind}, "
                f"max_error={max_error:g}",
                "keep a wider dtype, or allow more",
            )


def _with_targets(adapter: Adapter, base: Base) -> Adapter:
    """With ``target_modules`` as the last parts of names, where the base has no other module of these names."""
    last = {
        name.rpartition(".")[2]
        for name, value in adapter.modules.items()
        if value.layout.kind != "parameter"
    }
    there = base.last_names()
    if there is None or any(value.layout.kind == "parameter" for value in adapter.modules.values()):
        return adapter
    if any(there.get(name, set()) - set(adapter.modules) for name in last):
        return adapter
    return replace(adapter, config={**adapter.config, "target_modules": sorted(last)})
