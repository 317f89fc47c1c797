"""Flattened paths in a folder, for engines that read adapters from a disk.

    tree, "fr/legal" ──▶ content 1f0c… ──▶ folder/1f0c…/    one ordinary PEFT adapter

Several processes may share the folder, under one budget.
"""

from .cache import ROUNDING, FlatCache, Flattened, NoRoom, TooLarge
from .content import FlatForm, is_blend

__all__ = [
    "ROUNDING",
    "FlatCache",
    "FlatForm",
    "Flattened",
    "NoRoom",
    "TooLarge",
    "is_blend",
]
