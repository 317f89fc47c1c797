"""Merging of tensors, number by number: what the methods of the literature mean.

    linear             Σ w x                                     task arithmetic, arXiv 2212.04089
    magnitude_prune    the same over the largest numbers of each
    ties               trim, elect a sign, average what agrees   arXiv 2306.01708
    dare_linear        drop at random, rescale, add up           arXiv 2311.03099
    dare_ties          drop at random, rescale, then as ties
    sce                select by variance, weigh by energy, erase minorities    arXiv 2408.07990

Law: the first five are PEFT's `merge_utils` and the last is mergekit's ``sce``, number for number.
    The
tensors may be dense weights, or cores in bases of their own: the definitions are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import SpecError, suggest
from ..given import unchecked

__all__ = ["METHODS", "Method", "check_method", "merged"]

Method: TypeAlias = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties", "sce"]

METHODS: tuple[str, ...] = get_args(Method)


def check_method(method: str, density: float) -> None:
    """Refuse a method or a density that there is not.

    Raises:
        SpecError: one of them makes no sense.
    """
    if method not in METHODS:
        raise SpecError(
            f"method: expected one of {', '.join(METHODS)}, got {method!r}"
            f"{suggest(str(method), METHODS)}"
        )
    is_number = isinstance(unchecked(density), int | float) and not isinstance(density, bool)
    if not is_number or not 0.0 < density <= 1.0:
        raise SpecError(
            f"density: expected a part of the numbers, 0 < density ≤ 1, got {density!r}"
        )


def merged(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    method: Method,
    density: float = 1.0,
    draw: torch.Generator | None = None,
) -> Tensor:
    """Merge tensors of one shape.

    Args:
        tensors: at least one.
        weights: one for each tensor; ``sce`` finds its own and multiplies these.
        method: see above.
        density: the part of the numbers that is kept of each tensor; ``linear`` keeps all.
        draw: for the methods that drop at random; None is torch's own generator.

    >>> one, other = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0])
    >>> merged([one, other], [1.0, 1.0], method="ties")
    tensor([2., 2.])
    """
    check_method(method, density)
    first = tensors[0]
    factors = torch.tensor(weights, dtype=first.dtype, device=first.device)
    factors = factors.reshape(-1, *[1] * first.ndim)  # (n, 1, …): one for each tensor
    if method == "sce":
        return _sce(torch.stack(list(tensors)) * factors, density)
    kept = list(tensors)
    if density < 1.0 and method in ("magnitude_prune", "ties"):
        kept = [_largest(tensor, density) for tensor in tensors]
    elif density < 1.0 and method in ("dare_linear", "dare_ties"):
        kept = [_dropped(tensor, density, draw) for tensor in tensors]
    stacked = torch.stack(kept)
    if method not in ("ties", "dare_ties"):
        return (stacked * factors).sum(0)
    agree = _majority(stacked)
    # The unweighted tensors elect the sign; the weights are applied after that.
    return (stacked * factors * agree).sum(0) / agree.sum(0).clamp(min=1.0)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with all but its largest numbers set to zero."""
    # A count and not a threshold: of numbers that are alike, exactly as many stay as PEFT keeps.
    keep = int(density * tensor.numel())
    best = tensor.abs().flatten().topk(keep).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[best] = 1.0
    return tensor * mask.reshape(tensor.shape)


def _dropped(tensor: Tensor, density: float, draw: torch.Generator | None) -> Tensor:
    """The tensor with numbers dropped at random, and the others enlarged by as much."""
    # The mask is drawn as PEFT draws it, so that one seed gives the same numbers in both.
    chance = torch.full_like(tensor, density)
    return tensor * torch.bernoulli(chance, generator=draw) / density


def _majority(stacked: Tensor) -> Tensor:
    """1 where a number has the sign of the sum over all tensors, else 0; the sign of 0 is none."""
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0).to(stacked.dtype)
    return (stacked.sign() == sign).to(stacked.dtype)


def _sce(stacked: Tensor, density: float) -> Tensor:
    if density < 1.0:
        variance = stacked.var(dim=0, unbiased=False)
        keep = int(density * int(torch.count_nonzero(variance)))
        mask = torch.zeros_like(variance).flatten()
        mask[variance.flatten().topk(keep).indices] = 1.0
        stacked = stacked * mask.reshape(variance.shape)
    energy = stacked.square().flatten(1).mean(1)  # (n,)
    total = energy.sum()
    if not float(total):
        return torch.zeros_like(stacked[0])
    shares = (energy / total).reshape(-1, *[1] * (stacked.ndim - 1))
    weighed = shares * _majority(stacked)
    divisor = weighed.sum(0)
    # Where no tensor has the majority's sign, all are zero, and so is the merge.
    return (stacked * weighed).sum(0) / torch.where(divisor == 0, 1.0, divisor)
