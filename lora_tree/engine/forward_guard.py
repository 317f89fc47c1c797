"""What has to hold around the base's own forward while paths run beside its weights.

Before it: a key/value cache goes on only under the path that filled it, and a routed batch has the rows that were
declared. After it: where layers are checkpointed, their forward runs again in backward, with whatever side paths are
there then; a backward that would meet other ones is refused.

What was filled or recorded is known by the mark of its plan or route, a number, which is noted on caches (so that a
copy of a cache is as good as the cache) and in the backward's hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..callers import called_from
from ..errors import StateError
from ..sites import Site
from .batch_axis import BatchAxis
from .unpromised import any_saved_tensor_hook

__all__ = ["ForwardGuard"]

_NOTE = "_lora_tree_filled_by"
_CHECKPOINT = "torch.utils.checkpoint"


class ForwardGuard:
    """The watch at the base's own forward."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._handles: list[RemovableHandle] = []
        self._axis: BatchAxis | None = None
        self._mixed: Sequence[Site] = ()
        self._admitted = False
        self._recording = False
        self._checkpointed = False
        self.number: int | None = None

    def watch(
        self, mark: int | None, axis: BatchAxis | None = None, mixed: Sequence[Site] = ()
    ) -> None:
        """From now on the base runs under what ``mark`` says, one number for one behaviour; None: nothing to watch.

        Args:
            mark: the plan's or the route's.
            axis: how a routed batch lies.
            mixed: the sites where its rows do not all owe the same.
        """
        self._axis, self._mixed = axis, mixed
        if mark is None:
            self.number = None
            while self._handles:
                self._handles.pop().remove()
            return
        self.number = mark
        if not self._handles:
            # One after the other into the list, so that a failure between them leaves no hook unknown.
            self._handles += [self._base.register_forward_pre_hook(self._before, with_kwargs=True)]
            after = self._base.register_forward_hook(
                self._after, with_kwargs=True, always_call=True
            )
            self._handles += [after]

    def side_path_runs(self) -> None:
        """A side path runs now: note whether it will run again in backward."""
        if self._recording and not self._checkpointed:
            self._checkpointed = _in_checkpoint()

    def guard(self, out: Tensor) -> None:
        """Watch over a side path that ran outside of the base's own forward: a loss may be taken through a part of it.

        Args:
            out: what the side path returned. Its layer may run again in backward.
        """
        if not self._recording and out.grad_fn is not None and _in_checkpoint():
            out.grad_fn.register_prehook(self._guard(self.number))

    @property
    def probing(self) -> bool:
        """A copy of the base runs on shapes, to see where the rows are."""
        return self._axis is not None and self._axis.probing

    # ------------------------------------------------------------------ private
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._admitted = False
        for cache in _caches((args, kwargs)):
            if getattr(cache, _NOTE, None) != self.number and _is_filled(cache):
                raise StateError(
                    "this key/value cache was filled under another path, or before this one was activated",
                    "start with an empty cache, or fill it again under what is active now",
                )
        inputs = list(_tensors(_main_first(module, args, kwargs)))
        if self._axis is not None:
            self._axis.begin(inputs)
            self._axis.probe(module, args, kwargs, inputs, self._mixed)
        self._recording, self._checkpointed, self._admitted = torch.is_grad_enabled(), False, True

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if self._axis is not None:
            self._axis.end()
        if not self._admitted:
            return  # torch calls this after a forward that was refused, too
        for cache in _caches((args, kwargs, out)):
            setattr(cache, _NOTE, self.number)
        if self._checkpointed:
            for tensor in _tensors(out):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(self._guard(self.number))
        self._recording = False

    def _guard(self, number: int | None) -> Any:
        def before_backward(grads: Any) -> None:
            if self.number != number:
                raise StateError(
                    "backward through checkpointed layers after their path was left: they would run again without it",
                    "call backward() inside the with, or while the same path is active; or turn checkpointing off",
                )

        return before_backward


def _in_checkpoint() -> bool:
    """Whether the layer that runs now will run again in backward."""
    if torch.is_grad_enabled() and not any_saved_tensor_hook():
        return False
    return called_from(_CHECKPOINT)


def _main_first(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """A forward's arguments, with what transformers calls the main input before the other ones."""
    main = getattr(module, "main_input_name", "")
    return [*args, kwargs.get(main), *kwargs.values()]


def _tensors(of: Any) -> Iterator[Tensor]:
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, (list, tuple)):
        for each in of:
            yield from _tensors(each)
    elif isinstance(of, Mapping):
        yield from _tensors(list(of.values()))


def _is_filled(cache: Any) -> bool:
    """Whether a cache holds something of an earlier forward.

    A recurrent layer keeps a state and no tokens, so it has no length; a cache without attention layers has none either
    (transformers raises where it is asked for one).
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


def _caches(of: Any) -> Iterator[Any]:
    """transformers' caches, and what looks like them."""
    if isinstance(of, (list, tuple)):
        for each in of:
            yield from _caches(each)
    elif isinstance(of, Mapping):
        yield from _caches(list(of.values()))
    elif callable(getattr(of, "get_seq_length", None)):
        yield of
