"""Notice that transformers' ``generate`` repeats rows in succession, for beams and sequences.

``generate`` repeats them in one place, ``_expand_inputs_for_generation(expand_size=…)``. While a
batch is routed, that method and ``generate`` itself are wrapped on the base object: the first tells
how often rows are repeated, the second when ``generate`` has ended.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from ..rows.batch_axis import BatchAxis
from ..sidepaths.side import raise_for_copy

__all__ = ["expansions"]

EXPAND, GENERATE = "_expand_inputs_for_generation", "generate"


@contextlib.contextmanager
def expansions(base: nn.Module, axis: BatchAxis) -> Iterator[None]:
    """Tell ``axis``, for the length of a ``with``, how often ``generate`` has repeated each row."""
    expand, generate = getattr(base, EXPAND, None), getattr(base, GENERATE, None)
    if not callable(expand) or not callable(generate):
        yield
        return

    @functools.wraps(expand)
    def noting(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        size = kwargs.get("expand_size", args[0] if args else 1)
        axis.expand(size if isinstance(size, int) else 1)
        return expand(*args, **kwargs)

    @functools.wraps(generate)
    def ending(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model is not base:
            raise_for_copy(model, GENERATE)  # `generate` is bound to the base, and would run it
        try:
            return generate(*args, **kwargs)
        finally:
            axis.expand(1)

    # Into the object's own `__dict__`, because other models share the class. The object may have
    # methods of its own there, which come back at the end. The wrappers are bound methods, because
    # a deep copy of the base binds those to itself.
    own = vars(base)
    before = {name: own[name] for name in (EXPAND, GENERATE) if name in own}
    own.update({EXPAND: MethodType(noting, base), GENERATE: MethodType(ending, base)})
    try:
        yield
    finally:
        for name in (EXPAND, GENERATE):
            own.pop(name, None)
        own.update(before)
