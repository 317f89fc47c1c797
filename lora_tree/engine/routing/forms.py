"""The forms of a site's sum, by name, and the choice among them for ``auto``.

They agree to rounding, and differ in how often factors are read and in how far rows are moved. Rows
that do not lie side by side are taken out of the input and added back in their places, at this
site: that costs a copy of their inputs and of the numbers that are added to them.

The choice follows from what is owed and from the number of inputs, and never from what ran before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch

from ...errors import SpecError, listing, suggest
from ..kernels import routes
from ..sidepaths.side import product_dtype
from .at_once import AllPathsForm, GroupedForm, MatrixForm
from .in_turn import EachPathForm, NodesForm
from .owed import Owed
from .segmented import SegmentedForm
from .sum_form import SumForm

__all__ = ["FORMS", "Strategy", "SumForm", "check_strategy", "first_suitable_form", "form_for"]

Strategy: TypeAlias = Literal["auto", "nodes", "paths", "grouped", "matrix", "segmented"]
"""A form for all sites of a batch, or ``auto``, which chooses one for each site."""

FORMS: Mapping[str, tuple[type[SumForm], ...]] = {
    "nodes": (NodesForm,),
    "paths": (AllPathsForm, EachPathForm),
    "grouped": (GroupedForm, NodesForm),
    "matrix": (MatrixForm,),
    "segmented": (SegmentedForm, AllPathsForm, EachPathForm),
}
"""Name → its classes. The first that suits a site is taken there; the last suits every site."""

FEW = 32
"""The inputs per path below which a CPU takes longer to copy rows and factors than to multiply them
(`python -m benchmarks.forms`)."""


def check_strategy(strategy: str) -> None:
    """Check that a strategy is known.

    Raises:
        SpecError: no such strategy.
    """
    known = get_args(Strategy)
    if strategy not in known:
        raise SpecError(
            f"no strategy {strategy!r}{suggest(str(strategy), known)}",
            f"expected one of {listing(known)}",
        )


def form_for(owed: Owed, tokens: int, *, trains: bool) -> type[SumForm]:
    """Return the form that ``auto`` chooses for a site's sum.

    Our kernels read factors where they lie. Without kernels a batch's paths are laid out once,
    because a batch is used for one token after the other: then few products over all rows take less
    time than many small ones, and the more so the more cores share each product (`python -m
    benchmarks routed`). On a CPU the copy does not pay at two kinds of sites, so their factors are
    read where they lie: sites that are no products, and sites whose paths have few inputs and fit
    no batched product without a copy.

    Args:
        owed: what the rows owe there.
        tokens: the number of inputs of a row.
        trains: whether any factor of the batch trains.
    """
    if routes(owed.device):
        return first_suitable_form("segmented", owed, tokens)
    # Few products are faster if autograd records them, and in narrow dtypes, in which each product
    # is a call of oneDNN that takes 20 µs.
    wide = product_dtype(owed.dtype, owed.device) in (torch.float32, torch.float64)
    if owed.device.type != "cpu" or trains or not wide:
        return first_suitable_form("paths", owed, tokens)
    if not owed.site.is_product:
        return NodesForm
    form_kind = first_suitable_form("paths", owed, tokens)
    inputs = tokens * len(owed.batch.adapted) / len(owed.batch.by_kind)
    return NodesForm if form_kind is EachPathForm and inputs < FEW else form_kind


def first_suitable_form(strategy: str, owed: Owed, tokens: int) -> type[SumForm]:
    """Return the first class of a form that suits what is owed."""
    for form_kind in FORMS[strategy]:
        if form_kind.suits(owed, tokens):
            return form_kind
    raise AssertionError(f"the last way of {strategy} suits everything")
