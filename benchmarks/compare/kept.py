"""Results of single runs, kept in a folder that the user names, so that hours can be interrupted.

    kept/base-3f2a….safetensors     the base, which every run reads
    kept/run-81c0….json             one run: its inputs and its result

A run is named by the hash of everything that its result depends on: the base's weights, the tokens
that it trains on and is measured on, ranks, settings, seed. So runs of several commands share a
folder, a finished run is never repeated, and an interrupted one leaves no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from lora_tree.folder import disk

__all__ = ["NOWHERE", "Kept", "mark"]


@dataclass(frozen=True)
class Kept:
    """A folder with results; None keeps nothing."""

    folder: Path | None = None

    def result(self, about: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Return the result of ``make``, as JSON: from its file, or made now and kept.

        Args:
            about: everything that the result depends on, as JSON.
        """
        if self.folder is None:
            return make()
        told = json.dumps(about, sort_keys=True)
        file = self.folder / f"run-{_short(told.encode())}.json"
        if file.exists():
            return json.loads(file.read_bytes())["result"]
        made = make()
        record = {"about": about, "result": made}
        self._write(file, json.dumps(record, indent=1).encode())
        return made

    def weights(self, about: Mapping[str, Any], model: Any, train: Callable[[], None]) -> None:
        """Give ``model`` the weights that ``train`` trains into it: from their file, or now."""
        if self.folder is None:
            train()
            return
        told = json.dumps(about, sort_keys=True)
        file = self.folder / f"base-{_short(told.encode())}.safetensors"
        if file.exists():
            model.load_state_dict(load(file.read_bytes()))
            return
        train()
        self._write(file, save(model.state_dict()))

    def _write(self, file: Path, data: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.replace(file, data)  # whole or not at all


NOWHERE = Kept()


def mark(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the tensors' names and numbers."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
