"""HubClient: the few calls of huggingface_hub that trees need, with its errors in our words.

Tokens, the cache, offline mode and the endpoint are huggingface_hub's own: HF_TOKEN and
``hf auth login``, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import HubError, LoraTreeError, SpecError, listing
from ...extras import hub_answers, need
from ...folder import disk

__all__ = ["MAIN", "HubClient", "HubFile", "Snapshot"]

MAIN = "main"
_LOGIN = "log in with an account that may: hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class HubFile:
    """A file in a commit, known by a hash of its bytes.

    Args:
        size: in bytes.
        blob: git's own hash; of an LFS file it is that of a pointer.
        sha256: of an LFS file's bytes; None of any other file.
    """

    size: int
    blob: str
    sha256: str | None = None

    def holds(self, file: str | Path) -> bool:
        """Tell whether a file on this machine has the same bytes."""
        if os.stat(file).st_size != self.size:
            return False
        if self.sha256 is not None:
            return disk.digest(file) == self.sha256
        return self.is_blob(disk.read_file(file))

    def is_blob(self, data: bytes) -> bool:
        """Tell whether these are the bytes of the file."""
        if self.sha256 is not None:
            return hashlib.sha256(data).hexdigest() == self.sha256
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.blob


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit in the hub's cache.

    Args:
        folder: where they lie, as links to the cache's blobs.
        commit: the hash of the commit.
    """

    folder: Path
    commit: str


class HubClient:
    """One repository of models.

    Args:
        repository: its id, ``org/zoo``.
        what: the action under way, for messages.
        progress: let huggingface_hub draw its bars on stderr.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        SpecError: ``repository`` is not a valid id.
    """

    def __init__(self, repository: str, *, what: str, progress: bool = True) -> None:
        self.repository = repository
        self._hub: Any = need("huggingface_hub", extra="hub", what=what)
        # Each submodule is imported by its name: huggingface_hub imports them lazily, and they are
        # not attributes of the package before that.
        self._errors: Any = need("huggingface_hub.errors", extra="hub", what=what)
        self._constants: Any = need("huggingface_hub.constants", extra="hub", what=what)
        self._utils: Any = need("huggingface_hub.utils", extra="hub", what=what)
        self._progress = progress
        self._listed: dict[str, dict[str, HubFile]] = {}
        try:
            self._utils.validate_repo_id(repository)
        except self._errors.HFValidationError as error:
            reason = str(error).splitlines()[0]
            raise SpecError(
                f"{repository!r}: not the id of a repository: {reason}", "expected: org/name"
            ) from error
        if "/" not in repository:
            raise SpecError(
                f"{repository!r}: no account in the repository's id",
                f"expected: org/{repository}",
            )

    @cached_property
    def is_online(self) -> bool:
        """True if the hub answers."""
        # Asked once: huggingface_hub itself would try for half a minute before it uses its cache.
        return hub_answers()

    # ------------------------------------------------------------------ reading
    def cached(self, revision: str, choices: Sequence[Sequence[str]]) -> Snapshot | None:
        """Return a commit in the cache, if the files of one choice are all there; None if not.

        The hub is not asked. It may have files that the cache lacks, and so the whole of a
        preferred choice. A choice therefore counts only if the cache has no file that an earlier
        choice has beyond this one.

        Args:
            revision: a commit, or a branch or tag, which is what it was when it was last fetched.
            choices: the lists of files of which any one is enough, the preferred one first.
        """
        cached_files = self._in_cache(revision, choices)
        for i, choice in enumerate(choices):
            earlier = set(itertools.chain.from_iterable(choices[:i]))
            if (
                choice
                and cached_files.keys() >= set(choice)
                and not earlier - set(choice) & cached_files.keys()
            ):
                depth = choice[0].count("/") + 1
                folder = Path(cached_files[choice[0]]).parents[depth - 1]
                return Snapshot(folder, folder.name)
        return None

    def lacking(self, revision: str, choices: Sequence[Sequence[str]]) -> list[str]:
        """Return what the cache lacks of the first choice of which it has any file; none if it has
        no file of any.

        Args:
            revision, choices: as of `cached`.
        """
        found = self._in_cache(revision, choices)
        for choice in choices:
            lacks = [name for name in choice if name not in found]
            if len(lacks) < len(choice):
                return lacks
        return []

    def _in_cache(self, revision: str, choices: Sequence[Sequence[str]]) -> dict[str, str]:
        """Return the files that the cache has: name → where it lies."""
        found: dict[str, str] = {}
        for name in dict.fromkeys(itertools.chain.from_iterable(choices)):
            file = self._hub.try_to_load_from_cache(self.repository, name, revision=revision)
            # Another answer is None, or a mark that the commit has no such file.
            if isinstance(file, str):
                found[name] = file
        return found

    def commit_of(self, revision: str) -> str | None:
        """Return the hash of the commit that a branch, tag or hash means; None if there is none.

        Raises:
            HubError: the repository is not there for this account, or the hub can't be asked.
        """
        with self._translated_errors(revision):
            try:
                return str(self._api.repo_info(self.repository, revision=revision).sha)
            except self._errors.RevisionNotFoundError:
                return None

    def exists(self) -> bool:
        """Tell whether the repository is there for this account."""
        with self._translated_errors():
            try:
                self._api.repo_info(self.repository)
            except self._errors.GatedRepoError:
                raise
            except self._errors.RepositoryNotFoundError:
                return False
        return True

    def files(self, commit: str) -> dict[str, HubFile]:
        """Return every file of a commit by its path.

        Raises:
            HubError: as `commit_of`, or there is no such commit.
        """
        if commit in self._listed:  # a commit never changes
            return self._listed[commit]
        file_type: Any = need("huggingface_hub.hf_api", extra="hub", what="a listing").RepoFile
        listed: dict[str, HubFile] = {}
        with self._translated_errors(commit):
            for entry in self._api.list_repo_tree(self.repository, revision=commit, recursive=True):
                if isinstance(entry, file_type):
                    sha256 = entry.lfs.sha256 if entry.lfs is not None else None
                    listed[entry.path] = HubFile(entry.size, entry.blob_id, sha256)
        self._listed[commit] = listed
        return listed

    def fetch(self, revision: str | None, names: Sequence[str]) -> Snapshot:
        """Bring files of a revision into the cache, unless they are there.

        Names that the revision lacks are skipped.

        Args:
            revision: a branch, tag or hash; None: the default branch.
            names: paths in the repository, or patterns like ``*.json``.

        Raises:
            HubError: the repository or the revision is not there, or the hub can't be asked and the
                cache lacks a part of it.
        """
        with self._translated_errors(revision or MAIN), self._bars():
            # An empty list of patterns would fetch every file.
            folder = self._hub.snapshot_download(
                self.repository,
                revision=revision,
                allow_patterns=list(names) or [".no-file"],
                local_files_only=not self.is_online,
            )
        return Snapshot(Path(folder), Path(folder).name)

    # ------------------------------------------------------------------ writing
    def create(self, *, private: bool | None) -> None:
        """Make the repository, unless it is there.

        Raises:
            HubError: this account may not.
        """
        with self._translated_errors():
            self._api.create_repo(self.repository, private=private, exist_ok=True)

    def create_branch(self, branch: str) -> None:
        """Make a branch that begins at the default branch, unless it is there."""
        with self._translated_errors(branch):
            self._api.create_branch(self.repository, branch=branch, exist_ok=True)

    def commit(
        self,
        files: Mapping[str, bytes | Path],
        deletes: Sequence[str],
        *,
        branch: str,
        parent: str,
        message: str,
    ) -> str:
        """Make one commit, and return its hash.

        Args:
            files: path in the repository → the bytes, or the file that holds them.
            deletes: paths of files to delete.
            branch: the commit becomes the head of this branch.
            parent: the head that the change was compared with.
            message: of the commit.

        Raises:
            HubError: this account may not; or the branch has moved on since.
        """
        add, delete = self._hub.CommitOperationAdd, self._hub.CommitOperationDelete
        operations: list[Any] = []
        for path, origin in files.items():
            # As a str: huggingface_hub 1.x refuses a Path.
            operations.append(add(path, origin if isinstance(origin, bytes) else str(origin)))
        operations += [delete(path) for path in deletes]
        with self._translated_errors(branch), self._bars():
            made = self._api.create_commit(
                self.repository,
                operations,
                commit_message=message,
                revision=branch,
                parent_commit=parent,
            )
        return str(made.oid)

    # ------------------------------------------------------------------ the client
    def offline(self) -> HubError:
        """Return the error for an action that needs the hub."""
        return HubError(f"{self.repository}: this needs the hub, and {self._why_offline()}")

    def incomplete_error(self, revision: str, missing: Sequence[str] = ()) -> HubError:
        """Return the error for a revision of which the cache lacks a part.

        Args:
            revision: a branch, tag or hash.
            missing: the files that it lacks, as far as they are known.
        """
        lacks = [f"it lacks {listing(missing)}"] if missing else []
        return HubError(
            f"{self.repository}: {revision} is not whole in the cache "
            f"({self._constants.HF_HUB_CACHE}), and {self._why_offline()}",
            *lacks,
            "fetch it once where the hub answers",
        )

    @property
    def _api(self) -> Any:
        return self._hub.HfApi()

    @contextmanager
    def _bars(self) -> Iterator[None]:
        """Disable huggingface_hub's progress bars if the caller wants none."""
        utils = self._utils
        if self._progress or utils.are_progress_bars_disabled():
            yield
            return
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.enable_progress_bars()

    @contextmanager
    def _translated_errors(self, revision: str = MAIN) -> Iterator[None]:
        """Raise huggingface_hub's errors as ours, each with what to do about it."""
        name, known = self.repository, self._errors
        page = f"{self._constants.ENDPOINT}/{name}"
        try:
            yield
        except (LoraTreeError, MemoryError):
            raise
        except known.GatedRepoError as error:
            raise HubError(
                f"{name}: gated: only accounts that have accepted its owners' terms can read it",
                f"accept them at {page}, then {_LOGIN}",
            ) from error
        except known.RepositoryNotFoundError as error:
            raise HubError(*self._missing_repository_lines()) from error
        except known.RevisionNotFoundError as error:
            raise HubError(
                f"{name}: no branch, tag or commit {revision!r}", f"see {page}/branches"
            ) from error
        except known.OfflineModeIsEnabled as error:
            raise HubError(f"{name}: HF_HUB_OFFLINE is set, and this needs the hub") from error
        except known.LocalEntryNotFoundError as error:
            # When the hub refuses, huggingface_hub looks into its cache, and reports only that the
            # cache lacks the file.
            cause = error.__cause__
            if isinstance(cause, known.HfHubHTTPError):
                raise HubError(*self._refused(cause)) from error
            raise self.incomplete_error(revision) from error
        except known.HfHubHTTPError as error:
            raise HubError(*self._refused(error)) from error
        except Exception as error:  # sockets, proxies, certificates: whatever its transport raises
            # The error of a refused upload names only the file; its cause has the hub's reason.
            if isinstance(error.__cause__, known.HfHubHTTPError):
                raise HubError(*self._refused(error.__cause__)) from error
            first_line = next(iter(str(error).strip().splitlines()), "")
            what = f"{name}: {type(error).__name__}: {first_line}"
            raise HubError(what, f"is {self._constants.ENDPOINT} in reach?") from error

    def _missing_repository_lines(self) -> list[str]:
        if self._hub.get_token() is None:
            return [
                f"{self.repository}: no such repository of models, or a private one, and there is "
                "no token",
                _LOGIN,
            ]
        return [
            f"{self.repository}: no such repository of models, or one that this token may not see",
            f"look at its spelling; or {_LOGIN}",
        ]

    def _why_offline(self) -> str:
        if self._constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        return f"{self._constants.ENDPOINT} does not answer"

    def _refused(self, error: Any) -> list[str]:
        """Say why the hub refused, by its status, and what to do."""
        name, status = self.repository, error.response.status_code
        reason = error.server_message or next(iter(str(error).splitlines()), "")
        if status == 401:
            return [f"{name}: the hub knows no such token: {reason}", _LOGIN]
        if status == 403:
            return [f"{name}: this account may not do that: {reason}", _LOGIN]
        if status in (409, 412):
            return [
                f"{name}: another push came in between: {reason}",
                "run lora-tree push again: it compares with the new commit",
            ]
        todo = [] if status < 500 and status != 429 else ["try again later"]
        return [f"{name}: the hub answered {status}: {reason}", *todo]
