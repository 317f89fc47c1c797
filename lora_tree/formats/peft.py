"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``, in and out.

    read_adapter(config_file, weights_file, where=folder) → Adapter        render(adapter) → {file name: its bytes}

Read, write and read again: the factors are the same bits and the scales the same numbers. Write, read and write again:
the files are the same bytes.
"""

from __future__ import annotations

from .peft_keys import CONFIG, WEIGHTS
from .peft_read import read_adapter, read_folder
from .peft_write import render

__all__ = ["CONFIG", "WEIGHTS", "read_adapter", "read_folder", "render"]
