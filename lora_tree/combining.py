"""The sum of several adapters as one; an error names the terms that do not add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .adapter import Adapter
from .carried import is_same_tensor, wider_tensor
from .errors import BaseMismatch, LoraTreeError, ShapeMismatch, SpecError
from .lowrank import LowRank, concat, same_place
from .nesting import Nesting
from .override import Override
from .weights import GivenWeight, Weight, check_matched

__all__ = ["combine", "weighed_terms"]


def weighed_terms(
    terms: Iterable[tuple[str, Weight, Adapter]],
) -> list[tuple[str, float, Adapter]]:
    """Return (node, coefficient, adapter) terms whose coefficients are numbers.

    A weight per module is multiplied into the scales of a new adapter, which shares its factors
    with the given one; the coefficient is then 1.

    Raises:
        SpecError: a pattern matches no module; names the node.
    """
    terms = list(terms)
    check_matched([(node, weight, adapter.module_names) for node, weight, adapter in terms])
    weighed: list[tuple[str, float, Adapter]] = []
    for node, weight, adapter in terms:
        if isinstance(weight, float):
            weighed.append((node, weight, adapter))
            continue
        try:
            weighed.append((node, 1.0, adapter.weighed(weight)))
        except LoraTreeError as error:
            raise error.within(node) from error
    return weighed


def combine(terms: Sequence[tuple[Adapter, GivenWeight]], *, names: Sequence[str] = ()) -> Adapter:
    """Return Σ coefficient · adapter, module by module, as one adapter of rank Σr.

    ``base`` comes from the first term that has one. ``config`` holds the fields on which all terms
    that have a config agree: a field that one term alone has is not true of the sum. Terms on
    several devices are brought to the first one's: a node that trains is where the base is, its
    parent where it was read to.

    Overrides are not scaled. Every increment counts, also where a term overrides the module:
    `AdapterTree.terms` has already dropped the increments that a deeper override replaces.

    Args:
        terms: each adapter with its coefficient, a number or a number for each module.
        names: the name of each term in an error, if they have names: the nodes of a tree.

    Raises:
        ShapeMismatch: two terms change one module in different shapes; names the terms and the
            module.
        BaseMismatch: two terms were made for bases that differ in a tensor they both carry.
        SpecError: a coefficient times a scale is not finite; or two terms override one tensor.

    >>> import torch
    >>> x = Adapter({"q": LowRank(torch.ones(1, 4), torch.ones(2, 1))})
    >>> both = combine([(x, 1.0), (x, 0.5)])
    >>> both.ranks, both.modules["q"].dense()[0, 0].item()
    ({'q': 2}, 1.5)
    """
    terms = _pairs(terms)
    # A file may leave open how a module's raw parameters are ordered. A term
    # that knows it settles it for all.
    certain: dict[str, tuple[str, ...]] = {}
    for adapter, _ in terms:
        certain |= Nesting(adapter.nesting, adapter.assumed).certain
    total = _Combination(names)
    for at, (adapter, coefficient) in enumerate(terms):
        renested = adapter.renested(certain)
        if isinstance(coefficient, int | float):
            total.add(at, renested, coefficient)
        else:
            total.add(at, renested.scaled(coefficient), 1.0)
    return total.adapter()


class _Combination:
    """A sum of adapters under construction.

    Each part is stored with the index of its term, so that an error can name both terms.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._adapters: list[Adapter] = []
        self._parts: dict[str, dict[int, LowRank]] = {}
        self._carried: dict[str, tuple[int, Tensor]] = {}
        self._nesting: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._overrides: dict[str, tuple[int, Override]] = {}

    def add(self, at: int, adapter: Adapter, coefficient: float) -> None:
        """Add a term; raises as `combine`."""
        self._adapters.append(adapter)
        for name, value in adapter.modules.items():
            self._add_module(at, name, value, coefficient)
        for name, tensor in adapter.unchanged.items():
            self._add_carried(at, name, tensor)
        for module, order in adapter.nesting.items():
            self._add_order(at, module, order)
        for name, override in adapter.overrides.items():
            self._add_override(at, name, override)

    def adapter(self) -> Adapter:
        """Return the sum of the terms so far."""
        modules: dict[str, LowRank] = {}
        for name, values in self._parts.items():
            with self._naming(name):
                modules[name] = _sum(list(values.values()))
        return Adapter(
            modules,
            base=next((term.base for term in self._adapters if term.base), None),
            # Fields that terms disagree on are dropped: they would not be true of the sum.
            config=_agreed([term.config for term in self._adapters if term.config]),
            unchanged={name: tensor for name, (_, tensor) in self._carried.items()},
            nesting={module: order for module, (_, order) in self._nesting.items()},
            assumed=frozenset().union(*(term.assumed for term in self._adapters)),
            overrides={name: override for name, (_, override) in self._overrides.items()},
        )

    def _add_module(self, at: int, name: str, value: LowRank, coefficient: float) -> None:
        parts = self._parts.setdefault(name, {})
        with self._naming(name, at):
            parts[at] = value.scaled(coefficient)
        # Comparing with the first alone is enough: all of them have its shape.
        first = next(iter(parts))
        with self._naming(name, *sorted({first, at})):
            same_place(parts[first], parts[at])

    def _add_carried(self, at: int, name: str, tensor: Tensor) -> None:
        before, known = self._carried.setdefault(name, (at, tensor))
        if not is_same_tensor(known, tensor):
            with self._naming(name, before, at):
                raise BaseMismatch("two adapters carry different values of this base tensor")
        # Keep the wider of two roundings of one tensor: a base is compared with more digits.
        self._carried[name] = before, wider_tensor(known, tensor)

    def _add_override(self, at: int, name: str, override: Override) -> None:
        before, known = self._overrides.get(name, (at, None))
        if known is not None and known is not override:
            with self._naming(name, before, at):
                if override.rows is None:
                    raise SpecError(
                        "two adapters override this tensor, and two replacements do not add up",
                        "on a lineage the deeper one counts: flatten or squash the path",
                    )
            # Rows of a later term replace rows of an earlier one, as on a lineage.
            override = override.over(known)
        self._overrides[name] = at, override

    def _add_order(self, at: int, module: str, order: tuple[str, ...]) -> None:
        before, known = self._nesting.get(module, (at, ()))
        if not _is_one_order(known, order):
            with self._naming(module, before, at):
                raise ShapeMismatch(
                    f"two adapters order its parameters differently: {known} and {order}"
                )
        # The longer one also places parameters that the other term does not change.
        if len(order) > len(known):
            before, known = at, order
        self._nesting[module] = before, known

    @contextmanager
    def _naming(self, module: str, *terms: int) -> Iterator[None]:
        """Put the terms and the module that an error is about before its first line."""
        try:
            yield
        except LoraTreeError as error:
            where = module
            if self._names and terms:
                where = f"{' and '.join(self._names[at] for at in terms)}: {module}"
            raise error.within(where) from error


def _is_one_order(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Return whether the names that are in both have the same order."""
    common = set(one) & set(other)
    first = [name for name in one if name in common]
    second = [name for name in other if name in common]
    return first == second


def _pairs(terms: object) -> list[tuple[Adapter, GivenWeight]]:
    """Return the terms as a list.

    Raises:
        SpecError: they are not pairs of an adapter and a number.
    """
    pairs: list[Any] = list(terms) if isinstance(terms, Iterable) else [terms]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Adapter)):
            raise SpecError(
                f"combine takes (adapter, coefficient) pairs, got {terms!r:.80}",
                "combine([(x, 1.0), (y, 0.5)])",
            )
    return pairs


def _sum(values: list[LowRank]) -> LowRank:
    """Return the sum of values, on the first one's device."""
    return concat([value.to(device=values[0].device) for value in values])


def _agreed(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields that all configs have with the same value."""
    if not configs:
        return {}
    first, *others = configs
    agreed = dict(first)
    for other in others:
        for key in list(agreed):
            if key not in other or not _is_same_field(agreed[key], other[key]):
                del agreed[key]
    return agreed


def _is_same_field(one: Any, other: Any) -> bool:
    """Return whether two values of a config's field are equal."""
    if isinstance(one, list) and isinstance(other, list):
        # PEFT writes sets of names as lists, in an order that changes from run to run.
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return bool(one == other)
