"""A base that is copied or pickled while something of a tree is on it."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from oracle import low_rank, net
from torch import nn

import lora_tree as lt
from lora_tree.errors import StateError

REFUSED = (
    "the base can't be pickled now: lora_tree has hooks on it, which work in this process only\n"
    "  to keep its weights: torch.save(base.state_dict(), file)\n"
    "  to pickle the base itself, make it bare first: model.deactivate(), or after prepare() "
    "model.detach()"
)


class Attends(nn.Module):
    """A module that reads the weights of its child itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


def attached(base: nn.Module, *targets: str) -> lt.TreeModel:
    """Attach a tree of two nodes with factors at these modules."""
    tree = lt.AdapterTree()
    for seed, path in enumerate(("a", "a/b")):
        modules = {}
        for name in targets:
            out, inside = base.get_submodule(name).weight.shape
            modules[name] = low_rank(out, inside, seed=torch.Generator().manual_seed(seed))
        tree.add(path, adapter=lt.Adapter(modules))
    return lt.attach(tree, base)


@contextlib.contextmanager
def unmerged() -> Iterator[tuple[nn.Module, nn.Module]]:
    with attached(base := net(), "0", "2").using("a/b", mode="unmerged"):
        yield base, base[0]


@contextlib.contextmanager
def trained() -> Iterator[tuple[nn.Module, nn.Module]]:
    model = attached(base := net(), "0", "2")
    model.trainable("a")
    with model.using("a/b", mode="unmerged"):
        yield base, base[0]


@contextlib.contextmanager
def routed() -> Iterator[tuple[nn.Module, nn.Module]]:
    with attached(base := net(), "0", "2").route(["a", "a/b"]):
        yield base, base[0]


@contextlib.contextmanager
def prepared() -> Iterator[tuple[nn.Module, nn.Module]]:
    model = attached(base := net(), "0", "2")
    model.prepare(max_rank=8)
    yield base, base[0]


@contextlib.contextmanager
def watched() -> Iterator[tuple[nn.Module, nn.Module]]:
    model = attached(base := Attends(), "attention.out_proj")
    with model.using("a/b", mode="unmerged"):
        yield base, base.attention


@contextlib.contextmanager
def viewed() -> Iterator[tuple[nn.Module, nn.Module]]:
    model = attached(net(), "0", "2")
    view = model.at("a/b").base
    yield view, view.get_submodule("0")


def saved(module: nn.Module) -> None:
    torch.save(module, io.BytesIO())


def copied_by_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("taken", [saved, pickle.dumps])
@pytest.mark.parametrize("state", [unmerged, trained, routed, prepared, watched, viewed])
def test_a_base_with_hooks_is_not_pickled_nor_is_a_part_of_it(
    state: Callable[[], contextlib.AbstractContextManager[tuple[nn.Module, nn.Module]]],
    taken: Callable[[nn.Module], object],
) -> None:
    with state() as (base, part):
        for module in (base, part):
            with pytest.raises(StateError) as raised:
                taken(module)
            assert str(raised.value) == REFUSED


def test_the_weights_are_saved_at_any_time_and_the_base_when_it_is_bare() -> None:
    model = attached(base := net(), "0", "2")
    own, x = net().state_dict(), torch.randn(3, 5)
    wanted = net()(x)
    with model.using("a/b", mode="unmerged"):
        torch.save(base.state_dict(), kept := io.BytesIO())
    kept.seek(0)
    for name, tensor in torch.load(kept).items():
        assert torch.equal(tensor, own[name]), name
    assert torch.equal(copied_by_pickle(base)(x), wanted)
    with model.using("a/b"):  # merged: no hook is on it
        assert torch.equal(copied_by_pickle(base)(x), base(x))


def test_the_copy_of_a_prepared_base_runs_as_the_bare_base() -> None:
    with prepared() as (base, _):
        x = torch.randn(3, 5)
        assert torch.equal(copy.deepcopy(base)(x), net()(x))


def test_a_copy_of_a_routed_base_does_not_generate_with_the_weights_of_the_base() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        pad_token_id=0,
    )
    base = transformers.LlamaForCausalLM(config).eval()
    model = attached(base, "model.layers.0.mlp.up_proj")
    ids = torch.arange(1, 9).view(2, 4)
    asked = dict(attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    with model.route(["a", "a/b"]):
        twin = copy.deepcopy(base)
        base.generate(ids, **asked)
    with pytest.raises(StateError, match=r"^generate: this is a copy of a base"):
        twin.generate(ids, **asked)
    assert "generate" not in vars(base)
