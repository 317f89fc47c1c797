"""Many nodes trained at once: each moves as it would alone, and nothing else moves at all.

What is compared with is dense float64 algebra: the weight of every row's path, W + Σ c·s·B·A, built
by hand, with one optimiser of torch's own for every node, stepped only where the node had rows.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch, BudgetError, PathError, SpecError, StateError
from lora_tree.runs.checkpoint_factors import load_factors, save_factors
from lora_tree.training.factors import Factors
from lora_tree.training.node_factors import path_of

PATHS = ("a", "a/b", "a/b/c", "a/d", "e")
INTO, HIDDEN, VOCABULARY = 8, 12, 10
SITES = {"up": (HIDDEN, INTO), "down": (VOCABULARY, HIDDEN)}


class Net(nn.Module):
    """(rows, tokens, 8) → logits (rows, tokens, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(INTO, HIDDEN)
        self.down = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def tree_of(dtype: torch.dtype = torch.float64) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    for i, path in enumerate(PATHS):
        modules = {
            name: lt.LowRank(
                torch.randn(i + 1, into).to(dtype) * 0.3,
                torch.randn(out, i + 1).to(dtype) * 0.3,
                0.5 + i,
            )
            for name, (out, into) in SITES.items()
            if (name, path) != ("up", "e")
        }
        tree.add(path, adapter=lt.Adapter(modules), weight=1.0 if i % 2 else 0.7)
    return tree


class ByHand:
    """Every node's factors as float64 leaves, and dense weights for every row."""

    def __init__(self, net: Net, tree: lt.AdapterTree) -> None:
        self.tree = tree
        self.base = {name: p.detach().double().clone() for name, p in net.named_parameters()}
        self.factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for path in tree.paths():
            adapter = tree.adapter(path)
            assert adapter is not None
            self.factors[path] = {
                n: (v.A.detach().double().clone(), v.B.detach().double().clone())
                for n, v in adapter.modules.items()
            }
        self.scales = {
            p: {n: v.scale for n, v in tree.adapter(p).modules.items()} for p in tree.paths()
        }  # type: ignore[union-attr]

    def parameters(self, path: str) -> list[Tensor]:
        return [t for pair in self.factors[path].values() for t in pair]

    def weight(self, name: str, path: str) -> Tensor:
        W = self.base[f"{name}.weight"]
        for node in self.tree.lineage(path):
            if name in self.factors[node]:
                A, B = self.factors[node][name]
                W = W + self.tree[node].weight * self.scales[node][name] * B @ A
        return W

    def logits(self, x: Tensor, path: str) -> Tensor:
        h = torch.tanh(x.double() @ self.weight("up", path).mT + self.base["up.bias"])
        return h @ self.weight("down", path).mT + self.base["down.bias"]

    def loss(self, batches: Sequence[tuple[Tensor, Tensor, Sequence[str]]]) -> Tensor:
        """Σ over paths of the mean over the path's own tokens, over all batches."""
        each: dict[str, list[Tensor]] = {}
        for x, labels, paths in batches:
            for row, path in enumerate(paths):
                logp = self.logits(x[row], path).log_softmax(-1)
                for token in range(1, labels.shape[1]):
                    if labels[row, token] != -100:
                        each.setdefault(path, []).append(-logp[token - 1, labels[row, token]])
        return torch.stack([torch.stack(mine).mean() for mine in each.values()]).sum()


def batches_of(
    rng: random.Random, paths: Sequence[str], count: int
) -> list[tuple[Tensor, Tensor, list[str]]]:
    made = []
    for _ in range(count):
        rows = [rng.choice(paths) for _ in range(rng.randint(1, 6))]
        labels = torch.randint(0, VOCABULARY, (len(rows), 7))
        labels[torch.rand(labels.shape) < 0.2] = -100
        labels[:, 1] = 3  # every row learns something
        made.append((torch.randn(len(rows), 7, INTO, dtype=torch.float64), labels, rows))
    return made


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_a_joint_step_is_every_nodes_own_step(optimiser: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    net = Net().double()
    tree = tree_of()
    hand = ByHand(net, tree)
    training = rng.sample(PATHS, rng.randint(1, len(PATHS)))
    clip = {path: rng.choice([None, 0.01, 0.5]) for path in training}
    before = {n: p.detach().clone() for n, p in net.named_parameters()}

    model = lt.attach(tree, net)
    groups = model.trainable(*training)
    for group in groups:
        group["clip_norm"] = clip[group["name"]]
    ours = OPTIMISERS[optimiser](groups)
    model.follow(ours)
    theirs = {path: OPTIMISERS[optimiser](hand.parameters(path)) for path in training}
    for path in training:
        for t in hand.parameters(path):
            t.requires_grad_()
    frozen = {
        path: [t.clone() for v in tree.adapter(path).modules.values() for t in v.tensors]  # type: ignore[union-attr]
        for path in PATHS
        if path not in training
    }

    for _ in range(4):
        batches = batches_of(rng, ("", *PATHS), rng.randint(1, 3))
        counts = lt.token_counts(tree, [(labels, paths) for _, labels, paths in batches])
        for x, labels, paths in batches:
            strategy = rng.choice(["auto", "nodes", "paths", "grouped", "matrix"])
            with model.route(paths, strategy=strategy, batch_first=True):  # type: ignore[arg-type]
                loss = lt.path_loss(model(x), labels, paths, counts=counts).total
                if loss.requires_grad:
                    loss.backward()
        ours.step()
        ours.zero_grad(set_to_none=rng.random() < 0.5)

        wanted = hand.loss(batches)
        if wanted.requires_grad:
            wanted.backward()
        seen = {node for _, _, paths in batches for path in paths for node in tree.lineage(path)}
        for path, own in theirs.items():
            norm = math.sqrt(
                sum(
                    float(t.grad.square().sum())
                    for t in hand.parameters(path)
                    if t.grad is not None
                )
            )
            if (most := clip[path]) is not None and norm > most:
                for t in hand.parameters(path):
                    if t.grad is not None:
                        t.grad *= most / (norm + 1e-6)
            if path in seen:
                own.step()
            own.zero_grad()

    for path in training:
        adapter = tree.adapter(path)
        assert adapter is not None
        got = [t for v in adapter.modules.values() for t in (v.A, v.B)]
        for mine, want in zip(got, hand.parameters(path), strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-9)
    for path, kept in frozen.items():
        now = [t for v in tree.adapter(path).modules.values() for t in v.tensors]  # type: ignore[union-attr]
        assert all(torch.equal(x, y) for x, y in zip(now, kept, strict=True))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_leaves_that_train_together_get_the_gradients_that_they_get_alone() -> None:
    torch.manual_seed(3)
    net, tree = Net().double(), tree_of()
    batch = batches_of(random.Random(3), ("a/b/c", "a/d", "e"), 1)[0]
    hand = ByHand(net, tree)
    model = lt.attach(tree, net)
    groups = {g["name"]: g["params"] for g in model.trainable("a/b/c", "a/d", "e", "a")}
    with model.route(batch[2], batch_first=True):
        lt.path_loss(model(batch[0]), batch[1], batch[2]).total.backward()
    for path in ("a/b/c", "a/d", "e"):
        rows = [row for row, p in enumerate(batch[2]) if p == path]
        for t in hand.parameters(path):
            t.requires_grad_().grad = None
        if rows:
            hand.loss([(batch[0][rows], batch[1][rows], [path] * len(rows))]).backward()
        for mine, want in zip(groups[path], hand.parameters(path), strict=True):
            torch.testing.assert_close(mine.grad, want.grad, rtol=1e-10, atol=1e-12)
    for t in hand.parameters("a"):
        t.requires_grad_()
    hand.loss([batch]).backward()
    for mine, want in zip(groups["a"], hand.parameters("a"), strict=True):
        torch.testing.assert_close(mine.grad, want.grad, rtol=1e-10, atol=1e-12)


def test_an_active_path_counts_its_rows_too_and_evaluation_counts_none() -> None:
    net, tree = Net().double(), tree_of()
    model = lt.attach(tree, net)
    optimizer = torch.optim.AdamW(model.trainable("a", "a/d", "e"), lr=0.1)
    model.follow(optimizer)
    x = torch.randn(2, 3, INTO, dtype=torch.float64)
    with torch.no_grad(), model.route(["e", "e"]):
        model(x)
    with model.using("a/b", mode="unmerged"):
        net(x).sum().backward()  # the base itself is as good
    before = {g["name"]: [p.detach().clone() for p in g["params"]] for g in optimizer.param_groups}
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p) if group["name"] == "a" else torch.zeros_like(p)
    optimizer.step()
    moved = {
        g["name"]: not torch.equal(g["params"][0], before[g["name"]][0])
        for g in optimizer.param_groups
    }
    assert moved == {"a": True, "a/d": False, "e": False}
    assert [bool(optimizer.state[g["params"][0]]) for g in optimizer.param_groups] == [
        True,
        False,
        False,
    ]


def test_two_optimisers_step_their_own_nodes() -> None:
    net, tree = Net().double(), tree_of()
    model = lt.attach(tree, net)
    groups = model.trainable("a", "e")
    optimizers = [torch.optim.SGD([group], lr=0.1, momentum=0.9) for group in groups]
    for optimizer in optimizers:
        model.follow(optimizer)
    for rows in (["a", "e"], ["e", "e"]):
        before = [group["params"][1].detach().clone() for group in groups]
        with model.route(rows, batch_first=True):
            model(torch.randn(2, 3, INTO, dtype=torch.float64)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        moved = [not torch.equal(g["params"][1], b) for g, b in zip(groups, before, strict=True)]
        assert moved == ["a" in rows, True]


def test_an_optimiser_is_followed_once_and_only_over_nodes_that_train() -> None:
    model = lt.attach(tree_of(), Net().double())
    groups = model.trainable("a", "e")
    with pytest.raises(SpecError, match="follow takes an optimiser of torch, got list"):
        model.follow(groups)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    model.follow(optimizer)
    model.follow(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    with pytest.raises(SpecError, match="a group None, and no node of that name trains"):
        model.follow(torch.optim.SGD([p for g in groups for p in g["params"]], lr=1.0))
    with pytest.raises(SpecError, match="'a' has parameters that are not that node's"):
        model.follow(torch.optim.SGD([{"name": "a", "params": groups[1]["params"]}], lr=1.0))
    with pytest.raises(SpecError, match="clip_norm must be a positive number, got 0"):
        model.follow(torch.optim.SGD([{**groups[0], "clip_norm": 0}], lr=1.0))
    optimizer.param_groups[0]["clip_norm"] = -1.0
    with pytest.raises(SpecError, match="clip_norm must be a positive number"):
        model.follow(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1  # as it was


def test_a_forward_that_is_refused_counts_no_rows() -> None:
    net, tree = Net().double(), tree_of()
    model = lt.attach(tree, net)
    groups = model.trainable("a")
    optimizer = torch.optim.SGD(groups, lr=1.0)
    model.follow(optimizer)
    with model.route(["a", "a"]), pytest.raises(BaseMismatch):
        model(torch.randn(3, 3, INTO, dtype=torch.float64))
    before = [p.detach().clone() for p in groups[0]["params"]]
    for p in groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(
        StateError, match="a: its factors have gradients, and no row went through it"
    ):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(groups[0]["params"], before, strict=True))


# --------------------------------------------------- parts of a base, and gradients of other origin
PARTS: dict[str, tuple[str, ...]] = {
    "activated": ("a", "a", "a"),
    "routed": ("a/b", "", "c"),
}


def _encoder(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[str]]:
    """A real architecture, a call of one part of it that gives (3, …), and the modules adapted in
    that part.
    """
    import transformers as T

    torch.manual_seed(0)
    g = torch.Generator().manual_seed(5)
    if kind == "clip":
        sizes = dict(
            hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
        )
        vision = dict(**sizes, image_size=4, patch_size=2)
        config = T.CLIPConfig(
            text_config=dict(**sizes, vocab_size=20), vision_config=vision, projection_dim=6
        )
        pixels = torch.randn(3, 3, 4, 4, generator=g, dtype=torch.float64)
        clip = T.CLIPModel(config).double()
        return (
            clip,
            lambda m: m.get_image_features(pixel_values=pixels).pooler_output,
            ["vision_model"],
        )  # type: ignore[operator]
    config = T.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    ids = torch.randint(0, 20, (3, 5), generator=g)
    llama = T.LlamaForCausalLM(config).double()
    return llama, lambda m: m.model(ids).last_hidden_state, ["model"]  # type: ignore[operator]


@pytest.mark.parametrize("paths", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_a_loss_through_a_part_of_the_base_trains_what_it_goes_through(
    kind: str, paths: tuple[str, ...]
) -> None:
    """Against torch's AdamW for each node, on dense float64 weights, over three steps."""
    from torch.func import functional_call

    base, part, inside = _encoder(kind)
    tree, names = lt.AdapterTree(), ("a", "a/b", "c")
    for i, path in enumerate(names):
        modules = {}
        for name, module in base.named_modules():
            if name.split(".")[0] in inside and name.endswith(
                ("q_proj", "v_proj", "fc1", "down_proj")
            ):
                out, into = module.weight.shape
                A, B = (
                    torch.randn(i + 1, into).double() * 0.3,
                    torch.randn(out, i + 1).double() * 0.3,
                )
                modules[name] = lt.LowRank(A, B, 0.5 + i)
        tree.add(path, adapter=lt.Adapter(modules))
    adapters = {path: tree.adapter(path) for path in names}
    own = {p: {n: [t.clone().requires_grad_() for t in v.tensors] for n, v in a.modules.items()}
           for p, a in adapters.items() if a is not None}  # fmt: skip
    theirs = {}
    for p, of in own.items():
        every = [t for pair in of.values() for t in pair]
        theirs[p] = torch.optim.AdamW(every, lr=0.02, weight_decay=0.3)
    target = torch.randn(part(base).shape, dtype=torch.float64)

    class Part(nn.Module):
        """So that torch can run it on other weights."""

        def __init__(self) -> None:
            super().__init__()
            self.base = base

        def forward(self) -> Tensor:
            return part(self.base)

    def dense(path: str) -> dict[str, Tensor]:
        weights = {f"base.{n}.weight": base.get_submodule(n).weight for n in own["a"]}
        for node in tree.lineage(path):
            for n, (A, B) in own[node].items():
                weights[f"base.{n}.weight"] = (
                    weights[f"base.{n}.weight"] + adapters[node].modules[n].scale * B @ A
                )  # type: ignore[union-attr]
        return weights

    wanted_seen = {node for path in paths for node in tree.lineage(path)}
    model = lt.attach(tree, base)
    ours = torch.optim.AdamW(model.trainable(*names), lr=0.02, weight_decay=0.3)
    model.follow(ours)
    for _ in range(3):
        model.deactivate()
        outs = [functional_call(Part(), dense(path), ())[row] for row, path in enumerate(paths)]
        F.mse_loss(torch.stack(outs), target).backward()
        for node, optimizer in theirs.items():
            if node in wanted_seen:
                optimizer.step()
            optimizer.zero_grad()
        if len(set(paths)) == 1:
            with model.using(paths[0], mode="unmerged"):
                F.mse_loss(part(base), target).backward()
        else:
            with model.route(paths, batch_first=True):
                F.mse_loss(part(base), target).backward()
        ours.step()
        ours.zero_grad(set_to_none=False)
    for node in names:
        adapter = tree.adapter(node)
        assert adapter is not None
        moved = False
        for n, value in adapter.modules.items():
            first = adapters[node].modules[n].tensors  # type: ignore[union-attr]
            for mine, want, start in zip(value.tensors, own[node][n], first, strict=True):
                torch.testing.assert_close(mine.detach(), want.detach(), rtol=1e-9, atol=1e-9)
                moved |= not torch.equal(mine, start)
        assert moved == (node in wanted_seen)


def test_a_gradient_that_came_of_no_row_is_refused_and_nothing_moves() -> None:
    net, tree = Net().double(), tree_of()
    model = lt.attach(tree, net)
    groups = model.trainable("a/d", "e")
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    model.follow(optimizer)
    with model.route(["a/d", "a/d"]):
        penalty = torch.stack([p.square().sum() for p in groups[1]["params"]]).sum()
        (model(torch.randn(2, 3, INTO, dtype=torch.float64)).sum() + penalty).backward()
    before = [p.detach().clone() for group in groups for p in group["params"]]
    with pytest.raises(
        StateError,
        match=r"^e: its factors have gradients, and no row went through it.*\n.*a penalty",
    ):
        optimizer.step()
    assert all(
        torch.equal(p, b)
        for p, b in zip([p for g in groups for p in g["params"]], before, strict=True)
    )
    assert not optimizer.state
    for p in groups[1]["params"]:
        p.grad = None
    optimizer.step()
    assert not torch.equal(groups[0]["params"][0], before[0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("zeroed", ["by the optimiser", "by the model"])
def test_a_step_that_a_scaler_skips_leaves_no_rows_to_the_next(fused: bool, zeroed: str) -> None:
    """Against torch's own optimiser and scaler over each node alone, clipped by itself."""
    torch.manual_seed(0)
    net, tree = Net(), tree_of(torch.float32)
    hand = ByHand(net, tree)
    model = lt.attach(tree, net)
    groups = [{**group, "clip_norm": 0.01} for group in model.trainable("a/d", "e")]

    def made(of: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(of, lr=0.01, weight_decay=0.3, fused=fused)

    ours, scaler = made(groups), torch.amp.GradScaler("cpu", init_scale=1024.0)
    model.follow(ours)
    own = {p: [t.float().requires_grad_() for t in hand.parameters(p)] for p in ("a/d", "e")}
    for path, tensors in own.items():
        pairs = iter(tensors)
        hand.factors[path] = {name: (next(pairs), next(pairs)) for name in hand.factors[path]}
    theirs = {path: made(tensors) for path, tensors in own.items()}
    x = torch.randn(2, 3, INTO)
    for paths, size in ((["a/d", "e"], 1.0), (["e", "e"], math.inf), (["a/d", "a/d"], 1.0)):
        with model.route(paths, batch_first=True):
            scaler.scale(model(x).square().mean() * size).backward()
        scaler.step(ours)
        scaler.update()
        ours.zero_grad(set_to_none=False) if zeroed == "by the optimiser" else model.zero_grad(
            set_to_none=False
        )
        if size == math.inf:
            continue
        outs = torch.stack([hand.logits(x[row], path) for row, path in enumerate(paths)])
        outs.square().mean().backward()
        for path in set(paths):
            torch.nn.utils.clip_grad_norm_(own[path], 0.01)
            theirs[path].step()
            theirs[path].zero_grad()
    for group in groups:
        for mine, want in zip(group["params"], own[group["name"]], strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)


def test_gradients_may_be_zeroed_between_forward_and_backward() -> None:
    net, tree = Net().double(), tree_of()
    model = lt.attach(tree, net)
    groups = model.trainable("e")
    optimizer = torch.optim.SGD(groups, lr=0.1)
    model.follow(optimizer)
    with model.route(["e", "e"]):
        loss = model(torch.randn(2, 3, INTO, dtype=torch.float64)).sum()
        optimizer.zero_grad()
        loss.backward()
    before = [p.detach().clone() for p in groups[0]["params"]]
    wanted = [p.detach() - 0.1 * p.grad for p in groups[0]["params"]]
    optimizer.step()
    for p, want in zip(groups[0]["params"], wanted, strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=1e-12)
    assert not torch.equal(groups[0]["params"][1], before[1])


def test_factors_that_are_somebody_elses_parameters_are_told_how_to_be_frozen() -> None:
    A, B = nn.Parameter(torch.ones(1, INTO)), nn.Parameter(torch.ones(HIDDEN, 1))
    tree = lt.AdapterTree()
    tree.add("x", adapter=(theirs := lt.Adapter({"up": lt.LowRank(A, B)})))
    model = lt.attach(tree, Net())
    with pytest.raises(StateError, match=r"adapter\.with_tensors\(torch\.Tensor\.detach\)"):
        model.activate("x")
    tree.update("x", adapter=theirs.with_tensors(Tensor.detach))
    model.activate("x")


# ---------------------------------------------------------------------- what trains, and how
def test_factors_train_in_the_dtype_asked_for() -> None:
    tree = tree_of(torch.bfloat16)
    model = lt.attach(tree, Net().to(torch.bfloat16))
    assert {p.dtype for p in model.trainable("a")[0]["params"]} == {torch.float32}
    assert {p.dtype for p in model.trainable("e", dtype=None)[0]["params"]} == {torch.bfloat16}
    assert {p.dtype for p in model.trainable("e")[0]["params"]} == {torch.float32}
    x = torch.randn(2, 5, INTO).to(torch.bfloat16)
    with model.route(["e", "a/b"], batch_first=True):
        model(x).float().sum().backward()
    params = model.trainable("e")[0]["params"]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in params)


def test_every_name_that_a_node_may_have_trains_and_is_resumed(tmp_path: Path) -> None:
    """Also those that torch's modules, and ours, use for attributes of their own."""
    attributes = [name for name in dir(Factors()) if not hasattr(object, name)]
    assert {"train", "type", "values", "to", "training", "moved", "_modules"} <= set(attributes)
    tree = lt.AdapterTree(defaults=dict(r=1, target_modules=["up"]))
    for path in [*attributes, "fr", "fr/train", "v1.5"]:
        tree.add(path)
    model = lt.attach(tree, Net())
    groups = model.trainable("*")
    assert [group["name"] for group in groups] == tree.paths() == model.factors.training_paths
    names = {id(p): name for name, p in model.factors.named_parameters()}
    for group in groups:
        assert {path_of(names[id(p)]) for p in group["params"]} == {group["name"]}
        assert all(model.factors.get_parameter(names[id(p)]) is p for p in group["params"])
    assert {"/fr.up/A", "/fr/train.up/A", "/v1․5.up/B", "/train.up/A"} <= set(names.values())
    saved = {name: torch.randn_like(t) for name, t in model.factors.state_dict().items()}
    model.factors.load_state_dict(saved)
    save_factors(model, tmp_path)
    with torch.no_grad():
        for parameter in model.factors.parameters():
            parameter.zero_()
    load_factors(model, tmp_path)
    assert all(torch.equal(t, saved[name]) for name, t in model.factors.state_dict().items())


def test_modules_whose_names_are_told_apart_by_a_dot_alone_have_parameters_of_their_own() -> None:
    base = nn.Sequential()
    for name in ("a/b", "a~1b"):
        base.add_module(name, nn.Linear(2, 2))
    base.add_module("a", nn.Sequential())
    base.get_submodule("a").add_module("b", nn.Linear(2, 2))
    tree = lt.AdapterTree(defaults=dict(r=1, target_modules="all-linear"))
    tree.add("fr")
    (group,) = lt.attach(tree, base).trainable("fr")
    own = tree.adapter("fr")
    assert own is not None
    assert set(own.modules) == {"a.b", "a/b", "a~1b"}
    assert {id(t) for value in own.modules.values() for t in value.tensors} == set(
        map(id, group["params"])
    )


@pytest.mark.parametrize("strategy", ["nodes", "paths", "grouped", "matrix", "active"])
def test_dropout_hides_inputs_from_what_trains_alone_one_mask_a_row(strategy: str) -> None:
    torch.manual_seed(0)
    eye = torch.eye(16)
    tree = lt.AdapterTree()
    for path, size in (("a", 100.0), ("a/b", 1.0), ("a/b/c", 2.0), ("d", 4.0)):
        tree.add(path, adapter=lt.Adapter({"0": lt.LowRank(eye.clone(), eye * size)}))
    base = nn.Sequential(nn.Linear(16, 16, bias=False))
    nn.init.zeros_(base[0].weight)
    model = lt.attach(tree, base)
    model.trainable("a/b", "a/b/c", "d", dropout=0.25)
    x = torch.ones(3, 400, 16)
    paths = ["a/b/c", "d", "a/b/c"]

    def run() -> Tensor:
        if strategy == "active":
            with model.using("a/b/c", mode="unmerged"):
                return model(x)[[0, 2]]
        with model.route(paths, strategy=strategy):  # type: ignore[arg-type]
            return model(x)[[0, 2]]

    out = run() - 100.0  # the frozen ancestor sees everything
    seen = Counter(round(v, 3) for v in out.flatten().tolist())
    assert set(seen) == {0.0, 4.0}  # 3 / (1 − 0.25): both nodes or none
    assert 0.23 < seen[0.0] / out.numel() < 0.27
    model.eval()
    assert torch.equal(run(), torch.full_like(out, 103.0))
    model.train()
    model.trainable("a/b")
    assert torch.equal(run(), torch.full_like(out, 103.0))
    for wrong in (1.0, -0.1, math.nan, "x", None):
        with pytest.raises(SpecError, match="dropout must be from 0 to below 1"):
            model.trainable("a", dropout=wrong)  # type: ignore[arg-type]
    for nameless in (["a", "d"], 3):
        with pytest.raises(
            PathError, match=r"a path or pattern is a string like .*\n.*trainable\('fr', 'de'\)"
        ):
            model.trainable(nameless)  # type: ignore[arg-type]
    assert model.factors.training_paths == ["a/b"]


def test_being_active_or_leaving_a_context_makes_nothing_train_and_nothing_stop() -> None:
    net, tree = Net().double(), tree_of()
    model = lt.attach(tree, net)
    model.trainable("a/d")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert sorted({n.split(".")[1] for n, on in flags.items() if on}) == ["/a/d"]
    with model.using("a/b/c"), model.route(["a/d", "e"]), model.using("e", mode="unmerged"):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(StateError, match="a/d: down: trains, and can't be merged"):
        model.activate("a/d")
    with pytest.raises(PathError, match="'a/x' matches no node"):
        model.trainable("a/x")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("wrong", ["x", torch.int8, 16, torch.float8_e4m3fn])
def test_a_dtype_in_which_nothing_can_train_is_refused_and_changes_nothing(wrong: Any) -> None:
    net, tree = Net(), tree_of(torch.float32)
    model = lt.attach(tree, net)
    model.trainable("e")
    before = _what_trains(model)
    with pytest.raises(SpecError, match="dtype"):
        model.trainable("a", dtype=wrong)
    assert _what_trains(model) == before
    if wrong != torch.float8_e4m3fn:
        with pytest.raises(
            SpecError, match=r"^compute_dtype must be one of torch's floating dtypes"
        ):
            lt.attach(tree_of(), Net(), compute_dtype=wrong)


def test_factors_of_eight_bits_train_in_the_dtype_asked_for() -> None:
    tree = lt.AdapterTree()
    A, B = (
        torch.ones(1, INTO).to(torch.float8_e4m3fn),
        torch.ones(HIDDEN, 1).to(torch.float8_e4m3fn),
    )
    tree.add("x", adapter=lt.Adapter({"up": lt.LowRank(A, B)}))
    (group,) = lt.attach(tree, Net()).trainable("x")
    assert [(p.dtype, float(p.detach().sum())) for p in group["params"]] == [
        (torch.float32, INTO),
        (torch.float32, HIDDEN),
    ]


def _what_trains(model: lt.TreeModel) -> Any:
    """Everything that `trainable` sets: parameters and their flags, adapters, dropout, hooks."""
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    nodes = [id(model.tree[path]) for path in model.tree.paths()]
    hooks = [len(module._forward_pre_hooks) for module in model.base.modules()]
    return parameters, nodes, hooks, model._manner.dropout, model.state, model.active


@pytest.mark.parametrize("already", [(), ("e",)])
def test_trainable_that_fails_half_way_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, already: tuple[str, ...]
) -> None:
    net, tree = Net(), tree_of(torch.float32)
    model = lt.attach(tree, net)
    if already:
        model.trainable(*already, dropout=0.25)
    before = _what_trains(model)
    real, calls = Factors.own, iter([False, True])

    def fails_at_the_second(self: Factors, *args: Any) -> Any:
        if next(calls):
            raise torch.cuda.OutOfMemoryError("no room")
        return real(self, *args)

    monkeypatch.setattr(Factors, "own", fails_at_the_second)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.trainable("a", "a/b", dtype=torch.float64)
    monkeypatch.undo()
    assert _what_trains(model) == before
    assert [g["name"] for g in model.trainable("a", "a/b")] == ["a", "a/b"]


def test_what_is_active_and_fits_no_budget_once_it_is_frozen_goes_on_training() -> None:
    net, tree = Net(), tree_of(torch.float32)
    model = lt.attach(tree, net, host_budget=64)
    model.trainable("a", "a/b", "e")
    model.activate("a/b", mode="unmerged")  # what trains is run as it is, and laid out nowhere
    out = net(torch.ones(1, 2, INTO))
    before = _what_trains(model)
    with pytest.raises(BudgetError, match="a, a/b: laid out beside the weights"):
        model.trainable("e")
    assert _what_trains(model) == before
    assert torch.equal(net(torch.ones(1, 2, INTO)), out)


# ---------------------------------------------------------------------- losses
def test_the_loss_is_the_weighted_sum_of_each_paths_mean() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (4, 5))
    labels[0, 2:] = -100
    labels[3] = -100
    paths: list[lt.Blend] = ["a", "b", "a", {"a": 0.5, "b": 0.5}]
    loss = lt.path_loss(logits, labels, paths, weights={"b": 3.0})
    logp = logits.log_softmax(-1)
    own = {
        row: [-float(logp[row, t - 1, labels[row, t]]) for t in range(1, 5) if labels[row, t] >= 0]
        for row in range(4)
    }
    a, b = [*own[0], *own[2]], own[1]
    means = {"a": sum(a) / len(a), "b": sum(b) / len(b), "a:0.5+b:0.5": 0.0}
    assert {path: float(part) for path, part in loss.by_path.items()} == pytest.approx(
        means, rel=1e-6
    )
    assert float(loss.total) == pytest.approx(means["a"] + 3 * means["b"], rel=1e-6)
    unshifted = lt.path_loss(logits, labels, paths, shift=False).by_path["b"]
    assert float(unshifted) == pytest.approx(float(F.cross_entropy(logits[1], labels[1])), rel=1e-6)


def test_blends_that_differ_in_the_last_bit_have_losses_and_counts_of_their_own() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(0, 7, (3, 5))
    near: list[lt.Blend] = [
        {"a": 0.12345671, "b": 0.5},
        "b:0.5+a:0.12345672",
        {"b": 0.5, "a": 0.12345671},
    ]
    tree = lt.AdapterTree()
    for path in "ab":
        tree.add(path)
    assert lt.token_counts(tree, [(labels, near)]) == {
        "a:0.12345671+b:0.5": 8,
        "a:0.12345672+b:0.5": 4,
    }
    loss = lt.path_loss(logits, labels, near, weights={"a:0.12345672 + b:.5": 3.0})
    rows = [float(F.cross_entropy(logits[row, :-1], labels[row, 1:])) for row in range(3)]
    assert list(map(float, loss.by_path.values())) == pytest.approx(
        [(rows[0] + rows[2]) / 2, rows[1]]
    )
    assert float(loss.total) == pytest.approx((rows[0] + rows[2]) / 2 + 3 * rows[1])
    assert set(lt.path_loss(logits[:1], labels[:1], [{"a": 1.0, "b": 0.0}]).by_path) == {"a"}
    with pytest.raises(SpecError, match=r"weights: 'a:1\.0' is 'a', which stands there already"):
        lt.path_loss(logits[:1], labels[:1], ["a"], weights={"a": 1.0, "a:1.0": 2.0})


def test_losses_that_make_no_sense_are_refused() -> None:
    logits, labels = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(SpecError, match="1 path do not fit together"):
        lt.path_loss(logits, labels, ["a"])
    with pytest.raises(SpecError, match="'b' has rows here and no count"):
        lt.path_loss(logits, labels, ["a", "b"], counts={"a": 2})
    with pytest.raises(SpecError, match="weights: expected paths of this step, got x"):
        lt.path_loss(logits, labels, ["a", "b"], weights={"x": 2.0}, counts={"a": 2, "b": 2})
    with pytest.raises(SpecError, match="labels of 2 rows, and 1 path"):
        lt.token_counts(lt.AdapterTree(), [(labels, ["a"])])


# ---------------------------------------------------------------------- sampling
@pytest.mark.parametrize(
    ("temperature", "shares"), [(1.0, (0.8, 0.2)), (2.0, (2 / 3, 1 / 3)), (math.inf, (0.5, 0.5))]
)
def test_a_temperature_evens_the_paths_out(temperature: float, shares: tuple[float, float]) -> None:
    paths = ["a"] * 80 + ["b"] * 20
    drawn = list(lt.PathSampler(paths, temperature=temperature, length=20_000))
    found = Counter(paths[row] for row in drawn)
    for path, share in zip("ab", shares, strict=True):
        assert abs(found[path] / 20_000 - share) < 0.02
    of_b = [row for row in drawn if row >= 80]
    assert all(
        len(set(of_b[i : i + 20])) == 20 for i in range(0, len(of_b) // 20 * 20, 20)
    )  # each once, then again


def test_a_sampler_is_a_function_of_seed_and_epoch() -> None:
    paths = ["a"] * 30 + ["b"] * 10
    one, same = lt.PathSampler(paths, seed=4), lt.PathSampler(paths, seed=4)
    first = list(one)
    assert len(first) == len(one) == 40
    assert first == list(one) == list(same)
    one.set_epoch(1)
    second = list(one)
    same.set_epoch(1)
    assert second == list(same) != first != list(lt.PathSampler(paths, seed=5))
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(SpecError, match="temperature must be more than 0"):
            lt.PathSampler(paths, temperature=wrong)
    with pytest.raises(SpecError, match="got 0 rows"):
        lt.PathSampler([])
