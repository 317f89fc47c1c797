"""A hook of this package on a module of a base.

A hook reads what is active now, in this process. So a pickle can't hold it, and Python's own error
about a local function would not say what to do. A deep copy of a base gets a hook too, which
refuses to run there (`raise_for_copy` in `side.py`).
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NoReturn

from ..errors import StateError

__all__ = ["Hook"]


class Hook(functools.partial[Any]):
    """A function as a hook. A partial, because calling one costs no further frame of Python.

    Args:
        function: what the hook runs.
        *first: its first arguments.

    >>> Hook(max, 1)(2)
    2
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        # As Python copies functions and methods: a method's owner is copied along with the base.
        return Hook(copy.deepcopy(self.func, memo), *copy.deepcopy(self.args, memo))

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled.

        Raises:
            StateError: always.
        """
        raise StateError(
            "the base can't be pickled now: lora_tree has hooks on it, which work in this process "
            "only",
            "to keep its weights: torch.save(base.state_dict(), file)",
            "to pickle the base itself, make it bare first: model.deactivate(), or after prepare() "
            "model.detach()",
        )
