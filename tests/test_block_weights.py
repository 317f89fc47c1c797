"""Block weights of image makers: the blocks are those of diffusers' own conversion of names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from shell import Shell

import lora_tree as lt
from lora_tree.errors import SpecError
from lora_tree.formats.block_weights import BLOCKS
from lora_tree.weights import as_weight, weight_at


def adapter_of(names: Iterable[str]) -> lt.Adapter:
    return lt.Adapter(dict.fromkeys(names, lt.LowRank(torch.ones(1, 4), torch.ones(4, 1))))


def _original() -> list[str]:
    """Modules of Stable Diffusion 1.5's original UNet: one of each kind in every block."""
    names = ["input_blocks.0.0"]
    for i in range(1, 12):
        names.append(f"input_blocks.{i}.0.{'op' if i % 3 == 0 else 'in_layers.2'}")
        if i % 3 and i < 9:
            names.append(f"input_blocks.{i}.1.proj_in")
    for i in range(12):
        names.append(f"output_blocks.{i}.0.in_layers.2")
        if i >= 3:
            names.append(f"output_blocks.{i}.1.proj_in")
        if i in (2, 5, 8):
            names.append(f"output_blocks.{i}.{1 if i == 2 else 2}.conv")
    return names


def judged() -> dict[str, list[str]]:
    """Block → its modules in diffusers' names, by diffusers' own conversion of checkpoints."""
    ours = {f"model.diffusion_model.{name}.weight": name for name in _original()}
    biases = {key.replace(".weight", ".bias"): "" for key in ours}
    converted = convert_ldm_unet_checkpoint({**ours, **biases}, {"layers_per_block": 2})
    found: dict[str, list[str]] = {}
    for key, name in converted.items():
        if name:
            holder, number = name.split(".")[:2]
            block = f"{holder.removesuffix('put_blocks').upper()}{int(number):02}"
            found.setdefault(block, []).append(f"unet.{key.removesuffix('.weight')}")
    return found


JUDGED = judged()


def originals(block: str) -> list[str]:
    """A block's modules as kohya's files for SDXL name them."""
    word, number = ("input", block[2:]) if block.startswith("IN") else ("output", block[3:])
    names = [name for name in _original() if name.startswith(f"{word}_blocks.{int(number)}.")]
    return [f"unet.{name.replace('.', '_')}" for name in names]


@pytest.mark.parametrize("block", sorted(JUDGED))
def test_a_block_of_the_original_unet_is_that_of_diffusers_conversion(block: str) -> None:
    dotted = JUDGED[block]
    flat = [f"unet.{name.removeprefix('unet.').replace('.', '_')}" for name in dotted]
    names = [*dotted, *flat, *originals(block)]
    adapter = adapter_of([*names, "unet.time_embedding.linear_1"])
    tried = 0
    for length, blocks in BLOCKS.items():
        if block in blocks:
            numbers = [1.0] * length
            numbers[blocks.index(block)] = 0.25
            weight = as_weight(lt.block_weights(numbers, adapter))
            assert [weight_at(weight, name) for name in names] == [0.25] * len(names)
            assert weight_at(weight, "unet.time_embedding.linear_1") == 1.0
            tried += 1
    assert tried


@pytest.mark.parametrize("length", sorted(BLOCKS))
def test_no_module_lies_in_two_blocks(length: int) -> None:
    names = ["text_encoder.x.q_proj", "text_encoder_2.x.q_proj", "unet.mid_block.attentions.0.x"]
    for block in BLOCKS[length]:
        names += JUDGED.get(block, [])
        names += [] if block in ("BASE", "MID") else originals(block)
    adapter = adapter_of(names)
    counts = dict.fromkeys(names, 0)
    for at in range(length):
        numbers = [0.0] * length
        numbers[at] = 1.0
        weight = as_weight(lt.block_weights(numbers, adapter))
        for name in names:
            counts[name] += weight_at(weight, name) == 1.0
    assert set(counts.values()) == {1}


def test_a_pipeline_gets_what_its_blocks_weigh(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    ends = {"unet": ("to_q", "conv1"), "text_encoder": ("q_proj",)}
    style = pipelines.adapter(pipe, ends)
    style.save(tmp_path / "style.safetensors", form="kohya")
    numbers = [0.5, *[0.0] * 25]
    numbers[BLOCKS[26].index("MID")] = 2.0
    tree = lt.AdapterTree()
    read = lt.Adapter.load(tmp_path / "style.safetensors")
    tree.add("style", adapter=read, weight=lt.block_weights(numbers, read))
    from lora_tree.integrations.diffusers import attach_pipeline

    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    model = attach_pipeline(tree, pipe)
    model.activate("style")
    changed = 0
    for name, own in pipe.unet.named_parameters():
        value = style.modules.get(f"unet.{name.removesuffix('.weight')}")
        part = 2.0 if name.startswith("mid_block") else 0.0
        wanted = before[name].double()
        if value is not None and part:
            changed += 1
            delta = part * value.scale * value.B.double() @ value.A.double()
            wanted = wanted + delta.reshape(wanted.shape)
        torch.testing.assert_close(own.double(), wanted, atol=1e-5, rtol=1e-5)
    assert changed


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([1.0] * 16, r"got 16 numbers, expected 12 or 20 \(SDXL\), or 17 or 26"),
        ([float("nan"), *[1.0] * 16], "block weights: BASE must be a finite number"),
        ([1.0] * 17, "no module of the adapter lies in a block.*: q_proj"),
    ],
)
def test_what_is_no_list_of_block_weights_is_refused(numbers: list[float], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        lt.block_weights(numbers, adapter_of(["q_proj"]))


def test_the_command_line_takes_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = lt.AdapterTree(base="org/model")
    tree.add("style", adapter=adapter_of(["unet.mid_block_attentions_0_x", "unet.conv_out"]))
    tree.save(tmp_path)
    shell = Shell(capsys)
    numbers = ",".join(["1"] * 7 + ["0.5"] + ["1"] * 9)
    assert shell("set", tmp_path, "style", "--blocks", numbers)[0] == 0
    assert lt.load(tmp_path)["style"].weight == as_weight({"mid_block[._]*": 0.5})
    for wrong, said in (("1,2", "got 2 numbers"), ("1,x", "expected numbers with commas")):
        code, _, err = shell("set", tmp_path, "style", "--blocks", wrong)
        assert (code, said in err) == (1, True)
