"""vLLM by path name: a request for the model ``fr/legal`` is served by that path of a tree, as the tree is now.

    client ── model="fr/legal" ──▶ vLLM ── resolve_lora ──▶ FlatCache ──▶ cache/fr.legal-<content>/
                                     ▲                        ▲
                                     └── swap, once a second ─┴── the tree's folder

A plugin of vLLM's (entry point ``vllm.general_plugins``), told what to do by the environment; `server_args` says how.
vLLM asks for a name once and keeps the answer, so a thread looks at the tree and gives vLLM the new adapter of a path
whose content has changed, under a new name and a new number; or takes a path away that can't be served any more.

Read: vLLM 0.32, vllm/lora/resolver.py and vllm/entrypoints/openai/models/serving.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import LoraTreeError, SpecError
from ..export import ENGINE_RANKS, ceil_rank_of
from ..extras import need
from ..folder import survey
from ..storage import as_path
from ..tree import AdapterTree
from .flatcache import FlatCache, Flattened, Form, name_of

__all__ = ["ServerArgs", "register", "server_args"]

ZOO = "LORA_TREE_VLLM_ZOO"
CACHE = "LORA_TREE_VLLM_CACHE"
CACHE_BYTES = "LORA_TREE_VLLM_CACHE_BYTES"
MAX_RANK = "LORA_TREE_VLLM_MAX_RANK"
MAX_ERROR = "LORA_TREE_VLLM_MAX_ERROR"
POLL_S = "LORA_TREE_VLLM_POLL_S"
DEFAULT_BYTES = 10 << 30
DEFAULT_RANK = 16  # vLLM's own
ROUNDING = 1e-6
"""An error below it is that of fp32's rounding, not of a recompression."""

RESOLVER = "lora_tree"

log = logging.getLogger("vllm.lora_tree")  # below vLLM's own logger, so that it is shown where vLLM's is


@dataclass(frozen=True)
class ServerArgs:
    """What a vLLM server of a tree is started with.

    Args:
        flags: of ``vllm serve`` or ``python -m vllm.entrypoints.openai.api_server``.
        environment: for the same process.
        rank: the largest Σr of a path; where it is over the flag's rank such paths are recompressed.
    """

    flags: tuple[str, ...]
    environment: Mapping[str, str]
    rank: int


def server_args(
    folder: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str],
    max_rank: int | None = None,
    max_loras: int = 8,
    cache_bytes: int = DEFAULT_BYTES,
) -> ServerArgs:
    """The flags and the environment with which vLLM serves the paths of a tree; only headers are read.

    Args:
        folder: of the tree, or its tree.yaml.
        cache: a folder for flattened adapters, on a disk of the machine that serves.
        max_rank: the largest rank to serve; enough for every path without it, at most 512.
        max_loras: how many different paths one batch may hold.
        cache_bytes: the most that the cache folder may hold.

    Raises:
        SpecError: a number makes no sense.
        FolderError, FormatError: the tree can't be read.

    >>> import tempfile, torch
    >>> import lora_tree as lt
    >>> tree = lt.AdapterTree()
    >>> for path in ("fr", "fr/legal"):
    ...     _ = tree.add(path, adapter=lt.Adapter({"up": lt.LowRank(torch.ones(12, 16), torch.ones(16, 12))}))
    >>> with tempfile.TemporaryDirectory() as zoo:
    ...     tree.save(zoo)
    ...     made = server_args(zoo, cache="cache")
    >>> made.rank, made.flags[:3]
    (24, ('--enable-lora', '--max-lora-rank', '32'))
    """
    if max_loras < 1 or cache_bytes < 1:
        raise SpecError(f"max_loras and cache_bytes must be at least 1, got {max_loras} and {cache_bytes}")
    tree, _ = survey(folder)
    rank = max((_rank(tree, path) for path in tree.paths()), default=1)
    allowed = ceil_rank_of(max_rank or min(max(rank, 1), ENGINE_RANKS[-1]))
    flags = ("--enable-lora", "--max-lora-rank", str(allowed), "--max-loras", str(max_loras), "--max-cpu-loras",
             str(max(2 * max_loras, 16)))  # fmt: skip
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        ZOO: os.path.abspath(as_path(folder)),
        CACHE: os.path.abspath(as_path(cache)),
        CACHE_BYTES: str(cache_bytes),
        MAX_RANK: str(allowed),
    }
    return ServerArgs(flags, environment, rank)


def _rank(tree: AdapterTree, path: str) -> int:
    """The largest Σr of a module on the way to a path."""
    total: dict[str, int] = {}
    for node in tree.lineage(path):
        outline = tree.outline(node)
        for name, r in outline.ranks.items() if outline is not None else ():
            total[name] = total.get(name, 0) + r
    return max(total.values(), default=1)


# ---------------------------------------------------------------------- the plugin
def register() -> None:
    """vLLM's entry point: put the resolver in place, where the environment names a tree. Called in every process."""
    if not os.environ.get(ZOO):
        return
    resolver = need("vllm.lora.resolver", extra="vllm", what="serving a tree with vLLM")
    if RESOLVER in resolver.LoRAResolverRegistry.get_supported_resolvers():
        return
    try:
        made = _Resolver(os.environ)
    except (LoraTreeError, ValueError) as error:
        log.error("lora_tree: no path will be served: %s", error)
        return

    class TreeResolver(resolver.LoRAResolver):  # type: ignore[misc, name-defined]
        """vLLM's interface around `_Resolver`."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            return await made.resolve(base_model_name, lora_name)

    resolver.LoRAResolverRegistry.register_resolver(RESOLVER, TreeResolver())


class _Resolver:
    """One process's part: it answers vLLM, and keeps what vLLM has up to date."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        if not environment.get(CACHE):
            raise SpecError(f"{ZOO} is set and {CACHE} is not", "lora-tree vllm-args prints both")
        self._zoo = environment[ZOO]
        error = environment.get(MAX_ERROR)
        rank = int(environment.get(MAX_RANK, DEFAULT_RANK))
        self._form = Form(rank, None if error is None else float(error))
        self._cache_folder = environment[CACHE]
        self._budget = int(environment.get(CACHE_BYTES, DEFAULT_BYTES))
        self._poll_s = float(environment.get(POLL_S, "1"))
        self._cache: FlatCache | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._models: list[Any] = []
        self._said: dict[str, str] = {}
        self._starting = threading.Lock()

    async def resolve(self, base_model_name: str, name: str) -> Any:
        """vLLM's question: the adapter of a path, or None, with the reason in the log."""
        self._loop = asyncio.get_running_loop()
        models = _asking()
        if models is None:
            self._say("models", "lora_tree: this vLLM keeps its adapters elsewhere; changes of the tree need a restart")
        elif not any(known is models for known in self._models):
            self._models.append(models)
        try:
            found = await asyncio.to_thread(self._get, base_model_name, name)
        except (LoraTreeError, OSError, ValueError) as error:
            log.error("lora_tree: %r is refused: %s", name, error)
            return None
        except Exception:
            log.exception("lora_tree: %r is refused", name)
            return None
        self._tell(found)
        request = need("vllm.lora.request", extra="vllm", what="serving a tree with vLLM")
        return request.LoRARequest(lora_name=found.name, lora_int_id=1, lora_path=str(found.folder))  # vLLM numbers it

    def _get(self, base: str, name: str) -> Flattened:
        return self._opened(base).get(self._zoo, name)

    def _opened(self, base: str) -> FlatCache:
        with self._starting:
            if self._cache is None:
                shapes = _base_folder(base)
                form = Form(self._form.max_rank, self._form.max_error, shapes)
                self._cache = FlatCache(self._cache_folder, budget_bytes=self._budget, form=form, let_go=self._drop)
                threading.Thread(target=self._watch, args=(self._cache,), name="lora_tree", daemon=True).start()
            return self._cache

    def _tell(self, found: Flattened) -> None:
        for text in found.stale:
            log.warning("lora_tree: %r is served though it is stale: %s", found.path, text)
        if found.error is not None and found.error > ROUNDING:
            log.info("lora_tree: %r was recompressed, relative error %.2g", found.path, found.error)

    # ------------------------------------------------------------------ changes of the tree
    def _watch(self, cache: FlatCache) -> None:
        while True:
            time.sleep(self._poll_s)
            try:
                self._look(cache)
            except Exception as error:
                self._say("", f"lora_tree: can't look at {self._zoo}: {error}")

    def _look(self, cache: FlatCache) -> None:
        served = cache.served
        if not served:
            return
        try:
            tree, problems = survey(self._zoo)
        except LoraTreeError as error:
            self._say("", f"lora_tree: the tree can't be read, its paths go on as they were: {error}")
            return
        self._said.pop("", None)
        for path, content in served.items():
            try:
                now = cache.content(tree, problems, path)[0]
                if now != content or self._behind(path, now):
                    self._swap(cache.get(self._zoo, path))
                self._said.pop(path, None)
            except LoraTreeError as error:
                self._say(path, f"lora_tree: {path!r} is no longer served: {error}")
                cache.forget(path)
                self._drop(path)

    def _behind(self, path: str, content: str) -> bool:
        """vLLM took another content of a path: it was changed between its question and our answer."""
        known = [models.lora_requests.get(path) for models in self._models]
        return any(request is not None and request.lora_name != name_of(path, content) for request in known)

    def _say(self, about: str, text: str) -> None:
        if self._said.get(about) != text:
            self._said[about] = text
            log.error("%s", text)

    def _swap(self, found: Flattened) -> None:
        """Give vLLM the new adapter of a path that it serves, and wait until it has it."""
        self._tell(found)
        for models in self._models:
            if self._loop is not None and found.path in models.lora_requests:
                asyncio.run_coroutine_threadsafe(_replace(models, found), self._loop).result(timeout=120)
                log.info("lora_tree: %r has changed, and is now served as %s", found.path, found.name)

    def _drop(self, path: str) -> None:
        """Make vLLM ask for a path again."""
        for models in self._models:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(models.lora_requests.pop, path, None)


async def _replace(models: Any, found: Flattened) -> None:
    request = need("vllm.lora.request", extra="vllm", what="serving a tree with vLLM")
    number = models.lora_id_counter.inc(1)
    new = request.LoRARequest(lora_name=found.name, lora_int_id=number, lora_path=str(found.folder))
    await models.engine_client.add_lora(new)
    if found.path in models.lora_requests:
        models.lora_requests[found.path] = new


def _asking() -> Any:
    """vLLM's record of the adapters it was given, which asks its resolvers and hands them no way back; None where it
    is not among the callers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        who = frame.f_locals.get("self")
        if isinstance(getattr(who, "lora_requests", None), dict):
            return who
        frame = frame.f_back
    return None


def _base_folder(base: str) -> str | None:
    """Where the base's weights are on this machine; vLLM has them by now."""
    if Path(base).is_dir():
        return base
    try:
        hub = need("huggingface_hub", extra="hub", what="finding the base")
        return str(hub.snapshot_download(base, local_files_only=True))
    except Exception:
        return None
