"""HubName: an adapter in a repository of the model hub, as tree.yaml names it.

    hub:org/name                        the default branch, the adapter at its top
    hub:org/name@v2                     a branch, a tag or a commit
    hub:org/name@v2/legal               a folder of it
    hub:org/name/style.safetensors      one file
    hub:org/name@refs%2Fpr%2F1          a slash in a revision is written %2F, as in its URLs

The files come through huggingface_hub's cache. tree.lock records their commit, and that commit is
used from then on, whatever happens to the branch, until `lora-tree lock` looks again.

Nothing in `folder/` knows the hub. The code that fetches puts itself into a slot, as files do for
the values (`lora_tree.storage`), and is imported when the first such name is met.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote, unquote

from ..errors import SpecError

__all__ = [
    "Fetched",
    "HubName",
    "fetched",
    "install_hub",
    "is_on_hub",
    "moved_to",
    "parse_hub_name",
]

PREFIX = "hub:"
_NAME = re.compile(
    r"(?P<repository>[^/@\s]+/[^/@\s]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/\s]+|[^/\s]+))?"
    r"(?:/(?P<path>\S.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """An adapter in a repository.

    Args:
        repository: its id.
        revision: a branch, a tag or a commit; None: the default branch.
        path: the folder or file in it; empty for its top.
    """

    repository: str
    revision: str | None = None
    path: str = ""

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit, which never moves."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        below = f"/{self.path}" if self.path else ""
        return f"{PREFIX}{self.repository}{at}{below}"


def is_on_hub(text: str) -> bool:
    """Tell whether an adapter's name is one on the hub."""
    return text.startswith(PREFIX)


def parse_hub_name(text: str) -> HubName | None:
    """Parse a name; return None if it does not begin with ``hub:``.

    Raises:
        SpecError: it begins so, but is no such name.

    >>> parse_hub_name("hub:org/name@refs%2Fpr%2F1/legal")
    HubName(repository='org/name', revision='refs/pr/1', path='legal')
    >>> parse_hub_name("../downloads/legal")
    """
    if not is_on_hub(text):
        return None
    match = _NAME.fullmatch(text[len(PREFIX) :])
    path = (match["path"] or "").rstrip("/") if match is not None else ""
    parts = path.split("/") if path else []
    if match is None or any(part in ("", ".", "..") for part in parts):
        raise SpecError(
            f"{text!r}: no adapter on the hub", "expected: hub:org/name[@revision][/folder or file]"
        )
    revision = match["revision"]
    return HubName(match["repository"], None if revision is None else unquote(revision), path)


@dataclass(frozen=True)
class Fetched:
    """An adapter of the hub that is in the cache.

    Args:
        place: its folder, or the one file.
        commit: the commit that it comes from.
    """

    place: str
    commit: str


class Hub(Protocol):
    """The functions that a hub offers to a tree."""

    def fetch(self, name: HubName, commit: str | None) -> Fetched: ...

    def head(self, name: HubName) -> str | None: ...


_slot: list[Hub] = []


def install_hub(hub: Hub) -> None:
    """Install the code that fetches; a later one replaces it."""
    _slot[:] = [hub]


def fetched(name: HubName, commit: str | None = None) -> Fetched:
    """Bring an adapter into the cache, unless it is there already.

    Args:
        name: the adapter's.
        commit: the commit to take, wherever the revision points now; None: where it points now.

    Raises:
        HubError: the repository, the revision or the adapter does not exist, or the hub can't be
            asked and the cache lacks a part of it.
        MissingExtra: huggingface_hub is not installed.
    """
    return _hub().fetch(name, commit)


def moved_to(name: HubName, commit: str) -> str | None:
    """Return the commit that a name means now if it is another; None if the hub does not answer."""
    if name.is_pinned:
        return None
    head = _hub().head(name)
    return None if head in (None, commit) else head


def _hub() -> Hub:
    if not _slot:
        # It fills the slot while it is imported. An import statement at the top of this file would
        # make the folder depend on the hub.
        importlib.import_module("..integrations.hub.adapters", __package__)
    return _slot[0]
