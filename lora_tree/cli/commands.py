"""The commands by name. Only the one that is asked for is imported: most of them need torch, which takes seconds."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import printable

__all__ = ["COMMANDS", "application"]


COMMANDS = {
    "show": "show:show",
    "check": "check:list_problems",
    "lock": "lock:accept_files",
    "init": "init:new_tree",
    "add": "add:add_node",
    "mv": "mv:move_node",
    "rm": "rm:remove_nodes",
    "set": "set:set_node",
    "diff": "diff:difference",
    "similar": "similar:alike",
    "squash": "squash:squash_lineage",
    "split": "split:split_node",
    "pick": "pick:pick_node",
    "rebase": "rebase:rebase_children",
    "hoist": "hoist:hoist_shared",
    "merge": "merge:merge_nodes",
    "compress": "compress:compress_nodes",
    "export": "export:export",
    "generate": "generate:generate",
    "train": "train:train",
    "eval": "eval:evaluation",
    "promote": "promote:promotion",
    "vllm-args": "vllm_args:vllm_args",
    "schema": "schema:schema",
    "demo": "demo:demo",
}
"""Name → ``module:function``, in this package."""


class _CommandGroup(TyperGroup):
    """The commands. A wrong use of one is told with the command line in it, which may hold names out of a glob."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            said = getattr(
                error, "message", None
            )  # typer's own kinds, whichever click they are built on
            if isinstance(said, str):
                error.message = printable(said)  # type: ignore[attr-defined]
            raise


def application(arguments: Sequence[str]) -> typer.Typer:
    """The application for these arguments: all commands in its help, and the one they name, whole."""
    app = typer.Typer(
        cls=_CommandGroup,
        name="lora-tree",
        help="LoRA adapters as a tree over one base model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, place in COMMANDS.items():
        module, _, function = place.partition(":")
        if name == asked:
            command = getattr(import_module(f".{module}", __package__), function)
        else:
            command = _listed(module, function)
        app.command(name)(command)
    return app


def _listed(module: str, function: str) -> Callable[[], None]:
    """A stand-in for the list of commands: the docstring of one, read from its source and not by importing it."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    found = (
        n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function
    )

    def stand_in() -> None:
        raise NotImplementedError

    stand_in.__doc__ = ast.get_docstring(next(found))
    return stand_in


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-tree {__version__}")
        raise typer.Exit


def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """LoRA adapters as a tree over one base model."""
