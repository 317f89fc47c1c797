"""Jobs done one after the other, beside everything else: a thread that is there while there is something to do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

__all__ = ["Background"]


class Background:
    """A queue of jobs, none of which may raise.

    >>> background, done = Background(), []
    >>> background.add([lambda: done.append(1), lambda: done.append(2)])
    >>> background.wait(timeout_s=10), done
    (True, [1, 2])
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], object]] = deque()
        self._running = False

    def add(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Do these after what is waiting already."""
        with self._changed:
            self._jobs.extend(jobs)
            if self._jobs and not self._running:
                self._running = True
                threading.Thread(target=self._work, name="lora_tree prefetch", daemon=True).start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until there is nothing left to do; False where that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def forget(self) -> None:
        """Don't do what has not begun."""
        with self._changed:
            self._jobs.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._running = False
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
            job()
            del job  # it may hold the last reference to a cache
