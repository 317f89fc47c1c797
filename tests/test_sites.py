"""The contract of every kind of site, against dense float64 algebra written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import summed
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch, MergedOnly, TiedWeights, UnmergedOnly
from lora_tree.lowrank import EMBEDDING, LINEAR, PARAMETER, Layout
from lora_tree.sites import Site, finding

EPS = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Conv1D(nn.Module):
    """Stands for transformers' class of this name: (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Fused experts: each reads its own slice."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.down_proj = nn.Parameter(torch.randn(*((3, 20, 12) if transposed else (3, 12, 20))))

    def forward(self, x: Tensor) -> Tensor:
        w = self.down_proj if self.is_transposed else self.down_proj.mT
        return torch.einsum("bi,eio->beo", x, w)


class Scaled(nn.Embedding):
    """Multiplies its output, as Gemma's embedding does."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Pointwise(nn.Module):
    """A layer unlike those of the library: channels first, its weight called kernel, its output
    doubled.
    """

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(into, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bit,io->bot", x, self.kernel) * 2


class PointwiseSite(Site):
    """All that the library has to be told of a new kind of layer."""

    weight_name = "kernel"
    bias_name = ""
    channels = -2

    @staticmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        return isinstance(module, Pointwise)

    @staticmethod
    def is_linear(module: nn.Module) -> bool:
        return True

    @property
    def layout(self) -> Layout:
        return LINEAR

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        assert self.weight is not None
        return self.weight.shape[1], self.weight.shape[0]

    def sides_of(self, value: lt.LowRank) -> tuple[Tensor, Tensor]:
        return value.A.mT[None], value.B.mT[None]

    def token_axes(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[2:])

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return torch.einsum("bit,ri->brt", x, A)

    def up(self, low: Tensor, B: Tensor) -> Tensor:
        return torch.einsum("brt,or->bot", low, B) * 2


finding.KINDS.append(PointwiseSite)  # its one row


@dataclass
class Kind:
    """One kind of site: a module, the name its adapter uses, the shape of the delta, and ΔW in the
    weight's layout.
    """

    make: Callable[[], nn.Module]
    name: str
    batch: tuple[int, ...]
    out: int
    into: int
    layout: Layout
    weight: str
    dense: Callable[[Tensor], Tensor]  # (*batch, out, in) → the weight's own shape
    x: Callable[[torch.dtype], Tensor]
    is_linear: bool = True  # in its weight: then rounding errors have a bound


def _float(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(*shape).to(dtype)


def _ids(dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 11, (2, 5))


def _same(delta: Tensor) -> Tensor:
    return delta


def _transposed(delta: Tensor) -> Tensor:
    return delta.mT


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(20, 12), "m", (), 12, 20, LINEAR, "m.weight", _same, _float(2, 3, 20)),
    "linear without bias": Kind(
        lambda: nn.Linear(20, 12, bias=False), "m", (), 12, 20, LINEAR, "m.weight", _same, _float(2, 20)
    ),
    "Conv1D": Kind(lambda: Conv1D(12, 20), "m", (), 12, 20, LINEAR, "m.weight", _transposed, _float(2, 3, 20)),
    "embedding": Kind(lambda: nn.Embedding(11, 12), "m", (), 12, 11, EMBEDDING, "m.weight", _transposed, _ids),
    "scaled embedding": Kind(lambda: Scaled(11, 12), "m", (), 12, 11, EMBEDDING, "m.weight", _transposed, _ids),
    "conv1d": Kind(
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, padding_mode="reflect"),
        "m", (), 6, 12, Layout("conv", (3,)), "m.weight", lambda d: d.reshape(6, 4, 3), _float(2, 4, 15),
    ),
    "conv2d": Kind(
        lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2),
        "m", (), 6, 24, Layout("conv", (3, 2)), "m.weight", lambda d: d.reshape(6, 4, 3, 2), _float(2, 4, 9, 8),
    ),
    "conv2d channels last": Kind(
        lambda: nn.Conv2d(4, 6, 3, padding_mode="circular", padding=1).to(memory_format=torch.channels_last),
        "m", (), 6, 36, Layout("conv", (3, 3)), "m.weight", lambda d: d.reshape(6, 4, 3, 3), _float(2, 4, 9, 8),
    ),
    "conv3d": Kind(
        lambda: nn.Conv3d(2, 6, 2, padding=1, padding_mode="replicate"),
        "m", (), 6, 16, Layout("conv", (2, 2, 2)), "m.weight", lambda d: d.reshape(6, 2, 2, 2, 2),
        _float(2, 2, 4, 5, 6),
    ),
    "experts": Kind(
        lambda: Experts(False), "m.down_proj", (3,), 12, 20, PARAMETER, "m.down_proj", _same, _float(2, 20)
    ),
    "experts transposed": Kind(
        lambda: Experts(True), "m.down_proj", (3,), 12, 20, PARAMETER, "m.down_proj", _transposed, _float(2, 20),
    ),
    "2-D parameter": Kind(
        lambda: nn.Linear(20, 12), "m.weight", (1,), 12, 20, PARAMETER, "m.weight", lambda d: d[0], _float(2, 20),
    ),
    "a new kind": Kind(
        lambda: Pointwise(12, 20), "m", (), 12, 20, LINEAR, "m.kernel", _transposed, _float(2, 20, 5)
    ),
    "attention in": Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True), "m", (), 24, 8, LINEAR, "m.in_proj_weight", _same,
        _float(3, 2, 8), is_linear=False,
    ),
    "attention out": Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True), "m.out_proj", (), 8, 8, LINEAR,
        "m.out_proj.weight", _same, _float(3, 2, 8), is_linear=False,
    ),
}  # fmt: skip


class Base(nn.Module):
    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.m, nn.MultiheadAttention):
            out: Tensor = self.m(x, x, x)[0]
            return out
        return self.m(x)  # type: ignore[no-any-return]


def lineage(
    kind: Kind, dtype: torch.dtype, *, size: float = 1.0, bias: bool = False
) -> lt.AdapterTree:
    """Three nodes on one way down, of different ranks, scales and weights."""
    tree = lt.AdapterTree()
    for path, r, scale, weight in (
        ("a", 4, 2.0, 1.0),
        ("a/b", 2, 0.3, 0.7),
        ("a/b/c", 3, -1.1, 1.0),
    ):
        A = (torch.randn(*kind.batch, r, kind.into) * size / math.sqrt(r)).to(dtype)
        B = torch.randn(*kind.batch, kind.out, r).to(dtype)
        b = torch.randn(kind.out).to(dtype) if bias else None
        tree.add(
            path,
            adapter=lt.Adapter({kind.name: lt.LowRank(A, B, scale, b, kind.layout)}),
            weight=weight,
        )
    return tree


def dense64(tree: lt.AdapterTree, path: str, name: str) -> tuple[Tensor, Tensor, int]:
    """`summed`, of a module that every node of the path changes."""
    delta, sizes, rank = summed(tree, path, name)
    assert isinstance(delta, Tensor) and isinstance(sizes, Tensor)  # noqa: PT018
    return delta, sizes, rank


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    tiny = torch.finfo(dtype).tiny
    return EPS[dtype] * 2.0 ** torch.floor(torch.log2(x.abs().clamp_min(tiny)))


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_merged_weight_is_the_dense_sum_rounded_once(
    name: str, dtype: torch.dtype, factors: torch.dtype
) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    base = Base(kind.make()).to(dtype)
    W = base.get_parameter(kind.weight)
    before, address = W.detach().clone(), W.data_ptr()
    tree = lineage(kind, factors, size=0.3)
    model = lt.attach(tree, base)
    model.activate("a/b/c")
    delta, sizes, rank = dense64(tree, "a/b/c", kind.name)
    exact = before.double() + kind.dense(delta)
    bound = half_ulp(exact, dtype) + (rank + 2) * 2.0**-24 * (
        before.double().abs() + kind.dense(sizes)
    )
    assert ((W.detach().double() - exact).abs() <= bound).all()
    assert W.data_ptr() == address
    model.deactivate()
    assert torch.equal(W, before)
    assert W.data_ptr() == address


LARGE: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(512, 512), "m", (), 512, 512, LINEAR, "m.weight", _same, _float(1, 512)),
    "Conv1D": Kind(lambda: Conv1D(384, 256), "m", (), 384, 256, LINEAR, "m.weight", _transposed, _float(1, 256)),
    "embedding": Kind(lambda: nn.Embedding(700, 256), "m", (), 256, 700, EMBEDDING, "m.weight", _transposed, _ids),
    "conv2d": Kind(
        lambda: nn.Conv2d(64, 96, 3), "m", (), 96, 576, Layout("conv", (3, 3)), "m.weight",
        lambda d: d.reshape(96, 64, 3, 3), _float(1, 64, 4, 4),
    ),
    "conv2d channels last": Kind(
        lambda: nn.Conv2d(64, 96, 3).to(memory_format=torch.channels_last), "m", (), 96, 576, Layout("conv", (3, 3)),
        "m.weight", lambda d: d.reshape(96, 64, 3, 3), _float(1, 64, 4, 4),
    ),
    "experts": Kind(
        lambda: Fused(8, 160, 96), "m.weight", (8,), 160, 96, PARAMETER, "m.weight", _same, _float(1, 96)
    ),
    "attention in": Kind(
        lambda: nn.MultiheadAttention(192, 2), "m", (), 576, 192, LINEAR, "m.in_proj_weight", _same, _float(1, 1, 192)
    ),
    "attention out": Kind(
        lambda: nn.MultiheadAttention(320, 2), "m.out_proj", (), 320, 320, LINEAR, "m.out_proj.weight", _same,
        _float(1, 1, 320),
    ),
}  # fmt: skip


class Fused(nn.Module):
    """One parameter of some experts."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_a_narrow_base_differs_from_the_rounded_sum_in_one_entry_of_a_thousand_at_most(
    name: str, dtype: torch.dtype, factors: torch.dtype
) -> None:
    torch.manual_seed(0)
    kind = LARGE[name]
    base = Base(kind.make()).to(dtype)
    weight = base.get_parameter(kind.weight)
    with torch.no_grad():
        weight.normal_()
    before = weight.detach().clone()
    tree = lineage(kind, factors, size=0.7)
    lt.attach(tree, base).activate("a/b/c")
    delta, _, _ = dense64(tree, "a/b/c", kind.name)
    assert 0.3 < delta.abs().mean() / before.double().abs().mean() < 3
    exact = (before.double() + kind.dense(delta)).to(dtype)
    assert int((weight != exact).sum()) <= exact.numel() // 1000


@pytest.mark.parametrize("name", KINDS)
def test_unmerged_the_factors_have_the_gradients_of_the_dense_sum(name: str) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    base = Base(kind.make()).double()
    tree, x = lineage(kind, torch.float64), kind.x(torch.float64)
    model = lt.attach(tree, base)
    model.trainable("a", "a/b/c")
    leaves, total = {}, base.get_parameter(kind.weight).detach().clone()
    for node in tree.lineage("a/b/c"):
        v = tree.adapter(node).modules[kind.name]  # type: ignore[union-attr]
        leaves[node] = [t.detach().clone().requires_grad_() for t in (v.A, v.B)]
        A, B = leaves[node]
        total = total + kind.dense(tree[node].weight * v.scale * (B @ A))
    weights = {n: p.detach() for n, p in base.named_parameters()} | {kind.weight: total}
    exact = torch.func.functional_call(base, weights, (x,))
    g = torch.randn_like(exact)
    exact.backward(g)
    with model.using("a/b/c", mode="unmerged"):
        base(x).backward(g)
    for node in ("a", "a/b/c"):
        v = tree.adapter(node).modules[kind.name]  # type: ignore[union-attr]
        for factor, leaf in zip((v.A, v.B), leaves[node], strict=True):
            torch.testing.assert_close(factor.grad, leaf.grad, rtol=1e-11, atol=1e-11)
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if k.is_linear])
def test_unmerged_output_and_input_gradient_are_those_of_the_dense_weight(
    name: str, dtype: torch.dtype, factors: torch.dtype
) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    base = Base(kind.make())
    base = base.to(dtype)
    tree = lineage(kind, factors, size=0.3)
    x = kind.x(dtype)
    wide = Base(kind.make())
    wide.load_state_dict({k: v.double().clone() for k, v in base.state_dict().items()}, assign=True)
    delta, sizes, rank = dense64(tree, "a/b/c", kind.name)
    with torch.no_grad():
        wide.get_parameter(kind.weight).add_(kind.dense(delta))
    magnitude = Base(kind.make())  # Σ |x| |W| at every output: what rounding errors are relative to
    magnitude.load_state_dict(
        {k: v.double().abs() for k, v in base.state_dict().items()}, assign=True
    )
    with torch.no_grad():
        magnitude.get_parameter(kind.weight).add_(kind.dense(sizes))

    def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        leaf = x.clone().requires_grad_(x.is_floating_point())
        out = module(leaf)
        g = torch.linspace(0.5, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(dtype)
        out.backward(g.to(out.dtype))
        return out.detach().double(), None if leaf.grad is None else leaf.grad.double()

    exact, exact_grad = run(wide, x.double() if x.is_floating_point() else x)
    size, size_grad = run(magnitude, x.double().abs() if x.is_floating_point() else x)
    model = lt.attach(tree, base)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with model.using("a/b/c", mode="unmerged"):
        assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
        got, grad = run(base, x)
        with torch.no_grad():
            plain = base(x).double()  # may be added in place
    # the base's output and the sum are rounded to the base's dtype; the scale, both products and the delta to the side
    # path's; and every product adds up its terms in fp32, or in fp64 where it is fp64
    u, side = EPS[dtype], EPS[torch.promote_types(dtype, factors)]
    add = min(2.0**-24, u)
    reach = kind.into + kind.out * math.prod(kind.layout.kernel) + rank
    for found, right, scale in (
        (got, exact, size),
        (plain, exact, size),
        (grad, exact_grad, size_grad),
    ):
        if right is not None:
            assert found is not None
            assert scale is not None
            assert ((found - right).abs() <= (3 * u + 4 * side + reach * add) * scale).all()
    assert not any(m._forward_hooks or "forward" in vars(m) for m in base.modules())


@pytest.mark.parametrize("everywhere", [False, True], ids=["hook", "global hook"])
@torch.no_grad()
def test_an_output_that_a_hook_has_kept_is_not_written_over(everywhere: bool) -> None:
    torch.manual_seed(0)
    base = Base(nn.Linear(20, 12))
    x, kept = torch.randn(3, 20), []
    bare = base(x)
    register = (
        nn.modules.module.register_module_forward_hook
        if everywhere
        else base.m.register_forward_hook
    )
    with register(lambda module, args, out: kept.append(out) if module is base.m else None):
        model = lt.attach(lineage(KINDS["linear"], torch.float32), base)
        with model.using("a/b/c", mode="unmerged"):
            assert not torch.equal(base(x), bare)
    assert torch.equal(kept[0], bare)


@torch.no_grad()
def test_a_linear_that_hands_back_what_it_was_given_is_not_written_over() -> None:
    class Same(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    base = Base(Same(8, 8))
    x = torch.randn(3, 8)
    before = x.clone()
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m": lt.LowRank(torch.randn(2, 8), torch.randn(8, 2))}))
    with lt.attach(tree, base).using("a", mode="unmerged"):
        assert not torch.equal(base(x), x)
    assert torch.equal(x, before)


def test_a_grouped_convolution_runs_unmerged_only_and_sees_all_channels() -> None:
    torch.manual_seed(0)
    base = Base(nn.Conv2d(4, 6, 3, groups=2, padding=1)).double()
    A, B = torch.randn(2, 2, 4 * 9).double(), torch.randn(2, 3, 2).double()
    value = lt.LowRank(A, B, 0.5, None, Layout("conv", (3, 3)))
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m": value}))
    model = lt.attach(tree, base)
    with pytest.raises(UnmergedOnly, match=r"a: m|groups=2"):
        model.activate("a")
    x = torch.randn(2, 4, 5, 5).double()
    dense = torch.cat([0.5 * (B[g] @ A[g]) for g in range(2)]).reshape(6, 4, 3, 3)
    expected = base(x) + F.conv2d(x, dense, padding=1)
    with model.using("a", mode="unmerged"):
        torch.testing.assert_close(base(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_lora_bias_adds_to_the_output(name: str, mode: str) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    base = Base(kind.make()).double()
    tree = lineage(kind, torch.float64, bias=True)
    x = kind.x(torch.float64)
    wide = Base(kind.make())
    wide.double().load_state_dict(base.state_dict())
    delta, _, _ = dense64(tree, "a/b/c", kind.name)
    more = sum(
        tree[n].weight * v.scale * v.bias  # type: ignore[operator]
        for n in tree.paths()
        for v in (tree.adapter(n).modules["m"],)  # type: ignore[union-attr]
    )
    with torch.no_grad():
        wide.m.weight.add_(kind.dense(delta))
        wide.m.bias.add_(more)
    model = lt.attach(tree, base)
    before = base.m.bias.detach().clone()
    with model.using("a/b/c", mode=mode):  # type: ignore[arg-type]
        torch.testing.assert_close(base(x), wide(x), rtol=1e-12, atol=1e-11)
    assert torch.equal(base.m.bias, before)


def test_lora_bias_without_a_bias_to_add_to_is_unmerged_only() -> None:
    kind = KINDS["linear without bias"]
    base = Base(kind.make())
    model = lt.attach(lineage(kind, torch.float32, bias=True), base)
    with pytest.raises(UnmergedOnly, match="has none to add it to"):
        model.activate("a")
    model.activate("a", mode="unmerged")


def test_a_module_that_reads_its_childs_weight_is_caught_in_its_first_forward() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.proj.weight)

    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m.proj": lt.LowRank(torch.ones(1, 4), torch.ones(4, 1))}))
    base = Base(Reader())
    model = lt.attach(tree, base)
    model.activate("a", mode="unmerged")
    with pytest.raises(MergedOnly, match=r"m\.proj: Reader ran without calling it"):
        base(torch.ones(1, 4))
    model.activate("a")
    base(torch.ones(1, 4))


@pytest.mark.parametrize("lists", [True, False])
def test_a_forward_may_choose_among_the_modules_of_a_container(lists: bool) -> None:
    class Chooser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            heads = [nn.Linear(4, 4, bias=False) for _ in range(2)]
            self.heads: nn.Module = (
                nn.ModuleList(heads) if lists else nn.ModuleDict({"0": heads[0], "1": heads[1]})
            )
            self.body = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor, *, head: bool = True) -> Tensor:
            x = F.linear(x, self.body.weight) if not head else self.body(x)
            return self.heads.get_submodule("0")(x)  # type: ignore[no-any-return]

    names = ("m.heads.0", "m.heads.1", "m.body")
    tree = lt.AdapterTree()
    tree.add(
        "a", adapter=lt.Adapter({n: lt.LowRank(torch.ones(1, 4), torch.ones(4, 1)) for n in names})
    )
    base = Base(chooser := Chooser())
    model = lt.attach(tree, base)
    x, delta = torch.randn(2, 4), torch.ones(4, 4)
    model.activate("a", mode="unmerged")
    with pytest.raises(MergedOnly, match=r"m\.body: Chooser ran without calling it"):
        chooser(x, head=False)
    expected = (
        x @ (chooser.body.weight + delta).mT @ (chooser.get_parameter("heads.0.weight") + delta).mT
    )
    torch.testing.assert_close(base(x), expected)


def test_a_weight_that_is_a_buffer_elsewhere_is_tied_too() -> None:
    base = Base(nn.Linear(4, 3))
    base.register_buffer("seen", base.m.weight.detach())
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m": lt.LowRank(torch.ones(1, 4), torch.ones(3, 1))}))
    with pytest.raises(TiedWeights, match=r"m: its weight is tied to .*seen"):
        lt.attach(tree, base).activate("a")


def test_tied_weights_are_refused_with_the_choices() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))  # type: ignore[no-any-return]

    base = Tied()
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"head": lt.LowRank(torch.ones(1, 3), torch.ones(5, 1))}))
    model = lt.attach(tree, base)
    with pytest.raises(
        TiedWeights, match=r"head: its weight is tied to embed\.weight[\s\S]*unmerged[\s\S]*untie"
    ):
        model.activate("a")
    bare = base(torch.tensor([1]))
    h = base.embed(torch.tensor([1]))
    with model.using("a", mode="unmerged"):
        torch.testing.assert_close(base(torch.tensor([1])), bare + h.sum(-1, keepdim=True))


def test_weights_that_are_not_plain_are_refused() -> None:
    value = lt.LowRank(torch.ones(1, 4), torch.ones(3, 1))
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m": value}))
    parametrised = Base(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(BaseMismatch, match="a: m: its weight is computed from other parameters"):
        lt.attach(tree, parametrised).activate("a")
    with pytest.raises(BaseMismatch, match="meta device"):
        lt.attach(tree, Base(nn.Linear(4, 3, device="meta"))).activate("a")
    odd = lt.AdapterTree()
    odd.add(
        "a",
        adapter=lt.Adapter({"m": lt.LowRank(torch.ones(1, 4), torch.ones(3, 1), layout=EMBEDDING)}),
    )
    with pytest.raises(BaseMismatch, match="max_norm"):
        lt.attach(odd, Base(nn.Embedding(4, 3, max_norm=1.0))).activate("a")


def test_a_quantised_layer_is_unmerged_only() -> None:
    class Int8Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 3
            self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype))

    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m": lt.LowRank(torch.ones(1, 4), torch.ones(3, 1))}))
    base = Base(Int8Linear())
    model = lt.attach(tree, base)
    with pytest.raises(UnmergedOnly, match="quantised"):
        model.activate("a")
    model.activate("a", mode="unmerged")
    assert torch.equal(base(torch.ones(1, 4)), torch.full((1, 3), 8.0))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"mm": lt.LowRank(torch.ones(1, 4), torch.ones(3, 1))},
            "a: mm: the base has no such module",
        ),
        (
            {"m": lt.LowRank(torch.ones(1, 5), torch.ones(3, 1))},
            r"a: m: A is \(1, 5\).*needs \(1, 4\) and \(3, 1\)",
        ),
        (
            {"m": lt.LowRank(torch.ones(1, 4), torch.ones(3, 1), layout=EMBEDDING)},
            "an embedding delta.* a Linear there",
        ),
        (
            {"n": lt.LowRank(torch.ones(1, 4), torch.ones(3, 1))},
            "n: a LayerNorm can't have an increment",
        ),
    ],
)
def test_what_does_not_fit_is_named(adapter: dict[str, lt.LowRank], message: str) -> None:
    base = Base(nn.Linear(4, 3))
    base.n = nn.LayerNorm(3)
    tree = lt.AdapterTree(base="org/one")
    tree.add("a", adapter=lt.Adapter(adapter, base="org/other"))
    with pytest.raises(BaseMismatch, match=message) as caught:
        lt.attach(tree, base).activate("a")
    assert "the adapter names base 'org/other', the model attached is 'org/one'" in str(
        caught.value
    )


def test_a_convolution_with_a_forward_of_its_own_is_merged_only() -> None:
    class Standardised(nn.Conv2d):
        """As BiT's: what runs is not W but W of mean 0, so W + ΔW is right merged and W·x + ΔW·x is
        not.
        """

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    torch.manual_seed(0)
    base = Base(Standardised(2, 3, 2)).double()
    A, B = torch.randn(2, 8).double(), torch.randn(3, 2).double()
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m": lt.LowRank(A, B, layout=Layout("conv", (2, 2)))}))
    x = torch.randn(1, 2, 4, 4).double()
    W = base.m.weight.detach() + (B @ A).reshape(3, 2, 2, 2)
    expected = F.conv2d(x, W - W.mean((1, 2, 3), keepdim=True), base.m.bias)
    model = lt.attach(tree, base)
    with pytest.raises(
        MergedOnly, match="m: can't run unmerged: Standardised has a forward of its own"
    ):
        model.activate("a", mode="unmerged")
    with model.using("a"):
        torch.testing.assert_close(base(x), expected)


def test_raw_parameters_of_siblings_flatten_in_the_order_their_module_registers_them(
    tmp_path: Path,
) -> None:
    """Each node alone has nothing to order; what PEFT reads of both together stands and falls with
    the order.
    """

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Parameter(torch.randn(3, 4, 4))
            self.first = nn.Parameter(torch.randn(3, 4, 4))

    base = Base(Pair())
    tree = lt.AdapterTree(defaults=dict(r=2))
    tree.add("a", target_parameters=["m.first"])
    tree.add("a/b", target_parameters=["m.second"])
    lt.attach(tree, base)
    flat = tree.flatten("a/b")
    assert flat.nesting == {"m": ("second", "first")}
    flat.save(tmp_path / "flat")
    read = lt.Adapter.load(tmp_path / "flat")
    assert read.nesting == flat.nesting
    assert all(torch.equal(read.modules[n].A, v.A) for n, v in flat.modules.items())


def test_a_new_kind_of_layer_is_targeted_and_made_fresh_by_what_it_says_itself() -> None:
    base = Base(Pointwise(12, 20))
    tree = lt.AdapterTree(defaults=dict(r=4, target_modules="all-linear"))
    tree.add("a")
    model = lt.attach(tree, base)
    fresh = tree.adapter("a")
    assert fresh is not None
    assert {name: (v.shape, v.layout) for name, v in fresh.modules.items()} == {
        "m": ((12, 20), LINEAR)
    }
    model.trainable("a")
    x = torch.randn(2, 20, 5)
    with model.using("a", mode="unmerged"):
        base(x).sum().backward()
    (grad_A, grad_B) = (p.grad for p in model.factors.of("a"))
    assert grad_A is not None
    assert grad_B is not None
    # out = 2 · (W + scale · B A)ᵀ x, so d sum / dB = 2 · scale · Σ over rows and tokens of (A x), in every row of B.
    value = fresh.modules["m"]
    low = torch.einsum("bit,ri->r", x.double(), value.A.double()) * 2 * value.scale
    torch.testing.assert_close(grad_B.double(), low.expand(12, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_an_empty_weight_is_no_target() -> None:
    base = nn.ModuleDict({"none": nn.Linear(0, 4), "out": nn.Linear(4, 0), "some": nn.Linear(4, 4)})
    tree = lt.AdapterTree(defaults=dict(r=2))
    tree.add("all", target_modules="all-linear")
    lt.attach(tree, base).detach()
    assert tree.outline("all").ranks == {"some": 2}  # type: ignore[union-attr]
    tree.add("named", target_modules=["none"])
    with pytest.raises(
        BaseMismatch, match=r"named: none: its weight is empty, \(4, 0\).*\n.*exclude_modules"
    ):
        lt.attach(tree, base)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_is_not_passed_over() -> None:
    """Its weight is empty until the base has run."""
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules="all-linear"))
    tree.add("fr")
    base = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    with pytest.raises(
        BaseMismatch, match=r"fr: 0: its weight is empty.*\n.*where it is lazy, run the base once"
    ):
        lt.attach(tree, base)
    base(torch.zeros(1, 5))
    lt.attach(tree, base)
    assert tree.outline("fr").modules["0"].shape == (4, 5)  # type: ignore[union-attr]
