"""``lora-tree schema``: the JSON schema of tree.yaml, for editors."""

from __future__ import annotations

from ...folder import json_schema
from ..console import print_json

__all__ = ["schema"]


def schema() -> None:
    """Print the JSON schema of tree.yaml."""
    print_json(json_schema())
