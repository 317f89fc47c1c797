"""The files in deploy/: each is read by the program that it is for, where that is installed, and
the scripts are run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from oracle import random_adapter
from prometheus_client import CollectorRegistry, generate_latest
from ruamel.yaml import YAML
from sampling import slow

import lora_tree as lt
from lora_tree.integrations.vllm import server_args
from lora_tree.integrations.vllm.metrics import Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
adapter = partial(random_adapter, {"up": (6, 8)})

# The commands of the environment that runs the tests come first, as they do in the service.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def run(*argv: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SERVE_")}
    return subprocess.run(
        [*map(str, argv)],
        env={**clean, "PATH": PATH, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def saved(folder: Path, seed: int) -> Path:
    tree = lt.AdapterTree(base="org/model")
    for i, path in enumerate(("fr", "fr/legal")):
        tree.add(path, adapter=adapter(seed + i))
    tree.save(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# ---------------------------------------------------------------------- a release
@slow
def test_a_release_is_checked_switched_to_never_changed_and_gone_back_from(tmp_path: Path) -> None:
    script, root = DEPLOY / "release.sh", tmp_path / "srv"
    first, second = saved(tmp_path / "first", 1), saved(tmp_path / "second", 5)
    tree = lt.load(second)
    tree.update("fr/legal", adapter=adapter(9))
    tree.save(second)  # so that there is a history, which stays behind
    assert (second / ".versions").is_dir()

    done = run(script, root, "2026-01", first)
    assert (done.returncode, done.stdout) == (0, "current is releases/2026-01; before: none\n")
    assert os.readlink(root / "current") == "releases/2026-01"
    done = run(script, root, "2026-02", second)
    assert done.stdout == "current is releases/2026-02; before: releases/2026-01\n"
    released = contents(root / "current")
    assert released == {name: data for name, data in contents(second).items() if name[0] != "."}

    for argv, reason in (
        (("2026-02", first), "a release is never changed"),
        (("../up", first), "is no name of a release"),
        (("2026-03",), "there is no release"),
    ):
        done = run(script, root, *argv)
        assert done.returncode == 1
        assert reason in done.stderr
    weights = first / "fr" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    done = run(script, root, "2026-03", first)
    assert done.returncode == 1
    assert "unlocked: fr:" in done.stderr
    assert os.readlink(root / "current") == "releases/2026-02"
    assert contents(root / "current") == released

    done = run(script, root, "2026-01")  # back
    assert done.stdout == "current is releases/2026-01; before: releases/2026-02\n"
    assert sorted(os.listdir(root)) == ["current", "releases"]
    assert sorted(os.listdir(root / "releases")) == ["2026-01", "2026-02"]  # and nothing staged


# ---------------------------------------------------------------------- the start
SHOWS = """#!/bin/sh
exec "{python}" -c '
import json, os, sys
told = {{n: v for n, v in os.environ.items() if n.startswith(("LORA_TREE_", "VLLM_"))}}
print(json.dumps([os.getpid(), sys.argv[1:], told]))
' "$@"
"""


def test_the_start_is_what_vllm_args_says_and_becomes_the_server(tmp_path: Path) -> None:
    zoo = saved(tmp_path / "a zoo", 1)
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "python").write_text(SHOWS.format(python=sys.executable))
    (fake / "python").chmod(0o755)
    environment = {
        **{name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ},
        "PATH": f"{fake}{os.pathsep}{PATH}",
        "SERVE_ZOO": str(zoo),
        "SERVE_CACHE": str(tmp_path / "it's a cache"),
        "SERVE_ALLOW": "fr/** fr",
        "SERVE_MAX_RANK": "64",
        "SERVE_BASE": "/srv/my base",
    }
    started = subprocess.Popen(
        ["/bin/sh", str(DEPLOY / "serve.sh"), "--served-model-name", "a $HOME b"],
        env=environment,
        cwd=tmp_path,  # a pattern would be expanded here
        stdout=subprocess.PIPE,
        text=True,
    )
    printed, _ = started.communicate(timeout=300)
    process, argv, told = json.loads(printed)
    cache = tmp_path / "it's a cache"
    wanted = server_args(zoo, cache=cache, max_rank=64, allow=("fr/**", "fr"))
    assert process == started.pid  # so the service manager's signals reach it
    assert told == wanted.environment
    assert argv[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert argv[2:] == [
        *("--model", "org/model", *wanted.flags),
        *("--model", "/srv/my base", "--host", "127.0.0.1", "--port", "8000"),
        *("--served-model-name", "a $HOME b"),
    ]


def test_a_tree_that_can_not_be_opened_is_not_started(tmp_path: Path) -> None:
    done = run("/bin/sh", DEPLOY / "serve.sh", SERVE_ZOO=str(tmp_path / "zoo"), SERVE_CACHE="cache")
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    done = run("/bin/sh", DEPLOY / "serve.sh", SERVE_CACHE="cache")
    assert done.returncode != 0
    assert "SERVE_ZOO" in done.stderr


# ---------------------------------------------------------------------- health
@contextmanager
def answering(pages: dict[str, str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = pages.get(self.path)
            self.send_response(503 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_health_asks_for_the_engine_the_plugin_and_the_tree() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    pages = {"/health": "", "/metrics": generate_latest(registry).decode()}
    with answering(pages) as url:
        asked = partial(run, sys.executable, DEPLOY / "health.py", url)
        assert asked().returncode == 0
        metrics.tree_is_readable(False)
        pages["/metrics"] = generate_latest(registry).decode()
        assert (asked().returncode, asked().stderr) == (
            1, "unhealthy: the tree can't be read: see the server's log\n"
        )  # fmt: skip
        pages["/metrics"] = "vllm:num_requests_running 0\n"
        assert "the plugin does not run" in asked().stderr
        del pages["/health"]
        assert "503" in asked().stderr
    assert run(sys.executable, DEPLOY / "health.py", url).returncode == 1


# ---------------------------------------------------------------------- Prometheus
def test_alerts_ask_for_figures_that_there_are() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    there = set(re.findall(r"^(lora_tree_\w+)", generate_latest(registry).decode(), re.MULTILINE))
    text = (DEPLOY / "alerts.yml").read_text() + (DEPLOY / "alerts_test.yml").read_text()
    asked = set(re.findall(r"lora_tree_\w+", text))
    assert len(asked) > 6
    assert asked <= there


@pytest.mark.parametrize(
    "argv",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_takes_the_samples(argv: tuple[str, str, str]) -> None:
    done = run(program("promtool"), *argv[:2], DEPLOY / argv[2])
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------- the container
def instructions(name: str) -> list[str]:
    """The Dockerfile's instructions of one kind, without it, on one line each."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return [" ".join(line.split()[1:]) for line in lines]


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    done = run(program("hadolint"), "--no-color", DEPLOY / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_a_user_and_holds_what_its_commands_name() -> None:
    (user,) = instructions("USER")
    assert user.isdecimal()
    assert int(user) > 0
    (healthcheck,) = instructions("HEALTHCHECK")
    (entrypoint,) = instructions("ENTRYPOINT")
    copied = [line.split() for line in instructions("COPY") if not line.startswith("--from")]
    files = [source for *sources, _ in copied for source in sources]
    assert all((ROOT / source).exists() for source in files)
    for name in ("health.py", "serve.sh"):
        assert f"deploy/{name}" in files
        assert f'"/opt/lora_tree/{name}"' in healthcheck + entrypoint
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in allowed if line.startswith("!")} == set(files)


def test_the_wheel_is_built_from_the_files_that_the_dockerfile_copies(tmp_path: Path) -> None:
    source = tmp_path / "src"
    ignored = shutil.ignore_patterns("__pycache__")
    first_stage = (DEPLOY / "Dockerfile").read_text().split("\nFROM ")[1]
    for line in re.findall(r"^COPY (.*)$", first_stage, re.MULTILINE):
        *names, to = line.split()
        for name in names:
            at = source / (
                to if len(names) == 1 and not to.endswith("/") else f"{to}/{Path(name).name}"
            )
            at.parent.mkdir(parents=True, exist_ok=True)
            copy = (
                partial(shutil.copytree, ignore=ignored) if (ROOT / name).is_dir() else shutil.copy
            )
            copy(ROOT / name, at)
    (command,) = re.findall(r"^RUN (pip wheel .*)$", first_stage, re.MULTILINE)
    argv = shlex.split(command.replace("/wheels", str(tmp_path / "wheels")))
    done = subprocess.run(
        [sys.executable, "-m", *argv, "--no-build-isolation", "--disable-pip-version-check"],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith("lora_tree-")


def settings() -> set[str]:
    """The variables that serve.sh and the plugin read."""
    plugin = (ROOT / "lora_tree/integrations/vllm/settings.py").read_text()
    start = (DEPLOY / "serve.sh").read_text()
    return set(re.findall(r"SERVE_[A-Z_]+", start)) | set(re.findall(r"LORA_TREE_VLLM_\w+", plugin))


def test_compose_publishes_to_loopback_and_mounts_the_tree_read_only() -> None:
    composed = YAML(typ="safe").load((DEPLOY / "compose.yaml").read_text())
    for name, service in composed["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or volume["read_only"] is True
    vllm = composed["services"]["vllm"]
    assert set(vllm["environment"]) <= settings()
    assert (DEPLOY / vllm["build"]["context"] / vllm["build"]["dockerfile"]).is_file()
    mounted = {volume["target"] for volume in vllm["volumes"]}
    (environment,) = instructions("ENV")
    assert "SERVE_ZOO=/zoo/current SERVE_CACHE=/cache " in environment
    assert {"/zoo", "/cache"} <= mounted


def test_docker_compose_takes_the_file() -> None:
    docker = program("docker")
    if run(docker, "compose", "version").returncode:
        pytest.skip("docker has no compose here")
    done = run(docker, "compose", "-f", DEPLOY / "compose.yaml", "config", "--quiet")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- the service
def test_systemd_takes_the_unit_and_finds_it_hardened() -> None:
    tool = program("systemd-analyze")
    unit = DEPLOY / "lora-tree-vllm.service"
    done = run(tool, "verify", unit)
    assert (done.returncode, done.stderr) == (0, "")
    done = run(tool, "security", "--offline=yes", "--threshold=40", unit)
    assert done.returncode == 0, done.stdout


def test_the_unit_starts_our_script_with_settings_that_it_reads() -> None:
    unit = (DEPLOY / "lora-tree-vllm.service").read_text()
    assert "\nExecStart=/bin/sh /opt/lora_tree/serve.sh " in unit
    assert {"NoNewPrivileges=yes", "ProtectSystem=strict", "Restart=on-failure"} <= set(
        unit.splitlines()
    )
    lines = (DEPLOY / "serve.env").read_text().splitlines()
    named = {
        line.lstrip("# ").partition("=")[0] for line in lines if re.match(r"(# )?[A-Z_]+=", line)
    }
    assert {"HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"} <= named
    assert named - {"HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"} <= settings()
    assert "SERVE_HOST=127.0.0.1" in lines
    cache = re.search(r"^CacheDirectory=(\S+)$", unit, re.MULTILINE)
    assert cache is not None
    assert f"SERVE_CACHE=/var/cache/{cache[1]}" in lines
