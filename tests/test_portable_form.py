"""The one rank of a portable adapter, and the errors that the form leaves."""

from __future__ import annotations

import math

import pytest
import torch

import lora_tree as lt
from lora_tree.errors import SpecError
from lora_tree.export.form_errors import ROUNDING, FormErrors, exact_sum
from lora_tree.export.portable_rank import groups_of, rank_to_write
from lora_tree.lowrank import LowRank
from lora_tree.lowrank.layout import Layout


def value(seed: int, r: int, *batch: int, layout: Layout | None = None) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, r, 8, generator=draw, dtype=torch.float64)
    B = torch.randn(*batch, 8, r, generator=draw, dtype=torch.float64)
    return LowRank(A, B, scale=0.5) if layout is None else LowRank(A, B, 0.5, layout=layout)


GROUPED = value(3, 2, 3, layout=Layout("conv", (1,)))
MODULES = {"q": value(1, 5), "v": value(2, 2)}


@pytest.mark.parametrize(
    ("with_groups", "rank", "ceil_rank", "written"),
    [
        (False, None, False, 5),  # nothing is lost
        (False, 3, False, 3),  # a bound is not exceeded
        (False, 9, False, 5),  # what no module needs is not written
        (False, None, True, 8),
        (False, 3, True, 8),  # unless an engine's was asked for
        (True, None, False, 6),  # 2 for each of 3 groups
        (True, 5, False, 3),  # a multiple of the groups, below the bound
        (True, None, True, 9),  # 8 is no multiple of 3
    ],
)
def test_the_rank_is_what_the_modules_need_within_what_was_asked(
    with_groups: bool, rank: int | None, ceil_rank: bool, written: int
) -> None:
    modules = {**MODULES, "conv": GROUPED} if with_groups else MODULES
    assert groups_of(GROUPED) == 3
    assert rank_to_write(modules, rank, None, ceil_rank=ceil_rank) == written


def test_a_rank_below_the_groups_is_refused() -> None:
    with pytest.raises(SpecError, match=r"rank 2 is less than the 3 groups of a convolution"):
        rank_to_write({"conv": GROUPED}, 2, None, ceil_rank=False)


def test_a_bound_on_the_error_asks_for_the_smallest_rank_that_every_module_needs() -> None:
    needed = {}
    for name, one in MODULES.items():
        errors = [one.truncate(r).relative_error for r in range(1, one.rank)] + [0.0]
        needed[name] = next(r for r, error in enumerate(errors, 1) if error <= 0.4)
    assert rank_to_write(MODULES, None, 0.4, ceil_rank=False) == max(needed.values())
    with pytest.raises(SpecError, match=r"^q: rank 1 leaves a relative error"):
        rank_to_write(MODULES, 1, 1e-3, ceil_rank=False)


def test_the_errors_are_those_of_the_dense_matrices() -> None:
    terms = [("fr", 1.0, lt.Adapter(MODULES)), ("fr/legal", 0.5, lt.Adapter({"v": value(4, 2)}))]
    exact = exact_sum(terms)
    made = {name: one.truncate(2).value.to(dtype=torch.float32) for name, one in exact.items()}
    errors = FormErrors.between(exact, made)
    off, norm = {}, {}
    for name in MODULES:
        dense = sum(c * one.modules[name].dense() for _, c, one in terms if name in one.modules)
        off[name] = float(torch.linalg.vector_norm(dense - made[name].dense(dtype=torch.float64)))
        norm[name] = float(torch.linalg.vector_norm(torch.as_tensor(dense)))
        assert errors.by_module[name] == pytest.approx(off[name] / norm[name], rel=1e-9)
    both = math.hypot(*off.values()) / math.hypot(*norm.values())
    assert errors.overall == pytest.approx(both, rel=1e-9)


def test_equal_factors_have_no_error_and_a_zero_sum_an_infinite_one() -> None:
    zero = value(1, 2).scaled(0.0)
    folded = {name: one.folded() for name, one in MODULES.items()}
    assert FormErrors.between(MODULES, folded) == FormErrors({"q": 0.0, "v": 0.0}, 0.0)
    assert FormErrors.between({"q": zero}, {"q": zero}).overall == 0.0
    assert FormErrors.between({"q": zero}, {"q": value(1, 2)}).by_module == {"q": math.inf}


def test_only_more_than_the_bound_and_a_rounding_is_refused() -> None:
    errors = FormErrors({"q": 0.1 + ROUNDING / 2}, 0.1)
    errors.check_within(None, None)
    errors.check_within(0.1, torch.bfloat16)
    with pytest.raises(SpecError, match=r"^q: relative error 0.1 once .* rounded to bfloat16, max"):
        errors.check_within(0.05, torch.bfloat16)
