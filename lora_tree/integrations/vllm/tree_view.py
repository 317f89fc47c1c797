"""Look at a tree's folder at most once per interval; all requests in between share that view.

A look costs about 0.1 ms a node, and clients may ask a server for any number of made-up names.

Law: however often clients ask, and for whichever names, the folder is looked at once in an
interval, and for at most a fifth of the time. A view is of one release: where the folder's name is
a link that is switched, every file of a view is read from the folder that the link led to.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import LoraTreeError
from ...folder import Problem
from ...tree import AdapterTree

__all__ = ["Surveyed", "View", "release_of"]

Look = Callable[[], tuple[AdapterTree, list[Problem]]]


@dataclass(frozen=True, eq=False)
class View:
    """A tree as one look found it, with the problems of single nodes."""

    tree: AdapterTree
    problems: list[Problem]


def release_of(zoo: str) -> str:
    """Return the place that a tree's name leads to now: the folder's links are followed, once.

    A tree is read in many steps, now and later. Through a link, each step could read another
    folder: the parent's weights from one release and the child's from the next.

    Args:
        zoo: the tree's folder, or a YAML file in it; the file's own name stays as it is.
    """
    if os.path.isdir(zoo):
        return os.path.realpath(zoo)
    folder, name = os.path.split(zoo)
    return os.path.join(os.path.realpath(folder), name)


class Surveyed:
    """The view of a folder, renewed on demand when it is too old; thread-safe.

    Args:
        look: reads the folder; an error is kept for an interval like a view.
        every_s: how old a view may be.
    """

    def __init__(self, look: Look, *, every_s: float) -> None:
        self._look = look
        self._every_s = every_s
        self._lock = threading.Lock()
        self._view: View | LoraTreeError | None = None
        self._old_at = 0.0  # when the view is too old

    def recent(self) -> View | None:
        """Return the view if it is recent, without waiting; None means that `now` has to look.

        Raises:
            LoraTreeError: the recent look failed.
        """
        view = self._view if time.monotonic() < self._old_at else None
        return _or_raise(view) if view is not None else None

    def now(self) -> View:
        """Return a recent view; of several threads one looks and the others wait for it.

        Raises:
            LoraTreeError: there is no tree, or its folder can't be read as one.
        """
        with self._lock:
            if self._view is None or time.monotonic() >= self._old_at:
                began = time.monotonic()
                try:
                    self._view = View(*self._look())
                except LoraTreeError as error:
                    self._view = error
                except Exception as error:
                    # Kept for the interval like a view: not every request should try a failing
                    # disk again.
                    self._view = LoraTreeError(
                        f"the tree can't be read: {type(error).__name__}: {error}"
                    )
                # Four times as long as the look took: a slow disk is looked at less often.
                took_s = time.monotonic() - began
                self._old_at = time.monotonic() + max(self._every_s, 4 * took_s)
            return _or_raise(self._view)

    def newer(self, view: View) -> View:
        """Return a later view than ``view``, after waiting until there may be one.

        Raises:
            LoraTreeError: see `now`.
        """
        if self._view is view:
            time.sleep(max(self._old_at - time.monotonic(), 0.0))
        return self.now()


def _or_raise(view: View | LoraTreeError) -> View:
    if isinstance(view, LoraTreeError):
        # A new error for each thread, because raising an error writes into it.
        raise type(view)(view.what, *view.todo)
    return view
