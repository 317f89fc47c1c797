"""The components of a pipeline that adapters change: of a loaded one, or of the folder of one.

components_of(pipe)           the pipeline's own models, with their weights
pipeline_skeleton(folder)     the same models by their configs, with shapes and no memory
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...assembly import Assembly
from ...errors import SpecError, listing
from ...extras import foreign, need, open_pretrained
from ...storage import as_path
from ...system.reading import is_file
from .module_names import assembled

__all__ = ["components_of", "is_pipeline", "pipeline_skeleton"]

ADAPTABLE = re.compile(r"(?:unet|transformer|text_encoder)(?:_[23])?\Z")
MODEL_INDEX = "model_index.json"


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the components of a pipeline that adapters change: name → model.

    They are in the pipeline's own order.

    Raises:
        SpecError: it is no pipeline, or has none.
    """
    held = getattr(pipe, "components", None)
    if not isinstance(held, Mapping):
        raise SpecError(
            f"expected a DiffusionPipeline, got {type(pipe).__name__}",
            "a single model is attached by lora_tree.attach(tree, model)",
        )
    components: dict[str, nn.Module] = {}
    for name, component in held.items():
        if ADAPTABLE.match(name) and isinstance(component, nn.Module):
            components[name] = component
    if not components:
        raise SpecError(
            f"{type(pipe).__name__} has no component that takes adapters: it has {listing(held)}",
            "a pipeline's unet, transformer and text_encoder do",
        )
    return components


def pipeline_skeleton(folder: str | os.PathLike[str]) -> Assembly:
    """Return a pipeline's adaptable components from its folder's configs, with shapes, no memory.

    Args:
        folder: as ``pipe.save_pretrained`` writes it; with a ``model_index.json``.

    Raises:
        MissingExtra: diffusers or transformers is not installed.
        SpecError: it is no such folder, or names a class that these libraries do not have.
    """
    diffusers = need("diffusers", extra="diffusers", what="the components of a pipeline")
    transformers = need("transformers", extra="transformers", what="a pipeline's text encoders")
    with foreign(f"{folder}: diffusers can't read its {MODEL_INDEX}"), torch.device("meta"):
        index = diffusers.DiffusionPipeline.load_config(folder, local_files_only=True)
        made: dict[str, nn.Module] = {}
        for name, entry in index.items():
            if not ADAPTABLE.match(name) or None in (entry or [None]):
                continue  # a component that this pipeline does without
            library, kind = entry
            if library == "diffusers":
                model = getattr(diffusers, kind)
                config = model.load_config(folder, subfolder=name, local_files_only=True)
                made[name] = model.from_config(config).eval()
            else:
                model = getattr(transformers, kind)
                config = open_pretrained(
                    transformers.AutoConfig, folder, failed=f"no config of {name}", subfolder=name
                )
                made[name] = model(config).eval()
        pipeline = getattr(diffusers, index["_class_name"])
    return assembled(made, pipeline, name=os.fspath(folder))


def is_pipeline(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds a pipeline, as ``pipe.save_pretrained`` writes it."""
    return is_file(as_path(folder) / MODEL_INDEX)
