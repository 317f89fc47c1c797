"""A queue of jobs, done one after the other in a thread that lives while there are jobs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

__all__ = ["Background"]


class Background:
    """A queue of jobs, none of which may raise. Any thread may call any method.

    >>> background, done = Background(), []
    >>> background.add([lambda: done.append(1), lambda: done.append(2)])
    >>> background.wait(timeout_s=10), done
    (True, [1, 2])
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards both fields below
        self._jobs: deque[Callable[[], object]] = deque()
        self._running = False

    def add(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Append jobs to the queue; start the thread if none is running."""
        with self._changed:
            self._jobs.extend(jobs)
            if self._jobs and not self._running:
                self._running = True
                # A daemon: a program may end while jobs are left, and a
                # prefetch is not worth waiting for.
                threading.Thread(target=self._work, name="lora_tree prefetch", daemon=True).start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the queue is empty and the last job is done; return False on a timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def forget(self) -> None:
        """Drop the jobs that have not begun."""
        with self._changed:
            self._jobs.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                # The queue is looked at and `_running` is set under one lock. Otherwise `add` could
                # append a job between the two, find a thread running, and start none.
                if not self._jobs:
                    self._running = False
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
            job()
            # The job may hold the last reference to a cache, and this thread
            # may wait long for the next job.
            del job
