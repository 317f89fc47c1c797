"""A model hub on 127.0.0.1: the part of the Hub's interface that ``huggingface_hub`` uses to read
and to write.

The client is the real one; only the far end is ours. What it answers, by the client's own names:

    repo_info         GET  /api/models/ID[/revision/REV]    the commit of a branch, tag or hash
    list_repo_tree    GET  /api/models/ID/tree/REV          files: size, git's blob id, LFS's sha256
    hf_hub_download   HEAD, GET  /ID/resolve/REV/FILE       ETag and X-Repo-Commit, then the bytes
    create_repo       POST /api/repos/create                a first commit with .gitattributes
    create_branch     POST /api/models/ID/branch/NAME
    create_commit     POST /api/validate-yaml               the metadata of a README.md
                      POST /api/models/ID/preupload/REV     which files go by LFS
                      POST /ID.git/info/lfs/objects/batch   where to put them; PUT, verify follow
                      POST /api/models/ID/commit/REV        one line of JSON for each file

Commits are whole mappings of path → bytes, named by a hash of them and of their parent, and kept
for ever, as in git. A private repository is not there for a stranger, a gated one is refused: both
with the Hub's own error headers.

There is no xet here: `talking_to` turns it off, as HF_HUB_DISABLE_XET=1 does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

MAIN = "main"
OWNER = "hf_owner"
"""The token of the account that may write to ``org/…`` and see its private repositories."""
GUEST = "hf_guest"
"""The token of another account, which may only read what is public."""


def blob_id(data: bytes) -> str:
    """Git's name for a file's bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


@dataclass
class LoopbackRepo:
    """A repository: its commits for ever, and the branches that move."""

    private: bool = False
    gated: bool = False
    ignored: str = ""  # a pattern of its .gitignore
    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = MAIN, message: str = "") -> str:
        """Make these files the next commit of a branch, and return its hash."""
        parent = self.branches.get(branch, "")
        names = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        oid = hashlib.sha1("\n".join([parent, message, *names]).encode()).hexdigest()
        self.commits[oid], self.messages[oid] = dict(files), message
        self.branches[branch] = oid
        return oid

    def head(self, branch: str = MAIN) -> Mapping[str, bytes]:
        return self.commits[self.branches[branch]]

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class LoopbackHub:
    """The hub's state, for tests to set up and to look into.

    Attributes:
        repos: id → repository.
        asked: the requests so far, ``"GET /api/…"``.
        broken: pattern of a request → the status that it is answered with.
        stalled: pattern of requests that wait, for half a minute at most, until it is cleared.
    """

    def __init__(self) -> None:
        self.repos: dict[str, LoopbackRepo] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken: dict[str, int] = {}
        self.stalled = ""
        self.url = ""
        self.lock = threading.Lock()

    def repo(self, name: str, folder: Path | None = None, **how: bool) -> LoopbackRepo:
        """Make a repository with the files of a folder in its first commit."""
        made = self.repos[name] = LoopbackRepo(**how)
        files = {}
        for file in sorted(folder.rglob("*")) if folder is not None else ():
            if file.is_file():
                files[file.relative_to(folder).as_posix()] = file.read_bytes()
        made.commit(files, message="initial commit")
        return made

    def asked_for(self, pattern: str) -> list[str]:
        return [line for line in self.asked if re.search(pattern, line)]


@contextmanager
def running_hub() -> Iterator[LoopbackHub]:
    """Serve a hub on a free port of 127.0.0.1 while the block runs."""
    hub = LoopbackHub()
    handler = type("_BoundAnswers", (_Answers,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def environment(hub: LoopbackHub, home: Path, *, token: str | None = OWNER) -> dict[str, str]:
    """The environment with which a process of its own talks to the hub."""
    made = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return {**made, "HF_TOKEN": token} if token else made


def talking_to(
    hub: LoopbackHub, home: Path, patch: pytest.MonkeyPatch, *, token: str | None = OWNER
) -> None:
    """Let this process's huggingface_hub talk to the hub, as the environment would have at its
    import.
    """
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)
    # The client that it made for another endpoint, or while it was offline, is not the one to use.
    huggingface_hub.close_session()


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Answers(BaseHTTPRequestHandler):
    """One request; ``hub`` is the state that it is answered from."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_: Any) -> None:
        """Say nothing: the tests look at `LoopbackHub.asked`."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # ------------------------------------------------------------------ the frame
    def _answer(self) -> None:
        self.body = self._read_body()
        path = urlsplit(self.path).path
        line = f"{self.command} {unquote(path)}"
        with self.hub.lock:
            self.hub.asked.append(line)
        for _ in range(600):
            if not self.hub.stalled or not re.search(self.hub.stalled, line):
                break
            time.sleep(0.05)
        with self.hub.lock:
            try:
                for pattern, status in self.hub.broken.items():
                    if re.search(pattern, line):
                        raise _Refusal(status, message="broken on purpose")
                self._route(path)
            except _Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                text = json.dumps({"error": refusal.message}).encode()
                self._send(refusal.status, text, {k: v for k, v in headers.items() if v})

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _route(self, path: str) -> None:
        name = r"(?P<id>[\w.-]+/[\w.-]+)"
        routes = (
            ("GET", rf"/api/models/{name}", self._info),
            ("GET", rf"/api/models/{name}/revision/(?P<rev>[^/]+)", self._info),
            ("GET", rf"/api/models/{name}/tree/(?P<rev>[^/]+)", self._tree),
            ("GET|HEAD", rf"/{name}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", self._file),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", rf"/api/models/{name}/branch/(?P<rev>[^/]+)", self._branch),
            ("POST", rf"/api/models/{name}/preupload/(?P<rev>[^/]+)", self._preupload),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(?P<oid>\w+)", self._put),
            ("POST", r"/lfs/verify", self._verify),
            ("POST", rf"/api/models/{name}/commit/(?P<rev>[^/]+)", self._commit),
        )
        for methods, pattern, answer in routes:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split("|"):
                answer(**{key: unquote(value) for key, value in found.groupdict().items()})
                return
        raise _Refusal(404, message=f"this hub does not answer {self.command} {path}")

    # ------------------------------------------------------------------ who may
    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repo(self, name: str, *, write: bool = False, files: bool = False) -> LoopbackRepo:
        repo = self.hub.repos.get(name)
        is_owner = self._token == OWNER
        if self._token not in ("", OWNER, GUEST):
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        if repo is None or (repo.private and not is_owner):
            # As the Hub: a stranger is not told whether a private repository is there.
            raise _Refusal(404 if self._token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and files and not is_owner:
            raise _Refusal(
                403 if self._token else 401, "GatedRepo", f"Access to model {name} is restricted"
            )
        if write and not is_owner:
            raise _Refusal(403, message="You don't have the rights to write to it")
        return repo

    def _at(self, repo: LoopbackRepo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    # ------------------------------------------------------------------ reading
    def _info(self, id: str, rev: str = MAIN) -> None:
        repo = self._repo(id)
        oid = self._at(repo, rev)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        self._json(
            {
                "id": id,
                "modelId": id,
                "sha": oid,
                "private": repo.private,
                "siblings": siblings,
                "tags": [],
            }
        )

    def _tree(self, id: str, rev: str) -> None:
        repo = self._repo(id, files=True)
        told: list[dict[str, Any]] = []
        for path, data in sorted(repo.commits[self._at(repo, rev)].items()):
            entry: dict[str, Any] = {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": blob_id(data),
            }
            if is_lfs(path):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
            told.append(entry)
        self._json(told)

    def _file(self, id: str, rev: str, file: str) -> None:
        repo = self._repo(id, files=True)
        oid = self._at(repo, rev)
        data = repo.commits[oid].get(file)
        headers = {"X-Repo-Commit": oid}
        if data is None:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(data).hexdigest() if is_lfs(file) else blob_id(data)
        self._send(200, data, headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"})

    # ------------------------------------------------------------------ writing
    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self._token != OWNER:
            raise _Refusal(
                401 if not self._token else 403, message="You don't have the rights to create it"
            )
        if name in self.hub.repos:
            self._json({"url": f"{self.hub.url}/{name}"}, 409)
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        made = self.hub.repos[name] = LoopbackRepo(private=private)
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, id: str, rev: str) -> None:
        repo = self._repo(id, write=True)
        if rev in repo.branches:
            raise _Refusal(409, message="Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", MAIN)
        repo.branches[rev] = self._at(repo, start)
        self._json({})

    def _validate(self) -> None:
        text = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            known = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError as error:
            self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        warnings = [] if known else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": [], "warnings": warnings})

    def _preupload(self, id: str, rev: str) -> None:
        repo = self._repo(id, write=True)
        before = repo.commits[self._at(repo, rev)]
        told = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            oid = None
            if path in before:
                data = before[path]
                oid = hashlib.sha256(data).hexdigest() if is_lfs(path) else blob_id(data)
            ignored = bool(repo.ignored) and re.search(repo.ignored, path) is not None
            mode = "lfs" if is_lfs(path) else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self._json({"files": told})

    def _batch(self, id: str) -> None:
        self._repo(id, write=True)
        told = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
                entry["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            told.append(entry)
        self._json({"transfer": "basic", "objects": told})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, message="the bytes are not those of the object")
        self.hub.objects[oid] = self.body
        self._send(200, b"")

    def _verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404, message="no such object")
        self._json({})

    def _commit(self, id: str, rev: str) -> None:
        repo = self._repo(id, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        head = lines[0]["value"]
        if rev not in repo.branches:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        parent = head.get("parentCommit")
        if parent is not None and parent != repo.branches[rev]:
            raise _Refusal(
                412, message="A commit has happened since. Please refresh and try again."
            )
        files = dict(repo.head(rev))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif files.pop(value["path"], None) is None:  # a deletedFile
                raise _Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        oid = repo.commit(files, rev, head["summary"])
        self._json(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.hub.url}/{id}/commit/{oid}",
                "hookOutput": "",
            }
        )
