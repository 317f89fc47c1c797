"""Whether the first axis of what a site is given is the rows of the batch: else a row would go through another's path.

    (rows, tokens, features)     taken
    (rows · k, tokens, …)        taken where k was declared: `repeat=`, `tile=`, or generate's own expansion
    (rows · tokens, features)    packed: refused
    (tokens, rows, features)     time first: refused, also where there are as many tokens as rows
    (windows · rows, …)          refused

Shapes can't tell rows from tokens where there are as many of both. A site that has once been seen with another number
of tokens is known to put its rows first. Where none has been, the base is asked with shapes alone (`probe.py`), and a
site that stays unknown is refused, unless `batch_first=True` says so. Vectors
without a token axis (a pooler's, a classifier's) are taken where they are as many as the rows, but not in a list within
a list (one expert of many in one layer of many), where they are tokens that were sent there.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import BaseMismatch, SpecError
from ..sites import Site
from .probe import grown, is_square

__all__ = ["DECLARE", "BatchAxis", "SeenSites", "in_a_list_of_lists"]

DECLARE = "rows that are repeated in place are declared by repeat=, whole batches that are stacked by tile="


class SeenSites:
    """What is known of a base's sites, kept from batch to batch."""

    def __init__(self) -> None:
        self.rows_first: weakref.WeakSet[Site] = weakref.WeakSet()
        self.asked: weakref.WeakSet[Site] = (
            weakref.WeakSet()
        )  # with shapes alone, whatever came of it


class BatchAxis:
    """How the rows of one batch lie in what the base and its sites are given.

    Args:
        rows: how many paths were given.
        repeat: how often each row stands in place, as beams do.
        tile: how often the whole batch stands, one after the other, as preference pairs do.
        batch_first: the caller knows that every site puts its rows first.
        known: the sites that were seen to.

    Raises:
        SpecError: a factor is not a positive whole number.
    """

    def __init__(
        self, rows: int, *, repeat: int, tile: int, batch_first: bool, known: SeenSites
    ) -> None:
        for name, factor in (("repeat", repeat), ("tile", tile)):
            if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
                raise SpecError(f"{name} must be a whole number from 1, got {factor!r}")
        self.rows, self.repeat, self.tile = rows, repeat, tile
        self.batch_first = batch_first
        self.expansion = 1
        self._known = known
        self._given: int | None = None
        self._vectors = False
        self.probing = False

    @property
    def lengths(self) -> dict[int, tuple[int, int]]:
        """Length of the first axis → how often rows stand in place, and the batch as a whole."""
        declared = self.rows * self.repeat * self.tile
        expanded = declared * self.expansion
        return {
            expanded: (self.repeat * self.expansion, self.tile),
            declared: (self.repeat, self.tile),
        }

    # ------------------------------------------------------------------ a forward of the base
    def begin(self, inputs: Sequence[Tensor]) -> None:
        """The base's forward starts with these, its main input first.

        Raises:
            BaseMismatch: none of them has the rows that were declared.
        """
        shaped = [x for x in inputs if x.ndim]
        fitting = next((x for x in shaped if x.shape[0] in self.lengths), None)
        if fitting is not None:
            self._given = fitting.shape[0]
            tokens = (
                fitting.shape[1:2]
                if fitting.ndim == 3 or not fitting.is_floating_point()
                else fitting.shape[2:]
            )
            self._vectors = math.prod(tokens) == 1
        elif shaped:
            raise BaseMismatch(
                f"the base was given {tuple(shaped[0].shape)}, and the route is for {self._told()}",
                "give route one path for every row",
                DECLARE,
            )

    def probe(
        self,
        base: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        sites: Sequence[Site],
    ) -> None:
        """Where the batch is square and a site is not known yet: ask the base with shapes alone.

        Args:
            sites: the ones at which it matters which row is which.
        """
        rows = self._given
        known = self._known
        unknown = [
            site for site in sites if site not in known.rows_first and site not in known.asked
        ]
        if (
            rows is None
            or rows == 1
            or self.batch_first
            or not unknown
            or not is_square(inputs, rows)
        ):
            return
        known.asked.update(unknown)
        self.probing = True
        try:
            grown(base, args, kwargs, rows)
        finally:
            self.probing = False

    def note(self, site: Site, x: Tensor) -> None:
        """While probing: what a site is given has grown by one row, on its first axis or elsewhere."""
        others = site.token_axes(x)
        assert self._given is not None
        if others and x.shape[0] == self._given + 1 and x.shape[0] not in others:
            self._known.rows_first.add(site)

    def end(self) -> None:
        """The base's forward is over."""
        self._given, self._vectors = None, False

    # ------------------------------------------------------------------ a site
    def spread(self, site: Site, x: Tensor, out: Tensor) -> tuple[int, int]:
        """How often every row stands in place in a site's input, and the batch as a whole.

        Raises:
            BaseMismatch: the first axis is not the rows, or can't be known to be; names the site.
        """
        length = x.shape[0] if x.ndim else 0
        fits = length in self.lengths if self._given is None else length == self._given
        if not fits or out.shape[:1] != x.shape[:1]:
            raise BaseMismatch(
                f"{site.name}: its input is {tuple(x.shape)}, and the first axis should be {self._told()}",
                "inputs that are packed, time first or cut into windows can't be routed: activate one path at a time",
                DECLARE,
            )
        others = site.token_axes(x)
        if others is not None and not self.batch_first:
            self._check(site, x, length, others)
        return self.lengths[length]

    # ------------------------------------------------------------------ private
    def _check(self, site: Site, x: Tensor, length: int, others: Sequence[int]) -> None:
        if not others:
            if (
                not self._vectors
                and site not in self._known.rows_first
                and in_a_list_of_lists(site.name)
            ):
                raise BaseMismatch(
                    f"{site.name}: its input is {tuple(x.shape)}: {length} rows, or tokens that were sent here?",
                    "experts with a module each can't be routed: leave them out, or activate one path at a time",
                )
        elif length not in others:
            self._known.rows_first.add(site)
        elif site not in self._known.rows_first:
            raise BaseMismatch(
                f"{site.name}: its input is {tuple(x.shape)}: {length} rows, or as many tokens?",
                "route(…, batch_first=True) says that the first axis is the rows at every site",
                "or send a batch with another number of tokens once",
            )

    def _told(self) -> str:
        declared = next(reversed(self.lengths))
        of = (
            ""
            if declared == self.rows
            else f" (route of {self.rows}, repeat={self.repeat}, tile={self.tile})"
        )
        more = (
            f", or {next(iter(self.lengths))} as generate expanded them"
            if self.expansion > 1
            else ""
        )
        return f"{declared} rows{of}{more}"


def in_a_list_of_lists(name: str) -> bool:
    """One module of many in one of many: ``layers.3.experts.7.up_proj``."""
    return sum(part.isdigit() for part in name.split(".")) > 1
