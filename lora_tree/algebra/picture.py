"""A heat map of cosines, as SVG: 1 is dark blue, 0 white, −1 dark red."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..errors import plural
from ..svg import Picture

__all__ = ["heat_map"]

_MOST_CELLS = 120
"""The most cells in a row. With more adapters several share a cell, so that a browser can still
draw the picture."""

_CELL = 14
_LETTER = 7
_LONGEST_NAME = 60


def heat_map(names: Sequence[str], cosines: Tensor, error: float = 0.0) -> str:
    """Return an SVG document.

    Args:
        names: of rows and columns; written only if no two adapters share a cell.
        cosines: (n, n).
        error: the standard error of a cosine, written below the map.
    """
    count = len(names)
    side = min(count, _MOST_CELLS)
    # A browser takes seconds to draw more than some thousand boxes.
    shown = cosines
    labels = [_shortened(name) for name in names]
    if count > side:
        # A cell stands for several adapters now, so no name belongs to it.
        shown, labels = adaptive_avg_pool2d(cosines[None], side)[0], []
    left = 10 + _LETTER * max((len(label) for label in labels), default=0)
    picture = Picture()
    for row, label in enumerate(labels):
        picture.text(left - 6, _CELL * row + 11, label, anchor="end")
    for row, cells in enumerate(shown.tolist()):
        for column, cosine in enumerate(cells):
            x, y = left + _CELL * column, _CELL * row
            picture.box(x, y, _CELL, _CELL, fill=_colour(cosine))
    caption = f"{plural(count, 'adapter')}; blue: cosine 1, white: 0, red: -1"
    if error:
        caption += f"; each ± {error:.2g}"
    if count > side:
        caption += f"; {count / side:.1f} adapters a cell"
    picture.text(4, _CELL * side + 20, caption)
    return picture.document(
        max(left + _CELL * side + 10, _LETTER * len(caption)), _CELL * side + 30
    )


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _colour(cosine: float) -> str:
    pale = round(255 * (1.0 - min(1.0, abs(cosine))))
    return f"rgb({pale},{pale},255)" if cosine >= 0 else f"rgb(255,{pale},{pale})"
