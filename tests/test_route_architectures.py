"""Routed batches through real architectures: generate, beams, caches, checkpointing. Row by row the
dense model's.

Everything runs in float64; what is compared with is `architectures.dense`, W + Σ c·s·B·A written
out by hand.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from architectures import (
    ARCHS,
    BLEND,
    BLENDED,
    VOCAB,
    Arch,
    along,
    assert_close,
    bits,
    dense,
    run,
    same_bits,
)
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import DynamicCache, SwinConfig, SwinModel, XLNetConfig, XLNetModel

import lora_tree as lt
from lora_tree.errors import BaseMismatch, StateError

ROWS: list[lt.Blend] = ["a/b/c", "", "a/d", BLEND, "a"]
# sites that are asked for something else than rows: positions, which all rows share
SHARED = {"gpt2": "wpe", "bert": "_embeddings", "t5": "relative_attention_bias"}


def coefficients(blend: lt.Blend) -> dict[str, float]:
    return BLENDED if blend is BLEND else along(blend) if isinstance(blend, str) and blend else {}


def batch_of(arch: Arch, rows: int, seed: int = 5) -> dict[str, Tensor]:
    """Inputs of the architecture's shapes for so many rows."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, like in arch.inputs().items():
        shape = (rows, *like.shape[1:])
        if like.is_floating_point():
            made[name] = torch.randn(shape, generator=draw, dtype=torch.float64)
        else:
            made[name] = (
                torch.ones(shape).long()
                if "mask" in name
                else torch.randint(3, VOCAB, shape, generator=draw)
            )
    return made


def without_shared(name: str, tree: lt.AdapterTree) -> lt.AdapterTree:
    """The tree without its increments on what all rows share."""
    left = lt.AdapterTree()
    for path in tree.paths():
        adapter = tree.adapter(path)
        assert adapter is not None
        modules = {
            n: v for n, v in adapter.modules.items() if name not in SHARED or SHARED[name] not in n
        }
        left.add(path, adapter=lt.Adapter(modules), weight=tree[path].weight)
    return left


def rows_by_hand(
    base: nn.Module, tree: lt.AdapterTree, inputs: dict[str, Tensor], rows: list[lt.Blend]
) -> Tensor:
    outs = []
    for row, blend in enumerate(rows):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        outs.append(run(dense(base, tree, coefficients(blend)), one))
    return torch.cat(outs)


@pytest.mark.parametrize("strategy", ["auto", "nodes", "grouped", "matrix"])
@pytest.mark.parametrize("name", ARCHS)
def test_every_row_is_that_of_the_dense_model_of_its_path(name: str, strategy: Any) -> None:
    arch = ARCHS[name]
    base = arch.base()
    tree = without_shared(name, arch.tree(base))
    inputs = batch_of(arch, len(ROWS))
    before, bare = bits(base), run(base, inputs)
    wanted = rows_by_hand(base, tree, inputs, ROWS)
    model = lt.attach(tree, base)
    # as many tokens as rows; Mixtral's router looks at numbers, so shapes alone can't tell them
    # apart
    with model.route(ROWS, strategy=strategy, batch_first="mixtral" in name):
        got = run(base, inputs)
    assert_close(got, wanted)
    assert torch.equal(got[1], bare[1])
    assert same_bits(base, before)
    assert torch.equal(run(base, inputs), bare)


@pytest.mark.parametrize(("name", "site"), SHARED.items())
def test_what_all_rows_share_is_refused_by_name(name: str, site: str) -> None:
    arch = ARCHS[name]
    base = arch.base()
    model = lt.attach(arch.tree(base), base)
    inputs = batch_of(arch, len(ROWS))
    message = f"{site}.*: its input is .*the first axis should be 5 rows"
    with pytest.raises(BaseMismatch, match=message), model.route(ROWS, batch_first=True):
        run(base, inputs)
    assert model.state is lt.State.BARE


# ---------------------------------------------------------------------- generate
def greedy(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, **options}
    tokens: Tensor = model.generate(**inputs, **options)
    return tokens


def prompts(arch: Arch, rows: int) -> dict[str, Tensor]:
    names = arch.generates() if arch.generates else {}
    return {name: tensor for name, tensor in batch_of(arch, rows).items() if name in names}


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "several sequences of beams": dict(num_beams=3, num_return_sequences=2),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2", "mixtral", "t5", "whisper"])
def test_generate_gives_every_row_the_tokens_of_its_own_dense_model(
    name: str, options: dict[str, Any]
) -> None:
    arch = ARCHS[name]
    base = arch.base()
    tree = without_shared(name, arch.tree(base))
    rows: list[lt.Blend] = ["a/b/c", "", "a/d"]
    inputs = prompts(arch, len(rows))
    wanted = []
    for row, blend in enumerate(rows):
        one = {n: t[row : row + 1] for n, t in inputs.items()}
        wanted.append(greedy(dense(base, tree, coefficients(blend)), one, **options))
    assert len({tuple(w.flatten().tolist()) for w in wanted}) == 3
    model = lt.attach(tree, base)
    # Whisper repeats its rows itself before it calls transformers' own generate, and says so
    # nowhere
    repeat = options.get("num_return_sequences", 1) if name == "whisper" else 1
    with model.route(rows, batch_first=True, repeat=repeat):
        assert torch.equal(greedy(base, inputs, **options), torch.cat(wanted))
    with model.route(rows, batch_first=True):
        run(
            base,
            {
                **inputs,
                **(
                    {"decoder_input_ids": torch.ones(3, 2).long()}
                    if name in ("t5", "whisper")
                    else {}
                ),
            },
        )
    assert "generate" not in vars(base)
    assert "_expand_inputs_for_generation" not in vars(base)


def test_sampled_sequences_of_a_row_come_from_its_own_path() -> None:
    """With the temperature at nearly nothing a sample is the greedy choice."""
    arch = ARCHS["llama"]
    base = arch.base()
    tree = arch.tree(base)
    rows: list[lt.Blend] = ["a/d", "a/b/c"]
    inputs = prompts(arch, 2)
    model = lt.attach(tree, base)
    options = dict(do_sample=True, temperature=1e-4, num_return_sequences=3)
    with model.route(rows):
        got = greedy(base, inputs, **options)
        with pytest.raises(BaseMismatch, match="route is for 2 rows"):  # no longer generate's doing
            run(base, {n: t.repeat_interleave(3, 0) for n, t in inputs.items()})
    for row, blend in enumerate(rows):
        one = {n: t[row : row + 1] for n, t in inputs.items()}
        wanted = greedy(dense(base, tree, coefficients(blend)), one)
        assert torch.equal(got[3 * row : 3 * row + 3], wanted.expand(3, -1))


def test_a_left_padded_batch_is_its_rows_alone() -> None:
    arch = ARCHS["llama"]
    base = arch.base()
    tree = arch.tree(base)
    rows: list[lt.Blend] = ["a/b/c", "a/d", ""]
    ids = batch_of(arch, 3)["input_ids"]
    mask = torch.ones_like(ids)
    for row, padding in enumerate((2, 0, 1)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    model = lt.attach(tree, base)
    with model.route(rows):
        got = greedy(base, {"input_ids": ids, "attention_mask": mask})
    for row, (blend, padding) in enumerate(zip(rows, (2, 0, 1), strict=True)):
        alone = greedy(
            dense(base, tree, coefficients(blend)), {"input_ids": ids[row : row + 1, padding:]}
        )
        assert torch.equal(got[row : row + 1, padding:], alone)


def test_a_stacked_preference_batch_goes_by_its_rows() -> None:
    """Chosen and rejected completions one below the other, as preference training stacks them."""
    arch = ARCHS["llama"]
    base = arch.base()
    tree = arch.tree(base)
    rows: list[lt.Blend] = ["a/b/c", "", "a/d"]
    both = {
        n: torch.cat([a, b])
        for (n, a), b in zip(batch_of(arch, 3).items(), batch_of(arch, 3, 6).values(), strict=True)
    }
    wanted = rows_by_hand(base, tree, both, rows * 2)
    model = lt.attach(tree, base)
    with model.route(rows, tile=2):
        assert_close(run(base, both), wanted)


# ---------------------------------------------------------------------- key/value caches
def test_a_cache_goes_on_only_under_the_path_that_filled_it() -> None:
    arch = ARCHS["llama"]
    base = arch.base()
    tree = arch.tree(base)
    ids = batch_of(arch, 2)["input_ids"]
    rows: list[lt.Blend] = ["a/b/c", "a/d"]
    model = lt.attach(tree, base)

    def fill() -> DynamicCache:
        cache = DynamicCache(config=base.config)
        base(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache

    def go_on(cache: DynamicCache) -> Tensor:
        logits: Tensor = base(input_ids=ids[:, :1], past_key_values=cache).logits
        return logits

    whole = torch.cat([ids, ids[:, :1]], 1)
    with torch.no_grad():
        bare = fill()
        with model.route(rows):
            wanted = base(input_ids=whole).logits[:, -1:]
            routed = fill()
            assert_close(go_on(copy.deepcopy(routed)), wanted)  # a copy is as good
            own = base(
                input_ids=ids, use_cache=True
            ).past_key_values  # one that the base made itself
            assert_close(go_on(own), wanted)
            for _ in range(2):  # refusing it does not make it ours
                with pytest.raises(StateError, match="filled under another path"):
                    go_on(bare)
        with (
            model.route(list(reversed(rows))),
            pytest.raises(StateError, match="filled under another path"),
        ):
            go_on(copy.deepcopy(routed))
        with model.using("a/d", mode="unmerged"):
            with pytest.raises(StateError, match="filled under another path"):
                go_on(copy.deepcopy(routed))
            single = fill()
        with model.using("a/d", mode="unmerged"):
            go_on(single)  # the same path again
        with model.route(rows):
            assert_close(go_on(routed), wanted)
    assert model.epoch > 0


# ---------------------------------------------------------------------- gradient checkpointing
class Deep(nn.Module):
    """Layers that are checkpointed, of one kind or the other."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            block = lambda x, layer=layer: torch.tanh(layer(x))  # noqa: E731
            x = (
                block(x)
                if self.reentrant is None
                else checkpoint(block, x, use_reentrant=self.reentrant)
            )
        return x


def deep(reentrant: bool | None) -> tuple[Deep, lt.TreeModel]:
    torch.manual_seed(0)
    base = Deep(reentrant).double()
    tree = lt.AdapterTree()
    for path in ("a", "a/b", "a/c"):
        factors = {
            f"layers.{i}": (torch.randn(2, 8).double(), torch.randn(8, 2).double())
            for i in range(3)
        }
        tree.add(
            path, adapter=lt.Adapter({n: lt.LowRank(A, B, 0.3) for n, (A, B) in factors.items()})
        )
    model = lt.attach(tree, base)
    model.trainable("a", "a/b")
    return base, model


def gradients(model: lt.TreeModel) -> list[Tensor]:
    found = [p.grad for p in model.factors.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_layers_have_the_gradients_of_plain_ones(reentrant: bool) -> None:
    x = torch.randn(3, 4, 8).double()
    found = []
    for kind in (None, reentrant):
        _, model = deep(kind)
        inputs = x.clone().requires_grad_()
        with model.route(["a/b", "a/c", ""]):
            model(inputs).square().sum().backward()
        assert inputs.grad is not None
        found.append([inputs.grad, *gradients(model)])
    assert len(found[0]) == 13
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_layers_that_are_recomputed_on_another_thread_see_the_same_paths(reentrant: bool) -> None:
    """As on CUDA, where autograd recomputes on threads of its own: nothing of a route is
    thread-local.
    """
    x = torch.randn(3, 4, 8).double()
    found = []
    for elsewhere in (False, True):
        _, model = deep(reentrant)
        with model.route(["a/b", "a/c", ""]):
            loss = model(x.clone().requires_grad_()).square().sum()
            if elsewhere:
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join(timeout=60)
                assert not thread.is_alive()
            else:
                loss.backward()
        found.append(gradients(model))
    assert len(found[0]) == 12
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("left_for", ["bare", "another route", "another path"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_backward_that_would_run_checkpointed_layers_without_their_path_is_refused(
    reentrant: bool, left_for: str
) -> None:
    _, model = deep(reentrant)
    x = torch.randn(3, 4, 8).double().requires_grad_()
    with model.route(["a/b", "a/c", ""]):
        loss = model(x).square().sum()
    match left_for:
        case "another route":
            with (
                model.route(["a/c", "a/b", ""]),
                pytest.raises(StateError, match="whose path is no longer active"),
            ):
                loss.backward()
        case "another path":
            with (
                model.using("a/b", mode="unmerged"),
                pytest.raises(StateError, match="whose path is no longer active"),
            ):
                loss.backward()
        case _:
            with pytest.raises(StateError, match="whose path is no longer active"):
                loss.backward()
    assert not gradients(model)


def test_without_checkpointing_backward_may_come_after_the_context() -> None:
    found = []
    for inside in (True, False):
        _, model = deep(None)
        x = (
            torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
            .double()
            .requires_grad_()
        )
        with model.route(["a/b", "a/c", ""]):
            loss = model(x).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert found[0]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_transformers_model_with_checkpointing_trains_routed(reentrant: bool) -> None:
    arch = ARCHS["llama"]
    found = []
    for checkpointing in (False, True):
        base: Any = arch.base().train()
        tree = arch.tree(base)
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        inputs = batch_of(arch, 3)
        model = lt.attach(tree, base)
        model.trainable("a", "a/d")
        with model.route(["a/d", "", "a/b/c"]):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append(gradients(model))
    assert len(found[0]) == len(found[1]) > 20
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)


def test_through_a_part_of_a_base_checkpointed_layers_train_as_plain_ones_or_not_at_all() -> None:
    arch = ARCHS["llama"]
    found = []
    for checkpointing in (False, True):
        base: Any = arch.base().train()
        tree = arch.tree(base)
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})
        ids = batch_of(arch, 3)["input_ids"]
        model = lt.attach(tree, base)
        model.trainable("a", "a/d")
        with model.route(["a/d", "", "a/b/c"]):
            base.model(ids).last_hidden_state.square().sum().backward()
        found.append(gradients(model))
        if checkpointing:
            for first, then in (("a/d", "a"), ("a", "a/d")):
                with model.using(first, mode="unmerged"):
                    loss = base.model(ids).last_hidden_state.square().sum()
                with (
                    model.using(then, mode="unmerged"),
                    pytest.raises((StateError, CheckpointError)),
                ):
                    loss.backward()
                assert not gradients(model)
            same = tree.adapter("a/d")
            assert same is not None
            tree.add("a/like-d", adapter=same.with_tensors(lambda t: t.detach() * 2))
            model.trainable("a/d", "a/like-d")
            with model.using("a/d", mode="unmerged"):
                loss = base.model(ids).last_hidden_state.square().sum()
            with (
                model.using("a/like-d", mode="unmerged"),
                pytest.raises(StateError, match="whose path is no longer active"),
            ):
                loss.backward()  # of the same shapes, which torch itself would not notice
    assert len(found[0]) == len(found[1]) > 20
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)


def test_a_merged_switch_between_forward_and_backward_is_noticed_by_autograd() -> None:
    """Writes to weights move the version counters that autograd compares."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    tree = lt.AdapterTree()
    tree.add(
        "a",
        adapter=lt.Adapter({n: lt.LowRank(torch.ones(1, 8), torch.ones(8, 1)) for n in ("0", "2")}),
    )
    model = lt.attach(tree, base)
    loss = base(torch.randn(2, 8, requires_grad=True)).sum()
    model.activate("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------- architectures whose rows do not come first
def test_a_time_first_architecture_is_refused_whatever_the_shape() -> None:
    """XLNet computes in (tokens, rows, features); its adapters can be activated, not routed."""
    config = XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=1, n_head=4, d_inner=48)
    base = XLNetModel(config).eval()
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=["layer_1", "layer_2"]))
    for path in ("a", "b"):
        tree.add(path)
    model = lt.attach(tree, base)
    for rows, tokens in ((4, 4), (4, 6), (6, 3), (3, 6)):
        ids = torch.randint(3, VOCAB, (rows, tokens))
        with (
            pytest.raises(BaseMismatch, match=r"layer_1: its input is"),
            model.route((["a", "b"] * rows)[:rows]),
        ):
            base(ids)


def test_a_windowed_architecture_is_refused() -> None:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4
    )
    base = SwinModel(config).eval()
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=sorted({"query", "q_proj"} & names)))
    for path in ("a", "b"):
        tree.add(path)
    model = lt.attach(tree, base)
    with (
        pytest.raises(BaseMismatch, match=r"its input is \(8, .* first axis should be 2 rows"),
        model.route(["a", "b"]),
    ):
        base(torch.randn(2, 3, 16, 16))
