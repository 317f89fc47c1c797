"""``lora-tree``: the public Python surface from a shell. Nothing is possible here alone.

0  done          1  an error, in one message on stderr; problems found by check
2  wrong usage   130  interrupted

LORA_TREE_TRACEBACK=1 in the environment shows where an error came from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import printable
from .check import check
from .console import any_encoding, print_error, warnings_in_one_line
from .demo import demo
from .evaluation import evaluation
from .export import export
from .generate import generate
from .lock import lock
from .promote import promotion
from .schema import schema
from .show import show
from .train import train
from .vllm_args import vllm_args

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """The commands. A wrong use of one is told with the command line in it, which may hold names out of a glob."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            said = getattr(error, "message", None)  # typer's own kinds, whichever click they are built on
            if isinstance(said, str):
                error.message = printable(said)  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    cls=_Group,
    name="lora-tree",
    help="LoRA adapters as a tree over one base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "show": show,
    "check": check,
    "lock": lock,
    "export": export,
    "generate": generate,
    "train": train,
    "eval": evaluation,
    "promote": promotion,
    "vllm-args": vllm_args,
    "schema": schema,
    "demo": demo,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-tree {version('lora_tree')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRA adapters as a tree over one base model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code.

    Args:
        arguments: those of the process where None.
    """
    any_encoding()
    warnings_in_one_line()
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the last resort: whoever uses a shell is not who reads a traceback
        print_error(error)
        sys.exit(1)
