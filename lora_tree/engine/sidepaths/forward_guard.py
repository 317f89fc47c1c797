"""Refuse a forward or a backward of the base that would mix two behaviours, while paths run beside
its weights.

    before a forward     a key/value cache is used only under the path that filled it; a routed
                         batch has the rows that were declared
    after it             the cache is marked with the behaviour that filled it
    before a backward    checkpointed layers run their forward again, with the side paths that are
                         active then: they have to be the ones of the first run

A behaviour is known here by its mark, a number. It is noted on the cache objects themselves, so
that a copy of a cache has it too, and in the hooks of a backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...callers import called_from
from ...errors import StateError
from ..hook import Hook
from ..rows.batch_axis import BatchAxis, Place

__all__ = ["ForwardGuard"]

_NOTE = "_lora_tree_filled_by"
_CHECKPOINT = "torch.utils.checkpoint"


class ForwardGuard:
    """The guard at the base's own forward.

    Args:
        base: the model.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._handles: list[RemovableHandle] = []
        self._axis: BatchAxis | None = None
        self._mixed: Sequence[Place] = ()
        self._admitted = False
        """True: the forward that runs now was not refused."""
        self._recording = False
        """True: a forward of the base runs, and autograd records it."""
        self._checkpointed = False
        """True: a side path of this forward will run again in backward."""
        self.number: int | None = None
        """The mark of the behaviour; None: nothing is guarded."""

    def watch(
        self, mark: int | None, axis: BatchAxis | None = None, mixed: Sequence[Place] = ()
    ) -> None:
        """Guard the behaviour of this mark from now on.

        Args:
            mark: the plan's or the route's; None: nothing to guard, and no hook stays on the base.
            axis: how a routed batch lies.
            mixed: the places where the rows do not all owe the same, so that it has to be known
                which axis is the rows.
        """
        self._axis, self._mixed = axis, mixed
        # The hooks read it when they run, and an earlier forward's backward compares its own mark
        # with it.
        self.number = mark
        if mark is None:
            while self._handles:
                self._handles.pop().remove()
            return
        if not self._handles:
            # Each handle goes into the list at once, so that a failure between them leaves no hook
            # behind that is not in the list.
            before = self._base.register_forward_pre_hook(Hook(self._before), with_kwargs=True)
            self._handles.append(before)
            after = self._base.register_forward_hook(
                Hook(self._after), with_kwargs=True, always_call=True
            )
            self._handles.append(after)

    # ------------------------------------------------------------------ a side path
    def may_run_again(self, out: Tensor) -> None:
        """Note that the side path that ran just now may run again in backward.

        This can be seen only inside the layer. Checkpointing either packs the tensors that autograd
        saves, or runs its first forward without recording. Other code does that too, so the call
        stack decides.

        Args:
            out: what the side path returned.
        """
        if self._recording:
            self._checkpointed = self._checkpointed or called_from(_CHECKPOINT)
        # A loss may also be taken through a part of the base, outside of the base's own forward.
        elif out.grad_fn is not None and called_from(_CHECKPOINT):
            out.grad_fn.register_prehook(self._before_backward(self.number))

    @property
    def probing(self) -> bool:
        """True while a copy of the base runs on shapes, which shows where the rows are."""
        return self._axis is not None and self._axis.probing

    # ------------------------------------------------------------------ hooks
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._admitted = False
        # An empty cache may be used under any path. A filled one without a note was filled before
        # this path was activated.
        for cache in _caches(args, kwargs):
            if getattr(cache, _NOTE, None) != self.number and _is_filled(cache):
                raise StateError(
                    "this key/value cache was filled under another path, or before this one was "
                    "activated",
                    "start with an empty cache, or fill it again under the active path",
                )
        if self._axis is not None:
            inputs = _main_inputs_first(module, args, kwargs)
            self._axis.begin(inputs)
            self._axis.probe(module, args, kwargs, inputs, self._mixed)
        self._recording, self._checkpointed = torch.is_grad_enabled(), False
        self._admitted = True  # last: a forward that was refused gets no mark on its caches

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if self._axis is not None:
            self._axis.end()  # after a forward that failed, too
        if not self._admitted:
            return  # torch calls this after a forward that was refused, too
        for cache in _caches(args, kwargs, out):
            setattr(cache, _NOTE, self.number)
        # At the base's outputs, where its backward begins: it is refused before a layer runs again.
        if self._checkpointed:
            for tensor in _tensors(out):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(self._before_backward(self.number))
        self._recording = False

    def _before_backward(self, number: int | None) -> Any:
        def check(grads: Any) -> None:
            if self.number != number:
                raise StateError(
                    "backward through checkpointed layers whose path is no longer active: they "
                    "would be computed again without it",
                    "call backward() inside the with, or while the same path is active; or turn "
                    "checkpointing off",
                )

        return check


# ---------------------------------------------------------------------- a forward's inputs
def _main_inputs_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Return a forward's tensors: transformers' main input first, then the other keywords."""
    # The main input has the rows; masks and positions may have other first axes.
    main = getattr(module, "main_input_name", "")
    return _tensors([*args, kwargs.get(main), *kwargs.values()])


def _tensors(*given: Any) -> list[Tensor]:
    """Return the tensors in some values, in order, those inside lists and mappings too."""
    found = []
    for value in _leaves(given):
        if isinstance(value, Tensor):
            found.append(value)
    return found


def _caches(*given: Any) -> list[Any]:
    """Return the key/value caches in some values: objects with a `get_seq_length`, as
    transformers' caches have.
    """
    found = []
    for value in _leaves(given):
        if not isinstance(value, Tensor) and callable(getattr(value, "get_seq_length", None)):
            found.append(value)
    return found


def _leaves(given: Any) -> list[Any]:
    """Return the values in lists, tuples and mappings, in order."""
    found = []
    waiting = [given]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, (list, tuple, Mapping)):
            found.append(value)
        elif id(value) not in seen:  # a list may hold itself
            seen.add(id(value))
            inside = value.values() if isinstance(value, Mapping) else value
            waiting.extend(reversed(list(inside)))
    return found


def _is_filled(cache: Any) -> bool:
    """Return whether a cache holds state of an earlier forward.

    A recurrent layer keeps a state and no tokens, so it has no length. A cache without attention
    layers has none either: transformers raises if its length is asked for.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, (list, tuple)):
        return bool(cache.get_seq_length() > 0)
    for layer in layers:
        length = getattr(layer, "get_seq_length", None)
        if callable(length) and bool(length() > 0):
            return True
        states = getattr(layer, "has_previous_state", False)
        if any(states.values()) if isinstance(states, Mapping) else bool(states):
            return True
    return False
