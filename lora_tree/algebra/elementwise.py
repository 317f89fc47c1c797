"""The merge methods of the literature, as elementwise operations on tensors.

    linear             Σ w x                                     task arithmetic, arXiv 2212.04089
    magnitude_prune    the same over the largest numbers of each
    ties               trim, elect a sign, average what agrees   arXiv 2306.01708
    dare_linear        drop at random, rescale, add up           arXiv 2311.03099
    dare_ties          drop at random, rescale, then as ties
    sce                select by variance, weigh by energy, erase minorities    arXiv 2408.07990

Law: the first five give the numbers of PEFT's `merge_utils`, the last those of mergekit's ``sce``.
The tensors may be dense weights or cores: the definitions are the same.
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
    """Refuse an unknown method or a density outside (0, 1].

    Raises:
        SpecError: one of them is not valid.
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
        weights: one for each tensor; ``sce`` multiplies each tensor by it first, and then computes
            its own weights.
        method: see above.
        density: the fraction of each tensor's numbers that is kept; ``linear`` keeps all.
        draw: for the methods that drop at random; None uses torch's default generator.

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
    # As in PEFT, the unweighted tensors elect the sign, and the weights are applied afterwards.
    return (stacked * factors * agree).sum(0) / agree.sum(0).clamp(min=1.0)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Return the tensor with all but its largest numbers set to zero."""
    # A count instead of a threshold: among equal numbers, as many stay as PEFT keeps.
    keep = int(density * tensor.numel())
    best = tensor.abs().flatten().topk(keep).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[best] = 1.0
    return tensor * mask.reshape(tensor.shape)


def _dropped(tensor: Tensor, density: float, draw: torch.Generator | None) -> Tensor:
    """Return the tensor with numbers dropped at random, and the others divided by the density."""
    # The mask is drawn as PEFT draws it, so that one seed gives the same numbers in both.
    chance = torch.full_like(tensor, density)
    return tensor * torch.bernoulli(chance, generator=draw) / density


def _majority(stacked: Tensor) -> Tensor:
    """Return 1 where a number has the sign of the sum over all tensors, else 0; also 0 for a 0."""
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
    # Where no tensor has the majority's sign, all numbers are zero, and so is the result.
    return (stacked * weighed).sum(0) / torch.where(divisor == 0, 1.0, divisor)
