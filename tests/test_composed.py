"""PEFT's AdaLoRA, VeRA and VB-LoRA folders: PEFT's own increments, and refusals that name the way
in.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense
from torch import nn

import lora_tree as lt
from lora_tree.errors import FormatError, LoraTreeError, UnsupportedAdapter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.d = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.q(x)) + self.v(x).sum()


CONFIGS: dict[str, Any] = {
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q", "v"]),
    "vblora": lambda: peft.VBLoRAConfig(
        r=2, target_modules=["q", "v", "d"], num_vectors=10, vector_length=2, topk=3
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        target_modules=["q", "v", "d"], init_r=4, target_r=2, total_step=10, lora_alpha=3
    ),
    "adalora without alpha": lambda: peft.AdaLoraConfig(
        target_modules=["q"], init_r=4, target_r=2, total_step=10, lora_alpha=0
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of its defaults
        yield


def saved(folder: Path, kind: str, **changes: Any) -> tuple[Path, Any]:
    """A folder that PEFT wrote, with random numbers in every trained tensor; and PEFT's model."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = peft.get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name or "vblora" in name or "lora_" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("kind", CONFIGS)
def test_factors_are_what_peft_adds(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path / "a", kind)
    adapter = lt.Adapter.load(folder)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert adapter.modules.keys() == layers.keys()
    for name, layer in layers.items():
        wanted = layer.get_delta_weight("default").detach().double()
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(dense(adapter.modules[name]), wanted, atol=1e-5, rtol=1e-5)
        assert adapter.modules[name].rank == (4 if kind != "vblora" else 2)
    # The outline has the shapes, and what a tree saves is a LoRA that PEFT reads.
    tree = lt.AdapterTree()
    tree.add("x", adapter=folder)
    outline = tree.outline("x")
    assert outline is not None
    assert {n: v.shape for n, v in outline.modules.items()} == {
        n: v.shape for n, v in adapter.modules.items()
    }
    adapter.save(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "lora")
    for name, layer in layers.items():
        own = again.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        wanted = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(own.detach(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_state_dict_that_repeats_the_shared_tensors_is_what_peft_loads(
    tmp_path: Path, kind: str, named: bool
) -> None:
    folder, model = saved(tmp_path / "a", kind)
    file = folder / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in model.state_dict().items():
        if "default" in key.split("."):
            tensors[key if named else key.replace(".default", "")] = tensor.clone()
    copies = [key for key in tensors if key.count(".vera_A") or key.count("vector_bank")]
    assert len(copies) > 1 or kind.startswith("adalora")
    if kind.startswith("adalora"):
        (ranknum, *_) = (key for key in tensors if ".ranknum" in key)
        tensors[ranknum] += 1.0  # PEFT divides by the one in the file
    safetensors.torch.save_file(tensors, file)
    loaded = peft.PeftModel.from_pretrained(Net(), folder)
    adapter = lt.Adapter.load(folder)
    for name, value in adapter.modules.items():
        wanted = loaded.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(dense(value), wanted.detach().double(), atol=1e-5, rtol=1e-5)


def test_vblora_with_its_largest_weights_alone_is_what_peft_loads(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "a", "vblora", save_only_topk_weights=True)
    loaded = peft.PeftModel.from_pretrained(Net(), folder)
    tree = lt.AdapterTree()
    tree.add("x", adapter=folder)
    outline, adapter = tree.outline("x"), lt.Adapter.load(folder)
    assert outline is not None
    assert {n: v.shape for n, v in outline.modules.items()} == {
        n: v.shape for n, v in adapter.modules.items()
    }
    for name, value in adapter.modules.items():
        wanted = loaded.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(dense(value), wanted.detach().double(), atol=1e-5, rtol=1e-5)
    tree.save(tmp_path / "zoo", copy=True)
    assert not lt.check(tmp_path / "zoo")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("indices", lambda t: t + 9, "expected places in 10 vectors"),
        ("indices", lambda t: t * 0, "one piece has the same vector twice"),
        ("indices", lambda t: t[..., :2].contiguous(), "do not fit 3 vectors"),
        ("indices", lambda t: t.float(), "dtype F32 is not supported, expected one of U8, I16"),
        ("weights", lambda t: t + 1.0, "of more than 1 together"),
        ("weights", lambda t: t * float("nan"), "of more than 1 together"),
        ("weights", None, "expected its topk_indices and its topk_weights"),
        ("indices", None, "expected its topk_indices and its topk_weights"),
    ],
)
def test_vblora_weights_that_make_no_sense_are_refused(
    tmp_path: Path, part: str, change: Any, says: str
) -> None:
    folder, _ = saved(tmp_path / "a", "vblora", save_only_topk_weights=True)
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = f"base_model.model.q.vblora_logits_A_topk_{part}"
    was = tensors.pop(key)
    if change is not None:
        tensors[key] = change(was)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(FormatError, match=says):
        lt.Adapter.load(folder)


@pytest.mark.parametrize("kind", ["vera", "vblora"])
def test_copies_of_a_shared_tensor_that_differ_are_refused(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path / "a", kind)
    file = folder / "adapter_model.safetensors"
    name = {"vera": "vera_B", "vblora": "vblora_vector_bank"}[kind]
    tensors = safetensors.torch.load_file(file)
    shared = tensors[f"base_model.{name}"]
    for wrong in (shared + 1.0, shared[:-1].clone(), shared.double()):
        key = f"base_model.model.q.{name}"
        safetensors.torch.save_file({**tensors, key: wrong}, file)
        with pytest.raises(FormatError, match=rf"{key} differs from {name} elsewhere in the file"):
            lt.Adapter.load(folder)
    # Without the one of the whole model, the copies say it.
    del tensors[f"base_model.{name}"]
    copies = {f"base_model.model.{module}.{name}": shared.clone() for module in ("q", "v")}
    safetensors.torch.save_file({**tensors, **copies}, file)
    wanted = model.get_submodule("base_model.model.q").get_delta_weight("default")
    own = dense(lt.Adapter.load(folder).modules["q"])
    torch.testing.assert_close(own, wanted.detach().double(), atol=1e-5, rtol=1e-5)


def test_pruned_ranks_of_adalora_keep_the_scale_of_the_first(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "a", "adalora")
    pattern = {
        f"{name}.lora_E": keep
        for name, keep in {
            "q": [True, False, True, False],
            "v": [False] * 4,
            "d": [True] * 4,
        }.items()
    }
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    for name, keep in pattern.items():
        stem = f"base_model.model.{name.removesuffix('.lora_E')}"
        rows = torch.tensor(keep)
        tensors[f"{stem}.lora_E"] = tensors[f"{stem}.lora_E"][rows].contiguous()
        tensors[f"{stem}.lora_A"] = tensors[f"{stem}.lora_A"][rows].contiguous()
        tensors[f"{stem}.lora_B"] = tensors[f"{stem}.lora_B"][:, rows].contiguous()
    # A module without ranks has no numbers, which PEFT leaves out of the file as well.
    tensors = {key: tensor for key, tensor in tensors.items() if tensor.numel()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    adapter = lt.Adapter.load(folder)
    assert adapter.ranks == {"d": 4, "q": 2}
    for name in adapter.modules:
        wanted = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(
            dense(adapter.modules[name]), wanted.detach().double(), atol=1e-5, rtol=1e-5
        )


def test_vera_in_a_module_that_is_narrower_than_its_projections_is_refused_by_name(
    tmp_path: Path,
) -> None:
    folder, _ = saved(tmp_path / "a", "vera", target_modules={"q", "d"})
    tree = lt.AdapterTree()
    tree.add("x", adapter=folder)
    with pytest.raises(LoraTreeError, match=r"x: d: .*\(4, 8\)|x: d: .*8.*6"):
        lt.attach(tree, Net()).activate("x")


@pytest.mark.parametrize(
    ("kind", "config", "change", "said"),
    [
        (
            "vera",
            {},
            {"base_model.vera_A": None},
            r"the projections were not saved(.|\n)*lora-tree extract",
        ),
        ("vera", {}, {"base_model.vera_A": torch.ones(3, 8)}, "do not fit vera_A"),
        ("vera", {}, {"base_model.vera_B": torch.ones(4)}, "expected a matrix"),
        ("vera", {}, {"base_model.model.q.vera_lambda_d": None}, "q: no vera_lambda_d"),
        ("vera", {"modules_to_save": ["d"]}, {}, r"modules_to_save = .*beside VERA(.|\n)*extract"),
        ("vera", {"bias": "all"}, {}, "bias = 'all' beside VERA"),
        ("vblora", {"topk": 11}, {}, "do not fit 10 vectors, of which 11 count"),
        ("vblora", {"topk": "2"}, {}, "topk is '2'"),
        ("vblora", {}, {"base_model.vblora_vector_bank": None}, "vblora_vector_bank: missing"),
        ("adalora", {"init_r": 0}, {}, "init_r is 0"),
        ("adalora", {"lora_alpha": None}, {}, "lora_alpha is None"),
        ("adalora", {}, {"base_model.model.q.lora_E": torch.ones(3, 1)}, "do not multiply"),
        ("adalora", {}, {"base_model.model.q.lora_E": torch.ones(4)}, "expected 2 dimensions"),
        ("adalora", {}, {"base_model.model.q.lora_X": torch.ones(4)}, "unexpected key"),
        ("adalora", {}, {"x.q.lora_A": torch.ones(4)}, "unexpected key"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    folder, _ = saved(tmp_path / "a", kind)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors") | change
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=said):
        lt.Adapter.load(folder)


@pytest.mark.parametrize(
    "kind",
    [
        "RANDLORA",
        "FOURIERFT",
        "OFT",
        "BOFT",
        "HRA",
        "C3A",
        "MISS",
        "SHIRA",
        "DELORA",
        "GRALORA",
        "IA3",
    ],
)
def test_kinds_that_are_no_product_name_extract(tmp_path: Path, kind: str) -> None:
    folder, _ = saved(tmp_path / "a", "adalora")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": kind}))
    with pytest.raises(UnsupportedAdapter, match=rf"peft_type is '{kind}'(.|\n)*lora-tree extract"):
        lt.Adapter.load(folder)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_increments_of_a_changed_base_name_both_ways(tmp_path: Path, init: str) -> None:
    folder, _ = saved(tmp_path / "a", "adalora")
    file = folder / "adapter_config.json"
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": init}
    file.write_text(json.dumps(said))
    with pytest.raises(
        UnsupportedAdapter,
        match=r"changed the base's own(.|\n)*conversion=(.|\n)*lora-tree extract",
    ):
        lt.Adapter.load(folder)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["vera", "vblora", "adalora"]),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["r", "topk", "init_r", "lora_alpha", "peft_type", "bias", "modules_to_save"]
            ),
            st.sampled_from([None, 0, -1, 3, 10**30, 1e308, "x", [], {}, True, "ADALORA", "VERA"]),
        ),
        max_size=3,
    ),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=3),
)
def test_mutated_folders_give_an_adapter_or_the_librarys_own_error(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    fields: list[tuple[str, Any]],
    shapes: list[tuple[int, int]],
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"composed-{kind}"
    if kind not in FOLDERS:
        saved(folder, kind)
        FOLDERS[kind] = (
            json.loads((folder / "adapter_config.json").read_text()),
            safetensors.torch.load_file(folder / "adapter_model.safetensors"),
        )
    config, tensors = dict(FOLDERS[kind][0]), dict(FOLDERS[kind][1])
    config.update(fields)
    for at, cut in shapes:
        key = sorted(tensors)[at % len(tensors)]
        whole = tensors[key]
        tensors[key] = whole[cut:].contiguous() if len(whole) > cut else whole.flatten()[:1].clone()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    try:
        lt.Adapter.load(folder)
    except LoraTreeError as error:
        assert isinstance(error, FormatError)


FOLDERS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}
