"""SideRun: work on a model in a separate thread, watched from any other thread.

    caller's threads      iterate ◀──queue── items ◀── work()       one thread of this run
                          stop()  ──event──▶ asked between two steps

A block of ``route`` holds the model's lock for the thread that entered it, and a web server may ask
for the next result from another thread each time. So the block runs in a thread of this run.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["SideRun"]

Item = TypeVar("Item")
Shown = TypeVar("Shown")


class SideRun(ABC, Generic[Item, Shown]):
    """The work of a model in a thread. Iterate over it once, for its results so far.

    The loop ends when the work does, and raises its error. If it is left early, the work is stopped
    and the model is free before the loop's ``close()`` returns.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        # Items, then the error that ended the work, or None if it ended without one.
        self._items: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()

    def stop(self) -> None:
        """End the work and keep its results so far; return at once."""
        self._stopped.set()

    def __iter__(self) -> Iterator[Shown]:
        thread = threading.Thread(target=self._run, name="lora_tree side run", daemon=True)
        thread.start()
        try:
            yield from self.shown(self._arriving())
        finally:
            self.stop()
            thread.join()

    @abstractmethod
    def work(self) -> None:
        """Do the work, and `give` its items; called once, in the thread of this run."""

    @abstractmethod
    def shown(self, items: Iterator[Item]) -> Iterator[Shown]:
        """Convert the items for the caller; called in the caller's threads."""

    # ------------------------------------------------------------------ for the work
    @property
    def is_stopped(self) -> bool:
        """True if the work should end."""
        return self._stopped.is_set()

    def give(self, item: Item) -> None:
        """Hand an item to the caller's loop."""
        self._items.put(item)

    # ------------------------------------------------------------------ private
    def _run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self._items.put(error)
        else:
            self._items.put(None)

    def _arriving(self) -> Iterator[Item]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
