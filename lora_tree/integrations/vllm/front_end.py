"""Reach the objects in which vLLM's front end keeps its adapters.

vLLM asks a resolver for a name and gives it no way to take the answer back. So the plugin finds the
object that asked, `OpenAIServingModels`, on the call stack. From then on
- ``lora_requests``, the dict in which vLLM looks up every request's model, notes each use, and
  accepts any spelling;
- ``model_name`` and ``show_available_models`` tell clients the path, not the name with a content;
- ``engine_client.output_processor.request_states`` says which adapters running requests use.

Read: vLLM 0.32, vllm/entrypoints/openai/models/serving.py and vllm/v1/engine/output_processor.py.
If another version lacks one of these, the plugin serves without it, and knows less.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...callers import caller_object
from ...extras import need
from ..flat_cache import Flattened

__all__ = ["Front", "find_serving_models", "request_of"]

WAIT_S = 120.0
"""Seconds that vLLM may take to load an adapter."""

_numbers = itertools.count(1)


def find_serving_models() -> Any:
    """Return vLLM's record of its adapters, found among the callers.

    None where this version keeps it elsewhere.
    """
    return caller_object(lambda owner: isinstance(getattr(owner, "lora_requests", None), dict))


def request_of(found: Flattened) -> Any:
    """Return vLLM's request for an adapter. vLLM must set its number before the engine sees it.

    The engine identifies an adapter by its name, in a batch and in its caches. So no name is used
    twice, not even for a content that comes back while requests for it are still running.
    """
    request = need("vllm.lora.request", extra="vllm", what="serving a tree with vLLM")
    name = f"{found.name}.{next(_numbers)}"
    return request.LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(found.folder))


@dataclass(frozen=True)
class _Awaited:
    """An adapter that vLLM is loading.

    Args:
        found: the adapter.
        until: the time, by the monotonic clock, from which its loading counts as failed.
        since: when vLLM asked for it, if a client's request waits for it.
    """

    found: Flattened
    until: float
    since: float | None


class Front:
    """One front end of vLLM: the adapters that it serves, those in use, and how to change them.

    Args:
        models: vLLM's `OpenAIServingModels`.
        loop: the event loop on which it runs; nothing of it is changed elsewhere.
        cache: the folder of flattened adapters: an adapter in it is the plugin's.
        one_spelling: returns the one spelling of a client's name.
        used: called with the name of each request.
        answered: called for each request that runs with one of our adapters, with the adapter and
            the engine's name for it.
        loaded: called with the seconds that the first request for a path waited until vLLM had it.
    """

    def __init__(
        self,
        models: Any,
        loop: asyncio.AbstractEventLoop,
        *,
        cache: Path,
        one_spelling: Callable[[str], str],
        used: Callable[[str], None],
        answered: Callable[[Flattened, str], None],
        loaded: Callable[[float], None],
    ) -> None:
        self.models = models
        self._loop = loop
        self._within = f"{cache}{os.sep}"
        self._answered = answered
        self._loaded = loaded
        self._awaited: dict[str, _Awaited] = {}
        self._had: dict[str, Flattened] = {}  # path → the adapter that vLLM has for it
        models.lora_requests = _Requests(
            models.lora_requests, one_spelling, used, self._on_request, self._on_loaded
        )
        self._tell_paths()

    # ------------------------------------------------------------------ asked from any thread
    def serves(self, path: str) -> str | None:
        """Return the content that vLLM has for a path."""
        request = dict.get(self.models.lora_requests, path)
        return None if request is None else Path(request.lora_path).name

    @property
    def shows_requests(self) -> bool:
        """True if this vLLM shows its running requests."""
        return self._states() is not None

    def is_read(self, content: str) -> bool:
        """Tell whether a running request uses a content."""
        states = self._states() or {}
        folder = self._within + content
        # The values are copied first: this runs in a thread, and the event loop adds and removes
        # requests meanwhile. Iterating over the dict itself could raise.
        requests = [getattr(state, "lora_request", None) for state in list(states.values())]
        return any(request is not None and request.lora_path == folder for request in requests)

    def swap(self, found: Flattened) -> bool:
        """Give vLLM the new content of a path, and wait until it is loaded.

        Returns:
            False if vLLM does not serve the path.

        Raises:
            Exception: as vLLM, which can't load it.
        """
        if found.path not in self.models.lora_requests:
            return False
        asyncio.run_coroutine_threadsafe(self._replace(found), self._loop).result(timeout=WAIT_S)
        return True

    def drop(self, path: str, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Make vLLM forget a path, so that it asks again; False if it is still loading it.

        Args:
            unless: called on the event loop, between two requests; True keeps the path.
        """
        return asyncio.run_coroutine_threadsafe(self._drop(path, unless), self._loop).result(
            timeout=WAIT_S
        )

    # ------------------------------------------------------------------ asked on the event loop
    def awaits(self, found: Flattened, *, since: float | None = None) -> None:
        """Note that vLLM begins to load an adapter; it has the path only when it is done.

        Args:
            found: the adapter.
            since: when vLLM asked for it, if a client's request waits for it.
        """
        self._awaited[found.path] = _Awaited(found, time.monotonic() + WAIT_S, since)

    def refused(self, name: str) -> None:
        """Remove the lock that vLLM would keep for ever for a name that it was asked for."""
        kept = getattr(self.models, "lora_resolver_lock", None)
        if isinstance(kept, dict):
            kept.pop(name, None)

    # ------------------------------------------------------------------ private
    def _on_loaded(self, path: str) -> None:
        """Note that vLLM has loaded an adapter: requests run with it from now on."""
        awaited = self._awaited.pop(path, None)
        if awaited is None:
            return
        self._had[path] = awaited.found
        if awaited.since is not None:
            self._loaded(time.monotonic() - awaited.since)

    def _on_request(self, path: str, request: Any) -> None:
        """Report a request that runs with one of our adapters; vLLM may have others."""
        found = self._had.get(path)
        if found is not None and request.lora_path == str(found.folder):
            self._answered(found, request.lora_name)

    def _states(self) -> dict[str, Any] | None:
        engine = getattr(self.models, "engine_client", None)
        states = getattr(getattr(engine, "output_processor", None), "request_states", None)
        return states if isinstance(states, dict) else None

    async def _replace(self, found: Flattened) -> None:
        new = request_of(found)
        # The number comes from vLLM's own counter, which also numbers the adapters that it loads in
        # other ways. So no two share a number.
        new.lora_int_id = self.models.lora_id_counter.inc(1)
        self.awaits(found)
        try:
            await self.models.engine_client.add_lora(new)
            # The path may have been dropped while vLLM loaded its new content. Then it stays
            # dropped.
            if dict.__contains__(self.models.lora_requests, found.path):
                self.models.lora_requests[found.path] = new
        finally:
            self._awaited.pop(found.path, None)

    async def _drop(self, path: str, unless: Callable[[], bool]) -> bool:
        # This runs on the event loop, between two requests: no request can begin between the
        # question and the removal. A path that is still loading stays, because vLLM will add it
        # anyway when it is done.
        awaited = self._awaited.get(path)
        if unless() or (awaited is not None and time.monotonic() < awaited.until):
            return False
        dict.pop(self.models.lora_requests, path, None)
        self._had.pop(path, None)
        self.refused(path)
        return True

    def _tell_paths(self) -> None:
        """Make vLLM show clients the path that they asked for, in answers and in /v1/models."""
        models = self.models
        own_name, own_list = (
            getattr(models, "model_name", None),
            getattr(models, "show_available_models", None),
        )
        if own_name is not None:

            def model_name(lora_request: Any = None) -> Any:
                name = own_name(lora_request)
                ours = getattr(lora_request, "lora_path", "").startswith(self._within)
                return name.partition("@")[0] if ours else name

            models.model_name = model_name
        if own_list is not None:

            async def show_available_models() -> Any:
                model_list = await own_list()
                for card in model_list.data:
                    if str(card.root).startswith(self._within):
                        card.id = card.id.partition("@")[0]
                return model_list

            models.show_available_models = show_available_models


class _Requests(dict[str, Any]):
    """vLLM's dict of adapters by name, which accepts every spelling and reports each lookup.

    vLLM looks a model up twice for each request: to see whether it is there, and again after it has
    read the prompt. The second lookup returns the adapter with which the request runs.
    """

    def __init__(
        self,
        given: dict[str, Any],
        one_spelling: Callable[[str], str],
        on_use: Callable[[str], None],
        on_request: Callable[[str, Any], None],
        on_loaded: Callable[[str], None],
    ) -> None:
        super().__init__(given)
        self._one_spelling = one_spelling
        self._on_use = on_use
        self._on_request = on_request
        self._on_loaded = on_loaded

    def _known(self, name: str) -> str:
        return name if super().__contains__(name) else self._one_spelling(name)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        known = self._known(name)
        self._on_use(known)
        return super().__contains__(known)

    def __getitem__(self, name: str) -> Any:
        known = self._known(name)
        self._on_use(known)
        request = super().__getitem__(known)
        # For requests that waited for a path's first loading, `resolve_lora` reads the adapter
        # here, and vLLM reads it again as for any other. The request must not be counted twice.
        if sys._getframe(1).f_code.co_name != "resolve_lora":
            self._on_request(known, request)
        return request

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(self._known(name), default)

    def pop(self, name: str, *default: Any) -> Any:
        return super().pop(self._known(name), *default)

    def __setitem__(self, name: str, request: Any) -> None:
        known = self._known(name)
        super().__setitem__(known, request)
        self._on_loaded(known)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(self._known(name))
