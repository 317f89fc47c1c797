"""Attachment: the options with which a tree is attached to a base, as one checked value.

`lora_tree.attach` and the `attach` of a diffusion pipeline take the same arguments, which are
explained there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from .budget import Budgets
from .cache import Frequency, Policy
from .engine.switching.copy_place import CopyPlace
from .errors import SpecError, listing, suggest
from .given import check_dtype, unchecked
from .tree import AdapterTree

__all__ = ["Attachment", "check_tree_comes_first"]


@dataclass(frozen=True)
class Attachment:
    """The arguments of `lora_tree.attach` beside the tree and the base.

    Raises:
        SpecError: one of them makes no sense.
    """

    pristine: CopyPlace = "auto"
    compute_dtype: torch.dtype | None = None
    host_budget: int | str | None = None
    device_budget: int | str | None = None
    eviction: Callable[[], Policy] = Frequency

    def __post_init__(self) -> None:
        known = get_args(CopyPlace)
        if self.pristine not in known:
            raise SpecError(
                f"pristine must be {listing(map(repr, known))}, got "
                f"{self.pristine!r}{suggest(str(self.pristine), known)}"
            )
        check_dtype(self.compute_dtype, "compute_dtype")
        if not callable(unchecked(self.eviction)):
            kind_of_policy = type(self.eviction).__name__
            raise SpecError(
                "eviction: expected a class or a factory (it is called once per tier), "
                f"got an instance of {kind_of_policy}",
                f"eviction={kind_of_policy}",
            )

    def budgets(self, tree: AdapterTree) -> Budgets:
        """Return the budgets, each from its argument, else from the environment, else tree.yaml.

        Raises:
            SpecError: a size makes no sense; names the place.
        """
        in_yaml = tree.cache.host_budget, tree.cache.device_budget
        return Budgets.of(self.host_budget, self.device_budget, spec=in_yaml)


def check_tree_comes_first(tree: object, base: object) -> None:
    """Refuse a first argument that is no tree; if it is a model, say that the tree comes first.

    Raises:
        SpecError: it is something else.
    """
    if isinstance(tree, AdapterTree):
        return
    todo = "lora_tree.load opens a folder as a tree: attach(lora_tree.load('zoo/'), base)"
    if isinstance(tree, nn.Module):
        todo = "the tree comes first: attach(tree, base)"
    raise SpecError(f"expected an AdapterTree, got {type(tree).__name__}", todo)
