"""Names of an earlier transformers, and of the model without its head: bound to today's modules, or
refused.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import dense, low_rank
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from shell import Shell
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch
from lora_tree.export.unloaded_base import skeleton
from lora_tree.lowrank import EMBEDDING, LINEAR, PARAMETER
from lora_tree.renaming import Renaming

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # said of raw parameters, whose patterns PEFT does use
    pytest.mark.filterwarnings(
        r"ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning:peft"
    ),
]
HIDDEN, WIDE, EXPERTS = 16, 12, 4
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
Deltas = dict[str, Tensor]


# ---------------------------------------------------------------------- the architectures
def llava() -> nn.Module:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
    }
    config = T.LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_index=60
    )
    return T.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "patch_size": 4,
        "mlp_ratio": 2,
    }
    tokens = {
        f"{name}_token_id": 60 + i
        for i, name in enumerate(("vision_start", "vision_end", "image", "video"))
    }
    return T.Qwen2VLForConditionalGeneration(
        T.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    )


def mixtral() -> nn.Module:
    return T.MixtralForCausalLM(
        T.MixtralConfig(**TEXT, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )


def qwen3_moe() -> nn.Module:
    config = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": WIDE,
        "head_dim": 4,
    }
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**TEXT, **config))


@dataclass(frozen=True)
class Case:
    """An architecture, and what its old names mean today, written down by hand.

    Args:
        old: old names of modules, with the (out, in) of their weights.
        new: names of today, likewise; raw parameters have their experts before.
        today: an old name and its ΔW → the parameter of today and what is added there.
    """

    make: Callable[[], nn.Module]
    old: Mapping[str, tuple[int, int]]
    new: Mapping[str, tuple[int, ...]]
    today: Callable[[str, Tensor], tuple[str, Tensor]]

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        model: Any = self.make().double().eval()
        model.set_experts_implementation("eager")  # the other one takes no float64
        return model  # type: ignore[no-any-return]


def moved(pattern: str, to: str) -> Callable[[str, Tensor], tuple[str, Tensor]]:
    return lambda name, delta: (re.sub(pattern, to, name) + ".weight", delta)


def of_experts(gate: str, up: str, down: str) -> Callable[[str, Tensor], tuple[str, Tensor]]:
    """The block of a fused parameter that an expert's Linear is today."""

    def today(name: str, delta: Tensor) -> tuple[str, Tensor]:
        name = name.replace("block_sparse_moe", "mlp")
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name)
        if found is None:
            return f"{name}.weight", delta
        holder, expert, leaf = found[1], int(found[2]), found[3]
        if leaf == down:
            whole = torch.zeros(EXPERTS, HIDDEN, WIDE, dtype=torch.float64)
            whole[expert] = delta
            return f"{holder}.down_proj", whole
        whole = torch.zeros(EXPERTS, 2 * WIDE, HIDDEN, dtype=torch.float64)
        whole[expert, : WIDE if leaf == gate else None, :][0 if leaf == gate else WIDE :] = delta
        return f"{holder}.gate_up_proj", whole

    return today


def experts(holder: str, gate: str, up: str, down: str) -> dict[str, tuple[int, int]]:
    found = {}
    for expert in range(EXPERTS):
        found[f"{holder}.{expert}.{gate}"] = found[f"{holder}.{expert}.{up}"] = (WIDE, HIDDEN)
        found[f"{holder}.{expert}.{down}"] = (HIDDEN, WIDE)
    return found


ATTENTION = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (8, HIDDEN)}


def attention(prefix: str) -> dict[str, tuple[int, int]]:
    return {f"{prefix}.self_attn.{name}": shape for name, shape in ATTENTION.items()}


FUSED = {"gate_up_proj": (EXPERTS, 2 * WIDE, HIDDEN), "down_proj": (EXPERTS, HIDDEN, WIDE)}
LLAVA_VISION = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
CASES = {
    "llava": Case(
        llava,
        {
            **attention("language_model.model.layers.0"),
            "language_model.model.layers.1.mlp.down_proj": (HIDDEN, WIDE),
            "language_model.lm_head": (64, HIDDEN),
            "multi_modal_projector.linear_1": (HIDDEN, HIDDEN),
        },
        {
            **attention("model.language_model.layers.0"),
            **attention("model.language_model.layers.1"),
        },
        lambda name, delta: moved(r"^language_model\.model", "model.language_model")(
            name.replace("language_model.lm_head", "lm_head").replace(
                "multi_modal", "model.multi_modal"
            ),
            delta,
        ),
    ),
    "qwen2_vl": Case(
        qwen2_vl,
        {
            **attention("model.layers.0"),
            "model.layers.1.mlp.down_proj": (HIDDEN, WIDE),
            "visual.blocks.0.attn.qkv": (48, 16),
        },
        {**attention("model.language_model.layers.0"), "model.visual.blocks.0.attn.qkv": (48, 16)},
        lambda name, delta: moved(r"^model\.layers", "model.language_model.layers")(
            re.sub("^visual", "model.visual", name), delta
        ),
    ),
    "mixtral": Case(
        mixtral,
        {
            **attention("model.layers.0"),
            **experts("model.layers.0.block_sparse_moe.experts", "w1", "w3", "w2"),
            "model.layers.1.block_sparse_moe.gate": (EXPERTS, HIDDEN),
        },
        {
            **attention("model.layers.0"),
            **{f"model.layers.0.mlp.experts.{n}": s for n, s in FUSED.items()},
        },
        of_experts("w1", "w3", "w2"),
    ),
    "qwen3_moe": Case(
        qwen3_moe,
        {
            **attention("model.layers.0"),
            **experts("model.layers.0.mlp.experts", "gate_proj", "up_proj", "down_proj"),
            "model.layers.1.mlp.gate": (EXPERTS, HIDDEN),
        },
        {
            **attention("model.layers.0"),
            **{f"model.layers.0.mlp.experts.{n}": s for n, s in FUSED.items()},
        },
        of_experts("gate_proj", "up_proj", "down_proj"),
    ),
}
MOE = ("mixtral", "qwen3_moe")
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
either_way = pytest.mark.parametrize(
    "parent_is_old", [True, False], ids=["old parent", "new parent"]
)


def adapter(shapes: Mapping[str, tuple[int, ...]], seed: int, r: int = 2) -> lt.Adapter:
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for at, (name, (*batch, out, into)) in enumerate(sorted(shapes.items())):
        rank = r + at % 2  # ranks and scales differ from module to module
        layout = {"layout": PARAMETER} if batch else {}
        modules[name] = low_rank(
            out,
            into,
            rank,
            seed=draw,
            batch=tuple(batch),
            dtype=torch.float64,
            scale=0.1 * (1 + at % 3),
            **layout,
        )
    holders = {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) == 3}
    return lt.Adapter(modules, nesting=dict.fromkeys(holders, ("gate_up_proj", "down_proj")))


def deltas(case: Case, *of: tuple[lt.Adapter, float]) -> Deltas:
    """Parameter of today → what is added to it, dense and in float64."""
    found: Deltas = {}
    for each_adapter, weight in of:
        for name, value in each_adapter.modules.items():
            delta = weight * value.scale * (value.B.double() @ value.A.double())
            is_new = name in case.new
            parameter = name if is_new and delta.ndim == 3 else f"{name}.weight"
            if not is_new:
                parameter, delta = case.today(name, delta)
            found[parameter] = found.get(parameter, 0) + delta
    return found


def merged(base: nn.Module, added: Deltas) -> nn.Module:
    made = copy.deepcopy(base)
    with torch.no_grad():
        for name, delta in added.items():
            made.get_parameter(name).add_(delta)
    return made


def lineage(case: Case, *, parent_is_old: bool) -> tuple[lt.AdapterTree, Deltas]:
    """fr and fr/legal, one in old names and one in today's, and what they add up to."""
    one, other = adapter(case.old, 1), adapter(case.new, 2)
    parent, child = (one, other) if parent_is_old else (other, one)
    tree = lt.AdapterTree()
    tree.add("fr", adapter=parent)
    tree.add("fr/legal", adapter=child, weight=0.5)
    return tree, deltas(case, (parent, 1.0), (child, 0.5))


def close(got: nn.Module, wanted: nn.Module) -> None:
    for (name, x), y in zip(got.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(
            x, y, rtol=1e-9, atol=1e-9, msg=lambda said, name=name: f"{name}: {said}"
        )


def ids() -> Tensor:
    return torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(3))


def dense_of(flat: lt.Adapter) -> Deltas:
    """What an adapter in today's names adds, parameter by parameter."""
    found = {}
    for name, value in flat.modules.items():
        delta = value.dense(dtype=torch.float64)
        raw = value.layout == PARAMETER
        found[name if raw else f"{name}.weight"] = (
            delta[0] if raw and delta.shape[0] == 1 else delta
        )
    return found


def same(got: Deltas, wanted: Deltas, within: float = 1e-9) -> None:
    assert got.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(got[name], delta, rtol=within, atol=within)


# ---------------------------------------------------------------------- attach
@each
@either_way
def test_old_and_new_names_of_a_lineage_add_up_in_the_weights(
    case: Case, parent_is_old: bool
) -> None:
    base = case.base()
    tree, added = lineage(case, parent_is_old=parent_is_old)
    wanted = merged(base, added)
    model = lt.attach(tree, base)
    model.activate("fr/legal")
    close(base, wanted)
    model.detach()


@each
@either_way
def test_old_and_new_names_of_a_lineage_add_up_beside_the_weights(
    case: Case, parent_is_old: bool
) -> None:
    base = case.base()
    tree, added = lineage(case, parent_is_old=parent_is_old)
    wanted = merged(base, added)(input_ids=ids()).logits
    bare = base(input_ids=ids()).logits
    lt.attach(tree, base).activate("fr/legal", mode="unmerged")
    got = base(input_ids=ids()).logits
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert (got - bare).abs().max() > 1e-3


@pytest.mark.parametrize("name", MOE)
def test_experts_without_a_pair_stay_the_base_s_bit_for_bit(name: str) -> None:
    case = CASES[name]
    base = case.base()
    some = {
        n: shape
        for n, shape in case.old.items()
        if re.search(r"experts\.(1\.(w1|gate_proj)|3\.(w2|down_proj))", n)
    }
    assert len(some) == 2
    before = copy.deepcopy(base)
    own = adapter(some, 5)
    tree = lt.AdapterTree()
    tree.add("fr", adapter=own)
    lt.attach(tree, base).activate("fr")
    close(base, merged(before, deltas(case, (own, 1.0))))
    for parameter, touched in (("gate_up_proj", 1), ("down_proj", 3)):
        now, was = (
            m.get_parameter(f"model.layers.0.mlp.experts.{parameter}") for m in (base, before)
        )
        assert [torch.equal(now[i], was[i]) for i in range(EXPERTS)] == [
            i != touched for i in range(EXPERTS)
        ]


@each
def test_both_names_of_a_module_in_one_file_add_up(case: Case) -> None:
    base = case.base()
    one, other = adapter(case.old, 1), adapter(case.new, 2)
    only_new = {name: value for name, value in other.modules.items() if name not in one.modules}
    both = lt.Adapter({**one.modules, **only_new}, nesting=other.nesting)
    wanted = merged(base, deltas(case, (one, 1.0), (lt.Adapter(only_new), 1.0)))
    tree = lt.AdapterTree()
    tree.add("fr", adapter=both)
    lt.attach(tree, base).activate("fr")
    close(base, wanted)


@each
def test_names_that_fall_together_and_do_not_add_up_are_an_error_that_names_both(
    case: Case,
) -> None:
    base = case.base()
    old = next(
        name
        for name in case.old
        if name.endswith(("q_proj", "w1", "gate_proj")) and name not in case.new
    )
    out, into = case.old[old]
    name, _ = case.today(old, torch.zeros(out, into))
    new = name.removesuffix(".weight")
    tree = lt.AdapterTree()
    odd = torch.ones(EXPERTS, 1, into) if "experts" in new else torch.ones(1, into)
    layout = {"layout": PARAMETER} if "experts" in new else {}
    own = lt.LowRank(odd, torch.ones(*odd.shape[:-2], out + 1, 1), **layout)
    tree.add(
        "fr",
        adapter=lt.Adapter({old: lt.LowRank(torch.ones(1, into), torch.ones(out, 1)), new: own}),
    )
    with pytest.raises(lt.errors.LoraTreeError, match=f"fr: {re.escape(new)}") as caught:
        lt.attach(tree, base).activate("fr")
    assert old in str(caught.value)


def opposed(case: Case, one: str, other: str, batch: tuple[int, ...]) -> lt.Adapter:
    """Two names of one module whose increments nearly cancel, beside a third that has no twin."""
    out, into = case.old[one]
    x = low_rank(out, into, 3, seed=1, dtype=torch.float64)
    B = torch.zeros(*batch, out, 3, dtype=torch.float64)
    B[(1,) * len(batch)] = -x.B
    if batch:
        # The fused parameter has the rows of the second projection below those of the first.
        B = torch.cat([B, torch.zeros_like(B)], dim=-2)
    A = (x.A + 0.02).expand(*batch, *x.A.shape).contiguous()
    layout = {"layout": PARAMETER} if batch else {}
    y = lt.LowRank(A, B, x.scale, **layout)
    return lt.Adapter({one: x, other: y, "lm_head": low_rank(64, HIDDEN, 2, seed=2)})


@pytest.mark.parametrize(
    ("name", "one", "other", "batch"),
    [
        (
            "llava",
            "language_model.model.layers.0.self_attn.q_proj",
            "model.language_model.layers.0.self_attn.q_proj",
            (),
        ),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.experts.1.w1",
            "model.layers.0.mlp.experts.gate_up_proj",
            (EXPERTS,),
        ),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.experts.1.w1",
            "layers.0.block_sparse_moe.experts.1.w1",
            (),
        ),
    ],
    ids=["two names", "a part and the whole", "two names of a part"],
)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_error_of_names_that_nearly_cancel_is_a_bound(
    name: str, one: str, other: str, batch: tuple[int, ...], rank: int
) -> None:
    case = CASES[name]
    whole = opposed(case, one, other, batch)
    short = whole.truncate(rank)
    base = case.base()
    wanted, got = (Renaming(base).bound(each) for each in (whole, short))
    for module, value in got.modules.items():
        exact = dense(wanted.modules[module])
        error = float((dense(value) - exact).norm() / exact.norm())
        assert got.errors.get(module, 0.0) >= 0.999 * error
    assert got.errors.get("lm_head") == short.errors.get("lm_head")
    # A change that is small beside the sum has a bound that says so.
    near = lt.Adapter({one: whole.modules[one].scaled(100.0), other: whole.modules[other]})
    told = Renaming(base).bound(replace(near, errors={other: 0.01}))
    assert 0.0 < max(told.errors.values()) < 0.001


def expert(n: int, shape: tuple[int, int] = (WIDE, HIDDEN), **more: Any) -> lt.Adapter:
    value = lt.LowRank(torch.ones(1, shape[1]), torch.ones(shape[0], 1), **more)
    return lt.Adapter({f"model.layers.0.mlp.experts.{n}.up_proj": value})


@pytest.mark.parametrize(
    ("own", "text"),
    [
        (
            expert(EXPERTS),
            r"fr: .*experts\.4\.up_proj: it is of expert 4, and this base has 4, counted from 0",
        ),
        (expert(0, (WIDE + 1, HIDDEN)), r"fr: model\.layers\.0\.mlp\.experts\.\w*"),
        (expert(0, (WIDE, HIDDEN + 1)), r"fr: model\.layers\.0\.mlp\.experts\.gate_up_proj: A is"),
        (expert(0, bias=torch.ones(WIDE)), r"experts\.0\.up_proj: it adds a bias"),
        (
            lt.Adapter({**expert(0).modules, **expert(1, (WIDE, HIDDEN + 1)).modules}),
            r"experts\.0\.up_proj: the experts' factors differ in shape",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused_and_the_base_stays_as_it_was(
    own: lt.Adapter, text: str
) -> None:
    base = CASES["qwen3_moe"].base()
    before = copy.deepcopy(base.state_dict())
    tree = lt.AdapterTree()
    tree.add("fr", adapter=own)
    with pytest.raises(BaseMismatch, match=text):
        lt.attach(tree, base).activate("fr")
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())


# ---------------------------------------------------------------------- files
@each
@either_way
def test_a_lineage_is_flattened_in_the_names_of_the_base(
    case: Case, parent_is_old: bool, tmp_path: Path
) -> None:
    base = case.base()
    tree, added = lineage(case, parent_is_old=parent_is_old)
    with torch.device("meta"):
        bones = case.make()
    for model in (base, bones):
        same(dense_of(tree.flatten("fr/legal", base=model)), added)
    tree.flatten("fr/legal", base=base).save(tmp_path / "flat")
    again = lt.AdapterTree()
    again.add("x", adapter=tmp_path / "flat")
    attached = copy.deepcopy(base)
    lt.attach(again, attached).activate("x")
    close(attached, merged(base, added))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "flat")).eval()
    wanted = merged(base, added)(input_ids=ids()).logits
    torch.testing.assert_close(theirs(input_ids=ids()).logits, wanted, rtol=1e-6, atol=1e-6)


@each
@either_way
def test_two_names_of_a_module_are_not_written_side_by_side(
    case: Case, parent_is_old: bool
) -> None:
    tree, _ = lineage(case, parent_is_old=parent_is_old)
    with pytest.raises(
        BaseMismatch, match=r"fr(/legal)?, fr(/legal)?: .* look like two names of one module"
    ) as caught:
        tree.flatten("fr/legal")
    assert "tree.flatten(…, base=model)" in str(caught.value)
    with pytest.raises(BaseMismatch, match="look like two names of one module"):
        lt.portable(tree, "fr/legal")
    found = lt.clashes(tree)
    assert [node for node, _ in found] == ["fr/legal"]
    assert "look like two names of one module" in found[0][1]


def test_a_base_that_has_neither_name_does_not_hide_that_there_are_two() -> None:
    case = CASES["llava"]
    tree, _ = lineage(case, parent_is_old=True)
    model = lt.attach(tree, case.base())
    with pytest.raises(
        BaseMismatch,
        match=r"look like two names of one module.*the TreeModel given does not have both",
    ):
        tree.flatten("fr/legal", base=model)


def test_two_modules_of_a_base_are_two_though_their_names_look_like_one_s() -> None:
    base = nn.ModuleDict({"q": nn.Linear(4, 4), "model": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    tree = lt.AdapterTree()
    for path, name in (("fr", "q"), ("fr/legal", "model.q")):
        tree.add(path, adapter=lt.Adapter({name: lt.LowRank(torch.ones(1, 4), torch.ones(4, 1))}))
    assert set(tree.flatten("fr/legal", base=base).modules) == {"q", "model.q"}


@each
def test_a_lineage_that_names_its_modules_in_one_way_needs_no_base(case: Case) -> None:
    for shapes in (case.old, case.new):
        tree = lt.AdapterTree()
        tree.add("fr", adapter=adapter(shapes, 1))
        tree.add("fr/legal", adapter=adapter(shapes, 2))
        assert set(tree.flatten("fr/legal").modules) == set(shapes)
        assert lt.clashes(tree) == []


@each
@either_way
def test_the_portable_form_has_the_names_of_the_base(
    case: Case, parent_is_old: bool, tmp_path: Path
) -> None:
    base = case.base()
    tree, added = lineage(case, parent_is_old=parent_is_old)
    made = lt.portable(tree, "fr/legal", base=base, dtype=torch.float64)
    same(dense_of(made.adapter), added)
    base.save_pretrained(tmp_path / "base")
    made = lt.portable(tree, "fr/legal", base=tmp_path / "base", dtype=torch.float64)
    same(dense_of(made.adapter), added)
    tree.base = str(tmp_path / "base")
    same(dense_of(lt.portable(tree, "fr/legal", dtype=torch.float64).adapter), added)


@each
@either_way
def test_check_asks_a_skeleton_by_the_names_of_today(
    case: Case, parent_is_old: bool, tmp_path: Path, shell: Shell
) -> None:
    base = case.base()
    base.save_pretrained(tmp_path / "base")
    tree, _ = lineage(case, parent_is_old=parent_is_old)
    tree.save(tmp_path / "zoo", copy=True)
    bones = skeleton(tmp_path / "base")
    again = lt.load(tmp_path / "zoo")
    assert lt.misfits(again, bones) == []
    assert lt.clashes(again, bones) == []
    code, out, err = shell("check", tmp_path / "zoo", "--base", tmp_path / "base")
    assert code == 0, out + err
    code, out, _ = shell("check", tmp_path / "zoo")
    assert code == 1
    assert (
        "look like two names of one module: a base says which counts (lora-tree check --base" in out
    )
    flat = ("export", tmp_path / "zoo", "fr/legal", "--as", "peft", "--out", tmp_path / "flat")
    code, _, err = shell(*flat, "--base", tmp_path / "base")
    assert code == 0, err
    assert set(lt.Adapter.load(tmp_path / "flat").modules) == set(
        tree.flatten("fr/legal", base=base).modules
    )


@each
@either_way
def test_a_checkpoint_of_old_and_new_names_has_the_bits_of_activate(
    case: Case, parent_is_old: bool, tmp_path: Path
) -> None:
    base = case.base().float()
    base.save_pretrained(tmp_path / "base")
    tree, _ = lineage(case, parent_is_old=parent_is_old)
    lt.export_model(tree, "fr/legal", tmp_path / "out", base=tmp_path / "base")
    lt.attach(tree, base).activate("fr/legal")
    loaded = type(base).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    wanted = base.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


# ------------------------------------------------------------------ beside transformers' own loader
SMALL = {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    name: n for name, n in SMALL.items() if name not in ("num_key_value_heads", "vocab_size")
}
PICTURES = {"image_size": 16, "patch_size": 8}
ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": 2}


def with_eyes(kind: Any, config: Any, text: dict[str, Any], tower: str, **more: Any) -> nn.Module:
    vision = {"model_type": tower, "projection_dim": HIDDEN, **ENCODER, **PICTURES}
    made: nn.Module = kind(
        config(text_config={**SMALL, **text}, vision_config=vision, image_token_index=60, **more)
    )
    return made


def deepseek_v3() -> nn.Module:
    low = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    }
    groups = {"n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    size = {
        **SMALL,
        "num_key_value_heads": 4,
        "moe_intermediate_size": WIDE,
        "first_k_dense_replace": 1,
    }
    return T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**size, **groups, **low))


def ernie_vl() -> nn.Module:
    text = {
        **SMALL,
        "hidden_size": 256,
        "num_attention_heads": 2,
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": WIDE,
        "depth": 1,
        "num_heads": 4,
        "patch_size": 4,
    }
    config = T.Ernie4_5_VLMoeConfig(
        text_config={**text, "moe_intermediate_size": [WIDE, WIDE]},
        vision_config={**vision, "text_hidden_size": 256},
    )
    return T.Ernie4_5_VLMoeForConditionalGeneration(config)


LOADED: dict[str, Callable[[], nn.Module]] = {
    "olmoe": lambda: T.OlmoeForCausalLM(T.OlmoeConfig(**SMALL, **ROUTED)),
    "qwen2_moe": lambda: T.Qwen2MoeForCausalLM(
        T.Qwen2MoeConfig(
            **SMALL, **ROUTED, moe_intermediate_size=WIDE, shared_expert_intermediate_size=WIDE
        )
    ),
    "deepseek_v3": deepseek_v3,
    "granitemoe": lambda: T.GraniteMoeForCausalLM(
        T.GraniteMoeConfig(**SMALL, num_local_experts=EXPERTS, num_experts_per_tok=2)
    ),
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    # experts of one list shared out between two parameters, and transposed routers
    "ernie_vl": ernie_vl,
    "llava_next": lambda: with_eyes(
        T.LlavaNextForConditionalGeneration,
        T.LlavaNextConfig,
        {"model_type": "llama"},
        "clip_vision_model",
    ),
    "gemma3": lambda: with_eyes(
        T.Gemma3ForConditionalGeneration,
        T.Gemma3Config,
        {"model_type": "gemma3_text", "head_dim": 4},
        "siglip_vision_model",
        mm_tokens_per_image=4,
    ),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**ENCODER, **PICTURES)),
    "nomic_bert": lambda: T.NomicBertModel(
        T.NomicBertConfig(**ENCODER, vocab_size=64)
    ),  # q, k and v were one Linear
}


@pytest.mark.parametrize("name", LOADED)
def test_what_an_adapter_adds_by_a_checkpoint_s_names_is_where_the_checkpoint_s_tensors_go(
    name: str, tmp_path: Path
) -> None:
    """The names that transformers writes on the disk are the old ones; it is asked to load W + B·A
    under them.
    """
    torch.manual_seed(0)
    base: Any = LOADED[name]().eval()
    base.save_pretrained(tmp_path / "base")
    disk = load_file(tmp_path / "base" / "model.safetensors")
    g = torch.Generator().manual_seed(1)
    modules = {}
    for key, tensor in disk.items():
        if (
            key.endswith(".weight")
            and tensor.ndim == 2
            and not re.search(r"embed|position|lm_head|token_type", key)
        ):
            A, B = (
                0.1 * torch.randn(2, tensor.shape[1], generator=g),
                torch.randn(tensor.shape[0], 2, generator=g),
            )
            modules[key.removesuffix(".weight")] = lt.LowRank(A, B)
            disk[key] = tensor + B @ A
    assert any(not has_module(base, key) for key in modules)
    save_file(disk, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    wanted = dict(type(base).from_pretrained(tmp_path / "base").named_parameters())
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter(modules))
    assert lt.misfits(tree, base) == []
    lt.attach(tree, base).activate("fr")
    for parameter, tensor in base.named_parameters():
        torch.testing.assert_close(tensor, wanted[parameter], rtol=1e-6, atol=1e-6, msg=parameter)


def has_module(base: nn.Module, name: str) -> bool:
    try:
        base.get_submodule(name)
    except AttributeError:
        return False
    return True


# --------------------------------------------------------------------- beside PEFT's own conversion
def old_folder(folder: Path, own: lt.Adapter, targets: list[str]) -> Path:
    """An adapter as PEFT wrote it under the transformers of its time: one r and alpha, and a list
    of targets.
    """
    flat = lt.Adapter(
        {n: lt.LowRank(v.A.float(), v.B.float(), 2.0) for n, v in own.modules.items()}
    )
    flat.save(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_modules": targets, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llava", ["q_proj", "v_proj", "down_proj", "linear_1"]),
        ("mixtral", ["q_proj", "v_proj", "w1", "w2", "w3"]),
        ("qwen3_moe", ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_an_old_file_gives_what_peft_makes_of_it(
    name: str, targets: list[str], tmp_path: Path
) -> None:
    case = CASES[name]
    base = case.base().float()
    shapes = {
        n: s for n, s in case.old.items() if not n.endswith((".gate", "lm_head"))
    }  # PEFT drops these
    if name in MOE:  # PEFT converts every layer or none
        shapes |= {n.replace("layers.0", "layers.1"): s for n, s in shapes.items()}
    g = torch.Generator().manual_seed(4)

    def value(out: int, into: int) -> lt.LowRank:
        A = 0.1 * torch.randn(2, into, generator=g)
        return lt.LowRank(A, torch.randn(out, 2, generator=g))

    folder = old_folder(
        tmp_path / "old", lt.Adapter({n: value(*shape) for n, shape in shapes.items()}), targets
    )
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    wanted = theirs(input_ids=ids()).logits
    bare = base(input_ids=ids()).logits
    tree = lt.AdapterTree()
    tree.add("fr", adapter=folder)
    lt.attach(tree, base).activate("fr")
    got = base(input_ids=ids()).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got - bare).abs().max() > 1e-2


# ---------------------------------------------------------------------- training
def test_an_old_adapter_trains_and_is_saved_in_the_names_of_today(tmp_path: Path) -> None:
    case = CASES["qwen2_vl"]
    base = case.base().float()
    tree = lt.AdapterTree()
    tree.add("fr", adapter=adapter(attention("model.layers.0"), 1))
    model = lt.attach(tree, base)
    optimizer = torch.optim.SGD(model.trainable("fr"), lr=0.1)
    before = tree.flatten("fr")
    with model.using("fr", mode="unmerged"):
        base(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    tree.save(tmp_path / "zoo")
    after = lt.load(tmp_path / "zoo").adapter("fr")
    assert after is not None
    assert set(after.modules) == set(attention("model.language_model.layers.0"))
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert not torch.equal(after.modules[name].B, before.modules[name].B.float())


# ---------------------------------------------------------------------- with and without a head
def llama(kind: Any = T.LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return kind(T.LlamaConfig(**TEXT)).eval()


def test_an_adapter_of_the_bare_model_is_bound_under_the_head_s_prefix(tmp_path: Path) -> None:
    bare = llama(T.LlamaModel)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="FEATURE_EXTRACTION"
    )
    trained = get_peft_model(copy.deepcopy(bare), config).eval()
    trained.save_pretrained(tmp_path / "fr")
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        tmp_path / "fr" / "adapter_model.safetensors"
    )
    with_head = llama()
    with_head.model.load_state_dict(bare.state_dict())
    tree = lt.AdapterTree()
    tree.add("fr", adapter=tmp_path / "fr")
    assert lt.misfits(tree, with_head) == []
    lt.attach(tree, with_head).activate("fr", mode="unmerged")
    wanted = trained(input_ids=ids()).last_hidden_state
    torch.testing.assert_close(
        with_head.model(input_ids=ids()).last_hidden_state, wanted, rtol=1e-5, atol=1e-5
    )


def test_an_adapter_of_the_model_with_its_head_is_bound_to_the_bare_one() -> None:
    own = adapter(attention("model.layers.0"), 1)
    bare = llama(T.LlamaModel).double()
    before = copy.deepcopy(bare)
    tree = lt.AdapterTree()
    tree.add("fr", adapter=own)
    lt.attach(tree, bare).activate("fr")
    added = {
        f"{n.removeprefix('model.')}.weight": v.dense(dtype=torch.float64)
        for n, v in own.modules.items()
    }
    close(bare, merged(before, added))


def test_a_base_that_is_not_transformers_has_no_other_names() -> None:
    base = nn.ModuleDict({"model": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter({"q": lt.LowRank(torch.ones(1, 4), torch.ones(4, 1))}))
    with pytest.raises(BaseMismatch, match=r"fr: q: the base has no such module"):
        lt.attach(tree, base).activate("fr")


# --------------------------------------------------------------- a module, or a raw parameter of it
class Mixed(nn.Module):
    """A Linear, and a module with raw parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.experts = nn.Module()
        self.experts.flat = nn.Parameter(torch.randn(6, 6))
        self.experts.forward = lambda x: x @ self.experts.flat.T  # type: ignore[method-assign, operator, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts(self.lin(x))
        return out


BEYOND = r"(l)(in|xperts)(?!.*\2\1)"  # remembers what it took, so it has no bound


@pytest.mark.parametrize(
    "targets", [BEYOND, "all-linear", "(" + "lin|" * 5000 + "x)"], ids=["beyond", "all", "long"]
)
@pytest.mark.parametrize(
    ("trained", "named", "site"),
    [("lin", "lin.weight", "lin"), ("experts.flat", "experts.flat", "experts.flat")],
)
def test_what_only_the_base_can_tell_is_settled_when_it_is_bound(
    trained: str, named: str, site: str, targets: str, tmp_path: Path
) -> None:
    """``target_parameters`` names a parameter, there is one pair of keys, and ``target_modules``
    can't be read.
    """
    torch.manual_seed(0)
    base, x = Mixed().eval(), torch.randn(3, 6)
    how: dict[str, Any] = (
        {"target_modules": ["lin"]} if trained == "lin" else {"target_parameters": [trained]}
    )
    config = LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **{"target_modules": [], **how})
    trained_model = get_peft_model(copy.deepcopy(base), config).eval()
    trained_model.save_pretrained(tmp_path / "fr")
    fields = json.loads((tmp_path / "fr" / "adapter_config.json").read_text())
    fields |= {"target_modules": targets, "target_parameters": [named]}
    (tmp_path / "fr" / "adapter_config.json").write_text(json.dumps(fields))
    tree = lt.AdapterTree()
    tree.add("fr", adapter=tmp_path / "fr")
    assert lt.misfits(tree, base) == []
    model = lt.attach(tree, base)
    model.activate("fr")
    torch.testing.assert_close(base(x), trained_model(x))
    if site == "lin":  # as a module it runs beside its weight, which a raw parameter can't
        model.activate("fr", mode="unmerged")
        torch.testing.assert_close(base(x), trained_model(x))


@pytest.mark.parametrize("targets", ["(", BEYOND, "x" * 10**6, "all-linear", "([a-z.]+)+X"])
def test_target_modules_beside_plain_keys_is_not_looked_at(targets: str, tmp_path: Path) -> None:
    lt.Adapter({"a.lin": lt.LowRank(torch.ones(2, 4), torch.ones(4, 2))}).save(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": targets}))
    assert lt.Adapter.load(tmp_path).ranks == {"a.lin": 2}


# ---------------------------------------------------------------------- any names at all
parts = st.sampled_from(
    [
        *(
            "model",
            "language_model",
            "visual",
            "layers",
            "0",
            "1",
            "4",
            "99",
            "self_attn",
            "q_proj",
            "mlp",
            "experts",
        ),
        *(
            "block_sparse_moe",
            "w1",
            "w2",
            "gate",
            "gate_up_proj",
            "down_proj",
            "weight",
            "lm_head",
            "é",
            "x" * 300,
            " ",
        ),
    ]
)
names = st.lists(parts, min_size=1, max_size=8).map(".".join) | st.sampled_from(
    sorted({name for case in CASES.values() for name in (*case.old, *case.new)})
)
sizes = st.sampled_from([1, 2, 8, WIDE, HIDDEN, 2 * WIDE])


@st.composite
def values(draw: st.DrawFn) -> lt.LowRank:
    """Factors of any kind, whose sizes are often those of a module."""
    out, into, r = draw(sizes), draw(sizes), draw(st.integers(1, 3))
    batch = draw(st.sampled_from([(), (), (1,), (EXPERTS,)]))
    layout = PARAMETER if batch else draw(st.sampled_from([LINEAR, LINEAR, EMBEDDING]))
    bias = torch.zeros(out) if layout == LINEAR and draw(st.booleans()) else None
    A, B = torch.ones(*batch, r, into), torch.ones(*batch, out, r)
    return lt.LowRank(A, B, draw(st.sampled_from([1.0, 0.3])), bias, layout)


@pytest.fixture(scope="module")
def bases() -> dict[str, nn.Module]:
    return {name: case.base().float() for name, case in CASES.items()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_names_of_any_kind_are_bound_or_refused_and_leave_no_trace(
    bases: dict[str, nn.Module], data: Any
) -> None:
    base = bases[data.draw(st.sampled_from(sorted(CASES)))]
    tree = lt.AdapterTree()
    for path in ("fr", "fr/legal"):
        modules = data.draw(st.dictionaries(names, values(), min_size=1, max_size=4))
        tree.add(path, adapter=lt.Adapter(modules))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    misfits = lt.misfits(tree, base)
    model = lt.attach(tree, base)
    try:
        model.activate("fr/legal")
        assert misfits == []
        assert any(
            not torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items()
        )
        flat = tree.flatten("fr/legal", base=base)
        again = lt.AdapterTree()
        again.add("x", adapter=flat)
        assert lt.misfits(again, base) == []
    except lt.errors.LoraTreeError:
        pass
    finally:
        model.deactivate()
        model.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


targets = st.lists(
    st.sampled_from(
        [
            "q_proj",
            ".*",
            "(q|v)_proj",
            r"layers\.\d",
            "(?!",
            "(a*)*",
            "[",
            "experts",
            r"\1",
            "(?=.*1)",
            "$",
        ]
    ),
    min_size=1,
    max_size=4,
).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    fields=st.fixed_dictionaries(
        {"target_modules": targets | st.lists(targets, max_size=3)},
        optional={
            "exclude_modules": targets | st.lists(targets, max_size=2),
            "layers_pattern": targets,
            "layers_to_transform": st.integers(0, 2),
            "rank_pattern": st.dictionaries(targets, st.integers(1, 4), max_size=2),
            "target_parameters": st.lists(names, max_size=2),
        },
    )
)
def test_patterns_of_any_kind_make_an_adapter_or_are_refused(
    bases: dict[str, nn.Module], fields: Any
) -> None:
    base = bases["llava"]
    try:
        tree = lt.AdapterTree(defaults=fields)
        tree.add("fr")
        lt.attach(tree, base).detach()
    except lt.errors.LoraTreeError:
        return
    made = tree.adapter("fr")
    assert made is not None
    assert lt.misfits(tree, base) == []
