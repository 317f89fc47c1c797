"""mlx-lm's folders, in and out: its written format by hand in float64, and refusals one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense, low_rank, random_adapter
from sampling import slow
from shell import Shell
from torch import nn

import lora_tree as lt
from lora_tree.errors import FolderError, FormatError, LoraTreeError, SpecError, UnsupportedAdapter
from lora_tree.formats.recognise import recognise
from lora_tree.lowrank import EMBEDDING, PARAMETER, Layout

Q, DOWN, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head"
CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 16,
    "model": "mlx-community/some-4bit",
    "lora_parameters": {"rank": 3, "alpha": 16, "scale": 20.0, "dropout": 0.0, "keys": None},
}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """The factors as mlx-lm writes them: lora_a (in, r) and lora_b (r, out)."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, (out, into) in {Q: (6, 5), DOWN: (5, 8), HEAD: (11, 5)}.items():
        found[f"{name}.lora_a"] = draw.standard_normal((into, 3)).astype(np.float32)
        found[f"{name}.lora_b"] = draw.standard_normal((3, out)).astype(np.float32)
    return found


def written(folder: Path, tensors: dict[str, np.ndarray], config: Any = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = as_mlx_saves(safetensors.numpy.save(tensors))
    (folder / "adapters.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def as_mlx_saves(data: bytes) -> bytes:
    """A file as ``mx.save_safetensors`` writes it: null for metadata that there are none of."""
    size = int.from_bytes(data[:8], "little")
    header = {"__metadata__": None, **json.loads(data[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# ---------------------------------------------------------------------- in
def test_a_folder_is_what_mlx_fuses(tmp_path: Path) -> None:
    folder, tensors = written(tmp_path / "a", arrays()), arrays()
    for place in (folder, folder / "adapters.safetensors"):
        adapter = lt.Adapter.load(place)
        assert list(adapter.modules) == sorted((Q, DOWN, HEAD))
        assert adapter.base == "mlx-community/some-4bit"
        for name, value in adapter.modules.items():
            # LoRALinear.fuse: weight + (scale · lora_b.T) @ lora_a.T
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            wanted = 20.0 * b.astype(np.float64).T @ a.astype(np.float64).T
            torch.testing.assert_close(dense(value), torch.from_numpy(wanted))
    found = recognise(folder)
    assert (found.kind, found.sign) == ("mlx", "a folder with adapters.safetensors")
    assert recognise(folder / "adapters.safetensors").sign == "its keys end in .lora_a and .lora_b"
    outline = lt.AdapterTree()
    outline.add("x", adapter=folder)
    shown = outline.outline("x")
    assert shown is not None
    assert shown.modules[Q].A.is_meta


def test_an_embedding_is_told_by_its_name_and_experts_become_linears(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    a, b = draw.standard_normal((7, 3)), draw.standard_normal((3, 4))
    up_a, up_b = draw.standard_normal((2, 3, 5)), draw.standard_normal((2, 6, 3))
    tensors = {
        "model.embed_tokens.lora_a": a,
        "model.embed_tokens.lora_b": b,
        "model.layers.0.mlp.switch_mlp.up_proj.lora_a": up_a,
        "model.layers.0.mlp.switch_mlp.up_proj.lora_b": up_b,
        "model.layers.1.block_sparse_moe.switch_mlp.down_proj.lora_a": up_a,
        "model.layers.1.block_sparse_moe.switch_mlp.down_proj.lora_b": up_b,
    }
    folder = written(
        tmp_path / "a", {key: each.astype(np.float32) for key, each in tensors.items()}
    )
    modules = lt.Adapter.load(folder).modules
    embedding = modules["model.embed_tokens"]
    assert embedding.layout == EMBEDDING
    # LoRAEmbedding.fuse: weight (vocab, dim) + scale · lora_a @ lora_b
    wanted = torch.from_numpy(20.0 * a @ b)
    torch.testing.assert_close(dense(embedding).mT, wanted, atol=1e-4, rtol=1e-5)
    for expert in range(2):
        # LoRASwitchLinear.fuse: weight (experts, out, in) + scale · lora_b @ lora_a
        wanted = torch.from_numpy(20.0 * up_b[expert] @ up_a[expert])
        for name in (
            f"model.layers.0.mlp.experts.{expert}.up_proj",
            f"model.layers.1.block_sparse_moe.experts.{expert}.w2",
        ):
            torch.testing.assert_close(dense(modules[name]), wanted, atol=1e-4, rtol=1e-5)


def test_experts_of_mlx_are_fused_where_transformers_has_one_parameter(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.Qwen3MoeConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, moe_intermediate_size=6,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=3,
        num_experts_per_tok=2, head_dim=4,
    )  # fmt: skip
    base = transformers.Qwen3MoeForCausalLM(config)
    draw = np.random.default_rng(2)
    tensors = {}
    for leaf, (out, into) in {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}.items():
        key = f"model.layers.0.mlp.switch_mlp.{leaf}"
        tensors[f"{key}.lora_a"] = draw.standard_normal((3, 3, into)).astype(np.float32)
        tensors[f"{key}.lora_b"] = draw.standard_normal((3, out, 3)).astype(np.float32)
    tree = lt.AdapterTree()
    tree.add("moe", adapter=written(tmp_path / "a", tensors))
    experts = base.model.layers[0].mlp.experts
    before = {name: p.detach().double().clone() for name, p in experts.named_parameters()}
    lt.attach(tree, base).activate("moe")

    def product(leaf: str) -> torch.Tensor:
        key = f"model.layers.0.mlp.switch_mlp.{leaf}"
        a, b = (torch.from_numpy(tensors[f"{key}.lora_{half}"]).double() for half in "ab")
        return 20.0 * b @ a

    both = torch.cat([product("gate_proj"), product("up_proj")], dim=1)
    for name, delta in (("gate_up_proj", both), ("down_proj", product("down_proj"))):
        found = getattr(experts, name).detach().double()
        torch.testing.assert_close(found, before[name] + delta, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------------- out
def test_what_is_written_is_the_format_and_comes_back(tmp_path: Path) -> None:
    made = lt.Adapter(
        {
            Q: low_rank(6, 5, 2, scale=0.5),
            DOWN: low_rank(5, 8, 3, seed=1, scale=-2.0),
            "model.embed_tokens": low_rank(4, 9, 1, seed=2, layout=EMBEDDING),
        },
        base="org/model",
    )
    made.save(tmp_path / "mlx", form="mlx")
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": 4,
        "model": "org/model",
        "lora_parameters": {
            "rank": 3,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": ["mlp.down_proj", "model.embed_tokens", "self_attn.q_proj"],
        },
    }
    tensors = safetensors.torch.load_file(tmp_path / "mlx/adapters.safetensors")
    for name, value in made.modules.items():
        a, b = (tensors[f"{name}.lora_{half}"].double() for half in "ab")
        assert a.shape[1] == b.shape[0] == 3  # mlx-lm makes factors of one rank
        torch.testing.assert_close((a @ b).mT, dense(value), atol=1e-6, rtol=1e-6)
    again = lt.Adapter.load(tmp_path / "mlx")
    for name, value in made.modules.items():
        torch.testing.assert_close(dense(again.modules[name]), dense(value), atol=1e-6, rtol=1e-6)
        assert again.modules[name].layout == value.layout
    first = {
        file.name: file.read_bytes() for file in (tmp_path / "mlx").iterdir() if file.is_file()
    }
    made.save(tmp_path / "mlx", form="mlx")
    assert all((tmp_path / "mlx" / name).read_bytes() == data for name, data in first.items())


def test_the_base_says_how_many_layers_there_are(tmp_path: Path) -> None:
    base = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList()})})
    for _ in range(5):
        base["model"]["layers"].append(nn.ModuleDict({"q": nn.Linear(4, 4)}))  # type: ignore[index,union-attr]
    tree = lt.AdapterTree()
    tree.add("fr", adapter=random_adapter({"model.layers.1.q": (4, 4)}), weight=0.5)
    lt.export_mlx(tree, "fr", tmp_path / "a", base=base)
    lt.export_mlx(tree, "fr", tmp_path / "b")
    counts = []
    for name in "ab":
        counts.append(
            json.loads((tmp_path / name / "adapter_config.json").read_text())["num_layers"]
        )
    assert counts == [5, 2]
    own = tree.adapter("fr")
    assert own is not None
    read = lt.Adapter.load(tmp_path / "a").modules["model.layers.1.q"]
    torch.testing.assert_close(dense(read), 0.5 * dense(own.modules["model.layers.1.q"]))


def test_the_command_line_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = lt.AdapterTree(base="org/model")
    tree.add("fr", adapter=random_adapter({Q: (6, 5)}))
    tree.save(tmp_path / "zoo")
    code, out, _ = Shell(capsys)(
        "export", tmp_path / "zoo", "fr", "--as", "mlx", "--out", tmp_path / "x"
    )
    assert (code, "1 module," in out) == (0, True)
    assert recognise(tmp_path / "x").kind == "mlx"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (Q, low_rank(6, 5, bias=torch.ones(6)), "it adds a bias"),
        ("experts.up", low_rank(6, 5, batch=(2,), layout=PARAMETER), "parameter factors"),
        ("conv", low_rank(6, 9, layout=Layout("conv", (3, 3))), "conv factors"),
    ],
)
def test_what_the_format_can_not_hold_is_refused(
    tmp_path: Path, name: str, value: lt.LowRank, said: str
) -> None:
    with pytest.raises(FormatError, match=f"{name}: {said}"):
        lt.Adapter({name: value}).save(tmp_path / "a", form="mlx")
    head = lt.Adapter(
        {Q: low_rank(6, 5)}, overrides={"score.weight": lt.Override(torch.ones(2, 2))}
    )
    with pytest.raises(FormatError, match=r"score\.weight: replaced by the adapter, and mlx-lm's"):
        head.save(tmp_path / "a", form="mlx")
    assert not (tmp_path / "a").exists()
    random_adapter({Q: (6, 5)}).save(tmp_path / "peft")
    with pytest.raises(FolderError, match=r"holds adapter_model\.safetensors; mlx-lm"):
        random_adapter({Q: (6, 5)}).save(tmp_path / "peft", form="mlx")
    assert list(lt.Adapter.load(tmp_path / "peft").modules) == [Q]
    with pytest.raises(SpecError, match="form must be one of peft, kohya, diffusers, mlx"):
        head.save(tmp_path / "a", form="mlxx")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- refused on the way in
def changed(**fields: Any) -> dict[str, Any]:
    return {**CONFIG, **fields}


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        (changed(fine_tune_type="dora"), UnsupportedAdapter,
         r"fine_tune_type is dora(.|\n)*lora-tree extract"),
        (changed(fine_tune_type="full"), UnsupportedAdapter,
         r"fine_tune_type is full(.|\n)*lora-tree extract"),
        (changed(fine_tune_type="x"), UnsupportedAdapter,
         r"fine_tune_type is 'x', expected 'lora'"),
        (changed(fine_tune_type=[]), UnsupportedAdapter, r"fine_tune_type is \[\]"),
        (changed(lora_parameters=None), FormatError, "no lora_parameters, which say the scale"),
        (changed(lora_parameters={"rank": 3}), FormatError, "lora_parameters.scale is None"),
        (changed(lora_parameters={"scale": True}), FormatError, "lora_parameters.scale is True"),
        (changed(lora_parameters={"scale": 10**400}), FormatError, "lora_parameters.scale is 1000"),
        (changed(lora_parameters={"scale": 1, "rank": 0}), FormatError,
         "lora_parameters.rank is 0"),
        (changed(lora_parameters={"scale": 1, "rank": 4}), FormatError, "the config says rank 4"),
        ([], FormatError, "expected a JSON object"),
    ],
)  # fmt: skip
def test_a_config_that_says_something_else_is_refused(
    tmp_path: Path, config: Any, error: type[LoraTreeError], said: str
) -> None:
    folder = written(tmp_path / "a", arrays(), config)
    with pytest.raises(error, match=said):
        lt.Adapter.load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{Q}.lora_b": None}, "q_proj: no lora_b: half a pair"),
        ({f"{Q}.lora_b": np.ones((2, 6), np.float32)}, "do not multiply"),
        ({f"{Q}.lora_a": np.ones((5,), np.float32)}, r"expected \(in, r\) and \(r, out\)"),
        ({f"{Q}.lora_a": np.ones((1, 3, 5), np.float32)}, r"expected \(in, r\) and \(r, out\)"),
        ({f"{Q}.weight": np.ones((2, 2), np.float32)}, "unexpected key .*expected <module>.lora_a"),
        ({".lora_a": np.ones((2, 2), np.float32)}, "unexpected key '.lora_a'"),
        ({f"{Q}.m": np.ones((6,), np.float32)}, "DoRA rescales the whole weight"),
        (
            {f"{Q}.lora_a": np.ones((5, 3), np.int32), f"{Q}.lora_b": np.ones((3, 6), np.int32)},
            "q_proj",
        ),
    ],
)
def test_tensors_that_do_not_belong_are_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    tensors = {key: each for key, each in {**arrays(), **change}.items() if each is not None}
    folder = written(tmp_path / "a", tensors)
    with pytest.raises(FormatError, match=said) as told:
        lt.Adapter.load(folder)
    assert "adapters.safetensors" in str(told.value)


def test_a_file_without_its_config_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", arrays())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"no adapter_config\.json beside it"):
        lt.Adapter.load(folder)


def test_a_gguf_adapter_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "fr.gguf"
    file.write_bytes(GGUF)
    with pytest.raises(
        UnsupportedAdapter, match=r"fr\.gguf: GGUF adapters are written(.|\n)*made from"
    ):
        lt.Adapter.load(file)
    with pytest.raises(UnsupportedAdapter):
        lt.AdapterTree().add("fr", adapter=file)


# ---------------------------------------------------------------------- mutated
GGUF = (
    b"GGUF"
    + (3).to_bytes(4, "little")
    + (2).to_bytes(8, "little")
    + b"\x01"
    + b"\0" * 7
    + b"general"
)


@slow
@settings(max_examples=1500, deadline=None)
@given(
    st.sampled_from(["a.gguf", "a.safetensors", "adapters.safetensors"]),
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 8), st.binary(max_size=8)), max_size=4
    ),
)
def test_mutated_gguf_files_are_the_librarys_own_errors(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[int, int, bytes]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "gguf-fuzz"
    folder.mkdir(exist_ok=True)
    data = GGUF
    for place, cut, junk in edits:
        at = place % (len(data) + 1)
        data = data[:at] + junk + data[at + cut :]
    (folder / name).write_bytes(data)
    (folder / "adapter_config.json").write_bytes(TEXT)
    with pytest.raises(FormatError):
        lt.Adapter.load(folder / name)


VALID = as_mlx_saves(safetensors.numpy.save(arrays()))
TEXT = json.dumps(CONFIG).encode()
JUNK = [
    b"",
    b"\0",
    b'"',
    b"{",
    b"}",
    b"[1",
    b"-1",
    b"99999999",
    b"lora_a",
    b'"scale"',
    b"null",
    b"\xff",
]


@slow
@settings(max_examples=1500, deadline=None)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 12), st.sampled_from(JUNK)),
        min_size=1,
        max_size=4,
    ),
)
def test_mutated_files_give_an_adapter_or_the_librarys_own_error(
    tmp_path_factory: pytest.TempPathFactory,
    is_config: bool,
    edits: list[tuple[int, int, bytes]],
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mlx-fuzz"
    folder.mkdir(exist_ok=True)
    data = TEXT if is_config else VALID
    # The header: what lies behind it are numbers, and any are valid.
    end = len(data) if is_config else 8 + int.from_bytes(data[:8], "little")
    for place, cut, junk in edits:
        at = place % end
        data = data[:at] + junk + data[at + cut :]
    (folder / "adapter_config.json").write_bytes(data if is_config else TEXT)
    (folder / "adapters.safetensors").write_bytes(VALID if is_config else data)
    try:
        adapter = lt.Adapter.load(folder)
    except LoraTreeError as error:
        assert isinstance(error, FormatError)
        return
    room = (folder / "adapters.safetensors").stat().st_size
    assert sum(value.nbytes for value in adapter.modules.values()) <= room
