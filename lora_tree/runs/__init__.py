"""Training runs over a tree: rows from JSON lines, a loop that resumes bit for bit, evaluation."""

from .evaluation import LossMatrix, evaluate
from .held_back import Verdict
from .loop import Run
from .promotion import promote, promotion_note
from .rows import Row, read_rows
from .settings import Settings
from .step import StepLosses

__all__ = [
    "LossMatrix",
    "Row",
    "Run",
    "Settings",
    "StepLosses",
    "Verdict",
    "evaluate",
    "promote",
    "promotion_note",
    "read_rows",
]
