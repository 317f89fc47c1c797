"""Check the place of a picture before the work that takes minutes."""

from __future__ import annotations

from pathlib import Path

from ..errors import FolderError
from ..folder import disk

__all__ = ["check_picture_place"]


def check_picture_place(file: Path | None) -> None:
    """Refuse a place for a picture that can't be written, or that is named for another format.

    Args:
        file: None: no picture was asked for.

    Raises:
        FolderError: its folder does not exist, or its name does not end in ``.svg``.

    >>> check_picture_place(Path("tree.png"))
    Traceback (most recent call last):
    lora_tree.errors.FolderError: tree.png: a picture is written as SVG
      name a file that ends in .svg: tree.svg
    """
    if file is None:
        return
    if file.suffix.lower() != ".svg":
        raise FolderError(
            f"{file}: a picture is written as SVG",
            f"name a file that ends in .svg: {file.with_suffix('.svg')}",
        )
    disk.check_parent(file)
