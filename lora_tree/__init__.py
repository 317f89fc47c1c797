"""lora_tree: LoRA adapters as a tree over one base model. This page is the map."""

from .adapter import Adapter, combine
from .blend import Blend, parse_blend
from .fit import clashes, misfits
from .folder import Problem, StaleWarning, check, load, lock
from .lowrank import Layout, LowRank, Truncated, concat, inner
from .model import MergedWarning, State, TreeModel, attach
from .spec import LoraSpec
from .training.losses import PathLoss, path_loss, token_counts
from .training.sampling import PathSampler
from .tree import AdapterTree, Node

__all__ = [
    "Adapter",
    "AdapterTree",
    "Blend",
    "Layout",
    "LoraSpec",
    "LowRank",
    "MergedWarning",
    "Node",
    "PathLoss",
    "PathSampler",
    "Problem",
    "StaleWarning",
    "State",
    "TreeModel",
    "Truncated",
    "attach",
    "check",
    "clashes",
    "combine",
    "concat",
    "inner",
    "load",
    "lock",
    "misfits",
    "parse_blend",
    "path_loss",
    "token_counts",
]
