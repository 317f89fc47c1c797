"""A side path that never runs is an error, not a silent base output.

Some modules read a child's weight without calling the child. So after a switch every module around a planned site is
watched: when its forward has run and the site's own has never been called since, the forward is refused. Of several in
one container (a list of experts, a dict of heads) one that was called is enough: a forward may choose. A module whose
sites have all been called once is not watched any more, so a path in use costs nothing here.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import MergedOnly, listing
from .plan import EMPTY_PLAN, Plan

__all__ = ["UncalledSites"]


class UncalledSites:
    """The watch over a base's side paths; ``fired`` is where a side path says that it ran."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._handles: dict[str, RemovableHandle] = {}
        self._children: dict[str, list[str]] = {}
        self._plan = EMPTY_PLAN
        self.fired: set[str] = set()

    def expect(self, plan: Plan) -> None:
        """From now on the plan's sites have to run when the modules around them do."""
        self.fired.clear()
        self._plan, self._children = plan, {}
        for name, site in plan.sites.items():
            self._children.setdefault(site.parent, []).append(name)
        for parent in [p for p in self._handles if p not in self._children]:
            self._handles.pop(parent).remove()
        for parent in self._children:
            if parent not in self._handles:
                self._handles[parent] = self._base.get_submodule(parent).register_forward_hook(
                    self._hook(parent)
                )

    def _tied_to(self, name: str) -> list[str]:
        """The other modules that use a site's weight."""
        site = self._plan.sites[name]
        return [
            n
            for n, m in self._base.named_modules()
            if any(p is site.weight for p in m._parameters.values()) and m is not site.module
        ]

    def _hook(self, parent: str) -> Any:
        def ran(module: nn.Module, args: Any, out: Any) -> None:
            children = self._children.get(parent, ())
            heard = {_child(parent, name) for name in children if name in self.fired}
            silent = [name for name in children if _child(parent, name) not in heard]
            if silent:
                tied = listing(name for site in silent for name in self._tied_to(site))
                raise MergedOnly(
                    f"{listing(silent)}: {type(module).__name__} ran without calling it, so its side path did not run",
                    f"its weight is tied: adapt {tied} instead"
                    if tied
                    else 'use activate(…, mode="merged")',
                )
            handle = self._handles.pop(parent, None)
            if handle is not None:
                handle.remove()

        return ran


def _child(parent: str, name: str) -> str:
    """The child of ``parent`` that a site is, or lies in."""
    return (name.removeprefix(f"{parent}.") if parent else name).partition(".")[0]
