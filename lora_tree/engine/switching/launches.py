"""Launches: the kernel launches of the last switches, kept with their plans.

A launch is a table of addresses. Making one means reading the address and layout of hundreds of
tensors, which takes about as long as the launch itself, and the result is the same from switch to
switch. So it is kept with its plan, and run again while everything is where it was:

    weights     the watch compares their addresses before every switch, and increments a number when
                one has moved
    pristine    making or dropping a copy increments it too; when the number has changed, all
                launches are dropped
    factors     the plan holds them, and the addresses of their buffers are compared; if a factor
                trains, or had to be copied for the launch, the launch is not kept
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...lowrank import LowRank
from ...sites import Site
from ..kernels import Launch, MergePart, MergeTerm, can_merge
from ..plan import Plan

__all__ = ["KeptLaunch", "Launches", "part_of"]

KEPT = 4
"""Launches of one plan: which of its sites a switch changes depends on the path before."""


@dataclass(frozen=True, eq=False)
class KeptLaunch:
    """A launch, and what it was laid out for.

    Args:
        launch: the launch.
        covered: the names of the sites whose weights it writes.
        devices: where these lie.
        is_whole: `covered` has every site that changed, and every source is on its weight's device.
        places: the addresses of its plan's buffers when it was made; see `Plan.places`.
    """

    launch: Launch
    covered: frozenset[str]
    devices: frozenset[torch.device]
    is_whole: bool
    places: tuple[int, ...]


class Launches:
    """The launches of the last switches."""

    def __init__(self) -> None:
        self.plans: weakref.WeakKeyDictionary[Plan, dict[tuple[str, ...], KeptLaunch]]
        self.plans = weakref.WeakKeyDictionary()
        """Plan → the names of the sites that a launch writes → the launch."""
        self._number = 0

    def find(self, plan: Plan, names: tuple[str, ...], number: int) -> KeptLaunch | None:
        """Return the launch that writes ``plan`` to some of its sites; None if anything has moved.

        Args:
            plan: what is written.
            names: of the sites that change, in order.
            number: `Pristine.number`, which changes when a weight moves or a copy is made or
                dropped.
        """
        if number != self._number:
            # Which launch has which address is not recorded, so all of them go.
            self.plans.clear()
            self._number = number
        known = self.plans.get(plan, {}).get(names)
        if known is None or known.places != plan.places():
            return None
        return known

    def keep(self, plan: Plan, names: tuple[str, ...], known: KeptLaunch) -> None:
        """Keep a launch for `find`, and drop the plan's oldest one if it has too many."""
        # By plan, weakly: a launch holds addresses of the plan's factors, and must not outlive it.
        kept = self.plans.setdefault(plan, {})
        while len(kept) >= KEPT:
            del kept[next(iter(kept))]
        kept[names] = known

    def forget(self) -> None:
        """Drop all."""
        self.plans.clear()


def part_of(
    site: Site, target: Tensor, source: Tensor, terms: Sequence[tuple[LowRank, float]]
) -> tuple[MergePart, bool] | None:
    """Return a site's weight as kernels take it, and whether any factor was copied for it.

    None if no kernel covers it.

    Args:
        site: the site.
        target: its weight.
        source: what it is computed from. If that is on another device, the kernel reads the weight
            itself, to which the caller copies it first.
        terms: values with their coefficients; not empty.
    """
    rows = site.rows(target)
    if rows.data_ptr() != target.data_ptr():
        return None  # not laid out row by row
    merge_terms: list[MergeTerm] = []
    is_copied = False
    for value, coefficient in terms:
        moved = value.to(device=target.device)
        # A copy lives as long as the caller holds it.
        is_copied = is_copied or moved is not value
        left, right = site.sides_of(moved)
        merge_terms.append(MergeTerm(left, right, value.scale * coefficient))
    # A copy in host memory is sent into the weight first, and the kernel reads it there.
    pristine = rows if source.device != target.device else site.rows(source)
    if not can_merge(rows, pristine, merge_terms):
        return None
    part = MergePart.of(rows, pristine, merge_terms)
    for before, after in zip(merge_terms, part.terms, strict=True):
        is_copied = is_copied or before.left is not after.left or before.right is not after.right
    return part, is_copied
