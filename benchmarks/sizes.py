"""The sizes of the base and of the measurement.

They are kept apart from the models (`setting.py`), whose packages take seconds to import. A
benchmark that starts processes and needs no model should neither wait for these imports nor count
their memory.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "SMALL", "Size"]


@dataclass(frozen=True)
class Size:
    """The size of the base and of the measurement."""

    hidden: int
    layers: int
    r: int
    repeats: int
    nodes: int
    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.layers}-layer Llama, hidden {self.hidden}, r={self.r} on seven projections"


FULL = Size(hidden=2048, layers=4, r=16, repeats=15, nodes=1000, rows=8, tokens=128)
SMALL = Size(hidden=64, layers=2, r=4, repeats=2, nodes=20, rows=2, tokens=8)
