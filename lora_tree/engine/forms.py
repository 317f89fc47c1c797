"""The forms of a site's sum, by name.

They agree to rounding, and differ in how often factors are read and in how far rows are moved. Rows
that do not lie side by side are taken out of the input and added back in their places, at this
site: that costs a copy of their inputs and of the numbers that are added to them.
"""

from __future__ import annotations

from collections.abc import Mapping

from .at_once import AllPathsForm, GroupedForm, MatrixForm
from .in_turn import EachPathForm, NodesForm
from .segmented import SegmentedForm
from .sum_form import SumForm

__all__ = ["FORMS", "SumForm"]

FORMS: Mapping[str, tuple[type[SumForm], ...]] = {
    "nodes": (NodesForm,),
    "paths": (AllPathsForm, EachPathForm),
    "grouped": (GroupedForm, NodesForm),
    "matrix": (MatrixForm,),
    "segmented": (SegmentedForm, AllPathsForm, EachPathForm),
}
"""Name → the ways to do it. The first that suits a site is taken there, and the last suits all."""
