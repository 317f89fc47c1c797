"""``lora-tree export``: a path, a blend or every leaf as adapters, or merged into a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...adapter import Adapter
from ...errors import FormatError, SpecError
from ...export import (
    MergedCheckpoint,
    Portable,
    export_gguf,
    export_gguf_nodes,
    export_leaves,
    export_mlx,
    export_model,
    portable,
)
from ...folder import load_versions
from ...tree import AdapterTree
from ..arguments import AsJson, Folder, On, Quiet, SkipBroken, TrustRemoteCode, advise_skip
from ..console import print_json
from ..export_output import plain_portable, tell_files, tell_flat, tell_merged, tell_portable
from ..export_place import Replace, check_free, check_place
from ..open_base import skeleton_of
from ..progress import Bar

__all__ = ["DTYPES", "Dtype", "export"]


class Dtype(StrEnum):
    """The dtypes that factors can be rounded to."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class As(StrEnum):
    """The forms in which a path can be written."""

    portable = "portable"
    peft = "peft"
    kohya = "kohya"
    diffusers = "diffusers"
    mlx = "mlx"
    gguf = "gguf"
    model = "model"


ONE_FILE = (As.kohya, As.diffusers, As.gguf)
"""The forms that are a file, and not a folder."""
DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}


def export(
    folder: Folder,
    path: Annotated[
        str | None,
        typer.Argument(
            help="Write this path, fr/legal, or blend, fr/legal:0.5+fr/medical:0.5.",
            metavar="PATH_OR_BLEND",
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option("--out", help="Write this folder, outside the tree's own.", metavar="DIR"),
    ] = "",
    kind: Annotated[
        As,
        typer.Option(
            "--as",
            help="portable: one rank, alpha = r, no patterns, for any engine. "
            "peft: ranks as they are. "
            "kohya, diffusers: one .safetensors file for programs that make images. "
            "mlx: a folder for mlx-lm. "
            "gguf: one file for llama.cpp. "
            "model: the base's checkpoint with the path merged into it.",
        ),
    ] = As.portable,
    every: Annotated[bool, typer.Option("--all", help="Write every leaf, as DIR/<path>.")] = False,
    nodes: Annotated[
        bool,
        typer.Option(
            "--nodes", help="With --as gguf: write every node by itself, as DIR/<path>.gguf."
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="Use this base, a folder or a hub id; without it the tree's own, if a folder.",
            metavar="MODEL",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Keep at most this rank; without it the sum is exact, at rank Σr."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Allow at most this relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ in a module."),
    ] = None,
    ceil_rank: Annotated[
        bool, typer.Option("--ceil-rank", help="Round the rank up to one that vLLM allows.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Round the factors; without it fp32, or narrower where nothing is rounded."
        ),
    ] = None,
    complete: Annotated[
        bool,
        typer.Option(
            "--complete/--incomplete",
            help="Fill q/k/v and gate/up with zeros where some of them are missing; "
            "SGLang needs v where q is.",
        ),
    ] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="With --complete and no base: say how large a module is, k_proj=1024x4096.",
            metavar="NAME=OUTxIN",
        ),
    ] = None,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="With --as model: copy the base's own code (*.py) too."),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --all: make this many leaves at once.")
    ] = None,
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Print every module's error.")
    ] = False,
    on: On = None,
    replace: Replace = False,
    trust_remote_code: TrustRemoteCode = False,
    skip_broken: SkipBroken = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a path, a blend or every leaf as an adapter for any engine, or merge it into a base."""
    if nodes:
        if kind is not As.gguf or path is not None or every:
            raise SpecError(
                "--nodes writes every node by itself, and only as GGUF",
                "lora-tree export FOLDER --as gguf --nodes --out DIR",
            )
        tree, _ = load_versions(folder, *(on or ()), skip_broken=skip_broken)
        check_place(tree, folder, to)
        files = [Path(to, f"{node}.gguf") for node in tree.paths() if tree[node].has_adapter]
        check_free(files, as_files=True, replace=replace)
        tell_files(export_gguf_nodes(tree, to, base=base), as_json=as_json)
        return
    # The two are equal only if both or neither were given.
    if every == (path is not None):
        raise SpecError(
            "name one path or blend, or every leaf: "
            "lora-tree export FOLDER PATH --out DIR, or --all"
        )
    texts = [*([] if path is None else [path]), *(on or ())]
    tree, named = load_versions(folder, *texts, skip_broken=skip_broken)
    path = None if path is None else named[0]
    check_place(tree, folder, to)  # before anything is flattened, which may take long
    # These options are for portable adapters; every other form refuses them.
    shaped = ceil_rank or complete or bool(shape)
    if kind is As.model:
        if path is None or shaped or (rank, max_error, dtype) != (None, None, None):
            raise SpecError(
                "--as model writes one path as it is, in the base's dtypes",
                "leave --rank, --max-error, --dtype and --shape out, and name one path",
            )
        if replace:
            raise SpecError(
                "--as model writes a new folder, and --replace is for adapters",
                "name a new folder, or remove the old one first",
            )
        merged = _merged(
            tree, path, to, base, with_code=with_code, trust_remote_code=trust_remote_code
        )
        tell_merged(merged, path, as_json=as_json)
        return
    if with_code:
        raise SpecError(
            "--with-code copies a base's code, and only --as model copies anything of a base"
        )
    places = [Path(to)] if path is not None else [Path(to, leaf) for leaf in tree.leaves()]
    check_free(places, as_files=kind in ONE_FILE, replace=replace)
    rounded_to = DTYPES[dtype] if dtype else None
    if kind is not As.portable:
        if path is None or shaped:
            raise SpecError(
                f"--as {kind} writes one path with its ranks as they are", f"leave --as {kind} out"
            )
        if kind is As.gguf:
            if dtype is not None:
                raise SpecError("--as gguf writes fp32", "leave --dtype out")
            flat = export_gguf(tree, path, to, base=base, rank=rank, max_error=max_error)
            tell_flat(path, to, flat, kind, dtype, as_json=as_json)
            return
        # The base is built without weights, for its modules' present names alone. Without a base
        # the adapters' own names are kept.
        model = None
        if base is not None:
            model = skeleton_of(
                base, what=f"export --as {kind} --base", trust_remote_code=trust_remote_code
            )
        if kind is As.mlx:
            flat = export_mlx(
                tree, path, to, base=model, rank=rank, max_error=max_error, dtype=rounded_to
            )
        else:
            flat = tree.flatten(path, rank, max_error=max_error, dtype=rounded_to, base=model)
            _save(flat, path, to, kind)
        tell_flat(path, to, flat, kind, dtype, as_json=as_json)
        return
    form = {
        "rank": rank,
        "max_error": max_error,
        "ceil_rank": ceil_rank,
        "dtype": rounded_to,
        "base": base,
        "complete": complete,
        "shapes": _shapes(shape or ()),
    }
    if path is not None:
        made = portable(tree, path, **form)  # type: ignore[arg-type]
        made.save(to)
        written = {to: made}
    else:
        with advise_skip(folder, skips=skip_broken):
            leaves = _leaves(tree, to, workers, form)
        written = {str(Path(to, leaf.path)): leaf for leaf in leaves}
    if as_json:
        exports = [plain_portable(one, where) for where, one in written.items()]
        print_json({"exports": exports} if every else exports[0])
    else:
        for where, one in written.items():
            tell_portable(one, where, per_module=per_module)


def _save(flat: Adapter, path: str, to: str, kind: As) -> None:
    """Write a path's flattened adapter.

    Raises:
        FormatError: the format can't express it; the error names the path and a form that can.
    """
    try:
        flat.save(to, form=kind.value)  # type: ignore[arg-type]
    except FormatError as error:
        raise FormatError(
            f"{path}: {error.what}",
            *error.todo,
            "or write the path merged into a checkpoint: --as model",
        ) from error


def _leaves(
    tree: AdapterTree, to: str, workers: int | None, form: dict[str, Any]
) -> list[Portable]:
    with Bar() as bar:
        task = bar.add_task("exporting", total=None)

        def show(one: Portable, done: int, leaves: int) -> None:
            bar.update(task, completed=done, total=leaves, description=one.path)

        return export_leaves(tree, to, workers=workers, progress=show, **form)


def _merged(
    tree: AdapterTree,
    path: str,
    to: str,
    base: str | None,
    *,
    with_code: bool,
    trust_remote_code: bool,
) -> MergedCheckpoint:
    with Bar() as bar:
        task = bar.add_task("merging", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return export_model(
            tree,
            path,
            to,
            base=base,
            with_code=with_code,
            trust_remote_code=trust_remote_code,
            progress=show,
        )


def _shapes(texts: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Read ``k_proj=1024x4096`` as k_proj: (1024, 4096).

    Raises:
        SpecError: a text has another form.
    """
    shapes = {}
    for text in texts:
        # Nine digits are more than any module needs. int() refuses text of more than 4300 digits
        # with a ValueError of its own, which would be reported as a bug in this package.
        found = re.fullmatch(r"([^=]+)=([0-9]{1,9})[x×]([0-9]{1,9})", text)
        if found is None:
            raise SpecError(f"--shape {text[:80]!r}: expected NAME=OUTxIN, as in k_proj=1024x4096")
        shapes[found[1]] = int(found[2]), int(found[3])
    return shapes
