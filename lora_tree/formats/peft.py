"""Read and write PEFT folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

    read_adapter(config_file, weights_file, where=folder) → Adapter
    render(adapter) → {file name: its bytes};  peft_form(adapter): the same checks, no bytes

    peft_config     the config: scales, targets, kinds that are refused
    peft_keys       names of modules ↔ keys
    peft_named      keys that carry the adapter's own name, as a state dict's do
    peft_sorting    the keys of a file: factors, overrides, tensors of the base
    peft_outline    config and header → an adapter without numbers; peft_factors: one module of it
    peft_read       the files → the adapter
    peft_write      the adapter → the files; peft_fields: their config

Law: reading, writing and reading again gives bitwise equal factors and equal scales. Writing,
reading and writing again gives the same bytes.
"""

from __future__ import annotations

from .peft_keys import CONFIG, FILES, WEIGHTS
from .peft_named import adapter_name_of
from .peft_read import PICKLE, read_adapter, read_folder
from .peft_write import peft_form, render

__all__ = [
    "CONFIG",
    "FILES",
    "PICKLE",
    "WEIGHTS",
    "adapter_name_of",
    "peft_form",
    "read_adapter",
    "read_folder",
    "render",
]
