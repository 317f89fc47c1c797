"""HubAdapters: single adapters of the model hub, as nodes of a tree name them.

An adapter that the cache has whole at the locked commit is used without asking the hub.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

from ...errors import HubError, listing
from ...folder.hub_name import Fetched, HubName, install_hub
from ...formats.peft import CONFIG, WEIGHTS
from ...formats.recognise import DIFFUSERS_WEIGHTS, MLX_WEIGHTS
from .client import MAIN, HubClient, Snapshot

__all__ = ["HubAdapters"]

SINGLE = ".safetensors"


class HubAdapters:
    """Adapters in the hub's cache; a `lora_tree.folder.hub_name.Hub`."""

    def fetch(self, name: HubName, commit: str | None) -> Fetched:
        """Bring an adapter into the cache; see `lora_tree.folder.hub_name.fetched`."""
        client = HubClient(name.repository, what=f"the adapter {name}", progress=False)
        choices, revision = _choices(name), commit or name.revision or MAIN
        snapshot = None
        # A commit never changes. Where a branch points now only the hub can tell.
        if commit is not None or not client.is_online:
            snapshot = client.cached(revision, choices)
        if snapshot is None:
            lacks = [] if client.is_online else client.lacking(revision, choices)
            if lacks:
                raise client.incomplete_error(revision, lacks)
            names = dict.fromkeys(itertools.chain.from_iterable(choices))
            snapshot = client.fetch(commit or name.revision, list(names))
            _check_whole(client, name, snapshot, choices)
        place = str(snapshot.folder)
        adapter_place = os.path.join(place, name.path) if name.path else place
        return Fetched(adapter_place, snapshot.commit)

    def head(self, name: HubName) -> str | None:
        """Return the commit that a name means now; None if the hub does not say."""
        try:
            client = HubClient(name.repository, what=f"the adapter {name}", progress=False)
            return client.commit_of(name.revision or MAIN) if client.is_online else None
        except HubError:
            return None


def _choices(name: HubName) -> list[list[str]]:
    """Return the lists of files of which an adapter of this name may consist.

    Their order is that of `lora_tree.formats.recognise`, where a folder fits several.
    """
    if name.path.endswith(SINGLE):
        above, _, last = name.path.rpartition("/")
        config_files = [f"{above}/{CONFIG}".lstrip("/")] if last == MLX_WEIGHTS else []
        return [[*config_files, name.path]]
    above = f"{name.path}/" if name.path else ""
    config = above + CONFIG
    return [[config, above + WEIGHTS], [config, above + MLX_WEIGHTS], [above + DIFFUSERS_WEIGHTS]]


def _check_whole(
    client: HubClient, name: HubName, snapshot: Snapshot, choices: Sequence[Sequence[str]]
) -> None:
    """Refuse an adapter of which nothing was fetched, or only a part of what the hub has.

    huggingface_hub returns what its cache has of a commit where it can't ask the hub.
    """
    lacks = []
    for choice in choices:
        lacks.append([file for file in choice if not (snapshot.folder / file).is_file()])
    if not all(lacks):
        return
    begun = [lack for lack, choice in zip(lacks, choices, strict=True) if len(lack) < len(choice)]
    if not begun:
        raise _missing_adapter_error(client, name, snapshot.commit)
    # This raises if the hub can't be asked. An adapter that is half on the hub is for its reader to
    # refuse.
    on_the_hub = client.files(snapshot.commit)
    for lack in begun:
        if all(file in on_the_hub for file in lack):
            raise HubError(
                f"{name}: {listing(lack)}: on the hub, but not fetched", "try again later"
            )


def _missing_adapter_error(client: HubClient, name: HubName, commit: str) -> HubError:
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
