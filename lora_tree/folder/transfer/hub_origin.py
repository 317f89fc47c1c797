"""HubOrigin: the commit of the model hub that a folder was last pulled from or pushed to.

    .lora_tree/hub.json     {"version": 1, "repository": "org/zoo", "branch": "main", "commit": "…"}

With it a push notices that another user has pushed meanwhile, and a pull knows which files of the
folder the hub can give back. It is about this one copy of the tree, so it is no part of the tree
and is never sent. Without it both go on as if the folder had never been pulled or pushed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints, ValidationError

from ...errors import FormatError, SpecError
from ...formats import strict_json
from ...formats.limits import CONFIG_BYTES
from ...spec import FormatVersion, StrictModel, check_format
from ...system.reading import is_folder
from .. import disk
from ..lockfile import Commit
from ..transactions.record import HIDDEN

__all__ = ["HubOrigin", "read_origin", "write_origin"]

NAME = "hub.json"


class HubOrigin(StrictModel):
    """A commit of a repository, and the branch that it was the head of."""

    version: FormatVersion = 1
    repository: Annotated[str, StringConstraints(max_length=200)]
    branch: Annotated[str, StringConstraints(max_length=200)]
    commit: Commit


def read_origin(folder: Path) -> HubOrigin | None:
    """Return the origin noted in a folder; None if nothing is.

    Raises:
        NewerFormat: a newer version of this library wrote it.
        SpecError: it makes no sense.
    """
    file = folder / HIDDEN / NAME
    if not is_folder(folder / HIDDEN, follow=False) or not os.path.lexists(file):
        return None
    try:
        data = strict_json.loads(disk.read_file(file, most=CONFIG_BYTES, follow=False), str(file))
        check_format(data, str(file))
        return HubOrigin.model_validate(data)
    except (ValidationError, FormatError) as error:
        raise SpecError(
            f"{file}: not a record of a pull or push: {str(error).splitlines()[0]}",
            "remove it: the folder then counts as never pulled or pushed",
        ) from error


def write_origin(folder: Path, origin: HubOrigin) -> None:
    """Record in a folder where its tree is on the hub.

    Raises:
        FolderError: the folder can't be written.
    """
    disk.make_inside(folder / HIDDEN)
    data = json.dumps(origin.model_dump(mode="json"), indent=1) + "\n"
    disk.replace(folder / HIDDEN / NAME, data.encode())
