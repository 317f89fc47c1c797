"""Does a tree pay? The same rows, learned by one pooled adapter, by flat adapters, and by a tree.

    bare            the base alone
    pooled          one adapter for all leaves
    flat            one adapter for each leaf
    tree, alone     one for all, one for each group, one for each leaf, each learning as if alone
    tree            the same, by the library's defaults over several levels: every row weighs alike,
                    nodes decay by depth, and most of the rank is in the root

Leaves are packages of the Python standard library, or manual pages by language and section if
these are installed. The base is the demo's, trained on the library's top-level modules. Every
system sees the same rows in the same order. Ranks are chosen so that either all systems train the
same number of parameters, or all have the same rank on a path, which is what serving a leaf costs.
The same number of settings is tried for each system, on all the data, with a separate seed, and
judged on a part of the training text. Held-out bits per byte decide.
"""

from .decays import decay_rules
from .late import late_leaf
from .runs import compare, curve
from .systems import FULL, SMALL, SYSTEMS, Outcome, Size, System, tree_of
from .tables import markdown

__all__ = [
    "FULL",
    "SMALL",
    "SYSTEMS",
    "Outcome",
    "Size",
    "System",
    "compare",
    "curve",
    "decay_rules",
    "late_leaf",
    "markdown",
    "tree_of",
]
