"""Whether a trainer was given the bare base while nodes train.

It would find nothing in the base that trains, hand nothing to its optimiser, and save no factors; with a path active
its loss goes down for nobody. A loop that calls the base by itself is as good as one that calls the `TreeModel`: the
two differ in who looks for the parameters, and only a trainer that does so by itself can be wrong about it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import StateError

__all__ = ["Handed"]

TRAINERS = ("transformers.trainer",)
"""Modules whose loops look for the parameters of what they were given."""


class Handed:
    """Looks once, at the first forward that autograd records, who called the base.

    Args:
        base: the bare model.
        through: the forward by which a trainer ought to come.
    """

    def __init__(self, base: nn.Module, through: Callable[..., Any]) -> None:
        self._base, self._through = base, through
        self._handle: RemovableHandle | None = None

    @property
    def looks(self) -> bool:
        """It looks at the next forward."""
        return self._handle is not None

    def look(self, wanted: bool) -> None:
        """From now on, look at the next forward; or don't."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if wanted:
            self._handle = self._base.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._through.__code__:
            if frame.f_globals.get("__name__") in TRAINERS:
                raise StateError(
                    f"a {type(frame.f_locals.get('self')).__name__} was given the bare base while nodes train: "
                    "it would move no factors, save none, and resume from nothing",
                    "give it the TreeModel: lora_tree.integrations.transformers.TreeTrainer(model, …)",
                )
            frame = frame.f_back
        self.look(False)
