"""A side path that never runs is an error, not a silent base output.

Some modules read a child's weight without calling the child. So after a switch every module around
a planned site is watched: if its forward has run and the site's own has never been called since,
the forward is refused. Of several sites in one container (a list of experts, a dict of heads) one
call is enough: a forward may choose. A module whose sites have all been called once is not watched
any more, so a path in use costs nothing here.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import MergedOnly, listing
from ..hook import Hook
from ..plan import EMPTY_PLAN, Plan

__all__ = ["UncalledSites"]


class UncalledSites:
    """The sites of a base whose side paths have not run since the last switch.

    Args:
        base: the model.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._handles: dict[str, RemovableHandle] = {}
        self._children: Mapping[str, Sequence[str]] = {}
        """Parent module → the planned sites in it."""
        self._children_of: weakref.WeakKeyDictionary[Plan, Mapping[str, Sequence[str]]]
        self._children_of = weakref.WeakKeyDictionary()
        self._plan = EMPTY_PLAN
        self.called: set[str] = set()
        """The sites that were called; every side path adds its own."""

    def expect(self, plan: Plan) -> None:
        """Require from now on that the plan's sites run when the modules around them do."""
        self.called.clear()
        known = self._children_of.get(plan)
        if known is None:
            known = self._children_of[plan] = _by_parent(plan)
        self._plan, self._children = plan, known
        for parent in list(self._handles):
            if parent not in self._children:
                self._handles.pop(parent).remove()
        for parent in self._children:
            if parent not in self._handles:
                module = self._base.get_submodule(parent)
                self._handles[parent] = module.register_forward_hook(self._hook(parent))

    def _hook(self, parent: str) -> Any:
        def parent_ran(module: nn.Module, args: Any, out: Any) -> None:
            # Those of the present plan: the hook stays while plans with sites in the parent change.
            sites = self._children.get(parent, ())
            ran = {_child(parent, name) for name in sites if name in self.called}
            silent = [name for name in sites if _child(parent, name) not in ran]
            if silent:
                raise self._never_ran_error(silent, type(module).__name__)
            # All of them ran once: the watch over this parent is over. torch allows a hook to
            # remove itself while it runs.
            handle = self._handles.pop(parent, None)
            if handle is not None:
                handle.remove()

        return Hook(parent_ran)

    def _never_ran_error(self, silent: Sequence[str], parent: str) -> MergedOnly:
        # The usual cause: a head that multiplies with the embedding's weight. The module to adapt
        # is then the other one.
        tied = []
        for name in silent:
            tied += self._tied_to(name)
        todo = 'use activate(…, mode="merged")'
        if tied:
            todo = f"its weight is tied: adapt {listing(tied)} instead"
        return MergedOnly(
            f"{listing(silent)}: {parent} ran without calling it, so its side path did not run",
            todo,
        )

    def _tied_to(self, name: str) -> list[str]:
        """Return the other modules that use a site's weight."""
        site = self._plan.sites[name]
        found = []
        for other, module in self._base.named_modules():
            if module is site.module:
                continue
            if any(parameter is site.weight for parameter in module._parameters.values()):
                found.append(other)
        return found


def _by_parent(plan: Plan) -> Mapping[str, Sequence[str]]:
    """Return parent module → the names of a plan's sites in it."""
    children: dict[str, list[str]] = {}
    for name, site in plan.sites.items():
        children.setdefault(site.parent, []).append(name)
    return children


def _child(parent: str, name: str) -> str:
    """Return the child of ``parent`` that a site is, or lies in."""
    inside = name.removeprefix(f"{parent}.") if parent else name
    return inside.partition(".")[0]
