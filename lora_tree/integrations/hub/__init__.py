"""A tree on the model hub: pull brings one here, push takes one there. Each is all or nothing.

    org/zoo                       zoo/
      tree.yaml, tree.lock          the same bytes, but for the name of a base that is a folder here
      fr/adapter_config.json …      the same
      README.md, lora_tree.svg      written by push; never pulled
                                    .training, caches, notes, keys: never pushed

Law: neither overwrites a change that somebody else made. Each compares with the commit that the
folder was last pulled from, or pushed to (`seen_commit.py`).
"""

from __future__ import annotations

from .pulling import Pulled, pull
from .pushing import Pushed, push

__all__ = ["Pulled", "Pushed", "pull", "push"]
