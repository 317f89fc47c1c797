"""Merge a path into a base's checkpoint tensor by tensor, without loading the base.

    1. check    the base's files and config, every module's shape and dtype, that sums stay finite
    2. write    the weights, each file with its old name, size and header (`checkpoint_writer`)
    3. copy     config, tokenizer, …; config.json and the index last

Files keep their names and headers, so dtypes, sharding and ties are the base's.

Law: the folder appears whole or not at all. Everything is written to a hidden folder beside it,
synced and renamed. An interrupted run leaves the hidden folder, without a config.json, and the next
run removes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..blend import Blend, spelled
from ..engine.arithmetic import exact_mode
from ..errors import FolderError, LoraTreeError, SpecError, listing
from ..extras import foreign, hub_answers, need
from ..folder import disk
from ..storage import as_path
from ..system.reading import is_folder
from ..tree import AdapterTree
from .checkpoint_writer import CheckpointWriter, GroupWrites
from .model_folder import new_model_folder
from .names import CheckpointNames, TensorGroup
from .other_files import sort_other_files
from .shards import Stored, missing_files, open_checkpoint, own_files
from .unloaded_base import skeleton
from .writes import Write, writes

__all__ = ["MergedCheckpoint", "base_folder", "export_model"]


@dataclass(frozen=True)
class MergedCheckpoint:
    """A checkpoint that `export_model` wrote.

    Args:
        path: the path or blend.
        folder: the checkpoint.
        changed: names on the disk of the tensors whose values differ from the base's.
        nbytes: bytes of all weight files.
        left_out: files of the base's folder that were not copied: its weights in other formats, an
            adapter's files, code, linked folders.
    """

    path: str
    folder: Path
    changed: tuple[str, ...]
    nbytes: int
    left_out: tuple[str, ...]


@torch.no_grad()
def export_model(
    tree: AdapterTree,
    blend: Blend,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    with_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> MergedCheckpoint:
    """Write a path or a blend as a whole checkpoint: the base's, with the increments added.

    If transformers loads it in its own dtype, the weights are bit for bit those of the base after
    ``activate(path)``. Memory: the largest tensor and its factors; for fused experts three times
    the size of the fused parameter.

    Args:
        folder: the folder to create; it must not exist yet, or be empty.
        base: the base's folder with its safetensors files, or its hub id; None: the tree's base.
        with_code: copy the base's own code (``*.py``, …) as well, which loads with
            ``trust_remote_code`` only.
        progress: called with (bytes written, bytes to write).
        trust_remote_code: run the base's own Python code if its class is defined there.

    Raises:
        PathError: a node does not exist.
        SpecError: no base is known; or it is quantised; or transformers can't read its config; or
            its class is the base's own code, and the caller did not allow it to run.
        FormatError: the base has no whole safetensors checkpoint.
        BaseMismatch: an adapter's module is not in the base, or in another shape, or has no tensor
            in the checkpoint; or its tensors' conversion can't be inverted; or a weight would get a
            number that is not finite.
        TiedWeights: a weight to change is used by a second module.
        UnmergedOnly: a delta can't be written into its weight.
        FolderError: the folder is there already or can't be written; or a file of the base is a
            link that leads out of it.

    See docs/export.md for an example that runs.
    """
    if not hasattr(os, "pwrite"):
        raise FolderError(
            "a merged checkpoint can't be written on this operating system, which has no pwrite",
            "run it under Linux, WSL or macOS; or export one adapter: lora-tree export --as "
            "portable",
        )
    path = spelled(blend)
    source = base_folder(tree, base)
    # A stranger's base may hold links to any file of this machine.
    inside = own_files(source)
    checkpoint = open_checkpoint(source, inside=inside)
    others = sort_other_files(source, checkpoint, with_code=with_code)
    # The model's class defines the parameters, which of them are tied, and how they are stored.
    model = skeleton(source, what="a merged checkpoint", trust_remote_code=trust_remote_code)
    _check_not_quantised(model, source)
    names = CheckpointNames(model, checkpoint.tensors)
    try:
        changes = _by_group(writes(tree, blend, model, names), names)
        _check_finite(changes, names)
    except LoraTreeError as error:
        raise error.within(path or "the bare base") from error
    # All checks are done. From here on only the disk can fail, and that leaves no folder.
    where = Path(os.path.abspath(as_path(folder)))
    with new_model_folder(where, needs_bytes=checkpoint.nbytes) as out:
        CheckpointWriter(checkpoint, out, names, progress).run(changes)
        # config.json comes last, so no program takes a partly written folder for a model.
        for name in others.copied:
            out.copy(source / name, name, inside=inside)
    changed: list[str] = []
    for group, _ in changes:
        changed += [stored.name for stored in group.stored]
    return MergedCheckpoint(path, where, tuple(sorted(changed)), checkpoint.nbytes, others.left_out)


def _by_group(found: Sequence[Write], names: CheckpointNames) -> list[GroupWrites]:
    """Sort writes by the tensors that they change.

    Raises:
        BaseMismatch: the checkpoint has no tensor for one, or not all, or one of another shape.
        SpecError: transformers can't make one of its tensors.
        UnmergedOnly: its tensor is quantised.
    """
    by_first: dict[str, GroupWrites] = {}
    for write in found:
        try:
            group = names.group(write.parameter)
        except LoraTreeError as error:
            raise error.within(f"{write.node}: {write.module}") from error
        for stored in group.stored:
            write.check_dtype(stored)
        try:
            shape = names.shape(write.parameter)
        except LoraTreeError as error:
            raise error.within(write.node) from error
        write.check_shape(shape)
        by_first.setdefault(group.first, (group, []))[1].append(write)
    return list(by_first.values())


def _check_finite(changes: Sequence[GroupWrites], names: CheckpointNames) -> None:
    """Check, before anything is written, that every weight stays finite.

    Raises:
        BaseMismatch: one would not; names the node and the module.
    """

    def parameter(group: TensorGroup, name: str) -> Tensor:
        if group.converter is None:
            return group.stored[0].read()
        return names.make_parameters(group, Stored.read)[name].contiguous()

    with exact_mode(torch.device("cpu")):
        for group, found in changes:
            for write in found:
                dtype = group.stored[0].dtype
                assert dtype is not None  # `Write.check_dtype` refused it before
                write.check_finite(dtype, partial(parameter, group, write.parameter))


def base_folder(tree: AdapterTree, base: str | os.PathLike[str] | None) -> Path:
    """Return the folder of the base; download it from the hub, or find it in the hub's cache.

    Raises:
        SpecError: neither the caller nor the tree names one, or it can't be fetched.
    """
    name = base if base is not None else tree.base
    if name is None:
        raise SpecError(
            "the tree names no base", "name its folder or its hub id: --base FOLDER_OR_ID, base=…"
        )
    folder = as_path(name)
    if is_folder(folder):
        with disk.named("look at it", folder):
            return folder.resolve()
    hub = need("huggingface_hub", extra="hub", what=f"fetching the base {name}")
    with foreign(
        f"{name}: no folder of that name, and it can't be fetched from the hub",
        "name its folder: --base FOLDER",
    ):
        is_online = hub_answers()
        fetched = Path(
            hub.snapshot_download(
                os.fspath(name),
                # the same weights in formats that are not read here
                ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"],
                local_files_only=not is_online,
            )
        )
    # Without the hub the cache gives what it has of a commit, which may be the config alone.
    missing = [] if is_online else missing_files(fetched, inside=own_files(fetched))
    if missing:
        raise SpecError(
            f"{name}: incomplete in the hub's cache, which lacks {listing(missing)}; and the hub "
            "does not answer",
            "fetch it once while the hub answers; or name its folder: --base FOLDER",
        )
    return fetched


def _check_not_quantised(model: object, source: Path) -> None:
    config = getattr(model, "config", None)
    # Increments can't be added to packed values, and the scales would no longer fit.
    quantised: Mapping[str, object] | None = getattr(config, "quantization_config", None)
    if quantised is not None:
        raise SpecError(
            f"{source}: its weights are quantised, and nothing can be added to them",
            "name the folder of the base in bf16, fp16 or fp32; or serve the adapter beside it",
        )
