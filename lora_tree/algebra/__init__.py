"""The algebra of a tree: compare, cut, move and merge nodes. Values only: no base, no files.

core ─ deviation ─ sums ─┬─ difference                            what differs
                         ├─ gram ─ clusters ─ picture ─ likeness  which nodes are alike
                         └─ edit ─┬─ cutting                      squash, split
                                  ├─ moving                       pick, graft, rebase
                                  ├─ elementwise ─ merging        merge
                                  ├─ sharing                      hoist
                                  ├─ shared_fit ─ growing         grow
                                  ├─ absorbing                    absorb
                                  └─ compression                  compress

Law: nothing here builds an (out, in) matrix, except with ``space="dense"``; and every result states
its error.
"""

from .absorbing import Absorbed, absorb
from .clusters import Join
from .compression import Compressed, compress
from .cutting import split, squash
from .deviation import Deviation, deviation
from .difference import Diff, ModuleDiff, TreeDiff, diff, diff_paths, diff_trees
from .edit import Edited
from .growing import Grown, grow
from .likeness import Likeness, similar
from .merging import Merged, merge, merge_paths
from .moving import graft, pick, rebase, rebase_all
from .sharing import hoist
from .staleness import made_stale

__all__ = [
    "Absorbed",
    "Compressed",
    "Deviation",
    "Diff",
    "Edited",
    "Grown",
    "Join",
    "Likeness",
    "Merged",
    "ModuleDiff",
    "TreeDiff",
    "absorb",
    "compress",
    "deviation",
    "diff",
    "diff_paths",
    "diff_trees",
    "graft",
    "grow",
    "hoist",
    "made_stale",
    "merge",
    "merge_paths",
    "pick",
    "rebase",
    "rebase_all",
    "similar",
    "split",
    "squash",
]
