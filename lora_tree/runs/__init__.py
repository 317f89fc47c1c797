"""Training runs over a tree: rows from JSON lines, a plain loop that resumes bit for bit, and what it came to."""

from .evaluation import LossMatrix, evaluate
from .loop import Run, StepLosses
from .promotion import promote
from .rows import Row, read_rows
from .settings import Settings

__all__ = ["LossMatrix", "Row", "Run", "Settings", "StepLosses", "evaluate", "promote", "read_rows"]
