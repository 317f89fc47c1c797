"""A real vLLM on the CPU has the tree's log-probabilities, by exported folders and by path."""

from __future__ import annotations

import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from server import Server, serving
from tiny import HIDDEN, SHAPES, adapter, save_base

import lora_tree as lt
from lora_tree.formats.peft import FILES
from lora_tree.integrations.vllm import server_args

TOLERANCE = 1e-5
PROMPTS = [
    [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100],
    [9, 250, 3, 3, 17],
    list(range(40, 100)),
]
PATHS = ("fr", "fr/legal", "fr/legal/eu", "fr/legal/eu/court", "fr/medical", "de", "de/tech")
COLD = tuple(f"cold/n{i}" for i in range(8))


def zoo(base: Path) -> lt.AdapterTree:
    """Mixed ranks, rslora, alpha patterns, node weights, other targets; depth 1 to 4."""
    tree = lt.AdapterTree(base=str(base))
    tree.add("fr", adapter=adapter(1, {"q_proj": (4, 8), "v_proj": (4, 8)}))
    tree.add(
        "fr/legal",
        adapter=adapter(2, {"q_proj": (3, 5), "down_proj": (3, 5)}, rslora=True),
        weight=0.8,
    )
    tree.add(
        "fr/legal/eu", adapter=adapter(3, {"k_proj": (2, 3), "up_proj": (5, 1), "o_proj": (2, 7)})
    )
    tree.add(
        "fr/legal/eu/court",
        adapter=adapter(4, {"gate_proj": (6, 6), "q_proj": (2, 1)}),
        weight=-0.5,
    )
    tree.add("fr/medical", adapter=adapter(5, {"v_proj": (1, 2), "gate_proj": (8, 4)}), weight=1.3)
    tree.add("de", adapter=adapter(6, dict.fromkeys(SHAPES, (4, 4)), rslora=True))
    tree.add("de/tech", adapter=adapter(7, {"o_proj": (2, 3)}))
    tree.add("cold", group=True)
    for i, path in enumerate(COLD):
        tree.add(path, adapter=adapter(20 + i, {"q_proj": (2, 2), "up_proj": (3, 1)}))
    return tree


class Own:
    """The tree's own log-probabilities, from the merged model."""

    def __init__(self, tree: lt.AdapterTree, base: Path) -> None:
        self.model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tree = lt.attach(tree, self.model)

    @torch.no_grad()
    def __call__(self, path: str, prompt: list[int]) -> torch.Tensor:
        """Return the log-probabilities of the prompt after its first token, and of the next one."""
        with self.tree.using(path):
            logs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        ids = torch.tensor([*prompt[1:], int(logs[-1].argmax())])
        return logs[torch.arange(len(prompt)), ids]

    def greedy(self, path: str, prompt: list[int], tokens: int) -> list[float]:
        """Return log-probabilities of the likeliest next tokens, one after the other."""
        logs = []
        for _ in range(tokens):
            logs.append(float(self(path, prompt)[-1]))
            with torch.no_grad(), self.tree.using(path):
                prompt = [*prompt, int(self.model(torch.tensor([prompt])).logits[0, -1].argmax())]
        return logs


def theirs(server: Server, model: str, prompt: list[int]) -> torch.Tensor:
    """Return the same of vLLM: prompt tokens computed anew, the next one through its caches."""
    status, answer = server.complete(model, prompt, prompt_logprobs=0)
    assert status == 200, answer
    read = zip(prompt[1:], answer["choices"][0]["prompt_logprobs"][1:], strict=True)
    found = [entry[str(token)]["logprob"] for token, entry in read]
    status, answer = server.complete(model, prompt, logprobs=1)
    assert status == 200, answer
    return torch.tensor([*found, answer["choices"][0]["logprobs"]["token_logprobs"][0]])


def furthest(server: Server, own: Own, path: str, model: str | None = None) -> float:
    """The largest difference of a log-probability over all prompts."""
    return max(
        float((theirs(server, model or path, p) - own(path, p)).abs().max()) for p in PROMPTS
    )


@dataclass
class World:
    server: Server
    own: Own
    zoo: Path
    base: Path
    exported: dict[str, str]

    def waits(self, until: Callable[[], bool], what: str) -> None:
        ends = time.monotonic() + 20
        while not until():
            assert time.monotonic() < ends, f"{what}\n{self.server.log[-3000:]}"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    at = tmp_path_factory.mktemp("world")
    save_base(at / "base")
    zoo(at / "base").save(at / "zoo")
    args = server_args(at / "zoo", cache=at / "cache", blends=True)
    flags, exported = list(args.flags), {}
    tree = lt.load(at / "zoo")
    for path in PATHS:
        exported[path] = f"exported-{path.replace('/', '-')}"
        lt.portable(tree, path, ceil_rank=True).save(at / "out" / path)
    flags += ["--lora-modules", *(f"{name}={at / 'out' / path}" for path, name in exported.items())]
    with serving(at / "base", flags, args.environment, at / "server.log") as server:
        yield World(
            server, Own(lt.load(at / "zoo"), at / "base"), at / "zoo", at / "base", exported
        )


def test_exported_folders_give_the_tree_s_log_probabilities(world: World) -> None:
    off = {
        path: furthest(world.server, world.own, path, name) for path, name in world.exported.items()
    }
    print("exported:", {path: f"{value:.1e}" for path, value in off.items()})
    assert max(off.values()) < TOLERANCE
    prompt = PROMPTS[0]
    bare = world.own("", prompt)
    assert all(float((world.own(path, prompt) - bare).abs().max()) > 0.01 for path in PATHS)


def test_path_names_give_the_tree_s_log_probabilities(world: World) -> None:
    off = {path: furthest(world.server, world.own, path) for path in PATHS}
    off["fr/legal:0.5+de:0.5"] = furthest(world.server, world.own, "fr/legal:0.5+de:0.5")
    print("by name:", {path: f"{value:.1e}" for path, value in off.items()})
    assert max(off.values()) < TOLERANCE


def test_eight_clients_ask_for_eight_cold_paths_at_once(world: World) -> None:
    """Ask for sampled tokens only.

    vLLM 0.32 dies of prompt log-probabilities in a batch of several adapters.
    """

    def asked(path: str) -> list[float]:
        status, answer = world.server.complete(path, PROMPTS[1], logprobs=1, max_tokens=4)
        assert status == 200, answer
        logs: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
        return logs

    def client(number: int) -> float:
        mine = COLD[number:] + COLD[:number]
        return max(
            abs(x - y) for path in mine for x, y in zip(asked(path), wanted[path], strict=True)
        )

    wanted = {path: world.own.greedy(path, PROMPTS[1], 4) for path in COLD}
    assert not any(path in world.server.log for path in COLD)
    with ThreadPoolExecutor(8) as clients:
        off = max(clients.map(client, range(8)))
    print(f"cold paths: {off:.1e}")
    assert off < TOLERANCE


def test_a_node_that_is_replaced_gives_new_answers_and_a_stale_one_a_warning(world: World) -> None:
    assert furthest(world.server, world.own, "fr/legal") < TOLERANCE
    assert furthest(world.server, world.own, "fr/legal/eu") < TOLERANCE
    tree = lt.load(world.zoo)
    tree.update("fr/legal", adapter=adapter(50, {"q_proj": (5, 9), "v_proj": (2, 2)}))
    tree.save(world.zoo)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.StaleWarning)
        now = Own(lt.load(world.zoo), world.base)
    old = world.own("fr/legal", PROMPTS[0])
    assert float((now("fr/legal", PROMPTS[0]) - old).abs().max()) > 0.01

    def is_new() -> bool:
        got = theirs(world.server, "fr/legal", PROMPTS[0])
        new = float((got - now("fr/legal", PROMPTS[0])).abs().max()) < TOLERANCE
        assert new or float((got - old).abs().max()) < TOLERANCE  # the one or the other, no mixture
        return new

    world.waits(is_new, "the new node was not picked up")
    assert furthest(world.server, now, "fr/legal") < TOLERANCE
    world.waits(lambda: furthest(world.server, now, "fr/legal/eu") < TOLERANCE, "nor was its child")
    world.waits(
        lambda: furthest(world.server, now, "fr/legal/eu/court") < TOLERANCE,
        "nor was its grandchild",
    )
    assert furthest(world.server, now, "de") < TOLERANCE
    assert (
        "'fr/legal/eu' is served though it is stale: fr/legal/eu: the lineage of fr/legal has "
        "changed" in world.server.log
    )


def test_every_path_below_is_answered_while_a_file_is_replaced_in_two_halves(
    world: World, tmp_path: Path
) -> None:
    """As a copy in place does it: half of the weights, the other half, and the lock at the end."""
    copy = tmp_path / "zoo"
    shutil.copytree(world.zoo, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.StaleWarning)
        was, tree = Own(lt.load(world.zoo), world.base), lt.load(copy)
        tree.update("de", adapter=adapter(60, dict.fromkeys(SHAPES, (4, 4)), rslora=True))
        tree.save(copy)
        now = Own(lt.load(copy), world.base)
    file = world.zoo / "de" / "adapter_model.safetensors"
    whole = (copy / "de" / "adapter_model.safetensors").read_bytes()
    assert len(whole) == file.stat().st_size
    paths, prompt = ("de", "de/tech", "fr"), PROMPTS[1]
    old, new = ({path: float(own(path, prompt)[-1]) for path in paths} for own in (was, now))
    assert abs(old["de"] - new["de"]) > 0.01
    assert abs(old["de/tech"] - new["de/tech"]) > 0.01
    answers: list[tuple[str, int, float]] = []
    done = threading.Event()

    def client(path: str) -> None:
        while not done.is_set():
            status, answer = world.server.complete(path, prompt, logprobs=1)
            value = (
                answer["choices"][0]["logprobs"]["token_logprobs"][0] if status == 200 else math.nan
            )
            answers.append((path, status, value))

    def answered(times: int) -> None:
        before = {path: [one[0] for one in answers].count(path) for path in paths}

        def enough() -> bool:
            paths_seen = [one[0] for one in answers]
            return all(paths_seen.count(path) >= before[path] + times for path in paths)

        world.waits(enough, "a client gets no answers")

    def is_new(path: str) -> bool:
        last = next(value for one, _, value in reversed(answers) if one == path)
        return abs(last - new[path]) < TOLERANCE

    def half(at: int, data: bytes) -> None:
        with file.open("r+b") as stream:  # the same file, while the server may be reading it
            stream.seek(at)
            stream.write(data)

    with ThreadPoolExecutor(len(paths)) as clients:
        running = [clients.submit(client, path) for path in paths]
        try:
            answered(3)
            half(0, whole[: len(whole) // 2])
            world.waits(
                lambda: "'de/tech' stays in its old version" in world.server.log, "nothing was said"
            )
            answered(5)
            half(len(whole) // 2, whole[len(whole) // 2 :])
            answered(5)
            assert all(abs(value - old[path]) < TOLERANCE for path, _, value in answers)
            (world.zoo / "tree.lock").write_bytes((copy / "tree.lock").read_bytes())
            world.waits(lambda: all(map(is_new, paths)), "the whole file was not taken")
            answered(5)
        finally:
            done.set()
        for job in running:
            job.result()
    assert {status for _, status, _ in answers} == {200}
    for path in paths:
        values = [value for one, _, value in answers if one == path]
        switched = next(i for i, value in enumerate(values) if abs(value - new[path]) < TOLERANCE)
        assert all(abs(value - old[path]) < TOLERANCE for value in values[:switched])
        assert all(abs(value - new[path]) < TOLERANCE for value in values[switched:])
    print(f"answers while the file was replaced: {len(answers)}")


def test_what_can_not_be_served_is_refused_with_the_reason_and_the_server_lives_on(
    world: World,
) -> None:
    server = world.server
    status, answer = server.complete("fr/legol", PROMPTS[0])
    assert status == 404, answer
    assert (
        "'fr/legol' is refused: no node 'fr/legol' in the tree; did you mean 'fr/legal'?"
        in server.log
    )
    weights = world.zoo / "fr" / "medical" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    assert furthest(server, world.own, "fr/medical") < TOLERANCE
    shutil.copy(world.zoo / "de" / "tech" / "adapter_model.safetensors", weights)
    world.waits(
        lambda: "'fr/medical' stays in its old version: unlocked: fr/medical:" in server.log,
        "nothing was said",
    )
    assert (
        server.complete("fr/medical:0.5", PROMPTS[0])[0] == 404
    )  # it was never served, so there is no good copy
    assert furthest(server, world.own, "fr/medical") < TOLERANCE
    assert furthest(server, world.own, "fr") < TOLERANCE
    weights.write_bytes(whole)
    world.waits(
        lambda: "the files of 'fr/medical' are whole again" in server.log,
        "nor that it is whole again",
    )
    # No save of ours takes such numbers, but other programs write them.
    nan = lt.LowRank(torch.full((2, HIDDEN), torch.nan), torch.ones(HIDDEN, 2))
    broken = world.zoo.parent / "broken"
    lt.Adapter({"model.layers.0.self_attn.q_proj": nan}).save(broken)
    node = weights.parent
    files = {name: (node / name).read_bytes() for name in FILES}
    for name in FILES:
        (node / name).write_bytes((broken / name).read_bytes())
    lt.lock(world.zoo)
    world.waits(
        lambda: server.complete("fr/medical", PROMPTS[0])[0] == 404, "a broken node was served"
    )
    assert "'fr/medical' is no longer served: fr/medical:" in server.log
    assert "the factors are not finite" in server.log
    assert furthest(server, world.own, "fr") < TOLERANCE
    for name, data in files.items():
        (node / name).write_bytes(data)
    lt.lock(world.zoo)
    world.waits(
        lambda: server.complete("fr/medical", PROMPTS[0])[0] == 200,
        "the repaired node was not served",
    )
    assert furthest(server, world.own, "fr/medical") < TOLERANCE
