"""The kit in deploy/ around a real vLLM: the service's own command starts it, releases are switched
under load, and its figures are those of the requests that were made.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from server import Server, serving
from test_vllm import PROMPTS, TOLERANCE, Own
from tiny import adapter, save_base

import lora_tree as lt

DEPLOY = Path(__file__).parent.parent / "deploy"
PATHS = ("fr", "fr/legal", "de")
TOKENS = (40, 47, 55, 62)
"""How many tokens each client asks for: they differ, so that answers do not end together."""
PROMPT = PROMPTS[1]
# The environment's own commands come first, as in the service.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def tree_of(base: Path, seed: int) -> lt.AdapterTree:
    tree = lt.AdapterTree(base=str(base))
    for i, path in enumerate(PATHS):
        tree.add(path, adapter=adapter(seed + i, {"q_proj": (4, 8), "up_proj": (3, 4)}))
    return tree


@dataclass(frozen=True)
class Answer:
    path: str
    release: str  # "" if it is of neither, or of both
    began: float
    ended: float


@dataclass
class World:
    server: Server
    root: Path
    cache: Path
    wanted: dict[tuple[str, str], list[float]]  # (release, path) → log-probabilities
    answers: list[Answer] = field(default_factory=list)

    def ask(self, path: str, tokens: int) -> Answer:
        began = time.monotonic()
        status, answer = self.server.complete(
            path, PROMPT, logprobs=1, max_tokens=tokens, ignore_eos=True
        )
        assert status == 200, answer
        logs = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert len(logs) == tokens
        fits = [
            release
            for (release, of), wanted in self.wanted.items()
            if of == path and furthest(logs, wanted) < TOLERANCE
        ]
        told = Answer(path, fits[0] if len(fits) == 1 else "", began, time.monotonic())
        self.answers.append(told)
        return told

    def figures(self) -> dict[tuple[str, ...], float]:
        """(Name, values of labels…) → the figure, for the plugin's own."""
        found = {}
        for family in text_string_to_metric_families(self.server.read("/metrics")):
            for sample in family.samples:
                if sample.name.startswith("lora_tree_"):
                    found[sample.name, *sample.labels.values()] = sample.value
        return found

    def waits(self, until: Callable[[], bool], what: str) -> None:
        ends = time.monotonic() + 60
        while not until():
            assert time.monotonic() < ends, f"{what}\n{self.server.log[-3000:]}"
            time.sleep(0.3)

    def health(self) -> int:
        url = f"http://127.0.0.1:{self.server.port}"
        return subprocess.run([sys.executable, str(DEPLOY / "health.py"), url]).returncode


def furthest(logs: list[float], wanted: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(logs, wanted, strict=False))


def release(root: Path, *argv: str | Path, **environment: str) -> None:
    command = ["/bin/sh", str(DEPLOY / "release.sh"), str(root), *map(str, argv)]
    subprocess.run(command, env={**os.environ, "PATH": PATH, **environment}, check=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    at = tmp_path_factory.mktemp("deployed")
    save_base(at / "base")
    root, wanted = at / "srv", {}
    for name, seed in (("2026-02", 11), ("2026-01", 1)):
        tree_of(at / "base", seed).save(at / name)
        release(root, name, at / name, SERVE_BASE=str(at / "base"))
        own = Own(lt.load(at / name), at / "base")
        for path in PATHS:
            wanted[name, path] = own.greedy(path, PROMPT, max(TOKENS))
    unit = (DEPLOY / "lora-tree-vllm.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    start = shlex.split(line.replace("/opt/lora_tree", str(DEPLOY)))
    environment = {
        "PATH": PATH,
        "SERVE_ZOO": str(root / "current"),
        "SERVE_BASE": str(at / "base"),
        "SERVE_CACHE": str(at / "cache"),
        "SERVE_MAX_RANK": "16",
        "LORA_TREE_VLLM_LOG_REQUESTS": "1",
    }
    with serving(at / "base", [], environment, at / "server.log", start=start) as server:
        yield World(server, root, at / "cache", wanted)


def test_releases_switch_under_load_and_no_answer_is_of_two(world: World) -> None:
    assert {world.ask(path, TOKENS[0]).release for path in PATHS} == {"2026-01"}
    done = threading.Event()

    def client(number: int) -> None:
        while not done.is_set():
            world.ask("fr/legal" if number < 3 else "de", TOKENS[number])

    def switched_to(name: str) -> None:
        release(world.root, name)
        began = len(world.answers)

        def has_new() -> bool:
            new = {one.path for one in world.answers[began:] if one.release == name}
            return len(new) == 2  # the clients' two

        world.waits(has_new, f"{name} is not served")

    with ThreadPoolExecutor(len(TOKENS)) as clients:
        running = [clients.submit(client, number) for number in range(len(TOKENS))]
        try:
            for name in ("2026-02", "2026-01"):  # on, and back
                switched_to(name)
        finally:
            done.set()
        for job in running:
            job.result()
    assert all(one.release for one in world.answers)
    mine = [one for one in world.answers if one.path == "fr/legal"]
    new = [one for one in mine if one.release == "2026-02"]
    first, last = min(one.began for one in new), max(one.began for one in new)
    had = min(one.ended for one in new)
    old = [one for one in mine if one.release == "2026-01"]
    # What was in flight finished as it began, while others were answered anew already.
    in_flight = [one for one in old if one.began < first < one.ended]
    assert in_flight
    # None that began after the switch was answered by the old release until the way back.
    assert not [one for one in old if had < one.began and one.ended < last]
    assert {world.ask(path, TOKENS[0]).release for path in PATHS} == {"2026-01"}
    print(f"{len(world.answers)} answers, {len(new)} of the new release, "
          f"{len(in_flight)} in flight at the switch")  # fmt: skip


def test_the_figures_are_those_of_the_requests_that_were_made(world: World) -> None:
    for name in ("nope", "fr/nope", "fr:0.5"):
        assert world.server.complete(name, PROMPT)[0] == 404
    world.waits(lambda: world.figures()["lora_tree_paths_served",] == 3, "three are served")
    told = world.figures()
    assert told["lora_tree_requests_total", "path"] == len(world.answers)
    assert told["lora_tree_requests_total", "blend"] == 0
    assert told["lora_tree_refused_total", "unknown"] == 2
    assert told["lora_tree_refused_total", "not_admitted"] == 1
    assert told["lora_tree_refused_total", "broken"] == 0
    # Each of the two releases has three paths; on the way back their adapters were there still.
    assert told["lora_tree_flattened_total",] == 6
    assert told["lora_tree_swapped_total",] == 6
    assert told["lora_tree_first_answer_delay_seconds_count",] == 3
    assert told["lora_tree_cache_evictions_total",] == 0
    files = world.cache.glob("[0-9a-f]*/*")
    assert told["lora_tree_cache_bytes",] == sum(file.stat().st_size for file in files)
    lines = re.findall(r"lora_tree: request (\{.*\})", world.server.log)
    assert len(lines) == len(world.answers)
    last = json.loads(lines[-1])
    digits = lt.load(world.root / "releases" / "2026-01")["de"].source.content[:12]
    assert (last["path"], last["nodes"]) == ("de", {"de": digits})
    print({" ".join(name): value for name, value in told.items() if "bucket" not in name[0]})


def test_health_says_when_the_tree_can_not_be_read_and_paths_are_answered_on(world: World) -> None:
    assert world.health() == 0
    away = world.root / "away"
    (world.root / "current").rename(away)
    world.waits(lambda: world.figures()["lora_tree_unreadable",] == 1, "the tree is there")
    assert world.health() == 1
    assert world.ask("fr", TOKENS[0]).release == "2026-01"
    assert world.figures()["lora_tree_paths_behind",] == 3
    away.rename(world.root / "current")
    world.waits(lambda: world.figures()["lora_tree_unreadable",] == 0, "the tree is gone")
    assert world.health() == 0
    assert torch.tensor([one.release == "" for one in world.answers]).sum() == 0
