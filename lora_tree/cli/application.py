"""The application: the commands by name. Only the command that is asked for is imported.

Most of them need torch, which takes seconds to import. The list of commands, the topics of ``help``
and the names that a shell completes must not wait for it.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import printable
from .examples import EXAMPLES

__all__ = ["COMMANDS", "application"]


COMMANDS = {
    "show": "show:show",
    "check": "check:list_problems",
    "explore": "explore:explore",
    "lock": "lock:accept_files",
    "init": "init:new_tree",
    "add": "add:add_node",
    "mv": "mv:move_node",
    "rm": "rm:remove_nodes",
    "set": "set:set_node",
    "log": "log:list_versions",
    "restore": "restore:bring_back",
    "gc": "gc:clean_up",
    "diff": "diff:difference",
    "similar": "similar:similar_nodes",
    "squash": "squash:squash_lineage",
    "split": "split:split_node",
    "pick": "pick:pick_node",
    "rebase": "rebase:rebase_children",
    "hoist": "hoist:hoist_shared",
    "merge": "merge:merge_nodes",
    "compress": "compress:compress_nodes",
    "grow": "grow:grow_tree",
    "absorb": "absorb:absorb_adapter",
    "export": "export:export",
    "extract": "extract:extract_difference",
    "pull": "pull:pull_tree",
    "push": "push:push_tree",
    "generate": "generate:generate",
    "train": "train:train",
    "retrain": "retrain:train_again",
    "runs": "runs:list_runs",
    "eval": "eval:evaluation",
    "blame": "blame:blame_parts",
    "bisect": "bisect:bisect_steps",
    "promote": "promote:promotion",
    "llama-args": "llama_args:llama_args",
    "vllm-args": "vllm_args:vllm_args",
    "schema": "schema:schema",
    "demo": "demo:demo",
    "help": "explain:explain",
}
"""Name → ``module:function``, in `commands/`."""


class _CommandGroup(TyperGroup):
    """The commands. Usage errors are escaped, because they quote the command line.

    It may contain names that a glob expanded to, and so any character that a file name can have.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Recognised by the attribute, not by the class: some of the allowed versions of typer
            # raise click's errors, others those of a copy of click inside typer.
            message = getattr(error, "message", None)
            if isinstance(message, str):
                error.message = printable(message)  # type: ignore[attr-defined]
            raise


def application(arguments: Sequence[str]) -> typer.Typer:
    """Return the application: the requested command, and a stand-in for each other one."""
    app = typer.Typer(
        cls=_CommandGroup,
        name="lora-tree",
        help="LoRA adapters as a tree over one base model.",
        no_args_is_help=True,
        # typer would print local variables, unescaped, and they hold names from untrusted files.
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    requested = _read_command_name(arguments)
    for name, place in COMMANDS.items():
        module, _, function = place.partition(":")
        if name == requested:
            command = getattr(import_module(f".commands.{module}", __package__), function)
        else:
            command = _listed(module, function)
        app.command(name, epilog=_epilog(name))(command)
    return app


def _read_command_name(arguments: Sequence[str]) -> str | None:
    """Return the command's name, from the command line or from the one that a shell completes."""
    words = list(arguments)
    if "_LORA_TREE_COMPLETE" in os.environ:
        # The shell passes its words in the environment: bash in COMP_WORDS, the others in
        # _TYPER_COMPLETE_ARGS. Quotes may still be open, so the words are split at blanks.
        line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        words = line.split()[1:]
    # The options that may stand before a command take no command's name as their value, so the
    # first word without a dash is the command.
    return next((word for word in words if not word.startswith("-")), None)


def _epilog(name: str) -> str:
    """Return a command's examples, each a paragraph, which typer does not join."""
    return "\n\n".join(["Examples:", *EXAMPLES.get(name, ())])


def _listed(module: str, function: str) -> Callable[[], None]:
    """Return a stand-in for a command in the list of commands, with its docstring."""
    source = (
        Path(__file__).with_name("commands").joinpath(f"{module}.py").read_text(encoding="utf-8")
    )
    found = (
        n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function
    )

    def stand_in() -> None:
        # typer never calls it: the command that is asked for is the one that was imported.
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
