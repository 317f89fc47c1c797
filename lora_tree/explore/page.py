"""The page of a tree: one file of HTML that loads nothing.

    assets/page.html   the frame        ┐
    assets/page.css    light and dark   ├─▶ one string
    assets/page.js     the tree, panels │
    plotly.js          of the package   │
    facts              as JSON          ┘

Law: a name from a file never becomes markup. The page holds it in JSON that has no ``<``, and the
script puts it into the page as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ..extras import need

__all__ = ["explore_page"]

_ASSETS = resources.files(__package__) / "assets"


def explore_page(facts: Mapping[str, Any], *, playground: str | None = None) -> str:
    """Return the page as HTML.

    Args:
        facts: as `ExploreFacts.as_dict` returns them.
        playground: the address of the playground, to which the page links; None: no link.

    Raises:
        MissingExtra: plotly is not installed.

    >>> # Path("out.html").write_text(explore_page(explore_facts("zoo/").as_dict()))
    """
    offline = need("plotly.offline", extra="explore", what="the page of a tree")
    page_facts = {**facts, "playground": playground}
    parts = {
        "STYLE": _asset("page.css"),
        "PLOTLY": offline.get_plotlyjs(),
        "FACTS": _as_script_data(page_facts),
        "SCRIPT": _asset("page.js"),
    }
    page = _asset("page.html")
    for name, text in parts.items():
        head, mark, tail = page.partition(f"/*{name}*/")
        assert mark, f"page.html has no place for {name}"
        page = head + text + tail
    return page


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _as_script_data(facts: Mapping[str, Any]) -> str:
    """Return JSON that may stand in a script element.

    >>> _as_script_data({"name": "</script>"})
    '{"name":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(facts, allow_nan=False, separators=(",", ":"))
    # ensure_ascii is on, so the line separators that end a JavaScript string are escaped as well.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
