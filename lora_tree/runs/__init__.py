"""Training runs over a tree: rows from JSON lines, a plain loop that resumes bit for bit, and what it came to."""

from .evaluation import Matrix, evaluate
from .loop import Run, Step
from .promotion import promote
from .rows import Row, read_rows
from .settings import Settings

__all__ = ["Matrix", "Row", "Run", "Settings", "Step", "evaluate", "promote", "read_rows"]
