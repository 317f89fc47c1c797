"""Refuse an input whose first axis is not the rows of the batch: a row would go through another
row's path.

    (rows, tokens, features)     taken
    (rows · k, tokens, …)        taken if k was declared: `repeat=`, `tile=`, or generate's own
                                 expansion
    (rows · tokens, features)    packed: refused
    (tokens, rows, features)     time first: refused, even if there are as many tokens as rows
    (windows · rows, …)          refused

Shapes can't tell rows from tokens if there are as many of both. A site that has once been seen with
another number of tokens is known to put its rows first. For other sites the base is run on shapes
alone (`probe.py`), and a site that stays unknown is refused, unless `batch_first=True` says that it
puts its rows first. Vectors without a token axis (a pooler's, a classifier's) are taken if they are
as many as the rows. But if the site is in a list within a list (one expert of many in one layer of
many), such vectors are tokens that were sent to this expert, and are refused.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ...errors import BaseMismatch, SpecError, plural
from .probe import grown, is_square

__all__ = [
    "DECLARE",
    "BatchAxis",
    "Place",
    "SeenSites",
    "has_rows_first",
    "in_a_list_of_lists",
    "rows_not_first_error",
]

DECLARE = (
    "pass repeat=k if each row occurs k times in succession, "
    "tile=k if the whole batch is stacked k times"
)


class Place(Protocol):
    """Something that is given rows: a site, or a module whose forward is watched."""

    @property
    def name(self) -> str:
        """Its dotted name."""

    def token_axes(self, x: Tensor) -> Sequence[int] | None:
        """Return the sizes of the axes after the first that might be the rows, or None."""


class SeenSites:
    """The places of a base that were seen with rows on the first axis; kept from batch to batch."""

    def __init__(self) -> None:
        self.rows_first: weakref.WeakSet[Place] = weakref.WeakSet()
        self.probed: weakref.WeakSet[Place] = weakref.WeakSet()
        """The places for which the base was run on shapes, whether or not that gave an answer."""


@dataclass(frozen=True)
class _Given:
    """The main input of the forward that runs now.

    Args:
        length: of its first axis.
        vectors: it has one token a row.
    """

    length: int
    vectors: bool


class BatchAxis:
    """The layout of one batch's rows in the inputs of the base and of its sites.

    The base's forward calls `begin`, `probe` and `end` here, ``generate`` calls `expand`, and each
    site asks `spread`.

    Args:
        rows: how many paths were given.
        repeat: how often each row occurs in succession, as beams do.
        tile: how often the whole batch is stacked, as preference pairs are.
        batch_first: the caller knows that every site puts its rows first.
        seen: the sites that were seen to do so.

    Raises:
        SpecError: a factor is not a positive whole number.
    """

    def __init__(
        self, rows: int, *, repeat: int, tile: int, batch_first: bool, seen: SeenSites
    ) -> None:
        for name, factor in (("repeat", repeat), ("tile", tile)):
            if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
                raise SpecError(f"{name} must be a whole number from 1, got {factor!r}")
        self.rows, self.repeat, self.tile = rows, repeat, tile
        self.batch_first = batch_first
        self.probing = False
        """True while a copy of the base runs on shapes: side paths then note the shapes of their
        inputs, and add nothing.
        """
        self._seen = seen
        self._given: _Given | None = None
        self.expand(1)

    # ------------------------------------------------------------------ generate
    def expand(self, expansion: int) -> None:
        """Note that ``generate`` repeats each row ``expansion`` times in succession; 1 ends it."""
        self._expansion = expansion
        declared = self.rows * self.repeat * self.tile
        self._lengths = {
            declared * expansion: (self.repeat * expansion, self.tile),
            declared: (self.repeat, self.tile),
        }
        """Length of the first axis → (repeat, tile): how often each row occurs in succession, and
        how often the whole batch is stacked.
        """

    # ------------------------------------------------------------------ a forward of the base
    def begin(self, inputs: Sequence[Tensor]) -> None:
        """Begin a forward of the base with these inputs, its main input first.

        Raises:
            BaseMismatch: none of them has the rows that were declared.
        """
        first = None
        for x in inputs:
            if not x.ndim:
                continue
            if x.shape[0] in self._lengths:
                # Ids are (rows, tokens) and embeddings (rows, tokens, features); floats with
                # another number of axes are images or sounds, whose second axis is channels.
                ids_or_embeddings = x.ndim == 3 or not x.is_floating_point()
                tokens = x.shape[1:2] if ids_or_embeddings else x.shape[2:]
                self._given = _Given(x.shape[0], vectors=math.prod(tokens) == 1)
                return
            first = first if first is not None else x
        if first is not None:
            raise BaseMismatch(
                f"the base was given {tuple(first.shape)}, and the route is for "
                f"{self._row_count_text()}",
                "give route one path for every row",
                DECLARE,
            )

    def probe(
        self,
        base: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        sites: Sequence[Place],
    ) -> None:
        """Run the base on shapes alone if the batch is square and a site is not known yet.

        Args:
            base: the model.
            args, kwargs: of the forward that begins.
            inputs: the tensors among them.
            sites: the ones at which it matters which row is which.
        """
        given, seen = self._given, self._seen
        if given is None or given.length == 1 or self.batch_first:
            return
        # A forward on shapes takes a second, so it is run only for a site that it may settle.
        unknown = []
        for site in sites:
            if site not in seen.rows_first and site not in seen.probed:
                unknown.append(site)
        if not unknown or not is_square(inputs, given.length):
            return
        # Before the run: a base that can't be run on shapes is not tried again.
        seen.probed.update(unknown)
        self.probing = True
        try:
            grown(base, args, kwargs, given.length)
        finally:
            self.probing = False

    def note(self, site: Place, x: Tensor) -> None:
        """Note, while probing, whether a site's input has grown by one row on its first axis."""
        others = site.token_axes(x)
        assert self._given is not None  # `probe` runs between `begin` and `end`
        if others and x.shape[0] == self._given.length + 1 and x.shape[0] not in others:
            self._seen.rows_first.add(site)

    def end(self) -> None:
        """End the base's forward."""
        self._given = None

    # ------------------------------------------------------------------ a site
    def spread(self, site: Place, x: Tensor, out: Tensor) -> tuple[int, int]:
        """Return (repeat, tile) of a site's input: how often each row occurs in succession, and how
        often the whole batch is stacked.

        Raises:
            BaseMismatch: the first axis is not the rows, or can't be known to be; names the site.
        """
        length = x.shape[0] if x.ndim else 0
        if not self.is_length(length) or out.shape[:1] != x.shape[:1]:
            raise BaseMismatch(
                f"{site.name}: its input is {tuple(x.shape)}, and the first axis should be "
                f"{self._row_count_text()}",
                "inputs that are packed, time first or cut into windows can't be routed: activate "
                "one path at a time",
                DECLARE,
            )
        if not self.batch_first and site not in self._seen.rows_first:
            others = site.token_axes(x)
            if others is not None:
                self._check(site, x, length, others)
        return self._lengths[length]

    def rows_of(self, place: Place, x: Tensor) -> tuple[int, int] | None:
        """Return (repeat, tile) of a place's input; None if its first axis does not have the length
        of the rows.

        Raises:
            BaseMismatch: it has that length, but can't be known to be the rows.
        """
        if x.ndim < 2 or not self.is_length(x.shape[0]):
            return None
        return self.spread(place, x, x)

    def is_length(self, length: int) -> bool:
        """Return whether an axis of this length may be the rows."""
        # Outside of a forward of the base, the caller runs a part of it, and any length may be
        # meant.
        return length in (self._lengths if self._given is None else (self._given.length,))

    def spread_of(self, length: int) -> tuple[int, int]:
        """Return (repeat, tile) for a first axis of this length."""
        return self._lengths[length]

    # ------------------------------------------------------------------ private
    def _check(self, site: Place, x: Tensor, length: int, others: Sequence[int]) -> None:
        """Refuse an input whose first axis may be something else.

        Args:
            others: the lengths of the other axes that might be the rows.
        """
        if others and length not in others:
            self._seen.rows_first.add(site)  # from now on a square input is trusted too
        elif others:
            raise BaseMismatch(
                f"{site.name}: its input is {tuple(x.shape)}: "
                f"can't tell whether its first axis is the {plural(length, 'row')} or the tokens",
                "if the rows come first at every site, say so: route(…, batch_first=True)",
                "or send one batch first whose number of tokens is not its number of rows",
            )
        elif self._given is not None and self._given.vectors:
            return  # the base itself was given vectors
        elif in_a_list_of_lists(site.name):
            raise BaseMismatch(
                f"{site.name}: its input is {tuple(x.shape)}: can't tell whether its first axis is "
                f"the {plural(length, 'row')} or the tokens sent to this expert",
                "experts that are modules of their own can't be routed: leave them out of the "
                "adapters, or activate one path at a time",
            )

    def _row_count_text(self) -> str:
        """Return the number of rows for a message, with the factors that make it up."""
        declared = self.rows * self.repeat * self.tile
        text = plural(declared, "row")
        if declared != self.rows:
            text += f" (route of {self.rows}, repeat={self.repeat}, tile={self.tile})"
        if self._expansion > 1:
            text += f", or {declared * self._expansion} as generate expanded them"
        return text


def in_a_list_of_lists(name: str) -> bool:
    """Return whether a module's name has several indices, as ``layers.3.experts.7.up_proj``."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return len(numbers) > 1


def has_rows_first(site: Place, x: Tensor, out: Tensor, length: int, *, batch_first: bool) -> bool:
    """Return whether an input's first axis is the rows, by its shape alone, so that it can be
    traced.

    Args:
        site: the site.
        x: its input.
        out: its output.
        length: how many rows there are.
        batch_first: the caller knows that the first axis is the rows.
    """
    if x.shape[0] != length or out.shape[0] != length:
        return False
    others = site.token_axes(x)
    if batch_first or others is None:
        return True
    tokens_sent_here = not others and in_a_list_of_lists(site.name)
    return length not in others and not tokens_sent_here


def rows_not_first_error(site: Place, x: Tensor, length: int) -> BaseMismatch:
    """Return the error for an input whose first axis is not known to be the rows."""
    return BaseMismatch(
        f"{site.name}: its input is {tuple(x.shape)}, and the first axis should be "
        f"{plural(length, 'row')}",
        "if the rows come first at every site, and only look like tokens here: "
        "route(…, batch_first=True)",
        DECLARE,
    )
