"""Tensors of the base that an adapter carries: a load in another dtype is the same base, a trained
tensor is not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import lora_tree as lt
from lora_tree.carried import is_own, is_same_tensor
from lora_tree.errors import BaseMismatch

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
IDS = torch.arange(16).reshape(2, 8) * 7


# ---------------------------------------------------------------------- the comparison
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES)))
def test_the_same_numbers_loaded_in_two_dtypes_are_the_same(
    seed: int, one: str, other: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    exponents = torch.randint(
        -30, 15, (4000,), generator=g, dtype=torch.int32
    )  # subnormal in fp16, up to its largest
    stored = torch.ldexp(torch.randn(4000, generator=g).clamp(-1.9, 1.9), exponents)
    stored[:3] = torch.tensor([0.0, -0.0, 60000.0])
    assert is_same_tensor(stored.to(DTYPES[one]), stored.to(DTYPES[other]))
    assert is_same_tensor(stored.to(DTYPES[one]).to(DTYPES[other]), stored.to(DTYPES[one]))


@pytest.mark.parametrize("one", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_two_steps_of_the_coarser_dtype_are_a_difference(one: str, other: str) -> None:
    """At any one number of many, in either direction."""
    stored = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    eps = max(torch.finfo(DTYPES[one]).eps, torch.finfo(DTYPES[other]).eps)
    for at, factor in ((0, 1 + 2.5 * eps), (999, 1 - 2.5 * eps)):
        changed = stored.double()
        changed[at] *= factor
        assert not is_same_tensor(stored.to(DTYPES[one]), changed.to(DTYPES[other]))


def test_what_has_no_numbers_or_another_shape_is_refused_by_name() -> None:
    own = torch.ones(2, 3)
    with pytest.raises(
        BaseMismatch,
        match=r"head\.weight: the adapter carries it as \(3, 2\), the base has .*\(2, 3\)",
    ):
        is_own("head.weight", own.mT, own)
    with pytest.raises(BaseMismatch, match=r"head\.weight: .* no numbers here"):
        is_own("head.weight", own, own.to("meta"))
    assert not is_own("head.weight", own, own.int())
    assert not is_same_tensor(own, torch.full_like(own, torch.nan))


def test_adapters_that_carry_one_tensor_in_two_dtypes_add_up() -> None:
    stored = torch.randn(4, generator=torch.Generator().manual_seed(0))
    factors = lt.LowRank(torch.ones(1, 3), torch.ones(4, 1))
    tree = lt.AdapterTree()
    for path, dtype in (("a", "bf16"), ("a/b", "fp32"), ("a/b/c", "fp16")):
        tree.add(
            path, adapter=lt.Adapter({"x": factors}, unchanged={"x.bias": stored.to(DTYPES[dtype])})
        )
    assert torch.equal(
        tree.flatten("a/b/c").unchanged["x.bias"], stored
    )  # in the dtype that holds the others
    tree.add("a/d", adapter=lt.Adapter({"x": factors}, unchanged={"x.bias": stored.half() + 1}))
    with pytest.raises(
        BaseMismatch, match=r"a and a/d: x\.bias: two adapters carry different values"
    ):
        tree.flatten("a/d")


# -------------------------------------------------------------------- the three places that compare
def llama(folder: Path, dtype: str) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("stored", "train", "serve"),
    [
        ("fp32", "fp32", "bf16"),
        ("fp32", "bf16", "fp16"),
        ("bf16", "bf16", "fp16"),
        ("bf16", "fp16", "bf16"),
    ],
)
def test_a_head_that_came_along_fits_the_base_in_any_dtype(
    stored: str, train: str, serve: str, tmp_path: Path
) -> None:
    """As PEFT has it, which loads the same folder over the same base."""
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=400,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).to(DTYPES[stored]).save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], bias="all", init_lora_weights=False
    )
    get_peft_model(llama(tmp_path / "base", train), lora).save_pretrained(tmp_path / "peft")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(
        tmp_path / "peft" / "adapter_model.safetensors"
    )
    tree = lt.AdapterTree()
    tree.add("a", adapter=tmp_path / "peft")
    base = llama(tmp_path / "base", serve)
    lt.attach(tree, base).activate("a", mode="unmerged")
    with torch.no_grad():
        wanted = (
            PeftModel.from_pretrained(llama(tmp_path / "base", serve), tmp_path / "peft")
            .eval()(IDS)
            .logits
        )
        torch.testing.assert_close(base(IDS).logits.float(), wanted.float(), rtol=3e-2, atol=3e-2)
    # the two ways out compare with the numbers on the disk
    assert lt.portable(tree, "a", base=tmp_path / "base").adapter.unchanged == {}
    assert lt.portable(tree, "a", base=base).adapter.unchanged == {}
    lt.export_model(tree, "a", tmp_path / "merged", base=tmp_path / "base")
    # and a head that was trained is an override, which only the portable form can't hold
    adapter = lt.Adapter.load(tmp_path / "peft")
    trained = adapter.unchanged["lm_head.weight"] * 1.1
    tree.add(
        "b",
        adapter=lt.Adapter(
            adapter.modules, unchanged={**adapter.unchanged, "lm_head.weight": trained}
        ),
    )
    base = llama(tmp_path / "base", serve)
    with pytest.warns(
        lt.OverrideWarning, match=r"b: lm_head\.weight: the adapter carries a value unlike"
    ):
        lt.attach(tree, base).activate("b")
    head = trained.to(DTYPES[serve]).double()
    value = adapter.modules["lm_head"]
    head += value.dense(dtype=torch.float64)
    assert torch.equal(base.lm_head.weight, head.to(DTYPES[serve]))
    lt.export_model(tree, "b", tmp_path / "other", base=tmp_path / "base")
    with pytest.raises(
        BaseMismatch, match=r"lm_head\.weight: the adapter carries a weight that is"
    ):
        lt.portable(tree, "b", base=tmp_path / "base")
