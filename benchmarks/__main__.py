"""Run some benchmarks, or all of them.

python -m benchmarks [NAMES] [--form table|markdown|json] [--small] [--repeats N]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import transformers
import typer

from . import (
    checkpoint,
    decode,
    experts,
    first_use,
    flatten,
    gpu,
    kernels,
    opening,
    policies,
    routed,
    switch,
    thousands,
    training,
    unmerged,
)
from .common import Form, Result, tell
from .sizes import FULL, SMALL, Size


class Name(StrEnum):
    """A benchmark; each is in the file of its name."""

    switch = "switch"
    unmerged = "unmerged"
    flatten = "flatten"
    opening = "opening"
    routed = "routed"
    decode = "decode"
    training = "training"
    experts = "experts"
    checkpoint = "checkpoint"
    first_use = "first-use"
    thousands = "thousands"
    policies = "policies"
    gpu = "gpu"
    kernels = "kernels"


RUNS: dict[Name, Callable[[Size], list[Result]]] = {
    Name.switch: switch.run,
    Name.unmerged: unmerged.run,
    Name.flatten: flatten.run,
    Name.opening: opening.run,
    Name.routed: routed.run,
    Name.decode: decode.run,
    Name.training: training.run,
    Name.experts: experts.run,
    Name.checkpoint: checkpoint.run,
    Name.first_use: first_use.run,
    Name.thousands: thousands.run,
    Name.policies: policies.run,
    Name.gpu: gpu.run,
    Name.kernels: kernels.run,
}


def main(
    names: Annotated[
        list[Name] | None, typer.Argument(help="The benchmarks to run; all if none is named.")
    ] = None,
    form: Annotated[Form, typer.Option(help="What to print.")] = Form.table,
    small: Annotated[
        bool, typer.Option("--small", help="A toy size, which shows only that a benchmark runs.")
    ] = False,
    repeats: Annotated[int | None, typer.Option(min=2, help="Counted rounds.")] = None,
) -> None:
    """Time lora_tree against PEFT and against stock operations, in this process, interleaved."""
    transformers.utils.logging.disable_progress_bar()
    size = SMALL if small else FULL
    size = size if repeats is None else replace(size, repeats=repeats)
    for name in names or list(Name):
        tell(RUNS[name](size), form)


if __name__ == "__main__":
    typer.run(main)
