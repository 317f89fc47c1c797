"""Bounds: where the files of a folder may lie, and a hint for a user who named something else.

A tree's folder owns what lies in it. One exception: a snapshot in the model hub's cache holds
nothing but links, and what they lead to lies beside it, in the ``blobs`` of the same repository.

    hub/models--org--zoo/snapshots/<commit>/fr/adapter_config.json  ->  ../../../blobs/<hash>
"""

from __future__ import annotations

import os
import re

from ..formats.peft import CONFIG, WEIGHTS
from ..node_names import MAX_DEPTH

__all__ = [
    "blobs",
    "homes",
    "hub_hint",
    "inside",
    "is_in_folders",
    "leaves",
    "no_folder",
    "tree_above",
]

_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--[^/]+\Z")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}\Z")


def blobs(folder: str) -> str | None:
    """Return where a snapshot in the hub's cache keeps its files; None without one.

    Args:
        folder: a real path; the snapshot itself or a folder in it.

    >>> blobs("/hub/models--org--zoo/snapshots/1f/fr"), blobs("/home/zoo")
    ('/hub/models--org--zoo/blobs', None)
    """
    names = folder.split(os.sep)
    for at in range(1, len(names) - 1):
        if names[at] == "snapshots" and _REPOSITORY.match(names[at - 1]):
            return os.sep.join([*names[:at], "blobs"])
    return None


def inside(path: str, folder: str) -> bool:
    """Tell whether ``path``, all links followed, lies in ``folder`` or in its blobs."""
    return is_in_folders(os.path.realpath(path), homes(folder))


def homes(folder: str) -> tuple[str, ...]:
    """Return where a folder's files may lie, all links followed: in it, or in its blobs."""
    root = os.path.realpath(folder)
    blob_folder = blobs(root)
    return (root,) if blob_folder is None else (root, blob_folder)


def is_in_folders(real: str, folders: tuple[str, ...]) -> bool:
    """Tell whether a real path lies in one of some real folders, or is one.

    >>> is_in_folders("/zoo/fr", ("/zoo",)), is_in_folders("/zoos", ("/zoo",))
    (True, False)
    >>> is_in_folders("/zoo", ("/",))
    True
    """
    # The join with "" ends a folder in one separator, so /zoo does not hold /zoos; "/" stays "/".
    return any(real == home or real.startswith(os.path.join(home, "")) for home in folders)


def leaves(file: str, folder: str | None) -> bool:
    """Tell whether a file is a link out of the tree's folder; False if there is no such folder."""
    return folder is not None and os.path.islink(file) and not inside(file, folder)


def no_folder(folder: str, spelled: str, above: str = "") -> tuple[str, ...] | None:
    """Return the lines of an error if a name can't be an adapter's folder; None if it is a folder.

    Args:
        folder: where it would be.
        spelled: the user's own spelling.
        above: the folder that the spelling is relative to; the working directory where empty.
    """
    if os.path.isdir(folder):
        return None
    if os.path.lexists(folder):
        what = f"{folder}: not a folder; an adapter is a folder that holds {CONFIG} and {WEIGHTS}"
        around = os.path.dirname(folder)
        if not all(os.path.isfile(os.path.join(around, name)) for name in (CONFIG, WEIGHTS)):
            return (what,)
        # The likeliest mistake: the user named one of an adapter's two files.
        return (what, f"name the folder that it lies in: {os.path.dirname(spelled) or '.'}")
    hint = hub_hint(spelled, above)
    # Without a hint the caller reports what is missing: it knows what the folder was for.
    return (f"{folder}: no such folder", hint) if hint else None


def tree_above(folder: str) -> tuple[str, str] | None:
    """Find the tree that a folder is a part of: the nearest one above with tree.yaml or tree.lock.

    Returns:
        That folder, and the path of the node that ``folder`` is there; None if there is none.
    """
    above = os.path.dirname(folder)
    for _ in range(MAX_DEPTH):
        if any(os.path.isfile(os.path.join(above, name)) for name in ("tree.yaml", "tree.lock")):
            return above, os.path.relpath(folder, above)
        if above == os.path.dirname(above):
            break  # the root of the file system
        above = os.path.dirname(above)
    return None


def hub_hint(spelled: str, above: str = "") -> str | None:
    """Say how to get a repository of the model hub, if a missing folder's name looks like its id.

    >>> hub_hint("./zoo/fr")
    """
    # If the first part is a folder here, a path with a typo is likelier than an id.
    owner = os.path.join(above, spelled.partition("/")[0])
    if not _HUB_ID.match(spelled) or os.path.isdir(owner):
        return None
    return (
        f"if {spelled} is a repository of the model hub: hub:{spelled} names an adapter there, and "
        f"lora-tree pull {spelled} DIR brings a tree"
    )
