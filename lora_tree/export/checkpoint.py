"""A path merged into a base's checkpoint, tensor by tensor: the base is never loaded.

    header, unchanged tensors   copied inside the kernel, byte for byte
    changed tensors             read, W ← round_once(W0 + Σ B A) as a switch does it, written at their place
    what is made of several     put together, changed and taken apart by transformers' own conversion (see `names`)
    config, tokenizer, …        copied, config.json and the index last

Every file keeps its name, size and header, so dtypes, sharding and ties are the base's. All is
written beside the place, synced and renamed: an interrupted run leaves a hidden folder without a
config.json, which the next one clears.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..blend import Blend, spelled
from ..engine.arithmetic import Scratch, exact_mode
from ..engine.merged import add_bias, add_weight
from ..errors import FolderError, LoraTreeError, SpecError
from ..extras import foreign, hub_answers, need
from ..folder import disk
from ..storage import as_path
from ..system.reading import is_folder, open_stream
from ..tree import AdapterTree
from .beside import beside_weights
from .model_folder import ModelFolder, new_model_folder
from .names import CheckpointNames, TensorGroup
from .shards import Checkpoint, Stored, open_checkpoint, own_files, raw
from .unloaded_base import skeleton
from .writes import Write, writes

__all__ = ["MergedCheckpoint", "export_model"]

KERNEL_BYTES = 64 << 20
"""How much is copied at once inside the kernel, so that progress is told in between."""

PLAIN_BYTES = 8 << 20
_MOST_AT_ONCE = 1 << 30
"""And at once through this process, where the two file systems don't let the kernel do it."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `export_model` wrote.

    Args:
        path: the path or blend.
        folder: the checkpoint.
        changed: names on the disk of the tensors that have other values than the base's.
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
    """Write a path or a blend as a checkpoint of its own: the base's, with its increments in the weights.

    Loaded by transformers in its own dtype it has the bits that ``activate(path)`` gives the loaded
    base. Memory: the largest tensor and its factors; for fused experts three times what
    transformers fuses them to.

    Args:
        folder: made; it must not be there yet, or be empty.
        base: the base's folder with its safetensors files, or its hub id; the tree's own base
            without it.
        with_code: copy the base's own code (``*.py``, …) as well, which loads with
            ``trust_remote_code`` only.
        progress: called with (bytes written, bytes to write).
        trust_remote_code: run the Python code that the base brings along, if its class is in there.

    Raises:
        PathError: a node is not there.
        SpecError: no base is known; or it is quantised; or transformers can't read its config; or
            it is code of its own, and the caller did not allow it to run.
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
    source = _source(tree, base)
    inside = own_files(source)
    checkpoint = open_checkpoint(source, inside=inside)
    beside = beside_weights(source, checkpoint, with_code=with_code)
    model = skeleton(source, what="a merged checkpoint", trust_remote_code=trust_remote_code)
    _not_quantised(model, source)
    names = CheckpointNames(model, checkpoint.tensors)
    try:
        jobs = _jobs(writes(tree, blend, model, names), names)
        _check_finite(jobs, names)
    except LoraTreeError as error:
        raise error.within(path or "the bare base") from error
    where = Path(os.path.abspath(as_path(folder)))
    with new_model_folder(where, needs_bytes=checkpoint.nbytes) as stage:
        writer = _Writer(checkpoint, stage, names, progress)
        writer.run(jobs)
        for name in beside.copied:
            stage.copy(source / name, name, inside=inside)
    changed = tuple(sorted(stored.name for group, _ in jobs for stored in group.stored))
    return MergedCheckpoint(path, where, changed, checkpoint.nbytes, beside.left_out)


Job = tuple[TensorGroup, list[Write]]


def _jobs(found: Sequence[Write], names: CheckpointNames) -> list[Job]:
    """Writes by the tensors that they change; every parameter has some.

    Raises:
        BaseMismatch: one has none, or of another shape.
    """
    jobs: dict[str, Job] = {}
    for write in found:
        try:
            group = names.group(write.parameter)
        except LoraTreeError as error:
            raise error.within(f"{write.node}: {write.module}") from error
        if group.converter is None:
            write.check_shape(group.stored[0].shape)
        for stored in group.stored:
            write.check_dtype(stored)
        jobs.setdefault(group.first, (group, []))[1].append(write)
    return list(jobs.values())


def _check_finite(jobs: Sequence[Job], names: CheckpointNames) -> None:
    """Check, before anything is written, that every weight stays finite.

    Raises:
        BaseMismatch: one would; names the node and the module.
    """

    def parameter(group: TensorGroup, name: str) -> Tensor:
        if group.converter is None:
            return group.stored[0].read()
        return names.together(group, Stored.read)[name].contiguous()

    with exact_mode(torch.device("cpu")):
        for group, found in jobs:
            for write in found:
                dtype = group.stored[0].dtype
                assert dtype is not None  # `check_dtype` was there before
                write.check_finite(dtype, partial(parameter, group, write.parameter))


class _Writer:
    """One run over the files of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stage: ModelFolder,
        names: CheckpointNames,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._checkpoint, self._stage, self._names = checkpoint, stage, names
        self._progress = progress
        self._scratch = Scratch()
        self._done = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Every file: what stays as it is, then what changes; synced in the background as soon as it is whole."""
        single = {group.stored[0].name: found for group, found in jobs if group.converter is None}
        several = [job for job in jobs if job[0].converter is not None]
        spread = {stored.file.name for group, _ in several for stored in group.stored}
        changing = {stored.name for group, _ in jobs for stored in group.stored}
        largest = max((self._checkpoint.tensors[name].nbytes for name in single), default=0)
        room = torch.empty(largest, dtype=torch.uint8, device="cpu")
        syncs: list[Future[None]] = []
        with ThreadPoolExecutor(1) as pool, exact_mode(torch.device("cpu")):
            for name in self._checkpoint.files:
                with (
                    self._stage.create(name) as out,
                    disk.named("read it", self._checkpoint.folder / name),
                ):
                    self._copy_rest(name, out, changing)
                    for stored in self._of(name):
                        if stored.name in single:
                            self._change(stored, single[stored.name], room, out)
                if name not in spread:
                    syncs.append(pool.submit(self._stage.sync, name))
            for group, found in several:
                self._change_several(group, found)
            syncs += [pool.submit(self._stage.sync, name) for name in sorted(spread)]
            for sync in syncs:
                sync.result()

    def _of(self, name: str) -> list[Stored]:
        return [stored for stored in self._checkpoint.tensors.values() if stored.file.name == name]

    def _copy_rest(self, name: str, out: int, changing: set[str]) -> None:
        """The header and every run of tensors that stay, inside the kernel."""
        source = self._checkpoint.folder / name
        first = next(iter(self._of(name)), None)
        with (
            disk.named("copy it", source),
            first.open() if first else open_stream(source) as stream,
        ):
            size = os.fstat(stream.fileno()).st_size
            os.ftruncate(out, size)
            at = 0
            for stored in [s for s in self._of(name) if s.name in changing]:
                self._copy(stream.fileno(), out, at, stored.begin)
                at = stored.end
            self._copy(stream.fileno(), out, at, size)

    def _copy(self, source: int, out: int, begin: int, end: int) -> None:
        for at, size in _steps(begin, end):
            done = 0
            while done < size:
                got = _copied(source, out, at + done, size - done)
                if not got:
                    raise OSError(errno.EIO, "it was cut short meanwhile")
                done += got
            self._tell(size)

    def _change(self, stored: Stored, found: Sequence[Write], room: Tensor, out: int) -> None:
        values = stored.read(room)
        for write in found:
            self._add(write, values)
        self._put(out, stored, values)

    def _change_several(self, group: TensorGroup, found: Sequence[Write]) -> None:
        parameters = self._names.together(group, Stored.read)
        self._names.check_inverse(group, parameters)
        for write in found:
            parameters[write.parameter] = parameters[write.parameter].contiguous()
            write.check_shape(tuple(parameters[write.parameter].shape))
            self._add(write, parameters[write.parameter])
        parts = self._names.apart(group, parameters)
        for stored in group.stored:
            with self._stage.reopen(stored.file.name) as out:
                self._put(out, stored, parts.pop(stored.name))

    def _add(self, write: Write, values: Tensor) -> None:
        if write.is_bias:
            add_bias(values, values, write.values)
        else:
            add_weight(write.site, values, values, write.values, self._scratch)

    def _put(self, out: int, stored: Stored, values: Tensor) -> None:
        assert values.dtype == stored.dtype
        assert values.numel() * values.element_size() == stored.nbytes
        view, at = raw(values), stored.begin
        with disk.named("write it", self._stage.folder / stored.file.name):
            while view:
                # macOS refuses to write more than 2 GiB at once
                wrote = os.pwrite(out, view[:_MOST_AT_ONCE], at)
                view, at = view[wrote:], at + wrote
        self._tell(stored.nbytes)

    def _tell(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._checkpoint.nbytes)


def _copied(source: int, out: int, at: int, size: int) -> int:
    """Copy some bytes from a file to the same place of another, inside the kernel where it can: how many."""
    try:
        return os.copy_file_range(source, out, size, at, at)
    except AttributeError:
        pass  # not on this system
    except OSError as error:
        if error.errno not in (
            errno.EXDEV,
            errno.EINVAL,
            errno.ENOSYS,
            errno.EOPNOTSUPP,
            errno.EPERM,
        ):
            raise
    return os.pwrite(out, os.pread(source, min(size, PLAIN_BYTES), at), at)


def _steps(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, end, KERNEL_BYTES):
        yield at, min(KERNEL_BYTES, end - at)


def _source(tree: AdapterTree, base: str | os.PathLike[str] | None) -> Path:
    """The folder of the base; a hub's is fetched, or found where it was fetched before.

    Raises:
        SpecError: nobody names one, or it can't be had.
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
        f"{name}: no folder of that name, and the hub can't give it",
        "name its folder: --base FOLDER",
    ):
        fetched = hub.snapshot_download(
            os.fspath(name),
            ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"],
            local_files_only=not hub_answers(),
        )
        return Path(fetched)


def _not_quantised(model: object, source: Path) -> None:
    quantised: Mapping[str, object] | None = getattr(
        getattr(model, "config", None), "quantization_config", None
    )
    if quantised is not None:
        raise SpecError(
            f"{source}: its weights are quantised, and nothing can be added to them",
            "name the folder of the base in bf16, fp16 or fp32; or serve the adapter beside it",
        )
