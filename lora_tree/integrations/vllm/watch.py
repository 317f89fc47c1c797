"""Follow the tree while a server runs: give vLLM a path's new adapter, or take the path away.

    each poll_s:   content of a path ── same ─────────────────▶ nothing
                                     ── another ──────────────▶ flatten, swap
                                     ── files not whole ──────▶ served on as it was, said once
                                     ── no longer in the tree ▶ vLLM forgets the path

vLLM asks for a name once and keeps the answer, so a thread of the plugin looks at the tree.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ...errors import FolderError, FormatError, LoraTreeError
from ...tree import AdapterTree
from ..flat_cache import FlatCache
from .client_names import NameRules, RequestedName, shown
from .front_end import Front
from .log import OnceLog, log, reason, tell_served
from .metrics import Metrics
from .tree_view import Surveyed, View

__all__ = ["MODELS", "Watcher"]

MODELS = " models"  # a key of the log that is no path


class Watcher:
    """A thread that looks at the tree until it is closed.

    Args:
        cache: of flattened paths; the thread follows the paths that it serves.
        seen: the tree's folder.
        fronts: vLLM's front ends. The list grows while the thread runs.
        names: reads the names of paths.
        once: the log of errors.
        metrics: the figures of the served paths.
        zoo: the tree's folder, for messages.
        every_s: between two looks.
    """

    def __init__(
        self,
        cache: FlatCache,
        seen: Surveyed,
        fronts: Sequence[Front],
        names: NameRules,
        once: OnceLog,
        metrics: Metrics,
        *,
        zoo: str,
        every_s: float,
    ) -> None:
        self._cache = cache
        self._seen = seen
        self._fronts = fronts
        self._names = names
        self._once = once
        self._metrics = metrics
        self._zoo = zoo
        self._every_s = every_s
        self._closed = threading.Event()
        # A daemon: vLLM never closes a plugin, and its process must end all the same.
        self._thread = threading.Thread(target=self._watch, name="lora_tree", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, and wait until its present look has ended."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._every_s):
            try:
                self._look()
            except (
                Exception
            ) as error:  # the thread must not end: no path would be followed any more
                self._once.say("", f"lora_tree: can't look at {self._zoo}: {reason(error)}")

    def _look(self) -> None:
        served = self._cache.served
        self._cache.report_use()
        if not served or not self._fronts:
            self._metrics.looked(served=len(served), stale=0, behind=0)
            return
        try:
            view = self._seen.now()
        except LoraTreeError as error:
            self._once.say(
                "",
                "lora_tree: the tree can't be read, its paths keep their old versions: "
                f"{reason(error)}",
            )
            self._metrics.looked(served=len(served), stale=0, behind=len(served))
            return
        self._once.keep_only((MODELS, *served))
        stale = behind = 0
        for path in served:
            try:
                stale += self._look_at(view, path)
            except Exception as error:  # vLLM's; the other paths go on
                behind += 1
                text = f"lora_tree: {shown(path)!r} stays in its old version: {reason(error)}"
                # A file that is being written has another size, and so another reason, at every
                # look. It is one event for the log.
                kind = FolderError if isinstance(error, FolderError) else type(error)
                self._once.say(path, text, compared_text=kind.__name__)
        self._metrics.looked(served=len(self._cache.served), stale=stale, behind=behind)

    def _look_at(self, view: View, path: str) -> bool:
        """Compare a path's content with the one served, and follow a change; return its staleness.

        Raises:
            Exception: the path can't be followed at the moment, and is served on as it was.
        """
        content = self._cache.served.get(path)
        if content is None:
            return False  # it was given up while another path was flattened
        try:
            now = self._cache.content(view.tree, view.problems, path)
        except (FolderError, FormatError):
            raise  # the files are not whole, or are being replaced
        except LoraTreeError as error:
            self._stop_serving(path, error)
            return False
        if now.name != content or self._is_behind(path, now.name):
            self._follow(view, path)
        elif self._once.is_over(path):
            log.info("lora_tree: the files of '%s' are whole again", shown(path))
        return bool(now.stale)

    def _follow(self, view: View, path: str) -> None:
        """Serve a path with its present content.

        Raises:
            Exception: that fails at the moment, and the path is served on as it was.
        """
        try:
            with self._cache.replacing(path):
                flattened = self._cache.get(view.tree, view.problems, path)
                tell_served(flattened)
                self._metrics.given(flattened)
                swapped = [front.swap(flattened) for front in self._fronts]
        except FolderError:
            raise  # there is no room now, or the tree has changed once more
        except LoraTreeError as error:
            if isinstance(error, FormatError) and not _locked(view.tree, self._names.read(path)):
                raise  # without a lock, the files may be half written
            self._stop_serving(path, error)
            return
        self._once.is_over(path)
        if any(swapped):
            self._metrics.swapped()
            log.info(
                "lora_tree: '%s' has changed, and is now served as %s",
                shown(path),
                shown(flattened.name),
            )

    def _is_behind(self, path: str, content: str) -> bool:
        """Tell whether vLLM has another content of a path.

        That happens if the path changed between vLLM's question and the answer.
        """
        return any(front.serves(path) not in (None, content) for front in self._fronts)

    def _stop_serving(self, path: str, error: LoraTreeError) -> None:
        dropped = [front.drop(path) for front in self._fronts]
        if not all(dropped):
            return  # vLLM is loading it just now; at the next look it has it
        log.error("lora_tree: '%s' is no longer served: %s", shown(path), reason(error))
        self._cache.forget(path)
        self._once.is_over(path)


def _locked(tree: AdapterTree, requested: RequestedName) -> bool:
    """Tell whether the lock has the files of all nodes on the paths' lineages."""
    for path in requested.paths:
        for node in tree.lineage(path):
            source = tree[node].source
            if source is not None and source.key is None:
                return False
    return True
