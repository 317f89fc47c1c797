"""A side path: the sum added to a module's output while its weights stay the base's own.

    y = base(x) + B (A x)

It computes in the widest of the factors' and the weight's own dtype, or in the one asked for; in
fp32 on a CPU that has no fast product for a narrower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import StateError
from ...lowrank import LowRank, stacked
from ...sites import Site
from .. import arithmetic
from ..plan import Plan, Terms
from ..rows.row_layout import RowLayout
from ..slab import Slab
from .ground import Ground
from .shares import Share

__all__ = [
    "Draft",
    "GroundedSide",
    "Manner",
    "PathForm",
    "PathSide",
    "Side",
    "SideKind",
    "Sides",
    "product_dtype",
    "raise_for_copy",
    "recorded",
    "side_device",
    "side_dtype",
    "side_kinds",
    "widened",
]


@dataclass
class Manner:
    """The settings of side paths; one object for a model, read in every forward.

    Args:
        dtype: the dtype to compute in; None: the widest of the factors' and the weight's own.
        dropout: the part of a site's input that is dropped for nodes that train, while the site's
            module is in training mode.
    """

    dtype: torch.dtype | None = None
    dropout: float = 0.0

    def dropped(self, x: Tensor, site: Site) -> Tensor:
        """Return the input for nodes that train: ``x`` after one dropout for all of them; ``x``
        itself in evaluation.
        """
        if not (self.dropout and site.module.training and x.is_floating_point()):
            return x
        return F.dropout(x, self.dropout, training=True)


class Side(Protocol):
    """One site's side path, which the site's hook runs."""

    def __call__(self, out: Tensor, x: Tensor, spare: bool, layout: RowLayout | None) -> Tensor:
        """Return ``out`` plus the site's part of the active path or batch.

        Args:
            out: the module's output.
            x: its input.
            spare: nothing else holds ``out``, it may be written over.
            layout: where the rows of a batch are in ``x``, if a forward around it was watched.
        """
        ...

    def shares(self, device: torch.device, layout: RowLayout | None) -> list[Share]:
        """Return the same sum as shares, for a weight that its module reads itself.

        Args:
            device: where it is computed.
            layout: where the rows of a batch are in the tensor that the weight is multiplied with;
                None: that is not known.

        Raises:
            BaseMismatch: it is not known, and the rows differ here.
        """
        ...


SideKind: TypeAlias = tuple[torch.dtype, torch.device]
"""The dtype and the device that a site's side path computes in."""


class Sides(dict[str, Side]):
    """Site → its side path. A class of its own, because a plain dict takes no weak reference.

    Attributes:
        nbytes: the bytes that were laid out for it.
        tables: the tables through which it reads factors; None: it has none.
    """

    nbytes: int = 0
    tables: object = None


class Draft:
    """One path's or blend's side path at one site, before anything is laid out for it.

    Args:
        site: the site.
        terms: in the order of the sum.
        kind: the dtype and the device to compute in.
        trains: whether any term of the plan trains; if not, the terms are not looked at.
    """

    def __init__(self, site: Site, terms: Terms, kind: SideKind, *, trains: bool) -> None:
        self.site = site
        self.dtype, self.device = kind
        self.frozen: list[LowRank] = []
        self.live: list[LowRank] = []
        for term in terms:
            value = term.value if term.coefficient == 1.0 else term.scaled
            (self.live if trains and term.trains else self.frozen).append(value)
        self.form: PathForm | None = None
        """The form that reads the frozen factors where they lie; None: there is none."""
        self.stacks = len(self.frozen) > 1
        """True: the frozen factors are copied side by side."""
        if len(self.frozen) == 1:
            # One node's factors are a stack already, if they are what the site computes with.
            for tensor in self.frozen[0].tensors:
                if tensor.dtype != self.dtype or tensor.device != self.device:
                    self.stacks = True
        up = down = biases = 0
        for value in self.frozen:
            down += value.A.numel()
            up += value.B.numel()
            biases += 0 if value.bias is None else value.bias.numel()
        itemsize = self.dtype.itemsize
        self.nbytes = (down + up + biases) * itemsize
        """Bytes that a stack takes: a copy of the frozen factors."""
        self.down_bytes, self.up_bytes = down * itemsize, up * itemsize
        """Bytes of the A's, and of the B's, side by side."""

    def reads_by(self, form: PathForm) -> None:
        """Let a form read the frozen factors where they lie."""
        self.form, self.stacks = form, False

    def cut_from(self, slab: Slab) -> tuple[Tensor, Tensor]:
        """Return memory for the A's and for the B's: (\\*batch, Σr, in) and (\\*batch, out, Σr)."""
        A, B = self.frozen[0].A, self.frozen[0].B
        rank = sum([value.A.shape[-2] for value in self.frozen])
        down = slab.cut(self.dtype, (*A.shape[:-2], rank, A.shape[-1]))
        return down, slab.cut(self.dtype, (*B.shape[:-1], rank))


class PathForm(Protocol):
    """The sum of a path's frozen terms at one site, from factors that are not stacked."""

    def added(self, out: Tensor, x: Tensor, *, spare: bool) -> Tensor | None:
        """Return ``out`` plus the sum; None if the form can't take such tensors.

        Args:
            out: the module's output.
            x: its input.
            spare: ``out`` may be written over.
        """
        ...


class PathSide:
    """One path or blend for every input: a whole frozen lineage as one product, then every trained
    node.

    Args:
        draft: the side path to lay out.
        manner: the dtype to compute in, and the dropout of what trains.
        slab: where the frozen factors are laid out; None: in memory of their own.
    """

    def __init__(self, draft: Draft, manner: Manner, slab: Slab | None = None) -> None:
        self._site, self._manner = draft.site, manner
        self._form = draft.form
        self._pieces: list[LowRank] = []
        if not draft.stacks:
            self._pieces += draft.frozen
        else:
            into = None if slab is None else draft.cut_from(slab)
            frozen = stacked(draft.frozen, dtype=draft.dtype, device=draft.device, into=into)
            self._pieces.append(frozen)
        # Factors that train are not stacked: a parent's stack would have to be made again at every
        # step.
        self._frozen = len(self._pieces)
        self._pieces += draft.live

    def shares(self, device: torch.device, layout: RowLayout | None) -> list[Share]:
        """Return the pieces, frozen ones first. They are the same for all rows."""
        shares = []
        for i in range(len(self._pieces)):
            shares.append(Share(self._piece(i, device), live=i >= self._frozen))
        return shares

    def _piece(self, i: int, device: torch.device) -> LowRank:
        """Return a piece on a device: the base may have been moved after the switch."""
        piece = self._pieces[i]
        if piece.A.device != device:
            piece = piece.to(device=device)
            if not piece.A.requires_grad:
                self._pieces[i] = piece
        return piece

    def __call__(
        self, out: Tensor, x: Tensor, spare: bool, layout: RowLayout | None = None
    ) -> Tensor:
        first = 0
        if self._form is not None:
            after = self._form.added(out, x, spare=spare)
            if after is not None:
                out, spare, first = after, True, self._frozen
        for i in range(first, len(self._pieces)):
            piece = self._piece(i, out.device)
            if i == self._frozen:
                # Once for all nodes that train, so that they see one mask.
                x = self._manner.dropped(x, self._site)
            out = self._added(out, x, piece, spare)
            spare = True  # `out` is now a tensor that this call has made
        return out

    def _added(self, out: Tensor, x: Tensor, piece: LowRank, spare: bool) -> Tensor:
        """Return ``out`` plus one piece's part, computed in the piece's dtype or a wider one, in
        out's dtype.
        """
        site, dtype = self._site, out.dtype
        A, B = piece.A, piece.B
        if x.is_floating_point():  # ids are looked up, not multiplied
            wide = A.dtype
            if x.dtype != wide:
                wide = torch.promote_types(wide, x.dtype)
            wide = product_dtype(wide, x.device)
            # Dtypes are compared first: `to` costs a call into torch even if it returns the tensor
            # itself.
            x = x if x.dtype == wide else x.to(wide)
            A = A if A.dtype == wide else A.to(wide)
            B = B if B.dtype == wide else B.to(wide)
        is_recorded = recorded(out, x, A, B)
        low = site.down(x, A)
        if low.dtype != out.dtype:  # autocast may have made it narrower than its factors
            wide = torch.promote_types(out.dtype, low.dtype)
            if out.dtype != wide:
                out, spare = out.to(wide), True
        out = site.onto(out, low, B, scale=piece.scale, spare=spare and not is_recorded)
        if piece.bias is not None:
            out = out + site.along_channels(piece.bias.to(out.dtype), out.ndim) * piece.scale
        return out if out.dtype == dtype else out.to(dtype)


class GroundedSide:
    """A side path of a site whose module's tensors are overridden.

    Args:
        ground: the overrides of the module's own tensors.
        inner: the side path of the increments, which are added to the ground's output.
    """

    def __init__(self, ground: Ground, inner: Side) -> None:
        self._ground, self._inner = ground, inner

    def __call__(self, out: Tensor, x: Tensor, spare: bool, layout: RowLayout | None) -> Tensor:
        # Not spare: some modules return their input, or a view of it.
        return self._inner(self._ground.applied(out, x), x, False, layout)

    def shares(self, device: torch.device, layout: RowLayout | None) -> list[Share]:
        """Return nothing: `check_grounds` refuses increments of a weight that a module reads
        itself while it is overridden.
        """
        return []


def raise_for_copy(module: nn.Module, name: str) -> None:
    """Refuse to run a hook on another module than its own: in a copy of the base, which has the
    hooks but no owner.

    Raises:
        StateError: it is a copy, and not a replica that `nn.DataParallel` made for one forward;
            names the module.
    """
    if getattr(module, "_is_replica", False):
        return
    raise StateError(
        f"{name}: this is a copy of a base that had a path beside its weights; side paths are "
        "not copied",
        "copy the base while it is bare: model.deactivate(), or model.detach(), first",
    )


def side_kinds(plan: Plan, requested_dtype: torch.dtype | None) -> dict[str, SideKind]:
    """Return site → the dtype and the device that its side path computes in.

    Args:
        plan: its sites and terms.
        requested_dtype: the caller's; None: the widest of the factors' and the weight's own.

    Raises:
        MergedOnly: a site does not run when its module is called; says which and why.
    """
    weights = []
    for name, terms in plan.terms.items():
        site = plan.sites[name]
        if terms:
            site.check_mode(terms[0].value, merged=False, node=terms[0].node)
        weights.append(site.weight)
    kinds = {}
    for weight, (name, terms) in zip(weights, plan.terms.items(), strict=True):
        values = [term.value for term in terms]
        kinds[name] = side_dtype(weight, values, requested_dtype), side_device(weight, values)
    return kinds


def side_dtype(
    weight: Tensor | None, values: Sequence[LowRank], requested_dtype: torch.dtype | None
) -> torch.dtype:
    """Return the dtype that a site's side path computes in: the requested one, or the widest of the
    factors' and the weight's own.

    Args:
        weight: the site's; its dtype does not count if it is quantised.
        values: the increments at the site.
        requested_dtype: the caller's; None: the widest.
    """
    if requested_dtype is not None:
        return requested_dtype
    if not values:  # an override alone, which is in the weight's own dtype
        return torch.float32 if weight is None else weight.dtype
    dtype = values[0].A.dtype
    for value in values:
        for factor in (value.A, value.B):
            if factor.dtype != dtype:
                dtype = torch.promote_types(dtype, factor.dtype)
    if weight is None or not weight.is_floating_point() or weight.element_size() == 1:
        return dtype
    return dtype if weight.dtype == dtype else torch.promote_types(dtype, weight.dtype)


def side_device(weight: Tensor | None, values: Sequence[LowRank]) -> torch.device:
    """Return where a site's side path computes: where its weight is; without one, where its values
    are.
    """
    if weight is not None:
        return weight.device
    return values[0].A.device if values else torch.device("cpu")


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to multiply in: ``dtype``, or fp32 on a CPU that is faster with it."""
    if device.type == "cpu" and dtype in arithmetic.SLOW_ON_CPU:
        return torch.float32
    return dtype


def recorded(*tensors: Tensor) -> bool:
    """Return whether autograd records an operation on these tensors.

    If so, no tensor that it has saved, or will save, may be written over.
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def widened(out: Tensor, x: Tensor, dtype: torch.dtype, spare: bool) -> tuple[Tensor, Tensor, bool]:
    """Return ``out`` and ``x`` in dtypes that hold a sum in ``dtype``; and whether ``out`` may be
    written over.
    """
    if x.is_floating_point():
        x = x.to(product_dtype(torch.promote_types(dtype, x.dtype), x.device))
        dtype = x.dtype
    # Under autocast the module's own output is narrow on purpose, and later modules expect that.
    wide = out.dtype
    if not torch.is_autocast_enabled(out.device.type):
        wide = torch.promote_types(out.dtype, dtype)
    return (out, x, spare) if wide == out.dtype else (out.to(wide), x, True)
