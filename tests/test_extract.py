"""extract: a merged checkpoint minus its base is the adapter that was merged; dense SVDs are the
judge.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import ARCHS
from safetensors.torch import load_file, save_file
from shell import Shell
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch, FormatError, SpecError, UnsupportedAdapter

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
CASES = {"llama": "a/b/c", "gpt2": "a/d", "bert": "a/b/c", "mixtral, experts": "a/b", "vit": "a/b"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def saved(name: str, folder: Path) -> nn.Module:
    """A base of one architecture on the disk, in several shards."""
    base = ARCHS[name].base().float()
    base.save_pretrained(folder, max_shard_size="30KB")
    return base


def changed(folder: Path, to: Path, change: dict[str, Tensor]) -> Path:
    """A copy of a checkpoint, in one file, with some tensors added to."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    to.mkdir()
    for name, delta in change.items():
        tensors[name] = (tensors[name].double() + delta.double()).float()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


# ---------------------------------------------------------------------- what was merged comes back
@pytest.mark.parametrize("name", CASES)
def test_a_merged_path_comes_back_as_an_adapter(name: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    tree = ARCHS[name].tree(base, factors=torch.float32)
    lt.export_model(tree, CASES[name], tmp_path / "tuned", base=tmp_path / "base")
    made = lt.extract(tmp_path / "base", tmp_path / "tuned", max_error=1e-3)
    flat = tree.flatten(CASES[name], base=base)
    assert set(made.adapter.modules) == set(flat.modules)
    assert made.left == {}
    for module, value in flat.modules.items():
        back = made.adapter.modules[module]
        assert back.layout == value.layout
        wanted, got = value.dense(dtype=torch.float64), back.dense(dtype=torch.float64)
        error = float((wanted - got).norm() / wanted.norm())
        assert error < 2e-3
        assert back.rank <= value.rank
    made.adapter.save(tmp_path / "adapter")
    again = lt.AdapterTree()
    again.add("tuned", adapter=tmp_path / "adapter")
    model = lt.attach(again, base)
    model.activate("tuned")
    tuned = type(base).from_pretrained(tmp_path / "tuned")
    for key, weight in tuned.state_dict().items():
        torch.testing.assert_close(base.state_dict()[key], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_that_of_the_best_factors_and_is_told(tmp_path: Path, rank: int) -> None:
    """A change of full rank: no factors of this rank are nearer than those of the dense SVD."""
    base = saved("llama", tmp_path / "base")
    torch.manual_seed(0)
    weight = base.get_submodule(Q).weight
    U, _, Vh = torch.linalg.svd(torch.randn_like(weight.double()))
    spectrum = 0.7 ** torch.arange(min(weight.shape), dtype=torch.float64)
    delta = (U[:, : len(spectrum)] * spectrum) @ Vh[: len(spectrum)]
    tuned = changed(tmp_path / "base", tmp_path / "tuned", {f"{Q}.weight": delta})
    made = lt.extract(tmp_path / "base", tuned, rank=rank)
    assert list(made.adapter.modules) == [Q]
    best = float(spectrum[rank:].norm() / spectrum.norm())
    value = made.adapter.modules[Q]
    got = float((delta - value.dense(dtype=torch.float64)).norm() / delta.norm())
    assert value.rank == rank
    assert got == pytest.approx(made.errors[Q], rel=1e-3, abs=1e-6)
    assert best <= got * (1 + 1e-6)
    assert got < best * 1.02
    assert made.adapter.errors[Q] == made.errors[Q] == made.worst


def test_max_error_takes_the_smallest_rank_that_reaches_it(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    weight = base.get_submodule(Q).weight
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn_like(weight.double()))
    k = min(weight.shape)
    spectrum = 0.9 ** torch.arange(k, dtype=torch.float64)
    delta = (U[:, :k] * spectrum) @ Vh[:k]
    tuned = changed(tmp_path / "base", tmp_path / "tuned", {f"{Q}.weight": delta})
    tails = spectrum.square().flip(0).cumsum(0).flip(0).sqrt() / spectrum.norm()
    for bound in (0.5, 0.2, 0.05):
        least = int((tails <= bound).nonzero()[0])
        made = lt.extract(tmp_path / "base", tuned, max_error=bound)
        assert made.errors[Q] <= bound
        assert least <= made.adapter.modules[Q].rank <= least + 1
    with pytest.raises(SpecError, match=f"{Q}: relative error .* at rank 2"):
        lt.extract(tmp_path / "base", tuned, rank=2, max_error=0.05)


def test_the_same_two_folders_give_the_same_bits(tmp_path: Path) -> None:
    saved("llama", tmp_path / "base")
    torch.manual_seed(0)
    tuned = changed(tmp_path / "base", tmp_path / "tuned", {f"{Q}.weight": torch.randn(32, 32)})
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(lt.extract(tmp_path / "base", tuned, rank=4).adapter.modules[Q])
    assert torch.equal(made[0].A, made[1].A)
    assert torch.equal(made[0].B, made[1].B)


def test_a_rounding_is_no_change(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    base.bfloat16().save_pretrained(tmp_path / "tuned")
    with pytest.raises(BaseMismatch, match="nothing that a low rank holds differs"):
        lt.extract(tmp_path / "base", tmp_path / "tuned", rank=4)


def test_dora_is_refused_by_name_and_its_merged_model_comes_in(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "dora")
    with pytest.raises(UnsupportedAdapter, match=r"DoRA(.|\n)*lora-tree extract BASE MERGED"):
        lt.Adapter.load(tmp_path / "dora")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    made = lt.extract(tmp_path / "base", tmp_path / "merged", max_error=1e-4)
    assert {name.rpartition(".")[2] for name in made.adapter.modules} == {"q_proj", "v_proj"}
    before, after = (type(base).from_pretrained(tmp_path / each) for each in ("base", "merged"))
    for name, value in made.adapter.modules.items():
        old, new = (each.get_submodule(name).weight.detach().double() for each in (before, after))
        got = old + value.dense(dtype=torch.float64)
        assert float((got - new).norm() / (new - old).norm()) < 2e-4


# ---------------------------------------------------------------------- what does not fit
def test_changes_that_no_low_rank_holds_are_listed_and_refused(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    tuned = changed(
        tmp_path / "base",
        tmp_path / "tuned",
        {f"{Q}.weight": torch.ones(base.get_submodule(Q).weight.shape), NORM: torch.ones(1)},
    )
    tensors = load_file(tuned / "model.safetensors")
    grown = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([grown, grown[:2]])
    tensors["extra.weight"] = torch.ones(2, 2)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatch, match="3 tensors changed") as caught:
        lt.extract(tmp_path / "base", tuned, rank=1)
    text = str(caught.value)
    assert f"{NORM}: " in text
    assert "a grown vocabulary?" in text
    assert "extra.weight: the base has no such tensor" in text
    assert "--ignore" in text
    made = lt.extract(tmp_path / "base", tuned, rank=1, ignore=True)
    assert set(made.left) == {NORM, "model.embed_tokens.weight", "extra.weight"}
    assert list(made.adapter.modules) == [Q]
    assert made.errors[Q] < 1e-5


def test_a_tied_embedding_is_listed(tmp_path: Path) -> None:
    base = saved("llama, tied", tmp_path / "base")
    shape = base.get_submodule("model.embed_tokens").weight.shape
    delta = {"model.embed_tokens.weight": torch.ones(shape)}
    tuned = changed(tmp_path / "base", tmp_path / "tuned", delta)
    with pytest.raises(BaseMismatch, match=r"model.embed_tokens.weight: tied to lm_head.weight"):
        lt.extract(tmp_path / "base", tuned, rank=1)


def test_bounds_and_folders_that_make_no_sense(tmp_path: Path) -> None:
    saved("llama", tmp_path / "base")
    with pytest.raises(SpecError, match=r"extract needs rank= or max_error="):
        lt.extract(tmp_path / "base", tmp_path / "base")
    with pytest.raises(SpecError, match="rank must be"):
        lt.extract(tmp_path / "base", tmp_path / "base", rank=0)
    with pytest.raises(FormatError, match=r"no model\.safetensors"):
        lt.extract(tmp_path / "base", tmp_path / "none", rank=1)


def test_the_command_writes_the_adapter_and_tells_the_errors(tmp_path: Path, shell: Shell) -> None:
    base = saved("llama", tmp_path / "base")
    shape = base.get_submodule(Q).weight.shape
    tuned = changed(
        tmp_path / "base",
        tmp_path / "tuned",
        {f"{Q}.weight": torch.ones(shape), NORM: torch.ones(1)},
    )
    said = ("extract", tmp_path / "base", tuned, "--out", tmp_path / "out", "--rank", "2")
    code, _, err = shell(*said)
    assert code == 1
    assert NORM in err
    assert not (tmp_path / "out").exists()
    code, out, err = shell(*said, "--ignore", "--per-module")
    assert code == 0, err
    assert "1 module, r=2" in out
    assert f"left behind: {NORM}" in out
    assert lt.Adapter.load(tmp_path / "out").ranks == {Q: 2}
