"""Name the shared nodes of a growth after what their leaves' names have in common.

fr-legal, fr-tax  ──▶  fr/fr-legal, fr/fr-tax        no common word: group; all leaves: shared
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..adapter import Adapter
from ..tree import AdapterTree
from .families import Families

__all__ = ["shared_places"]


def shared_places(
    tree: AdapterTree,
    names: Sequence[str],
    families: Families,
    adapters: Sequence[Adapter | None],
) -> list[str | None]:
    """Return the paths of shared nodes.

    Args:
        tree: without them; no path of it is taken.
        names: the leaves, depth first.
        families: which leaves share which node.
        adapters: of the shared nodes; a node that holds nothing (None) gets no path.
    """
    taken = {name.lower() for name in tree.children("")}
    places: list[str | None] = []
    for shared, adapter in enumerate(adapters):
        if adapter is None:
            places.append(None)
            continue
        above = [n for n in families.lineage(shared)[:-1] if places[n] is not None]
        first, last = families.spans[shared]
        parent = f"{places[above[-1]]}/" if above else ""
        of_all = last - first == len(names)
        label = _label(names[first:last]) or ("shared" if of_all else "group")
        path, number = f"{parent}{label}", 1
        # Compared in lower case, because some file systems ignore case; and with the leaves' names,
        # because leaves may move below this parent.
        inside = {f"{parent}{name}".lower() for name in names}
        while path.lower() in taken or path.lower() in inside:
            number += 1
            path = f"{parent}{label}-{number}"
        taken.add(path.lower())
        places.append(path)
    return places


def _label(names: Sequence[str]) -> str:
    """Return the beginning that names share, up to a separator: ``fr`` of fr-legal and fr-tax."""
    least, most = min(names), max(names)
    same = 0
    while same < min(len(least), len(most)) and least[same] == most[same]:
        same += 1
    begin = least[:same]
    rest = [name[same : same + 1] for name in names]
    if any(each.isalpha() for each in rest) and begin[-1:].isalpha():
        # The names diverge within a word, so its common letters are dropped: fr-legal and fr-loan
        # share "fr", not "fr-l".
        begin = re.sub(r"[A-Za-z]+\Z", "", begin)
    label = begin.rstrip("-_.0123456789")
    return label if len(label) > 1 else ""  # one letter says nothing
