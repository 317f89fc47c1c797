"""Save one adapter in another program's format; its file, or its two files, appear whole."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from ...adapter import Adapter
from ...errors import FolderError, FormatError, SpecError, listing, suggest
from ...formats.diffusers import render_diffusers
from ...formats.kohya import render_kohya
from ...formats.mlx import render_mlx
from ...formats.recognise import DIFFUSERS_WEIGHTS
from ...override import check_none
from ...system.reading import is_folder
from .. import disk
from ..atomic_folders import make_all, new_folders

__all__ = ["save_mlx", "save_one_file"]

_RENDERERS = {"kohya": render_kohya, "diffusers": render_diffusers}


def save_one_file(adapter: Adapter, path: Path, form: str) -> None:
    """Write an adapter in another program's format; see `Adapter.save`."""
    if form == "mlx":
        save_mlx(adapter, path)
        return
    if form not in _RENDERERS:
        known = ("peft", *_RENDERERS, "mlx")
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


def save_mlx(adapter: Adapter, folder: Path, *, layers: int | None = None) -> None:
    """Write the folder of an adapter for mlx-lm; its two files appear together.

    Args:
        adapter: the adapter.
        folder: a new one, an empty one, or one that holds these two files alone.
        layers: the number of the base's layers; see `render_mlx`.

    Raises:
        FormatError: a module has no key in this format.
        FolderError: something else is in the folder, or it can't be written.
    """
    files = render_mlx(adapter, layers=layers)
    place = Path(os.path.abspath(folder))
    # The folder is replaced as a whole, so no other file may lie in it. A PEFT adapter there, whose
    # config has the same name, would be lost as well.
    others = sorted(set(os.listdir(place)) - set(files)) if is_folder(place) else []
    if others:
        raise FolderError(
            f"{folder}: holds {listing(others, most=3)}; mlx-lm's adapter is a folder of its own",
            "name a new folder",
        )
    with new_folders([place]) as (stage,):
        for name in sorted(files):
            disk.write(stage / name, files[name])
