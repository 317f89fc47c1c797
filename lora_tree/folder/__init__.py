"""The folder is the tree: reading, locking, checking and saving a folder of nested PEFT adapters.

reading     disk, bounds, lockfile, yamlfile; record → pending → scan → resolve
            source, bases → opening → nodes
deciding    last_seen, ownership, yaml_needs, history_change → decide → changes  it writes nothing
writing     writer, archive, carry_out → commit                          it decides nothing
the past    history_log: the earlier versions of nodes; archive: their files
the runs    run_records: reads the records of training; run_store: writes and removes them
the verbs   loading, saving, single_adapter, relocked → locking, checking, versions, cleaning;
            folder_storage installs them where the values look for files
"""

from .checking import check, moved_branches, notes
from .cleaning import Freed, gc
from .folder_storage import FolderStorage
from .history_log import Version
from .loading import SkippedWarning, StaleWarning, load, survey
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
