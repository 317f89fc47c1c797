"""Write a path or blend as an adapter for mlx-lm, which counts layers from the end of the base."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch
from torch import nn

from ..adapter import Adapter
from ..blend import Blend
from ..folder.saving.other_formats import save_mlx
from ..storage import as_path
from ..tree import AdapterTree

__all__ = ["export_mlx"]

_LAYER = re.compile(r"(.+?)\.\d+\.")


def export_mlx(
    tree: AdapterTree,
    blend: Blend,
    to: str | os.PathLike[str],
    *,
    base: nn.Module | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Write a path or blend as mlx-lm's folder; return the adapter that was written.

    Args:
        tree: the tree.
        blend: a path or a blend.
        to: the folder; its two files appear together or not at all.
        base: the model, possibly on the meta device, for its number of layers and the names of its
            modules. Without it the last adapted layer is taken for the base's last, and mlx-lm
            refuses the file if that is wrong.
        rank, max_error, dtype: as for `AdapterTree.flatten`.

    Raises:
        PathError, SpecError, ShapeMismatch, BaseMismatch: as `AdapterTree.flatten`.
        FormatError: a module has no key in this format; names it.
        FolderError: the folder can't be written.
    """
    flat = tree.flatten(blend, rank, max_error=max_error, dtype=dtype, base=base)
    layers = None if base is None else _layers_of(base, flat.modules)
    save_mlx(flat, as_path(to), layers=layers)
    return flat


def _layers_of(base: nn.Module, modules: Iterable[str]) -> int | None:
    """Return the length of the list of layers that adapted modules lie in; None if none does."""
    for name in modules:
        found = _LAYER.match(name)
        if found is not None:
            layers = base.get_submodule(found[1])
            return len(layers) if isinstance(layers, nn.ModuleList) else None
    return None
