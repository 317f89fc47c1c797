"""W ← round_once(W0 + left · right), whichever product the blocks are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lora_tree.engine import arithmetic
from lora_tree.engine.arithmetic import Scratch, exact_mode, write_sum

CPU = torch.device("cpu")
Product = Callable[[Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor) -> Tensor:
    """The same as oneDNN's product, on any machine."""
    return x @ w.mT


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """Ask anew whether a product is exact: the answer is kept for the one before."""
    arithmetic._onednn_is_fp32.cache_clear()
    yield
    arithmetic._onednn_is_fp32.cache_clear()


@pytest.fixture(params=["none", "plain", "torch's own"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with narrow products, and with one of several fp32 products, or none."""
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset())
    if request.param != "torch's own":
        made = plain if request.param == "plain" else None
        monkeypatch.setattr(arithmetic, "fp32_product", lambda: made)
    return str(request.param)


def summed(shape: tuple[int, int, int], rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a sum of fp32 factors as it is written, and in float64 rounded once."""
    batch, rows, cols = shape
    torch.manual_seed(0)
    wide = torch.randn(batch, rows, cols + 3).to(dtype)
    W0, weight = wide[..., :cols].clone(), wide[..., :cols]  # which is no block of memory
    left, right = torch.randn(batch, rows, rank), torch.randn(batch, rank, cols) / 8
    with exact_mode(CPU):
        write_sum(weight, W0, left, right, Scratch())
    return weight, (W0.double() + left.double() @ right.double()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 33), (3, 40, 50), (2, 4, 4)], ids=str)
def test_a_wide_sum_is_rounded_once(
    product: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arithmetic, "BLOCK", 700)
    monkeypatch.setattr(arithmetic, "PRODUCT_BLOCK", 300)
    got, exact = summed(shape, 12, dtype)
    # fp32's own rounding moves few of them over the edge between two neighbours.
    assert (got != exact).sum() <= max(1, exact.numel() // 1000)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, exact, rtol=eps, atol=eps * 2**-6)


def test_no_bit_depends_on_how_a_product_is_cut_into_blocks(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for numbers in (300, 1000, 1 << 20):
        monkeypatch.setattr(arithmetic, "BLOCK", numbers)
        monkeypatch.setattr(arithmetic, "PRODUCT_BLOCK", numbers)
        found.append(summed((1, 70, 33), 48, torch.bfloat16)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def narrow(x: Tensor, w: Tensor) -> Tensor:
    return (x.bfloat16() @ w.bfloat16().mT).float()


def other(x: Tensor, w: Tensor) -> Tensor:
    raise RuntimeError("another signature")


@pytest.mark.parametrize("bad", [narrow, other])
def test_a_product_that_fails_or_is_not_fp32_is_left_alone(
    bad: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset())
    monkeypatch.setattr(arithmetic, "fp32_product", lambda: bad)
    assert arithmetic._block_product(torch.zeros(1, 2, 2), torch.float32) is None
    monkeypatch.setattr(arithmetic, "fp32_product", lambda: plain)
    arithmetic._onednn_is_fp32.cache_clear()
    assert arithmetic._block_product(torch.zeros(1, 2, 2), torch.float32) is plain
    assert arithmetic._block_product(torch.zeros(1, 2, 2), torch.float64) is None
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset({torch.bfloat16}))
    assert arithmetic._block_product(torch.zeros(1, 2, 2), torch.float32) is None
