"""Saving one adapter as a single file of another program's format; it appears whole."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from ..adapter import Adapter
from ..errors import FormatError, SpecError, listing, suggest
from ..formats.diffusers import render_diffusers
from ..formats.kohya import render_kohya
from ..formats.recognise import DIFFUSERS_WEIGHTS
from ..override import check_none
from . import disk
from .whole import make_all

__all__ = ["save_one_file"]

_RENDERERS = {"kohya": render_kohya, "diffusers": render_diffusers}


def save_one_file(adapter: Adapter, path: Path, form: str) -> None:
    """Write an adapter in a format that is one file; see `Adapter.save`."""
    if form not in _RENDERERS:
        known = ("peft", *_RENDERERS)
        raise SpecError(
            f"form must be one of {listing(known)}, got {form!r:.80}{suggest(str(form), known)}"
        )
    place = Path(os.path.abspath(path))
    if place.suffix != ".safetensors" and form == "diffusers":
        place = place / DIFFUSERS_WEIGHTS
    if place.suffix != ".safetensors":
        raise FormatError(
            f"{path}: {form} writes one file, whose name ends in .safetensors",
            f"name it {path}.safetensors",
        )
    check_none(adapter.overrides, f"a {form} file")
    # Rendered before a folder is made: what can't be written leaves nothing behind.
    data = _RENDERERS[form](adapter)
    with ExitStack() as undo:
        make_all(place.parent, undo)
        disk.replace(place, data)
        undo.pop_all()
