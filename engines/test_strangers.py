"""A real vLLM and clients that send any name they like: what they cost the machine is bounded."""

from __future__ import annotations

import os
import random
import string
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from server import Server, serving
from tiny import SHAPES, adapter, save_base

import lora_tree as lt
from lora_tree.integrations.vllm import server_args

NAMES, CLIENTS = 10_000, 8
BUDGET = 2_800_000  # room for some twenty blends in use, while one is added
PROMPT = [9, 250, 3, 3, 17]
TOLERANCE = 1e-5
PATHS = (
    "fr",
    "fr/legal",
    "fr/legal/eu",
    "fr/medical",
    "de",
    "de/tech",
    *(f"cust/c{i}" for i in range(8)),
)
HIDDEN_ONE = "secret/board"


@dataclass
class World:
    server: Server
    cache: Path
    wanted: dict[str, float]

    @property
    def cache_bytes(self) -> int:
        total = 0
        for folder, _, files in os.walk(self.cache):
            for name in files:
                try:
                    total += os.stat(os.path.join(folder, name)).st_size
                except OSError:
                    continue  # it was taken away meanwhile
        return total


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    at = tmp_path_factory.mktemp("strangers")
    save_base(at / "base")
    tree = lt.AdapterTree(base=str(at / "base"))
    for group in ("cust", "secret"):
        tree.add(group, group=True)
    for seed, path in enumerate((*PATHS, HIDDEN_ONE)):
        targets = list(SHAPES)[seed % 5 : seed % 5 + 3]
        tree.add(path, adapter=adapter(seed, dict.fromkeys(targets, (2 + seed % 3, 3))))
    tree.save(at / "zoo")
    allow = ("fr/**", "de/**", "cust/*")
    args = server_args(at / "zoo", cache=at / "cache", cache_bytes=BUDGET, allow=allow, blends=True)
    model = transformers.LlamaForCausalLM.from_pretrained(at / "base", dtype=torch.float32).eval()
    attached, wanted = lt.attach(lt.load(at / "zoo"), model), {}
    for path in PATHS:
        with torch.no_grad(), attached.using(path):
            wanted[path] = float(model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).max())
    with serving(at / "base", args.flags, args.environment, at / "server.log") as server:
        yield World(server, at / "cache", wanted)


def strange(draw: random.Random) -> str:
    """A name that must be refused."""
    path = draw.choice(PATHS)
    word = "".join(draw.choices(string.printable, k=draw.randint(1, 40)))
    kinds = (
        word,
        f"gpt-{draw.random()}",
        f"{path}/{word}",
        f"{path}/../{HIDDEN_ONE}",
        HIDDEN_ONE,
        f"{HIDDEN_ONE}:0.5+{path}:0.5",
        f"{path}:1e308+{path}/x:1e308",
        f"{path}:{draw.choice(('nan', 'inf', '-inf', '1e999', '', '0x1', '1:1'))}",
        f"{draw.choice(PATHS[:4])}:1.{draw.randint(0, 10**6)}e308+de:-1e308",
        "+".join(f"{path}:{i}" for i in range(2, 2 + draw.randint(2, 400))),
        f"/{path}",
        f"{path}\x00",
        "base/" + path,
        "\N{SNOWMAN}" * draw.randint(1, 300),
        path.upper(),
        "../" * draw.randint(1, 3000) + "etc/passwd",
    )
    return draw.choice(kinds)


def test_ten_thousand_names_of_eight_clients_stay_within_the_bounds(world: World) -> None:
    server, most = world.server, 0
    valid = blends = served_blends = 0
    off = 0.0

    def client(number: int, names: int) -> tuple[int, int, int, float, int]:
        draw = random.Random(number)
        counts, off, most = [0, 0, 0], 0.0, 0
        for i in range(names):
            kind = draw.random()
            if kind < 0.1:
                path = draw.choice(PATHS)
                status, answer = server.complete(path, PROMPT, logprobs=1)
                assert status == 200, (path, answer)
                assert answer["model"] == path
                got = answer["choices"][0]["logprobs"]["token_logprobs"][0]
                off = max(off, abs(got - world.wanted[path]))
                counts[0] += 1
            elif kind < 0.105:
                one, other = draw.sample(PATHS, 2)
                name = f"{one}:{draw.random()}+{other}:{draw.random()}"
                status, answer = server.complete(name, PROMPT)
                assert status in (200, 404), answer  # 404: the half of the cache is in use
                counts[1] += 1
                counts[2] += status == 200
            else:
                name = "x" * 1_000_000 if i % 500 == 0 else strange(draw)
                status, answer = server.complete(name, PROMPT)
                assert status == 404, (name[:200], answer)
            if i % 50 == 0:
                most = max(most, world.cache_bytes)
        return *counts, off, most

    def all_clients(first: int, names: int) -> None:
        nonlocal valid, blends, served_blends, off, most
        with ThreadPoolExecutor(CLIENTS) as clients:
            jobs = [
                clients.submit(client, first + number, names // CLIENTS)
                for number in range(CLIENTS)
            ]
            for job in jobs:
                found = job.result()
                valid, blends, served_blends = (
                    valid + found[0],
                    blends + found[1],
                    served_blends + found[2],
                )
                off, most = max(off, found[3]), max(most, found[4])

    for path in PATHS:
        assert server.complete(path, PROMPT)[0] == 200
    all_clients(0, NAMES // 5)  # what is made once is made by then
    files, memory, log = server.open_files, server.resident_bytes, len(server.log)
    began = time.monotonic()
    all_clients(100, NAMES - NAMES // 5)
    took_s = time.monotonic() - began
    grown = server.resident_bytes - memory
    print(
        f"{NAMES} names, {valid} of them paths and {served_blends}/{blends} blends; the last "
        f"{NAMES - NAMES // 5} "
        f"in {took_s:.0f} s: open files {server.open_files - files:+d}, memory "
        f"{grown / 2**20:+.1f} MiB, "
        f"log {(len(server.log) - log) / (NAMES - NAMES // 5):.0f} characters a name, cache at "
        f"most {most:,} bytes"
    )
    assert valid > NAMES / 20
    assert served_blends > 10
    assert off < TOLERANCE
    assert server.open_files <= files + 2 * CLIENTS  # connections that are being closed
    assert grown < 32 << 20
    assert most <= BUDGET + (64 << 10)  # besides the adapters there are lists of what is in use
    assert len(os.listdir(world.cache / ".locks")) <= 18
    assert len(server.log) - log < 600 * NAMES
    assert not any(
        HIDDEN_ONE in entry.read_text() for entry in world.cache.glob("*/adapter_config.json")
    )
    names = {card["id"] for card in server.ask("/v1/models")[1]["data"]}
    assert set(PATHS) <= names
    assert len(names) <= 1 + len(PATHS) + 64
