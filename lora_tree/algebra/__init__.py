"""The algebra of a tree: compare, cut, move and merge nodes. Values only: no base, no files.

core ─ deviation ─ sums ─┬─ difference                    what differs
                         ├─ gram ─ clusters ─ likeness    which nodes are alike
                         └─ …

Law: nothing here builds an (out, in) matrix, and every result says its error.
"""

from .clusters import Join
from .deviation import Deviation, deviation
from .difference import Diff, ModuleDiff, TreeDiff, diff, diff_paths, diff_trees
from .likeness import Likeness, similar

__all__ = [
    "Deviation",
    "Diff",
    "Join",
    "Likeness",
    "ModuleDiff",
    "TreeDiff",
    "deviation",
    "diff",
    "diff_paths",
    "diff_trees",
    "similar",
]
