"""A heat map of cosines as SVG.

Names come out of files that strangers wrote: they are text, never markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..errors import printable

__all__ = ["heat_map"]

_MOST_CELLS = 120
"""Cells in a row; more adapters share cells, so that a browser opens a picture of any number."""

_CELL = 14
_LONGEST_NAME = 60


def heat_map(names: Sequence[str], cosines: Tensor, error: float = 0.0) -> str:
    """Return an SVG document: 1 is dark blue, 0 white, −1 dark red.

    Args:
        names: of rows and columns; written where every adapter has a row of its own.
        cosines: (n, n).
        error: the standard error of a cosine, told below the map.
    """
    count = len(names)
    side = min(count, _MOST_CELLS)
    shown = cosines.double()
    if count > side:
        shown = adaptive_avg_pool2d(shown[None], side)[0]
    labels = [_text(name) for name in names] if count == side else []
    left = 8 * max((len(name) for name in names[:side]), default=0) if labels else 0
    left = min(left, 8 * _LONGEST_NAME) + 10
    width, height = left + _CELL * side + 10, _CELL * side + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="monospace" font-size="12">',
        f"<title>{count} adapters, cosines of all pairs</title>",
    ]
    for row, cells in enumerate(shown.tolist()):
        top = _CELL * row
        if labels:
            parts.append(f'<text x="0" y="{top + 11}">{labels[row]}</text>')
        for column, cosine in enumerate(cells):
            x = left + _CELL * column
            box = f'x="{x}" y="{top}" width="{_CELL}" height="{_CELL}"'
            parts.append(f'<rect {box} fill="{_colour(cosine)}"><title>{cosine:.3f}</title></rect>')
    said = "blue: cosine 1; white: 0; red: -1"
    if error:
        said += f"; each ± {error:.2g}"
    if count > side:
        said += f"; a cell is the mean of {count / side:.1f} × {count / side:.1f} pairs"
    parts.append(f'<text x="{left}" y="{height - 14}">{said}</text></svg>')
    return "\n".join(parts) + "\n"


def _text(name: str) -> str:
    """A name as text of XML, which has no control characters, cut where it is long."""
    shown = printable(name)
    if len(shown) > _LONGEST_NAME:
        shown = f"{shown[: _LONGEST_NAME - 1]}…"
    return escape(shown, {'"': "&quot;"})


def _colour(cosine: float) -> str:
    strength = torch.tensor(cosine).nan_to_num().clamp(-1.0, 1.0).item()
    pale = round(255 * (1.0 - abs(strength)))
    return f"rgb({pale},{pale},255)" if strength >= 0 else f"rgb(255,{pale},{pale})"
