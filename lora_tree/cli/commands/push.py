"""``lora-tree push``: push a tree to the model hub, as one commit with a model card."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.filesize import decimal

from ...errors import listing, plural
from ...integrations.hub import push
from ..arguments import AsJson, Folder, Quiet
from ..console import note, out, print_json
from ..editing import DryRun
from ..hub_output import tell_changes
from ..progress import bars_are_wanted

__all__ = ["push_tree"]


def push_tree(
    folder: Folder,
    repository: Annotated[
        str, typer.Argument(help="A repository of the model hub, org/zoo.", metavar="REPOSITORY")
    ],
    branch: Annotated[
        str | None, typer.Option(help="A branch; it is made if missing.", metavar="NAME")
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="The base's hub id, where the tree names a folder.", metavar="ID"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository, if it is new, a private one.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="The license, for the model card: apache-2.0.", metavar="ID")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="A further tag of the model card; repeat it.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace the tree on the hub even if somebody else pushed it."
        ),
    ] = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Push a tree to the model hub, with a model card, as one commit."""
    pushed = push(
        folder,
        repository,
        branch=branch,
        base_name=base_name,
        private=True if private else None,
        license=license,
        tags=tag or (),
        message=message,
        force=force,
        dry_run=dry_run,
        progress=bars_are_wanted(),
    )
    if as_json:
        print_json({"dry_run": dry_run, **asdict(pushed)})
        return
    if pushed.renamed:
        note(f"{listing(pushed.renamed)}: the pushed files name the base {pushed.base}")
    changed = tell_changes(pushed.added, pushed.replaced, pushed.deleted)
    where, files = f"{repository}@{pushed.branch}", plural(changed, "file")
    if dry_run:
        text = f"{folder} → {where}: {files} would change, {decimal(pushed.bytes)}"
    elif changed:
        text = f"{folder} → {where}: {files} changed, {decimal(pushed.bytes)}"
        text += f", commit {str(pushed.commit)[:12]}…"
    else:
        text = f"{folder} → {where}: up to date, commit {str(pushed.commit)[:12]}…"
    out().print(text, soft_wrap=True)
