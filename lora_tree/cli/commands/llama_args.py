"""``lora-tree llama-args``: the flags and the requests with which llama.cpp serves a tree."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer

from ...export import llama_request
from ...folder import load
from ..arguments import AsJson, Folder
from ..console import out, print_json

__all__ = ["llama_args"]


def llama_args(
    folder: Folder,
    files: Annotated[
        str,
        typer.Option(help="The folder that export --as gguf --nodes wrote.", metavar="DIR"),
    ],
    path: Annotated[
        str | None,
        typer.Argument(
            help="fr/legal, or a blend: fr/legal:0.5+fr/medical:0.5", metavar="PATH_OR_BLEND"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the --lora flags of a llama.cpp server, or a path's list for its requests."""
    tree = load(folder)
    # The flags name every file and don't depend on the path, so without one the bare base will do.
    request = llama_request(tree, files, path or "")
    if as_json:
        print_json({"arguments": request.arguments, "lora": request.body})
    elif path is None:
        out().print(shlex.join(request.arguments), markup=False, soft_wrap=True)
    else:
        out().print(json.dumps(request.body), markup=False, soft_wrap=True)
