"""Walks up the call stack, each under the name of the question it answers.

A hook or a plugin is called with arguments that do not say who is calling: a trainer,
`save_pretrained`, a checkpointed layer that will run again. The stack says it, and these
functions are the only ones that look.

A frame keeps the locals of its function alive, tensors included, so none is returned or stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import CodeType, FrameType
from typing import Any

__all__ = ["called_by", "called_from", "caller_in", "caller_object", "locals_of_call"]


def called_by(function: str) -> bool:
    """Return whether a function of that name is among the callers.

    >>> def save_pretrained(): return called_by("save_pretrained")
    >>> save_pretrained(), called_by("save_pretrained")
    (True, False)
    """
    return _nearest(lambda frame: frame.f_code.co_name == function) is not None


def called_from(module: str) -> bool:
    """Return whether a function of that module, given by its full name, is among the callers.

    >>> called_from("doctest"), called_from("torch.utils.checkpoint")
    (True, False)
    """
    return _nearest(lambda frame: _module(frame) == module) is not None


def caller_object(matches: Callable[[Any], bool]) -> Any:
    """Return the nearest caller's ``self`` that matches; None if there is none.

    Args:
        matches: called with the ``self`` of each caller, from the nearest outward; with None for a
            function without one.

    >>> class Engine:
    ...     def run(self): return caller_object(lambda owner: isinstance(owner, Engine))
    >>> engine = Engine()
    >>> engine.run() is engine
    True
    """
    frame = _nearest(lambda frame: matches(frame.f_locals.get("self")))
    return None if frame is None else frame.f_locals.get("self")


def caller_in(modules: Collection[str], *, until: CodeType) -> str | None:
    """Return the name of the nearest caller's class, of callers in some modules only.

    A caller that is a plain function is given by its own name; None if there is no caller.

    Args:
        modules: full names of modules.
        until: the code of a function that ends the walk; the callers of that function are not
            asked.

    >>> runner = caller_in(["doctest"], until=(lambda: None).__code__)
    >>> runner.lower().endswith("doctestrunner")  # pytest has a kind of its own
    True
    """

    def ends(frame: FrameType) -> bool:
        return frame.f_code is until or _module(frame) in modules

    frame = _nearest(ends)
    if frame is None or frame.f_code is until:
        return None
    owner = frame.f_locals.get("self")
    if owner is None:  # a plain function
        return frame.f_code.co_name
    return type(owner).__name__


def locals_of_call(method: str, owner: object, names: Collection[str]) -> dict[str, Any] | None:
    """Return local variables of the nearest call of a method; None if no such call is running.

    Args:
        method: its name.
        owner: its ``self``.
        names: the variables wanted. Ask for numbers only: the result outlives the call, and would
            keep a tensor alive.

    >>> class Pipe:
    ...     def __call__(self, images): return locals_of_call("__call__", self, ["images"])
    >>> Pipe()(4), locals_of_call("__call__", Pipe(), ["images"])
    ({'images': 4}, None)
    """

    def runs(frame: FrameType) -> bool:
        # By identity, because another object of the class may be running as well: `__call__` is a
        # common name, and one call may contain another.
        return frame.f_code.co_name == method and frame.f_locals.get("self") is owner

    frame = _nearest(runs)
    if frame is None:
        return None
    variables = frame.f_locals
    return {name: variables[name] for name in names if name in variables}


def _nearest(matches: Callable[[FrameType], bool]) -> FrameType | None:
    # The first frames are this module's own. No caller asks for its functions, so they need not be
    # skipped.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not matches(frame):
        frame = frame.f_back
    return frame


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
