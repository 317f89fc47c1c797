"""A notebook as a page of the site.

    cell                         page
    text                         unchanged; a link to ../docs/ becomes one within the site
    code                         a block of Python
    what it printed              a block without a language
    a picture that it showed     a file beside the page

Nothing is run here: the outputs are those that the notebook's file holds.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat

PICTURES = {"image/svg+xml": "svg", "image/png": "png"}
"""Kinds of pictures → the endings of their files. The first that an output has is shown."""


def page_of(file: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's page, and the pictures on it by the names of their files."""
    notebook = nbformat.read(file, as_version=4)
    pictures: dict[str, bytes] = {}
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source.replace("](../docs/", "](").replace("](../", "]("))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts.extend(_shown(cell, file.stem, pictures))
    parts.append(
        f"This page is the notebook `examples/{file.name}`, run from its first cell to its last."
    )
    return "\n\n".join(parts) + "\n", pictures


def _shown(cell: Any, stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """Yield a cell's outputs as Markdown; their pictures are added to ``pictures``."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield f"```text\n{output.text.rstrip()}\n```"
            continue
        data: Mapping[str, str] = output.get("data", {})
        kind = next((kind for kind in PICTURES if kind in data), None)
        if kind is None:
            yield f"```text\n{data['text/plain']}\n```"
            continue
        name = f"{stem}-{len(pictures) + 1}.{PICTURES[kind]}"
        content = data[kind]
        is_text = kind == "image/svg+xml"
        pictures[name] = content.encode() if is_text else base64.b64decode(content)
        yield f"![What the cell above shows](pictures/{name})"
