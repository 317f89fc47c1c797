"""HubAdapters: single adapters of the model hub, as nodes of a tree name them.

An adapter that the cache has at the locked commit is used without asking the hub.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import HubError, listing
from ..folder.hub_name import Fetched, HubName, install_hub
from ..formats.peft import CONFIG, WEIGHTS
from ..formats.recognise import DIFFUSERS_WEIGHTS, MLX_WEIGHTS
from .hub_client import MAIN, HubClient

__all__ = ["HubAdapters"]

SINGLE = ".safetensors"


class HubAdapters:
    """Adapters in the hub's cache; a `lora_tree.folder.hub_name.Hub`."""

    def fetch(self, name: HubName, commit: str | None) -> Fetched:
        """Bring an adapter into the cache; see `lora_tree.folder.hub_name.fetched`."""
        client = HubClient(name.repository, what=f"the adapter {name}", progress=False)
        names = _files(name)
        place = None if commit is None else client.cached(commit, names)
        if place is None:
            snapshot = client.fetch(commit or name.revision, names)
            place, commit = str(snapshot.folder), snapshot.commit
        assert commit is not None
        found = os.path.join(place, name.path) if name.path else place
        if not any(os.path.isfile(os.path.join(place, each)) for each in names):
            raise _not_there(client, name, commit)
        return Fetched(found, commit)

    def head(self, name: HubName) -> str | None:
        """Return the commit that a name means now; None if the hub does not say."""
        try:
            client = HubClient(name.repository, what=f"the adapter {name}", progress=False)
            return client.commit_of(name.revision or MAIN) if client.is_online else None
        except HubError:
            return None


def _files(name: HubName) -> list[str]:
    """Return the files that an adapter of this name may consist of."""
    if name.path.endswith(SINGLE):
        above, _, last = name.path.rpartition("/")
        config = [f"{above}/{CONFIG}".lstrip("/")] if last == MLX_WEIGHTS else []
        return [*config, name.path]
    above = f"{name.path}/" if name.path else ""
    return [f"{above}{each}" for each in (CONFIG, WEIGHTS, MLX_WEIGHTS, DIFFUSERS_WEIGHTS)]


def _not_there(client: HubClient, name: HubName, commit: str) -> HubError:
    what = f"{name}: no adapter there at {commit[:12]}…"
    if not client.is_online:
        return HubError(what, "the hub does not answer, so only the cache was looked at")
    files = client.files(commit)
    singles = [path for path in sorted(files) if path.endswith(SINGLE)]
    folders = [path.rpartition("/")[0] for path in sorted(files) if path.endswith(f"/{CONFIG}")]
    return HubError(what, *_advice(name, folders, singles))


def _advice(name: HubName, folders: Sequence[str], singles: Sequence[str]) -> list[str]:
    for found in (folders, singles):
        if found:
            like = HubName(name.repository, name.revision, found[0])
            return [f"it holds {listing(found)}: name one, like {like}"]
    return ["it holds no adapter at all"]


install_hub(HubAdapters())
