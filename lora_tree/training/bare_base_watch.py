"""Refuse a trainer that was given the bare base while nodes train.

Such a trainer looks for parameters that train, and finds none in the base: its optimiser moves
nothing, and its checkpoints hold no factors. The user would see a loss and get no adapter.

A loop of the user's own may call the base: it has got its parameters from `trainable`. Only a
trainer that looks for them itself is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..callers import caller_in
from ..errors import StateError

__all__ = ["BareBaseWatch"]

TRAINERS = ("transformers.trainer",)
"""Modules whose training loops look for the parameters of the model they were given."""


class BareBaseWatch:
    """A hook that looks at the callers of the base once, at the first forward with gradients on.

    Args:
        base: the bare model.
        through: the forward of the model that a trainer should have been given.
    """

    def __init__(self, base: nn.Module, through: Callable[..., Any]) -> None:
        self._base, self._through = base, through
        self._handle: RemovableHandle | None = None

    @property
    def is_watching(self) -> bool:
        """True if it will look at the next forward."""
        return self._handle is not None

    def look(self, wanted: bool) -> None:
        """Begin to look, or stop; looking leaves one hook on the base."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if wanted:
            self._handle = self._base.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: Any) -> None:
        # A forward without gradients may be an evaluation, which any code may run. While torch
        # compiles, the stack is the compiler's.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        trainer = caller_in(TRAINERS, until=self._through.__code__)
        if trainer is not None:
            # The hook stays: a trainer that catches the error and goes on meets it again.
            raise StateError(
                f"a {trainer} was given the bare base while nodes train: "
                "it would move no factors, save none, and resume from nothing",
                "give it the TreeModel: lora_tree.integrations.transformers.TreeTrainer(model, …)",
            )
        self.look(False)
