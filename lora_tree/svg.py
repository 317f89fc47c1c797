"""Small SVG pictures: boxes, lines and text, written without a drawing library.

Names of nodes, bases and folders come out of files that strangers wrote, and a browser runs an SVG
document as it runs a page. So a name reaches the document in one place only, escaped.

Law: whatever a name holds, the document is well-formed, and it runs, loads and links to nothing.
"""

from __future__ import annotations

import html
from typing import Literal

from .errors import printable

__all__ = ["Picture"]

Anchor = Literal["start", "middle", "end"]


class Picture:
    r"""An SVG document that grows shape by shape; lengths are in pixels.

    Args:
        font_size: the size of all text; the font is the viewer's monospace one.

    >>> picture = Picture()
    >>> picture.text(4, 14, "</text><script>\x1b")
    >>> picture.document(80, 20).splitlines()[1]
    '<text x="4" y="14" fill="#000" text-anchor="start">&lt;/text&gt;&lt;script&gt;\\x1b</text>'
    """

    def __init__(self, *, font_size: int = 11) -> None:
        self._font_size = font_size
        self._shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, *, fill: str) -> None:
        """Draw a filled box; ``x`` and ``y`` are its left and upper edge."""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'fill="{_text(fill)}"/>'
        )

    def line(self, *points: tuple[float, float], stroke: str) -> None:
        """Draw straight lines from point to point."""
        joined = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._shapes.append(f'<polyline points="{joined}" fill="none" stroke="{_text(stroke)}"/>')

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        anchor: Anchor = "start",
        fill: str = "#000",
        bold: bool = False,
        tip: str = "",
    ) -> None:
        """Write one line; ``y`` is its baseline, and ``tip`` is shown under the pointer."""
        weight = ' font-weight="bold"' if bold else ""
        title = f"<title>{_text(tip)}</title>" if tip else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" fill="{_text(fill)}" text-anchor="{anchor}"{weight}>'
            f"{title}{_text(content)}</text>"
        )

    def document(self, width: float, height: float) -> str:
        """Return the whole document, ``width`` by ``height``."""
        # Without the namespace a browser shows the file as a tree of XML, and draws nothing.
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'font-family="monospace" font-size="{self._font_size}">'
        )
        return "\n".join([head, *self._shapes, "</svg>"]) + "\n"


def _text(text: str) -> str:
    """Escape a text for XML. Control characters become visible: XML can't hold most of them."""
    return html.escape(printable(text))
