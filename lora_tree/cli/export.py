"""``lora-tree export``: a path, a blend or every leaf as adapters, or a path merged into a checkpoint of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..adapter import Adapter
from ..errors import SpecError
from ..export import MergedCheckpoint, Portable, export_leaves, export_model, portable
from ..export.siblings import without_v
from ..folder import load
from ..storage import as_path
from ..tree import AdapterTree
from .arguments import AsJson, Folder, SkipBroken, TrustRemoteCode
from .console import out, print_json
from .open_base import skeleton_of
from .progress import Bar

__all__ = ["export"]


class Dtype(StrEnum):
    """The dtypes that factors can be rounded to."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class As(StrEnum):
    """What is written."""

    portable = "portable"
    peft = "peft"
    kohya = "kohya"
    diffusers = "diffusers"
    model = "model"


DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}


def export(
    folder: Folder,
    path: Annotated[
        str | None,
        typer.Argument(
            help="fr/legal, or a blend: fr/legal:0.5+fr/medical:0.5", metavar="PATH_OR_BLEND"
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option("--out", help="The folder to write, outside the tree's own.", metavar="DIR"),
    ] = "",
    kind: Annotated[
        As,
        typer.Option(
            "--as",
            help="portable: one rank, alpha = r, no patterns, for any engine. peft: ranks as they are. "
            "kohya, diffusers: one .safetensors file for programs that make images. "
            "model: the base's checkpoint with the path merged into it.",
        ),
    ] = As.portable,
    every: Annotated[bool, typer.Option("--all", help="Every leaf, as DIR/<path>.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the base; the tree's own folder without it."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="The largest rank to keep; exact, at rank Σr, without it.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="The largest relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ allowed in a module."),
    ] = None,
    ceil_rank: Annotated[
        bool, typer.Option("--ceil-rank", help="The next rank that vLLM allows.")
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
            help="Fill q/k/v and gate/up with zeros where some of them are missing; SGLang needs v where q is.",
        ),
    ] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="With --complete and no base: how large a module is, k_proj=1024x4096.",
            metavar="NAME=OUTxIN",
        ),
    ] = None,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="With --as model: copy the base's own code (*.py) too."),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Leaves at once, with --all.")] = None,
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Tell every module's error.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    skip_broken: SkipBroken = False,
    as_json: AsJson = False,
) -> None:
    """Write a path, a blend or every leaf as one adapter that any engine loads; or merged into a checkpoint."""
    if every == (path is not None):
        raise SpecError(
            "name one path or blend, or every leaf: lora-tree export FOLDER PATH --out DIR, or --all"
        )
    tree = load(folder, skip_broken=skip_broken)
    _outside(tree, folder, to)
    if kind is As.model:
        if (
            path is None
            or (rank, max_error, dtype) != (None, None, None)
            or ceil_rank
            or complete
            or shape
        ):
            raise SpecError(
                "--as model writes one path as it is, in the base's dtypes",
                "leave the other options out",
            )
        _merge(
            tree,
            path,
            to,
            base,
            with_code=with_code,
            trust_remote_code=trust_remote_code,
            as_json=as_json,
        )
        return
    if with_code:
        raise SpecError(
            "--with-code copies a base's code, and only --as model copies anything of a base"
        )
    rounded_to = DTYPES[dtype] if dtype else None
    if kind is not As.portable:
        if path is None or ceil_rank or complete or shape:
            raise SpecError(
                f"--as {kind} writes one path with its ranks as they are", f"leave --as {kind} out"
            )
        what = f"export --as {kind} --base"
        model = (
            None
            if base is None
            else skeleton_of(base, what=what, trust_remote_code=trust_remote_code)
        )
        flat = tree.flatten(path, rank, max_error=max_error, dtype=rounded_to, base=model)
        flat.save(to, form=kind.value)  # type: ignore[arg-type]
        _tell_flat(path, to, flat, kind, dtype, as_json=as_json)
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
        with Bar() as bar:
            task = bar.add_task("exporting", total=None)

            def show(one: Portable, done: int, leaves: int) -> None:
                bar.update(task, completed=done, total=leaves, description=one.path)

            several = export_leaves(tree, to, workers=workers, progress=show, **form)  # type: ignore[arg-type]
        written = {str(Path(to, one.path)): one for one in several}
    if as_json:
        told = [_plain(one, where) for where, one in written.items()]
        print_json({"exports": told} if every else told[0])
    else:
        for where, one in written.items():
            _tell(one, where, per_module=per_module)


def _merge(
    tree: AdapterTree,
    path: str,
    to: str,
    base: str | None,
    *,
    with_code: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    with Bar() as bar:
        task = bar.add_task("merging", total=None)
        told = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        made: MergedCheckpoint = export_model(
            tree,
            path,
            to,
            base=base,
            with_code=with_code,
            trust_remote_code=trust_remote_code,
            progress=told,
        )
    if as_json:
        print_json(
            {
                "path": path,
                "out": str(made.folder),
                "as": As.model,
                "changed": list(made.changed),
                "bytes": made.nbytes,
                "left_out": list(made.left_out),
            }
        )
        return
    left = f"; left out: {', '.join(made.left_out)}" if made.left_out else ""
    changed = f"{len(made.changed)} tensors changed, {made.nbytes:,} bytes{left}"
    what = f"{path or 'the bare base'} → {made.folder}: {changed}"
    out().print(what, markup=False, soft_wrap=True)


def _tell(one: Portable, where: str, *, per_module: bool) -> None:
    added = f" ({len(one.added)} of them zeros)" if one.added else ""
    what = f"{one.path} → {where}: {len(one.adapter)} modules{added}, r={one.rank}, {_cost(one)}{_left(one)}"
    out().print(what, markup=False, soft_wrap=True)
    for name, error in one.errors.items() if per_module else ():
        out().print(f"  {error:.2e}  {name}", markup=False, soft_wrap=True)


def _left(one: Portable) -> str:
    """A word about q/k/v and gate/up; what SGLang needs is said only where it is not there."""
    if not one.incomplete:
        return ""
    kinds = sorted({name.rpartition(".")[2] for name in one.incomplete})
    words = f"; no node changes {', '.join(kinds)}: left as they are"
    if without_v(one.adapter.modules):
        words += " (SGLang needs v_proj where q_proj is: --complete adds zeros)"
    return words


def _shapes(told: Iterable[str]) -> dict[str, tuple[int, int]]:
    """``k_proj=1024x4096`` → k_proj: (1024, 4096).

    Raises:
        SpecError: one is written otherwise.
    """
    shapes = {}
    for text in told:
        found = re.fullmatch(r"([^=]+)=([0-9]{1,9})[x×]([0-9]{1,9})", text)
        if found is None:
            raise SpecError(f"--shape {text[:80]!r}: expected NAME=OUTxIN, as in k_proj=1024x4096")
        shapes[found[1]] = int(found[2]), int(found[3])
    return shapes


def _cost(one: Portable) -> str:
    if one.worst == 0.0:
        return "exact"
    worst = max(one.errors, key=lambda name: one.errors[name])
    return f"relative error {one.error:.2g} in total, at most {one.worst:.2g} in a module ({worst})"


def _plain(one: Portable, where: str) -> dict[str, Any]:
    return {
        "path": one.path,
        "out": where,
        "as": As.portable,
        "modules": len(one.adapter),
        "rank": one.rank,
        "parameters": one.adapter.numel,
        "bytes": one.adapter.nbytes,
        "error": one.error,
        "worst": one.worst,
        "errors": dict(one.errors),
        "added": list(one.added),
        "incomplete": list(one.incomplete),
    }


def _tell_flat(
    path: str, to: str, flat: Adapter, kind: As, dtype: Dtype | None, *, as_json: bool
) -> None:
    ranks = sorted(set(flat.ranks.values()))
    if as_json:
        print_json(
            {
                "path": path,
                "out": to,
                "as": kind,
                "modules": len(flat),
                "ranks": ranks,
                "parameters": flat.numel,
                "bytes": flat.nbytes,
                "error": flat.error,  # of the truncation
                "dtype": dtype,
                "rounded": bool(flat.rounded),
            }
        )
    else:
        out().print(
            f"{path} → {to}: {len(flat)} modules, r={'/'.join(map(str, ranks)) or '-'}, {_exactness(flat, dtype)}",
            markup=False,
            soft_wrap=True,
        )


def _exactness(flat: Adapter, dtype: Dtype | None) -> str:
    cut = [f"relative error at most {flat.error:.2g} in a module"] if flat.errors else []
    rounded = [f"{'then ' * bool(cut)}rounded to {dtype}"] if flat.rounded else []
    return ", ".join(cut + rounded) or "exact"


def _outside(tree: AdapterTree, folder: Path, to: str) -> None:
    """Refuse to write where the tree lives: what is written there becomes a node of it, or replaces one."""
    if not to.strip():  # Path("") would be the current folder
        raise SpecError("--out is empty", "name a folder for the adapter: --out export/legal")
    where = as_path(to).resolve()
    home = as_path(folder).resolve()
    if _lies_in(where, home if home.is_dir() else home.parent):
        raise SpecError(
            f"--out {to} is in the tree's own folder, where an adapter is a node",
            f"write it elsewhere, or add it to the tree: AdapterTree.add(path, adapter={to!r})",
        )
    for path in tree.paths():
        source = tree[path].source
        if source is not None and _same(where, source.where.resolve()):
            raise SpecError(
                f"--out {to} would write over the files of {path}, {source.where}",
                "write it elsewhere",
            )


def _lies_in(where: Path, folder: Path) -> bool:
    return any(_same(above, folder) for above in (where, *where.parents))


def _same(one: Path, other: Path) -> bool:
    """Asked of the file system too, for which two spellings may be one folder."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
