"""A matrix of losses as a picture.

Each column runs from its best loss (dark) to its worst (light), because losses of different
domains can't be compared with each other. A loss that is not finite is grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..svg import Picture
from ..training.diverged import BASE_LABEL

__all__ = ["loss_map"]

CELL_WIDTH, CELL_HEIGHT = 76, 26
CHARACTER_WIDTH = 7  # of 11 px monospace, rounded up: a viewer chooses the font
MARGIN, HEADER_HEIGHT, FOOTER_HEIGHT = 8, 34, 30
DARKEST = (33, 102, 172)
GREY = "rgb(208,208,208)"
MOST_CHARACTERS = 10
"""Characters of a domain's name that fit over its column; a tooltip shows the whole name."""


def loss_map(
    paths: Sequence[str],
    domains: Sequence[str],
    losses: Sequence[Sequence[float]],
    unit: str = "nats per token",
) -> str:
    """Return an SVG document.

    Args:
        paths: of the rows; ``""`` is the bare base.
        domains: of the columns.
        losses: (paths, domains).
        unit: of the losses.

    >>> picture = loss_map(["", "fr"], ["fr"], [[2.0], [1.0]])
    >>> picture.count("<rect"), "1.00" in picture
    (2, True)
    """
    picture = Picture()
    longest = max(len(path) for path in (BASE_LABEL, *paths))
    left = MARGIN + CHARACTER_WIDTH * longest
    for j, domain in enumerate(domains):
        name = domain or BASE_LABEL
        centre = left + CELL_WIDTH * j + CELL_WIDTH // 2
        picture.text(centre, HEADER_HEIGHT - 10, _short(name), anchor="middle", tip=name)
    # A cell's shade depends on its column, so the losses are transposed: one tuple per domain.
    columns = list(zip(*losses, strict=True))
    for i, path in enumerate(paths):
        top = HEADER_HEIGHT + CELL_HEIGHT * i
        baseline = top + 17
        picture.text(left - 6, baseline, path or BASE_LABEL, anchor="end")
        for j, column in enumerate(columns):
            x = left + CELL_WIDTH * j
            fill, ink = _shade(column[i], column)
            picture.box(x, top, CELL_WIDTH, CELL_HEIGHT, fill=fill)
            number = f"{column[i]:.2f}"
            picture.text(x + CELL_WIDTH // 2, baseline, number, anchor="middle", fill=ink)
    width = left + CELL_WIDTH * len(domains) + MARGIN
    height = HEADER_HEIGHT + CELL_HEIGHT * len(paths) + FOOTER_HEIGHT
    picture.text(left, height - 10, f"{unit}; lower is better")
    return picture.document(width, height)


def _shade(loss: float, column: Sequence[float]) -> tuple[str, str]:
    """Return the colour of a loss's cell, and of the number in it."""
    if not math.isfinite(loss):
        return GREY, "#000"
    finite = [other for other in column if math.isfinite(other)]
    low = min(finite)
    spread = max(finite) - low
    # A column of equal losses has no worst one: all of them are the best.
    good = 1 - (loss - low) / spread if spread > 0 else 1.0
    red, green, blue = (round(255 - good * (255 - dark)) for dark in DARKEST)
    # White letters on the darker half: black ones could not be read there.
    ink = "#fff" if good > 0.55 else "#000"
    return f"rgb({red},{green},{blue})", ink


def _short(name: str) -> str:
    # The last part of a path says most: domains below one node share the rest.
    last = name.rpartition("/")[2]
    return last if len(last) <= MOST_CHARACTERS else f"{last[: MOST_CHARACTERS - 1]}…"
