"""Names of bases: whether two of them mean the same model, as far as names can tell.

    org/model                                        a hub id
    /models/model                                    a folder
    ~/.cache/…/models--org--model/snapshots/1f…      a snapshot in the hub's cache: org/model

A folder and a hub id count as the same model if their last parts are equal, because a downloaded
model usually keeps its name.
"""

from __future__ import annotations

import os
import re
import warnings

from .errors import LoraTreeWarning

__all__ = ["BaseWarning", "hub_id", "other_base", "warn_of_base"]

_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?\Z")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*\Z")


class BaseWarning(LoraTreeWarning):
    """An adapter or a tree names another base than the model that it is attached to."""


def other_base(one: str | None, other: str | None) -> bool:
    """Return whether two names are known to mean different bases; None and "" stand for any base.

    >>> other_base("org/model-8b", "org/model-1b"), other_base("org/model-8b", "/models/model-8b")
    (True, False)
    >>> other_base("org/model", "else/model"), other_base("org/model", None)
    (True, False)
    """
    if not one or not other or one == other:
        return False
    # Two spellings of one folder: a link, a relative path.
    if os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other):
        return False
    first, second = _id(one), _id(other)
    # Two hub ids are compared whole: other/model may be a changed copy of org/model. A folder does
    # not name the organisation, so there only the last parts are compared.
    if _HUB_ID.match(first) and _HUB_ID.match(second):
        return first.casefold() != second.casefold()
    return _last(first) != _last(second)


def hub_id(name: str | None) -> str | None:
    """Return the hub id in a name: the name itself, or its snapshot's id; None if it has none.

    >>> hub_id("org/model"), hub_id("gpt2"), hub_id("../model"), hub_id("/models/model")
    ('org/model', 'gpt2', None, None)
    >>> hub_id("/cache/hub/models--org--model/snapshots/1f")
    'org/model'
    """
    if not name:
        return None
    found = _id(name)
    # A few old models have an id without an organisation.
    is_id = _HUB_ID.match(found) or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", found)
    return found if is_id else None


def warn_of_base(what: str, named: str | None, base: str | None, *, stacklevel: int) -> None:
    """Warn if ``what`` (a node, the tree) names another base than the attached model's.

    Args:
        what: the subject of the warning, its first words.
        named: the base that it names.
        base: the model's own name.
        stacklevel: as for `warnings.warn`, seen from the caller.
    """
    if other_base(named, base):
        text = f"{what} names the base {named!r}, but the model attached is {base!r}"
        warnings.warn(BaseWarning(text), stacklevel=stacklevel + 1)


def _id(name: str) -> str:
    """Return the hub id of a snapshot in the hub's cache, other names without a slash at the
    end.
    """
    snapshot = _SNAPSHOT.search(name)
    if snapshot is None:
        return name.rstrip("/")
    return f"{snapshot[1]}/{snapshot[2]}"


def _last(name: str) -> str:
    return name.rpartition("/")[2].casefold()
