"""Choose the flat adapters that a growth is made of.

    named by the caller     all of them take part, or the verb is refused
    none was named          those that can take part; the others stay as they are, with the reason

An adapter can't take part if it has nothing to share, or if no file can hold what is left of it
below a shared node. An adapter that is broken, or of another base, is refused in either case: it
is no part of the tree that the caller means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..adapter import Adapter
from ..errors import LoraTreeError, PathError, SpecError, TreeError, listing
from ..override import tensor_owner
from ..tree import AdapterTree
from ..weights import weight_at
from .edit import check_changeable, check_has_adapter

__all__ = ["FlatChoice", "choose_flat"]


@dataclass(frozen=True)
class FlatChoice:
    """The flat adapters that take part, and those that stay as they are.

    Args:
        names: the nodes that take part; two at least.
        are_named: the caller named them.
        alone: node that stays as it is → why.

    Raises:
        SpecError: fewer than two take part.
    """

    names: tuple[str, ...]
    are_named: bool
    alone: Mapping[str, LoraTreeError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise SpecError(
                f"grow needs at least two flat adapters, got {listing(self.names) or 'none'}",
                *self.notes,
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each adapter that stays as it is."""
        return tuple(f"left alone: {error.what}" for error in self.alone.values())

    def without(self, unfit: Mapping[str, LoraTreeError]) -> FlatChoice:
        """Return the choice without some nodes, each with the reason.

        Raises:
            LoraTreeError: the first of these reasons, if the caller named the nodes.
            SpecError: fewer than two are left.
        """
        if unfit and self.are_named:
            raise next(iter(unfit.values()))
        rest = tuple(name for name in self.names if name not in unfit)
        return FlatChoice(rest, self.are_named, {**self.alone, **unfit})


def choose_flat(tree: AdapterTree, paths: Iterable[str] | None) -> FlatChoice:
    """Return the flat adapters of a tree; the arguments and errors are those of `grow`."""
    top = tree.children("")
    if paths is None:
        flat = [p for p in top if tree[p].has_adapter and not tree.children(p)]
        # A node of weight 0 is left alone: here it would become zeros of weight 1.
        chosen = [p for p in flat if tree[p].weight != 0.0]
    else:
        chosen = tree.matching(paths)
    deeper = sorted(set(chosen) - set(top))
    if deeper:
        raise PathError(
            f"{listing(deeper)}: not directly below the root",
            "grow takes flat adapters: squash each path to a node there first (lora-tree squash)",
        )
    for path in chosen:
        check_has_adapter(tree, path)
        if tree.children(path):
            raise TreeError(f"{path}: has children, so it is no flat adapter", "leave it out")
        if tree[path].weight == 0.0:
            raise SpecError(f"{path}: its weight is 0, so it shares nothing", "name the others")
    choice = FlatChoice(tuple(chosen), are_named=paths is not None)
    # Each header is read once.
    outlines = {name: tree.outline(name) or Adapter({}) for name in choice.names}
    choice = choice.without(_empty(outlines))
    choice = choice.without(_replacing(tree, {name: outlines[name] for name in choice.names}))
    check_changeable(tree, choice.names)
    return choice


def _empty(outlines: Mapping[str, Adapter]) -> dict[str, LoraTreeError]:
    """Return the adapters without factors, each with its error."""
    errors: dict[str, LoraTreeError] = {}
    for name, outline in outlines.items():
        if not outline.modules:
            errors[name] = SpecError(
                f"{name}: has factors of no module, so it shares nothing with the others",
                "name the other adapters, and leave this one out",
            )
    return errors


def _replacing(tree: AdapterTree, outlines: Mapping[str, Adapter]) -> dict[str, LoraTreeError]:
    """Return the adapters that replace a tensor of a module that others change, with the error.

    Such an override would hide the shared part above it.
    """
    changed: set[str] = set()
    for name, outline in outlines.items():
        for module in outline.modules:
            if weight_at(tree[name].weight, module) != 0.0:
                changed.add(module)
    errors: dict[str, LoraTreeError] = {}
    for name, outline in outlines.items():
        for tensor in outline.overrides:
            if tensor_owner(tensor)[0] in changed:
                errors[name] = SpecError(
                    f"{name}: replaces {tensor}, so nothing above it counts there",
                    "name the other adapters, and leave this one out",
                )
                break
    return errors
