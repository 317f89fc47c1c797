"""The algebra of factors, against dense float64 matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense
from torch import Tensor

import lora_tree as lt
from lora_tree.budget import Budgets, parse_bytes
from lora_tree.errors import ShapeMismatch, SpecError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def values(
    draw: st.DrawFn, *, out: int | None = None, into: int | None = None, batch: tuple[int, ...] = ()
) -> lt.LowRank:
    r, out, into = (
        draw(st.integers(1, 6)),
        out or draw(st.integers(1, 9)),
        into or draw(st.integers(1, 9)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    A = torch.randn(*batch, r, into, generator=generator).to(dtype)
    B = torch.randn(*batch, out, r, generator=generator).to(dtype)
    if draw(st.booleans()):  # rank-deficient
        A[..., -1, :] = A[..., 0, :]
    scale = draw(st.sampled_from([1.0, 0.5, 2.0, 0.3, -1.7, 16 / math.sqrt(3), 0.0]))
    return lt.LowRank(A, B, scale)


@st.composite
def several(draw: st.DrawFn) -> list[lt.LowRank]:
    batch = draw(st.sampled_from([(), (3,)]))
    kind = values(out=draw(st.integers(1, 9)), into=draw(st.integers(1, 9)), batch=batch)
    return draw(st.lists(kind, min_size=1, max_size=4))


@given(several())
@settings(max_examples=150, deadline=None)
def test_concat_is_the_sum(terms: list[lt.LowRank]) -> None:
    total = lt.concat(terms)
    assert total.rank == sum(t.rank for t in terms)
    size = sum(t.scale.__abs__() * (t.B.double().abs() @ t.A.double().abs()) for t in terms)
    assert isinstance(size, Tensor)
    assert ((dense(total) - sum(dense(t) for t in terms)).abs() <= 2 * 2.0**-23 * size).all()


@given(values())
@settings(max_examples=100, deadline=None)
def test_folding_keeps_the_dtype_only_where_nothing_is_rounded(x: lt.LowRank) -> None:
    folded = x.folded()
    assert folded.scale == 1.0
    if folded.B.dtype == x.B.dtype and x.B.dtype.itemsize < 4:
        assert torch.equal(folded.B.double(), x.B.double() * x.scale)
    else:
        assert folded.B.dtype.itemsize >= 4
        torch.testing.assert_close(folded.B.double(), x.B.double() * x.scale, rtol=2.0**-22, atol=0)


@given(several())
@settings(max_examples=100, deadline=None)
def test_norm_and_inner_product_are_those_of_the_dense_matrices(terms: list[lt.LowRank]) -> None:
    x, y = terms[0], terms[-1]
    size = dense(x).norm() * dense(y).norm() + 1e-300
    assert abs(lt.inner(x, y) - (dense(x) * dense(y)).sum()) <= 1e-12 * max(float(size), 1.0) * 100
    assert x.norm() == pytest.approx(float(dense(x).norm()), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("size", [1e-250, 1e-170, 1e-30, 1.0, 1e30, 1e140])
@pytest.mark.parametrize("max_error", [None, 0.0, 0.3, 0.7, math.inf])
def test_the_error_of_a_truncation_does_not_depend_on_the_scale(
    size: float, max_error: float | None
) -> None:
    value = lt.LowRank(torch.eye(3, 5).double(), torch.diag(torch.tensor([3.0, 2, 1])).double())
    rank = 2 if max_error is None else None
    plain = value.truncate(rank, max_error=max_error)
    scaled = value.scaled(size).truncate(rank, max_error=max_error)
    assert scaled.value.rank == plain.value.rank
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-12)
    assert scaled.error == pytest.approx(plain.error * size, rel=1e-12)


def test_the_cut_of_a_zero_value_meets_every_bound() -> None:
    zero = lt.LowRank(torch.zeros(3, 5), torch.ones(4, 3))
    for max_error in (0.0, 0.5, math.inf):
        assert zero.truncate(max_error=max_error)[1:] == (0.0, 0.0)


def test_a_norm_whose_square_is_too_large_is_refused() -> None:
    value = lt.LowRank(torch.eye(2, 4).double(), torch.eye(3, 2).double())
    assert value.scaled(1e149).norm() == pytest.approx(math.sqrt(2) * 1e149)
    for refused in (value.scaled(1e160).norm, lambda: value.scaled(1e160).truncate(1)):
        with pytest.raises(SpecError, match="their product is too large for float64"):
            refused()


def test_a_bias_that_is_not_finite_is_named_by_truncation() -> None:
    value = lt.LowRank(torch.eye(2, 4), torch.eye(3, 2), bias=torch.full((3,), math.nan))
    with pytest.raises(SpecError, match=r"^the bias is not finite$"):
        value.truncate(1)


@given(several(), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_truncation_is_the_best_of_its_rank_and_knows_its_error(
    terms: list[lt.LowRank], rank: int
) -> None:
    x = lt.concat(terms)
    value, error, relative = x.truncate(rank)
    exact = dense(x)
    assert value.rank <= max(rank, 1)
    S = torch.linalg.svdvals(exact)
    best = float(S[..., rank:].norm())
    eps = 2.0**-22 * float(exact.norm()) + 1e-12
    assert abs(error - best) <= eps
    assert abs(float((dense(value) - exact).norm()) - best) <= eps
    assert relative == pytest.approx(
        error / float(exact.norm()) if exact.norm() else 0.0, rel=1e-9, abs=1e-9
    )


@given(several(), st.sampled_from([0.0, 1e-6, 0.05, 0.3, 0.9, 1.0]))
@settings(max_examples=100, deadline=None)
def test_truncation_to_an_error_takes_the_smallest_rank_that_reaches_it(
    terms: list[lt.LowRank], bound: float
) -> None:
    x = lt.concat(terms)
    cut = x.truncate(max_error=bound)
    exact = dense(x)
    rounding = 2.0**-22 * float(exact.norm()) + 1e-12  # of the fp32 factors that come back
    assert float((dense(cut.value) - exact).norm()) <= bound * float(exact.norm()) + rounding
    S = torch.linalg.svdvals(exact)
    if 1 < cut.value.rank < x.rank:
        assert float(S[..., cut.value.rank - 1 :].norm()) > bound * float(exact.norm()) * (1 - 1e-9)


@given(values(batch=(2,)), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_blocks_put_together_are_the_whole(x: lt.LowRank, rows: int) -> None:
    assert torch.equal(
        torch.cat(list(x.dense_blocks(rows, dtype=torch.float64)), dim=-2),
        x.dense(dtype=torch.float64),
    )


def test_padding_changes_nothing_but_the_rank() -> None:
    x = lt.LowRank(torch.randn(2, 5), torch.randn(3, 2), 0.7)
    assert torch.equal(x.padded(6).dense(), x.dense())
    assert x.padded(6).rank == 6
    with pytest.raises(SpecError, match="truncate it"):
        x.padded(1)


def test_nothing_of_size_out_by_in_is_built() -> None:
    """A million rows and columns: 4 TB if anything were dense."""
    x = lt.LowRank(torch.randn(2, 1_000_000), torch.randn(1_000_000, 2))
    both = lt.concat([x, x.scaled(0.5)])
    cut = both.truncate(2)
    assert cut.relative_error < 1e-6
    assert lt.inner(both, x) == pytest.approx(1.5 * x.norm() ** 2, rel=1e-9)


@pytest.mark.parametrize(
    ("A", "B", "scale", "bias", "message"),
    [
        ((2, 5), (3, 4), 1.0, None, r"A is \(2, 5\), B is \(3, 4\)"),
        ((5,), (5,), 1.0, None, "do not multiply"),
        ((4, 2, 5), (3, 3, 2), 1.0, None, "do not multiply"),
        ((4, 2, 5), (3, 2), 1.0, None, "do not multiply"),
        (
            (0, 5),
            (3, 0),
            1.0,
            None,
            r"A is \(0, 5\), B is \(3, 0\): empty factors.*\n.*leave the module out",
        ),
        ((2, 0), (3, 2), 1.0, None, "empty factors, expected sizes of at least 1"),
        ((2, 5), (0, 2), 1.0, None, "empty factors"),
        ((0, 2, 5), (0, 3, 2), 1.0, None, "empty factors"),
        ((2, 5), (3, 2), float("nan"), None, "scale must be finite"),
        ((2, 5), (3, 2), 1.0, (4,), r"bias is \(4,\), expected \(3,\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    A: tuple[int, ...], B: tuple[int, ...], scale: float, bias: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises((ShapeMismatch, SpecError), match=message):
        lt.LowRank(torch.ones(A), torch.ones(B), scale, None if bias is None else torch.ones(bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"A": np.ones((2, 5)), "B": np.ones((3, 2))},
            "got A ndarray, B ndarray, bias NoneType.*\n.*from_numpy",
        ),
        ({"B": None}, "got A Tensor, B NoneType"),
        ({"bias": np.ones(3)}, "bias ndarray"),
        ({"scale": "x"}, "scale must be finite, got 'x'"),
        ({"scale": 10**400}, "scale must be finite"),
        (
            {"B": torch.ones(3, 2, device="meta")},
            "A is on cpu, B on meta: expected one device.*\n.*B.to",
        ),
        ({"bias": torch.ones(3, device="meta")}, "A is on cpu, B on cpu, the bias on meta"),
    ],
)
def test_what_no_factors_can_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        lt.LowRank(**{"A": torch.ones(2, 5), "B": torch.ones(3, 2)} | change)


def test_a_sum_of_different_places_is_refused() -> None:
    x = lt.LowRank(torch.ones(1, 4), torch.ones(3, 1))
    for other in (
        lt.LowRank(torch.ones(1, 5), torch.ones(3, 1)),
        lt.LowRank(torch.ones(1, 4), torch.ones(3, 1), layout=lt.Layout("embedding")),
    ):
        with pytest.raises(ShapeMismatch, match="not increments of one weight"):
            lt.concat([x, other])
        with pytest.raises(ShapeMismatch, match="not increments of one weight"):
            lt.inner(x, other)
    with pytest.raises(SpecError, match="at least one term"):
        lt.concat([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "rank= or max_error="),
        ({"rank": 0}, "at least 1"),
        ({"rank": 2.5}, r"rank must be a whole number, got 2\.5"),
        ({"rank": "x"}, "rank must be a whole number, got 'x'"),
        ({"rank": True}, "rank must be a whole number, got True"),
        ({"max_error": "x"}, "max_error must be 0 or more .*, got 'x'"),
        ({"max_error": -1.0}, "max_error must be"),
        ({"max_error": float("nan")}, "max_error must be"),
        ({"rank": 1, "max_error": 1e-9}, r"rank 1 leaves a relative error of .*needs rank 3"),
    ],
)
def test_truncation_bounds_that_make_no_sense_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    x = lt.LowRank(torch.eye(3, 5), torch.eye(4, 3))
    with pytest.raises(SpecError, match=message):
        x.truncate(**arguments)
    with pytest.raises(SpecError, match=f"^q: .*{message}"):
        lt.Adapter({"q": x}).truncate(**arguments)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_factors_that_are_not_finite_have_no_norm_and_no_nearest(
    number: float, factor: str, batch: tuple[int, ...]
) -> None:
    factors = {"A": torch.ones(*batch, 3, 5), "B": torch.ones(*batch, 4, 3)}
    factors[factor][..., -1, 1] = number
    x = lt.LowRank(**factors)
    assert not x.is_finite
    for ask in (lambda: x.truncate(1), lambda: x.truncate(max_error=0.1), x.norm, x.core):
        with pytest.raises(SpecError, match=r"^the factors are not finite, so there is no norm, "):
            ask()


def test_a_product_or_a_result_too_large_for_its_dtype_is_refused() -> None:
    x = lt.LowRank(
        torch.full((2, 5), 1e200, dtype=torch.float64),
        torch.full((4, 2), 1e200, dtype=torch.float64),
    )
    assert x.is_finite
    with pytest.raises(SpecError, match=r"^their product is too large for float64"):
        x.norm()
    x = lt.LowRank(torch.ones(2, 5), torch.ones(4, 2), scale=1e100)
    with pytest.raises(
        SpecError, match=r"^the factors of the nearest value of rank 1 are too large for float32$"
    ):
        x.truncate(1)


def test_a_caller_s_tensors_are_never_changed() -> None:
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    before = A.clone(), B.clone()
    x = lt.LowRank(A, B, 0.3)
    lt.concat([x, x.scaled(2.0)]).truncate(1)
    _ = x.folded(), x.norm(), x.padded(4), x.to(dtype=torch.bfloat16)
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])


@given(
    st.integers(0, 2**32 - 1),
    st.integers(-20, 140),
    st.integers(-20, 140),
    st.sampled_from([1.0, -3.5, 1e30, 1e200]),
)
def test_a_value_fits_where_every_number_on_its_way_is_finite(
    seed: int, a: int, b: int, scale: float
) -> None:
    """Against the products written out in float64."""
    draw = torch.Generator().manual_seed(seed)
    x = lt.LowRank(
        torch.randn(2, 5, generator=draw) * 2.0**a,
        torch.randn(3, 2, generator=draw) * 2.0**b,
        scale,
    )
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        folded, product = x.B.double() * scale, (x.B.double() @ x.A.double()) * scale
        numbers = torch.cat([folded.flatten(), product.flatten(), x.A.flatten().double()])
        assert x.fits(dtype) is bool(
            (numbers[: folded.numel() + product.numel()].abs() <= torch.finfo(dtype).max).all()
        )


# ---------------------------------------------------------------------- what is no value
X = lt.LowRank(torch.ones(2, 4), torch.ones(3, 2))
NO_VALUE = {
    "a layout's name": lambda: lt.LowRank(X.A, X.B, layout="linear"),  # type: ignore[arg-type]
    "no layout": lambda: lt.LowRank(X.A, X.B, layout=None),  # type: ignore[arg-type]
    "an unknown kind": lambda: lt.Layout("conf", (3,)),  # type: ignore[arg-type]
    "a kernel that is a list": lambda: lt.Layout("conv", [3, 3]),  # type: ignore[arg-type]
    "a kernel of nothing": lambda: lt.Layout("conv", (0,)),
    "a kernel of a linear": lambda: lt.Layout("linear", (3,)),
    "no kernel of a convolution": lambda: lt.Layout("conv"),
    "a scale that is a decimal": lambda: lt.LowRank(X.A, X.B, Decimal(1)),  # type: ignore[arg-type]
    "a scale that is a tensor": lambda: lt.LowRank(X.A, X.B, torch.ones(2)),  # type: ignore[arg-type]
    "a scale that is a truth": lambda: lt.LowRank(X.A, X.B, True),
    "a bias of integers": lambda: lt.LowRank(X.A, X.B, bias=torch.ones(3, dtype=torch.int32)),
    "a rank of 2.5": lambda: X.padded(2.5),  # type: ignore[arg-type]
    "a rank of '3'": lambda: X.padded("3"),  # type: ignore[arg-type]
    "a rank of True": lambda: X.padded(True),
    "a rank beyond any size": lambda: X.padded(10**30),
    "a huge negative rank": lambda: X.truncate(-(10**5000)),
    "a bound of True": lambda: X.truncate(max_error=True),
    "a word for a factor": lambda: X.scaled("2"),  # type: ignore[arg-type]
    "no factor": lambda: lt.Adapter({"q": X}).scaled(None),  # type: ignore[arg-type]
    "a factor that is too large": lambda: X.scaled(10**400),
    "a dtype's name": lambda: X.to(dtype="float32"),  # type: ignore[arg-type]
    "a dtype of integers": lambda: X.dense(dtype=torch.int8),
    "a word for a dtype": lambda: X.dense(dtype="x"),  # type: ignore[arg-type]
    "an unknown device": lambda: X.to(device="nope"),
    "a device of 3.5": lambda: lt.Adapter({"q": X}).to(device=3.5),  # type: ignore[arg-type]
    "no rows": lambda: list(X.dense_blocks(0)),
    "rows of 2.5": lambda: list(X.dense_blocks(2.5)),  # type: ignore[arg-type]
    "one term alone": lambda: lt.concat(X),  # type: ignore[arg-type]
    "a term that is none": lambda: lt.concat([X, 1]),  # type: ignore[list-item]
    "the only term is none": lambda: lt.concat([1]),  # type: ignore[list-item]
    "terms on two devices": lambda: lt.concat([X, X.to(device="meta")]),
    "a product with none": lambda: lt.inner(X, 1),  # type: ignore[arg-type]
    "a product over two devices": lambda: lt.inner(X, X.to(device="meta")),
    "the norm of an outline": lambda: X.to(device="meta").norm(),
    "an outline's numbers": lambda: X.to(device="meta").is_finite,
    "an outline cut": lambda: X.to(device="meta").truncate(1),
    "a base of 3": lambda: lt.Adapter({"q": X}, base=3),  # type: ignore[arg-type]
    "no config": lambda: lt.Adapter({"q": X}, config=None),  # type: ignore[arg-type]
    "a config of numbers": lambda: lt.Adapter({"q": X}, config={1: 2, "a": 3}),  # type: ignore[dict-item]
    "a list for a tensor": lambda: lt.Adapter({"q": X}, unchanged={"b": [1.0]}),  # type: ignore[dict-item]
    "a list of tensors": lambda: lt.Adapter({"q": X}, unchanged=[X.A]),  # type: ignore[arg-type]
    "an order of 3": lambda: lt.Adapter({"q": X}, nesting={"m": 3}),  # type: ignore[dict-item]
    "an order that is a word": lambda: lt.Adapter({"q": X}, nesting={"m": "ab"}),  # type: ignore[dict-item]
    "assumed is a number": lambda: lt.Adapter({"q": X}, assumed=3),  # type: ignore[arg-type]
    "rounded is None": lambda: lt.Adapter({"q": X}, rounded=None),  # type: ignore[arg-type]
    "errors are words": lambda: lt.Adapter({"q": X}, errors={"q": "small"}),  # type: ignore[dict-item]
    "an order of nothing": lambda: lt.Adapter({"q": X}).renested(3),  # type: ignore[arg-type]
    "an order of a number": lambda: lt.Adapter({"q": X}).renested({"m": 3}),  # type: ignore[dict-item]
    "a sum of adapters": lambda: lt.combine([lt.Adapter({"q": X})]),  # type: ignore[list-item]
    "a sum of None": lambda: lt.combine(None),  # type: ignore[arg-type]
    "a word for a coefficient": lambda: lt.combine([(lt.Adapter({"q": X}), "x")]),  # type: ignore[list-item]
    "a weight that is a word": lambda: lt.parse_blend({"a": "x"}),  # type: ignore[dict-item]
    "a budget of words": lambda: Budgets("x"),  # type: ignore[arg-type]
    "a budget of nothing": lambda: Budgets(0),
    "a budget beyond any size": lambda: parse_bytes(10**5000),
}


@pytest.mark.parametrize("call", NO_VALUE.values(), ids=NO_VALUE)
def test_what_makes_no_sense_is_an_error_of_ours(call: Callable[[], object]) -> None:
    with pytest.raises(
        SpecError, match=r"expected|must be|takes|is one of|are on|no numbers|at most"
    ):
        call()


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize(("A", "B"), [*itertools.product(FP8, FP8), (FP8[0], torch.bfloat16)])
def test_eight_bit_factors_have_the_value_of_their_numbers(A: torch.dtype, B: torch.dtype) -> None:
    value = lt.LowRank(torch.randn(3, 5).to(A), torch.randn(4, 3).to(B), 0.3)
    wide = lt.LowRank(value.A.float(), value.B.float(), 0.3)
    torch.testing.assert_close(value.dense().float(), wide.dense(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.cat(list(value.dense_blocks(2))), value.dense())
    assert value.norm() == wide.norm()
    assert value.truncate(1)[1:] == wide.truncate(1)[1:]
    assert value.fits() == wide.fits()
    assert torch.equal(value.folded().B, wide.folded().B)
    both = lt.concat([value, wide.scaled(2.0)])
    torch.testing.assert_close(both.dense(), 3.0 * wide.dense())
    found = lt.similar({"a": lt.Adapter({"q": value}), "b": lt.Adapter({"q": wide})}, exact=False)
    assert float(found.cosines[0, 1]) == pytest.approx(1.0, abs=1e-5)
    tree = lt.AdapterTree()
    for name in ("a", "b"):
        tree.add(name, adapter=lt.Adapter({"q": value}))
    assert lt.hoist(tree, "", into="shared").relative_error < 1e-6


def test_a_scale_is_folded_without_numbers() -> None:
    value = lt.LowRank(torch.ones(2, 5).bfloat16(), torch.ones(4, 2).bfloat16(), 0.5)
    folded = value.to(device="meta").folded()
    assert (folded.scale, folded.B.dtype, folded.B.is_meta) == (1.0, torch.bfloat16, True)


def test_sparse_factors_are_refused() -> None:
    with pytest.raises(SpecError, match=r"dense tensors, got one of torch\.sparse_coo"):
        lt.LowRank(torch.ones(2, 5).to_sparse(), torch.ones(4, 2))
