"""Find the rows of a batch that has as many tokens as rows, with a forward of shapes alone.

A copy of the base in fake tensors (`torch._subclasses.FakeTensorMode`) runs once, with one row
more: no numbers, no memory, no random number drawn, no buffer of the base written. An axis that has
grown by one is the rows. The copy has the base's hooks, so the side paths see the shapes. A forward
that can't run on shapes, because it looks at numbers, proves nothing, and the site stays unknown.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..unpromised import fake_tensors

__all__ = ["grown", "is_square"]


def is_square(inputs: list[Tensor], rows: int) -> bool:
    """Return whether any of a forward's inputs has a second axis with as many entries as rows."""
    return any(x.shape[:1] == (rows,) and rows in x.shape[1:] for x in inputs)


def grown(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> None:
    """Run ``base`` on shapes of its arguments with one row more, and drop the result and any error.

    Args:
        base: the model.
        args, kwargs: of its forward.
        rows: the length of the first axis of those that have rows.
    """
    modes = fake_tensors()
    if modes is None:
        return
    FakeTensorMode, FakeCopyMode = modes
    # A tensor of one axis may be labels, one a row, or positions, one a token. The wrong reading
    # ends in an error of shapes; the first that runs is taken.
    for least in (2, 1):
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with FakeCopyMode(mode):
                twin = copy.deepcopy(base)
            with mode, torch.no_grad():
                fake_args, fake_kwargs = _fake((args, kwargs), rows, least)
                twin.forward(*fake_args, **fake_kwargs)
        except Exception:
            # Foreign code on foreign shapes: any error at all means that nothing was learnt.
            continue
        return


def _fake(of: Any, rows: int, least: int) -> Any:
    """Return the same arguments as fake tensors, those with rows one row longer; others as copies.

    Args:
        of: an argument, or a list, tuple or dict of them.
        rows: the length of the first axis of those that have rows.
        least: the fewest axes that a tensor with rows has.
    """
    if isinstance(of, Tensor):
        if not of.ndim:
            return torch.empty((), dtype=of.dtype, device=of.device)
        more = int(of.ndim >= least and of.shape[0] == rows)
        return torch.empty((of.shape[0] + more, *of.shape[1:]), dtype=of.dtype, device=of.device)
    if type(of) in (list, tuple):
        return type(of)(_fake(item, rows, least) for item in of)
    if isinstance(of, dict):
        made = copy.copy(of)  # of its own class: transformers' inputs are dicts with attributes
        for key, value in of.items():
            made[key] = _fake(value, rows, least)
        return made
    if callable(getattr(of, "get_seq_length", None)):
        if of.get_seq_length() > 0:
            raise ValueError("a cache with rows of its own")
        return copy.deepcopy(of)  # the forward writes to it
    return of
