"""Path models: `model.at(path)` is the path as a module of its own, whatever else is active and in
whatever order.

Compared with dense float64 sums, and with transformers on weights into which the sum was written.
"""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NET, dense, low_rank, net, with_sum
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import BudgetError, PathError, StateError, TreeError

transformers = pytest.importorskip("transformers")

PATHS = ("fr", "fr/legal", "fr/legal/acme", "de")


def forest() -> lt.AdapterTree:
    draw = torch.Generator().manual_seed(1)
    tree = lt.AdapterTree()
    for path in PATHS:
        modules = {name: low_rank(*NET[name], seed=draw, scale=0.5) for name in NET}
        tree.add(path, adapter=lt.Adapter(modules))
    return tree


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(2))


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=60)
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0, **more
    )
    return transformers.LlamaForCausalLM(config).eval()


def speaking(base: nn.Module, targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")) -> Any:
    """A tree on a causal model, with factors that change something."""
    torch.manual_seed(3)
    tree = lt.AdapterTree(defaults=dict(r=2, lora_alpha=4, target_modules=list(targets)))
    for path in PATHS:
        tree.add(path)
    model = lt.attach(tree, base)
    for path in PATHS:
        adapter = tree.adapter(path)
        assert adapter is not None
        for value in adapter.modules.values():
            value.B.normal_(std=0.3)
    return model


def close(found: Tensor, wanted: Tensor) -> None:
    """In float32, against a sum in float64."""
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


IDS = torch.tensor([[5, 9, 33, 7, 21, 2], [8, 44, 3, 12, 50, 6]])


# ---------------------------------------------------------------------- what it computes
@pytest.mark.parametrize("path", ["", *PATHS, {"fr/legal": 0.5, "de": -0.5}], ids=str)
def test_forward_and_gradients_are_those_of_the_dense_sum(path: lt.Blend) -> None:
    model = lt.attach(forest(), net())
    x = inputs().requires_grad_()
    model.at(path)(x).square().sum().backward()
    y = inputs().double().requires_grad_()
    with_sum(net(), model.tree, path)(y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    close(x.grad, y.grad)


def test_several_live_side_by_side_and_beside_what_is_active() -> None:
    model = lt.attach(forest(), net())
    own = {path: model.at(path) for path in ("", *PATHS)}
    wanted = {path: with_sum(net(), model.tree, path)(inputs().double()) for path in own}

    def check() -> None:
        for path in reversed(own):
            close(own[path](inputs()), wanted[path])

    check()
    before = {name: id(p) for name, p in model.base.named_parameters()}
    with model.using("de", mode="unmerged"):
        check()
        close(model(inputs()), wanted["de"])
        with model.route(["fr", "", "de"]):
            check()
            # A view that is made while rows are routed has none of the route's hooks.
            close(model.at("fr")(inputs()), wanted["fr"])
    check()
    assert {name: id(p) for name, p in model.base.named_parameters()} == before
    assert torch.equal(model(inputs()), net()(inputs()))
    assert not any(module._forward_hooks for module in model.base.modules())


def test_parts_that_are_called_by_themselves_run_the_path_too() -> None:
    base = llama()
    model = speaking(base)
    merged = copy.deepcopy(base)
    policy = model.at("fr/legal/acme")
    wanted = with_sum(merged, model.tree, "fr/legal/acme")
    hidden = policy.base_model(input_ids=IDS).last_hidden_state
    by_hand = hidden @ policy.get_output_embeddings().weight.mT
    assert torch.equal(by_hand, policy(IDS).logits)
    close(by_hand, wanted(IDS).logits)
    layer = policy.model.layers[1].mlp
    assert not torch.equal(layer(hidden), base.model.layers[1].mlp(hidden))
    word = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    assert torch.equal(policy.generate(IDS, **word), wanted.generate(IDS, **word))
    assert policy.config is base.config
    assert policy.name_or_path == base.name_or_path


def test_tied_weights_and_shared_modules_stay_tied_and_shared() -> None:
    model = speaking(llama(tie_word_embeddings=True))
    twin = model.at("fr")
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is model.base.lm_head.weight

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(3, 3)
            self.also = [self.a]
            self.run = self.a.forward

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.also[0](self.b(self.a(x)))
            return out

    base = Twice()
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter({"a": low_rank(3, 3)}))
    seen: Any = lt.attach(tree, base).at("fr").base
    assert seen.a is seen.b is seen.also[0] is seen.run.__self__
    assert seen.a is not base.a
    x = torch.randn(2, 3)
    wanted = x.double()
    delta = dense(tree["fr"].loaded.modules["a"])  # type: ignore[union-attr]
    for _ in range(3):
        weight, bias = base.a.weight.detach().double(), base.a.bias.detach().double()
        wanted = torch.nn.functional.linear(wanted, weight + delta, bias)
    close(seen(x), wanted)


def test_fused_experts_have_their_side_paths_in_the_view() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=60)
    config = transformers.MixtralConfig(
        **sizes, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4
    )
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=["q_proj"], target_parameters=experts))
    tree.add("fr")
    base = transformers.MixtralForCausalLM(config).eval()
    model = lt.attach(tree, base)
    for value in tree.adapter("fr").modules.values():  # type: ignore[union-attr]
        value.B.normal_(std=0.3)
    bare, own = base(IDS).logits, model.at("fr")(IDS).logits
    assert torch.equal(base(IDS).logits, bare)
    with model.using("fr"):
        torch.testing.assert_close(base(IDS).logits, own, rtol=1e-4, atol=1e-5)
    assert (own - bare).abs().max() > 1e-2


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_backward_through_checkpointed_layers_finds_its_own_path_whatever_ran_since(
    reentrant: bool | None,
) -> None:
    base = llama()
    model = speaking(base)
    model.trainable("fr/legal/acme")
    policy, reference = model.at("fr/legal/acme"), model.at("fr/legal")
    policy.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that transformers renames, and of use_reentrant
        if reentrant is not None:
            policy.enable_input_require_grads()
            policy.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        logits = policy(IDS, use_cache=False).logits
        with torch.no_grad():
            reference(IDS)
        with model.using("de", mode="unmerged"):
            model(IDS)
            logits.float().log_softmax(-1)[..., 7].sum().backward()
    assert not getattr(base, "is_activation_checkpointing", False)
    found = {name: p.grad for name, p in policy.factors.named_parameters() if p.requires_grad}
    # The same gradients by a dense model in float64, through the factors as leaves.
    whole = with_sum(llama(), model.tree, "fr/legal")
    own = model.tree.adapter("fr/legal/acme")
    assert own is not None
    leaves = {}
    for name, value in own.modules.items():
        A, B = (t.detach().double().requires_grad_() for t in (value.A, value.B))
        leaves[name] = A, B
        module = whole.get_submodule(name)
        weight = module.weight.detach() + value.scale * B @ A
        del module._parameters["weight"]
        module.weight = weight
    whole(IDS, use_cache=False).logits.log_softmax(-1)[..., 7].sum().backward()
    for name, (A, B) in leaves.items():
        for part, leaf in (("A", A), ("B", B)):
            got = found[f"/fr/legal/acme.{name.replace('.', '/')}/{part}"]
            assert got is not None
            torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-3, atol=1e-5)


def test_its_parameters_are_the_base_and_the_factors_of_its_own_nodes() -> None:
    model = speaking(llama())
    early = model.at("fr/legal")
    model.trainable("fr/legal", "de", "fr/legal/acme")
    late = model.at("fr/legal")
    for policy in (early, late):
        training = [name for name, p in policy.named_parameters() if p.requires_grad]
        assert {name.split(".")[1] for name in training} == {"/fr/legal"}
        assert policy.factors.training_paths == ["fr/legal"]
    model.trainable("fr")
    assert early.factors.training_paths == ["fr"]
    optimizer = torch.optim.AdamW(model.trainable("fr", "de"), lr=0.1)
    model.follow(optimizer)
    before = {path: [p.clone() for p in model.factors.of(path)] for path in ("fr", "de")}
    early(IDS).logits.sum().backward()
    optimizer.step()
    moved = {
        path: any(
            not torch.equal(p, q) for p, q in zip(before[path], model.factors.of(path), strict=True)
        )
        for path in before
    }
    assert moved == {"fr": True, "de": False}
    # What was learnt is at once in every path model that stands on the node.
    torch.testing.assert_close(model.at("fr/legal")(IDS).logits, early(IDS).logits)


def test_a_failing_trainable_leaves_every_path_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = speaking(llama())
    model.trainable("fr")
    first, second = model.at("fr/legal"), model.at("fr")
    before = [m(IDS).logits for m in (first, second)]
    renew, calls = type(first).renew, []

    def breaks(self: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("no room")
        renew(self)

    monkeypatch.setattr(type(first), "renew", breaks)
    with pytest.raises(RuntimeError, match="no room"):
        model.trainable("fr/legal")
    assert first.factors.training_paths == second.factors.training_paths == ["fr"]
    for policy, wanted in zip((first, second), before, strict=True):
        assert torch.equal(policy(IDS).logits, wanted)
        policy(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.factors.of("fr"))


# ---------------------------------------------------------------------- what is refused
def test_a_forward_while_another_path_is_in_the_weights_is_refused_wherever_it_begins() -> None:
    model = speaking(llama())
    policy = model.at("fr")
    model.activate("de")
    for call in (policy, policy.base_model, policy.lm_head, policy.model.embed_tokens):
        with pytest.raises(StateError, match="'de' is merged into the base's weights"):
            call(IDS)
    model.deactivate()
    policy(IDS)


def test_its_nodes_are_in_use_until_it_is_closed_or_dropped() -> None:
    model = lt.attach(forest(), net())
    policy = model.at("fr/legal")
    with pytest.raises(TreeError, match=r"a path model \(model\.at"):
        model.tree.update("fr", weight=0.5)
    model.tree.update("de", weight=0.5)
    policy.close()
    policy.close()
    model.tree.update("fr", weight=0.5)
    with pytest.raises(StateError, match="was closed"):
        policy(inputs())
    other = model.at("fr")
    del other
    model.tree.update("fr", weight=0.25)
    last = model.at("fr")
    model.detach()
    with pytest.raises(StateError, match="detached"):
        last(inputs())
    with pytest.raises(StateError, match="detached"):
        model.at("fr")


def test_it_keeps_its_tree_model_alive_and_both_are_collected_with_it() -> None:
    model = lt.attach(forest(), net())
    policy, reference = model.at("fr/legal"), model.at("fr")
    alive = [weakref.ref(each) for each in (model, policy, reference)]
    del model, reference
    policy(inputs())
    assert [each() is None for each in alive] == [False, False, True]
    del policy
    gc.collect()
    assert [each() is None for each in alive] == [True, True, True]


def test_under_a_budget_it_pins_its_lineage_until_it_is_dropped(tmp_path: Path) -> None:
    forest().save(tmp_path / "zoo")
    # Three nodes of 168 bytes each, and as much again laid out; the fourth does not fit beside.
    model = lt.attach(lt.load(tmp_path / "zoo"), net(), host_budget=1100)
    one = model.at("fr/legal/acme")
    assert model.cache.stats().tiers[0].in_use_bytes == 3 * 168
    with pytest.raises(BudgetError):
        model.at("de")
    close(one(inputs()), with_sum(net(), lt.load(tmp_path / "zoo"), one.path)(inputs().double()))
    del one
    gc.collect()
    model.at("de")
    assert model.cache.stats().tiers[0].in_use_bytes == 168


def test_a_head_whose_weight_would_be_taken_without_its_adapter_is_refused_by_name() -> None:
    model = speaking(llama(), ("q_proj", "lm_head"))
    policy = model.at("fr/legal")
    with pytest.raises(StateError, match=r"^lm_head: the head is changed by fr, fr/legal"):
        policy.get_output_embeddings()
    assert policy(IDS).logits.shape == (2, 6, 60)
    assert model.at("").get_output_embeddings().weight is model.base.lm_head.weight


def test_a_head_of_a_nodes_own_runs_and_is_refused_to_who_takes_its_weight() -> None:
    base = llama()
    tree = lt.AdapterTree(
        defaults=dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    tree.add("fr")
    model = lt.attach(tree, base)
    policy = model.at("fr")
    head = next(iter(tree.adapter("fr").overrides.values()))  # type: ignore[union-attr]
    with torch.no_grad():
        head.values.add_(0.1)
    before = policy.get_extra_state()
    wanted = policy.base_model(IDS).last_hidden_state @ head.values.mT
    torch.testing.assert_close(policy(IDS).logits, wanted)
    with pytest.raises(StateError, match=r"^lm_head: the head is changed by fr"):
        policy.get_output_embeddings()
    with torch.no_grad():
        head.values.add_(0.1)
    assert not torch.equal(model.at("fr").get_extra_state(), before)


def test_saving_or_changing_the_base_through_it_is_refused_as_a_tree_model_does() -> None:
    model = speaking(llama())
    policy = model.at("fr")
    for name in ("save_pretrained", "add_adapter", "resize_token_embeddings", "is_quantized"):
        assert not hasattr(policy, name)
    with pytest.raises(StateError, match=r"^a PathModel does not answer 'save_pretrained'"):
        policy.save_pretrained("x")
    with pytest.raises(StateError, match="can't be copied"):
        copy.deepcopy(policy)
    with pytest.raises(PathError):
        model.at("fr/leagl")


# ---------------------------------------------------------------------- views
def test_hooks_and_replaced_forwards_of_the_owner_come_along() -> None:
    base = net()
    seen: list[nn.Module] = []
    base[0].register_forward_hook(lambda module, args, out: seen.append(module))
    inner = base[2].forward
    base[2].forward = functools.partial(_doubled, base[2])  # type: ignore[assignment, method-assign]
    base[2]._old_forward = inner  # as accelerate keeps it
    model = lt.attach(forest(), base)
    one = model.at("fr")
    out = one(inputs())
    assert seen == [one.base[0]]
    plain = net()
    merged = with_sum(plain, model.tree, "fr")
    wanted = (merged(inputs().double()) - 0.0) * 1.0
    bare = net()[2]
    hidden = torch.tanh(merged[0](inputs().double()))
    wanted = wanted + torch.nn.functional.linear(hidden, bare.weight.double(), bare.bias.double())
    close(out, wanted)


def _doubled(module: Any, x: Tensor) -> Tensor:
    """A forward as accelerate's hooks put it in: bound to its module by a partial."""
    out: Tensor = module._old_forward(x) * 2
    return out


def _closed_over(module: nn.Module) -> Callable[[Tensor], Tensor]:
    forward = module.forward
    return lambda x: forward(x)


def test_a_forward_that_is_bound_to_the_bases_own_module_is_refused_by_name() -> None:
    base = net()
    base[2].forward = _closed_over(base[2])  # type: ignore[method-assign]
    model = lt.attach(forest(), base)
    with pytest.raises(StateError, match=r"^2: its forward was replaced by a function"):
        model.at("fr")


def test_moving_or_casting_it_moves_the_base_and_lays_the_path_out_anew() -> None:
    model = lt.attach(forest(), net())
    one = model.at("fr").to(torch.float64)
    assert model.base[0].weight.dtype == torch.float64
    out = one(inputs().double())
    wanted = with_sum(net(), model.tree, "fr")(inputs().double())
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
