"""``lora-tree export``: one path or blend as one ordinary PEFT adapter."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..folder import load
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
    to: Annotated[Path, typer.Option("--out", help="The PEFT folder to write.")],
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
    flat = tree.flatten(path, rank, max_error=max_error, dtype=DTYPES[dtype] if dtype else None)
    flat.save(to)
    ranks = sorted(set(flat.ranks.values()))
    if as_json:
        print_json(
            {
                "path": path,
                "out": str(to),
                "modules": len(flat),
                "ranks": ranks,
                "parameters": flat.numel,
                "bytes": flat.nbytes,
                "error": flat.error,
            }
        )
    else:
        exact = f"relative error at most {flat.error:.2g} in a module" if flat.errors else "exact"
        out().print(
            f"{path} → {to}: {len(flat)} modules, r={'/'.join(map(str, ranks)) or '-'}, {exact}", soft_wrap=True
        )
