"""Training runs over a tree: rows from JSON lines, a loop that resumes bit for bit, evaluation."""

from .blaming import Bisection, Blame, Part, bisect, blame
from .comparison import Comparison, SliceLosses, compare_trees
from .evaluation import LossMatrix, evaluate
from .held_back import Verdict
from .loop import Run
from .promotion import promote, promotion_note
from .retraining import Retraining, RetrainJob, plan_retraining
from .rows import Row, read_rows
from .run_comparison import RunComparison, compare_runs
from .settings import Settings
from .step import StepLosses
from .watching import HeldOut

__all__ = [
    "Bisection",
    "Blame",
    "Comparison",
    "HeldOut",
    "LossMatrix",
    "Part",
    "RetrainJob",
    "Retraining",
    "Row",
    "Run",
    "RunComparison",
    "Settings",
    "SliceLosses",
    "StepLosses",
    "Verdict",
    "bisect",
    "blame",
    "compare_runs",
    "compare_trees",
    "evaluate",
    "plan_retraining",
    "promote",
    "promotion_note",
    "read_rows",
]
