"""Override: a node's own value of a tensor of the base, or of some rows of it; and the
rule that says which override counts.

    fr              score.weight = H₁          replaces the base's own score.weight under fr,
    fr/legal        ΔW on score                its increment adds to H₁,
    fr/legal/x      score.weight = H₂          replaces it there: H₁ and ΔW are dropped

PEFT writes an override for each tensor of a module in ``modules_to_save``, and one of rows for each
embedding in ``trainable_token_indices``.

Law: on a lineage the deepest override of a tensor counts, with its bits as saved. Increments of
nodes above it are dropped, those of its own node and of nodes below add to it. Rows are overridden
one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .errors import FormatError, LoraTreeWarning, ShapeMismatch, SpecError, listing, plural
from .given import unchecked
from .lowrank import EMBEDDING, LowRank

__all__ = [
    "Override",
    "OverrideWarning",
    "Standing",
    "check_none",
    "counted",
    "counted_modules",
    "standing",
    "tensor_owner",
    "warn_of_dropped",
]


class OverrideWarning(LoraTreeWarning):
    """An override drops increments, or an adapter carries a tensor that is not the base's own."""


@dataclass(frozen=True, eq=False)
class Override:
    """A node's own value of a tensor of the base.

    Args:
        values: the whole tensor in the base's shape; or (rows, …), the rows that are replaced.
        rows: the indices of the rows that ``values`` replace, in the same order; None: the whole
            tensor.

    Raises:
        SpecError: ``values`` is no tensor, or ``rows`` are no whole numbers from 0, or repeat one.
        ShapeMismatch: there are not as many rows as values.

    >>> tokens = Override(torch.ones(2, 4), rows=(7, 3))
    >>> tokens.applied(torch.zeros(8, 4))[:, 0].tolist()
    [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    """

    values: Tensor
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(unchecked(self.values), Tensor):
            raise SpecError(f"an override: expected a tensor, got {type(self.values).__name__}")
        if self.rows is None:
            return
        rows = self.rows
        are_integers = isinstance(unchecked(rows), tuple) and all(type(row) is int for row in rows)
        if not are_integers or any(row < 0 for row in rows):
            raise SpecError(f"an override's rows: expected whole numbers from 0, got {rows!r:.80}")
        if not rows or len(set(rows)) != len(rows):
            raise SpecError(f"an override's rows: expected each row once, got {rows!r:.80}")
        if self.values.shape[:1] != (len(rows),):
            raise ShapeMismatch(
                f"an override of {plural(len(rows), 'row')}, "
                f"and its values are {tuple(self.values.shape)}"
            )

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers."""
        return self.values.numel() * self.values.element_size()

    @property
    def trains(self) -> bool:
        """True if it requires gradients: a step of an optimiser will change it."""
        return self.values.requires_grad

    @property
    def is_trainable(self) -> bool:
        """True if it is a parameter: an optimiser may have changed it since it was read."""
        return isinstance(self.values, nn.Parameter)

    @property
    def is_finite(self) -> bool:
        """True if it is free of NaN and infinities."""
        return bool(self.values.isfinite().all())

    def with_values(self, values: Tensor) -> Override:
        """Return the override with another tensor of the same shape; itself for the same tensor."""
        return self if values is self.values else replace(self, values=values)

    def index(self, device: torch.device) -> Tensor:
        """Return its rows as (rows,) int64 on a device."""
        assert self.rows is not None, "a whole tensor has no rows of its own"
        return torch.tensor(self.rows, dtype=torch.int64, device=device)

    def applied(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` with the override applied, in the tensor's dtype and on its device."""
        values = self.values.to(device=tensor.device, dtype=tensor.dtype)
        if self.rows is None:
            return values
        return tensor.index_copy(0, self.index(tensor.device), values)

    def over(self, above: Override) -> Override:
        """Return one override in place of two: this one's rows, elsewhere those of ``above``.

        >>> fr, legal = Override(torch.zeros(2, 1), rows=(3, 5)), Override(torch.ones(1, 1), (5,))
        >>> legal.over(fr).rows, legal.over(fr).values.flatten().tolist()
        ((3, 5), [0.0, 1.0])
        """
        if self.rows is None:
            return self
        if above.rows is None:
            return Override(self.applied(above.values))
        taken = set(self.rows)
        kept = [i for i, row in enumerate(above.rows) if row not in taken]
        values_above = above.values[kept].to(device=self.values.device)
        rows = (*[above.rows[i] for i in kept], *self.rows)
        return Override(torch.cat([values_above, self.values]), rows)

    def write(self, target: Tensor) -> None:
        """Write the override into a tensor, rounded to the tensor's dtype."""
        if self.rows is None:
            target.copy_(self.values, non_blocking=True)
            return
        values = self.values.to(device=target.device, dtype=target.dtype)
        target.index_copy_(0, self.index(target.device), values)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.values.shape))
        dtype = str(self.values.dtype).removeprefix("torch.")
        rows = "" if self.rows is None else f", {plural(len(self.rows), 'row')}"
        return f"Override({shape}{rows}, {dtype})"


Standing: TypeAlias = Mapping[str, tuple[tuple[str, Override], ...]]
"""Tensor → the (node, override) pairs that count for it, in the order in which they are applied:
an override of the whole tensor first, then overrides of rows."""


def check_none(overrides: Iterable[str], form: str) -> None:
    """Refuse overrides in a format that holds increments alone.

    Args:
        overrides: the tensors that are replaced.
        form: the format, for the error.

    Raises:
        FormatError: there are some; names them.
    """
    names = listing(overrides, most=3)
    if names:
        raise FormatError(
            f"{names}: replaced by the adapter, and {form} holds increments alone",
            "write it for PEFT (--as peft, adapter.save(folder)), or merged into a checkpoint "
            "(--as model)",
        )


def standing(
    lineages: Iterable[Sequence[str]], held: Mapping[str, Mapping[str, Override]]
) -> Standing:
    """Return the overrides that count for a path, or for all paths of a blend.

    Args:
        lineages: for each path, its nodes from the root down.
        held: node → tensor → its override.

    Raises:
        SpecError: two paths of a blend have different ones; names the tensor and the nodes.

    >>> head, other = Override(torch.ones(2, 4)), Override(torch.zeros(2, 4))
    >>> held = {"fr": {"score.weight": head}, "fr/legal": {"score.weight": other}}
    >>> [node for node, _ in standing([["fr", "fr/legal"]], held)["score.weight"]]
    ['fr/legal']
    """
    common: Standing | None = None
    for lineage in lineages:
        on_path = _on_lineage(lineage, held)
        if common is None:
            common = on_path
        for tensor in sorted({*common, *on_path}):
            one, other = common.get(tensor, ()), on_path.get(tensor, ())
            # Comparing nodes is enough: a node has one override of a tensor.
            if [node for node, _ in one] != [node for node, _ in other]:
                raise SpecError(
                    f"{tensor}: {_owners_text(one)} for one path of the blend and "
                    f"{_owners_text(other)} for another, and replacements can't be blended",
                    "activate or export one path at a time; or route each row by its own path",
                )
    return common or {}


def _on_lineage(
    lineage: Sequence[str], held: Mapping[str, Mapping[str, Override]]
) -> dict[str, tuple[tuple[str, Override], ...]]:
    found: dict[str, tuple[tuple[str, Override], ...]] = {}
    for node in lineage:
        for tensor, override in held.get(node, {}).items():
            # An override of the whole tensor replaces every override above it.
            above = () if override.rows is None else found.get(tensor, ())
            found[tensor] = (*above, (node, override))
    return found


def _owners_text(stack: Sequence[tuple[str, Override]]) -> str:
    nodes = listing([node for node, _ in stack])
    return f"replaced by {nodes}" if nodes else "the base's own"


def tensor_owner(tensor: str) -> tuple[str, str]:
    """Split the name of a tensor into its module and its name in the module.

    >>> tensor_owner("model.norm.weight")
    ('model.norm', 'weight')
    """
    module, _, leaf = tensor.rpartition(".")
    return module, leaf


def counted_modules(
    node: str, modules: Mapping[str, LowRank], effective: Standing
) -> tuple[dict[str, LowRank], list[str]]:
    """Return the increments of a node that count, and a line for each that is dropped or cut.

    Args:
        node: the node that has the increments.
        modules: its increments.
        effective: as `standing` returned it.
    """
    kept: dict[str, LowRank] = {}
    lines: list[str] = []
    for module, value in modules.items():
        own = counted(node, module, value, effective)
        if own is not None:
            kept[module] = own
        if own is not value:
            lines.append(f"{node}: {module}: {_overridden_by(node, module, effective)}")
    return kept, lines


def warn_of_dropped(lines: Sequence[str], *, stacklevel: int) -> None:
    """Say in one warning which increments an override below them drops; nothing if there are none.

    Args:
        lines: as `counted_modules` returned them.
        stacklevel: as for `warnings.warn`, seen from the caller.
    """
    if lines:
        what = f"increments under an override do not count: {listing(lines, most=3)}"
        warnings.warn(OverrideWarning(what), stacklevel=stacklevel + 1)


def _overridden_by(node: str, module: str, effective: Standing) -> str:
    owners: dict[str, None] = {}
    for tensor, stack in effective.items():
        if module in (tensor, tensor_owner(tensor)[0]):
            for owner, _ in stack:
                if owner.startswith(f"{node}/"):
                    owners[f"{owner} overrides {tensor}"] = None
    return listing(owners)


def counted(node: str, module: str, value: LowRank, effective: Standing) -> LowRank | None:
    """Return the part of a node's increment that counts under the overrides of a path.

    An increment of a node above an override is dropped. Above overridden rows it loses these rows;
    above the override of a bias alone it loses its bias.

    Args:
        node: the node that has the increment.
        module: the module, or the raw parameter, that it changes.
        value: the increment.
        effective: as `standing` returned it.

    Returns:
        the value itself if nothing is dropped; None if nothing is left.

    >>> value = LowRank(torch.ones(1, 4), torch.ones(2, 1))
    >>> stands = {"score.weight": (("fr/legal", Override(torch.ones(2, 4))),)}
    >>> counted("fr", "score", value, stands), counted("fr/legal", "score", value, stands) is value
    (None, True)
    """
    for tensor, stack in effective.items():
        owner_module, leaf = tensor_owner(tensor)
        if module not in (tensor, owner_module):
            continue
        for owner, override in stack:
            if not owner.startswith(f"{node}/"):
                continue  # the increment is the owner's own, or of a node below it: it adds
            if leaf.endswith("bias"):
                value = replace(value, bias=None)
            elif override.rows is None:
                return None
            else:
                value = _without_rows(value, override)
    return value


def _without_rows(value: LowRank, override: Override) -> LowRank:
    """Return an increment with zeros in the overridden rows of the stored weight."""
    # Rows of an embedding's weight are columns of its A; rows of a Linear's are rows of its B.
    if value.layout == EMBEDDING:
        A = value.A.index_fill(1, override.index(value.device), 0.0)
        return replace(value, A=A)
    B = value.B.index_fill(-2, override.index(value.device), 0.0)
    return replace(value, B=B)
