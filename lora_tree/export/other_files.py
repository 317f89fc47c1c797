"""Decide which files beside a base's weights are copied into a merged checkpoint.

    config, tokenizer, templates, …     copied
    weights in other formats            left out: they would still be the base's
    an adapter's or a tree's own files  left out: transformers would load the adapter on top
    code                                left out, unless the caller asks for it
    a link that leads out of the base   refused: a stranger's base could name any file

Law: only files in the folder that the user named are copied. A snapshot in the hub's cache
consists of links into the ``blobs`` of the same repository, so those count as its own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError
from ..folder import disk
from ..system.reading import Inside
from .shards import INDEX, SINGLE, Checkpoint, outside_link_error, own_files

__all__ = ["OtherFiles", "sort_other_files"]

LAST = (INDEX, "config.json")
"""These are written last: without a config no program mistakes a partly written folder for a
model."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".ipynb")
_OTHER_INDEX = re.compile(r".*\.(bin|safetensors|h5|msgpack)\.index\.json\Z")
_OF_AN_ADAPTER = ("adapter_config.json", "tree.yaml", "tree.lock")


@dataclass(frozen=True)
class OtherFiles:
    """The other files of a base's folder, by their paths in it.

    Args:
        copied: the files to copy, in the order in which they are written.
        left_out: files, and linked folders, that stay behind.
    """

    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def sort_other_files(
    folder: Path, checkpoint: Checkpoint, *, with_code: bool = False
) -> OtherFiles:
    """Sort the files of a base's folder into copied and left out; ignore hidden ones.

    Args:
        checkpoint: the weights. `CheckpointWriter` writes them; here their files are only checked
            for links out of the folder.
        with_code: copy code as well.

    Raises:
        FolderError: a file that would be written is a link out of the folder, or not a plain file;
            names it.
    """
    inside = own_files(folder)
    # Check before anything is written: a refusal half-way would waste minutes of copying.
    for name in checkpoint.files:
        _check_inside(folder / name, inside)
    copied: list[str] = []
    left: list[str] = []
    for relative, is_linked_folder in _walk(folder):
        if relative in checkpoint.files:
            continue
        name = os.path.basename(relative)
        is_unwanted_code = name.endswith(_CODE) and not with_code
        is_not_copied = is_linked_folder or is_unwanted_code or name in _OF_AN_ADAPTER
        if is_not_copied or _is_other_weights(relative, checkpoint):
            left.append(relative)
            continue
        _check_inside(folder / relative, inside)
        copied.append(relative)
    copied.sort(key=lambda name: (LAST.index(name) if name in LAST else -1, name))
    return OtherFiles(tuple(copied), tuple(left))


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield (path in the folder, is it a link to a folder), in order, without hidden ones."""
    for above, folders, files in os.walk(folder, onerror=disk.refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            yield os.path.relpath(os.path.join(above, name), folder), False
        for name in folders:
            # os.walk lists such a link among the folders and does not follow it
            if os.path.islink(os.path.join(above, name)):
                yield os.path.relpath(os.path.join(above, name), folder), True


def _is_other_weights(relative: str, checkpoint: Checkpoint) -> bool:
    """Return whether a file holds weights in another format, or is an index of such files."""
    name = os.path.basename(relative)
    if name.endswith(_WEIGHTS):
        return True
    if relative == INDEX:
        # transformers prefers a single file and ignores an index beside it, so this one is old
        return checkpoint.files == (SINGLE,)
    return bool(_OTHER_INDEX.match(name))


def _check_inside(file: Path, inside: Inside) -> None:
    # Check the real path: a link to another file inside the folder is fine.
    real = os.path.realpath(file)
    if not inside(real):
        raise outside_link_error(file)
    try:
        plain = stat.S_ISREG(os.stat(real).st_mode)
    except OSError as error:
        raise FolderError(
            f"{file}: can't be read: {error.strerror or error}",
            "make it readable, or remove it from the base's folder",
        ) from error
    if not plain:
        raise FolderError(
            f"{file}: can't be copied: not a plain file", "remove it from the base's folder"
        )
