"""``lora-tree similar``: which nodes are alike, as clusters, as JSON, as a picture."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ...algebra import similar
from ...errors import plural
from ...folder import disk, load
from ..arguments import AsJson, Folder, Nodes, SkipBroken, advise_skip, file_name
from ..console import out, print_json
from ..picture_place import check_picture_place

__all__ = ["similar_nodes"]


class Of(StrEnum):
    """The part of a node that is compared."""

    own = "own"
    lineage = "lineage"


def similar_nodes(
    folder: Folder,
    nodes: Nodes = None,
    of: Annotated[
        Of, typer.Option(help="own: the nodes' own increments. lineage: all that a path adds.")
    ] = Of.own,
    cosine: Annotated[
        float, typer.Option(min=-1.0, max=1.0, help="The least mean cosine within a cluster.")
    ] = 0.5,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--sketch",
            help="Compare exactly, or by random sketches; without it exactly if that takes only "
            "seconds.",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a heat map into this file, as SVG.", parser=file_name)
    ] = None,
    most: Annotated[int, typer.Option(min=0, help="Pairs to list, most alike first.")] = 10,
    skip_broken: SkipBroken = False,
    as_json: AsJson = False,
) -> None:
    """Compare all pairs of nodes, from their factors: the nearest pairs and the clusters."""
    check_picture_place(picture)
    tree = load(folder, skip_broken=skip_broken)
    with advise_skip(folder, skips=skip_broken):
        likeness = similar(tree, nodes or None, of=of.value, exact=exact)
    clusters = likeness.groups(cosine)
    if picture is not None:
        # Written before anything is printed, so that an error is the only output.
        disk.replace(picture, likeness.picture().encode())
    if as_json:
        print_json({"of": of, "clusters": clusters, **likeness.as_dict()})
        return
    how = "exact" if likeness.error == 0.0 else f"sketched: each cosine ± {likeness.error:.2g}"
    out().print(f"{plural(len(likeness.names), 'adapter')}, {how}", soft_wrap=True)
    for one, other, value in likeness.nearest(most):
        out().print(f"{value:7.3f}   {one}   {other}", soft_wrap=True)
    joined = [names for names in clusters if len(names) > 1]
    for names in joined:
        out().print(f"alike: {', '.join(names)}", soft_wrap=True)
    alone = len(clusters) - len(joined)
    if alone:
        out().print(f"like no other by {cosine:g}: {alone}", soft_wrap=True)
