"""Bases that are no plain language model: opened in their own class, recurrent caches, encoders and
decoders.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from zoo import listing

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.demo import bytelevel
from lora_tree.errors import StateError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*generation flags:UserWarning"),
]
BYTES = {"vocab_size": bytelevel.VOCABULARY}


@pytest.fixture(autouse=True)
def quiet() -> None:
    T.utils.logging.disable_progress_bar()


def told(*arguments: str | Path) -> int:
    """The exit code of a command in this process."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    code = exit_.value.code
    assert isinstance(code, int)
    return code


def adapted(base: nn.Module, *ends: str) -> lt.AdapterTree:
    """fr and fr/legal on the Linears of these names, with B drawn at random, large enough to be
    heard.
    """
    tree = lt.AdapterTree(defaults={"r": 2, "target_modules": list(ends)})
    tree.add("fr")
    tree.add("fr/legal")
    lt.attach(tree, base).detach()
    draw = torch.Generator().manual_seed(1)
    for path in tree.paths():
        own = tree.adapter(path)
        assert own is not None
        for value in own.modules.values():
            value.B.copy_(torch.randn(value.B.shape, generator=draw))
    return tree


# ----------------------------------------------------------------- the class that config.json names
def t5() -> nn.Module:
    config = T.T5Config(
        **BYTES, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T.T5ForConditionalGeneration(config)


def llava() -> nn.Module:
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {
        "model_type": "clip_vision_model",
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
        **size,
    }
    text = {"model_type": "llama", "num_key_value_heads": 2, **BYTES, **size}
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=text, vision_config=vision, image_token_index=255)
    )


BASES = {"t5": (t5, ("q", "v")), "llava": (llava, ("q_proj", "v_proj"))}


def on_disk(
    make: Callable[[], nn.Module], ends: tuple[str, ...], folder: Path
) -> tuple[Any, lt.AdapterTree]:
    """The base with a tokenizer of bytes in folder/base, and a tree over it in folder/zoo."""
    torch.manual_seed(0)
    base: Any = make().eval()
    bytelevel.save_base(base, folder / "base")
    tree = adapted(base, *ends)
    tree.base = str(folder / "base")
    tree.save(folder / "zoo")
    return base, tree


@pytest.mark.parametrize("name", BASES)
def test_generate_writes_what_the_model_of_the_config_writes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tree = on_disk(*BASES[name], tmp_path)
    lt.attach(tree, base).activate("fr/legal")
    ids = torch.tensor([list(b"def ")])
    wanted = base.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=256,
    )
    tokenizer = T.AutoTokenizer.from_pretrained(tmp_path / "base")
    code = told(
        "generate", tmp_path / "zoo", "fr/legal", "--prompt", "def ", "--max-new-tokens", "6"
    )
    assert (code, capsys.readouterr().out) == (
        0,
        tokenizer.decode(wanted[0], skip_special_tokens=True) + "\n",
    )


@pytest.mark.parametrize("name", BASES)
def test_eval_of_the_model_of_the_config_is_its_own_loss(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tree = on_disk(*BASES[name], tmp_path)
    rows = [("abc", "defgh"), ("a", "xy")]
    lines = [
        json.dumps({"path": "fr", "prompt": prompt, "completion": rest}) for prompt, rest in rows
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    code = told("eval", tmp_path / "zoo", "fr/legal", "--data", tmp_path / "rows.jsonl", "--json")
    got = json.loads(capsys.readouterr().out)
    assert code == 0
    lt.attach(tree, base).activate("fr/legal")
    total, count = 0.0, 0
    for prompt, rest in rows:
        start, end = list(prompt.encode()), [*rest.encode(), bytelevel.END]
        if name == "t5":
            inputs = {"input_ids": torch.tensor([start]), "labels": torch.tensor([end])}
        else:
            inputs = {
                "input_ids": torch.tensor([start + end]),
                "labels": torch.tensor([[-100] * len(start) + end]),
            }
        with torch.no_grad():
            total += float(base(**inputs).loss) * len(end)
        count += len(end)
    assert got["tokens"] == {"fr": count}
    assert got["losses"]["fr/legal"]["fr"] == pytest.approx(total / count, rel=1e-4)
    assert got["losses"][""]["fr"] != pytest.approx(total / count, rel=1e-4)


def test_a_base_that_writes_no_text_is_told_by_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bare() -> nn.Module:
        size = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        return T.LlamaModel(T.LlamaConfig(**BYTES, **size))

    on_disk(bare, ("q_proj",), tmp_path)
    code = told("generate", tmp_path / "zoo", "fr", "--prompt", "def ")
    assert code == 1
    assert "its config.json names LlamaModel, which can't generate text" in capsys.readouterr().err


def test_an_encoder_with_nothing_to_read_is_told_with_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_disk(*BASES["t5"], tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"path": "fr", "text": "def"}))
    code = told("eval", tmp_path / "zoo", "--data", tmp_path / "rows.jsonl")
    assert code == 1
    assert (
        "rows.jsonl:1: the base has an encoder, and this row has nothing for it to read"
        in capsys.readouterr().err
    )


def test_training_a_base_with_an_encoder_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_disk(*BASES["t5"], tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"path": "fr", "prompt": "abc", "completion": "defg"})
    )
    before = listing(tmp_path)
    code = told("train", tmp_path / "zoo", "fr", "--data", tmp_path / "rows.jsonl", "--steps", "1")
    assert code == 1
    assert (
        "error: T5ForConditionalGeneration has an encoder and a decoder; a run trains"
        in capsys.readouterr().err
    )
    assert listing(tmp_path) == before


# ---------------------------------------------------------------------- recurrent bases
RECURRENT: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...]]] = {
    "mamba": (T.MambaConfig, T.MambaForCausalLM, {}, ("in_proj", "out_proj")),
    "mamba2": (
        T.Mamba2Config,
        T.Mamba2ForCausalLM,
        {"head_dim": 8, "num_heads": 4, "n_groups": 1},
        ("in_proj",),
    ),
    "falcon_mamba": (T.FalconMambaConfig, T.FalconMambaForCausalLM, {}, ("in_proj", "out_proj")),
}


def recurrent(name: str) -> tuple[Any, lt.AdapterTree]:
    config, kind, more, ends = RECURRENT[name]
    torch.manual_seed(0)
    made = config(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, **more)
    base = kind(made).eval()
    return base, adapted(base, *ends)


def prompt() -> Tensor:
    return torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])


def written(base: Any) -> Tensor:
    out: Tensor = base.generate(
        prompt(), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    return out


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_base_writes_the_same_beside_its_weights_as_with_them_changed(
    name: str,
) -> None:
    base, tree = recurrent(name)
    model = lt.attach(tree, base)
    bare = written(base)
    with model.using("fr/legal"):
        wanted = written(base)
    with model.using("fr/legal", mode="unmerged"):
        assert torch.equal(written(base), wanted)
    with model.route(["fr/legal", ""]):
        assert torch.equal(written(base), torch.cat([wanted[:1], bare[1:]]))
    assert not torch.equal(wanted, bare)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_state_goes_on_only_under_the_path_that_filled_it(name: str) -> None:
    base, tree = recurrent(name)
    model = lt.attach(tree, base)
    step = prompt()[:, :1]

    def go_on(cache: Any) -> Tensor:
        logits: Tensor = base(step, cache_params=copy.deepcopy(cache), use_cache=True).logits
        return logits

    with torch.no_grad():
        bare = base(prompt(), use_cache=True).cache_params
        with model.using("fr", mode="unmerged"):
            with pytest.raises(StateError, match="filled under another path"):
                go_on(bare)
            own = base(prompt(), use_cache=True).cache_params
            wanted = base(torch.cat([prompt(), step], 1)).logits[:, -1:]
            torch.testing.assert_close(go_on(own), wanted, rtol=1e-3, atol=1e-4)
        with (
            model.using("fr/legal", mode="unmerged"),
            pytest.raises(StateError, match="filled under another path"),
        ):
            go_on(own)
