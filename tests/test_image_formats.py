"""kohya's and diffusers' files, in and out: dense algebra, torch's own convolutions, and refusals
one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lora_tree as lt
from lora_tree.errors import FormatError, LoraTreeError, SpecError, UnsupportedAdapter
from lora_tree.formats.recognise import kind_of_keys, recognise
from lora_tree.lowrank import LINEAR, Layout

UNET = "lora_unet_down_blocks_0_attentions_0_proj_in"
FLAT = "unet.down_blocks_0_attentions_0_proj_in"
DOTTED = "unet.down_blocks.0.attentions.0.proj_in"


def pair(
    name: str, *, r: int = 2, kernel: tuple[int, ...] = (), seed: int = 0
) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    ones = (1,) * len(kernel)
    return {
        f"{name}.lora_down.weight": torch.randn(r, 6, *kernel),
        f"{name}.lora_up.weight": torch.randn(5, r, *ones),
    }


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    safetensors.torch.save_file(dict(tensors), path, dict(metadata or {"format": "pt"}))
    return path


def adapter_of(*names: str) -> lt.Adapter:
    torch.manual_seed(3)
    modules = {}
    for name in names:
        layout = Layout("conv", (3, 3)) if name.endswith("conv1") else LINEAR
        into = 6 * 9 if layout.kernel else 6
        modules[name] = lt.LowRank(torch.randn(2, into), torch.randn(5, 2), 0.5, layout=layout)
    return lt.Adapter(modules)


# ---------------------------------------------------------------------- kohya
def test_an_absent_alpha_is_the_rank(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", pair(UNET, r=2))
    value = lt.Adapter.load(file).modules[FLAT]
    assert value.scale == 1.0
    file = write(tmp_path / "b.safetensors", pair(UNET, r=2) | {f"{UNET}.alpha": torch.tensor(1.0)})
    assert lt.Adapter.load(file).modules[FLAT].scale == 0.5


def test_words_of_components(tmp_path: Path) -> None:
    tensors = pair(UNET) | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    tensors |= pair("lora_te2_text_model_encoder_layers_0_mlp_fc1")
    tensors |= pair("lora_te3_encoder_block_0_layer_0_SelfAttention_k")
    found = lt.Adapter.load(write(tmp_path / "a.safetensors", tensors))
    assert set(found.modules) == {
        FLAT,
        "text_encoder.text_model_encoder_layers_0_mlp_fc1",
        "text_encoder_2.text_model_encoder_layers_0_mlp_fc1",
        "text_encoder_3.encoder_block_0_layer_0_SelfAttention_k",
    }


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_a_convolution_is_the_product_of_the_files_two_convolutions(
    tmp_path: Path, kernel: tuple[int, ...]
) -> None:
    tensors = pair(UNET, kernel=kernel)
    value = lt.Adapter.load(write(tmp_path / "a.safetensors", tensors)).modules[FLAT]
    down, up = (tensors[f"{UNET}.lora_{half}.weight"].double() for half in ("down", "up"))
    dense = value.dense(dtype=torch.float64)
    if not kernel:
        assert value.layout == LINEAR
        torch.testing.assert_close(dense, up @ down)
        return
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    wanted = F.conv2d(F.conv2d(x, down), up)
    torch.testing.assert_close(F.conv2d(x, dense.reshape(5, 6, *kernel)), wanted)


def test_a_tucker_convolution_is_the_product_of_the_files_three_convolutions(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{UNET}.lora_down.weight": torch.randn(3, 6, 1, 1),
        f"{UNET}.lora_mid.weight": torch.randn(2, 3, 3, 3),
        f"{UNET}.lora_up.weight": torch.randn(5, 2, 1, 1),
        f"{UNET}.alpha": torch.tensor(1.0),
    }
    value = lt.Adapter.load(write(tmp_path / "a.safetensors", tensors)).modules[FLAT]
    assert value.rank == 2
    down, mid, up = (
        tensors[f"{UNET}.lora_{part}.weight"].double() for part in ("down", "mid", "up")
    )
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    wanted = F.conv2d(F.conv2d(F.conv2d(x, down), mid), up) * 0.5
    kernel = value.dense(dtype=torch.float64).reshape(5, 6, 3, 3)
    torch.testing.assert_close(F.conv2d(x, kernel), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kohya_out_and_in_again_keeps_bits_and_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    made = adapter_of(FLAT, "unet.conv1", "text_encoder.text_model_encoder_layers_0_mlp_fc1")
    made = made.to(dtype=dtype)
    made.save(tmp_path / "a.safetensors", form="kohya")
    again = lt.Adapter.load(tmp_path / "a.safetensors")
    assert set(again.modules) == set(made.modules)
    for name, value in made.modules.items():
        back = again.modules[name]
        assert (back.scale, back.layout) == (value.scale, value.layout)
        assert torch.equal(back.A, value.A)
        assert torch.equal(back.B, value.B)
    first = (tmp_path / "a.safetensors").read_bytes()
    again.save(tmp_path / "b.safetensors", form="kohya")
    assert (tmp_path / "b.safetensors").read_bytes() == first


def test_a_scale_that_no_fp32_alpha_gives_back_is_folded(tmp_path: Path) -> None:
    odd = lt.LowRank(torch.ones(3, 6), torch.ones(5, 3), 0.1)
    lt.Adapter({FLAT: odd}).save(tmp_path / "a.safetensors", form="kohya")
    back = lt.Adapter.load(tmp_path / "a.safetensors").modules[FLAT]
    torch.testing.assert_close(back.dense(), odd.dense(), rtol=1e-6, atol=0)


def test_one_text_encoder_is_te_and_several_are_counted(tmp_path: Path) -> None:
    fc1 = "text_model_encoder_layers_0_mlp_fc1"
    keys = {}
    for encoders in (("text_encoder",), ("text_encoder", "text_encoder_2")):
        file = tmp_path / "a.safetensors"
        adapter_of(*(f"{each}.{fc1}" for each in encoders)).save(file, form="kohya")
        keys[encoders] = {key.split("_text")[0] for key in safetensors.torch.load_file(file)}
    assert list(keys.values()) == [{"lora_te"}, {"lora_te1", "lora_te2"}]


# ---------------------------------------------------------------------- diffusers
OLD = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("down", "up", "module"),
    [
        ("unet.mid.lora_A.weight", "unet.mid.lora_B.weight", "unet.mid"),
        ("unet.mid.lora.down.weight", "unet.mid.lora.up.weight", "unet.mid"),
        (
            "text_encoder.x.fc1.lora_linear_layer.down.weight",
            "text_encoder.x.fc1.lora_linear_layer.up.weight",
            "text_encoder.x.fc1",
        ),
        (
            f"{OLD}.processor.to_q_lora.down.weight",
            f"{OLD}.processor.to_q_lora.up.weight",
            f"{OLD}.to_q",
        ),
        (
            f"{OLD}.processor.to_out_lora.down.weight".removeprefix("unet."),
            f"{OLD}.processor.to_out_lora.up.weight".removeprefix("unet."),
            f"{OLD}.to_out.0",
        ),
        (
            "text_encoder.x.self_attn.to_out_lora.down.weight",
            "text_encoder.x.self_attn.to_out_lora.up.weight",
            "text_encoder.x.self_attn.out_proj",
        ),
    ],
)
def test_names_of_every_age(tmp_path: Path, down: str, up: str, module: str) -> None:
    file = write(tmp_path / "a.safetensors", {down: torch.ones(2, 6), up: torch.ones(5, 2)})
    found = lt.Adapter.load(file)
    assert list(found.modules) == [module]
    assert found.modules[module].scale == 1.0


def test_alphas_in_the_header_go_by_component_and_pattern(tmp_path: Path) -> None:
    said = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"other": 8}}
    names = ("unet.mid", "unet.other", "text_encoder.fc1")
    tensors = {f"{name}.lora_{h}.weight": torch.ones(2, 2) for name in names for h in "AB"}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
    found = lt.Adapter.load(write(tmp_path / "a.safetensors", tensors, metadata)).modules
    assert [found[name].scale for name in names] == [2.0, 4.0, 1.0]


def test_an_alpha_beside_the_factors(tmp_path: Path) -> None:
    tensors = {f"unet.mid.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    tensors["unet.mid.alpha"] = torch.tensor(1.0)
    found = lt.Adapter.load(write(tmp_path / "a.safetensors", tensors))
    assert found.modules["unet.mid"].scale == 0.5


def test_diffusers_out_and_in_again_is_the_same_increment(tmp_path: Path) -> None:
    made = adapter_of(DOTTED, "unet.conv1", "text_encoder.encoder.layers.0.mlp.fc1")
    made.save(tmp_path / "folder", form="diffusers")
    assert (tmp_path / "folder" / "pytorch_lora_weights.safetensors").is_file()
    again = lt.Adapter.load(tmp_path / "folder")
    known = {name.replace(".text_model", ""): value for name, value in again.modules.items()}
    assert set(known) == set(made.modules)
    for name, value in made.modules.items():
        assert torch.equal(known[name].dense(), value.dense())


# ---------------------------------------------------------------------- what is refused
HALF = {f"{UNET}.lora_down.weight": torch.ones(2, 6)}
REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], type[LoraTreeError], str]] = {
    "half a pair": (lambda: HALF, FormatError, f"{UNET}: no up factor: half a pair"),
    "factors that do not multiply": (
        lambda: HALF | {f"{UNET}.lora_up.weight": torch.ones(5, 3)},
        FormatError,
        r"down \(2, 6\), up \(5, 3\) do not multiply",
    ),
    "an unknown part": (
        lambda: pair(UNET) | {f"{UNET}.lora_side.weight": torch.ones(1)},
        FormatError,
        "unexpected key 'lora_unet_.*lora_side.weight'",
    ),
    "a key of no module": (
        lambda: pair(UNET) | {"step": torch.ones(1)},
        FormatError,
        "unexpected key 'step'",
    ),
    "DoRA": (
        lambda: pair(UNET) | {f"{UNET}.dora_scale": torch.ones(5, 1)},
        UnsupportedAdapter,
        "DoRA rescales the whole weight",
    ),
    "OFT": (
        lambda: {f"{UNET}.oft_blocks": torch.ones(2, 2)},
        UnsupportedAdapter,
        "OFT rotates the weight",
    ),
    "two words for one encoder": (
        lambda: pair("lora_te_a") | pair("lora_te1_b"),
        FormatError,
        "keys of both lora_te1_ and lora_te_",
    ),
    "an alpha of two numbers": (
        lambda: pair(UNET) | {f"{UNET}.alpha": torch.ones(2)},
        FormatError,
        r"alpha is \(2,\), expected one number",
    ),
    "an alpha that is no number": (
        lambda: pair(UNET) | {f"{UNET}.alpha": torch.tensor(float("nan"))},
        FormatError,
        "alpha is nan, expected a finite number",
    ),
    "two formats at once": (
        lambda: pair(UNET) | {"unet.mid.lora_A.weight": torch.ones(2, 2)},
        FormatError,
        "its keys are of diffusers and kohya at once",
    ),
    "no format": (
        lambda: {"weight": torch.ones(2, 2)},
        FormatError,
        "no adapter of a known format: its keys are weight",
    ),
    "PEFT's factors alone": (
        lambda: {"base_model.model.q.lora_A.weight": torch.ones(2, 2)},
        FormatError,
        "without the config that says their scales",
    ),
    "diffusers' DoRA": (
        lambda: {
            "unet.mid.lora_A.weight": torch.ones(2, 2),
            "unet.mid.lora_magnitude_vector": torch.ones(2),
        },
        UnsupportedAdapter,
        "DoRA rescales the whole weight",
    ),
    "one factor under two names": (
        lambda: {
            "unet.mid.lora_A.weight": torch.ones(2, 2),
            "unet.mid.lora.down.weight": torch.ones(2, 2),
        },
        FormatError,
        "are the same factor",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_is_refused_names_the_key(tmp_path: Path, what: str) -> None:
    make, kind, text = REFUSED[what]
    file = write(tmp_path / "a.safetensors", make())
    with pytest.raises(kind, match=text):
        lt.Adapter.load(file)
    with pytest.raises(LoraTreeError):
        lt.AdapterTree().add("style", adapter=file).source.load()  # type: ignore[union-attr]


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    file = tmp_path / "style.ckpt"
    file.write_bytes(b"\x80\x04N.")
    with pytest.raises(UnsupportedAdapter, match="pickles, which can run code"):
        lt.Adapter.load(file)


@pytest.mark.parametrize(
    ("form", "name", "text"),
    [
        ("kohya", "q_proj", "kohya's keys know the components text_encoder"),
        ("kohya", "transformer.blocks.0.to_q", "not 'transformer'"),
        ("diffusers", "q_proj", "is no component of a diffusers pipeline"),
        ("diffusers", FLAT, "it has underscores for dots"),
    ],
)
def test_what_a_format_can_not_hold_is_refused_and_nothing_is_written(
    tmp_path: Path, form: str, name: str, text: str
) -> None:
    with pytest.raises(FormatError, match=text):
        adapter_of(name).save(tmp_path / "a.safetensors", form=form)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_form_that_is_none_and_a_name_without_its_suffix(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"form must be one of .*did you mean 'kohya'"):
        adapter_of(FLAT).save(tmp_path / "a.safetensors", form="kohia")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"whose name ends in \.safetensors"):
        adapter_of(FLAT).save(tmp_path / "a", form="kohya")


# ---------------------------------------------------------------------- a file is a node
def test_a_file_is_recognised_by_what_it_says(tmp_path: Path) -> None:
    kohya = write(tmp_path / "a.safetensors", pair(UNET))
    assert (recognise(kohya).kind, recognise(kohya).file) == ("kohya", kohya)
    assert kind_of_keys(["unet.a.lora_A.weight"], "x")[0] == "diffusers"
    adapter_of("q_proj").save(tmp_path / "peft")
    assert recognise(tmp_path / "peft").kind == "peft"


def test_a_tree_keeps_a_file_where_it_is_and_saves_a_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "style.safetensors", pair(UNET, kernel=(3, 3)))
    tree = lt.AdapterTree()
    node = tree.add("style", adapter=file, weight=0.5)
    assert node.loaded is None
    outline = tree.outline("style")
    assert outline is not None
    assert outline.modules[FLAT].A.is_meta
    tree.save(tmp_path / "zoo")
    again = lt.load(tmp_path / "zoo")
    wanted, got = lt.Adapter.load(file), again.adapter("style")
    assert got is not None
    assert torch.equal(got.modules[FLAT].dense(), wanted.modules[FLAT].dense())
    assert again["style"].weight == 0.5


# ---------------------------------------------------------------------- strangers' files
VALID = pair(UNET) | {f"{UNET}.alpha": torch.tensor(1.0)}
SAVED = {
    "kohya": safetensors.torch.save(VALID, {"format": "pt"}),
    "lycoris": safetensors.torch.save(
        {
            f"{UNET}.hada_w1_a": torch.ones(5, 2),
            f"{UNET}.hada_w1_b": torch.ones(2, 6),
            f"{UNET}.hada_w2_a": torch.ones(5, 2),
            f"{UNET}.hada_w2_b": torch.ones(2, 6),
        },
    ),
    "diffusers": safetensors.torch.save(
        {"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(3, 2)},
        {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})},
    ),
}


@given(st.data())
def test_a_mutated_file_is_read_or_refused_in_our_own_words(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(SAVED[data.draw(st.sampled_from(sorted(SAVED)))])
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        if data.draw(st.booleans()):
            whole[at] = data.draw(st.integers(0, 255))
        else:
            del whole[at : at + data.draw(st.integers(1, 40))]
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    file.write_bytes(whole)
    try:
        found = lt.Adapter.load(file)
    except LoraTreeError as error:
        assert str(file) in str(error)
    else:
        assert found.modules
