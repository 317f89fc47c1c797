"""A front end that does with a model's name what vLLM 0.32 does, step by step, around the plugin's
resolver.

Read: vllm/entrypoints/serve/engine/serving.py (`_check_model`, `_maybe_get_adapters`) and
openai/models/serving.py. The tests in engines/ ask the real one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oracle import random_adapter
from prometheus_client import CollectorRegistry

import lora_tree as lt
from lora_tree.integrations.flat_cache import FlatCache
from lora_tree.integrations.flat_cache.shared_folder import SharedFolder
from lora_tree.integrations.vllm import front_end as vllm_front_end
from lora_tree.integrations.vllm.metrics import Metrics
from lora_tree.integrations.vllm.plugin import _Resolver
from lora_tree.integrations.vllm.settings import CACHE, CACHE_BYTES, POLL_S, ZOO, PluginSettings


def folder_of(kept: FlatCache) -> SharedFolder:
    """Return the folder behind a cache, for laws about processes that share it."""
    return kept._disk


# One small module, because these tests wait for every path to be flattened.
adapter = partial(random_adapter, {"up": (6, 8)})


def served_zoo(folder: Path) -> Path:
    """Save fr → legal, medical; de, and return the folder."""
    tree = lt.AdapterTree()
    for seed, path in enumerate(("fr", "fr/legal", "fr/medical", "de")):
        tree.add(path, adapter=adapter(seed))
    tree.save(folder)
    return folder


def waits(until: Callable[[], bool], what: str) -> None:
    """Wait until something is true; a test fails with ``what`` after 20 seconds."""
    ends = time.monotonic() + 20
    while not until():
        assert time.monotonic() < ends, what
        time.sleep(0.05)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Models:
    """vLLM's OpenAIServingModels."""

    resolver: _Resolver
    registry: CollectorRegistry
    base: str = "base"
    lora_requests: dict[str, Any] = field(default_factory=dict)
    lora_resolver_lock: dict[str, asyncio.Lock] = field(
        default_factory=lambda: defaultdict(asyncio.Lock)
    )
    running: dict[str, Any] = field(default_factory=dict)
    loaded: list[LoRARequest] = field(default_factory=list)
    number: int = 0
    fails: bool = False
    is_slow: bool = False

    @property
    def engine_client(self) -> Any:
        return SimpleNamespace(
            add_lora=self.add_lora, output_processor=SimpleNamespace(request_states=self.running)
        )

    @property
    def lora_id_counter(self) -> Any:
        return SimpleNamespace(inc=self.inc)

    def inc(self, by: int) -> int:
        self.number += by
        return self.number

    async def add_lora(self, request: LoRARequest) -> None:
        assert (Path(request.lora_path) / "adapter_model.safetensors").is_file()
        while self.is_slow:
            await asyncio.sleep(0.01)
        if self.fails:
            raise RuntimeError("the engine can't load it")
        self.loaded.append(request)

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return self.base if lora_request is None else lora_request.lora_name

    async def show_available_models(self) -> Any:
        cards = [
            SimpleNamespace(id=r.lora_name, root=r.lora_path) for r in self.lora_requests.values()
        ]
        return SimpleNamespace(data=[SimpleNamespace(id=self.base, root="/models/base"), *cards])

    async def resolve_lora(self, name: str) -> LoRARequest | None:
        async with self.lora_resolver_lock[name]:
            if name in self.lora_requests:
                return self.lora_requests[name]
            number = self.inc(1)
            request = await self.resolver.resolve("base", name)
            if request is not None:
                request.lora_int_id = number
                await self.add_lora(request)
                self.lora_requests[name] = request
            return request

    async def ask(self, name: str) -> LoRARequest | None:
        """The adapter with which a client's request is run; None is 404."""
        if name in self.lora_requests or await self.resolve_lora(name):
            return self.lora_requests[name]
        return None

    def figure(self, name: str, **labels: str) -> float:
        """One of the plugin's figures, as Prometheus would read it."""
        value = self.registry.get_sample_value(f"lora_tree_{name}", labels)
        assert value is not None, name
        return value

    def start(self, name: str) -> Future[LoRARequest | None]:
        """A request that goes on while others are made."""
        return asyncio.run_coroutine_threadsafe(self.ask(name), self.loop)

    def answers(self, *names: str) -> list[str | None]:
        """The folder that each of several requests, one after the other, is answered from."""

        async def every() -> list[str | None]:
            found = [await self.ask(name) for name in names]
            return [None if request is None else Path(request.lora_path).name for request in found]

        return asyncio.run_coroutine_threadsafe(every(), self.loop).result(60)

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)


@contextmanager
def front_end(zoo: Path, cache: Path, **more: str) -> Iterator[Models]:
    """A front end on an event loop in a thread; ``more`` is environment, as ``blends="1"``."""
    environment: Mapping[str, str] = {
        ZOO: str(zoo),
        CACHE: str(cache),
        CACHE_BYTES: str(1 << 30),
        POLL_S: "0.05",
        **{f"LORA_TREE_VLLM_{name.upper()}": value for name, value in more.items()},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            vllm_front_end, "need", lambda *_, **__: SimpleNamespace(LoRARequest=LoRARequest)
        )
        registry = CollectorRegistry()
        models = Models(_Resolver(PluginSettings.of(environment), Metrics(registry)), registry)
        thread = threading.Thread(target=models.loop.run_forever, daemon=True)
        thread.start()
        try:
            yield models
        finally:
            models.is_slow = False
            models.resolver.close()
            models.loop.call_soon_threadsafe(models.loop.stop)
            thread.join(30)
            models.loop.close()
