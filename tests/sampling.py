"""Mark the tests that `make test` leaves to `make test-slow`.

Some laws are tried at every point, in every form, with thousands of random examples, or by several
processes that train. `make test` tries a sample of them; the rest is marked ``slow``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["sampled", "slow"]

slow = pytest.mark.slow


def sampled(values: Iterable[Any], sample: Collection[Any]) -> list[Any]:
    """Return values for `parametrize`; those outside the sample are slow.

    Args:
        values: of one parameter, or tuples of several.
        sample: those of them that `make test` tries.
    """
    values = list(values)
    assert all(each in values for each in sample), "a sample is a part of the values"
    found = []
    for value in values:
        if value in sample:
            found.append(value)
        elif isinstance(value, tuple):
            found.append(pytest.param(*value, marks=slow))
        else:
            found.append(pytest.param(value, marks=slow))
    return found
