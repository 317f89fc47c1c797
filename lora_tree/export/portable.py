"""The portable adapter: a lineage as one adapter, in a form that all engines read in the same way.

    uniform rank        short modules are padded with zeros
    lora_alpha = r      every scale is folded into B, so the file's own scale is 1
    nothing else        no rank or alpha patterns, no rslora, no biases, no tensors of the base
    on demand           q, k and v together, gate and up together: zero factors for those that no
                        node changes

Why: vLLM before 0.32 ignores the patterns without a word; SGLang (0.5) always divides lora_alpha by
r and wants one r; llama.cpp (2025) takes alpha over the rank of each B; vLLM refuses biases and
whole modules.

Law: the form of a path depends on its lineage and on the caller's arguments, never on other nodes
of the tree; and its error is measured.

`portable_rank.py` finds the one rank, `form_errors.py` measures what the form costs, and
`siblings.py` completes q, k, v and gate, up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import nn

from ..adapter import Adapter
from ..blend import Blend, spelled
from ..errors import BaseMismatch, FormatError, LoraTreeError, SpecError, listing
from ..given import unchecked
from ..lowrank import LowRank
from ..override import check_none
from ..tree import AdapterTree
from .form_errors import FormErrors, exact_sum
from .portable_rank import groups_of, rank_to_write
from .siblings import Shapes, add_missing, missing, shape_lookup
from .unloaded_base import Base

__all__ = ["Portable", "portable"]


@dataclass(frozen=True, eq=False)
class Portable:
    """A path or a blend in the portable form, and its error.

    Args:
        path: the path or blend in its canonical spelling.
        adapter: the adapter to save.
        rank: the one rank of all its modules, as PEFT counts it.
        errors: module → ‖ΔW − ΔW'‖ / ‖ΔW‖; 0.0 if nothing was cut or rounded.
        error: the same over all modules together.
        added: modules with zero factors, which were added to complete a group.
        incomplete: modules that are missing in a group (q, k, v or gate, up) and were not added.
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
    """Make one adapter of a path or a blend, in the form that PEFT and all engines read alike.

    Args:
        rank: the largest rank to keep. Without it and ``max_error`` the sum is exact, at the
            largest Σr of any module.
        max_error: the largest error allowed in any module; the smallest rank within it is taken.
        ceil_rank: round the rank up to the next of `ENGINE_RANKS`: an engine reserves that much
            anyway, and less is cut.
        dtype: round the factors to it. None: bf16 or fp16 if all factors are in it, else fp32.
        base: the model, its folder or its hub id, for the names of its modules and for the shapes
            of modules that no node changes; None: the tree's base, if that is a folder.
        complete: if some of q, k, v (or gate, up) have factors, give the others zero factors. Most
            engines do this themselves, but SGLang can't load q without v.
        shapes: (out, in) of modules that no node changes, by name or by the end of it, for
            ``complete`` without a base.

    Raises:
        PathError, ShapeMismatch, BaseMismatch: as `AdapterTree.flatten`.
        SpecError: the bounds can't be met; names the module. Or a shape is not valid.
        FormatError: the form can't hold a module's increment (it has a bias), or its group can't be
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
            "shapes= says how wide the modules are that complete=True adds, and complete is False",
            "complete=True, --complete",
        )
    if shapes is not None and not isinstance(unchecked(shapes), Mapping):
        raise SpecError(f"shapes: expected module → (out, in), got {shapes!r:.80}")
    shape_of = shape_lookup(shapes or {})
    # The base that a tree names may be a stranger's choice, so it is never fetched from the hub.
    known = Base(tree.base if base is None else base, named_by_caller=base is not None)
    names: list[str] = []
    for _, _, adapter in tree.terms(blend):
        names += adapter.modules
    # `flat` and `terms` get the base's own names, because they are compared by name below.
    renamer = known.renamer(names)
    flat = tree.flatten(blend, base=renamer)
    terms = tree.terms(blend, base=renamer)
    if not flat.modules and not flat.overrides:
        raise FormatError(
            f"{path or 'the bare base'}: there is nothing to export: no node on the path has an "
            "adapter",
            "name a path with an adapter on it: lora-tree show FOLDER lists them",
        )
    try:
        _check_expressible(flat, terms, known)
        # Not computed from `flat`, whose factors may be bf16 and whose scales are already rounded.
        exact = exact_sum(terms)
        rank_written = rank_to_write(exact, rank, max_error, ceil_rank=ceil_rank)
        cut = {
            name: _of_rank(value, exact[name], rank_written // groups_of(value))
            for name, value in flat.modules.items()
        }
        rounded = _in_one_dtype(cut, dtype)
        # Measured after the rounding, to include it, and before the completion, which adds zeros.
        errors = FormErrors.between(exact, rounded)
        errors.check_within(max_error, dtype)
        full = rounded
        if complete:
            full = add_missing(rounded, lambda name: _shape(name, known, shape_of))
    except LoraTreeError as wrong:
        # an export of all leaves has many paths: say which one failed
        raise wrong.within(path) from wrong
    # Zero factors of the completion have rank 1 and are padded like the others.
    padded = {name: value.padded(rank_written // groups_of(value)) for name, value in full.items()}
    made = Adapter(
        padded,
        base=flat.base or tree.base,
        # No other field: engines ignore or refuse them.
        config={"task_type": flat.config.get("task_type")},
        nesting=flat.nesting,
        assumed=flat.assumed,
    )
    return Portable(
        path,
        _with_short_targets(made, known),
        rank_written,
        MappingProxyType(errors.by_module),
        errors.overall,
        added=tuple(sorted(set(padded) - set(flat.modules))),
        incomplete=tuple(missing(padded)),
    )


def _of_rank(flat: LowRank, exact: LowRank, rank: int) -> LowRank:
    """Return a module's value with at most this rank, and its scale in B."""
    if flat.rank > rank:
        return exact.truncate(rank).value
    # Nothing is cut, so the file gets the flattened factors in their own dtype.
    return flat.folded()


def _check_expressible(flat: Adapter, terms: list[tuple[str, float, Adapter]], base: Base) -> None:
    """Check that the portable form can hold every module.

    Raises:
        FormatError: a module has a bias, or a tensor of the base is replaced.
        SpecError: a factor is not finite.
        BaseMismatch: an adapter carries a tensor that is not the base's, or there is no base to
            compare it with.
    """
    for name, value in flat.modules.items():
        if not value.is_finite:
            raise SpecError(
                f"{name}: the factors are not finite, so they have no norm, "
                "and no engine can use them",
                "train it again: an infinity or a NaN in the factors is a diverged training",
            )
        if value.bias is not None:
            whose: list[str] = []
            for node, _, adapter in terms:
                if name in adapter.modules and adapter.modules[name].bias is not None:
                    whose.append(node)
            raise FormatError(
                f"{name}: it adds a bias (lora_bias), which vLLM refuses and an adapter of the "
                f"portable form can't hold; node {listing(whose)}",
                "write it for PEFT alone (--as peft, tree.flatten), or merged into a checkpoint "
                "(--as model)",
            )
    for name, tensor in flat.unchanged.items():
        base.check_unchanged(name, tensor)
    for node, _, adapter in terms:
        try:
            check_none(adapter.overrides, "the portable form")
        except LoraTreeError as error:
            raise error.within(node) from error


def _shape(name: str, base: Base, stated: Shapes) -> tuple[int, int] | None:
    """Return the shape that the base has, or else the one that the caller stated.

    Raises:
        BaseMismatch: the two differ.
    """
    base_shape, stated_shape = base.shape(name), stated(name)
    if base_shape is not None and stated_shape is not None and base_shape != stated_shape:
        raise BaseMismatch(
            f"{name}: the base has {base_shape} there, and {stated_shape} was stated",
            "leave the stated shape out",
        )
    return base_shape or stated_shape


def _in_one_dtype(
    modules: Mapping[str, LowRank], dtype: torch.dtype | None
) -> Mapping[str, LowRank]:
    """Return all modules in ``dtype``; None: bf16 or fp16 if all factors are in it, else fp32.

    Truncated factors are float64, so any truncation leads to fp32.

    Raises:
        SpecError: a factor is too large for it; names the module.
    """
    if dtype is None:
        dtypes = {value.dtype for value in modules.values()}
        dtype = torch.float32
        if dtypes == {torch.bfloat16} or dtypes == {torch.float16}:
            dtype = dtypes.pop()
    return Adapter(modules).to(dtype=dtype).modules


def _with_short_targets(adapter: Adapter, base: Base) -> Adapter:
    """Return the adapter with short names as ``target_modules``, if they are unambiguous.

    A short name is the last part of a full one, and is unambiguous if no other module of the base
    ends in it. PEFT would accept full names too, but its own files have the short ones, and engines
    expect these.
    """
    last: set[str] = set()
    for name, value in adapter.modules.items():
        if value.layout.kind == "parameter":
            return adapter  # PEFT names raw parameters elsewhere
        last.add(name.rpartition(".")[2])
    modules_by_last = base.last_names()
    if modules_by_last is None:
        return adapter
    for name in last:
        if modules_by_last.get(name, set()) - set(adapter.modules):
            return adapter
    return replace(adapter, config={**adapter.config, "target_modules": sorted(last)})
