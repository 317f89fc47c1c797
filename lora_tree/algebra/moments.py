"""Second moments of a module's inputs, which weight an error by its effect on the outputs.

    E ‖(ΔW − ΔW') x‖² = ‖(ΔW − ΔW') C^½‖²        C = E[x xᵀ], (in, in)

The caller gives C itself, its diagonal, or rows of inputs. Only Qᵀ C Q is ever needed, with a basis
Q of the increments' row spaces; the last two forms yield it without an (in, in) matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeMismatch, SpecError
from ..given import unchecked

__all__ = ["moment_inside"]


def moment_inside(Q: Tensor | None, moment: Tensor, size: int) -> Tensor:
    """Return Qᵀ C Q in float64.

    Args:
        Q: (\\*batch, in, l); None is the identity, on the CPU.
        moment: C (in, in); or its diagonal (in,); or rows of inputs, (rows, in) with more rows
            than one.
        size: in.

    Returns:
        (\\*batch, l, l).

    Raises:
        ShapeMismatch: the moment does not have the size of the input.
        SpecError: it is not a tensor, or has infinities, NaN or a negative mean square.
    """
    if not isinstance(unchecked(moment), Tensor):
        raise SpecError(f"moments: expected a tensor, got {type(moment).__name__}")
    device = torch.device("cpu") if Q is None else Q.device
    C = moment.detach().to(device=device, dtype=torch.float64)
    # A diagonal of C holds mean squares: a negative one would make errors negative.
    squares = C.square()
    if C.shape == (size,):
        squares = C
    elif C.shape == (size, size):
        squares = C.diagonal()
    if not bool((squares >= 0).all()) or not bool(C.isfinite().all()):
        raise SpecError("moments: they hold numbers that are not finite, or a negative mean square")
    if C.shape == (size,):
        return torch.diag(C) if Q is None else Q.mT @ (C[:, None] * Q)
    if C.shape == (size, size):
        return C if Q is None else Q.mT @ C @ Q
    if C.ndim == 2 and C.shape[1] == size:
        seen = C if Q is None else C @ Q  # (rows, l)
        return seen.mT @ seen / len(C)
    raise ShapeMismatch(
        f"moments: got {tuple(C.shape)}, expected ({size},), ({size}, {size}) or (rows, {size})"
    )
