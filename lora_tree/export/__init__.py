"""Hand-over: a path as one adapter of the form that every engine reads, or merged into a checkpoint of its own."""

from .checkpoint import MergedCheckpoint, export_model
from .leaves import export_leaves
from .portable import ENGINE_RANKS, Portable, ceil_rank_of, portable

__all__ = [
    "ENGINE_RANKS",
    "MergedCheckpoint",
    "Portable",
    "ceil_rank_of",
    "export_leaves",
    "export_model",
    "portable",
]
