"""The folder is the tree: reading, locking, checking and saving a folder of nested PEFT adapters.

reading     disk, bounds, lockfile, yamlfile; record → pending → scan → resolve
            source, bases → opening → nodes
deciding    seen, ownership, treeyaml, keeping → decide → changes  it writes nothing
writing     writer, archive, carry → commit                        it decides nothing
the past    history: the earlier versions of nodes; archive: their files
the runs    run_records: reads the records of training; run_store: writes and removes them
the verbs   saving, alone, api, relock → locking, checking, versions, cleaning; edge installs them
            where the values look for files
"""

from .api import SkippedWarning, StaleWarning, load, survey
from .checking import check, moved_branches, notes
from .cleaning import Freed, gc
from .edge import FolderStorage
from .history import Version
from .locking import lock, relock
from .problem import Problem
from .run_records import NodeMetric, NodeOutcome, PathMetric, RunRecord, run_records
from .saving import HistoryWarning
from .versions import (
    Restored,
    history,
    load_versions,
    restore,
    version_beside,
    versions_beside,
)
from .yamlfile import json_schema

__all__ = [
    "FolderStorage",
    "Freed",
    "HistoryWarning",
    "NodeMetric",
    "NodeOutcome",
    "PathMetric",
    "Problem",
    "Restored",
    "RunRecord",
    "SkippedWarning",
    "StaleWarning",
    "Version",
    "check",
    "gc",
    "history",
    "json_schema",
    "load",
    "load_versions",
    "lock",
    "moved_branches",
    "notes",
    "relock",
    "restore",
    "run_records",
    "survey",
    "version_beside",
    "versions_beside",
]
