"""``lora-tree extract``: write a tuned checkpoint minus its base as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ...errors import plural
from ...export import extract
from ..arguments import AsJson, TrustRemoteCode
from ..console import out, print_json
from ..export_place import Replace, check_free
from ..progress import Bar

__all__ = ["extract_difference"]


def extract_difference(
    base: Annotated[str, typer.Argument(help="The folder of the base.", metavar="BASE")],
    tuned: Annotated[str, typer.Argument(help="The folder of the tuned model.", metavar="TUNED")],
    to: Annotated[str, typer.Option("--out", help="The adapter's folder to write.", metavar="DIR")],
    rank: Annotated[
        int | None, typer.Option(help="The rank to keep; with --max-error, the largest rank.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="The largest relative error ‖D − BA‖ / ‖D‖ allowed in a module."),
    ] = None,
    ignore: Annotated[
        bool,
        typer.Option("--ignore", help="Leave out changes that no adapter can hold."),
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Round the factors to bf16.")] = False,
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Print every module's rank and error.")
    ] = False,
    replace: Replace = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write what a fine-tune changed in its base as one adapter, with each module's error."""
    check_free([Path(to)], replace=replace)  # before the comparison, which may take long
    with Bar() as bar:
        # The total comes with the first call of progress: the number of parameters is known only
        # when the base's config has been read. Until then the bar pulses.
        task = bar.add_task("comparing", total=None)
        made = extract(
            base,
            tuned,
            rank=rank,
            max_error=max_error,
            ignore=ignore,
            dtype=torch.bfloat16 if bf16 else None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            trust_remote_code=trust_remote_code,
        )
    made.adapter.save(to)
    ranks = made.adapter.ranks
    if as_json:
        print_json(
            {
                "out": to,
                "modules": len(made.adapter),
                "ranks": ranks,
                "errors": dict(made.errors),
                "worst": made.worst,
                "left": dict(made.left),
                "unchanged": made.unchanged,
            }
        )
        return
    ranks_text = "/".join(map(str, sorted(set(ranks.values()))))
    modules = plural(len(made.adapter), "module")
    text = f"{tuned} − {base} → {to}: {modules}, r={ranks_text}, "
    text += f"relative error at most {made.worst:.2g} in a module; {made.unchanged} unchanged"
    out().print(text, markup=False, soft_wrap=True)
    for name, reason in made.left.items():
        out().print(f"left behind: {name}: {reason}", markup=False, soft_wrap=True)
    for name, error in made.errors.items() if per_module else ():
        line = f"  r={ranks[name]:<4} {error:.2e}  {name}"
        out().print(line, markup=False, soft_wrap=True)
