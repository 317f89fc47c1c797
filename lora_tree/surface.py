"""The map: every name that ``lora_tree`` offers.

It is read at the first use of a name (see ``__init__.py``), so that ``import lora_tree`` alone does
not wait for torch.
"""

from .adapter import Adapter
from .algebra import (
    Compressed,
    Deviation,
    Diff,
    Edited,
    Likeness,
    Merged,
    ModuleDiff,
    TreeDiff,
    compress,
    deviation,
    diff,
    diff_paths,
    diff_trees,
    graft,
    hoist,
    made_stale,
    merge,
    merge_paths,
    pick,
    rebase,
    rebase_all,
    similar,
    split,
    squash,
)
from .base_names import BaseWarning
from .blend import Blend, parse_blend
from .combining import combine
from .export import (
    ENGINE_RANKS,
    Extracted,
    LlamaRequest,
    MergedCheckpoint,
    Portable,
    ceil_rank_of,
    export_gguf,
    export_gguf_nodes,
    export_leaves,
    export_model,
    extract,
    llama_request,
    portable,
)
from .fit import clashes, misfits
from .folder import Problem, SkippedWarning, StaleWarning, check, load, lock
from .integrations.hub import Pulled, Pushed, pull, push
from .lowrank import Layout, LowRank, Truncated, concat, inner
from .model import MergedWarning, State, TreeModel, attach
from .override import Override, OverrideWarning
from .spec import LoraSpec
from .training.levels import weight_decays
from .training.losses import PathLoss, path_loss, token_counts
from .training.sampling import PathSampler
from .tree import AdapterTree, Node
from .weights import ModuleWeights, Weight

# Written out and not computed: type checkers read it as text, and follow the `import *` of
# `__init__.py` by it.
__all__ = [
    "ENGINE_RANKS",
    "Adapter",
    "AdapterTree",
    "BaseWarning",
    "Blend",
    "Compressed",
    "Deviation",
    "Diff",
    "Edited",
    "Extracted",
    "Layout",
    "Likeness",
    "LlamaRequest",
    "LoraSpec",
    "LowRank",
    "Merged",
    "MergedCheckpoint",
    "MergedWarning",
    "ModuleDiff",
    "ModuleWeights",
    "Node",
    "Override",
    "OverrideWarning",
    "PathLoss",
    "PathSampler",
    "Portable",
    "Problem",
    "Pulled",
    "Pushed",
    "SkippedWarning",
    "StaleWarning",
    "State",
    "TreeDiff",
    "TreeModel",
    "Truncated",
    "Weight",
    "attach",
    "ceil_rank_of",
    "check",
    "clashes",
    "combine",
    "compress",
    "concat",
    "deviation",
    "diff",
    "diff_paths",
    "diff_trees",
    "export_gguf",
    "export_gguf_nodes",
    "export_leaves",
    "export_model",
    "extract",
    "graft",
    "hoist",
    "inner",
    "llama_request",
    "load",
    "lock",
    "made_stale",
    "merge",
    "merge_paths",
    "misfits",
    "parse_blend",
    "path_loss",
    "pick",
    "portable",
    "pull",
    "push",
    "rebase",
    "rebase_all",
    "similar",
    "split",
    "squash",
    "token_counts",
    "weight_decays",
]
