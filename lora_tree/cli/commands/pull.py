"""``lora-tree pull``: bring a tree from the model hub into a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from ...errors import plural
from ...integrations.hub import pull
from ..arguments import AsJson, Quiet, file_name
from ..console import out, print_json
from ..editing import DryRun
from ..hub_output import tell_changes
from ..progress import bars_are_wanted

__all__ = ["pull_tree"]


def pull_tree(
    repository: Annotated[
        str, typer.Argument(help="A repository of the model hub, org/zoo.", metavar="REPOSITORY")
    ],
    folder: Annotated[
        Path,
        typer.Argument(help="Write the tree into this folder.", metavar="DIR", parser=file_name),
    ],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit.", metavar="REVISION")
    ] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Bring a tree from the model hub into a folder, whole or not at all."""
    pulled = pull(
        repository,
        folder,
        revision=revision,
        dry_run=dry_run,
        progress=bars_are_wanted(),
    )
    if as_json:
        print_json({"dry_run": dry_run, **asdict(pulled)})
        return
    changed = tell_changes(pulled.new, pulled.replaced, pulled.deleted)
    what = f"{plural(changed, 'file')} changed" if changed else "up to date"
    if dry_run:
        what = f"{plural(changed, 'file')} would change"
    text = f"{repository}@{pulled.commit[:12]}… → {folder}: {what}, {decimal(pulled.bytes)} in all"
    out().print(text, soft_wrap=True)
