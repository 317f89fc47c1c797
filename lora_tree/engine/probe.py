"""Where a batch has as many tokens as rows: a forward of shapes alone, with one row more, tells which axis is which.

A copy of the base in fake tensors (`torch._subclasses.FakeTensorMode`) runs once: no numbers, no memory, no random
number drawn, no buffer of the base written. An axis that has grown by one is the rows. The copy has the base's hooks,
so the side paths are asked. A forward that can't run on shapes, because it looks at numbers, proves nothing, and the
site stays unknown.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .unpromised import fake_tensors

__all__ = ["grown", "is_square"]


def is_square(inputs: list[Tensor], rows: int) -> bool:
    """Whether any of a forward's inputs has a second axis as long as its rows."""
    return any(x.shape[:1] == (rows,) and rows in x.shape[1:] for x in inputs)


def grown(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> None:
    """Run ``base`` on shapes of its arguments with one row more; whatever goes wrong is nobody's business.

    Args:
        rows: how long the first axis is of those that have rows.
    """
    modes = fake_tensors()
    if modes is None:
        return
    FakeTensorMode, FakeCopyMode = modes
    for least in (2, 1):  # a tensor of one axis may be labels, one a row, or positions, one a token
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with FakeCopyMode(mode):
                twin = copy.deepcopy(base)
            with mode, torch.no_grad():
                fake_args, fake_kwargs = _fake((args, kwargs), rows, least)
                twin.forward(*fake_args, **fake_kwargs)
        except Exception:
            continue
        return


def _fake(of: Any, rows: int, least: int) -> Any:
    """The same arguments as fake tensors, those that have rows with one more; other objects as copies."""
    if isinstance(of, Tensor):
        more = int(of.ndim >= least and of.shape[0] == rows)
        shape = (of.shape[0] + more, *of.shape[1:]) if of.ndim else ()
        return torch.empty(shape, dtype=of.dtype, device=of.device)
    if type(of) in (list, tuple):
        return type(of)(_fake(each, rows, least) for each in of)
    if isinstance(of, dict):
        made = copy.copy(of)
        for key, value in of.items():
            made[key] = _fake(value, rows, least)
        return made
    if callable(getattr(of, "get_seq_length", None)):
        if of.get_seq_length() > 0:
            raise ValueError("a cache with rows of its own")
        return copy.deepcopy(of)
    return of
