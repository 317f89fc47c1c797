"""``lora-tree vllm-args``: flags and environment with which vLLM serves a tree's paths by name."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ...integrations.vllm.settings import DEFAULT_ERROR, server_args
from ..arguments import AsJson, Folder, file_name
from ..console import err, out, print_json

__all__ = ["vllm_args"]

# On a terminal the problems come below the command that is to be copied. A long list of them would
# push it off the screen, and `check` lists them all.
MOST_PROBLEMS = 8


def vllm_args(
    folder: Folder,
    cache: Annotated[
        Path,
        typer.Option(
            help="Keep flattened adapters there, on a disk of the machine that serves.",
            parser=file_name,
        ),
    ] = Path("vllm-cache"),
    max_rank: Annotated[
        int | None,
        typer.Option(min=1, help="The largest rank served; without it, what every path needs."),
    ] = None,
    max_error: Annotated[
        float,
        typer.Option(
            min=0.0, help="Refuse a path that loses more than this in a module at that rank."
        ),
    ] = DEFAULT_ERROR,
    max_loras: Annotated[
        int, typer.Option(min=1, help="Serve this many different paths in one batch.")
    ] = 8,
    cache_gb: Annotated[
        float, typer.Option(min=0.001, help="Let the cache hold at most this many GiB.")
    ] = 10.0,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Let clients ask for this path or pattern, fr/* or fr/**; repeat it for several. "
            "Without it they may ask for every path."
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
    """Print the environment and the command that start a vLLM server of this tree."""
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
        problems = []
        for problem in made.problems:
            problems.append({"node": problem.node, "kind": problem.kind, "text": problem.text})
        print_json(
            {
                "base": made.base,
                "flags": list(made.flags),
                "environment": dict(made.environment),
                "rank": made.rank,
                "unmatched": list(made.unmatched),
                "problems": problems,
            }
        )
        return
    # The two parts are what a user pastes into a shell, so both are quoted for it.
    lines = [f"export {name}={shlex.quote(value)}" for name, value in made.environment.items()]
    base = "BASE" if made.base is None else shlex.quote(made.base)
    lines.append(
        f"python -m vllm.entrypoints.openai.api_server --model {base} {shlex.join(made.flags)}"
    )
    out().print("\n".join(lines), markup=False, soft_wrap=True)
    # On stderr: stdout may go straight into a file that a shell sources.
    for pattern in made.unmatched:
        err().print(f"no path of the tree matches --allow {pattern}", markup=False, soft_wrap=True)
    for problem in made.problems[:MOST_PROBLEMS]:
        err().print(f"won't be served: {problem.text}", markup=False, soft_wrap=True)
    if len(made.problems) > MOST_PROBLEMS:
        more = len(made.problems) - MOST_PROBLEMS
        err().print(
            f"and {more} more; list them with lora-tree check", markup=False, soft_wrap=True
        )
    allowed = int(made.flags[2])  # the rank that vLLM was given, one of those it allows
    if made.rank > allowed:
        note = (
            f"the largest Σr of a path is {made.rank}: such paths are recompressed to rank "
            f"{allowed}, and refused where that loses more than {max_error:g} in a module "
            "(--max-error)"
        )
        err().print(note, markup=False, soft_wrap=True)
