"""The folder is the tree: reading, locking, checking and saving a folder of nested PEFT adapters.

reading    disk, bounds · lockfile, yamlfile · record → pending → scan → resolve → source → opening
deciding   memory, ownership, treeyaml → decide → changes          it writes nothing
writing    writer, carry → commit                                  it decides nothing
the verbs  saving, alone, relock → api: load, lock, check
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
