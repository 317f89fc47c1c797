"""Fused experts beside their weights: each model's own code and grouping, forward and gradients, routed and trained.

What is compared with is a copy of the base with W + Σ c·s·B·A written out by hand into the fused
parameters.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import PeftModel
from safetensors.torch import load_file
from sampling import slow
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.demo.bytelevel import save_base
from lora_tree.errors import BaseMismatch, MergedOnly, StateError
from lora_tree.integrations.transformers import TreeTrainer

VOCAB, HIDDEN, WIDE, EXPERTS = 31, 16, 24, 4
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
PATHS = {"a": 0.7, "a/b": 1.0, "a/b/c": -1.3, "a/d": 1.0}
ROWS: list[lt.Blend] = ["a/b/c", "", "a/d", {"a/b/c": 0.25, "a/d": 0.75}, "a"]


@dataclass(frozen=True)
class Model:
    """A tiny mixture of experts.

    raw: the ends of the parameters that its adapters change; modules: of the modules.
    implementations: the ways in which transformers runs its experts.
    rounds: its router or its positions are computed in fp32 whatever the base's dtype.
    """

    make: Callable[[], T.PreTrainedModel]
    raw: tuple[str, ...]
    modules: tuple[str, ...] = ("q_proj",)
    implementations: tuple[str, ...] = ("eager", "batched_mm", "grouped_mm")
    rounds: bool = False

    def base(self, implementation: str, dtype: torch.dtype = torch.float64) -> Any:
        torch.manual_seed(0)
        base: Any = self.make().eval()
        if len(self.implementations) > 1:
            base.set_experts_implementation(implementation)
        for p in base.parameters():
            with torch.no_grad():
                p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 3))
        # torch's grouped product takes no float64
        return base.to(torch.float32 if implementation == "grouped_mm" else dtype)

    def tree(self, base: nn.Module, dtype: torch.dtype | None = None) -> lt.AdapterTree:
        """Fresh adapters, then A and B drawn at random."""
        dtype = dtype or next(base.parameters()).dtype
        targets: dict[str, Any] = {"target_parameters": list(self.raw)}
        if self.modules:
            targets["target_modules"] = list(self.modules)
        tree = lt.AdapterTree(defaults=dict(r=3, lora_alpha=4, **targets))
        for i, (path, weight) in enumerate(PATHS.items()):
            tree.add(path, weight=weight, r=2 + i)
        lt.attach(tree, base).detach()
        torch.manual_seed(1)
        for path in PATHS:
            adapter = tree.adapter(path)
            assert adapter is not None
            tree.update(path, adapter=adapter.map(lambda v: drawn(v, dtype)))
        return tree


def drawn(v: lt.LowRank, dtype: torch.dtype) -> lt.LowRank:
    A = torch.randn(v.A.shape) / (v.A.shape[-1] * v.rank) ** 0.5
    return lt.LowRank(A.to(dtype), torch.randn(v.B.shape).to(dtype), v.scale, None, v.layout)


def llama4() -> T.PreTrainedModel:
    config = T.Llama4TextConfig(
        **TEXT, intermediate_size_mlp=WIDE, num_local_experts=EXPERTS, num_experts_per_tok=1,
        interleave_moe_layer_step=1, attention_chunk_size=8,
    )  # fmt: skip
    return T.Llama4ForCausalLM(config)


def qwen3_next() -> T.PreTrainedModel:
    config = T.Qwen3NextConfig(
        **TEXT, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=WIDE, decoder_sparse_step=1,
        shared_expert_intermediate_size=WIDE, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["full_attention", "linear_attention"],
    )  # fmt: skip
    return T.Qwen3NextForCausalLM(config)


def dbrx() -> T.PreTrainedModel:
    config = T.DbrxConfig(
        d_model=HIDDEN, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=VOCAB,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": WIDE, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": HIDDEN},
    )  # fmt: skip
    return T.DbrxForCausalLM(config)


GROUPED = dict(n_routed_experts=EXPERTS, num_experts_per_tok=2, n_group=1, topk_group=1)
FUSED = ("experts.gate_up_proj", "experts.down_proj")

MODELS: dict[str, Model] = {
    "mixtral": Model(
        lambda: T.MixtralForCausalLM(T.MixtralConfig(**TEXT, num_local_experts=EXPERTS)), (*FUSED, "gate.weight")
    ),
    "qwen3": Model(
        lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**TEXT, num_experts=EXPERTS, num_experts_per_tok=2,
            moe_intermediate_size=WIDE, decoder_sparse_step=1)),
        FUSED,
    ),
    "gpt-oss": Model(  # transposed, interleaved, with biases
        lambda: T.GptOssForCausalLM(T.GptOssConfig(**TEXT, num_local_experts=EXPERTS, num_experts_per_tok=2)), FUSED
    ),
    "deepseek": Model(
        lambda: T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**{**TEXT, "num_key_value_heads": 2}, **GROUPED,
            moe_intermediate_size=WIDE, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8)),
        FUSED, ("kv_b_proj", "shared_experts.up_proj"), rounds=True,
    ),
    "glm4": Model(
        lambda: T.Glm4MoeForCausalLM(T.Glm4MoeConfig(**TEXT, **GROUPED, moe_intermediate_size=WIDE,
            first_k_dense_replace=0)),
        FUSED, rounds=True,
    ),
    "olmoe": Model(
        lambda: T.OlmoeForCausalLM(T.OlmoeConfig(**TEXT, num_experts=EXPERTS, num_experts_per_tok=2)),
        FUSED,
    ),
    "llama4": Model(
        llama4, FUSED, ("q_proj", "shared_expert.up_proj", "shared_expert.down_proj"), ("eager",), rounds=True
    ),
    "qwen3-next": Model(
        qwen3_next, FUSED, ("shared_expert.gate_proj", "shared_expert.down_proj", "shared_expert_gate"), rounds=True
    ),
    # Its attention is left alone: with other inputs the router would send other tokens along with a
    # bare row's, and the bits of the base's own product depend on how many there are.
    "dbrx": Model(dbrx, ("mlp.w1", "mlp.v1", "mlp.w2"), (), ("eager",)),
}  # fmt: skip

EACH = [(name, way) for name, model in MODELS.items() for way in model.implementations]
every_way = pytest.mark.parametrize(("name", "way"), EACH, ids=[" ".join(each) for each in EACH])


def coefficients(blend: lt.Blend) -> dict[str, float]:
    weights = {blend: 1.0} if isinstance(blend, str) else dict(blend)
    found: dict[str, float] = {}
    for path, weight in weights.items():
        for node in PATHS:
            if f"{path}/".startswith(f"{node}/"):
                found[node] = found.get(node, 0.0) + weight
    return {node: share * PATHS[node] for node, share in found.items()}


Leaves = dict[tuple[str, str], tuple[Tensor, Tensor]]


def weights_of(
    base: nn.Module, tree: lt.AdapterTree, blend: lt.Blend, leaves: Leaves | None = None
) -> dict[str, Tensor]:
    """Parameter → its numbers with a path added, in the base's own dtype."""
    found: dict[str, Tensor] = {}
    names = dict(base.named_parameters())
    for node, coefficient in coefficients(blend).items():
        adapter = tree.adapter(node)
        assert adapter is not None
        for name, v in adapter.modules.items():
            A, B = (v.A, v.B) if leaves is None else leaves[node, name]
            delta = coefficient * v.scale * (B.double() @ A.double())
            where = name if name in names else f"{name}.weight"
            weight = names[where].detach()
            if weight.ndim == 2 and delta.ndim == 3:
                delta = delta[0]
            holder = base.get_submodule(name.rpartition(".")[0])
            if weight.ndim == 3 and getattr(holder, "is_transposed", False):
                delta = delta.mT
            found[where] = found.get(where, weight.double()) + delta
    return {name: weight.to(names[name].dtype) for name, weight in found.items()}


def dense(base: nn.Module, tree: lt.AdapterTree, blend: lt.Blend, given: Tensor) -> Tensor:
    """The logits of the base with a path in its weights."""
    options = {"use_cache": False}
    weights = weights_of(base, tree, blend)
    out: Tensor = torch.func.functional_call(base, weights, (given,), options).logits
    return out


def ids(rows: int = len(ROWS), tokens: int = 7) -> Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(3))


def logits(model: Any, given: Tensor) -> Tensor:
    out: Tensor = model(given, use_cache=False).logits
    return out


def assert_close(got: Tensor, wanted: Tensor, name: str) -> None:
    """Numbers are around 5: another order of the sums moves them by 1e-13 in float64, 1e-5 in fp32, and by one
    rounding to fp32 where the model makes one.
    """
    within = 1e-6 if MODELS[name].rounds else 1e-9
    torch.testing.assert_close(
        got, wanted, rtol=0, atol=within if got.dtype == torch.float64 else 2e-4
    )


def no_trace(base: nn.Module) -> None:
    for module in base.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@every_way
@torch.no_grad()
def test_a_path_and_a_batch_of_paths_are_those_of_the_dense_weights(name: str, way: str) -> None:
    base = MODELS[name].base(way)
    tree = MODELS[name].tree(base)
    given = ids()
    before = {n: p.clone() for n, p in base.state_dict().items()}
    bare = logits(base, given)
    wanted = [dense(base, tree, blend, given[i : i + 1]) for i, blend in enumerate(ROWS)]
    model = lt.attach(tree, base)
    model.activate("a/b/c", mode="unmerged")
    assert_close(logits(base, given[:1]), wanted[0], name)
    model.deactivate()
    with model.route(ROWS):
        got = logits(base, given)
    assert_close(got, torch.cat(wanted), name)
    assert torch.equal(got[1], bare[1])
    assert (got[0] - bare[0]).abs().max() > 0.1
    no_trace(base)
    assert all(torch.equal(p, before[n]) for n, p in base.state_dict().items())
    assert torch.equal(logits(base, given), bare)


# ---------------------------------------------------------------------- gradients
def with_leaves(tree: lt.AdapterTree) -> Leaves:
    """(node, module) → A and B as leaves."""
    found = {}
    for node in PATHS:
        adapter = tree.adapter(node)
        assert adapter is not None
        for name, v in adapter.modules.items():
            found[node, name] = tuple(t.detach().clone().requires_grad_() for t in (v.A, v.B))
    return found  # type: ignore[return-value]


GRADIENTS = [
    ("mixtral", "eager"), ("qwen3", "grouped_mm"), ("qwen3", "batched_mm"), ("gpt-oss", "eager"),
    ("gpt-oss", "grouped_mm"), ("gpt-oss", "batched_mm"), ("llama4", "eager"), ("qwen3-next", "batched_mm"),
    ("dbrx", "eager"),
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(("name", "way"), GRADIENTS, ids=[" ".join(each) for each in GRADIENTS])
def test_factors_and_input_have_the_gradients_of_the_dense_sum(
    name: str, way: str, checkpointing: bool
) -> None:
    if checkpointing and (name, way) not in GRADIENTS[1:4]:
        return
    base = MODELS[name].base(way).requires_grad_(False)
    tree = MODELS[name].tree(base)
    leaves = with_leaves(tree)
    given = base.get_input_embeddings()(ids()).detach()
    wanted_x, x = (given.clone().requires_grad_() for _ in range(2))
    g = torch.randn(len(ROWS), given.shape[1], VOCAB, dtype=given.dtype)
    for row, blend in enumerate(ROWS):
        weights = weights_of(base, tree, blend, leaves)
        inputs = {"inputs_embeds": wanted_x[row : row + 1], "use_cache": False}
        out = torch.func.functional_call(base, weights, (), inputs).logits
        out.backward(g[row : row + 1])
    model = lt.attach(tree, base)
    model.trainable("a", "a/b/c", "a/d", dtype=None)
    if checkpointing:
        base.train()
        base.activation_checkpointing_enable()
    with model.route(ROWS):
        base(inputs_embeds=x, use_cache=False).logits.backward(g)
    assert x.grad is not None and wanted_x.grad is not None  # noqa: PT018
    close(x.grad, wanted_x.grad, name)
    for (node, module), (A, B) in leaves.items():
        v = tree.adapter(node).modules[module]  # type: ignore[union-attr]
        if node == "a/b":
            assert v.A.grad is None
            continue
        for factor, leaf in ((v.A, A), (v.B, B)):
            assert factor.grad is not None and leaf.grad is not None  # noqa: PT018
            close(factor.grad, leaf.grad, name)
    assert all(p.grad is None for p in base.parameters())


def close(got: Tensor, wanted: Tensor, name: str) -> None:
    """`assert_close` for gradients, which are up to a hundred."""
    scale = max(1.0, float(wanted.detach().abs().max()))
    assert_close(got / scale, wanted / scale, name)


# ---------------------------------------------------------------------- memory
class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made: the numbers of new memory, not of views."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.of = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if (
                isinstance(t, Tensor)
                and t.untyped_storage().data_ptr() not in given
                and t.numel() > self.numel
            ):
                self.numel, self.of = t.numel(), str(func)
        return out


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_no_tensor_as_large_as_the_experts_is_made(way: str) -> None:
    """64 experts of (48, 32), and a batch that is far smaller."""
    torch.manual_seed(0)
    config = T.Qwen3MoeConfig(
        **{**TEXT, "hidden_size": 32}, num_experts=64, num_experts_per_tok=2, moe_intermediate_size=WIDE,
        decoder_sparse_step=1,
    )  # fmt: skip
    base = T.Qwen3MoeForCausalLM(config)
    base.set_experts_implementation(way)
    tree = lt.AdapterTree(defaults=dict(r=2, target_parameters=list(FUSED)))
    for path in ("a", "a/b", "c"):
        tree.add(path)
    model = lt.attach(tree, base)
    model.trainable("a/b", "c")
    given = torch.randint(0, VOCAB, (3, 5))
    dense_numbers = 64 * 2 * WIDE * 32
    with Largest() as largest, model.route(["a/b", "c", ""]):
        base(given, use_cache=False).logits.sum().backward()
    assert largest.numel < dense_numbers / 4, largest.of
    model.trainable()
    with Largest() as largest, model.using("a/b", mode="unmerged"):
        base(given, use_cache=False)
    assert largest.numel < dense_numbers / 4, largest.of


# ---------------------------------------------------------------------- PEFT
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", ["mixtral", "qwen3", "gpt-oss"])
def test_a_trained_path_is_what_peft_computes_and_saves(name: str, tmp_path: Path) -> None:
    base = MODELS[name].base("eager")
    tree = MODELS[name].tree(base)
    given = ids(2)
    adapter = tree.adapter("a")
    assert adapter is not None
    adapter.save(tmp_path / "a")
    peft = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "a", is_trainable=True
    ).double()
    wanted = peft(given, use_cache=False).logits
    g = torch.randn_like(wanted)
    wanted.backward(g)
    flat = lt.AdapterTree()
    flat.add("a", adapter=adapter)
    model = lt.attach(flat, base)
    model.trainable("a", dtype=None)
    with model.using("a", mode="unmerged"):
        got = base(given, use_cache=False).logits
        got.backward(g)
    close(got, wanted, name)
    # The same names, and gradients that PEFT would have stepped along.
    theirs = {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}
    trained = flat.adapter("a")
    assert trained is not None
    moved = trained.map(lambda v: lt.LowRank(v.A.grad, v.B.grad, v.scale, None, v.layout))  # type: ignore[arg-type]
    moved.save(tmp_path / "moved")
    ours = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    assert len(theirs) == len(ours)
    for key, grad in ours.items():
        mine = theirs[key.replace(".weight", ".default.weight")]
        close(grad, mine, name)


# -------------------------------------------------------- what leaves no trace, and what is refused
def small(way: str = "eager") -> tuple[Any, Any, Tensor]:
    base = MODELS["qwen3"].base(way)
    return base, lt.attach(MODELS["qwen3"].tree(base), base), ids()


def test_a_forward_that_is_interrupted_leaves_nothing_that_watches() -> None:
    base, model, given = small()
    experts = base.model.layers[0].mlp.experts
    model.activate("a", mode="unmerged")
    wanted = logits(base, given)
    handle = experts.act_fn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(base, given)
    handle.remove()
    assert _len_torch_function_stack() == 0
    torch.testing.assert_close(logits(base, given), wanted)
    model.deactivate()
    no_trace(base)


def interrupt(*args: Any) -> Tensor:
    raise KeyboardInterrupt


def test_a_copy_of_an_active_base_is_refused_in_its_first_forward() -> None:
    base, model, given = small()
    model.activate("a", mode="unmerged")
    with pytest.raises(StateError, match="this is a copy of a base"):
        logits(copy.deepcopy(base), given)
    model.deactivate()
    no_trace(base)


class Uses(nn.Module):
    """A parameter that is used in some way."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.use, self.w = use, nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w)


class Squared(torch.autograd.Function):
    """A product with a backward of its own, which knows of no factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.saved_tensors[0].mT, None


def using(use: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Any]:
    base = nn.Sequential(Uses(use))
    value = lt.LowRank(torch.randn(1, 2, 8), torch.randn(1, 8, 2), layout=lt.Layout("parameter"))
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"0.w": value}))
    return base, lt.attach(tree, base)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "exp": (lambda x, w: x @ w.exp(), "torch.Tensor.exp"),
    "added": (lambda x, w: x + w[:4], "torch.Tensor.add"),
    "two weights": (lambda x, w: x @ (w @ w), "torch.Tensor.matmul"),
    "flattened": (lambda x, w: x * w.view(-1)[:8], "torch.Tensor.view"),
    "stacked": (lambda x, w: x @ torch.cat([w, w], 1), "torch.cat"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_product_is_refused_by_the_name_of_the_function(name: str) -> None:
    use, function = REFUSED[name]
    base, model = using(use)
    x = torch.randn(4, 8)
    bare = base(x)
    model.activate("a", mode="unmerged")
    with pytest.raises(MergedOnly, match=rf"0\.w: can't run unmerged: Uses gives it to {function}"):
        base(x)
    model.activate("a")
    assert not torch.equal(base(x), bare)
    model.deactivate()
    assert torch.equal(base(x), bare)


def test_a_product_that_autograd_does_not_record_is_refused_while_nodes_train() -> None:
    base, model = using(Squared.apply)
    x = torch.randn(4, 8, requires_grad=True)
    with model.using("a", mode="unmerged"):
        base(x)
    model.trainable("a")
    message = "0.w: Uses multiplies with it where autograd does not record"
    with pytest.raises(StateError, match=message), model.using("a", mode="unmerged"):
        base(x)


def test_a_prepared_model_runs_no_experts() -> None:
    _, model, _ = small()
    model.prepare(max_rank=16)
    with pytest.raises(MergedOnly, match=r"experts\.\w+: can't run in a prepared model"):
        model.activate("a", mode="unmerged")
    model.activate("a")


@slow
def test_a_forward_that_is_compiled_goes_on_only_if_it_is_merged() -> None:
    base, model, given = small()
    compiled = torch.compile(base, backend="eager")
    with torch.no_grad():
        logits(compiled, given)
    with pytest.raises(StateError, match="compiled"):
        model.activate("a", mode="unmerged")
    with torch.no_grad(), model.using("a"):
        torch.testing.assert_close(logits(compiled, given), logits(base, given))


# ---------------------------------------------------------------------- dtypes
@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 base", "autocast"])
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_narrow_bases_and_autocast_stay_within_their_rounding(way: str, autocast: bool) -> None:
    model = MODELS["qwen3"]
    base = model.base(way).float()
    tree = model.tree(base, torch.float32)
    given = ids()
    exact = [dense(base, tree, blend, given[i : i + 1]) for i, blend in enumerate(ROWS)]
    if not autocast:
        base = base.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bare = logits(base, given)
        with lt.attach(tree, base).route(ROWS):
            got = logits(base, given)
    assert torch.equal(got[1], bare[1])
    off = (got.float() - torch.cat(exact)).abs().flatten(1).median(1).values
    # A router that chooses another expert for a token, rightly so in bf16, moves that token's
    # numbers by far.
    assert (off < 0.1).all(), off


# ---------------------------------------------------------------------- rows
@torch.no_grad()
def test_stacked_and_repeated_rows_and_generated_tokens_know_their_path() -> None:
    base, model, given = small()
    rows: list[lt.Blend] = ["a/b/c", "", "a/d"]
    given = given[:3]
    with model.route(rows):
        alone = logits(base, given)
        tokens = base.generate(given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with model.route(rows, tile=2):
        torch.testing.assert_close(logits(base, given.repeat(2, 1)), alone.repeat(2, 1, 1))
    with model.route(rows, repeat=2):
        twice = logits(base, given.repeat_interleave(2, 0))
    torch.testing.assert_close(twice, alone.repeat_interleave(2, 0))
    for row, blend in enumerate(rows):
        with model.using(blend):
            mine = base.generate(
                given[row : row + 1], max_new_tokens=4, do_sample=False, pad_token_id=0
            )
        assert torch.equal(tokens[row], mine[0])


class ListedExperts(nn.Module):
    """A layer as models had it before transformers 5: a module for each expert, and tokens sent
    there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return x + out.view(x.shape)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ListedExperts() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("tokens", [7, len(ROWS)])
def test_experts_with_a_module_each_are_routed_where_their_layer_is_given_rows(tokens: int) -> None:
    torch.manual_seed(0)
    base = Listed().double()
    names = [f"layers.{i}.experts.{e}" for i in range(2) for e in range(3)] + ["layers.0.gate"]
    tree = lt.AdapterTree()
    for path, weight in PATHS.items():
        modules = {}
        for name in names:
            out = 3 if name.endswith("gate") else 8
            modules[name] = lt.LowRank(torch.randn(2, 8).double(), torch.randn(out, 2).double() / 3)
        tree.add(path, adapter=lt.Adapter(modules), weight=weight)
    x = torch.randn(len(ROWS), tokens, 8, dtype=torch.float64)
    model = lt.attach(tree, base)
    wanted = []
    for row, blend in enumerate(ROWS):
        with model.using(blend):
            wanted.append(base(x[row : row + 1]))
    if tokens == len(ROWS):
        with (
            pytest.raises(BaseMismatch, match=r"first axis should be 5 rows|5 rows, or tokens"),
            model.route(ROWS),
        ):
            base(x)
    with model.route(ROWS, batch_first=True):
        torch.testing.assert_close(base(x), torch.cat(wanted), rtol=1e-10, atol=1e-10)
    no_trace(base)


# ---------------------------------------------------------------------- training many nodes
TRAINED = ["a/b", "c", "a", ""]


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_a_tree_over_experts_trains_with_the_trainer_and_from_the_shell(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = MODELS[name].base("grouped_mm")
    tree = lt.AdapterTree(
        defaults=dict(r=2, target_parameters=list(FUSED), target_modules=["q_proj"])
    )
    for path in ("a", "a/b", "c"):
        tree.add(path)
    model = lt.attach(tree, base)
    rows = [
        dict(path=TRAINED[i % 4], input_ids=row.tolist(), labels=row.tolist())
        for i, row in enumerate(ids(8, 6))
    ]
    args = T.TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=3, learning_rate=0.01, report_to=[],
        disable_tqdm=True, use_cpu=True, save_steps=3, logging_steps=1,
    )  # fmt: skip
    groups = model.trainable("a/b", "c")
    trainer = TreeTrainer(model, args, groups=groups, train_dataset=rows, save_to=tmp_path / "zoo")
    trainer.train()
    for path in ("a/b", "c"):
        adapter = tree.adapter(path)
        assert adapter is not None
        moved = [n for n, v in adapter.modules.items() if float(v.B.detach().abs().max()) > 0]
        assert len(moved) == 6, moved
    model.detach()
    opened = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "zoo" / "c").eval()
    given = ids(2, 6)
    with torch.no_grad(), lt.attach(lt.load(tmp_path / "zoo"), base).using("c", mode="unmerged"):
        close(logits(base, given), logits(opened, given), name)

    torch.manual_seed(0)
    wide = MODELS[name].make()
    config = type(wide.config)(**{**wide.config.to_dict(), "vocab_size": 257})
    save_base(type(wide)(config), tmp_path / "base")
    spec = {
        "version": 1, "base": str(tmp_path / "base"),
        "defaults": {"r": 2, "target_parameters": list(FUSED)}, "tree": {"fr": {"children": {"legal": {}}}, "de": {}},
    }  # fmt: skip
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "tree.yaml").write_text(json.dumps(spec))
    lines = [json.dumps({"path": ("fr/legal", "de")[i % 2], "text": f"row {i}"}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(
            [
                "train",
                str(shop),
                "--data",
                str(tmp_path / "rows.jsonl"),
                "--steps",
                "2",
                "--batch",
                "4",
                "--json",
            ]
        )
    assert not left.value.code
    told = json.loads(capsys.readouterr().out)
    assert (told["nodes"], told["steps"]) == (["de", "fr/legal"], 2)
    saved = load_file(shop / "fr" / "legal" / "adapter_model.safetensors")
    assert any(n.endswith("experts.lora_B.weight") and t.abs().max() > 0 for n, t in saved.items())


def test_what_overflows_in_a_factor_of_another_row_is_masked_and_not_multiplied_by_zero() -> None:
    base = nn.Sequential(Uses(nn.functional.linear))
    tree = lt.AdapterTree()
    for path, size in (("a", 1.0), ("b", 1e30)):
        A, B = torch.ones(1, 2, 8) * size, torch.ones(1, 8, 2) / size
        value = lt.LowRank(A, B, layout=lt.Layout("parameter"))
        tree.add(path, adapter=lt.Adapter({"0.w": value}), weight=0.5)
    x = torch.ones(2, 3, 8)
    x[0] *= 1e20  # b's product of this row is over the largest number of fp32
    model = lt.attach(tree, base)
    with model.using("a"):
        wanted = base(x[:1])
    with model.route(["a", "b"]):
        got = base(x)
    torch.testing.assert_close(got[:1], wanted)
    assert bool(got.isfinite().all())
