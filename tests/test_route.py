"""Many paths in one batch: every row is what it would be alone, whatever the form, and no row goes
through another's.

What is compared with is dense float64 algebra: for each row the weights of its own path, W + Σ
c·s·B·A, by hand.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import summed as dense64
from test_sites import DTYPES, EPS, KINDS, Base, Kind
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.cache import shelf
from lora_tree.engine import arithmetic
from lora_tree.engine.ledger import Lender, ordinary
from lora_tree.engine.routing import forms
from lora_tree.engine.routing.at_once import AT_ONCE, AllPathsForm
from lora_tree.engine.routing.forms import Strategy
from lora_tree.engine.routing.in_turn import EachPathForm, NodesForm
from lora_tree.engine.routing.owed import Owed
from lora_tree.engine.routing.segmented import SegmentedForm
from lora_tree.engine.rows.batch import Batch
from lora_tree.errors import BaseMismatch, PathError, SpecError, StateError
from lora_tree.lowrank import LINEAR
from lora_tree.sites import find_site

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
PATHS = ("a", "a/b", "a/b/c", "a/d", "e")
BLEND = {"a/b": 0.5, "a/d": 0.25, "e": -1.0}
EVERY_WAY = set(chain.from_iterable(forms.FORMS.values()))
ROUTED = [name for name, kind in KINDS.items() if kind.is_linear]


def tree_for(
    kind: Kind, factors: torch.dtype, *, size: float = 0.3, bias: bool = False
) -> lt.AdapterTree:
    """Nodes of several ranks, scales and weights; ``e`` stands apart."""
    tree = lt.AdapterTree()
    numbers = {
        "a": (4, 2.0, 1.0),
        "a/b": (2, 0.3, 0.7),
        "a/b/c": (3, -1.1, 1.0),
        "a/d": (4, 1.0, 1.0),
        "e": (1, 0.5, 2.0),
    }
    for path, (r, scale, weight) in numbers.items():
        A = (torch.randn(*kind.batch, r, kind.into) * size / math.sqrt(r)).to(factors)
        B = torch.randn(*kind.batch, kind.out, r).to(factors)
        b = (
            torch.randn(kind.out * math.prod(kind.batch)).to(factors)
            if bias and path != "a/d"
            else None
        )
        tree.add(
            path,
            adapter=lt.Adapter({kind.name: lt.LowRank(A, B, scale, b, kind.layout)}),
            weight=weight,
        )
    return tree


def widened(kind: Kind, base: nn.Module, more: Tensor | float, *, magnitude: bool = False) -> Base:
    """A float64 copy of ``base`` with ``more`` in its weight; with ``magnitude``, of the absolute
    values.
    """
    wide = Base(kind.make())
    state = {k: v.detach().double().clone() for k, v in base.state_dict().items()}
    wide.load_state_dict({k: v.abs() if magnitude else v for k, v in state.items()}, assign=True)
    if isinstance(more, Tensor):
        with torch.no_grad():
            wide.get_parameter(kind.weight).add_(kind.dense(more))
    return wide


ROWS: list[lt.Blend] = ["a/b/c", "", "a/d", BLEND, "e", "a/b/c", "a"]


def _inputs(kind: Kind, dtype: torch.dtype) -> Tensor:
    """As many inputs as `ROWS`, with another number of tokens."""
    one = kind.x(dtype)
    if not one.is_floating_point():
        return torch.randint(0, 11, (len(ROWS), 5))
    return torch.randn(len(ROWS), *one.shape[1:]).to(dtype)


@every_strategy
def test_two_nodes_may_have_one_adapter(strategy: Strategy) -> None:
    kind = KINDS["linear"]
    torch.manual_seed(3)
    base = Base(kind.make())
    tree = lt.AdapterTree()
    one = lt.Adapter({kind.name: lt.LowRank(torch.randn(2, kind.into), torch.randn(kind.out, 2))})
    for path in ("x", "y", "y/z"):
        tree.add(path, adapter=one)
    model = lt.attach(tree, base)
    x = torch.randn(2, 5, kind.into)
    bare = base(x)
    for rows in (["x", "x"], ["y", "y"], ["x", "y"], ["y/z", "x"]):
        with model.route(rows, strategy=strategy):
            added = base(x) - bare
        for i, path in enumerate(rows):
            value = one.modules[kind.name]
            wanted = x[i].double() @ (value.B.double() @ value.A.double()).mT * len(path.split("/"))
            torch.testing.assert_close(added[i].double(), wanted, rtol=1e-4, atol=1e-4)


@every_strategy
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUTED)
def test_every_row_is_what_it_is_with_the_dense_weight_of_its_own_path(
    name: str, dtype: torch.dtype, factors: torch.dtype, strategy: Strategy
) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    base = Base(kind.make()).to(dtype)
    tree, x = tree_for(kind, factors), _inputs(kind, dtype)
    leaf = x.clone().requires_grad_(x.is_floating_point())
    bare = base(x).detach()
    g = torch.linspace(0.5, 1, bare.numel(), dtype=torch.float64).reshape(bare.shape).to(dtype)
    model = lt.attach(tree, base)
    with model.route(ROWS, strategy=strategy):
        out = base(leaf)
        out.backward(g)
        with torch.no_grad():
            plain = base(x)  # may be added in place
    for row, blend in enumerate(ROWS):
        delta, sizes, rank = dense64(tree, blend, kind.name)
        wide, magnitude = widened(kind, base, delta), widened(kind, base, sizes, magnitude=True)
        here = x[row : row + 1].double() if x.is_floating_point() else x[row : row + 1]
        mine = here.clone().requires_grad_(x.is_floating_point())
        exact = wide(mine)
        exact.backward(g[row : row + 1].double())
        size = magnitude(here.abs())
        u, side = EPS[dtype], EPS[torch.promote_types(dtype, factors)]
        reach = kind.into + kind.out * math.prod(kind.layout.kernel) + rank
        bound = 3 * u + 4 * side + reach * min(2.0**-24, u)
        for got in (out, plain):
            assert (
                (got[row : row + 1].detach().double() - exact.detach()).abs()
                <= bound * size.detach()
            ).all()
        if mine.grad is not None and leaf.grad is not None:
            upward = here.abs().clone().requires_grad_()
            magnitude(upward).backward(g[row : row + 1].double().abs())
            assert upward.grad is not None
            assert (
                (leaf.grad[row : row + 1].double() - mine.grad).abs() <= bound * upward.grad
            ).all()
    for got in (out.detach(), plain):
        assert torch.equal(_bits(got[1]), _bits(bare[1])), "the bare row"
    assert torch.equal(base(x), bare)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@every_strategy
@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_a_lora_bias_is_added_to_its_own_rows(name: str, strategy: Strategy) -> None:
    torch.manual_seed(0)
    if name == "grouped":
        conv, layout = nn.Conv2d(4, 6, 3, groups=2, padding=1), lt.Layout("conv", (3, 3))
        kind = Kind(
            lambda: conv,
            "m",
            (2,),
            3,
            36,
            layout,
            "m.weight",
            lambda d: d,
            lambda _: torch.randn(1, 4, 5, 5),
        )
    else:
        kind = KINDS[name]
    base = Base(kind.make()).double()
    tree, x = tree_for(kind, torch.float64, bias=True), _inputs(kind, torch.float64)
    model = lt.attach(tree, base)
    alone = []
    for row, blend in enumerate(ROWS):
        with model.using(blend, mode="unmerged"):
            alone.append(base(x[row : row + 1]).detach())
    with model.route(ROWS, strategy=strategy):
        torch.testing.assert_close(base(x).detach(), torch.cat(alone), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(base(x), torch.cat(alone), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- random trees and batches
class Net(nn.Module):
    """Sites of several kinds, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        out: Tensor = self.head(x)
        return out


SHAPES = {"embed": (16, 13), "up": (24, 16), "down": (16, 24), "head": (8, 16)}


def random_tree(rng: random.Random) -> lt.AdapterTree:
    """Up to a dozen nodes, each with some of the sites."""
    torch.manual_seed(rng.randrange(2**31))
    tree = lt.AdapterTree()
    for i in range(rng.randint(1, 12)):
        parent = rng.choice(["", *tree.paths()])
        path = f"{parent}/n{i}" if parent else f"n{i}"
        if rng.random() < 0.1:
            tree.add(path, group=True)
            continue
        modules = {}
        for name in rng.sample(sorted(SHAPES), rng.randint(1, 4)):
            (out, into), r = SHAPES[name], rng.choice([1, 2, 4, 5])
            layout = lt.Layout("embedding") if name == "embed" else LINEAR
            A, B = torch.randn(r, into).double() / into**0.5, torch.randn(out, r).double() / r**0.5
            modules[name] = lt.LowRank(A, B, rng.choice([1.0, 0.3, -0.7]), None, layout)
        tree.add(path, adapter=lt.Adapter(modules), weight=rng.choice([1.0, 0.5]))
    return tree


def random_rows(rng: random.Random, tree: lt.AdapterTree) -> list[lt.Blend]:
    paths: list[lt.Blend] = [*tree.paths(), ""]
    blends: list[lt.Blend] = [
        {p: rng.choice([0.5, 1.0, -0.25]) for p in rng.choices(tree.paths(), k=2)}
    ]
    distinct = rng.sample(paths + blends, rng.randint(1, len(paths)))
    rows = [rng.choice(distinct) for _ in range(rng.randint(1, 9))]
    if rng.random() < 0.3:  # as many rows of each
        rows = distinct * rng.randint(1, 3)
        rng.shuffle(rows)
    return rows


def by_hand(
    base: Net,
    tree: lt.AdapterTree,
    rows: Sequence[lt.Blend],
    ids: Tensor,
    leaves: dict[Any, Tensor],
) -> Tensor:
    """Row by row with dense weights made of ``leaves``: (node, module, A or B) → float64 leaf."""
    outs = []
    for row, blend in enumerate(rows):
        weights = {name: p.detach() for name, p in base.named_parameters()}
        for entry, share in ({blend: 1.0} if isinstance(blend, str) else dict(blend)).items():
            for depth in range(entry.count("/") + 1 if entry else 0):
                node = "/".join(entry.split("/")[: depth + 1])
                adapter = tree.adapter(node)
                for name, v in adapter.modules.items() if adapter is not None else ():
                    delta = (
                        share
                        * tree[node].weight
                        * v.scale
                        * (leaves[node, name, "B"] @ leaves[node, name, "A"])
                    )
                    weights[f"{name}.weight"] = weights[f"{name}.weight"] + (
                        delta.mT if name == "embed" else delta
                    )
        outs.append(torch.func.functional_call(base, weights, (ids[row : row + 1],)))
    return torch.cat(outs)


@settings(max_examples=120)
@given(st.integers(0, 2**32))
def test_any_batch_over_any_tree_is_its_rows_alone_with_the_gradients_of_the_dense_sum(
    seed: int,
) -> None:
    rng = random.Random(seed)
    tree = random_tree(rng)
    rows = random_rows(rng, tree)
    torch.manual_seed(seed % 2**31)
    base = Net().double()
    ids = torch.randint(0, 13, (len(rows), len(rows) + 1))
    model = lt.attach(tree, base)
    own = [p for p in tree.paths() if tree.adapter(p) is not None]
    training = rng.sample(own, rng.randint(0, len(own)))
    model.trainable(*training)
    leaves: dict[Any, Tensor] = {}
    for node in own:
        for name, v in tree.adapter(node).modules.items():  # type: ignore[union-attr]
            leaves[node, name, "A"] = v.A.detach().clone().requires_grad_()
            leaves[node, name, "B"] = v.B.detach().clone().requires_grad_()
    wanted = by_hand(base, tree, rows, ids, leaves)
    g = torch.randn_like(wanted)
    if wanted.requires_grad:
        wanted.backward(g)
    strategy = rng.choice(STRATEGIES)
    with model.route(rows, strategy=strategy):
        got = base(ids)
        torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(base(ids), wanted.detach(), rtol=1e-10, atol=1e-10)
        if got.requires_grad:
            got.backward(g)
    for node in training:
        for name, v in tree.adapter(node).modules.items():  # type: ignore[union-attr]
            for part, factor in (("A", v.A), ("B", v.B)):
                exact = leaves[node, name, part].grad
                if exact is None:  # no row of the batch lies below the node
                    assert factor.grad is None
                else:
                    assert factor.grad is not None
                    torch.testing.assert_close(factor.grad, exact, rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in base.parameters())


def test_every_way_of_every_form_was_tried_in_both_directions() -> None:
    """The oracle above draws what it likes; this is the slow loop against each way by name, also
    those not picked.
    """
    torch.manual_seed(0)
    kind = KINDS["linear"]
    base = Base(nn.Linear(16, 12)).double()
    site = find_site(base, "m")
    tree = lt.AdapterTree()
    for path, r in (("a", 4), ("a/b", 2), ("a/c", 3)):
        value = lt.LowRank(torch.randn(r, 16).double(), torch.randn(12, r).double(), 0.3)
        tree.add(path, adapter=lt.Adapter({"m": value}))
    tried = set()
    for rows in (
        ["a/b", "a/c", "a", "a/b", "a/c", "a"],
        ["a/b", "a/b", "a/c", "a/c"],
        ["a/b", "a/c", "", "a"],
        ["a/b", "a/c", "a/b", "a", "a/b", "a/c"],
    ):
        batch = Batch.of(tree, rows)
        values = [tree.adapter(node).modules["m"] for node in batch.nodes]  # type: ignore[union-attr]
        x = torch.randn(len(rows), 4, 16).double()
        for dtype in (torch.float64, torch.float32):
            owed = Owed(
                site, [v.to(dtype=dtype) for v in values], batch, dtype, torch.device("cpu")
            )
            here, out = x.to(dtype), base(x).detach().to(dtype)
            wanted = out.double().clone()
            for row, blend in enumerate(rows):
                for node in tree.lineage(blend):
                    v = tree.adapter(node).modules["m"]  # type: ignore[union-attr]
                    wanted[row] += v.scale * (x[row] @ v.A.mT @ v.B.mT)
            for way in EVERY_WAY:
                if not way.suits(owed, 4):
                    continue
                tried.add(way)
                for spare in (False, True):
                    got = way(owed).add(out.clone(), here, spare=spare)
                    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
                recorded = out.clone().requires_grad_()
                got = way(owed).add(recorded, here, spare=True)
                torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-5, atol=1e-4)
    # Triton's is tried in tests/test_segmented.py.
    assert tried == EVERY_WAY - {SegmentedForm}
    assert kind.name == site.name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_path_that_overflows_spoils_no_row_but_its_own(strategy: Strategy) -> None:
    base = Base(nn.Linear(8, 4)).half()
    tree = lt.AdapterTree()
    tree.add(
        "huge",
        adapter=lt.Adapter(
            {"m": lt.LowRank(torch.full((2, 8), 6e4).half(), torch.ones(4, 2).half())}
        ),
    )
    tree.add(
        "fine",
        adapter=lt.Adapter({"m": lt.LowRank(torch.ones(2, 8).half(), torch.ones(4, 2).half())}),
    )
    x = torch.ones(3, 2, 8).half()
    model = lt.attach(tree, base)
    bare = base(x)
    with model.route(["huge", "fine", ""], strategy=strategy), torch.no_grad():
        out = base(x)
    assert not out[0].isfinite().any()
    torch.testing.assert_close(out[1], bare[1] + 16)
    assert torch.equal(out[2], bare[2])


# ---------------------------------------------------------------------- whose row is whose
class TimeFirst(nn.Module):
    """(tokens, rows, features) inside, as XLNet and fairseq's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x.flatten(0, 1)).view(x.shape)  # type: ignore[no-any-return]


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, features = x.shape
        return self.m(x.view(rows * 2, tokens // 2, features)).view(x.shape)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A module for each expert of each layer, and tokens sent to them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Module()
        layer.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8).clone()
        experts: Any = self.layers[0].experts
        flat[: len(x)] = experts[0](flat[: len(x)])  # as many tokens as there are rows, by luck
        return flat.view(x.shape)


def linear_tree(name: str = "m") -> lt.AdapterTree:
    torch.manual_seed(0)
    tree = lt.AdapterTree()
    for path in ("a", "b", "c", "d"):
        tree.add(path, adapter=lt.Adapter({name: lt.LowRank(torch.randn(2, 8), torch.randn(8, 2))}))
    return tree


@pytest.mark.parametrize(
    ("make", "name", "shape", "message"),
    [
        (
            TimeFirst,
            "m",
            (4, 6, 8),
            r"m: its input is \(6, 4, 8\), and the first axis should be 4 rows",
        ),
        (
            TimeFirst,
            "m",
            (4, 4, 8),
            r"m: its input is \(4, 4, 8\): can't tell whether its first axis is the 4 rows",
        ),
        (
            TimeFirst,
            "m",
            (4, 2, 8),
            r"m: its input is \(2, 4, 8\), and the first axis should be 4 rows",
        ),
        (
            TimeFirst,
            "m",
            (4, 8, 8),
            r"m: its input is \(8, 4, 8\), and the first axis should be 4 rows",
        ),
        (Packed, "m", (4, 6, 8), r"m: its input is \(24, 8\), and the first axis should be 4 rows"),
        (
            Windowed,
            "m",
            (4, 6, 8),
            r"m: its input is \(8, 3, 8\), and the first axis should be 4 rows",
        ),
        (
            Experts,
            "layers.0.experts.0",
            (4, 6, 8),
            r"experts\.0: its input is \(4, 8\): can't tell whether",
        ),
    ],
)
def test_what_does_not_have_the_rows_first_is_refused_by_name(
    make: Callable[[], nn.Module], name: str, shape: tuple[int, ...], message: str
) -> None:
    base = make()
    x = torch.randn(shape)
    bare = base(x)
    model = lt.attach(linear_tree(name), base)
    with pytest.raises(BaseMismatch, match=message), model.route(["a", "b", "c", "d"]):
        base(x)
    assert (model.active, model.state) == ("", lt.State.BARE)
    assert torch.equal(base(x), bare)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize(
    ("tile", "rows", "tokens"), [(2, 2, 4), (1, 4, 2), (2, 4, 8), (1, 2, 4), (2, 2, 2)]
)
def test_a_time_axis_that_fits_is_not_taken_for_the_rows(tile: int, rows: int, tokens: int) -> None:
    """As many tokens as stacked rows, twice as many rows as tokens, twice as many tokens as rows,
    …
    """
    base = TimeFirst()
    model = lt.attach(linear_tree(), base)
    paths = ["a", "b", "c", "d"][:rows]
    with pytest.raises(BaseMismatch, match="m: its input is"), model.route(paths, tile=tile):
        base(torch.randn(rows * tile, tokens, 8))


class Noisy(nn.Module):
    """Draws random numbers and keeps running statistics, which a look at shapes must not
    disturb.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.m = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.drop(self.norm(x)))  # type: ignore[no-any-return]


def test_as_many_tokens_as_rows_are_told_apart_by_shapes_alone_and_nothing_is_disturbed() -> None:
    base, x = Noisy(), torch.randn(4, 4, 8)
    tree = linear_tree()
    twin = copy.deepcopy(base)
    paths: list[lt.Blend] = ["a", "b", "", "c"]
    torch.manual_seed(1)
    with lt.attach(tree, twin).route(paths, batch_first=True):
        wanted = twin(x)
    torch.manual_seed(1)
    with lt.attach(tree, base).route(paths):
        assert torch.equal(base(x), wanted)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


class Looking(nn.Module):
    """Looks at numbers on its way, so it can't be run on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x) if x.abs().max() < 1e6 else x  # type: ignore[no-any-return]


def test_as_many_tokens_as_rows_are_taken_once_the_site_is_known_or_declared() -> None:
    base = Looking()
    model = lt.attach(linear_tree(), base)
    square, other = torch.randn(4, 4, 8), torch.randn(4, 3, 8)
    with model.route(["a", "b", "c", "d"], batch_first=True):
        wanted = base(square)
    with pytest.raises(BaseMismatch, match="batch_first=True"), model.route(["a", "b", "c", "d"]):
        base(square)
    with model.route(["a", "b", "c", "d"]):
        base(other)
        assert torch.equal(base(square), wanted)
    with model.route(["a", "b", "c", "d"]):
        assert torch.equal(base(square), wanted)
    base.m = nn.Linear(8, 8)  # another module: nothing is known of it
    with (
        pytest.raises(BaseMismatch, match="is the 4 rows or the tokens"),
        model.route(["a", "b", "c", "d"]),
    ):
        base(square)


def test_where_all_rows_owe_the_same_the_first_axis_may_be_anything() -> None:
    base = TimeFirst()
    tree = linear_tree()
    x = torch.randn(3, 5, 8)
    model = lt.attach(tree, base)
    with model.using("a", mode="unmerged"):
        wanted = base(x)
    with model.route(["a", "a", "a"]):
        assert torch.equal(base(x), wanted)


def test_a_wrong_number_of_rows_is_refused_before_anything_runs() -> None:
    base = Base(nn.Linear(8, 8))
    model = lt.attach(linear_tree(), base)
    message = r"the base was given \(5, 3, 8\), and the route is for 4 rows"
    with pytest.raises(BaseMismatch, match=message), model.route(["a", "b", "c", "d"]):
        base(torch.randn(5, 3, 8))
    message = r"8 rows \(route of 4, repeat=2, tile=1\)"
    with pytest.raises(BaseMismatch, match=message), model.route(["a", "b", "c", "d"], repeat=2):
        base(torch.randn(4, 3, 8))


def test_a_convolution_without_a_batch_is_refused() -> None:
    base = Base(nn.Conv1d(4, 4, 3, padding=1))
    tree = lt.AdapterTree()
    for path in ("a", "b"):
        value = lt.LowRank(torch.randn(2, 12), torch.randn(4, 2), layout=lt.Layout("conv", (3,)))
        tree.add(path, adapter=lt.Adapter({"m": value}))
    model = lt.attach(tree, base)
    with (
        pytest.raises(BaseMismatch, match=r"m: its input is \(4, 9\)"),
        model.route(["a", "b", "a", "b"]),
    ):
        base(torch.randn(4, 9))


@every_strategy
def test_repeated_and_stacked_rows_go_by_the_path_that_was_declared(strategy: Strategy) -> None:
    base = Base(nn.Linear(8, 8)).double()
    tree = linear_tree()
    x = torch.randn(12, 3, 8).double()
    model = lt.attach(tree, base)

    def alone(paths: list[str]) -> Tensor:
        outs = []
        for row, path in enumerate(paths):
            with model.using(path, mode="unmerged"):
                outs.append(base(x[row : row + 1]))
        return torch.cat(outs)

    a, b = "a", ""
    with model.route([a, b], strategy=strategy, repeat=3, tile=2):
        got = base(x)
    torch.testing.assert_close(got, alone([a, a, a, b, b, b] * 2))
    with model.route(
        [a, b, "c"], strategy=strategy, tile=4
    ):  # chosen and rejected, with and without guidance
        got = base(x)
    torch.testing.assert_close(got, alone([a, b, "c"] * 4))


@pytest.mark.parametrize(
    ("paths", "options", "error", "message"),
    [
        ("a", {}, SpecError, "one path or blend for every row, got 'a'"),
        ([], {}, SpecError, "at least one row"),
        (["a", "x"], {}, PathError, "row 1: no node 'x'"),
        (["a", {"b": math.nan}], {}, SpecError, "row 1: blend: weight of 'b'"),
        (["a"], {"strategy": "nods"}, SpecError, "no strategy 'nods'; did you mean 'nodes'"),
        (["a"], {"repeat": 0}, SpecError, "repeat must be a whole number from 1, got 0"),
        (["a"], {"tile": 1.5}, SpecError, "tile must be a whole number from 1, got 1.5"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    paths: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = Base(nn.Linear(8, 8))
    model = lt.attach(linear_tree(), base)
    model.activate("b")
    weights = base.m.weight.clone()
    with pytest.raises(error, match=message), model.route(paths, **options):
        pass
    assert model.active == "b"
    assert torch.equal(base.m.weight, weights)


# ---------------------------------------------------------------------- coming and going
def test_what_was_active_before_comes_back_nested_and_after_exceptions() -> None:
    base = Base(nn.Linear(8, 8))
    model = lt.attach(linear_tree(), base)
    x = torch.randn(2, 3, 8)
    model.activate("a")
    merged = base(x)
    with model.route(["b", "c"]):
        first = base(x)
        assert (model.active, model.state) == (("b", "c"), lt.State.ROUTED)
        with model.route(["c", ""]):
            assert not torch.equal(base(x), first)
        assert torch.equal(base(x), first)
        with model.using("d"):
            assert model.state is lt.State.MERGED
        with pytest.raises(ZeroDivisionError), model.using("d", mode="unmerged"):
            _ = 1 / 0
        assert torch.equal(base(x), first)
        assert model.active == ("b", "c")
    assert (model.active, model.state) == ("a", lt.State.MERGED)
    assert torch.equal(base(x), merged)
    model.deactivate()
    with pytest.raises(ZeroDivisionError), model.route(["b", "c"]):
        _ = 1 / 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_only_the_nodes_on_the_lineages_are_loaded_and_none_of_them_can_be_changed() -> None:
    base = Base(nn.Linear(8, 8))
    tree = linear_tree()
    loaded: list[str] = []

    class Source:
        where = None

        def __init__(self, path: str) -> None:
            self.path = path

        key = None

        def load(self, *how: object) -> lt.Adapter:
            loaded.append(self.path)
            return lt.Adapter({"m": lt.LowRank(torch.ones(1, 8), torch.ones(8, 1))})

        def outline(self) -> lt.Adapter:
            return self.load()

    nodes = [lt.Node(path, source=Source(path)) for path in ("a", "a/b", "a/b/c", "d", "d/e")]  # type: ignore[arg-type]
    tree = lt.AdapterTree.from_nodes(nodes)
    model = lt.attach(tree, base)
    with model.route(["a/b", "", "a"]):
        base(torch.randn(3, 2, 8))
        with pytest.raises(lt.errors.TreeError, match="a/b: active on an attached model"):  # type: ignore[attr-defined]
            tree.update("a/b", weight=2.0)
        tree.update("d", weight=2.0)
    assert loaded == ["a", "a/b"]


def test_a_batch_of_bare_rows_is_the_bare_base() -> None:
    base = Base(nn.Linear(8, 8))
    model = lt.attach(linear_tree(), base)
    x = torch.randn(2, 3, 8)
    with model.route(["", ""]):
        assert torch.equal(base(x), Base.forward(base, x))
    model.activate("a")
    with model.route(["", ""]):
        bare = base(x)
    model.deactivate()
    assert torch.equal(base(x), bare)


@every_strategy
def test_under_autocast_every_row_is_what_it_is_alone(strategy: Strategy) -> None:
    torch.manual_seed(0)
    base = Base(nn.Linear(16, 16))
    tree = lt.AdapterTree()
    for path in ("a", "b"):
        tree.add(
            path,
            adapter=lt.Adapter({"m": lt.LowRank(torch.randn(4, 16) / 4, torch.randn(16, 4) / 2)}),
        )
    x = torch.randn(3, 5, 16)
    exact = []
    for row, path in enumerate(("a", "", "b")):
        weight = base.m.weight.detach().double()
        for node in [path] if path else []:
            v = tree.adapter(node).modules["m"]  # type: ignore[union-attr]
            weight = weight + v.B.double() @ v.A.double()
        exact.append(x[row].double() @ weight.mT + base.m.bias.detach().double())
    model = lt.attach(tree, base)
    model.trainable("a")
    with torch.autocast("cpu", torch.bfloat16), model.route(["a", "", "b"], strategy=strategy):
        out = base(x)
        with torch.no_grad():
            plain = base(x)
    for got in (out, plain):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.detach().double(), torch.stack(exact), rtol=0.05, atol=0.1)
    out.float().sum().backward()
    assert tree.adapter("a").modules["m"].B.grad is not None  # type: ignore[union-attr]


def test_made_under_inference_mode_it_can_still_be_trained_through() -> None:
    base = Base(nn.Linear(8, 8))
    model = lt.attach(linear_tree(), base)
    x = torch.randn(4, 3, 8, requires_grad=True)
    for strategy in STRATEGIES:
        with model.route(["a", "b", "", "c"], strategy=strategy):
            with torch.inference_mode():
                base(x.detach())
            base(x).sum().backward()


def test_a_base_that_was_copied_while_routed_is_no_part_of_it() -> None:
    base = Base(nn.Linear(8, 8))
    model = lt.attach(linear_tree(), base)
    with model.route(["a", "b"]):
        pass
    twin = copy.deepcopy(base)
    x = torch.randn(2, 3, 8)
    assert torch.equal(twin(x), base(x))


def test_a_base_that_compiles_itself_is_refused() -> None:
    base = Base(nn.Linear(8, 8))
    base.compile(backend="eager")
    model = lt.attach(linear_tree(), base)
    with (
        pytest.raises(StateError, match="a compiled forward ignores hooks that come later"),
        model.route(["a", "b"]),
    ):
        pass
    assert model.state is lt.State.BARE


# ---------------------------------------------------------------------- the form that is taken
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EVEN, UNEVEN = ["r/m0", "r/m1"], ["r/m0", "r/m0", "r/m1"]
LOPSIDED = [*["r/m0"] * 4, "r/m1"]


def owed_of(
    rows: Sequence[str],
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device = CPU,
    lend: Lender = ordinary,
) -> Owed:
    """What rows owe at a module in a tree r → m0, m1."""
    tree = lt.AdapterTree()
    for path in ("r", "r/m0", "r/m1"):
        tree.add(path, group=True)
    batch = Batch.of(tree, rows)
    site = find_site(nn.Sequential(module), "0")
    out, into = site.matrix_shape
    values = []
    for _ in batch.nodes:
        A, B = torch.randn(2, into).to(dtype), torch.randn(out, 2).to(dtype)
        values.append(lt.LowRank(A, B, 0.5, layout=site.layout))
    return Owed(site, values, batch, dtype, device, lend=lend)


@pytest.mark.parametrize(
    ("rows", "tokens", "device", "trains", "wanted"),
    [
        (EVEN, 1, CPU, False, AllPathsForm),
        (EVEN, 1000, CPU, False, AllPathsForm),
        (UNEVEN, 1, CPU, False, AllPathsForm),
        (UNEVEN, 1000, CPU, False, AllPathsForm),
        (LOPSIDED[1:], 1, CPU, False, AllPathsForm),
        (LOPSIDED, 1, CPU, False, NodesForm),
        (LOPSIDED, forms.FEW, CPU, False, EachPathForm),
        (EVEN, 1, CPU, True, AllPathsForm),
        (LOPSIDED, 1000, CPU, True, EachPathForm),
        (EVEN, 1, CUDA, False, AllPathsForm),
    ],
)
def test_the_form_that_is_taken_follows_from_what_is_owed(
    rows: list[str],
    tokens: int,
    device: torch.device,
    trains: bool,
    wanted: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forms, "routes", lambda device: False)  # Triton does not run here
    owed = owed_of(rows, nn.Linear(8, 8), torch.float32, device)
    assert forms.form_for(owed, tokens, trains=trains) is wanted


def test_narrow_products_take_few_calls_where_they_are_not_widened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owed = owed_of(LOPSIDED, nn.Linear(8, 8), torch.bfloat16)
    for slow, wanted in ((set(), EachPathForm), ({torch.bfloat16}, NodesForm)):
        monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", slow)
        assert forms.form_for(owed, 1, trains=False) is wanted


def test_what_is_no_product_is_never_stacked_by_itself() -> None:
    owed = owed_of(EVEN, nn.Embedding(8, 4), torch.float32)
    assert forms.form_for(owed, 1000, trains=False) is NodesForm


def test_a_prompt_and_the_tokens_after_it_share_one_layout_of_their_paths() -> None:
    lent: list[int] = []

    def lend(nbytes: int, device: torch.device) -> Tensor:
        lent.append(nbytes)
        return ordinary(nbytes, device)

    scattered = ["r/m0", "r/m1", "r/m0", "r/m1"]
    owed = owed_of(scattered, nn.Linear(8, 8), torch.float32, lend=lend)
    ways = {forms.form_for(owed, tokens, trains=False) for tokens in (AT_ONCE, 1)}
    assert ways == {EachPathForm, AllPathsForm}
    for way in ways:
        way(owed)
    # Two paths of two nodes of rank 2, in and out; all of it in one piece.
    assert lent == [2 * (4 * 8 + 4 * 8) * 4]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch has the memory")
def test_a_new_batch_is_laid_out_in_the_memory_of_one_that_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    plain = shelf._grow_range

    def grown(address: int, held: int, size: int) -> int:
        asked.append(size - held)
        return plain(address, held, size)

    monkeypatch.setattr(shelf, "_grow_range", grown)
    torch.manual_seed(0)
    linear = nn.Linear(512, 512).requires_grad_(False)
    tree = lt.AdapterTree()
    for path in "abcd":
        value = lt.LowRank(torch.randn(32, 512), torch.randn(512, 32))
        tree.add(path, adapter=lt.Adapter({"0": value}))
    model = lt.attach(tree, base := nn.Sequential(linear))
    x = torch.randn(4, 1, 512)
    orders = ("abcd", "bcda", "cdab", "dabc", "acbd")
    for order in orders:
        with model.route(list(order), batch_first=True):
            got = base(x)
        for row, path in enumerate(order):
            value = tree.adapter(path).modules["0"]  # type: ignore[union-attr]
            wanted = linear(x[row]) + x[row] @ value.A.mT @ value.B.mT
            torch.testing.assert_close(got[row], wanted, rtol=1e-4, atol=1e-2)
    # Two routes are kept, so the third is the first that finds memory.
    assert len(asked) == 2 < len(orders)


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_the_rows_of_every_node_side_by_side(seed: int) -> None:
    rng = random.Random(seed)
    tree = lt.AdapterTree()
    for path in PATHS:
        tree.add(path, group=True)
    rows = [rng.choice([*PATHS, "", BLEND]) for _ in range(rng.choice([2, 9, 40]))]
    batch = Batch.of(tree, ["a", *rows])
    runs = batch.runs
    assert len(set(runs.order)) == len(runs.order)
    found = torch.zeros(len(batch), len(batch.nodes), dtype=torch.float64)
    for start, end, node, coefficient in runs.parts:
        for row in runs.order[start:end]:
            assert found[row, node] == 0, "a row owes each node once"
            found[row, node] = coefficient
    assert torch.equal(found, batch.coefficients(range(len(batch))))
    # A row's sum is in the order of the nodes.
    nodes = [node for _, _, node, _ in runs.parts]
    assert nodes == sorted(nodes)


def test_rows_are_put_in_another_order_only_if_that_saves_half_of_the_products() -> None:
    tree = lt.AdapterTree()
    for path in PATHS:
        tree.add(path, group=True)
    assert Batch.of(tree, ["a/b", "e", "a/d"]).runs.order == (0, 1, 2)
    mixed = Batch.of(tree, ["a/b", "", "e"] * 4).runs
    assert mixed.order == (0, 3, 6, 9, 2, 5, 8, 11)
    assert [part[:2] for part in mixed.parts] == [(0, 4), (0, 4), (4, 8)]
