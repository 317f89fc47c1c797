"""Steps of a Trainer's run: folders like ``checkpoint-500``, nodes only if tree.yaml lists them.

french/                     the adapter that the run ended with: a node
french/checkpoint-500/      a step of that run: passed over
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["is_step", "paths_above", "step_of"]

# The Trainer of transformers gives its folders these names. So a name like ``checkpoint-best`` is
# left to people, who may call a node that.
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+\Z")


def is_step(path: str) -> bool:
    """Tell whether a folder's name is that of a step of a run."""
    return _CHECKPOINT.match(path.rpartition("/")[2]) is not None


def step_of(path: str) -> str | None:
    """Return the run that a folder like ``run/checkpoint-500`` is a step of; None if it is none.

    >>> step_of("fr/run/checkpoint-500"), step_of("checkpoint-500"), step_of("fr/run")
    ('fr/run', None, None)
    """
    for on in (*paths_above(path), path):
        if is_step(on):
            # At the top of the tree no run lies above the step: the root is the bare base, which
            # has no run.
            return on.rpartition("/")[0] or None
    return None


def paths_above(path: str) -> Iterator[str]:
    """Yield the paths above a path, the top one first.

    >>> list(paths_above("fr/legal/a"))
    ['fr', 'fr/legal']
    """
    names = path.split("/")
    for level in range(1, len(names)):
        yield "/".join(names[:level])
