"""Shorten the reason why a node is stale, for one cell of a table.

The full reason has hashes and appears in a warning; a table says which ancestor changed, and how:
``parent fr changed (weights)``.
"""

from __future__ import annotations

import re

__all__ = ["short_stale_text"]

# `short_stale_text` and `_changes` in folder/trained.py write these forms. If their words change, a
# pattern here matches nothing and the whole reason is shown: too long for a cell, but still right.
_CONTENT = re.compile(r"the content of (\S+) \(was .*\)\Z")
_WEIGHT = re.compile(r"the weight of (\S+) \(was (\S+), now (\S+)\)\Z")
_ADDED = re.compile(r"(\S+) is above it now\Z")
_REMOVED = re.compile(r"(\S+) is no longer above it\Z")


def short_stale_text(path: str, reason: str) -> str:
    """Return a node's reason in a few words; the whole reason if it has none of the known forms.

    Args:
        path: the node.
        reason: as `Node.stale` says it.

    >>> reason = "fr/a: the lineage of fr has changed since it was trained: "
    >>> short_stale_text("fr/a", reason + "the content of fr (was 1f…, now 2e…)")
    'parent fr changed (weights)'
    >>> short_stale_text("fr/a", reason + "the weight of fr (was 0.8, now 0.5)")
    'parent fr changed (weight 0.8 → 0.5)'
    """
    text = reason.removeprefix(f"{path}: ")
    if text.startswith("it was trained on "):
        return text.removeprefix("it was ").replace(", the tree names ", ", the tree is over ")
    if text.startswith("the files of the base "):
        return "the base's files changed"
    head, has_changes, tail = text.partition(" since it was trained: ")
    if not has_changes:
        # A lock of an earlier version knows hashes alone, and they say nothing in a table.
        known = re.match(r"(the lineage of \S+ has changed|it was moved to the top)", text)
        return known[0] if known else text
    parent = path.rpartition("/")[0]
    # Names of nodes contain no semicolon, so it separates one change from the next.
    words = [_change(change, parent) for change in tail.split("; ")]
    if head == "it was moved to the top":
        words.insert(0, "moved to the top")
    return ", ".join(words)


def _change(text: str, parent: str) -> str:
    if found := _CONTENT.match(text):
        return f"{_called(found[1], parent)} changed (weights)"
    if found := _WEIGHT.match(text):
        return f"{_called(found[1], parent)} changed (weight {found[2]} → {found[3]})"
    if found := _ADDED.match(text):
        return f"{_called(found[1], parent)} is new above it"
    if found := _REMOVED.match(text):
        return f"{found[1]} is gone from above it"
    return text


def _called(node: str, parent: str) -> str:
    return f"parent {node}" if node == parent else f"ancestor {node}"
