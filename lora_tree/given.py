"""Arguments as callers gave them, before anything has checked their types.

An annotation promises a type, and Python does not check it. A type checker believes the promise, so
it calls the code that tests an argument unreachable. `unchecked` takes the promise back for one
expression:

    if not isinstance(unchecked(order), Mapping):
        raise SpecError(...)

The variable itself keeps its annotated type, so the code after the check needs no cast.
"""

from __future__ import annotations

__all__ = ["unchecked"]


def unchecked(value: object) -> object:
    """Return the value as a plain ``object``, so that a type checker lets its type be tested.

    >>> unchecked("a path"), isinstance(unchecked(4), str)
    ('a path', False)
    """
    return value
