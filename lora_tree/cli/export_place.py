"""The place that an export may write to: outside the tree's own folder, and not over an adapter.

An export is not recorded in the tree's history. So an adapter that it overwrote, perhaps one that
took days to train, could not be restored.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FolderError, SpecError, listing
from ..formats.peft import CONFIG, PICKLE, WEIGHTS
from ..formats.recognise import DIFFUSERS_WEIGHTS, MLX_WEIGHTS
from ..storage import as_path
from ..tree import AdapterTree

__all__ = ["Replace", "check_free", "check_place"]

# The files of PEFT, the pickle of older PEFT, and the files of mlx-lm and diffusers. A folder with
# none of them holds no adapter, and an export adds its files to the others there.
ADAPTER_FILES = (CONFIG, WEIGHTS, PICKLE, MLX_WEIGHTS, DIFFUSERS_WEIGHTS)

Replace = Annotated[
    bool,
    typer.Option("--replace", help="Write over an adapter that is there; it can't be restored."),
]


def check_place(tree: AdapterTree, folder: Path, to: str) -> None:
    """Refuse to write where the tree lives: an adapter there becomes a node, or replaces one.

    Args:
        tree: its nodes' files may lie anywhere.
        folder: of the tree, or its tree.yaml.
        to: the folder to write.

    Raises:
        SpecError: ``to`` is empty, in the tree's folder, a node's own folder, or the base's.
    """
    if not to.strip():  # Path("") would be the current folder
        raise SpecError(
            "--out says where to write, and it is missing or empty",
            "name a folder for the adapter: --out export/legal",
        )
    # Links are resolved on both sides: one that lies outside of the tree may lead into it.
    where = as_path(to).resolve()
    home = as_path(folder).resolve()
    if _is_inside(where, home if home.is_dir() else home.parent):
        raise SpecError(
            f"--out {to} is in the tree's own folder, where an adapter is a node",
            "write it elsewhere, or add it to the tree: "
            f"lora-tree squash {shlex.quote(str(folder))} PATH --to NODE",
        )
    if tree.base is not None and _is_same_place(where, as_path(tree.base).resolve()):
        raise SpecError(
            f"--out {to} is the base's own folder: an adapter there counts as one of the base's "
            "files, and transformers loads it with the base",
            "write it elsewhere",
        )
    for path in tree.paths():
        source = tree[path].source
        if source is not None and _is_same_place(where, source.where.resolve()):
            raise SpecError(
                f"--out {to} would write over the files of {path}, {source.where}",
                "write it elsewhere",
            )


def check_free(places: Iterable[Path], *, as_files: bool = False, replace: bool) -> None:
    """Refuse to write over adapters that are there already.

    Args:
        places: where the adapters are about to be written.
        as_files: each is one file, and not a folder.
        replace: the user allows it.

    Raises:
        FolderError: an adapter would be lost, or a file lies where a folder has to be.
    """
    taken = []
    for place in map(as_path, places):
        if place.is_file() and not as_files:
            raise FolderError(
                f"{place}: a file, but the adapter is written as a folder", "name another place"
            )
        if place.is_file() or any((place / name).exists() for name in ADAPTER_FILES):
            taken.append(str(place))
    if taken and not replace:
        what = "a file" if as_files else "an adapter"
        raise FolderError(
            f"{listing(taken)}: there is {what} already",
            "name another place; or write over it with --replace, after which it can't be restored",
        )


def _is_inside(where: Path, folder: Path) -> bool:
    return any(_is_same_place(above, folder) for above in (where, *where.parents))


def _is_same_place(one: Path, other: Path) -> bool:
    """Tell whether two paths are the same place; a file system may accept several spellings."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
