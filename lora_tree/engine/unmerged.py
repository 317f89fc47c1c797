"""Unmerged: the base untouched, and one side path per site, however deep the path.

    y = base(x) + B (A x)        A = the lineage's factors stacked, B = theirs side by side with the scales folded in

Stacks are made once for a path and kept for the last paths used; factors that train go through as they are, after the
frozen ones, so that autograd sees them. A side path is a forward hook on the site's own module, there while a path is
active and gone after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from ..errors import BaseMismatch
from ..lowrank import LowRank, stacked
from ..sites import Site
from .arithmetic import exact_mode
from .plan import Plan, Terms
from .watch import Watch

__all__ = ["Unmerged"]

KEPT_PATHS = 64


Stack = list[LowRank]
"""What runs as one product each: a whole frozen lineage with scale 1, and every trained node with its own."""


class Unmerged:
    """The side paths of a base.

    Args:
        base: the model.
        dtype: what side paths compute in; None: the widest of the factors' and the weight's own.
    """

    def __init__(self, base: nn.Module, *, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._hooked: dict[str, tuple[Site, RemovableHandle]] = {}
        self._current: dict[str, Stack] = {}
        self._kept: OrderedDict[Hashable, dict[str, Stack]] = OrderedDict()
        self._watch = Watch(base)

    def check(self, plan: Plan) -> None:
        """That every site of the plan runs when its module is called.

        Raises:
            MergedOnly: one does not; says which and why.
        """
        for name, terms in plan.terms.items():
            plan.sites[name].check_mode(terms[0].value, merged=False)

    def stacks(self, plan: Plan) -> dict[str, Stack]:
        """The plan's factors, stacked; the same object for a plan that was used before."""
        key = plan, *[site.dtype for site in plan.sites.values()]  # the base may be cast
        found = self._kept.get(key)
        if found is None:
            with exact_mode(*{_device(plan.sites[name], terms) for name, terms in plan.terms.items()}):
                found = {name: self._stack(plan.sites[name], terms) for name, terms in plan.terms.items()}
            self._kept[key] = found
            while len(self._kept) > KEPT_PATHS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return found

    def switch(self, plan: Plan) -> None:
        """Run ``plan`` beside the weights; an empty plan is the bare base."""
        stacks = self.stacks(plan)  # all that can fail
        self._current = stacks
        for name in [n for n, (site, _) in self._hooked.items() if plan.sites.get(n) is not site]:
            self._hooked.pop(name)[1].remove()
        for name, site in plan.sites.items():
            if name not in self._hooked:
                handle = site.module.register_forward_hook(self._hook(site), with_kwargs=True)
                self._hooked[name] = site, handle
        self._watch.expect(plan)

    def forget(self) -> None:
        """Drop the stacks kept for paths used before."""
        self._kept.clear()

    # ------------------------------------------------------------------ private
    def _stack(self, site: Site, terms: Terms) -> Stack:
        weight = site.weight
        dtype = self._dtype
        if dtype is None:
            held = [t.value.dtype for t in terms]
            if weight is not None and weight.is_floating_point() and weight.element_size() > 1:
                held.append(weight.dtype)
            dtype = held[0]
            for other in held[1:]:
                dtype = torch.promote_types(dtype, other)
        values = [t.value.scaled(t.coefficient) for t in terms]
        trained = [v for v in values if any(factor.requires_grad for factor in v.tensors)]
        frozen = [v for v in values if not any(factor.requires_grad for factor in v.tensors)]
        pieces = [stacked(frozen, dtype=dtype, device=_device(site, terms))] if frozen else []
        return [*pieces, *trained]

    def _hook(self, site: Site) -> Any:
        name, fired = site.name, self._watch.fired

        def side_path(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            fired.add(name)
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(out, Tensor):
                raise BaseMismatch(
                    f"{name}: called with {type(x).__name__}, returned {type(out).__name__}; a side path needs tensors",
                    'use activate(…, mode="merged")',
                )
            stack = self._current[name]
            spare = site.makes_its_output and len(module._forward_hooks) == 1 and not _global_forward_hooks
            for i, piece in enumerate(stack):
                if piece.A.device != out.device:  # the base was moved after the switch
                    piece = piece.to(device=out.device)
                    if not piece.A.requires_grad:
                        stack[i] = piece
                out = _added(site, out, x, piece, spare)
                spare = True  # what this added to is ours
            return out

        return side_path


def _device(site: Site, terms: Terms) -> torch.device:
    return site.weight.device if site.weight is not None else terms[0].value.device


def _added(site: Site, out: Tensor, x: Tensor, piece: LowRank, spare: bool) -> Tensor:
    """``out`` plus what one piece makes of ``x``, in the piece's dtype or a wider one, in out's dtype."""
    dtype = out.dtype
    if x.is_floating_point():
        x = x.to(torch.promote_types(piece.A.dtype, x.dtype))
        A, B = piece.A.to(x.dtype), piece.B.to(x.dtype)
    else:
        A, B = piece.A, piece.B
    out = site.onto(out, site.down(x, A), B, scale=piece.scale, spare=spare)
    if piece.bias is not None:
        out = out + site.along_channels(piece.bias.to(out.dtype), out.ndim) * piece.scale
    return out.to(dtype)
