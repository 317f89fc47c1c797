"""extract: a merged checkpoint minus its base is the adapter that was merged; dense SVDs are the
judge.
"""

from __future__ import annotations

from collections.abc import Callable
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
from lora_tree.errors import (
    BaseMismatch,
    FormatError,
    LoraTreeError,
    SpecError,
    UnsupportedAdapter,
)
from lora_tree.lowrank import PARAMETER

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
    with pytest.raises(BaseMismatch, match="no weight that can have an increment differs"):
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


# ---------------------------------------------------------------------- tensors that are stacked
EXPERTS = "model.layers.0.block_sparse_moe.experts"
FIRST, SECOND = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
Change = Callable[[dict[str, Tensor]], object]


def mixtral(folder: Path, experts: int = 4, change: Change = len) -> Path:
    """A checkpoint of one layer that has a tensor for each of its experts, after ``change``."""
    torch.manual_seed(sum(folder.name.encode()))
    config = transformers.MixtralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=1,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def without(*names: str) -> Change:
    return lambda tensors: [tensors.pop(f"{EXPERTS}.{name}.weight") for name in names]


def with_first_of_expert_1(tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({f"{EXPERTS}.1.w1.weight": tensor})


def numbered_from_1(tensors: dict[str, Tensor]) -> None:
    for w in ("w1", "w2", "w3"):
        tensors[f"{EXPERTS}.4.{w}.weight"] = tensors.pop(f"{EXPERTS}.0.{w}.weight")


MISFITS: dict[str, tuple[int, Change, dict[str, str]]] = {
    "fewer": (2, len, {FIRST: "(2, 48, 16), and the base's is (4, 48, 16)"}),
    "more": (5, len, {SECOND: "(5, 16, 24), and the base's is (4, 16, 24)"}),
    "no last one": (
        4,
        without("3.w1", "3.w2", "3.w3"),
        {FIRST: "(3, 48, 16), and the base's is (4, 48, 16)"},
    ),
    "no second one": (
        4,
        without("1.w1", "1.w2", "1.w3"),
        {SECOND: "doesn't hold the whole of it: the checkpoint has .experts.*.w2.weight up to"},
    ),
    "half of one": (4, without("2.w3"), {FIRST: ".w3.weight up to number 3, but not number 2"}),
    "one half of all": (
        4,
        without("0.w3", "1.w3", "2.w3", "3.w3"),
        {FIRST: "transformers can't put it together from"},
    ),
    "numbered from 1": (
        4,
        numbered_from_1,
        {SECOND: "its first .experts.*.w2.weight is number 1, and the base's is number 0"},
    ),
    "of another shape": (
        4,
        with_first_of_expert_1(torch.ones(24, 18)),
        {FIRST: "transformers can't put it together from"},
    ),
    "a number": (
        4,
        with_first_of_expert_1(torch.tensor(1.0)),
        {FIRST: "transformers can't put it together from"},
    ),
    "whole numbers": (
        4,
        with_first_of_expert_1(torch.ones(24, 16, dtype=torch.int32)),
        {FIRST: "stored as I32, which can't be subtracted"},
    ),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", MISFITS)
def test_experts_that_do_not_correspond_are_listed_or_refused(
    case: str, turned: bool, tmp_path: Path
) -> None:
    experts, change, wanted = MISFITS[case]
    pair = mixtral(tmp_path / "base"), mixtral(tmp_path / "tuned", experts, change)
    base, tuned = reversed(pair) if turned else pair
    with pytest.raises(BaseMismatch, match="changed in a way that no adapter can hold") as caught:
        lt.extract(base, tuned, rank=2)
    made = lt.extract(base, tuned, rank=2, ignore=True)
    for name, reason in wanted.items():
        assert name not in made.adapter.modules
        assert name in str(caught.value)
        if not turned:
            assert reason in made.left[name]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", MISFITS)
def test_experts_that_do_not_correspond_are_no_merge_of_a_path(
    case: str, turned: bool, tmp_path: Path
) -> None:
    experts, change, wanted = MISFITS[case]
    pair = mixtral(tmp_path / "base"), mixtral(tmp_path / "merged", experts, change)
    base, merged = reversed(pair) if turned else pair
    value = lt.LowRank(torch.randn(2, 16), torch.randn(16, 2))
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({Q: value}))
    found = lt.check_merged(tree, "a", merged, base=base)
    others = {check.name for check in found.tensors if check.verdict == "other"}
    assert others >= {*wanted, f"{Q}.weight"}


REFUSED = {
    "no last one": "the checkpoint's tensor is (3, 48, 16), its config says (4, 48, 16)",
    "no second one": "the checkpoint has .experts.*.w2.weight up to number 3, but not number 1",
    "half of one": "the checkpoint has .experts.*.w3.weight up to number 3, but not number 2",
    "one half of all": "transformers can't put it together from",
    "of another shape": "transformers can't put it together from",
    "a number": "transformers can't put it together from",
    "whole numbers": "is stored as I32, nothing can be added to it",
}


@pytest.mark.parametrize("case", REFUSED)
def test_experts_that_are_not_whole_are_refused_before_anything_is_written(
    case: str, tmp_path: Path
) -> None:
    _, change, wanted = MISFITS[case]
    base = mixtral(tmp_path / "base", change=change)
    module = next(iter(wanted))
    _, out, into = (4, 48, 16) if module == FIRST else (4, 16, 24)
    value = lt.LowRank(torch.randn(4, 2, into), torch.randn(4, out, 2), layout=PARAMETER)
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({module: value}))
    written: list[tuple[int, int]] = []
    with pytest.raises(LoraTreeError) as caught:
        lt.export_model(
            tree,
            "a",
            tmp_path / "out",
            base=base,
            progress=lambda done, whole: written.append((done, whole)),
        )
    assert f"a: {module}: " in str(caught.value)
    assert REFUSED[case] in str(caught.value)
    assert not written
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_other_experts_and_leaves_them_when_told(
    tmp_path: Path, shell: Shell
) -> None:
    base, tuned = mixtral(tmp_path / "base"), mixtral(tmp_path / "tuned", 2)
    said = ("extract", base, tuned, "--out", tmp_path / "out", "--rank", "2")
    code, _, err = shell(*said)
    assert code == 1
    assert "(2, 48, 16), and the base's is (4, 48, 16)" in err
    code, out, err = shell(*said, "--ignore")
    assert code == 0, err
    assert f"left behind: {FIRST}: (2, 48, 16)" in out


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight".removeprefix("model.")] = torch.ones(16, 16)

    base, tuned = mixtral(tmp_path / "base"), mixtral(tmp_path / "tuned", change=twice)
    made = lt.extract(base, tuned, rank=2, ignore=True)
    assert (
        "are names of one tensor, of which transformers loads only one" in made.left[f"{Q}.weight"]
    )
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({Q: lt.LowRank(torch.randn(2, 16), torch.randn(16, 2))}))
    with pytest.raises(BaseMismatch, match=f"a: {Q}.weight: .* are names of one tensor"):
        lt.export_model(tree, "a", tmp_path / "out", base=tuned)


# ---------------------------------------------------------------------- huge and tiny changes
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 3e38])
def test_the_error_of_a_huge_or_tiny_change_is_the_dense_one(size: float, tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    zero = changed(
        tmp_path / "base", tmp_path / "zero", {f"{Q}.weight": -base.get_submodule(Q).weight}
    )
    torch.manual_seed(3)
    delta = (torch.rand(32, 32, dtype=torch.float64) - 0.3).mul(size).float()
    tuned = changed(zero, tmp_path / "tuned", {f"{Q}.weight": delta})
    made = lt.extract(zero, tuned, rank=3)
    got = made.adapter.modules[Q].dense(dtype=torch.float64)
    want = delta.double()
    error = float((got - want).norm() / want.norm())
    assert abs(made.errors[Q] - error) < 1e-5


def test_factors_that_a_dtype_can_not_hold_are_refused(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    shape = base.get_submodule(Q).weight.shape
    delta = {f"{Q}.weight": torch.full(shape, 1e30)}
    tuned = changed(tmp_path / "base", tmp_path / "tuned", delta)
    with pytest.raises(
        SpecError, match=f"{Q}: the factors of its change are too large for float16"
    ):
        lt.extract(tmp_path / "base", tuned, rank=1, dtype=torch.float16)
    with pytest.raises(SpecError, match=r"not written in torch\.float8_e4m3fn"):
        lt.extract(tmp_path / "base", tuned, rank=1, dtype=torch.float8_e4m3fn)
    with pytest.raises(SpecError, match="max_error must be 0 or more"):
        lt.extract(tmp_path / "base", tuned, max_error=float("nan"))
