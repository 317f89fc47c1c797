"""Switches: the writes of a merged switch, from the plan before it and the plan after it.

    old plan ─┐
              ├─▶ Switch    the sites whose terms differ: first those that go bare, then the others
    new plan ─┘

A switch follows from the two plans alone, and a program switches between few plans. So it is made
once for a pair, and kept as long as both plans live.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ...sites import Site
from ..plan import OverrideTerms, Plan, Terms

__all__ = ["KeptSwitches", "SiteWrite", "Switch", "Writes"]

KEPT = 4
"""The number of earlier plans from which the switch to one plan is kept."""


# A named tuple, because a switch between two plans for the first time makes one for every site.
class SiteWrite(NamedTuple):
    """One site's part of a switch.

    Args:
        site: the site.
        tensors: the names of the tensors that it writes: the weight if a term is or was there, the
            bias if a term has or had one, and tensors that are or were overridden.
        new: the terms that are written.
        old: the terms that were written before.
        instead: the overrides to which they are added.
        before: the overrides that were written before.
    """

    site: Site
    tensors: tuple[str, ...]
    new: Terms
    old: Terms
    instead: OverrideTerms = ()
    before: OverrideTerms = ()

    @property
    def is_merged(self) -> bool:
        """True: after this write the site differs from the base's own."""
        return bool(self.new or self.instead)

    @property
    def is_plain(self) -> bool:
        """True: it writes increments to the weight, and nothing else."""
        return bool(self.new) and not self.instead and self.tensors == (self.site.weight_name,)

    def is_sum(self, name: str) -> bool:
        """Return whether a tensor takes nothing but increments, before and after."""
        return name == self.site.weight_name and not (self.instead or self.before)

    def undone(self) -> SiteWrite:
        """Return the write that takes this one back."""
        return SiteWrite(self.site, self.tensors, self.old, self.new, self.before, self.instead)


@dataclass(frozen=True, eq=False)
class Writes:
    """Some writes, in order."""

    site_writes: tuple[SiteWrite, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of their sites."""
        return tuple([write.site.name for write in self.site_writes])

    @cached_property
    def is_plain(self) -> bool:
        """True: each of them writes increments to its weight, and nothing else."""
        return all(write.is_plain for write in self.site_writes)

    def undone(self) -> Writes:
        """Return the writes that take these back."""
        return Writes(tuple([write.undone() for write in self.site_writes]))

    def apart(self) -> tuple[Writes, Writes]:
        """Return those that make a site the base's own, and the others."""
        bare: list[SiteWrite] = []
        merged: list[SiteWrite] = []
        for write in self.site_writes:
            (merged if write.is_merged else bare).append(write)
        return Writes(tuple(bare)), Writes(tuple(merged))


@dataclass(frozen=True, eq=False)
class Switch:
    """The writes of a switch between two plans.

    Args:
        bare: the sites that become the base's own.
        merged: the others.
        keeps_sites: whether the new plan is known to have every site of the old one.
    """

    bare: Writes
    merged: Writes
    keeps_sites: bool = False

    @cached_property
    def all(self) -> Writes:
        """All writes. Sites that become bare come first: the new plan may write the same weight
        under another name.
        """
        return Writes((*self.bare.site_writes, *self.merged.site_writes))

    def undone(self) -> Switch:
        """Return the switch that takes this one back."""
        return Switch(*self.all.undone().apart())


class KeptSwitches:
    """The switches between the last pairs of plans."""

    def __init__(self) -> None:
        # Weakly by both plans: what is kept refers to the terms of both, and through them to
        # factors, which are to go with their plans.
        self._of: weakref.WeakKeyDictionary[Plan, weakref.WeakKeyDictionary[Plan, Switch]]
        self._of = weakref.WeakKeyDictionary()

    def between(self, old: Plan, new: Plan) -> Switch:
        """Return what a switch from ``old`` to ``new`` writes."""
        kept = self._of.get(new)
        if kept is None:
            kept = self._of[new] = weakref.WeakKeyDictionary()
        known = kept.get(old)
        if known is None:
            known = _switch(old, new)
            oldest = next(iter(kept), None)
            if oldest is not None and len(kept) >= KEPT:
                del kept[oldest]
            kept[old] = known
        return known


def _switch(old: Plan, new: Plan) -> Switch:
    """Compare two plans site by site."""
    writes: list[SiteWrite] = []
    for name in sorted({*old.sites, *new.sites}):
        now, then = new.terms.get(name, ()), old.terms.get(name, ())
        instead, before = new.overrides.get(name, ()), old.overrides.get(name, ())
        if _same_terms(now, then) and _same_overrides(instead, before):
            continue
        site = new.sites.get(name) or old.sites[name]
        tensors = []
        if now or then:
            tensors.append(site.weight_name)
        if name in new.biased or name in old.biased:
            tensors.append(site.bias_name)
        for override in (*instead, *before):
            if override.attribute not in tensors:
                tensors.append(override.attribute)
        writes.append(SiteWrite(site, tuple(tensors), now, then, instead, before))
    keeps_sites = all(new.sites.get(name) is site for name, site in old.sites.items())
    bare, merged = Writes(tuple(writes)).apart()
    return Switch(bare, merged, keeps_sites)


def _same_terms(x: Terms, y: Terms) -> bool:
    """Return whether two sites' terms write the same bits: the same values and coefficients."""
    if len(x) != len(y):
        return False
    # Values are compared by identity: their factors are never written to, or else their version
    # moves. The last come first, because paths begin alike and end in different nodes.
    for a, b in zip(reversed(x), reversed(y), strict=True):
        if a.value is not b.value or a.coefficient != b.coefficient or a.version != b.version:
            return False
    return True


def _same_overrides(x: OverrideTerms, y: OverrideTerms) -> bool:
    """Return whether two sites' overrides write the same bits."""
    if len(x) != len(y):
        return False
    for a, b in zip(x, y, strict=True):
        if a.value is not b.value or a.attribute != b.attribute or a.version != b.version:
            return False
    return True
