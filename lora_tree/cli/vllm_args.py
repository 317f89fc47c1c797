"""``lora-tree vllm-args``: the flags and the environment with which vLLM serves the paths of a tree by name."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..integrations.vllm_settings import DEFAULT_ERROR, server_args
from .arguments import AsJson, Folder
from .console import err, out, print_json

__all__ = ["vllm_args"]

MOST_PROBLEMS = 8


def vllm_args(
    folder: Folder,
    cache: Annotated[
        Path,
        typer.Option(help="Where flattened adapters go, on a disk of the machine that serves."),
    ] = Path("vllm-cache"),
    max_rank: Annotated[
        int | None,
        typer.Option(min=1, help="The largest rank to serve; enough for every path without it."),
    ] = None,
    max_error: Annotated[
        float,
        typer.Option(
            min=0.0, help="Refuse a path that loses more than this in a module at that rank."
        ),
    ] = DEFAULT_ERROR,
    max_loras: Annotated[int, typer.Option(min=1, help="Different paths in one batch.")] = 8,
    cache_gb: Annotated[
        float, typer.Option(min=0.001, help="The most that the cache may hold, in GiB.")
    ] = 10.0,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="A path that clients may ask for, or a pattern: fr/* or fr/**. Give it several times "
            "for several; every path without it."
        ),
    ] = None,
    blends: Annotated[
        bool, typer.Option("--blends", help="Let clients ask for blends: fr/legal:0.5+de:0.5.")
    ] = False,
    outside: Annotated[
        bool,
        typer.Option(
            "--outside", help="Serve adapters that tree.yaml names outside of its folder."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a vLLM server of this tree is started with."""
    made = server_args(
        folder,
        cache=cache,
        max_rank=max_rank,
        max_error=max_error,
        max_loras=max_loras,
        cache_bytes=int(cache_gb * 2**30),
        allow=allow or None,
        blends=blends,
        outside=outside,
    )
    if as_json:
        print_json(
            {
                "base": made.base,
                "flags": list(made.flags),
                "environment": dict(made.environment),
                "rank": made.rank,
            }
        )
        return
    lines = [f"export {name}={shlex.quote(value)}" for name, value in made.environment.items()]
    base = "BASE" if made.base is None else shlex.quote(made.base)
    lines.append(
        f"python -m vllm.entrypoints.openai.api_server --model {base} {shlex.join(made.flags)}"
    )
    out().print("\n".join(lines), markup=False, soft_wrap=True)
    for pattern in made.unmatched:
        err().print(f"no path of the tree fits --allow {pattern}", markup=False, soft_wrap=True)
    for problem in made.problems[:MOST_PROBLEMS]:
        err().print(f"not served as it is now: {problem.text}", markup=False, soft_wrap=True)
    if len(made.problems) > MOST_PROBLEMS:
        more = len(made.problems) - MOST_PROBLEMS
        err().print(f"and {more} more: lora-tree check", markup=False, soft_wrap=True)
    allowed = int(made.flags[2])
    if made.rank > allowed:
        note = (
            f"the largest Σr of a path is {made.rank}: such paths are recompressed to rank {allowed}, "
            f"and refused where that loses more than {max_error:g} in a module (--max-error)"
        )
        err().print(note, markup=False, soft_wrap=True)
