"""The models that a tree is attached to, as the tree sees them: the nodes that they use, and the
files that they read for the tree.

A model is held weakly, because a program may drop one without detaching it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Protocol

from .adapter import Adapter
from .errors import TreeError, listing
from .storage import Source

__all__ = ["AttachedModel", "AttachedModels"]


class AttachedModel(Protocol):
    """A model that the tree is attached to, as the tree sees it."""

    def nodes_in_use(self) -> Iterable[str]:
        """Return the nodes that must not change."""
        ...

    def read_adapter(self, path: str, source: Source) -> Adapter:
        """Read a node's files within the model's budgets, which decide how long it stays read."""
        ...


class AttachedModels:
    """The models of one tree, in the order in which they were attached."""

    def __init__(self) -> None:
        self._all: list[weakref.ref[AttachedModel]] = []
        # The models that have budgets. The first that is alive reads files for the tree.
        self._readers: list[weakref.ref[AttachedModel]] = []

    def add(self, model: AttachedModel, *, reads: bool) -> None:
        """Consult a model from now on before nodes change; if it ``reads``, for adapters too."""
        self._all.append(weakref.ref(model))
        if reads:
            self._readers.append(weakref.ref(model))

    def drop(self, model: AttachedModel) -> None:
        """Stop consulting a model."""
        # The lists are changed in place: to bind `refs` to a new list would not change the
        # attributes.
        for refs in (self._all, self._readers):
            # References to models that were collected are dropped as well.
            refs[:] = [ref for ref in refs if ref() not in (None, model)]

    @property
    def reader(self) -> AttachedModel | None:
        """The model that reads files for the tree; None if the tree reads them itself."""
        return next(_alive(self._readers), None)

    def check_unused(self, paths: Iterable[str], verb: str) -> None:
        """Refuse to change nodes that a model uses.

        Args:
            paths: the nodes.
            verb: the action that needs them, for the message: ``removed``.

        Raises:
            TreeError: one of them is in use; names all that are.
        """
        used: set[str] = set()
        for model in _alive(self._all):
            used.update(model.nodes_in_use())
        hit = [path for path in paths if path in used]
        if hit:
            raise TreeError(
                f"{listing(hit)}: active on an attached model, can't be {verb}",
                "model.deactivate() first, or activate another path",
                "a path model (model.at(path)) uses its nodes, too: drop it, or call its close()",
            )


def _alive(models: Iterable[weakref.ref[AttachedModel]]) -> Iterator[AttachedModel]:
    for ref in models:
        # Called once: between a test and a second call the model may be collected.
        model = ref()
        if model is not None:
            yield model
