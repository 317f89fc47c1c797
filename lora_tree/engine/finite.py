"""Numbers that are not finite: found before one of them is written into a base, or laid out beside it.

A file's scale may be any number that a float holds (``lora_alpha: 1e300``), and its factors may be NaN. What counts is
what a base would be given:

    merged      W0 + Σ c · scale · B A, rounded to the dtype of W        fp16 ends at 65504
    unmerged    A, and c · scale · B, in the dtype of the side path

Most adapters are known to be fine by one number, the largest M of all their factors: |c · scale · B A| is at most
|c · scale| · r · M². It is found once for each adapter, by one pass over the buffer in which the factors lie. Only for
the sites where that is too coarse anything else is computed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import BaseMismatch
from ..lowrank import LowRank
from .plan import Plan
from .side import side_dtype

__all__ = ["check_beside", "harmless", "not_finite", "suspects"]

_LARGEST: weakref.WeakKeyDictionary[Adapter, tuple[int, float]] = weakref.WeakKeyDictionary()
"""Adapter → how often its parameters had been written to, and its largest number then."""

_FINE: weakref.WeakKeyDictionary[Plan, set[tuple[bool, tuple[torch.dtype | None, ...]]]] = (
    weakref.WeakKeyDictionary()
)

NodeShare = tuple[str, LowRank, float]
"""A node's part at a site: its name, its value and the coefficient of that."""


def suspects(plan: Plan) -> list[str]:
    """The sites of a plan whose weight might get a number that is not finite, as far as a bound can tell."""
    dtypes = tuple(site.dtype or torch.float32 for site in plan.sites.values())
    if _known(plan, False, dtypes):
        return []
    most = _most(plan, plan.adapters)
    found = []
    for (name, terms), dtype in zip(plan.terms.items(), dtypes, strict=True):
        total = folded = 0.0
        for term in terms:
            scale = abs(term.coefficient * term.value.scale)
            total += scale * term.value.rank
            folded = max(folded, scale)
        if _is_harmless(total * most * most, total * most, folded * most, dtype):
            continue
        if not harmless([(term.value, term.coefficient) for term in terms], dtype):
            found.append(name)
    if not found:
        _remember(plan, False, dtypes)
    return found


def harmless(values: Sequence[tuple[LowRank, float]], dtype: torch.dtype) -> bool:
    """Whether no number of a weight of ``dtype`` can be driven out of it by these, whatever the weight holds.

    Args:
        values: each with its coefficient.
    """
    total = biases = folded = 0.0
    for value, coefficient in values:
        a, b, bias = _largest_of(value)
        scale = abs(value.scale * coefficient)
        total += scale * value.rank * a * b
        biases += scale * bias
        folded = max(folded, scale * b, key=_badness)
    return _is_harmless(total, biases, folded, dtype)


def check_beside(
    plan: Plan, asked: torch.dtype | None, owed: Mapping[str, float] | None = None
) -> None:
    """Refuse a plan whose side paths would hold a number that is not finite; what trains is not looked at.

    Args:
        asked: what side paths compute in; None: the widest of the factors' and the weight's own.
        owed: node → the largest coefficient of any row, beside the plan's own; None: no rows differ.

    Raises:
        BaseMismatch: one would; names the node and the module.
    """
    owed = owed or {}
    ordinary = all(abs(coefficient) <= 1.0 for coefficient in owed.values())
    # The dtype of a side path follows from the plan and from these, which are quick to read.
    given = (asked, *[site.dtype for site in plan.sites.values()])
    if ordinary and _known(plan, True, given):
        return
    dtypes = tuple(
        side_dtype(plan.sites[name], [term.value for term in terms], asked)
        for name, terms in plan.terms.items()
    )
    # Factors that train are not checked: they change at every step, and reading them waits for the device.
    most = _most(plan, [adapter for adapter in plan.adapters if not _all_train(adapter)])
    for (name, terms), dtype in zip(plan.terms.items(), dtypes, strict=True):
        limit = _limit(dtype)
        for term in terms:
            coefficient = term.coefficient * max(1.0, abs(owed.get(term.node, 1.0)))
            scale = abs(coefficient * term.value.scale)
            if (most <= limit and scale * most <= limit) or term.trains or term.value.is_sharded:
                continue
            a, b, bias = _largest_of(term.value)
            if not (a <= limit and scale * b <= limit and scale * bias <= limit):
                raise not_finite(name, [(term.node, term.value, coefficient)], dtype)
    if ordinary:
        _remember(plan, True, given)


def not_finite(name: str, parts: Sequence[NodeShare], dtype: torch.dtype) -> BaseMismatch:
    """The error for a site; it names the node that adds the most."""
    node, value, coefficient = max(parts, key=_size)
    if not value.is_finite:
        return BaseMismatch(
            f"{node}: {name}: a factor holds NaN or an infinity, as a training that diverged leaves it",
            "train it again, or put back an earlier version of its files",
        )
    wider = (
        ("load the base in bfloat16 or float32, which go up to 3e38",)
        if dtype == torch.float16
        else ()
    )
    return BaseMismatch(
        f"{node}: {name}: its scale ({coefficient * value.scale:.3g}) times its factors goes over "
        f"{torch.finfo(dtype).max:.5g}, the largest number of {str(dtype)[6:]}",
        "look at lora_alpha and r in its adapter_config.json, and at the node's weight",
        *wider,
    )


def _size(part: NodeShare) -> float:
    _, value, coefficient = part
    a, b, bias = _largest_of(value)
    return _badness(abs(coefficient * value.scale) * max(value.rank * a * b, bias))


def _badness(size: float) -> float:
    """A size to compare by: NaN is the worst of all."""
    return math.inf if math.isnan(size) else size


def _is_harmless(total: float, biases: float, folded: float, dtype: torch.dtype) -> bool:
    """Whether a finite weight stays finite.

    Args:
        total: no number of the delta is larger.
        biases: nor one of the biases.
        folded: nor one of scale · B, which is computed in fp32 or wider.
    """
    info = torch.finfo(dtype)
    half_step = (
        info.max * info.eps / 4
    )  # what is smaller leaves the largest number of the dtype where it is
    return (
        total < half_step and biases < half_step and folded < torch.finfo(torch.float32).max / 2
    )  # NaN is not


def _known(plan: Plan, beside: bool, dtypes: tuple[torch.dtype | None, ...]) -> bool:
    """Whether a plan of these dtypes was found to be fine before, and can't have changed."""
    return plan.fixed and (beside, dtypes) in _FINE.get(plan, ())


def _remember(plan: Plan, beside: bool, dtypes: tuple[torch.dtype | None, ...]) -> None:
    if plan.fixed:
        _FINE.setdefault(plan, set()).add((beside, dtypes))


def _limit(dtype: torch.dtype) -> float:
    """The largest size that still rounds to a finite number."""
    info = torch.finfo(dtype)
    return info.max * (1 + info.eps / 4)


def _most(plan: Plan, adapters: Iterable[Adapter]) -> float:
    """The largest number in any factor of some adapters, as they are bound; NaN or infinite where one is."""
    found = [_largest_in(adapter) for adapter in adapters]
    # Where a base fuses what an adapter has apart, the bound factors are others, with scales folded into them.
    own = {id(value) for adapter in plan.adapters for value in adapter.modules.values()}
    values = [term.value for terms in plan.terms.values() for term in terms if not term.trains]
    made = [tensor for value in values if id(value) not in own for tensor in value.tensors]
    found += _largest(_runs(made))
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def _all_train(adapter: Adapter) -> bool:
    return all(
        tensor.requires_grad for value in adapter.modules.values() for tensor in value.tensors
    )


def _largest_in(adapter: Adapter) -> float:
    tensors = [tensor for value in adapter.modules.values() for tensor in value.tensors]
    # Parameters may be written to in place; nothing else is. A look at their numbers waits for a device.
    writes = sum(tensor._version for tensor in tensors if isinstance(tensor, nn.Parameter))
    known = _LARGEST.get(adapter)
    if known is not None and known[0] == writes:
        return known[1]
    if any(hasattr(tensor, "full_tensor") for tensor in tensors):
        return 0.0  # every rank has a part; `Merged.check` keeps these from being merged
    found = max(_largest(_runs(tensors)), default=0.0, key=_badness)
    _LARGEST[adapter] = writes, found
    return found


def _largest_of(value: LowRank) -> tuple[float, float, float]:
    """The largest numbers of A, B and the bias."""
    a, b, *bias = _largest(value.tensors)
    return a, b, bias[0] if bias else 0.0


def _largest(tensors: Iterable[Tensor]) -> list[float]:
    """max |x| of each tensor, NaN where it has one; one wait for each device and dtype."""
    ends: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    places: list[tuple[tuple[torch.device, torch.dtype], int]] = []
    for tensor in tensors:
        plain = tensor.detach()
        plain = plain if plain.element_size() > 1 else plain.float()
        key = plain.device, plain.dtype
        found = ends.setdefault(key, [])
        places.append((key, len(found) // 2))
        found += torch.aminmax(plain)
    sizes = {key: _sizes(found) for key, found in ends.items()}
    return [sizes[key][i] for key, i in places]


def _sizes(ends: Sequence[Tensor]) -> list[float]:
    """Return the larger in size of each tensor's least and most number; 0 on the meta device."""
    if ends[0].is_meta:
        return [0.0] * (len(ends) // 2)
    found: list[float] = torch.stack(list(ends)).abs().view(-1, 2).amax(1).tolist()
    return found


def _runs(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors; those that lie close together in one buffer as one."""
    buffers: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        key = tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device
        buffers.setdefault(key, []).append(tensor.detach())
    for found in buffers.values():
        start = min(tensor.storage_offset() for tensor in found)
        end = max(tensor.storage_offset() + _reach(tensor) for tensor in found)
        if len(found) > 1 and end - start <= 2 * sum(tensor.numel() for tensor in found):
            yield found[0].as_strided((end - start,), (1,), start)
        else:
            yield from found


def _reach(tensor: Tensor) -> int:
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
