"""``lora-tree check``: everything that is wrong with a folder or a tree.yaml, and with a base for it.

A base is asked for its modules only: it is made without memory for weights, so a model of any size is checked at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import LoraTreeError, SpecError
from ..extras import need
from ..folder import check as check_folder
from ..folder import load
from ..lowrank import LowRank
from ..sites import find_site
from ..sites.targets import target_names
from ..tree import AdapterTree
from .console import out, print_json

__all__ = ["check"]


def check(
    folder: Annotated[Path, typer.Argument(help="A folder of adapters, or a tree.yaml.", metavar="FOLDER_OR_YAML")],
    base: Annotated[str | None, typer.Option(help="Folder or hub id of a model whose modules must fit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List every problem; exit with 1 where there are any."""
    problems = [(problem.node, str(problem.kind), problem.text) for problem in check_folder(folder)]
    if base is not None:
        skeleton = _skeleton(base)
        if all(kind in ("stale", "leftover") for _, kind, _ in problems):
            problems += [(path, "base", text) for path, text in _misfits(load(folder), skeleton)]
    if as_json:
        print_json({"folder": str(folder), "problems": [{"node": n, "kind": k, "text": t} for n, k, t in problems]})
    else:
        for _, kind, text in problems:
            out().print(f"{kind}: {text}", markup=False, soft_wrap=True)
        out().print(f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else f"{folder}: all is well")
    if problems:
        raise typer.Exit(1)


def _skeleton(base: str) -> Any:
    """The base's modules with shapes and no memory, of the class that its config names."""
    transformers = need("transformers", extra="transformers", what="check --base")
    config = transformers.AutoConfig.from_pretrained(base)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise SpecError(f"{base}: its config.json names no architecture that transformers has: {config.architectures}")
    with torch.device("meta"):
        return kind(config)


def _misfits(tree: AdapterTree, base: Any) -> Iterator[tuple[str, str]]:
    """(node, what does not fit) for every module of every node."""
    for path in tree.paths():
        node, adapter = tree[path], tree.adapter(path)
        if node.fresh is not None and adapter is None:
            try:
                target_names(base, node.fresh.over(tree.defaults))
            except LoraTreeError as error:
                yield path, f"{path}: {error}"
        for name, value in adapter.modules.items() if adapter is not None else ():
            text = _misfit(base, name, value)
            if text is not None:
                yield path, f"{path}: {text}"


def _misfit(base: Any, name: str, value: LowRank) -> str | None:
    try:
        site = find_site(base, name)
    except LoraTreeError as error:
        return str(error)
    if not site.accepts(value.layout):
        return f"{name}: a {value.layout} delta, the base has a {type(site.module).__name__} there"
    expected = site.expected(value)
    return None if value.shape == expected else f"{name}: ΔW is {value.shape}, this base needs {expected}"
