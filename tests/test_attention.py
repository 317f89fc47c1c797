"""torch's own attention beside its weights: it reads both of its projections itself, and they are
never called.

Everything is float64, and what is compared with is the same module with W + Σ c·s·B·A in its
weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.engine.sidepaths import watched_forward
from lora_tree.errors import BaseMismatch, MergedOnly

DIM, HEADS = 8, 2
PATHS = {"a": 0.7, "a/b": -1.3, "c": 1.0}
ROWS: list[lt.Blend] = ["a/b", "", "c", {"a/b": 0.5, "c": 0.5}, "a"]
ALONG: dict[str, dict[str, float]] = {
    "a/b": {"a": 0.7, "a/b": -1.3}, "": {}, "c": {"c": 1.0}, "a": {"a": 0.7},
    "blend": {"a": 0.35, "a/b": -0.65, "c": 0.5},
}  # fmt: skip


class Attends(nn.Module):
    """Attention as a base: ``query`` decides what attends to what."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.kind = kind
        sizes = {"kdim": 6, "vdim": 4} if kind == "of other sizes" else {}
        self.m = nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, **sizes, **options})

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        first = self.m.batch_first
        x = x if first else x.transpose(0, 1)
        other = x.flip(-1)[:, :-1] if first else x.flip(-1)[:-1]
        key, value = {
            "itself": (x, x),
            "another": (other, other),
            "two others": (other, -other),
            "of other sizes": (other[..., :6], other[..., :4]),
        }[self.kind]
        out, weights = self.m(x, key, value, **options)
        out = out if first else out.transpose(0, 1)
        return out if weights is None else torch.cat([out, weights.flatten(1)[:, None, :DIM]], 1)


KINDS = ("itself", "another", "two others")


def tree_for(base: Attends, bias: bool = False) -> lt.AdapterTree:
    torch.manual_seed(1)
    sizes = {"m": (3 * DIM, DIM), "m.out_proj": (DIM, DIM)}
    parameters: dict[str, tuple[int, int]] = {}
    if base.kind == "of other sizes":
        sizes.pop("m")
        parameters = {"m.q_proj_weight": (DIM, DIM), "m.v_proj_weight": (DIM, 4)}
    tree = lt.AdapterTree()
    for i, (path, weight) in enumerate(PATHS.items()):
        modules = {}
        for name, (out, into) in {**sizes, **parameters}.items():
            raw = name in parameters
            batch = (1,) if raw else ()
            A = torch.randn(*batch, 2 + i, into, dtype=torch.float64)
            B = torch.randn(*batch, out, 2 + i, dtype=torch.float64)
            added = torch.randn(out, dtype=torch.float64) if bias and not raw else None
            layout = lt.Layout("parameter" if raw else "linear")
            modules[name] = lt.LowRank(A, B, 0.5, added, layout)
        tree.add(path, adapter=lt.Adapter(modules), weight=weight)
    return tree


def weights_of(
    base: Attends, tree: lt.AdapterTree, along: dict[str, float], leaves: Any = None
) -> dict[str, Tensor]:
    names = {
        "m": ("m.in_proj_weight", "m.in_proj_bias"),
        "m.out_proj": ("m.out_proj.weight", "m.out_proj.bias"),
    }
    found = {n: p.detach() for n, p in base.named_parameters()}
    for node, coefficient in along.items():
        for name, v in tree.adapter(node).modules.items():  # type: ignore[union-attr]
            A, B = (v.A, v.B) if leaves is None else leaves[node, name]
            delta = coefficient * v.scale * (B @ A)
            weight, bias = names.get(name, (name, ""))
            found[weight] = found[weight] + (delta[0] if delta.ndim == 3 else delta)
            if v.bias is not None:
                found[bias] = found[bias] + coefficient * v.scale * v.bias
    return found


def along_of(blend: lt.Blend) -> dict[str, float]:
    return ALONG[blend if isinstance(blend, str) else "blend"]


def made(kind: str, **options: Any) -> tuple[Attends, Tensor]:
    torch.manual_seed(0)
    base = Attends(kind, **options).double().eval()
    return base, torch.randn(len(ROWS), 6, DIM, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("kind", [*KINDS, "of other sizes"])
def test_paths_rows_and_gradients_are_those_of_the_dense_weights(
    kind: str, batch_first: bool, bias: bool
) -> None:
    base, x = made(kind, batch_first=batch_first)
    tree = tree_for(base, bias)
    leaves = {
        (node, name): tuple(t.detach().clone().requires_grad_() for t in (v.A, v.B))
        for node in PATHS
        for name, v in tree.adapter(node).modules.items()  # type: ignore[union-attr]
    }
    wanted_x, mine = (x.clone().requires_grad_() for _ in range(2))
    outs = []
    for row, blend in enumerate(ROWS):
        weights = weights_of(base, tree, along_of(blend), leaves)
        outs.append(torch.func.functional_call(base, weights, (wanted_x[row : row + 1],)))
    wanted = torch.cat(outs)
    g = torch.randn_like(wanted)
    wanted.backward(g)
    model = lt.attach(tree, base)
    with model.using("a/b", mode="unmerged"):
        torch.testing.assert_close(base(x[:1]), wanted[:1], rtol=1e-10, atol=1e-10)
    model.trainable("a", "c", dtype=None)
    with model.route(ROWS):
        got = base(mine)
        got.backward(g)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.grad, wanted_x.grad, rtol=1e-10, atol=1e-10)
    for (node, name), leaf in leaves.items():
        v = tree.adapter(node).modules[name]  # type: ignore[union-attr]
        for factor, right in zip((v.A, v.B), leaf, strict=True):
            if node == "a/b":
                assert factor.grad is None
            else:
                torch.testing.assert_close(factor.grad, right.grad, rtol=1e-10, atol=1e-10)
    assert "forward" not in vars(base.m)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_row_keeps_the_bits_of_the_base_on_its_fast_path_too(
    kind: str, batch_first: bool, masked: bool
) -> None:
    base, x = made(kind, batch_first=batch_first)
    base.float()
    x = x.float()
    options: dict[str, Any] = {"need_weights": not masked}
    if masked:
        length = 6 if kind == "itself" else 5
        options["key_padding_mask"] = torch.arange(length)[None] >= torch.tensor(
            [[6], [4], [5], [3], [6]]
        )
    bare = base(x, **options)
    model = lt.attach(tree_for(base), base)
    with model.route(ROWS):
        got = base(x, **options)
    assert torch.equal(got[1], bare[1])
    assert not torch.allclose(got[0], bare[0], atol=1e-2)


@torch.no_grad()
def test_an_encoder_layer_asks_its_attention_in_every_forward() -> None:
    """In evaluation torch computes such a layer in one call, and calls no module in it."""
    torch.manual_seed(0)
    base = (
        nn.Sequential(nn.TransformerEncoderLayer(DIM, HEADS, 16, batch_first=True)).double().eval()
    )
    x = torch.randn(3, 5, DIM, dtype=torch.float64)
    value = lt.LowRank(
        *(torch.randn(shape, dtype=torch.float64) for shape in ((2, DIM), (3 * DIM, 2)))
    )
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"0.self_attn": value}))
    bare = base(x)
    model = lt.attach(tree, base)
    with model.using("a"):
        wanted = base(x)
    model.activate("a", mode="unmerged")
    for _ in range(3):  # the first forward is watched for sites that do not run
        torch.testing.assert_close(base(x), wanted, rtol=1e-9, atol=1e-9)
    model.deactivate()
    assert torch.equal(base(x), bare)


def test_a_sequence_alone_has_no_rows_to_route(monkeypatch: pytest.MonkeyPatch) -> None:
    base, x = made("itself")
    model = lt.attach(tree_for(base), base)
    with model.using("c", mode="unmerged"):
        assert base(x[0], need_weights=False).shape == (6, DIM)
    with (
        pytest.raises(BaseMismatch, match="the rows of the batch can't be followed"),
        model.route(["a", "c", "", "a", "a", "c"]),
    ):
        base(x[0], need_weights=False)
    with monkeypatch.context() as patch:
        patch.setattr(watched_forward, "attention_body", lambda: None)
        model.activate("c", mode="unmerged")
        message = (
            r"m: can't run unmerged: MultiheadAttention gives it to .*multi_head_attention_forward"
        )
        with pytest.raises(MergedOnly, match=message):
            base(x)
