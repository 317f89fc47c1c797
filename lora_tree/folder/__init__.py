"""The folder is the tree: reading, locking, checking and saving a folder of nested PEFT adapters.

disk ─ commit ─ bounds ─ scan ─┐
yamlfile ──────────────────────┼─ resolve ─ source ─ opening ─ memory ─┬─ saving ─ relock
lockfile ─ trained ────────────┘                              alone ──┴─ api: load, lock, check
"""

from .api import SkippedWarning, StaleWarning, check, load, lock, notes, relock, survey
from .problem import Problem
from .yamlfile import json_schema

__all__ = [
    "Problem",
    "SkippedWarning",
    "StaleWarning",
    "check",
    "json_schema",
    "load",
    "lock",
    "notes",
    "relock",
    "survey",
]
