"""The folder is the tree: reading, locking, checking and saving a folder of nested PEFT adapters.

    files ─→ adapters/ ─→ reading/ ─→ AdapterTree             nothing is written
    AdapterTree ─→ saving/ ─→ Changes ─→ transactions/        all files change, or none

    past/         earlier versions of nodes, and the records of training runs
    transfer/     the files of a tree that leave this machine, or arrive

Most files beside the rooms are further in: the disk, and the files that describe a tree, as bytes
and as values. `folder_storage.py` is further out: it gives the values access to files.
"""

from .folder_storage import FolderStorage
from .history_log import Version
from .past.cleaning import Freed, gc
from .past.run_records import NodeMetric, NodeOutcome, PathMetric, RunRecord, run_records
from .past.versions import (
    Restored,
    history,
    load_versions,
    restore,
    version_beside,
    versions_beside,
)
from .problem import Problem
from .reading.checking import check, moved_branches, notes
from .reading.loading import SkippedWarning, StaleWarning, load, survey
from .saving.locking import lock, relock
from .saving.save_tree import HistoryWarning
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
