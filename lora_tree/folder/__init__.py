"""The folder is the tree: reading, locking, checking and saving a folder of nested PEFT adapters.

reading     disk, bounds, lockfile, yamlfile; record → pending → scan → resolve
            source, bases → opening → nodes
deciding    seen, ownership, treeyaml → decide → changes           it writes nothing
writing     writer, carry → commit                                 it decides nothing
the verbs   saving, alone, relock → api, checking; edge puts them where the values look for files
"""

from .api import SkippedWarning, StaleWarning, load, lock, relock, survey
from .checking import check, notes
from .edge import FolderStorage
from .problem import Problem
from .yamlfile import json_schema

__all__ = [
    "FolderStorage",
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
