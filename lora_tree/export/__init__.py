"""Hand-over of a path: as one adapter that every engine reads, or as a merged checkpoint."""

from .checkpoint import MergedCheckpoint, export_model
from .extract import Extracted, extract
from .leaves import export_leaves
from .portable import ENGINE_RANKS, Portable, ceil_rank_of, portable

__all__ = [
    "ENGINE_RANKS",
    "Extracted",
    "MergedCheckpoint",
    "Portable",
    "ceil_rank_of",
    "export_leaves",
    "export_model",
    "extract",
    "portable",
]
