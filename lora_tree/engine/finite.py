"""Refuse numbers that are not finite before one is written into a base, or laid out beside it.

A file's scale may be any number that a float holds (``lora_alpha: 1e300``), and its factors may be
NaN. Every number that goes into a base has to be finite:

    merged      W0 + Σ c · scale · B A, rounded to the dtype of W        fp16 ends at 65504
    unmerged    A, and c · scale · B, in the dtype of the side path
    override    the number itself, in the dtype of the tensor that it stands for

Most adapters are known to be fine by one number, the largest M of all their factors: no number of
c · scale · B A is larger than |c · scale| · r · M². It is found once for each adapter
(`largest.py`). Only sites for which that bound is too coarse cost more: first the site's own
factors are looked at, then the sum is computed and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import BaseMismatch
from ..lowrank import LowRank
from ..override import Override
from ..sites import Site
from .arithmetic import Scratch, add_bias, add_weight
from .largest import largest_in_plan, largest_of, size_key
from .plan import PlacedPlan, Plan
from .sidepaths.side import SideKind

__all__ = ["check_override_numbers", "check_side_paths", "check_sum", "harmless", "suspects"]

NodeShare = tuple[str, LowRank, float]
"""A node's share at a site: its name, its value and the coefficient of the value."""


# ---------------------------------------------------------------------- merged
def suspects(plan: Plan) -> list[str]:
    """Return the sites of a plan whose weight might get a number that is not finite, as far as a
    bound can tell.
    """
    most = largest_in_plan(plan, plan.adapters)
    suspected = []
    for name, terms in plan.terms.items():
        dtype = plan.sites[name].dtype or torch.float32
        total = folded = 0.0
        for term in terms:
            scale = abs(term.coefficient * term.value.scale)
            total += scale * term.value.rank
            folded = max(folded, scale)
        if _is_harmless(total * most * most, total * most, folded * most, dtype):
            continue
        if not harmless([(term.value, term.coefficient) for term in terms], dtype):
            suspected.append(name)
    return suspected


def harmless(values: Sequence[tuple[LowRank, float]], dtype: torch.dtype) -> bool:
    """Return whether these leave every finite weight of ``dtype`` finite.

    Args:
        values: each with its coefficient.
        dtype: of the weight.
    """
    total = biases = folded = 0.0
    for value, coefficient in values:
        a, b, bias = largest_of(value)
        scale = abs(value.scale * coefficient)
        total += scale * value.rank * a * b
        biases += scale * bias
        folded = max(folded, scale * b, key=size_key)
    return _is_harmless(total, biases, folded, dtype)


def check_sum(
    site: Site,
    name: str,
    source: Tensor,
    parts: Sequence[NodeShare],
    scratch: Scratch,
    *,
    is_bias: bool,
) -> None:
    """Refuse a sum that is not finite where ``source`` is; it is computed as it would be written,
    and dropped.

    Args:
        site: says how a delta lies in such a weight.
        name: of the site, for the message.
        source: (as the weight), on the device on which to compute.
        parts: what is added.
        scratch: the buffers to compute with.
        is_bias: ``source`` is the site's bias.

    Raises:
        BaseMismatch: it is not finite; names the node that adds the most.
    """
    # A scale that is not finite has no sum to compute: `scaled` would refuse it without naming the
    # node.
    if all(math.isfinite(value.scale * coefficient) for _, value, coefficient in parts):
        values = [value.scaled(c).to(device=source.device) for _, value, c in parts]
        trial = torch.empty_like(source, requires_grad=False)
        if is_bias:
            add_bias(trial, source, values)
        else:
            add_weight(site, trial, source, values, scratch)
        # Numbers that were not finite before come from the base, and are not refused.
        if bool((trial.isfinite() | ~source.isfinite()).all()):
            return
    raise _not_finite(name, parts, source.dtype)


def _is_harmless(total: float, biases: float, folded: float, dtype: torch.dtype) -> bool:
    """Return whether a finite weight stays finite.

    Args:
        total: a bound on the numbers of the delta.
        biases: a bound on the numbers of the biases.
        folded: a bound on the numbers of scale · B, which is computed in fp32 or wider.
        dtype: of the weight.
    """
    info = torch.finfo(dtype)
    # Adding less than half a rounding step leaves the largest number of the dtype unchanged.
    half_step = info.max * info.eps / 4
    # NaN fails each of these comparisons, as it should.
    small = total < half_step and biases < half_step
    return small and folded < torch.finfo(torch.float32).max / 2


# ---------------------------------------------------------------------- unmerged
def check_side_paths(
    placed: PlacedPlan,
    kinds: Mapping[str, SideKind],
    largest: Mapping[str, float] | None = None,
) -> None:
    """Refuse a plan whose side paths would hold a number that is not finite; factors that train are
    not looked at.

    Args:
        placed: the plan.
        kinds: site → what its side path computes in.
        largest: node → the largest coefficient of any row, beside the plan's own; None: no rows
            differ.

    Raises:
        BaseMismatch: one would; names the node and the module.
    """
    plan, largest = placed.plan, largest or {}
    adapters = plan.adapters
    if placed.trains:
        # Factors that train are not checked: they change at every step, and reading them waits for
        # the device.
        adapters = tuple([adapter for adapter in adapters if not _all_train(adapter)])
    most = largest_in_plan(plan, adapters)
    for name, terms in plan.terms.items():
        dtype, _ = kinds[name]
        info = torch.finfo(dtype)
        limit = info.max * (
            1 + info.eps / 4
        )  # the largest size that still rounds to a finite number
        for term in terms:
            # A row may owe a node more than its full weight. Rows that owe less are covered by
            # this check.
            coefficient = term.coefficient * max(1.0, abs(largest.get(term.node, 1.0)))
            scale = abs(coefficient * term.value.scale)
            if most <= limit and scale * most <= limit:
                continue
            if term.trains or term.value.is_sharded:
                continue
            a, b, bias = largest_of(term.value)
            if not (a <= limit and scale * b <= limit and scale * bias <= limit):
                raise _not_finite(name, [(term.node, term.value, coefficient)], dtype)


def _all_train(adapter: Adapter) -> bool:
    for value in adapter.modules.values():
        for tensor in value.tensors:
            if not tensor.requires_grad:
                return False
    return True


# ---------------------------------------------------------------------- an override
def check_override_numbers(tensor: str, override: Override, own: Tensor) -> None:
    """Refuse an override that is not finite in the dtype of the tensor that it stands for.

    Raises:
        BaseMismatch: it is not; names the tensor.
    """
    if override.is_trainable or override.values.is_meta or not override.values.numel():
        return  # one that trains changes at every step, and reading it waits for the device
    least, most = torch.aminmax(override.values)
    size = float(torch.maximum(least.abs(), most.abs()))
    info = torch.finfo(own.dtype)
    if not size <= info.max * (1 + info.eps / 4):
        raise BaseMismatch(
            f"{tensor}: the adapter replaces it by numbers up to {size:.3g}, and "
            f"{str(own.dtype)[6:]} goes up to {info.max:.3g}",
            "train it again, or load the base in a wider dtype",
        )


# ---------------------------------------------------------------------- the error
def _not_finite(name: str, parts: Sequence[NodeShare], dtype: torch.dtype) -> BaseMismatch:
    """Return the error for a site; it names the node that adds the most."""
    node, value, coefficient = max(parts, key=_size)
    if not value.is_finite:
        return BaseMismatch(
            f"{node}: {name}: a factor holds NaN or an infinity, as a training that diverged "
            "leaves it",
            "train it again, or put back an earlier version of its files",
        )
    wider: tuple[str, ...] = ()
    if dtype == torch.float16:
        wider = ("load the base in bfloat16 or float32, which go up to 3e38",)
    return BaseMismatch(
        f"{node}: {name}: its scale ({coefficient * value.scale:.3g}) times its factors goes over "
        f"{torch.finfo(dtype).max:.5g}, the largest number of {str(dtype)[6:]}",
        "look at lora_alpha and r in its adapter_config.json, and at the node's weight",
        *wider,
    )


def _size(part: NodeShare) -> float:
    _, value, coefficient = part
    a, b, bias = largest_of(value)
    return size_key(abs(coefficient * value.scale) * max(value.rank * a * b, bias))
