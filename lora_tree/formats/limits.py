"""Limits on untrusted files, which are checked before any work is done on them.

Each is far above the needs of real files, and bounds the time and memory that a file can cost.
docs/folder.md lists them.
"""

from __future__ import annotations

__all__ = [
    "CONFIG_BYTES",
    "HEADER_BYTES",
    "JSON_DEPTH",
    "JSON_VALUES",
    "LOCK_BYTES",
    "TENSORS",
    "YAML_BYTES",
    "YAML_VALUES",
]

LOCK_BYTES = 64 << 20  # tree.lock and the commit record; 10,000 nodes take 6 MB
YAML_BYTES = 2 << 20  # tree.yaml; 10,000 nodes take some 400 kB
YAML_VALUES = 200_000  # keys and values in it
CONFIG_BYTES = 16 << 20  # adapter_config.json
HEADER_BYTES = 100_000_000  # of a safetensors file: the format's own limit
TENSORS = 200_000  # in one adapter; a pair for each expert of the largest mixtures is some 140,000
JSON_VALUES = 2_000_000  # commas and brackets in one JSON text
JSON_DEPTH = 32
