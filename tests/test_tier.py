"""One tier of a cache: what pins allow, and that its bytes add up."""

from __future__ import annotations

import threading

import pytest

import lora_tree as lt
from lora_tree.cache import Lru
from lora_tree.cache.link import Arrived
from lora_tree.cache.tier import Resident, Tier


def tier(*keys: str) -> Tier:
    """A tier with an adapter of 8 bytes under each key."""
    lock = threading.Condition()
    lock.acquire()  # as every caller of a tier does
    made = Tier("host", None, Lru(), lock)
    for key in keys:
        made.add(key, Resident(Arrived(lt.Adapter({})), 8), 0.0)
    return made


def test_an_adapter_is_discarded_only_after_its_last_pin() -> None:
    held = tier("a", "b")
    held.pin("a")
    held.pin("a")
    for _ in range(2):
        assert not held.discard_unpinned("a")
        with pytest.raises(AssertionError, match="'a' is pinned"):
            held.discard("a")
        assert held.find("a") is not None
        assert (held.stats().nodes, held.stats().in_use_bytes) == (2, 8)
        held.unpin("a")
    assert held.stats().in_use_bytes == 0
    assert held.discard_unpinned("a")
    assert held.find("a") is None
    assert (held.stats().nodes, held.stats().held_bytes) == (1, 8)
    held.discard("a")
    assert held.discard_unpinned("a")


def test_a_pin_that_is_taken_back_after_the_tier_was_cleared_counts_for_nothing() -> None:
    held = tier("a", "b")
    held.pin("a")
    held.clear()
    assert (held.stats().nodes, held.stats().held_bytes, held.stats().in_use_bytes) == (0, 0, 0)
    held.unpin("a")
    assert held.stats().in_use_bytes == 0
    assert held.busy_bytes() == 0
