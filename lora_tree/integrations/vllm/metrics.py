"""The plugin's figures in vLLM's own Prometheus endpoint, ``/metrics``.

    client's request ─▶ Front ────▶ requests, seconds to the first answer ─┐
    vLLM's question ──▶ resolver ─▶ flattened, refused by reason ──────────┤
    FlatCache ────────▶ bytes, evictions ──────────────────────────────────┼─▶ prometheus_client
    Watcher ──────────▶ served, stale, behind, swapped ────────────────────┘      ─▶ /metrics

vLLM's front end resolves the names, and answers ``/metrics`` from prometheus_client's own registry.
Where PROMETHEUS_MULTIPROC_DIR is set, as vLLM does for several front ends, prometheus_client keeps
every figure in a file there, and each front end answers for all of them. Counts are added up. A
gauge can't be, because several front ends serve the same path: the largest one is shown.

Law: no figure is labelled with anything that a client sends. The number of series is fixed.

Read: vLLM 0.32, vllm/v1/metrics/prometheus.py and vllm/entrypoints/cli/serve.py.
"""

from __future__ import annotations

from typing import Any

from ...errors import BudgetError, FolderError, FormatError, PathError, SpecError
from ...extras import need
from ..flat_cache import Flattened, NoRoom, TooLarge, is_blend

__all__ = ["NOT_ADMITTED", "REASONS", "UNREADABLE", "Metrics", "why_refused"]

NOT_ADMITTED = "not_admitted"
"""The name is no path, or not on the list of paths that clients may ask for."""
UNREADABLE = "unreadable"
"""The tree itself can't be read."""
_KINDS: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((NoRoom, TooLarge, BudgetError), "no_room"),
    ((PathError,), "unknown"),
    ((SpecError,), "inexact"),  # recompression loses too much, or the numbers are not finite
    ((FolderError, FormatError), "broken"),
)
_FAILED = "failed"
REASONS = (NOT_ADMITTED, UNREADABLE, *(reason for _, reason in _KINDS), _FAILED)
"""The reasons by which refusals are counted."""

# A path that is in the cache takes milliseconds, a large one over a network disk minutes.
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


def why_refused(error: Exception) -> str:
    """Return the reason by which the refusal of a path of a readable tree is counted.

    >>> why_refused(PathError("no node 'fr/legol' in the tree"))
    'unknown'
    """
    for kinds, reason in _KINDS:
        if isinstance(error, kinds):
            return reason
    return _FAILED


class Metrics:
    """The figures of one process; every verb may be called from any thread.

    Args:
        registry: of prometheus_client; without it the one that vLLM shows.

    Raises:
        MissingExtra: prometheus_client is not installed.
    """

    def __init__(self, registry: Any = None) -> None:
        prometheus = need("prometheus_client", extra="vllm", what="counting what a server does")
        registry = prometheus.REGISTRY if registry is None else registry

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"lora_tree_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, mode: str = "livemax") -> Any:
            return prometheus.Gauge(
                f"lora_tree_{name}", text, registry=registry, multiprocess_mode=mode
            )

        self._requests = counter(
            "requests", "Requests that were served with an adapter of the tree.", "kind"
        )
        self._refused = counter("refused", "Requests for a name that were refused.", "reason")
        self._flattened = counter("flattened", "Paths that were flattened and written.")
        self._swapped = counter(
            "swapped", "Served paths whose adapter was replaced by a new version."
        )
        self._evicted = counter("cache_evictions", "Adapters that the cache evicted.")
        self._delay = prometheus.Histogram(
            "lora_tree_first_answer_delay_seconds",
            "Time that the first request for a path waits for flattening and vLLM's loading.",
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._served = gauge("paths_served", "Paths and blends that are served.")
        self._stale = gauge("paths_stale", "Served paths with a stale node.")
        self._behind = gauge(
            "paths_behind", "Paths still served in an old version: their files are not whole."
        )
        self._unreadable = gauge("unreadable", "1 if the tree could not be read the last time.")
        # The front ends share the folder, and each sets its size after a change of its own. The
        # largest value might come from a front end that has changed nothing for a long time.
        self._cache_bytes = gauge("cache_bytes", "Bytes of the cache folder.", "livemostrecent")
        self._cache_budget = gauge(
            "cache_budget_bytes", "Most bytes that the cache folder may hold."
        )
        # Prometheus sees no increase in a series that first appears as 1, so each series exists
        # from the start.
        for kind in ("path", "blend"):
            self._requests.labels(kind)
        for reason in REASONS:
            self._refused.labels(reason)

    def answered(self, path: str) -> None:
        """Count a request that runs with the adapter of a path or blend."""
        self._requests.labels("blend" if is_blend(path) else "path").inc()

    def refused(self, reason: str) -> None:
        """Count a refusal; the reason is one of `REASONS`."""
        self._refused.labels(reason).inc()

    def given(self, found: Flattened) -> None:
        """Count a path that is handed to vLLM, if it was flattened for that."""
        if found.error is not None:
            self._flattened.inc()

    def swapped(self) -> None:
        """Count a path that vLLM has in its new content."""
        self._swapped.inc()

    def loaded(self, seconds: float) -> None:
        """Note how long the first request for a path waited until vLLM had its adapter."""
        self._delay.observe(seconds)

    def evicted(self) -> None:
        """Count an adapter that the cache removed."""
        self._evicted.inc()

    def note_cache_size(self, nbytes: int, budget_bytes: int) -> None:
        """Note the bytes of the cache folder, and its bound."""
        self._cache_bytes.set(nbytes)
        self._cache_budget.set(budget_bytes)

    def looked(self, *, served: int, stale: int, behind: int) -> None:
        """Note what a look at the tree found about the served paths."""
        self._served.set(served)
        self._stale.set(stale)
        self._behind.set(behind)

    def tree_is_readable(self, is_readable: bool) -> None:
        """Note whether the last look at the tree succeeded."""
        self._unreadable.set(0 if is_readable else 1)
