"""``lora-tree export``: one path or blend as one ordinary PEFT adapter."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..adapter import Adapter
from ..errors import SpecError
from ..folder import load
from ..storage import as_path
from ..tree import AdapterTree
from .console import out, print_json

__all__ = ["export"]


class Dtype(StrEnum):
    """The dtypes that factors can be rounded to."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}


def export(
    folder: Annotated[Path, typer.Argument(help="A folder of adapters, or a tree.yaml.", metavar="FOLDER")],
    path: Annotated[
        str, typer.Argument(help="fr/legal, or a blend: fr/legal:0.5+fr/medical:0.5", metavar="PATH_OR_BLEND")
    ],
    to: Annotated[str, typer.Option("--out", help="The PEFT folder to write, outside the tree's own.", metavar="DIR")],
    rank: Annotated[int | None, typer.Option(help="The largest rank to keep; exact, at rank Σr, without it.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="The largest relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ allowed in a module.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Round the factors; without it fp32, or narrower where nothing is rounded.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Write a path, or a blend of paths, as one adapter that PEFT and the engines that serve PEFT adapters load."""
    tree = load(folder)
    _outside(tree, folder, to)
    flat = tree.flatten(path, rank, max_error=max_error, dtype=DTYPES[dtype] if dtype else None)
    flat.save(to)
    ranks = sorted(set(flat.ranks.values()))
    if as_json:
        print_json(
            {
                "path": path,
                "out": to,
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
            raise SpecError(f"--out {to} would write over the files of {path}, {source.where}", "write it elsewhere")


def _lies_in(where: Path, folder: Path) -> bool:
    return any(_same(above, folder) for above in (where, *where.parents))


def _same(one: Path, other: Path) -> bool:
    """Asked of the file system too, for which two spellings may be one folder."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
