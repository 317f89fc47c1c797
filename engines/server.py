"""A vLLM server on loopback for the length of a test; it is ended by its process id."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

START_S = 240.0
ASK_S = 60.0


class Server:
    """The requests that a test makes to it."""

    def __init__(self, port: int, log: Path, group: int) -> None:
        self.port = port
        self._url = f"http://127.0.0.1:{port}"
        self._log = log
        self._group = group

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def open_files(self) -> int:
        """Return the open files of all its processes."""
        return sum(len(os.listdir(f"/proc/{process}/fd")) for process in self._processes())

    @property
    def resident_bytes(self) -> int:
        """Memory of all its processes."""
        pages = [
            Path(f"/proc/{process}/statm").read_text().split()[1] for process in self._processes()
        ]
        return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")

    def _processes(self) -> list[int]:
        """Its process and the ones that it started, which are of its group."""
        found = []
        for entry in os.listdir("/proc"):
            with suppress(ProcessLookupError):
                if entry.isdigit() and os.getpgid(int(entry)) == self._group:
                    found.append(int(entry))
        return found

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """(HTTP status, answer)."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ASK_S) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def read(self, path: str) -> str:
        """Return a page as it is."""
        with urllib.request.urlopen(self._url + path, timeout=ASK_S) as answer:
            return str(answer.read(), "utf-8")

    def complete(self, model: str, prompt: Sequence[int], **more: Any) -> tuple[int, Any]:
        body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, **more}
        return self.ask("/v1/completions", body)


@contextmanager
def serving(
    base: Path,
    flags: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    start: Sequence[str] | None = None,
) -> Iterator[Server]:
    """A server of ``base``, ready to answer; gone when the block ends.

    Args:
        start: a command that starts it instead: it knows its base, and takes SERVE_PORT.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if start is None:
        start = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]
    command = [
        *(*start, "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--served-model-name", "base", "--max-num-seqs", "16", *flags),
    ]
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "SERVE_PORT": str(port),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **own, **environment},
            start_new_session=True,
        )  # fmt: skip
    try:
        server = Server(port, log, process.pid)
        _wait(server, process)
        yield server
        assert process.poll() is None, f"the server died:\n{server.log[-4000:]}"
    finally:
        _end(process)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if process.poll() is not None:
            break
        try:
            if server.ask("/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start within {START_S:.0f} s:\n{server.log[-6000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its process group, which it leads: the engine core is a child of it."""
    for number, wait_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait(5)
