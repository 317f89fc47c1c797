"""PEFT folders in and out: the oracle is PEFT itself, and dense float64 sums.

Every kind of layer that adds up goes through the same three laws: what we read is what PEFT
computes; what we write is what PEFT loads, without a key too many or too few; and a round trip
changes no bit.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from lora_tree import Adapter, Layout, LowRank, combine
from lora_tree.errors import FormatError, ShapeMismatch, UnsupportedAdapter
from lora_tree.formats import peft, peft_write
from lora_tree.formats.peft_config import parse_config
from lora_tree.formats.safetensors import read_tensors, render_tensors
from lora_tree.lowrank import EMBEDDING, PARAMETER

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import get_pattern_key
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )
    from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

CONFIG, WEIGHTS = peft.CONFIG, peft.WEIGHTS


class Experts(nn.Module):
    """Raw parameters, as transformers 5 fuses them: (experts, out, in), and one plain matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 4))
        self.mix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bi,eoi->beo", x, self.gate_up).chunk(2, -1)
        return torch.einsum("bei,eoi->bo", gate * up, self.down) @ self.mix.T


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 6)
        self.c1 = nn.Conv1d(6, 6, 3, padding=1)
        self.c2 = nn.Conv2d(1, 2, (3, 2), padding="same")
        self.c3 = nn.Conv3d(1, 2, (1, 3, 1))
        self.grouped = nn.Conv1d(6, 4, 3, groups=2)
        self.gpt = Conv1D(5, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6)])
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.experts = Experts()

    def forward(self, ids: Tensor) -> list[Tensor]:
        x = self.embed(ids)  # (batch, time, 6)
        y = self.lin(x)
        z = self.c1(y.mT).mT
        for block in self.blocks:
            z = z + block(z)
        w = self.attn(z, z, z)[0]
        flat = w.reshape(-1, 6)
        return [
            y,
            z,
            w,
            self.c2(y[:, None]),
            self.c3(y[:, None, None]),
            self.grouped(y.mT),
            self.gpt(y),
            self.experts(flat),
        ]


IDS = torch.arange(10).reshape(2, 5)


@dataclass(frozen=True)
class Case:
    """One adapter made by PEFT: a model, a config, and the kinds that must come of it."""

    config: dict[str, Any]
    model: Callable[[], nn.Module] = Net

    def made(self) -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(self.model(), LoraConfig(**self.config))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
            if name.endswith("attn.lora_B.default.bias"):
                nn.init.zeros_(parameter)  # PEFT never uses it, so no training moves it
        return model.eval()


def mixtral() -> nn.Module:
    small = dict(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_local_experts=3
    )
    return MixtralForCausalLM(
        MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=1)
    ).float()


def llama() -> nn.Module:
    small = dict(vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
    return LlamaForCausalLM(
        LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=1)
    ).float()


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    ).float()


CASES = {
    "linear": Case(dict(r=2, lora_alpha=3, target_modules=["lin", "blocks.0"])),
    "rslora": Case(dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["lin"])),
    "patterns": Case(
        dict(
            r=3,
            lora_alpha=5,
            target_modules=["lin", "blocks.0", "blocks.1", "c1"],
            rank_pattern={r"blocks\.\d": 2, "^lin": 1},
            alpha_pattern={"1": 7, r"blocks.*": 1.3},
        )
    ),
    "lora_bias": Case(
        dict(r=2, lora_bias=True, target_modules=["lin", "blocks.1", "c1", "grouped", "attn"])
    ),
    "embedding": Case(dict(r=2, lora_alpha=1, target_modules=["embed"])),
    "conv1d": Case(dict(r=2, lora_alpha=5, target_modules=["c1"])),
    "conv2d": Case(dict(r=3, target_modules=["c2"])),
    "conv3d": Case(dict(r=3, target_modules=["c3"])),
    "grouped": Case(dict(r=4, lora_alpha=3, target_modules=["grouped"])),
    "hf_conv1d": Case(dict(r=2, fan_in_fan_out=True, target_modules=["gpt"])),
    "attention": Case(dict(r=2, lora_alpha=5, target_modules=["attn"], rank_pattern={"attn": 3})),
    "one_parameter": Case(
        dict(r=2, lora_alpha=5, target_modules=[], target_parameters=["experts.down"])
    ),
    "flat_parameter": Case(
        dict(r=2, lora_alpha=5, target_modules=["lin"], target_parameters=["mix"])
    ),
    "two_parameters": Case(
        dict(r=2, target_modules=["lin"], target_parameters=["experts.gate_up", "experts.down"])
    ),
    "three_parameters": Case(
        dict(
            r=3,
            target_modules=[],
            target_parameters=["experts.gate_up", "experts.down", "experts.mix"],
        )
    ),
    "regex": Case(dict(r=2, target_modules=r"(lin|blocks\.[01])")),
    "bias_all": Case(dict(r=2, bias="all", target_modules=["lin", "attn"])),
    "bias_lora_only": Case(dict(r=2, bias="lora_only", target_modules=["lin"])),
    "mixtral": Case(
        dict(
            r=2,
            lora_alpha=3,
            target_modules=["q_proj", "v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        mixtral,
    ),
    "llama": Case(
        dict(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules="all-linear"), llama
    ),
    "llama_embeddings": Case(
        dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "q_proj"]), llama
    ),
    "llama_layers": Case(
        dict(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]), llama
    ),
    "gpt2": Case(
        dict(r=2, lora_alpha=3, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]), gpt2
    ),
}
every_kind = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, list) else [found.logits]


def dense(value: LowRank) -> Tensor:
    """ΔW in the shape that PEFT gives it, in float64."""
    delta = oracle.dense(value)
    match value.layout.kind:
        case "embedding":
            return delta.mT
        case "conv":
            return delta.reshape(delta.shape[0], -1, *value.layout.kernel)
    return delta.squeeze(0) if value.layout.kind == "parameter" else delta


def layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """(our name, PEFT's layer) of everything that PEFT adapts."""
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            name = name.replace(".base_layer", "")
            yield (
                (f"{name}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else name),
                layer,
            )


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def written(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in peft.render(adapter).items():
        (folder / name).write_bytes(data)
    return folder


def loaded_in_peft(case: Case, folder: Path) -> PeftModel:
    """A fresh model with the folder in it; a key that PEFT misses or does not know fails."""
    torch.manual_seed(0)
    base = case.model().eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(base, folder)
    mine = {key for key in load_file(folder / WEIGHTS) if ".lora_" in key}
    theirs = {key.replace(".default", "") for key in model.state_dict() if ".lora_" in key}
    assert mine == theirs
    return model.eval()


def same(x: Adapter, y: Adapter) -> None:
    assert list(x.modules) == list(y.modules)
    for name, mine in x.modules.items():
        other = y.modules[name]
        assert mine.scale == other.scale
        assert mine.layout == other.layout
        assert len(mine.tensors) == len(other.tensors)
        assert all(
            t.dtype == u.dtype and torch.equal(t, u)
            for t, u in zip(mine.tensors, other.tensors, strict=True)
        )
    assert x.unchanged.keys() == y.unchanged.keys()
    assert all(torch.equal(x.unchanged[name], y.unchanged[name]) for name in x.unchanged)
    assert (x.nesting, x.assumed, x.base) == (y.nesting, y.assumed, y.base)


# ---------------------------------------------------------------- the three laws, for every kind
@every_kind
def test_what_is_read_is_what_peft_computes(case: Case, tmp_path: Path) -> None:
    model = case.made()
    adapter = peft.read_folder(saved(model, tmp_path))
    found = dict(layers(model))
    assert set(found) == set(adapter.modules)
    for name, layer in found.items():
        value = adapter.modules[name]
        assert value.scale == layer.scaling["default"], name
        if name == "grouped":
            # PEFT's own delta of a grouped convolution is not to be trusted; outputs are compared
            # below.
            continue
        expected = layer.get_delta_weight("default").double()
        delta = dense(value).mT if isinstance(layer.get_base_layer(), Conv1D) else dense(value)
        assert delta.shape == expected.shape, name
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
        if value.bias is not None:
            assert torch.equal(value.bias, layer.lora_B["default"].bias), name


@every_kind
def test_what_is_written_is_what_peft_loads(case: Case, tmp_path: Path) -> None:
    model = case.made()
    adapter = peft.read_folder(saved(model, tmp_path / "theirs"))
    again = loaded_in_peft(case, written(adapter, tmp_path / "ours"))
    scales = {name: layer.scaling["default"] for name, layer in layers(again)}
    assert scales == {name: value.scale for name, value in adapter.modules.items()}
    for expected, got in zip(outputs(model), outputs(again), strict=True):
        assert torch.equal(expected, got)


@every_kind
def test_a_round_trip_changes_nothing(case: Case, tmp_path: Path) -> None:
    first = peft.read_folder(saved(case.made(), tmp_path / "theirs"))
    second = peft.read_folder(written(first, tmp_path / "ours"))
    same(first, second)
    assert peft.render(first) == peft.render(second)
    theirs, ours = (load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() - ({"base_model.model.attn.lora_B.bias"} - theirs.keys())
    assert all(
        torch.equal(theirs[key], ours[key])
        for key in theirs
        if key != "base_model.model.attn.lora_B.bias"
    )


def test_a_grouped_convolution_is_one_product_per_group(tmp_path: Path) -> None:
    model = CASES["grouped"].made()
    value = peft.read_folder(saved(model, tmp_path)).modules["grouped"]
    assert value.A.shape == (2, 2, 18)
    assert value.B.shape == (2, 2, 2)
    conv, x = (
        model.base_model.model.grouped.base_layer.double(),
        torch.randn(2, 6, 9, dtype=torch.float64),
    )
    kernel = value.dense(dtype=torch.float64).reshape(
        4, 6, 3
    )  # over all channels in, whatever the group
    expected = conv(x) + nn.functional.conv1d(x, kernel)
    torch.testing.assert_close(model.base_model.model.grouped.double()(x), expected)


# ---------------------------------------------------------------- raw parameters of one module
def test_the_order_of_two_parameters_is_assumed_until_the_base_settles_it(tmp_path: Path) -> None:
    folder = saved(CASES["two_parameters"].made(), tmp_path / "theirs")
    config = json.loads((folder / CONFIG).read_text())
    right = peft.read_folder(folder)
    assert right.assumed == {"experts"}
    config["target_parameters"].reverse()  # PEFT writes a set there for some models
    (folder / CONFIG).write_text(json.dumps(config))
    wrong = peft.read_folder(folder)
    assert torch.equal(wrong.modules["experts.down"].A, right.modules["experts.gate_up"].A)
    registered = {"experts": ("gate_up", "down", "mix")}
    settled = wrong.renested(registered)
    assert not settled.assumed
    same(settled, right.renested(registered))
    # a guess is written as the file was read, a certainty with its names
    assert peft.render(wrong)[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    again = peft.read_folder(written(settled, tmp_path / "ours"))
    same(again, settled)
    assert again.renested({"experts": ("down", "gate_up")}).modules["experts.down"].A.shape == (
        3,
        2,
        4,
    )


def test_a_sum_settles_an_assumed_order_by_one_that_is_known(tmp_path: Path) -> None:
    guess = peft.read_folder(saved(CASES["two_parameters"].made(), tmp_path))
    known = guess.renested({"experts": ("gate_up", "down")})
    assert combine([(guess, 1.0), (guess, 1.0)]).assumed == {"experts"}
    assert not combine([(guess, 1.0), (known, 1.0)]).assumed
    other = replace(guess, nesting={"experts": ("down", "gate_up")}, assumed=frozenset())
    with pytest.raises(ShapeMismatch):
        combine([(guess, 1.0), (other, 1.0)])


def test_fused_experts_are_ordered_as_transformers_registers_them(tmp_path: Path) -> None:
    folder = saved(CASES["mixtral"].made(), tmp_path / "theirs")
    config = json.loads((folder / CONFIG).read_text())
    for names in (
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ["experts.down_proj", "experts.gate_up_proj"],
    ):
        (folder / CONFIG).write_text(json.dumps({**config, "target_parameters": names}))
        adapter = peft.read_folder(folder)
        assert adapter.nesting["model.layers.1.mlp.experts"] == ("gate_up_proj", "down_proj")
        assert adapter.modules["model.layers.1.mlp.experts.down_proj"].shape == (3, 8, 12)


def test_parameters_of_different_scales_keep_them(tmp_path: Path) -> None:
    case = replace(
        CASES["mixtral"],
        config=CASES["mixtral"].config | dict(rank_pattern={"mlp.experts.down_proj": 3}),
    )
    model = case.made()
    adapter = peft.read_folder(saved(model, tmp_path / "theirs"))
    assert adapter.ranks["model.layers.0.mlp.experts.down_proj"] == 3
    assert not adapter.assumed
    again = loaded_in_peft(case, written(adapter, tmp_path / "ours"))
    assert torch.equal(outputs(model)[0], outputs(again)[0])
    case = replace(
        CASES["two_parameters"],
        config=CASES["two_parameters"].config | dict(alpha_pattern={"down": 3}),
    )
    with pytest.raises(
        FormatError, match=r"experts: gate_up and down differ in r or lora_alpha.*not say"
    ):
        peft.read_folder(saved(case.made(), tmp_path / "open"))


def test_assumed_parameters_of_different_ranks_are_padded_alike(tmp_path: Path) -> None:
    adapter = peft.read_folder(saved(CASES["two_parameters"].made(), tmp_path / "theirs"))
    short = {**adapter.modules, "experts.down": adapter.modules["experts.down"].truncate(1).value}
    again = peft.read_folder(written(replace(adapter, modules=short), tmp_path / "ours"))
    assert again.ranks["experts.down"] == again.ranks["experts.gate_up"] == 2
    for name, value in short.items():
        torch.testing.assert_close(again.modules[name].dense(), value.dense())


def test_two_parameters_of_unknown_order_are_not_written() -> None:
    up, down = (LowRank(torch.ones(1, 2, n), torch.ones(1, n, 2), layout=PARAMETER) for n in (3, 4))
    with pytest.raises(
        FormatError, match=r"experts: PEFT writes down and up in the order.*\n.*attach"
    ):
        peft.render(Adapter({"experts.up": up, "experts.down": down}))


# -------------------------------------------------------------- tensors of the base that came along
def test_whole_tensors_come_along_under_their_plain_names(tmp_path: Path) -> None:
    model = CASES["bias_all"].made()
    adapter = peft.read_folder(saved(model, tmp_path / "a"))
    state = {
        k.replace(".base_layer", ""): v for k, v in model.base_model.model.state_dict().items()
    }
    assert {"lin.bias", "c1.bias", "attn.out_proj.bias"} <= set(adapter.unchanged)
    assert all(torch.equal(state[name], value) for name, value in adapter.unchanged.items())
    embeddings = peft.read_folder(saved(CASES["llama_embeddings"].made(), tmp_path / "b"))
    assert set(embeddings.unchanged) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_an_unexpected_whole_tensor_is_refused(tmp_path: Path) -> None:
    folder = saved(CASES["linear"].made(), tmp_path)
    for key, kind, text in [
        (
            "blocks.1.weight",
            FormatError,
            r"blocks\.1\.weight' is a whole weight, .*\n.*\"modules_to_save\": \[\"blocks\.1\"\]",
        ),
        (
            "lin.base_layer.bias",
            FormatError,
            r"lin\.base_layer\.bias'; adapter_config\.json has bias = 'none'",
        ),
        ("running_mean", FormatError, r"unexpected key 'base_model\.model\.running_mean'"),
    ]:
        with pytest.raises(kind, match=text):
            edited(folder, lambda t, key=key: t | {f"base_model.model.{key}": torch.ones(6)})


# ---------------------------------------------------------------- scales
@given(
    scale=st.one_of(
        st.floats(-1e6, 1e6).filter(lambda s: s == 0 or abs(s) > 1e-6),
        st.builds(lambda a, r: a / r, st.integers(1, 512), st.integers(1, 512)),
    ),
    r=st.integers(1, 600),
    rslora=st.booleans(),
)
@example(scale=107.0, r=32, rslora=True)  # √32 is rounded: no number divided by it is 107
def test_lora_alpha_gives_the_scale_back_bit_for_bit(scale: float, r: int, rslora: bool) -> None:
    alpha = peft_write._alpha(scale, r, rslora=rslora)
    divisor = math.sqrt(r) if rslora else r
    if alpha is not None:
        assert alpha / divisor == scale
    else:
        assert math.frexp(divisor)[0] != 0.5  # a power of two divides exactly: there always is one
        assert math.nextafter(scale * divisor, math.inf) / divisor != scale
        assert math.nextafter(scale * divisor, -math.inf) / divisor != scale


def test_what_peft_computed_is_always_found_again() -> None:
    for r in range(1, 200):
        for alpha in (1, 7, 16, 32, 0.1, 1 / 3, 2.5e-3):
            for divisor, rslora in ((r, False), (math.sqrt(r), True)):
                found = peft_write._alpha(alpha / divisor, r, rslora=rslora)
                assert found is not None
                assert found / divisor == alpha / divisor
                assert isinstance(found, int) == isinstance(alpha, int)


def test_a_scale_that_peft_can_not_say_is_folded_into_b(tmp_path: Path) -> None:
    scale = next(
        s
        for s in (1.4 + k * 2**-52 for k in range(1, 99))
        if peft_write._alpha(s, 3, rslora=False) is None
    )
    A, B = torch.randn(3, 5), torch.randn(4, 3)
    adapter = Adapter(
        {"x": LowRank(A, B, scale), "y": LowRank(A, B, 0.5)}, config={"use_rslora": True}
    )
    again = peft.read_folder(written(adapter, tmp_path / "ours"))
    assert again.modules["x"].scale == 1.0
    assert again.modules["y"].scale == 0.5
    assert torch.equal(again.modules["x"].B, adapter.modules["x"].folded().B)


def test_integers_are_written_as_integers() -> None:
    for config, scale in ({}, 2.0), ({"use_rslora": True}, 32 / 4):
        fields = json.loads(
            peft.render(
                Adapter({"x": LowRank(torch.ones(16, 5), torch.ones(4, 16), scale)}, config=config)
            )[CONFIG]
        )
        assert (fields["lora_alpha"], type(fields["lora_alpha"])) == (32, int)


# ---------------------------------------------------------------- what is written
def test_bytes_do_not_depend_on_the_order_of_insertion(tmp_path: Path) -> None:
    adapter = peft.read_folder(saved(CASES["mixtral"].made(), tmp_path))
    adapter = adapter.renested({"model.layers.0.mlp.experts": ("gate_up_proj", "down_proj")})
    turned = replace(
        adapter,
        modules=dict(reversed(adapter.modules.items())),
        config=dict(reversed(adapter.config.items())) | {"target_modules": ["v_proj", "q_proj"]},
        nesting=dict(reversed(adapter.nesting.items())),
    )
    assert peft.render(adapter) == peft.render(turned)


def test_a_pattern_key_matches_one_module_only(tmp_path: Path) -> None:
    ranks = {"a.lin": 2, "b.a.lin": 3, "axlin": 2, "a.lin2": 4}
    modules = {
        n: LowRank(torch.randn(r, 5), torch.randn(4, r), scale=r / 7) for n, r in ranks.items()
    }
    again = peft.read_folder(written(Adapter(modules), tmp_path / "ours"))
    assert again.ranks == ranks
    same(again, replace(Adapter(modules), config=again.config))
    fields = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert fields["rank_pattern"] == {r"^b\.a\.lin": 3, r"^a\.lin2": 4}


def test_the_makers_own_targets_are_kept_where_they_still_describe_the_adapter(
    tmp_path: Path,
) -> None:
    adapter = peft.read_folder(saved(CASES["llama"].made(), tmp_path / "a"))
    x = adapter.modules["model.layers.0.self_attn.q_proj"]

    def targets(modules: dict[str, LowRank], **config: Any) -> Any:
        return json.loads(peft.render(Adapter(modules, config=config))[CONFIG])["target_modules"]

    assert targets({"a.q": x, "b.q": x}, target_modules=["q"]) == ["q"]
    assert targets({"a.q": x, "b.q": x}, target_modules=["q", "v"]) == ["a.q", "b.q"]
    assert targets({"a.q": x, "b.v": x}, target_modules=["q"]) == ["a.q", "b.v"]
    assert targets({"a.q": x}, target_modules=["q"], layers_to_transform=[1]) == ["a.q"]
    assert targets({"out_proj": x, "attn": x, "attn.out_proj": x}) == "attn|out_proj"


def test_mixed_biases_are_filled_with_zeros(tmp_path: Path) -> None:
    x = LowRank(torch.randn(2, 6), torch.randn(6, 2), 0.5, torch.randn(6))
    adapter = Adapter({"lin": x, "blocks.1": replace(x, bias=None)})
    again = peft.read_folder(written(adapter, tmp_path / "ours"))
    assert torch.equal(again.modules["lin"].bias, x.bias)  # type: ignore[arg-type]
    assert torch.equal(again.modules["blocks.1"].bias, torch.zeros(6))  # type: ignore[arg-type]


def test_an_attention_has_one_rank_and_one_scale(tmp_path: Path) -> None:
    case = CASES["attention"]
    torch.manual_seed(3)
    modules = {
        "attn": LowRank(torch.randn(2, 6), torch.randn(18, 2), 0.7),
        "attn.out_proj": LowRank(torch.randn(3, 6), torch.randn(6, 3), 0.3),
    }
    folder = written(Adapter(modules), tmp_path / "ours")
    loaded_in_peft(case, folder)
    again = peft.read_folder(folder)
    for name, value in modules.items():
        assert again.modules[name].rank == 3
        torch.testing.assert_close(again.modules[name].dense(), value.dense())


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ({}, "an adapter without modules"),
        (
            {"x": LowRank(torch.ones(2, 1, 4), torch.ones(2, 4, 1))},
            r"x: a linear has factors of \(2,\) dimensions",
        ),
        (
            {
                "x": LowRank(
                    torch.ones(1, 4), torch.ones(4, 1), bias=torch.ones(4), layout=EMBEDDING
                )
            },
            "x: PEFT has no lora_bias",
        ),
        (
            {"x": LowRank(torch.ones(1, 1, 4), torch.ones(1, 4, 1), layout=PARAMETER)},
            "x: PEFT can't train a raw parameter",
        ),
        (
            {"x": LowRank(torch.ones(1, 5), torch.ones(4, 1), layout=Layout("conv", (3,)))},
            r"x: A is \(1, 5\), expected in · 3",
        ),
        (
            {"x.base_layer.y": LowRank(torch.ones(1, 4), torch.ones(4, 1))},
            "PEFT's keys have no way",
        ),
        (
            {n: LowRank(torch.ones(1, 4), torch.ones(4, 1)) for n in ("x", "x.y")},
            r"x\.y: lies in x, which has factors",
        ),
        (
            {"x": LowRank(torch.ones(1, 4).to(torch.float8_e5m2), torch.ones(4, 1))},
            r"x: dtype torch\.float8_e5m2 is not",
        ),
    ],
)
def test_what_peft_can_not_say_is_refused(modules: dict[str, LowRank], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        peft.render(Adapter(modules))


def test_a_config_that_we_would_not_read_is_not_written() -> None:
    modules = {"x": LowRank(torch.ones(1, 4), torch.ones(4, 1))}
    with pytest.raises(UnsupportedAdapter, match="use_dora"):
        peft.render(Adapter(modules, config={"use_dora": True}))
    with pytest.raises(FormatError, match="can't be written as JSON"):
        peft.render(Adapter(modules, config={"note": object()}))


# ---------------------------------------------------------------- what is refused
def edited(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **fields: Any
) -> Adapter:
    """Read ``folder`` with its tensors changed and fields of its config set."""
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)
    (copy / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))
    save_file(change(load_file(folder / WEIGHTS)), copy / WEIGHTS)
    return peft.read_folder(copy)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(CASES["linear"].made(), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(use_dora=True), "use_dora = True: DoRA rescales"),
        (dict(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
        (dict(alora_invocation_tokens=[1]), "aLoRA acts on the tokens after"),
        (dict(use_qalora=True), "QALoRA pools"),
        (dict(use_bdlora={"nblocks": 2}), "BD-LoRA stores"),
        (dict(arrow_config={"top_k": 1}), "Arrow routes"),
        (dict(kasa_config={"a": 1}), "KaSA truncates"),
        (dict(monteclora_config={"num_samples": 1}), "MonteCLoRA draws"),
        (dict(layer_replication=[[0, 2]]), "repeats layers"),
        (dict(megatron_config={"x": 1}), "Megatron"),
        (dict(use_newlora=True), "use_newlora = True is a kind of LoRA that is not known here"),
        (
            dict(init_lora_weights="pissa_niter_4"),
            r"PiSSA changed the base's own.*\n.*path_initial_model",
        ),
        (dict(init_lora_weights="olora"), "OLoRA changed"),
        (dict(init_lora_weights="loftq"), "LoftQ changed"),
        (dict(init_lora_weights="corda"), "CorDA changed"),
        (dict(init_lora_weights="lora_ga"), "LoRA-GA changed"),
    ],
)
def test_what_does_not_add_up_is_refused_with_the_reason(
    plain: Path, fields: dict[str, Any], text: str
) -> None:
    with pytest.raises(UnsupportedAdapter, match=text) as caught:
        edited(plain, **fields)
    assert str(plain / "copy" / CONFIG) in str(caught.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_init_that_left_the_base_alone_is_read_and_not_begun_again(
    plain: Path, init: Any
) -> None:
    fields = json.loads(peft.render(edited(plain, init_lora_weights=init))[CONFIG])
    assert (
        fields["init_lora_weights"] is (init if isinstance(init, bool) else True)
        or init == "gaussian"
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(r=0), "r: got '0', expected a positive integer"),
        (dict(r=True), "r: got 'True', expected a positive integer"),
        (dict(r=2.0), "r: got '2.0'"),
        (dict(r=4), r"blocks\.0: lora_A is \(2, 6\), expected \(4, in\)\n.*gives it r = 4"),
        (dict(rank_pattern={"0": 3}), r"blocks\.0: lora_A is \(2, 6\), expected \(3, in\)"),
        (dict(lora_alpha="16"), "lora_alpha: got '16', expected a number"),
        (dict(lora_alpha=10**400), "lora_alpha: got '1000.*expected a number"),
        (dict(rank_pattern=[1]), "rank_pattern: got"),
        (dict(rank_pattern={"(": 1}), r"rank_pattern: .* is no regular expression"),
        (dict(target_modules=[1]), "target_modules: got"),
        (dict(bias="some"), "bias: got 'some', expected 'none', 'all' or 'lora_only'"),
        (dict(use_rslora="yes"), "use_rslora: got 'yes', expected true or false"),
        (dict(base_model_name_or_path=3), "base_model_name_or_path: got '3'"),
        (dict(peft_type=None), "no peft_type"),
        (dict(lora_bias=True), "lora_B.bias missing; adapter_config.json has lora_bias = true"),
    ],
)
def test_a_config_that_is_wrong_is_refused(plain: Path, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        edited(plain, **fields)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "(a|a)*b",
            "(a*)*b",
            "(a|aa)+b",
            "a?" * 60 + "a" * 60 + "b",
            "(a|a)" * 60 + "b",
            ".*" * 50 + "b",
        ),
        "(" * 30 + "a" + "*)" * 30 + "b",
    ],
)
def test_no_pattern_of_a_download_keeps_us_busy_for_ever(pattern: str) -> None:
    fields = {
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {pattern: 4},
        "alpha_pattern": {pattern: 4},
    }
    config = parse_config(json.dumps(fields | {"target_modules": pattern}).encode(), CONFIG)
    name = "x." + "a" * 59  # re would take longer than the world is old
    assert config.rank(name) == 2
    assert config.scale(name) == 4.0
    assert not config.targets(name)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("model.layers.1.self_attn.q_proj", [1]),
        (r"^model\.layers\.1\.self_attn\.q_proj", [1]),
        ("self_attn.q_proj", [0, 1, 2, 3, 12]),
        (r".*layers\.[0-3]\..*q_proj", [0, 1, 2, 3]),
        ("(q|v)_proj", [0, 1, 2, 3, 12]),
        (r"layers\.(0|1|2)\..*", [0, 1, 2]),
        (r"layers\.(?:[1-3]|1[0-9])\.\w+\.q_proj", [1, 2, 3, 12]),
        (r"layers\.\d+\.self_attn\.[qk]_proj", [0, 1, 2, 3, 12]),
        (r"layers\.\d{2}\..*_proj", [12]),
        ("q", []),
        (r"layers\.(?!0\.).*q_proj", [1, 2, 3, 12]),
        (r".*(?<=2\.self_attn)\.(?P<which>q|v)_proj", [2, 12]),
        (r"(?=.*self_attn)(?i:LAYERS)\.1\..*", [1]),
    ],
)
def test_the_patterns_that_people_write(pattern: str, found: list[int]) -> None:
    data = json.dumps({"peft_type": "LORA", "r": 2, "rank_pattern": {pattern: 4}}).encode()
    config = parse_config(data, CONFIG)
    names = {i: f"model.layers.{i}.self_attn.q_proj" for i in (0, 1, 2, 3, 12)}
    assert [i for i, name in names.items() if config.rank(name) == 4] == found
    assert [i for i, name in names.items() if get_pattern_key([pattern], name) == pattern] == found


@pytest.mark.parametrize(
    "pattern", ["(?>a)b", r"(a)\1+", "a*+b", "(?P<x>a)(?P=x)", "(a{99}){99}", "(" * 60 + ")" * 60]
)
def test_a_pattern_beyond_that_is_refused_with_what_to_do(pattern: str) -> None:
    data = json.dumps({"peft_type": "LORA", "rank_pattern": {pattern: 4}}).encode()
    with pytest.raises(
        FormatError, match=r"zoo/adapter_config\.json: rank_pattern: .*\n  write it with names"
    ) as caught:
        parse_config(data, f"zoo/{CONFIG}")
    assert repr(pattern[:80]) in str(caught.value)


LIN = "base_model.model.lin.lora_"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != LIN + "A.weight"},
            r"lin: lora_A missing, found \['lora_B'\]",
        ),
        (lambda t: {k: v for k, v in t.items() if k != LIN + "B.weight"}, r"lin: lora_B missing"),
        (
            lambda t: t | {LIN + "B.weight": torch.ones(6, 3)},
            r"lin: lora_B is \(6, 3\), expected \(out, 2\)",
        ),
        (
            lambda t: t | {LIN + "A.weight": torch.ones(2)},
            r"lin: lora_A is \(2,\), expected \(2, in",
        ),
        (
            lambda t: t | {LIN + "B.bias": torch.ones(6)},
            r"unexpected lora_B\.bias; .* lora_bias = false",
        ),
        (
            lambda t: t | {LIN + "a.weight": torch.ones(6)},
            r"lin\.lora_a\.weight', expected it to end in one of",
        ),
        (
            lambda t: t | {LIN + "A.default.weight": torch.ones(6)},
            r"unexpected key .*default.*\n.*own name is no part",
        ),
        (
            lambda t: t | {"lora_unet_lin.alpha": torch.ones(1)},
            r"unexpected key 'lora_unet_lin\.alpha'.*\n.*kohya",
        ),
        (lambda t: t | {LIN + "magnitude_vector": torch.ones(6)}, r"lora_magnitude_vector: DoRA"),
        (lambda t: t | {LIN + "embedding_A": torch.ones(2, 6)}, r"lin: lora_embedding_B missing"),
        (lambda t: {}, r"no lora_A and lora_B of any module"),
        (
            lambda t: t | {LIN + "A.weight": torch.ones(2, 6, dtype=torch.int8)},
            r"dtype I8 is not supported.*\n.*quantised",
        ),
        (
            lambda t: t | {LIN + "A.weight": torch.ones(2, 6).to(torch.float8_e4m3fn)},
            r"dtype F8_E4M3 is not supported",
        ),
        (lambda t: t | {LIN + "A.weight": torch.ones(0)}, r"the tensor is empty.*\n.*ZeRO-3"),
        (
            lambda t: t | {"base_model.model.lin.base_layer.lora_A.weight": torch.ones(2, 6)},
            r"lin: 2 nested factors, but target_parameters names none",
        ),
        (
            lambda t: (
                t
                | {
                    "base_model.model.lin.x.lora_A.weight": torch.ones(2, 6),
                    "base_model.model.lin.x.lora_B.weight": torch.ones(6, 2),
                }
            ),
            r"unexpected key base_model\.model\.lin\.x.*expected "
            r"base_model\.model\.lin\.base_layer\.x",
        ),
    ],
)
def test_keys_that_do_not_belong_are_refused(plain: Path, change: Any, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        edited(plain, change)


def test_a_bias_that_peft_never_applies_is_refused(tmp_path: Path) -> None:
    folder = saved(CASES["lora_bias"].made(), tmp_path)
    with pytest.raises(
        UnsupportedAdapter, match=r"attn: lora_B\.bias is not zero, but PEFT never applies it"
    ):
        edited(folder, lambda t: t | {"base_model.model.attn.lora_B.bias": torch.ones(18)})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object, got a list"),
        (b'{"r": 1, "r": 2}', "not valid JSON: the key 'r' occurs twice"),
        (b'{"r": NaN}', "not valid JSON: NaN is not a JSON number"),
        (b'{"r": "\xff"}', "not valid UTF-8"),
        (b'{"r": "\\ud800"}', "not valid UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"r": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than 32 levels"),
        (b'{"peft_type": "LORA", "r": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'"' + b" " * (17 << 20) + b'"', "more than 16 MiB"),
    ],
)
def test_a_broken_config_is_refused(plain: Path, tmp_path: Path, text: bytes, error: str) -> None:
    (tmp_path / CONFIG).write_bytes(text)
    (tmp_path / WEIGHTS).write_bytes((plain / WEIGHTS).read_bytes())
    with pytest.raises(FormatError, match=f"{CONFIG}: {error}"):
        peft.read_folder(tmp_path)


def test_missing_files_and_pickles_are_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"{tmp_path}: no {CONFIG} and no {WEIGHTS}"):
        peft.read_folder(tmp_path)
    (tmp_path / CONFIG).write_bytes((plain / CONFIG).read_bytes())
    with pytest.raises(FormatError, match=f"no {WEIGHTS}"):
        peft.read_folder(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(
        UnsupportedAdapter, match=r"adapter_model\.bin is a pickle.*\n.*save_pretrained"
    ):
        peft.read_folder(tmp_path)


# ---------------------------------------------------------------- safetensors itself
def test_files_are_those_of_the_safetensors_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    tensors = {f"t{i}é": torch.randn(3, i + 1).to(dtypes[i % 4]).mT for i in range(9)}
    data = render_tensors(tensors, {"format": "pt"})
    assert data == save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"})
    assert all(torch.equal(t, load_safetensors(data)[name]) for name, t in tensors.items())
    (tmp_path / "x").write_bytes(data)
    ours, metadata = read_tensors(tmp_path / "x", "x")
    assert metadata == {"format": "pt"}
    assert all(
        t.dtype == ours[name].dtype and torch.equal(t, ours[name]) for name, t in tensors.items()
    )
    assert read_tensors(tmp_path / "x", "x", outline=True)[0]["t2é"].shape == (3, 3)


def test_a_tensor_that_lies_askew_in_its_file_is_read_to_where_it_can_be_used(
    tmp_path: Path,
) -> None:
    narrow, wide = torch.randn(3, 1).half(), torch.randn(2, 3)
    entries = {
        "B": ("F16", narrow, 0),
        "A": ("F32", wide, 6),
        "C": ("F16", narrow, 30),
        "D": ("F64", wide.double(), 36),
    }
    head = {
        name: {"dtype": kind, "shape": [*t.shape], "data_offsets": [begin, begin + t.nbytes]}
        for name, (kind, t, begin) in entries.items()
    }
    numbers = b"".join(t.numpy().tobytes() for _, t, _ in entries.values())
    data = header(json.dumps(head).encode(), numbers)
    assert all(torch.equal(load_safetensors(data)[name], t) for name, (_, t, _) in entries.items())
    (tmp_path / "x").write_bytes(data)
    ours, _ = read_tensors(tmp_path / "x", "x")
    assert all(torch.equal(ours[name], t) for name, (_, t, _) in entries.items())
    assert all(t.data_ptr() % t.element_size() == 0 for t in ours.values())


# ---------------------------------------------------------------- many files of the same two texts
def test_adapters_of_the_same_texts_share_no_numbers(plain: Path, tmp_path: Path) -> None:
    for name, by in (("x", 1.0), ("y", 2.0)):
        shutil.copytree(plain, tmp_path / name)
        tensors = {key: t * by for key, t in load_file(plain / WEIGHTS).items()}
        save_file(tensors, tmp_path / name / WEIGHTS, {"format": "pt"})
    x, y, again = (peft.read_folder(tmp_path / name) for name in ("x", "y", "x"))
    for name, value in x.modules.items():
        assert all(
            torch.equal(a * 2, b)
            for a, b in zip(value.tensors, y.modules[name].tensors, strict=True)
        )
    same(x, again)
    x.modules["lin"].A.zero_()
    assert y.modules["lin"].A.any()
    assert again.modules["lin"].A.any()


def test_factors_lie_row_by_row_also_where_they_were_turned(tmp_path: Path) -> None:
    adapter = peft.read_folder(saved(CASES["mixtral"].made(), tmp_path))
    assert all(t.is_contiguous() for value in adapter.modules.values() for t in value.tensors)


def test_a_text_that_differs_is_read_anew(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "x"))
    before = peft.read_folder(folder).modules["lin"]
    fields = json.loads((folder / CONFIG).read_bytes())
    (folder / CONFIG).write_text(json.dumps(fields | {"lora_alpha": 2 * fields["lora_alpha"]}))
    assert peft.read_folder(folder).modules["lin"].scale == 2 * before.scale
    for dtype in (torch.float16, torch.bfloat16):  # two files of one size
        save_file(
            {k: t.to(dtype) for k, t in load_file(plain / WEIGHTS).items()},
            folder / WEIGHTS,
            {"format": "pt"},
        )
        assert peft.read_folder(folder).modules["lin"].dtype == dtype


def test_each_of_two_files_that_are_wrong_alike_is_named(plain: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        shutil.copytree(plain, tmp_path / name)
        tensors = load_file(plain / WEIGHTS)
        del tensors["base_model.model.lin.lora_A.weight"]
        save_file(tensors, tmp_path / name / WEIGHTS, {"format": "pt"})
        with pytest.raises(
            FormatError, match=re.escape(f"{tmp_path / name / WEIGHTS}: lin: lora_A missing")
        ):
            peft.read_folder(tmp_path / name)


@pytest.mark.parametrize("first", ["good", "bad"])
def test_a_dead_bias_is_looked_at_in_every_file(first: str, tmp_path: Path) -> None:
    good = saved(CASES["lora_bias"].made(), tmp_path / "good")
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    tensors = load_file(good / WEIGHTS)
    tensors["base_model.model.attn.lora_B.bias"][3] = 1.0
    save_file(tensors, bad / WEIGHTS, {"format": "pt"})
    for folder in (good, bad) if first == "good" else (bad, good):
        if folder == good:
            assert peft.read_folder(good).modules["attn"].bias is None
        else:
            with pytest.raises(
                UnsupportedAdapter,
                match=re.escape(f"{bad / WEIGHTS}: attn: lora_B.bias is not zero"),
            ):
                peft.read_folder(bad)


def test_a_cut_off_file_of_a_known_text_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "x"))
    peft.read_folder(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(FormatError, match="bytes of tensors, the file holds"):
        peft.read_folder(folder)


def test_factors_outlive_their_file(plain: Path, tmp_path: Path) -> None:
    folder = written(peft.read_folder(plain), tmp_path / "x")
    adapter = peft.read_folder(folder)
    before = adapter.modules["lin"].A.clone()
    with (folder / WEIGHTS).open(
        "r+b"
    ) as file:  # in place: a mapped file would change, or kill the process
        file.truncate(10)
    assert torch.equal(adapter.modules["lin"].A, before)


def header(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "not a whole safetensors file: 0 bytes, and the length of the header alone takes 8"),
        (b"<!DOCTYPE html><title>Log in</title>", "it begins like a web page"),
        (b"\xff" * 8, "not a whole safetensors file: 8 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            r"not a whole safetensors file.*\n.*Git LFS pointer",
        ),
        (header(b"{}", b"1234"), "describes 0 bytes of tensors, the file holds 4"),
        (header(b'{"x": 3}'), "x: expected dtype, shape and data_offsets"),
        (
            header(b'{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', b"1234"),
            "malformed",
        ),
        (
            header(b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"1234"),
            "malformed",
        ),
        (
            header(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"),
            "does not fill its bytes",
        ),
        (
            header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"12345678"),
            "begin at 4, expected 0",
        ),
        (
            header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"12"),
            "describes 4 bytes of tensors",
        ),
        (header(b'{"__metadata__": {"a": 1}}'), "__metadata__ must map strings to strings"),
        (header(b'{"x": 1, "x": 2}'), "the key 'x' occurs twice"),
    ],
)
def test_a_broken_weights_file_is_refused(
    plain: Path, tmp_path: Path, data: bytes, error: str
) -> None:
    (tmp_path / CONFIG).write_bytes((plain / CONFIG).read_bytes())
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(FormatError, match=rf"(?s){WEIGHTS}: .*{error}"):
        peft.read_folder(tmp_path)
