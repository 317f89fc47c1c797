"""Factor tables: the addresses of a plan's factors, at each of its sites, where kernels read them.

A plan of frozen factors keeps its tables, and all its batches share them. Factors that train come
in a new plan at every step but keep their addresses, so the last table of a site is used again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...lowrank import LowRank
from ..kernels import FactorTable, can_route
from ..plan import Plan
from ..upload import uploaded

__all__ = ["FactorTables", "PlanTables"]

T = TypeVar("T")


class FactorTables:
    """The tables of all plans that are alive."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Plan, PlanTables] = weakref.WeakKeyDictionary()
        self._last: dict[str, FactorTable] = {}

    def of(self, plan: Plan) -> PlanTables:
        """Return the tables of one plan."""
        found, places = self._of.get(plan), plan.places()
        if found is not None and found.moved_to(places):
            return found
        found = self._of[plan] = PlanTables(self._last, places)
        return found

    def forget(self) -> None:
        """Drop all."""
        self._of.clear()
        self._last.clear()


class PlanTables:
    """The tables of one plan's sites.

    Args:
        last: site → the last table of factors that train there, of any plan.
        places: the addresses of its adapters' buffers; see `Plan.places`.
    """

    def __init__(self, last: dict[str, FactorTable], places: tuple[int, ...] = ()) -> None:
        self._last, self._places = last, places
        self._blocks: list[_SentTables] = []
        self._at: dict[tuple[str, bool, torch.device], FactorTable | None] = {}
        self._cached: dict[Hashable, Any] = {}

    def at(
        self, site: str, values: Sequence[LowRank], device: torch.device, *, live: bool
    ) -> FactorTable | None:
        """Return the table of a site's values; None if the kernels don't cover them.

        Args:
            site: its name.
            values: all the plan's values that are frozen there, or all that train there.
            device: where they are read.
            live: they train.
        """
        key = site, live, device
        if key not in self._at:
            factors = _factors(values)
            self._at[key] = None
            if can_route(factors, device):
                self._at[key] = self._table(site, factors, device, live=live)
        return self._at[key]

    def moved_to(self, places: tuple[int, ...]) -> bool:
        """Rewrite every table for adapters that have moved; return False if it can't be done.

        Everything that refers to the tables stays valid, so that a path whose adapters were evicted
        and sent again costs one small copy.

        Args:
            places: the addresses of the adapters' buffers now.
        """
        if places == self._places:
            return True
        shifts = [now - before for now, before in zip(places, self._places, strict=True)]
        if any(shift % 16 for shift in shifts):
            return False  # kernels that were compiled for aligned factors would read wrongly
        by = torch.tensor([*shifts, 0], dtype=torch.int64, device="cpu")
        for block in self._blocks:
            addresses = block.numbers[:, :6:3]
            with torch.inference_mode(False), torch.no_grad():
                if block.owner is not None:
                    addresses.add_(shifts[block.owner])
                else:
                    addresses.add_(uploaded(by[block.owners], addresses.device))
        self._places = places
        return True

    def lay_out(self, sites: Mapping[str, Sequence[LowRank]], device: torch.device) -> None:
        """Make the tables of several sites' frozen values, with one copy to the device for all of
        them. `at` returns them from now on.

        Args:
            sites: site → all of the plan's values that are frozen there.
            device: where they are read.
        """
        names: list[str] = []
        covered: list[list[tuple[Tensor, Tensor, float]]] = []
        for name, values in sites.items():
            key = name, False, device
            if key in self._at:
                continue
            factors = _factors(values)
            self._at[key] = None
            if can_route(factors, device):
                names.append(name)
                covered.append(factors)
        if not names:
            return
        for name, table in zip(names, self._made(covered, device), strict=True):
            self._at[name, False, device] = table

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """Return ``find()``, called only the first time that ``key`` is asked for.

        A batch has many nodes and a model many sites, so a result that depends on the plan alone is
        found once for the plan, and not once for each batch.
        """
        if key not in self._cached:
            self._cached[key] = find()
        value: T = self._cached[key]
        return value

    def now(self, site: str, values: Sequence[LowRank], device: torch.device) -> FactorTable | None:
        """Return the table of values that train, where they are now."""
        key = site, True, device
        table, factors = self._at.get(key), _factors(values)
        # A parameter may have been given other memory since, as by `module.to()`.
        if table is None or FactorTable.key_of(factors) != table.key:
            self._at.pop(key, None)
            table = self.at(site, values, device, live=True)
        return table

    def _table(
        self,
        site: str,
        factors: Sequence[tuple[Tensor, Tensor, float]],
        device: torch.device,
        *,
        live: bool,
    ) -> FactorTable:
        if not live:
            return self._made([factors], device)[0]
        last = self._last.get(site)
        if last is None or last.numbers.device != device or last.key != FactorTable.key_of(factors):
            last = self._last[site] = FactorTable.of(factors, device)
        return last

    def _made(
        self, sites: Sequence[Sequence[tuple[Tensor, Tensor, float]]], device: torch.device
    ) -> list[FactorTable]:
        """Return the tables of several sites' frozen factors, which `moved_to` rewrites."""
        tables, numbers = FactorTable.of_all(sites, device)
        index = {place: i for i, place in enumerate(self._places)}
        # Factors that lie in no adapter's buffer, as those fused for this base, do not move.
        other = len(index)
        owners: list[int] = []
        for factors in sites:
            for A, B, _ in factors:
                owners.append(index.get(A.untyped_storage().data_ptr(), other))
                owners.append(index.get(B.untyped_storage().data_ptr(), other))
        owner = owners[0] if set(owners) == {owners[0]} and owners[0] != other else None
        owned = torch.tensor(owners, device="cpu").view(-1, 2)
        self._blocks.append(_SentTables(numbers, owned, owner))
        return tables


@dataclass(frozen=True, eq=False)
class _SentTables:
    """The numbers of some tables, and the adapters whose factors they describe.

    Args:
        numbers: (factors, FIELDS) int64, on the device.
        owners: (factors, 2) int64, in host memory: the index of the adapter in whose buffer A lies,
            and that of B's; the number of adapters if it lies in none's.
        owner: the index of the one adapter in whose buffer all of them lie; None: not of one alone.
    """

    numbers: Tensor
    owners: Tensor
    owner: int | None


def _factors(values: Sequence[LowRank]) -> list[tuple[Tensor, Tensor, float]]:
    return [(value.A, value.B, value.scale) for value in values]
