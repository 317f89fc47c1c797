"""A side path: what is added to the output of a site's own module while the weights stay the base's own.

y = base(x) + B (A x)        in the widest of the factors' and the weight's own dtype, or in the one asked for;
                             in fp32 on a CPU that has no fast product for a narrower one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StateError
from ..lowrank import LowRank, stacked
from ..sites import Site
from ..sites.site import in_dtype, wider_of
from .arithmetic import product_dtype
from .plan import Terms
from .slab import Slab

__all__ = [
    "Draft",
    "Manner",
    "PathSide",
    "Side",
    "Sides",
    "check_own",
    "side_device",
    "side_dtype",
    "widened",
]


@dataclass
class Manner:
    """How side paths compute; one object for a model, looked at in every forward.

    Args:
        dtype: what they compute in; None: the widest of the factors' and the weight's own.
        dropout: the part of a site's input that nodes in training do not see, while the site's module trains.
    """

    dtype: torch.dtype | None = None
    dropout: float = 0.0

    def dropped(self, x: Tensor, site: Site) -> Tensor:
        """What nodes in training are given of ``x``: one mask for all of them, as it is where nothing trains."""
        if not (self.dropout and site.module.training and x.is_floating_point()):
            return x
        return F.dropout(x, self.dropout, training=True)


class Side(Protocol):
    """What a site's hook runs."""

    def __call__(self, out: Tensor, x: Tensor, spare: bool) -> Tensor:
        """``out`` plus the site's part of what is active.

        Args:
            out: the module's output.
            x: its input.
            spare: nobody else holds ``out``, it may be written over.
        """
        ...


class Sides(dict[str, Side]):
    """Site → its side path, for everything that is active; one object, that can be known to be alive."""


class Draft:
    """One path's or blend's side path at one site, before anything is laid out for it.

    Args:
        site: where.
        terms: in the order of the sum.
        asked: what to compute in; None: the widest of the factors' and the weight's own.
    """

    def __init__(self, site: Site, terms: Terms, asked: torch.dtype | None) -> None:
        self.frozen: list[LowRank] = []
        self.live: list[LowRank] = []
        for term in terms:
            (self.live if term.trains else self.frozen).append(term.value.scaled(term.coefficient))
        self.site = site
        self.dtype = side_dtype(site, [term.value for term in terms], asked)
        self.device = side_device(site, terms[0].value)
        self.nbytes = sum(value.numel for value in self.frozen) * self.dtype.itemsize
        """What laying it out takes: a copy of what does not train."""

    @property
    def slab_bytes(self) -> int:
        """As much of a slab: A's and B's, both from an aligned beginning."""
        numbers = sum(v.A.numel() for v in self.frozen), sum(v.B.numel() for v in self.frozen)
        return sum(Slab.takes(n * self.dtype.itemsize) for n in numbers)


class PathSide:
    """One path or blend for all that comes: a whole frozen lineage as one product, then every trained node.

    Args:
        draft: of what.
        manner: what is computed in, and the dropout of what trains.
        slab: where what does not train is laid out; None: in ordinary memory.
    """

    def __init__(self, draft: Draft, manner: Manner, slab: Slab | None = None) -> None:
        self._site, self._manner = draft.site, manner
        into = None if slab is None else partial(slab.cut, draft.dtype)
        frozen = (
            [stacked(draft.frozen, dtype=draft.dtype, device=draft.device, into=into)]
            if draft.frozen
            else []
        )
        self._pieces = [*frozen, *draft.live]
        self._frozen = len(frozen)

    def __call__(self, out: Tensor, x: Tensor, spare: bool) -> Tensor:
        for i, piece in enumerate(self._pieces):
            if i == self._frozen:
                x = self._manner.dropped(x, self._site)
            if piece.A.device != out.device:  # the base was moved after the switch
                piece = piece.to(device=out.device)
                if not piece.A.requires_grad:
                    self._pieces[i] = piece
            out = self._added(out, x, piece, spare)
            spare = True  # what this added to is ours
        return out

    def _added(self, out: Tensor, x: Tensor, piece: LowRank, spare: bool) -> Tensor:
        """``out`` plus what one piece makes of ``x``, in the piece's dtype or a wider one, in out's dtype."""
        site, dtype = self._site, out.dtype
        if x.is_floating_point():
            x = in_dtype(x, product_dtype(wider_of(piece.A.dtype, x.dtype), x.device))
            A, B = in_dtype(piece.A, x.dtype), in_dtype(piece.B, x.dtype)
        else:
            A, B = piece.A, piece.B
        out = site.onto(out, site.down(x, A), B, scale=piece.scale, spare=spare)
        if piece.bias is not None:
            out = out + site.along_channels(piece.bias.to(out.dtype), out.ndim) * piece.scale
        return in_dtype(out, dtype)


def check_own(module: nn.Module, site: Site) -> None:
    """That a hook runs where it was put, and not in a copy of the base, which has the hooks but is no one's.

    Raises:
        StateError: it is a copy; names the site.
    """
    if module is not site.module and not getattr(module, "_is_replica", False):
        raise StateError(
            f"{site.name}: this is a copy of a base that had a path beside its weights; side paths are not copied",
            "copy the base while it is bare: model.deactivate(), or model.detach(), first",
        )


def side_dtype(site: Site, values: Sequence[LowRank], asked: torch.dtype | None) -> torch.dtype:
    """What a site's side path computes in: as asked, or the widest of the factors' and the weight's own."""
    if asked is not None:
        return asked
    weight = site.weight
    held = [value.dtype for value in values]
    if weight is not None and weight.is_floating_point() and weight.element_size() > 1:
        held.append(weight.dtype)
    dtype = held[0]
    for other in held[1:]:
        dtype = dtype if other == dtype else torch.promote_types(dtype, other)
    return dtype


def side_device(site: Site, value: LowRank) -> torch.device:
    """Where a site's side path computes: where its weight is; without one, where ``value``, its increment, is."""
    return site.weight.device if site.weight is not None else value.device


def widened(out: Tensor, x: Tensor, dtype: torch.dtype, spare: bool) -> tuple[Tensor, Tensor, bool]:
    """``out`` and ``x`` in dtypes that hold a sum computed in ``dtype``; and whether ``out`` may be written over."""
    if x.is_floating_point():
        x = x.to(product_dtype(torch.promote_types(dtype, x.dtype), x.device))
        dtype = x.dtype
    wide = (
        out.dtype
        if torch.is_autocast_enabled(out.device.type)
        else torch.promote_types(out.dtype, dtype)
    )
    return (out, x, spare) if wide == out.dtype else (out.to(wide), x, True)
