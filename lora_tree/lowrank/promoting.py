"""Find the dtype that holds the numbers of several dtypes.

torch promotes no 8-bit float, because there are several kinds and none holds all others. fp32 holds
the numbers of every one of them.
"""

from __future__ import annotations

import torch

__all__ = ["promoted"]


def promoted(first: torch.dtype, *others: torch.dtype) -> torch.dtype:
    """Return the narrowest dtype that holds the numbers of all these; 8-bit floats need fp32.

    >>> promoted(torch.bfloat16, torch.float16), promoted(torch.float8_e5m2, torch.bfloat16)
    (torch.float32, torch.float32)
    """
    found = first
    for dtype in others:
        if dtype == found:
            continue
        if found.itemsize == 1:
            found = torch.float32
        found = torch.promote_types(found, torch.float32 if dtype.itemsize == 1 else dtype)
    return found
