"""vLLM by path name: a request for the model ``fr/legal`` is served by that path of a tree, as the
tree is now.

    client ─ model="fr/legal" ─▶ vLLM ─ resolve_lora ─▶ names ─▶ tree ─▶ FlatCache ─▶ cache/…
                                  ▲                                         ▲
                                  └────────── swap, once a second ──────────┴── the tree's folder

This is a plugin of vLLM (entry point ``vllm.general_plugins``), configured by the environment
variables that `server_args` returns. vLLM asks for a name once and keeps the answer. So a thread
looks at the tree, and gives vLLM the new adapter of a path whose content has changed, under a new
name and a new number; or it removes a path that is no longer in the tree (`watch.py`).

Law: a path that was served goes on being served, as it was, while its files are not whole or do not
fit the lock. A name that is refused costs no look at the tree, no file and no memory, only one
short line in the log.

Read: vLLM 0.32, vllm/lora/resolver.py; see `front_end.py` for the rest.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...errors import FolderError, LoraTreeError, PathError, UnlockedError
from ...extras import need
from ...folder import Problem, survey
from ...tree import AdapterTree
from ..flat_cache import FlatCache, FlatForm, Flattened, NoRoom
from .client_names import RequestedName, shown
from .front_end import Front, find_serving_models, request_of
from .log import OnceLog, log, reason, tell_request, tell_served
from .metrics import NOT_ADMITTED, UNREADABLE, Metrics, why_refused
from .settings import ZOO, PluginSettings
from .tree_view import Surveyed, View, release_of
from .watch import MODELS, Watcher

__all__ = ["register"]

RESOLVER = "lora_tree"
AT_ONCE = 4
"""The number of paths that are flattened at once."""
GRACE_S = 60.0
SHORT_GRACE_S = 10.0
"""Seconds for which an adapter stays after its last use. The short grace is for a vLLM that shows
its running requests: it need only cover the reading of the prompt, which vLLM does after it has
looked up the name and before the request runs."""
ROOM_S = 20.0
"""Seconds for which a request waits for room in the cache."""
MOST_SUGGESTED = 200
"""The largest tree in which the nearest name is searched for."""


def register() -> None:
    """Register the resolver where the environment names a tree.

    It is vLLM's entry point, which vLLM 0.32 calls in every process that it starts: front ends,
    engine and workers. The workers never ask a resolver, so nothing is opened here.
    """
    if not os.environ.get(ZOO):
        return
    resolver = need("vllm.lora.resolver", extra="vllm", what="serving a tree with vLLM")
    if RESOLVER in resolver.LoRAResolverRegistry.get_supported_resolvers():
        return
    try:
        made = _Resolver(PluginSettings.of(os.environ), Metrics())
    except LoraTreeError as error:
        log.error("lora_tree: no path will be served: %s", reason(error))
        return

    class TreeResolver(resolver.LoRAResolver):  # type: ignore[misc, name-defined]
        """vLLM's interface around `_Resolver`."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            return await made.resolve(base_model_name, lora_name)

    resolver.LoRAResolverRegistry.register_resolver(RESOLVER, TreeResolver())


class _Resolver:
    """The plugin in one process: it answers vLLM, and keeps vLLM's adapters up to date."""

    def __init__(self, settings: PluginSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._release: str | None = None
        self._names = settings.names
        self._seen = Surveyed(self._survey, every_s=settings.poll_s)
        self._fronts: list[Front] = []
        self._cache: FlatCache | None = None
        self._watcher: Watcher | None = None
        self._opening = threading.Lock()
        self._once = OnceLog()
        # Three pools, so that no kind of work waits for another: flattening a path may wait for
        # room, a blend must never delay a path, and both wait for a look at the folder.
        self._makers = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="lora_tree")
        self._blenders = ThreadPoolExecutor(1, thread_name_prefix="lora_tree-blend")
        self._looker = ThreadPoolExecutor(1, thread_name_prefix="lora_tree-look")

    def _survey(self) -> tuple[AdapterTree, list[Problem]]:
        release = release_of(self._settings.zoo)
        try:
            seen = survey(release, outside=self._settings.outside)
        except BaseException:
            self._metrics.tree_is_readable(False)
            raise
        self._metrics.tree_is_readable(True)
        if self._release not in (None, release):
            log.info("lora_tree: the tree is now %s", shown(release))
        self._release = release
        return seen

    def close(self) -> None:
        """Stop the threads. vLLM never calls this: they end with its process."""
        for pool in (self._makers, self._blenders, self._looker):
            pool.shutdown()
        if self._watcher is not None:
            self._watcher.close()
        if self._cache is not None:
            self._cache.close()

    # ------------------------------------------------------------------ on vLLM's event loop
    async def resolve(self, base_model_name: str, name: str) -> Any:
        """Return the adapter of a path to vLLM; if it is refused, log why and return None."""
        front = self._front()
        flattened = None
        since = time.monotonic()
        step: str | None = NOT_ADMITTED  # the reason to count a refusal by; None: the error's
        try:
            requested = self._names.admit(name)
            step = UNREADABLE
            view = await self._view()
            step = None
            flattened = await self._find(base_model_name, requested, view)
            tell_served(flattened)
            self._metrics.given(flattened)
            if front is not None:
                front.awaits(flattened, since=since)
            return request_of(flattened)
        except (LoraTreeError, OSError, ValueError) as error:
            log.error("lora_tree: '%s' is refused: %s", shown(name), reason(error))
            self._metrics.refused(step or why_refused(error))
        except Exception as error:
            log.exception("lora_tree: '%s' is refused", shown(name))
            self._metrics.refused(step or why_refused(error))
        finally:
            if front is not None and (flattened is None or flattened.path != name):
                front.refused(name)
        return None

    async def _view(self) -> View:
        """Return the tree as it was seen a moment ago, or look at it in a thread.

        Raises:
            LoraTreeError: it can't be read.
        """
        view = self._seen.recent()
        if view is None:
            loop = asyncio.get_running_loop()
            view = await loop.run_in_executor(self._looker, self._seen.now)
        return view

    async def _find(self, base: str, requested: RequestedName, view: View) -> Flattened:
        """Return a name's adapter, made in a thread; if the tree has no such path, use no thread.

        Raises:
            LoraTreeError: it can't be served.
        """
        loop = asyncio.get_running_loop()
        # Checked on the event loop, since it costs little: a name that is refused takes no thread.
        _check_in_tree(view, requested)
        makers = self._makers if requested.name in requested.paths else self._blenders
        until = loop.time() + ROOM_S
        while True:
            try:
                return await loop.run_in_executor(makers, self._make, base, requested.name, view)
            except NoRoom:
                if loop.time() > until:
                    raise
            await asyncio.sleep(0.5)  # without a thread: others may need one to make room
            view = self._seen.recent() or view

    def _front(self) -> Front | None:
        """Return the front end that asks; None if this vLLM does not show it.

        Called on that front end's event loop.
        """
        models = find_serving_models()
        if models is None:
            self._once.say(
                MODELS,
                "lora_tree: this version of vLLM keeps its adapters in an unknown place; "
                "restart the server after changes of the tree",
            )
            return None
        for front in self._fronts:
            if front.models is models:
                return front
        front = Front(
            models,
            asyncio.get_running_loop(),
            cache=Path(os.path.abspath(self._settings.cache)),
            one_spelling=self._names.one_spelling,
            used=self._use,
            answered=self._answered,
            loaded=self._metrics.loaded,
        )
        self._fronts.append(front)
        return front

    def _use(self, path: str) -> None:
        if self._cache is not None:
            self._cache.use(path)

    def _answered(self, found: Flattened, adapter: str) -> None:
        self._metrics.answered(found.path)
        if self._settings.log_requests:
            tell_request(found, adapter)

    # ------------------------------------------------------------------ in a thread
    def _make(self, base: str, path: str, view: View) -> Flattened:
        cache = self._opened(base)
        try:
            return cache.get(view.tree, view.problems, path)
        except UnlockedError:  # the tree was saved since it was looked at
            view = self._seen.newer(view)
            return cache.get(view.tree, view.problems, path)

    def _opened(self, base: str) -> FlatCache:
        # Several requests may be the first at once. Without the lock each would open a cache and
        # start a watcher over the same folder.
        with self._opening:
            if self._cache is None:
                settings = self._settings
                exact = bool(self._fronts) and all(front.shows_requests for front in self._fronts)
                self._cache = FlatCache(
                    settings.cache,
                    budget_bytes=settings.cache_bytes,
                    form=FlatForm(settings.max_rank, settings.max_error, _base_folder(base)),
                    grace_s=SHORT_GRACE_S if exact else GRACE_S,
                    unload=self._unload,
                    is_read=self._is_read,
                    on_evict=self._metrics.evicted,
                    on_resize=lambda nbytes: self._metrics.note_cache_size(
                        nbytes, settings.cache_bytes
                    ),
                )
                self._metrics.note_cache_size(self._cache.nbytes, settings.cache_bytes)
                self._watcher = Watcher(
                    self._cache,
                    self._seen,
                    self._fronts,
                    self._names,
                    self._once,
                    self._metrics,
                    zoo=settings.zoo,
                    every_s=settings.poll_s,
                )
            return self._cache

    def _is_read(self, content: str) -> bool:
        return any(front.is_read(content) for front in self._fronts)

    def _unload(self, path: str) -> bool:
        """Make vLLM forget a path; False if a request for it has come in meanwhile."""
        cache = self._cache
        if cache is None or not self._fronts:
            return False  # a front end that can't be told keeps its adapters for ever
        content = cache.served.get(path, "")

        def is_needed() -> bool:
            return not cache.is_idle(path) or self._is_read(content)

        return all(front.drop(path, unless=is_needed) for front in self._fronts)


def _check_in_tree(view: View, requested: RequestedName) -> None:
    """Refuse paths that are not in the tree, with the nearest name where finding it costs little.

    Raises:
        PathError: a path is not there.
        FolderError: it is there, and can't be used.
    """
    for path in requested.paths:
        if path in view.tree:
            continue
        # A node that can't be used was left out of the tree, and everything below it with it.
        for problem in view.problems:
            if f"{path}/".startswith(f"{problem.node}/"):
                raise FolderError(str(problem))
        if len(view.tree) <= MOST_SUGGESTED and len(path) <= 128:
            view.tree.lineage(path)
        raise PathError(f"no node {shown(path)!r} in the tree")


def _base_folder(base: str) -> str | None:
    """Return where the base's weights are on this machine: vLLM has them by now."""
    if Path(base).is_dir():
        return base
    try:
        hub = need("huggingface_hub", extra="hub", what="finding the base")
        return str(hub.snapshot_download(base, local_files_only=True))
    except Exception:  # without it, only tensors of the base that an adapter carries are refused
        return None
