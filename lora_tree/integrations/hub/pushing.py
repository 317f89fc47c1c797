"""Push: take a tree to the model hub as one commit, with a model card.

    ours     tree.yaml, tree.lock, the nodes' files, the card      what the commit is to hold
    theirs   the head of the branch                                what it is compared with
    draft    the files that differ                                 what is sent, on top of the head

What a push replaces stays in the repository's history.

Law: a push is refused where the tree in the repository is not the one that was last pulled or
pushed from this folder.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import FolderError, HubError, SpecError, listing, plural
from ...folder import StaleWarning, disk, load
from ...folder.problem import raise_any
from ...folder.reading.opening import inspect
from ...folder.reading.tree_place import TreePlace, place_of
from ...folder.transfer.hub_origin import HubOrigin, read_origin, write_origin
from ...folder.transfer.outgoing import Outgoing, outgoing
from ...folder.transfer.tree_files import PLACE, places_among
from ...tree import AdapterTree
from .client import MAIN, HubClient, HubFile
from .seen_commit import seen_files, spec_in

__all__ = ["Pushed", "push"]


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push, or of a dry run of one.

    Args:
        repository, branch: where the tree went.
        before: the head of the branch that it was compared with; None if there was none.
        commit: the new head; the earlier one if nothing differed; None for a dry run.
        added, replaced, deleted: paths in the repository.
        bytes: the size of the files that were added or replaced.
        base: the name of the base as others get it.
        renamed: the files in which the name of the base was replaced.
    """

    repository: str
    branch: str
    before: str | None
    commit: str | None
    added: tuple[str, ...]
    replaced: tuple[str, ...]
    deleted: tuple[str, ...]
    bytes: int
    base: str | None
    renamed: tuple[str, ...] = ()


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    branch: str | None = None,
    base_name: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    message: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Pushed:
    """Take a tree to the model hub as one commit, with a model card; the folder stays as it is.

    Only files of the tree go: tree.yaml, tree.lock (one is made if the folder has none) and the
    files of its nodes. Files of the repository's earlier tree that this one lacks are deleted; all
    other files of the repository stay.

    Args:
        folder: of the tree, or a YAML file in it, which is tree.yaml in the repository.
        repository: its id; it is made if it is not there.
        branch: made if it is not there; None: the default branch.
        base_name: the hub id of the base, where the tree names a folder of this machine.
        private: make a new repository private; None: as its owner's settings say.
        license, tags: for the card.
        message: of the commit.
        force: replace the tree in the repository, even if somebody else pushed it.
        dry_run: compare with what is there, and write nothing.
        progress: let huggingface_hub draw its bars on stderr.

    Raises:
        HubError: the hub refuses, or can't be asked; or the tree there is one that this folder has
            not seen.
        SpecError: the base is a folder of this machine, and ``base_name`` says nothing.
        FolderError: the folder is no tree, or has problems; or an adapter lies outside of it.
    """
    # Imported here: the picture and the table need rich, for which `import lora_tree` must not
    # wait.
    from .card import CARD, PICTURE, TreeCard

    place = place_of(folder)
    opened = inspect(place)
    raise_any(opened.problems, f"lora-tree lock {shlex.quote(place.spelled)}")
    if not opened.entries:
        raise FolderError(f"{place.spelled}: no tree, or one without nodes: nothing to push")
    going = outgoing(opened, base_name=base_name)
    client = HubClient(repository, what="push", progress=progress)
    if not client.is_online:
        raise client.offline()
    target = branch or MAIN
    remote = _Remote.of(client, target)
    head, remote_files = remote.head, remote.files
    if remote.has_branch and not force:
        _refuse_unseen(client, read_origin(Path(place.folder)), target, head, remote_files, going)
    card = TreeCard.of(_tree_of(place), repository, going.base)
    before = None
    if head is not None and CARD in remote_files:
        data = disk.read_file(client.fetch(head, [CARD]).folder / CARD)
        before = data.decode("utf-8-sig", errors="replace")
    files: dict[str, bytes | Path] = dict(going.files)
    files[PICTURE] = card.picture().encode()
    files[CARD] = card.text(before, license=license, tags=tags).encode()
    draft = _drafted(files, remote_files)
    deletes = sorted(set(_tree_places(remote_files, client, head)) - files.keys())
    summary = (
        tuple(path for path in draft if path not in remote_files),
        tuple(path for path in draft if path in remote_files),
        tuple(deletes),
        sum(_size(origin_) for origin_ in draft.values()),
        going.base,
        going.renamed,
    )
    if dry_run:
        return Pushed(repository, target, head, None, *summary)
    if not remote.has_branch:
        client.create(private=private)
        if target != MAIN:
            client.create_branch(target)
    # The hub makes a first commit in a new repository, with its .gitattributes.
    parent = head or client.commit_of(target)
    assert parent is not None, "the repository and the branch were made just now"
    commit = parent
    if draft or deletes:
        commit_message = (
            message or f"A tree of {plural(len(opened.entries), 'node')}, by lora-tree push"
        )
        commit = client.commit(draft, deletes, branch=target, parent=parent, message=commit_message)
        _check_arrived(client, commit, draft)
    # The folder may be one that can't be written; then the next push compares file by file.
    with suppress(FolderError):
        origin = HubOrigin(repository=repository, branch=target, commit=commit)
        write_origin(Path(place.folder), origin)
    return Pushed(repository, target, head, commit, *summary)


def _tree_of(place: TreePlace) -> AdapterTree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleWarning)  # the card tells which nodes are stale
        return load(place.spelled)


@dataclass(frozen=True)
class _Remote:
    """The commit that a push is compared with.

    Args:
        head: of the branch; if the branch is new, of the default branch; None if there is no
            repository.
        files: those of the head.
        has_branch: the branch is there.
    """

    head: str | None = None
    files: Mapping[str, HubFile] = field(default_factory=dict)
    has_branch: bool = False

    @classmethod
    def of(cls, client: HubClient, branch: str) -> _Remote:
        if not client.exists():
            return cls()
        for name in (branch, MAIN):
            head = client.commit_of(name)
            if head is not None:
                return cls(head, client.files(head), name == branch)
        return cls()


def _tree_places(there: Mapping[str, HubFile], client: HubClient, head: str | None) -> list[str]:
    """Return the files of the tree that a commit holds."""
    if head is None:
        return []
    spec = None
    if PLACE.yaml in there:
        # A tree.yaml that makes no sense says nothing of files; the new one takes its place.
        with suppress(SpecError):
            spec = spec_in(client.fetch(head, [PLACE.yaml]).folder)
    return places_among(there, spec)


def _refuse_unseen(
    client: HubClient,
    origin: HubOrigin | None,
    branch: str,
    head: str | None,
    remote_files: Mapping[str, HubFile],
    going: Outgoing,
) -> None:
    """Refuse to replace a tree that was not pulled into this folder, or pushed from it.

    Raises:
        HubError: the repository's tree has files that this folder has not seen.
    """
    places = _tree_places(remote_files, client, head)
    if origin is not None and origin.repository == client.repository and origin.commit == head:
        return
    seen = seen_files(client, origin)
    unseen = []
    for place in places:
        is_ours = place in going.files and _holds(remote_files[place], going.files[place])
        if remote_files[place] != seen.get(place) and not is_ours:
            unseen.append(place)
    if not unseen:
        return
    what = "changed by another push since" if seen else "of a tree that this folder has not pulled"
    raise HubError(
        f"{client.repository}@{branch}: {listing(unseen)}: {what}",
        "pull it into another folder and bring your changes there: lora-tree pull "
        f"{client.repository} other; or push to a branch: --branch NAME",
        "--force replaces it; the repository's history keeps it",
    )


def _drafted(
    files: Mapping[str, bytes | Path], there: Mapping[str, HubFile]
) -> dict[str, bytes | Path]:
    """Return the files that the repository lacks, or has with other bytes."""
    draft = {}
    for path, data in files.items():
        if path not in there or not _holds(there[path], data):
            draft[path] = data
    return draft


def _holds(known: HubFile, data: bytes | Path) -> bool:
    return known.is_blob(data) if isinstance(data, bytes) else known.holds(data)


def _size(data: bytes | Path) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def _check_arrived(client: HubClient, commit: str, draft: Mapping[str, bytes | Path]) -> None:
    """Compare the new commit with the files that were sent.

    Raises:
        HubError: a file is missing, or has other bytes.
    """
    # A .gitignore in the repository makes the client leave files out, with a line in its own log.
    there = client.files(commit)
    lost = [path for path, data in draft.items() if not _has_arrived(there.get(path), data)]
    if lost:
        raise HubError(
            f"{client.repository}: {listing(lost)}: missing from the commit {commit[:12]}, or not "
            "as sent",
            "look for a .gitignore in the repository that leaves them out, correct it, push again",
        )


def _has_arrived(known: HubFile | None, data: bytes | Path) -> bool:
    return known is not None and _holds(known, data)
