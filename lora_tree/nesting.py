"""Nesting: the order in which modules register their raw parameters, as far as an adapter knows it.

PEFT wraps a module once for each of its raw parameters, and a file names the wrappers by their
depth. So two parameters of one module differ in a file by an order alone, and a file need not say
it:

    in the file              first          second
    assumed  (up, down)      x.up           x.down
    in fact  (down, up)      x.down         x.up       increments move to where they belong

Law: an increment moves only if its module's order was assumed. If the order was known, names stay,
and only the recorded order becomes the base's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .errors import SpecError

__all__ = ["Nesting"]


@dataclass(frozen=True)
class Nesting:
    """The orders that an adapter knows or assumes.

    Args:
        orders: module → its raw parameters, in the order in which the base registers them.
        assumed: the modules whose order is a guess.
    """

    orders: Mapping[str, tuple[str, ...]]
    assumed: frozenset[str]

    @property
    def certain(self) -> dict[str, tuple[str, ...]]:
        """The orders that are no guess."""
        return {module: own for module, own in self.orders.items() if module not in self.assumed}

    def settled(
        self, registered: Mapping[str, Sequence[str]], names: Collection[str]
    ) -> tuple[Nesting, dict[str, str]]:
        """Return the orders that a base settles, and the names that change as a result.

        Args:
            registered: module → all its parameters, as the base registers them.
            names: the names of the adapter's increments, ``x.up``.

        Returns:
            the orders, and ``{"x.up": "x.down"}``: names that were assumed → what they are.

        Raises:
            SpecError: ``registered`` is no such mapping.

        >>> guess = Nesting({"x": ("up", "down")}, frozenset({"x"}))
        >>> known, moved = guess.settled({"x": ("down", "up")}, ["x.up", "x.down"])
        >>> known.certain, moved
        ({'x': ('down', 'up')}, {'x.up': 'x.down', 'x.down': 'x.up'})
        """
        _check_registered(registered)
        moved: dict[str, str] = {}
        orders, assumed = dict(self.orders), set(self.assumed)
        for module, parameters in registered.items():
            present = tuple(p for p in parameters if f"{module}.{p}" in names)
            guessed = self.orders.get(module, ())
            # If the two sets differ, the order came from another base. It stays assumed, and
            # binding refuses it.
            if module in assumed and set(present) == set(guessed):
                for was, now in zip(guessed, present, strict=True):
                    moved[f"{module}.{was}"] = f"{module}.{now}"
                assumed.discard(module)
            # A single parameter has no order to record.
            if len(present) > 1 and module not in assumed:
                orders[module] = present
        return Nesting(orders, frozenset(assumed)), moved


def _check_registered(registered: object) -> None:
    """Check that an argument is a mapping from names to sequences.

    Raises:
        SpecError: it is not.
    """
    if not isinstance(registered, Mapping):
        raise SpecError(
            f"expected a mapping from modules to their parameters in order, got {registered!r:.80}"
        )
    for module, parameters in registered.items():
        # A string is a sequence too, of letters.
        if isinstance(parameters, str) or not isinstance(parameters, Sequence):
            raise SpecError(f"{module}: expected its parameters in order, got {parameters!r:.80}")
