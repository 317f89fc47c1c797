"""Paths beside quantised weights: the real libraries on the CPU, against the same base dequantised,
in float64.

bare     the quantiser's own forward            its own business; only its distance is bounded
path     bare + scale · B A x at every site     ours
training the same gradients as over the dequantised weights, and as PEFT's (QLoRA)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from small import DOMAIN, POLICY, base, begin_alike, peft_config, peft_factors
from test_trl import ours
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import lora_tree as lt
from lora_tree.errors import StateError, UnmergedOnly

KINDS: dict[str, Callable[[], Any]] = {
    "bnb-nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    ),
    "bnb-fp4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32
    ),
    "bnb-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao-int4": lambda: TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    ),
}
# 8-bit inputs are quantised as well, row by row: its products are coarser than its weights.
ROUGH = {"bnb-int8": 0.05}
# In an evaluation bitsandbytes may take a 4-bit kernel that computes in bf16.
IN_BF16 = {"bnb-nf4": 0.01, "bnb-fp4": 0.01}
IDS = torch.tensor([[5, 9, 133, 7, 21, 2], [8, 44, 3, 212, 50, 6], [1, 2, 3, 4, 5, 6]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("base")
    base(hidden_size=64, intermediate_size=64).save_pretrained(made)
    return made


def quantised(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=KINDS[kind](), dtype=dtype
    )


def tree_over(of: Any) -> lt.TreeModel:
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    tree = lt.AdapterTree(defaults=dict(r=4, lora_alpha=8, target_modules=targets))
    for path in ("fr", DOMAIN, POLICY):
        tree.add(path)
    model = lt.attach(tree, of)
    for path in ("fr", DOMAIN):
        adapter = tree.adapter(path)
        assert adapter is not None
        for value in adapter.modules.values():
            value.B.normal_(std=0.1)
    return model


def weight_of(module: Any) -> Tensor:
    """A quantised layer's numbers, by the library that holds them."""
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        import bitsandbytes.functional as functional

        return functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if type(module).__name__ == "Linear8bitLt":
        held = module.state if module.state.CB is not None else weight
        return held.CB.double() * held.SCB.double()[:, None] / 127
    return weight.dequantize().double()


def dense(of: lt.TreeModel, path: str) -> Any:
    """The base in float64 with the numbers that the quantiser holds, and a path's increments."""
    made = base(hidden_size=64, intermediate_size=64).double().eval()
    wanted = {}
    for name, module in of.base.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            is_linear = isinstance(module, nn.Linear) and name != "lm_head"
            weight = weight_of(module) if is_linear else module.weight.detach().double()
            wanted[f"{name}.weight"] = weight.clone()
    for node in of.tree.lineage(path):
        adapter = of.tree.adapter(node)
        assert adapter is not None
        for name, value in adapter.modules.items():
            wanted[f"{name}.weight"] += value.scale * value.B.double() @ value.A.double()
    made.load_state_dict({name: weight.detach() for name, weight in wanted.items()})
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_added_beside_the_weights_exactly_and_rows_go_their_own_way(
    kind: str, folder: Path
) -> None:
    of = tree_over(quantised(kind, folder))
    # First: on some CPUs bitsandbytes lays 4-bit weights out anew in the first evaluation.
    plain = dense(of, DOMAIN)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    adapter = of.tree.flatten(DOMAIN)

    def keep(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, out: Tensor) -> None:
            seen[name] = args[0].detach(), out.detach()

        return after

    with torch.no_grad(), of.using(DOMAIN, mode="unmerged"):
        hooks = [
            of.base.get_submodule(name).register_forward_hook(keep(name))
            for name in adapter.modules
        ]
        whole = of(IDS).logits
        for hook in hooks:
            hook.remove()
    for name, value in adapter.modules.items():
        x, out = seen[name]
        with torch.no_grad():
            bare = of.base.get_submodule(name)(x)
        wanted = value.scale * x.double() @ (value.B.double() @ value.A.double()).mT
        torch.testing.assert_close((out - bare).double(), wanted, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        bare = of.base(IDS).logits
        with of.route([DOMAIN, "", "fr"]):
            routed = of(IDS).logits
        # The other rows of a batch don't matter: 8-bit products have a scale for each row.
        torch.testing.assert_close(routed[0], whole[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(routed[1], bare[1])
        assert torch.equal(of.at(DOMAIN)(IDS).logits, whole)
        wanted = plain(IDS).logits
    tol = {**ROUGH, **IN_BF16}.get(kind, 1e-3)
    assert (whole.double() - wanted).norm() < tol * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_its_factors_get_the_gradients_that_they_get_over_the_dequantised_weights(
    kind: str, folder: Path
) -> None:
    of = tree_over(quantised(kind, folder))
    of.trainable(POLICY)
    for value in of.tree.adapter(POLICY).modules.values():  # type: ignore[union-attr]
        with torch.no_grad():
            value.B.normal_(std=0.1)
    labels = IDS.roll(-1, 1)
    with of.using(POLICY, mode="unmerged"):
        logits = of(IDS).logits.double()
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    found, wanted = [], []
    plain = dense(of, POLICY).requires_grad_(True)
    logits = plain(IDS).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for name, value in of.tree.adapter(POLICY).modules.items():  # type: ignore[union-attr]
        whole = plain.get_submodule(name).weight.grad
        A, B = value.A.detach().double(), value.B.detach().double()
        found += [value.A.grad.double().flatten(), value.B.grad.double().flatten()]  # type: ignore[union-attr]
        wanted += [(value.scale * B.mT @ whole).flatten(), (value.scale * whole @ A.mT).flatten()]
    a, b = torch.cat(found), torch.cat(wanted)
    assert (a - b).norm() < 2 * ROUGH.get(kind, 1e-3) * b.norm()


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-int8", "torchao-int8"])
def test_it_learns_step_by_step_what_peft_learns_on_the_same_base(kind: str, folder: Path) -> None:
    of = tree_over(quantised(kind, folder))
    groups = of.trainable("fr")
    of.train()
    adapter = of.tree.adapter("fr")
    assert adapter is not None
    peft_model = get_peft_model(
        quantised(kind, folder), peft_config(), autocast_adapter_dtype=False
    )
    peft_model.train()
    begin_alike(peft_model, of, "fr")
    own, other = (
        torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0),
        torch.optim.AdamW(
            [t for pair in peft_factors(peft_model).values() for t in pair],
            lr=1e-2,
            weight_decay=0.0,
        ),
    )
    of.follow(own)
    labels = IDS.roll(-1, 1).flatten()
    policy = of.at("fr")
    for _ in range(4):
        losses = []
        for model, optimizer in ((policy, own), (peft_model, other)):
            loss = nn.functional.cross_entropy(model(IDS).logits.float().flatten(0, 1), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < 5.4


@pytest.mark.parametrize("kind", ["bnb-nf4", "torchao-int8"])
def test_trl_trains_beside_a_quantised_base_and_resumes_with_the_same_bits(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = dict(save_strategy="steps", save_steps=2, gradient_checkpointing=True)
    factors = []
    for start in (None, str(tmp_path / "run/checkpoint-2")):
        of = tree_over(quantised(kind, folder))
        of.trainable(POLICY)
        ours("dpo", of, tmp_path / "run", **more).train(resume_from_checkpoint=start)
        factors.append([p.detach() for p in of.factors.of(POLICY)])
        assert {p.dtype for p in factors[-1]} == {torch.float32}
    assert all(torch.equal(x, y) for x, y in zip(*factors, strict=True))
    assert max(float(p.abs().max()) for p in factors[0][1::2]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_with_the_ways_out_and_the_first_of_them_works(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    of = tree_over(quantised(kind, folder))
    with pytest.raises(UnmergedOnly, match="can't be merged") as refused:
        of.activate(DOMAIN)
    assert "--as model" in str(refused.value)
    assert "base.dequantize()" in str(refused.value)
    assert of.state is lt.State.BARE
    if kind.startswith("bnb"):  # transformers has no such way for torchao
        wanted = dense(of, DOMAIN)(IDS).logits
        again = tree_over(quantised(kind, folder).dequantize())
        again.activate(DOMAIN)
        assert (again.base(IDS).logits.double() - wanted).norm() < 1e-3 * wanted.norm()
    out = tmp_path / "merged"
    lt.export_model(of.tree, DOMAIN, out, base=folder)
    merged = AutoModelForCausalLM.from_pretrained(out)
    plain = base(hidden_size=64, intermediate_size=64)
    for name, value in of.tree.flatten(DOMAIN).modules.items():
        delta = value.scale * value.B.double() @ value.A.double()
        wanted = plain.get_submodule(name).weight.double() + delta
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), wanted)


def test_an_evaluation_that_packs_4_bit_weights_is_put_off_while_something_trains(
    folder: Path,
) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes packs 4-bit weights on CPUs with AVX512-BF16 alone")
    of = tree_over(quantised("bnb-nf4", folder))
    layer = of.base.model.layers[0].self_attn.o_proj

    def packed() -> bool:
        return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))

    of.trainable(POLICY)
    with torch.no_grad():
        of.base(IDS)
        of.at("fr")(IDS)
    assert not packed()
    of.trainable()
    with torch.no_grad():
        of.at("fr")(IDS)
        assert not packed()
        of.base(IDS)
    assert packed()
    with pytest.raises(StateError, match="laid its 4-bit weight out for inference"):
        of.trainable(POLICY)
    assert not of.factors.training_paths
