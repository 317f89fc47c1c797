"""The plugin's lines in vLLM's log: short, printable, and once for each change."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection

from ..flat_cache import ROUNDING, Flattened
from .client_names import shown

__all__ = ["OnceLog", "log", "reason", "tell_request", "tell_served"]

REASON_CHARACTERS = 1000
VERSION_DIGITS = 12

# A child of vLLM's logger, so that its lines go where vLLM's go. Another logger has no handler.
log = logging.getLogger("vllm.lora_tree")


def reason(error: Exception) -> str:
    """Return an error on one line, as a log may show it."""
    return shown(" ".join(str(error).split("\n  ")), REASON_CHARACTERS)


def tell_served(found: Flattened) -> None:
    """Log what an operator should know about a path that is now served."""
    for text in found.stale:
        log.warning("lora_tree: '%s' is served though it is stale: %s", shown(found.path), text)
    if found.error is not None and found.error > ROUNDING:
        log.info(
            "lora_tree: '%s' was recompressed, relative error %.2g",
            shown(found.path),
            found.error,
        )


def tell_request(flattened: Flattened, adapter: str) -> None:
    """Log, in one line with a JSON object, which versions of the nodes answer a request.

    The digits of a node are those by which `lora_tree.history` and ``lora-tree restore`` know its
    version.

    Args:
        flattened: the adapter of the request.
        adapter: the name that the engine has for it, which vLLM's own lines on requests show.
    """
    record = {
        "path": flattened.path,
        "adapter": adapter,
        "content": flattened.content,
        "nodes": {node: digits[:VERSION_DIGITS] for node, digits in flattened.nodes.items()},
        "stale": bool(flattened.stale),
    }
    log.info("lora_tree: request %s", json.dumps(record))


class OnceLog:
    """A log of errors that recur at every look: each is written when it begins or changes."""

    def __init__(self) -> None:
        self._last_texts: dict[str, str] = {}

    def say(self, about: str, text: str, *, compared_text: str | None = None) -> None:
        """Log a text, unless it is the same as the last one on the same subject.

        Args:
            about: a path, or another key.
            text: the line.
            compared_text: compared instead of the text.
        """
        compared_text = text if compared_text is None else compared_text
        if self._last_texts.get(about) != compared_text:
            self._last_texts[about] = compared_text
            log.error("%s", text)

    def is_over(self, about: str) -> bool:
        """Forget the error on a subject; return whether there was one."""
        return self._last_texts.pop(about, None) is not None

    def keep_only(self, about: Collection[str]) -> None:
        """Forget all other subjects, so that paths no longer served don't accumulate."""
        self._last_texts = {
            subject: text for subject, text in self._last_texts.items() if subject in about
        }
