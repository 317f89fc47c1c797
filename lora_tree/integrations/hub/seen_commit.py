"""The tree in a commit of a repository, and the commit that a folder here has seen.

    .lora_tree/hub.json    org/zoo, main, 3f2a…                 written by the last pull or push
    commit 3f2a…           tree.yaml 81c0…    fr/… 77d1…        the folder has seen these files
    the head, 9be4…        tree.yaml 81c0…    fr/… 0c5e…        it has not seen this fr/…

A pull may replace a file here if the seen commit has it, since the hub can give it back. A push may
replace a file there if the seen commit has it, since its writer knew it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import HubError
from ...folder import disk
from ...folder.lockfile import TreeLock, parse_lock
from ...folder.transfer.hub_origin import HubOrigin
from ...folder.transfer.tree_files import PLACE
from ...folder.yamlfile import read_spec
from ...formats.limits import LOCK_BYTES, YAML_BYTES
from ...spec import TreeSpec
from .client import HubClient, HubFile

__all__ = ["lock_in", "seen_files", "spec_in"]


def seen_files(client: HubClient, origin: HubOrigin | None) -> Mapping[str, HubFile]:
    """Return the files of the commit that a folder was last pulled from, or pushed to.

    Args:
        client: of the repository.
        origin: of the folder; None: it was neither pulled nor pushed.

    Returns:
        place in the repository → file; none if the commit is of another repository, or is gone, or
        the hub is not asked.
    """
    if origin is None or origin.repository != client.repository or not client.is_online:
        return {}
    try:
        return client.files(origin.commit)
    except HubError:
        return {}


def spec_in(folder: Path) -> TreeSpec | None:
    """Return the tree.yaml in a folder of fetched files; None if there is none.

    Raises:
        SpecError: it makes no sense.
    """
    file = folder / PLACE.yaml
    if not file.is_file():
        return None
    return read_spec(disk.read_file(file, most=YAML_BYTES), str(file))[0]


def lock_in(folder: Path) -> TreeLock | None:
    """Return the tree.lock in a folder of fetched files; None if there is none.

    Raises:
        SpecError: it is broken.
    """
    file = folder / PLACE.lock
    if not file.is_file():
        return None
    return parse_lock(disk.read_file(file, most=LOCK_BYTES), str(file))
