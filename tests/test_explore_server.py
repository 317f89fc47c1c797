"""The explorer's server: loopback alone, its own pages alone, gone when the block is left."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from sampling import slow
from speakers import language_model, save_base, tree_over

from lora_tree.cli import main
from lora_tree.errors import StateError
from lora_tree.explore.server import Served, serving

PAGE = "<p>the tree</p>"


def answer(
    served: Served,
    path: str = "/",
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], str]:
    """What a client gets that says exactly this."""
    client = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        client.request(method, path, headers=dict(headers or {}))
        got = client.getresponse()
        return got.status, {k.lower(): v for k, v in got.getheaders()}, got.read().decode()
    finally:
        client.close()


def test_the_page_is_made_anew_and_loads_nothing_from_elsewhere() -> None:
    made = iter(["one", "two"])
    with serving(lambda: next(made)) as served:
        assert [answer(served)[2], answer(served)[2]] == ["one", "two"]
    with serving(lambda: PAGE) as served:
        status, headers, text = answer(served)
        assert (status, text) == (200, PAGE)
        assert headers["content-type"].startswith("text/html")
        assert headers["content-security-policy"].startswith("default-src 'self' ")
        assert "http" not in headers["content-security-policy"]
        for closed in ("/playground/", "/docs", "/openapi.json"):
            assert answer(served, closed)[0] == 404


def test_it_listens_on_loopback_alone() -> None:
    # Linux answers for all of 127.0.0.0/8, so 127.0.0.2 reaches a server that listens on every
    # address, on a machine without a network too.
    elsewhere = "127.0.0.2"
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        try:
            socket.create_connection((elsewhere, everywhere.getsockname()[1]), timeout=20).close()
        except OSError:
            pytest.skip(f"this system does not answer for {elsewhere}")
    with serving(lambda: PAGE) as served:
        assert answer(served)[0] == 200
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((elsewhere, served.port), timeout=20).close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a name of a stranger's, turned to this machine
        {"Host": "evil.example:80"},
        {"Origin": "http://evil.example"},  # a stranger's page
        {"Origin": "null"},
    ],
    ids=str,
)
def test_a_page_of_elsewhere_does_not_reach_it(headers: dict[str, str]) -> None:
    with serving(lambda: PAGE) as served:
        assert answer(served, headers=headers)[::2] == (404, "not here\n")
        own = {"Host": f"localhost:{served.port}", "Origin": served.url.rstrip("/")}
        assert answer(served, headers=own)[0] == 200


def test_it_is_gone_when_the_block_is_left_by_an_interrupt_too() -> None:
    with pytest.raises(KeyboardInterrupt), serving(lambda: PAGE) as served:
        # An open connection does not hold it up.
        held = socket.create_connection(("127.0.0.1", served.port))
        assert answer(served)[0] == 200
        raise KeyboardInterrupt
    held.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", served.port))
    assert "lora_tree server" not in [thread.name for thread in threading.enumerate()]
    with serving(lambda: PAGE, port=served.port) as again:
        assert again.port == served.port


def test_a_port_that_is_taken_is_named() -> None:
    with serving(lambda: PAGE) as served:
        with pytest.raises(StateError) as caught, serving(lambda: PAGE, port=served.port):
            pass
        said, todo = str(caught.value).splitlines()
        assert said.startswith(f"can't listen on 127.0.0.1:{served.port}: ")
        assert todo == "  name another port, or none for a free one"
    with pytest.raises(StateError, match=r"can't listen on 127\.0\.0\.1:70000"):
        serving(lambda: PAGE, port=70000).__enter__()


# ---------------------------------------------------------------------- the command
@slow
def test_the_command_serves_the_page_with_a_playground_until_ctrl_c(tmp_path: Path) -> None:
    base = language_model()
    save_base(base, tmp_path / "base")
    tree_over(base).save(tmp_path / "zoo")
    words = ["explore", "zoo", "--base", "base", "--no-norms", "--no-open"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_tree", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it\)$", line)
        assert found, line or process.communicate()[1]
        served = Served(int(found[1]))
        assert '"playground":"/playground/"' in answer(served)[2]
        status, headers, text = answer(served, "/playground/")
        assert status == 200
        assert headers["content-security-policy"].startswith("default-src 'self' ")
        assert "gradio_config" in text
        for closed in ("gradio_api/upload", "gradio_api/file=/etc/hostname", "gradio_api/info"):
            assert answer(served, f"/playground/{closed}")[0] == 404
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
    finally:
        process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "zoo"]


def test_a_file_can_not_answer(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["explore", str(zoo), "--base", "base", "--html", "out.html"])
    said = capsys.readouterr().err
    assert "--base needs a server, and --html writes a file instead" in said
