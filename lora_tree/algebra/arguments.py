"""Check a verb's arguments: that a tree is a tree, an adapter an adapter, a dtype one for factors.

The usual mistake is to pass a folder's path: a verb takes the values that `lora_tree.load` and
`Adapter.load` return.
"""

from __future__ import annotations

import torch

from ..adapter import Adapter
from ..errors import SpecError
from ..given import check_dtype
from ..tree import AdapterTree

__all__ = ["check_adapter", "check_factor_dtype", "check_tree"]

FACTOR_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""The dtypes of factors that can be written; torch can't add up those of narrower ones."""


def check_tree(given: object, what: str = "tree") -> None:
    """Refuse a value that is not a tree.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is something else.
    """
    _check(given, AdapterTree, what, "lora_tree.load('zoo/') opens a folder as one")


def check_adapter(given: object, what: str = "adapter") -> None:
    """Refuse a value that is not an adapter.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is something else.
    """
    _check(given, Adapter, what, "lora_tree.Adapter.load('FOLDER') reads one")


def check_factor_dtype(dtype: object) -> None:
    """Refuse a dtype in which factors can't be saved; None is allowed.

    Raises:
        SpecError: it is not in `FACTOR_DTYPES`, or is not a dtype.
    """
    check_dtype(dtype)
    if dtype is not None and dtype not in FACTOR_DTYPES:
        raise SpecError(
            f"dtype: factors are not written in {dtype}, expected bf16, fp16, fp32 or fp64",
            "dtype=torch.bfloat16",
        )


def _check(given: object, kind: type, what: str, advice: str) -> None:
    if not isinstance(given, kind):
        raise SpecError(f"{what}: expected an {kind.__name__}, got {type(given).__name__}", advice)
