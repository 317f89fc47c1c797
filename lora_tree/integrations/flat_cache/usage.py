"""The contents that one process uses: served under a path, asked for, or released recently.

    asked ──▶ served ──▶ released ──▶ free
              (path)      (grace)

An engine reads an adapter's files some time after it was told of them. So a content that is no
longer served stays in use until the grace is over, and as long as a running request reads it.

Law: between a content's first use and its becoming free there is no moment in which it is not
listed here.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .content import is_blend

__all__ = ["Usage"]


class Usage:
    """One process's uses of contents; thread-safe.

    Args:
        grace_s: how long a content stays in use after its last use.
        is_read: tells whether running requests use a content.
    """

    def __init__(self, *, grace_s: float, is_read: Callable[[str], bool]) -> None:
        self.grace_s = grace_s
        self._is_read = is_read
        self._lock = threading.Lock()
        self._served: dict[str, str] = {}  # path → content
        self._last_use: dict[str, float] = {}  # path → its last use, by the monotonic clock
        self._released: dict[str, float] = {}  # content → when it was last served
        # (content, whether a blend requests it) → requests under way
        self._in_flight: Counter[tuple[str, bool]] = Counter()

    @property
    def served(self) -> dict[str, str]:
        """Path → the content that this process serves it with."""
        with self._lock:
            return dict(self._served)

    # ------------------------------------------------------------------ one path
    def note(self, path: str) -> None:
        """Note that a request for a path came in.

        It is called for every request, on the engine's event loop, so it takes no lock: one
        assignment to a dict is atomic.
        """
        if path in self._served:
            self._last_use[path] = time.monotonic()

    def is_idle(self, path: str) -> bool:
        """Tell whether the last use of a path is longer ago than the grace."""
        return time.monotonic() - self._last_use.get(path, 0.0) >= self.grace_s

    def idle_s(self, path: str) -> float:
        """Return the seconds since the last use of a path."""
        return time.monotonic() - self._last_use.get(path, 0.0)

    def serve(self, path: str, content: str) -> None:
        """Serve a path with a content from now on; the one before is released."""
        with self._lock:
            before = self._served.get(path)
            self._served[path] = content
            self._last_use[path] = time.monotonic()
            self._released.pop(content, None)
            if before is not None and before != content:
                self._release(before)

    def forget(self, path: str) -> None:
        """Stop serving a path; its content becomes free when the grace is over."""
        with self._lock:
            content = self._served.pop(path, None)
            self._last_use.pop(path, None)
            if content is not None:
                self._release(content)

    def oldest_blends(self) -> list[str]:
        """Return the blends that are served, the one used longest ago first."""
        with self._lock:
            blends = [path for path in self._served if is_blend(path)]
        return sorted(blends, key=lambda path: self._last_use.get(path, 0.0))

    # ------------------------------------------------------------------ one content
    @contextmanager
    def keep_in_use(self, content: str, *, for_blend: bool) -> Iterator[None]:
        """Keep a content in use until the block ends, whether it is served or not."""
        with self._lock:
            self._in_flight[content, for_blend] += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight[content, for_blend] -= 1
                # A Counter keeps zero entries, and clients make up the names: it would grow.
                if not self._in_flight[content, for_blend]:
                    del self._in_flight[content, for_blend]

    @contextmanager
    def replacing(self, path: str) -> Iterator[None]:
        """Keep a path's content until the block ends, and for the grace from then on.

        If the block fails, the path goes on being served with it.
        """
        with self._lock:
            before = self._served.get(path)
        if before is None:
            yield
            return
        with self.keep_in_use(before, for_blend=is_blend(path)):
            try:
                yield
            except BaseException:
                with self._lock:
                    if path in self._served:
                        self._served[path] = before
                        self._released.pop(before, None)
                raise
            with self._lock:
                # The engine has the new one only now, so the grace begins now.
                if before in self._released:
                    self._released[before] = time.monotonic()

    def holders(self, content: str) -> list[str] | None:
        """Return the paths that are served with a content; None if it has to stay."""
        with self._lock:
            is_in_flight = any(content == used_content for used_content, _ in self._in_flight)
            paths = [path for path, served in self._served.items() if served == content]
            in_grace = not all(self.is_idle(path) for path in paths)
            if content in self._released:
                in_grace |= time.monotonic() - self._released[content] < self.grace_s
        # Not under the lock: `is_read` asks the engine, which may call back into this object.
        if is_in_flight or in_grace or self._is_read(content):
            return None
        return paths

    def free(self, content: str) -> None:
        """Note that a content is no longer in use, though its grace may not be over."""
        with self._lock:
            self._released.pop(content, None)

    def unused_s(self, content: str) -> float | None:
        """Return the seconds since the last use of a content; None if it is not served here."""
        with self._lock:
            paths = [path for path, served in self._served.items() if served == content]
            return min((self.idle_s(path) for path in paths), default=None)

    def in_use(self) -> dict[str, bool]:
        """Return content → whether only blends use it, for each content in use."""
        now = time.monotonic()
        held = []
        with self._lock:
            for content, since in list(self._released.items()):
                if now - since >= self.grace_s and not self._is_read(content):
                    del self._released[content]
            held += list(self._in_flight)
            held += [(content, is_blend(path)) for path, content in self._served.items()]
            held += [(content, True) for content in self._released]
        only_blends: dict[str, bool] = {}
        for content, for_blend in held:
            only_blends[content] = only_blends.get(content, True) and for_blend
        return only_blends

    def _release(self, content: str) -> None:
        """Begin the grace of a content that no path is served with; the caller holds the lock."""
        if content not in self._served.values():
            self._released[content] = time.monotonic()
