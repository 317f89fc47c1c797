"""The kernels, run by Triton's interpreter on the CPU, against float64 and against a dense model.

The interpreter multiplies no bf16, and rounds to it by cutting off: so weights here are fp32 and
fp16, and bf16 factors are widened on the way. What a GPU does with bf16 is tested on one (`make
test-gpu`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import interpreted
from sampling import sampled
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.engine.kernels import MergePart, MergeTerm, can_merge

pytest.importorskip("triton", reason="Triton has no build for this platform")

EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    yield from interpreted("merge")


@pytest.fixture(scope="module")
def sample() -> Iterator[Any]:
    yield from interpreted("sample")


def part(
    weight: torch.dtype,
    factor: torch.dtype,
    shape: tuple[int, int, int],
    ranks: tuple[int, ...],
    *,
    turned: bool = False,
    scales: tuple[float, ...] = (0.3, -1.7, 2.0),
) -> MergePart:
    """Random numbers; the weight that is to be written is NaN all over."""
    draw = torch.Generator().manual_seed(sum(shape) + sum(ranks))
    batch, rows, cols = shape

    def factors(a: int, b: int) -> Tensor:
        made = torch.randn((batch, b, a) if turned else (batch, a, b), generator=draw).to(factor)
        return made.mT if turned else made

    pristine = torch.randn(shape, generator=draw).to(weight)
    terms = [
        MergeTerm(factors(rows, r), factors(r, cols), s)
        for r, s in zip(ranks, scales, strict=False)
    ]
    return MergePart.of(torch.full_like(pristine, float("nan")), pristine, terms)


def exact(of: MergePart) -> Tensor:
    total = of.pristine.double()
    for term in of.terms:
        total = total + term.left.double() @ term.right.double() * term.scale
    return total


SHAPES = [
    ((1, 64, 128), (16,), False),  # one tile
    ((1, 70, 130), (3, 20), False),  # tiles that stick out, and two rounds of ranks
    ((3, 65, 64), (8, 8, 8), False),  # experts
    ((1, 10, 600), (1, 2, 3), True),  # several tiles for one program
    ((2, 129, 33), (17,), True),
    ((1, 1, 1), (1,), False),
]


@pytest.mark.parametrize("weight", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_launch_writes_every_weight_to_one_rounding_of_the_exact_sum(
    kernel: Any, weight: torch.dtype, factor: torch.dtype
) -> None:
    parts = [part(weight, factor, shape, ranks, turned=turned) for shape, ranks, turned in SHAPES]
    assert all(can_merge(each.weight, each.pristine, each.terms) for each in parts)
    kernel.lay_out_parts(parts, interpreted=True).run()
    for each in parts:
        wanted = exact(each)
        # half a unit of the weight's dtype, and what a sum of so many fp32 products may be off
        bound = wanted.abs() * EPS[weight] + 1e-5 * (1 + wanted.abs())
        assert ((each.weight.double() - wanted).abs() <= bound).all()
        torch.testing.assert_close(
            each.weight, kernel.reference_merge(each), rtol=4 * EPS[weight], atol=1e-5
        )


def test_nearly_all_entries_are_the_rounded_float64(kernel: Any) -> None:
    each = part(torch.float16, torch.float16, (1, 256, 256), (16, 16, 16))
    kernel.lay_out_parts([each], interpreted=True).run()
    wrong = int((each.weight != exact(each).half()).sum())
    assert wrong <= each.weight.numel() // 1000


def test_the_bits_do_not_depend_on_what_shares_a_launch(kernel: Any) -> None:
    alone = [
        part(torch.float16, torch.float16, shape, ranks, turned=turned)
        for shape, ranks, turned in SHAPES
    ]
    together = [
        part(torch.float16, torch.float16, shape, ranks, turned=turned)
        for shape, ranks, turned in SHAPES
    ]
    for each in alone:
        kernel.lay_out_parts([each], interpreted=True).run()
    kernel.lay_out_parts(together[::-1], interpreted=True).run()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(alone, together, strict=True))


def test_a_weight_may_be_its_own_source(kernel: Any) -> None:
    apart, in_place = (part(torch.float32, torch.float32, (2, 70, 140), (5, 6)) for _ in range(2))
    in_place.weight.copy_(in_place.pristine)
    kernel.lay_out_parts(
        [apart, MergePart(in_place.weight, in_place.weight, in_place.terms)], interpreted=True
    ).run()
    assert torch.equal(apart.weight, in_place.weight)


def test_factors_of_several_dtypes_are_widened_and_none_is_rounded(kernel: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    each = part(torch.float32, torch.float32, (1, 40, 50), (4,))
    narrow = MergeTerm(
        torch.randn(1, 40, 8, generator=draw).bfloat16(),
        torch.randn(1, 8, 50, generator=draw).half(),
        1.0,
    )
    mixed = MergePart.of(each.weight, each.pristine, [*each.terms, narrow])
    kernel.lay_out_parts([mixed], interpreted=True).run()
    torch.testing.assert_close(mixed.weight.double(), exact(mixed), rtol=1e-6, atol=1e-5)


def test_what_a_kernel_does_not_cover_is_known_from_the_values_alone() -> None:
    good = part(torch.float16, torch.float16, (1, 8, 16), (2, 2))
    assert can_merge(good.weight, good.pristine, good.terms)
    zero = MergeTerm(good.terms[0].left, good.terms[0].right, 0.0)
    tiny = MergeTerm(good.terms[0].left, good.terms[0].right, 1e-30)
    wide = MergeTerm(good.terms[0].left.double(), good.terms[0].right, 1.0)
    columns_first = torch.zeros(1, 16, 8, dtype=torch.float16).mT
    for bad in (
        MergePart(good.weight.double(), good.pristine.double(), good.terms),
        MergePart(columns_first, good.pristine, good.terms),
        *(
            MergePart(good.weight, good.pristine, [*good.terms, term])
            for term in (zero, tiny, wide)
        ),
    ):
        assert not can_merge(bad.weight, bad.pristine, bad.terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sample_has_the_bits_of_every_so_manieth_number(sample: Any, dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in ((1,), (7, 5), (40, 301), (3, 20, 12))]
    tensors[1][0, 0] = float("nan")
    steps = [1, 2, 189, 11]
    taken = sample.lay_out_samples(tensors, steps)()
    wanted = torch.cat(
        [tensor.flatten()[::step] for tensor, step in zip(tensors, steps, strict=True)]
    )
    assert torch.equal(taken, wanted.view(taken.dtype))


@pytest.mark.parametrize("weight", [torch.float32, torch.float16], ids=str)
def test_a_sum_of_many_slots_takes_one_after_the_other(kernel: Any, weight: torch.dtype) -> None:
    each = part(weight, weight, (1, 70, 130), (40, 33, 5))
    assert sum(-(-t.left.shape[-1] // kernel.RANKS) for t in each.terms) > kernel.UNROLLED
    kernel.lay_out_parts([each], interpreted=True).run()
    wanted = exact(each)
    assert (
        (each.weight.double() - wanted).abs()
        <= wanted.abs() * EPS[weight] + 2e-5 * (1 + wanted.abs())
    ).all()


# ---------------------------------------------------------------------- a whole model
@pytest.fixture
def merging(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Merged switches take the kernel, as they do on CUDA; the number of parts of every launch."""
    launched: list[int] = []

    class Counted:
        def __init__(self, parts: list[MergePart]) -> None:
            self._launch, self._count = kernel.lay_out_parts(parts, interpreted=True), len(parts)

        def run(self) -> None:
            launched.append(self._count)
            self._launch.run()

    monkeypatch.setattr("lora_tree.engine.switching.merged.usable", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.switching.merged.merge_launch", Counted)
    return launched


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 20, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.up)


def forest() -> tuple[lt.AdapterTree, nn.Module]:
    torch.manual_seed(0)
    base = nn.Module()
    base.linear, base.words, base.conv, base.experts = (
        nn.Linear(70, 66),
        nn.Embedding(40, 24),
        nn.Conv2d(3, 8, 3),
        Experts(),
    )
    spec = dict(r=4, target_modules=["linear", "words", "conv"], target_parameters=["experts.up"])
    tree = lt.AdapterTree(defaults=spec)
    for path in ("a", "a/b", "a/c", "d"):
        tree.add(path)
    lt.attach(tree, base).detach()
    for path in tree.paths():
        adapter = tree.adapter(path)
        assert adapter is not None
        for value in adapter.modules.values():
            value.B.normal_(std=0.1)
    return tree, base.requires_grad_(False)


def bits(base: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in base.state_dict().items()}


def same(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(value.view(torch.uint8), y[name].view(torch.uint8)) for name, value in x.items()
    )


@pytest.mark.parametrize("half", sampled([False, True], [True]), ids=["fp32", "fp16"])
def test_every_history_of_switches_ends_in_the_same_bits(merging: list[int], half: bool) -> None:
    tree, base = forest()
    base = base.half() if half else base
    bare = bits(base)
    model = lt.attach(tree, base)
    first = {}
    for path in tree.paths():
        with model.using(path):
            first[path] = bits(base)
        assert same(bits(base), bare)
    for before, path in itertools.permutations(["", "a", "a/b", "a/c", "d"], 2):
        model.activate(before)
        model.activate(path)
        assert same(bits(base), first[path] if path else bare)
    assert max(merging) == 4, "one launch for all sites"


def test_it_writes_what_stock_operations_write_up_to_rounding(
    merging: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    model.activate("a/b")
    by_kernel = bits(base)
    assert merging == [4]
    model.activate("")
    monkeypatch.setattr("lora_tree.engine.switching.merged.usable", lambda device: False)
    model.activate("a/b")
    for name, value in bits(base).items():
        torch.testing.assert_close(value, by_kernel[name], rtol=1e-6, atol=1e-6)


def test_a_launch_that_fails_leaves_the_path_before(
    merging: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    model.activate("a/b")
    before = bits(base)
    good: Any = importlib.import_module("lora_tree.engine.switching.merged").merge_launch
    calls = iter([True])

    def failing(parts: list[MergePart]) -> Any:
        if next(calls, False):
            raise RuntimeError("no launch")
        return good(parts)

    monkeypatch.setattr("lora_tree.engine.switching.merged.merge_launch", failing)
    with pytest.raises(RuntimeError, match="no launch"):
        model.activate("d")
    assert model.active == "a/b"
    assert same(bits(base), before)
    model.activate("d")
    model.activate("a/b")
    assert same(bits(base), before)


def test_in_place_a_launch_that_fails_takes_nothing_back(
    merging: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = forest()
    with pytest.warns(lt.MergedWarning):
        model = lt.attach(tree, base, pristine="none")
    model.activate("a/b")
    before = bits(base)
    monkeypatch.setattr(
        "lora_tree.engine.switching.merged.merge_launch", functools.partial(_fail, "no launch")
    )
    with pytest.raises(RuntimeError, match="no launch"):
        model.activate("d")
    assert same(bits(base), before)


def _fail(what: str, *args: object) -> None:
    raise RuntimeError(what)


# ---------------------------------------------------------------------- launches that are kept
@pytest.fixture
def made(merging: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parts of every launch that was laid out."""
    found: list[int] = []
    good: Any = importlib.import_module("lora_tree.engine.switching.merged").merge_launch

    def counted(parts: list[MergePart]) -> Any:
        found.append(len(parts))
        return good(parts)

    monkeypatch.setattr("lora_tree.engine.switching.merged.merge_launch", counted)
    return found


def test_a_switch_made_before_lays_nothing_out_and_writes_the_same_bits(
    made: list[int], merging: list[int]
) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    seen: dict[str, dict[str, Tensor]] = {}
    for path in ("a/b", "a/c", "a/b", "a/c", "a/b"):
        versions = {name: value._version for name, value in base.named_parameters()}
        model.activate(path)
        assert all(
            value._version > versions[n] for n, value in base.named_parameters() if "bias" not in n
        )
        assert same(bits(base), seen.setdefault(path, bits(base)))
    assert len(merging) == 5
    assert len(made) == 2, "one for each path"


def test_a_weight_that_lies_elsewhere_is_laid_out_anew(made: list[int]) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    model.activate("a/b")
    expected = bits(base)
    model.activate("")
    weight: Any = base.linear.weight  # type: ignore[union-attr]
    weight.data = weight.data.clone()  # as a move to another device and back does
    count = len(made)
    model.activate("a/b")
    assert len(made) == count + 1
    assert same(bits(base), expected)


def test_another_pristine_copy_is_laid_out_anew(made: list[int]) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    model.activate("a/b")
    model.activate("")
    with torch.no_grad():
        base.linear.weight.mul_(2)  # type: ignore[union-attr, operator]
    model.activate("a/b")
    written = bits(base)
    model.detach()
    lt.attach(tree, base).activate("a/b")
    assert same(bits(base), written)


def test_what_trained_is_laid_out_for_each_use(made: list[int]) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    factors = model.trainable("a/b")[0]["params"]
    model.trainable()
    model.activate("a/b")
    model.activate("")
    before = bits(base)
    with torch.no_grad():
        for factor in factors:
            factor.data = factor.data * 2  # other memory, behind our back
    model.activate("a/b")
    assert len(made) == 2
    assert not same(bits(base), before)


# ---------------------------------------------------------------------- where there is no GPU
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "kernels"])
def test_without_a_gpu_a_benchmark_says_in_one_line_that_it_was_skipped(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import Name, main

    main([Name(name)])
    printed = capsys.readouterr()
    line = f"no CUDA device here: benchmarks {name} was skipped"
    assert (printed.out + printed.err).count(line) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_tests_say_in_one_line_that_they_were_skipped() -> None:
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests_gpu"],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert ran.returncode == 0
    line = "no CUDA device here: the tests of tests_gpu need one, and were skipped"
    assert (ran.stdout + ran.stderr).count(line) == 1
