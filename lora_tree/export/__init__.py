"""Export a path: as one adapter that every engine reads, or as a merged checkpoint."""

from .checkpoint import MergedCheckpoint, export_model
from .extract import Extracted, extract
from .gguf import LlamaRequest, export_gguf, export_gguf_nodes, llama_request
from .leaves import export_leaves
from .merged_check import MergedCheck, TensorCheck, check_merged
from .mlx import export_mlx
from .portable import Portable, portable
from .portable_rank import ENGINE_RANKS, ceil_rank_of

__all__ = [
    "ENGINE_RANKS",
    "Extracted",
    "LlamaRequest",
    "MergedCheck",
    "MergedCheckpoint",
    "Portable",
    "TensorCheck",
    "ceil_rank_of",
    "check_merged",
    "export_gguf",
    "export_gguf_nodes",
    "export_leaves",
    "export_mlx",
    "export_model",
    "extract",
    "llama_request",
    "portable",
]
