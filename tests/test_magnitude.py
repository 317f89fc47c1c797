"""How large the numbers of an increment are, compared with the dense product in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_tree.errors import SpecError
from lora_tree.lowrank import LowRank
from lora_tree.lowrank.magnitude import all_finite, check_has_numbers, increment_fits

MOST = torch.finfo(torch.float16).max


@given(st.integers(0, 999), st.floats(0.01, 1000.0), st.booleans())
def test_an_increment_fits_exactly_if_each_of_its_numbers_does(
    seed: int, scale: float, with_bias: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=draw) * 20 for shape in ((3, 5), (4, 3)))
    bias = torch.randn(4, generator=draw) * 20 if with_bias else None
    value = LowRank(A, B, scale=scale, bias=bias)
    on_the_way = [value.dense(dtype=torch.float64), scale * B.double()]
    if bias is not None:
        on_the_way.append(scale * bias.double())
    assert value.fits(torch.float16) is all(bool((t.abs() <= MOST).all()) for t in on_the_way)


def test_the_product_is_not_made_where_the_bound_decides() -> None:
    def refused() -> Iterator[Tensor]:
        raise AssertionError("the product was asked for")
        yield

    ones = torch.ones(2, 2)
    assert increment_fits(MOST, 1.0, ones, ones, None, blocks=refused())
    assert not increment_fits(MOST, 1e5, ones, ones, None, blocks=refused())
    with pytest.raises(AssertionError, match="was asked for"):
        increment_fits(MOST, 1.0, ones * 1e3, ones * 1e3, None, blocks=refused())


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["A", "B", "bias"])
def test_a_number_that_is_not_finite_fits_nowhere(odd: float, where: str) -> None:
    factors = {"A": torch.ones(1, 3), "B": torch.ones(2, 1), "bias": torch.ones(2)}
    assert LowRank(**factors).fits(torch.float64)
    factors[where].flatten()[0] = odd
    assert not all_finite(factors.values())
    assert not LowRank(**factors).fits(torch.float64)


def test_eight_bits_are_looked_at_and_an_outline_is_refused() -> None:
    narrow = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    assert all_finite([narrow])
    check_has_numbers(narrow)
    with pytest.raises(SpecError, match="on the meta device"):
        check_has_numbers(torch.ones(1, 2, device="meta"))
