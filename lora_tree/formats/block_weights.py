"""Block weights: turn a list of numbers for a Stable Diffusion UNet's blocks into module weights.

    17   BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 … OUT11   the blocks with attentions, SD 1.5
    26   BASE IN00 … IN11 MID OUT00 … OUT11                        every block, SD 1.5
    12   BASE IN04 IN05 IN07 IN08 MID OUT00 … OUT05                the blocks with attentions, SDXL
    20   BASE IN00 … IN08 MID OUT00 … OUT08                        every block, SDXL

These are the lists of the extension "LoRA Block Weight" of the web UIs. BASE is the text encoders.
The blocks are those of the original UNet. Three of them make one block of diffusers:

    input_blocks.{3 i + j + 1}  down_blocks.i: resnets.j and attentions.j; j = 2 is the downsampler
    output_blocks.{3 i + j}     up_blocks.i: resnets.j and attentions.j; the upsampler is with j = 2
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapter import Adapter
from ..errors import SpecError, plural
from ..weights import ModuleWeights, as_weight, check_finite, weight_within

__all__ = ["block_weights"]

_DOT = "[._]"
"""The separator in a name, as a glob: kohya's files have underscores instead of dots."""
_WITH_ATTENTIONS = ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08")


def _numbered(word: str, first: int, last: int) -> tuple[str, ...]:
    return tuple(f"{word}{number:02}" for number in range(first, last + 1))


BLOCKS = {
    12: ("BASE", *_WITH_ATTENTIONS[2:], "MID", *_numbered("OUT", 0, 5)),
    17: ("BASE", *_WITH_ATTENTIONS, "MID", *_numbered("OUT", 3, 11)),
    20: ("BASE", *_numbered("IN", 0, 8), "MID", *_numbered("OUT", 0, 8)),
    26: ("BASE", *_numbered("IN", 0, 11), "MID", *_numbered("OUT", 0, 11)),
}
"""Length of a list → the blocks that its numbers are for."""


def block_weights(numbers: Sequence[float], adapter: Adapter) -> dict[str, float]:
    """Return block weights as a weight per module, for ``weight=`` of `AdapterTree.add` and others.

    Args:
        numbers: 12, 17, 20 or 26, in the order of the web UIs' extension.
        adapter: the adapter that they are for, or its outline. A block has other names in kohya's
            files than in diffusers'; only patterns that match a module of the adapter are returned.

    Returns:
        patterns on the names of its modules → their numbers. Modules in no block have the weight 1.

    Raises:
        SpecError: the list has another length, or a number that is not finite; or no module of the
            adapter lies in one of the blocks.

    >>> import torch
    >>> from lora_tree import LowRank
    >>> proj = LowRank(torch.ones(1, 4), torch.ones(4, 1))
    >>> style = Adapter({"unet.mid_block.attentions.0.proj_in": proj})
    >>> block_weights([1, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 0, 0], style)
    {'mid_block[._]*': 0.5}
    """
    if len(numbers) not in BLOCKS:
        raise SpecError(
            f"block weights: got {plural(len(numbers), 'number')}, expected 12 or 20 (SDXL), or "
            "17 or 26 (Stable Diffusion 1.5)",
            "the first is BASE, for the text encoders",
        )
    patterns: dict[str, float] = {}
    for block, number in zip(BLOCKS[len(numbers)], numbers, strict=True):
        check_finite(number, f"block weights: {block}")
        for pattern in _patterns(block):
            patterns[pattern] = float(number)
    weight = weight_within(as_weight(patterns), adapter.module_names)
    if not isinstance(weight, ModuleWeights):
        some = min(adapter.module_names, default="none")
        raise SpecError(
            "block weights: no module of the adapter lies in a block of a Stable Diffusion UNet; "
            f"one of its names: {some}",
            "write patterns on its own names instead: {'*.to_q': 0.5}",
        )
    return dict(weight.patterns)


def _patterns(block: str) -> list[str]:
    """Return the names of a block's modules in the original UNet and in diffusers', as globs."""
    if block == "BASE":
        return ["text_encoder.*", "text_encoder_2.*"]
    if block == "MID":
        return [f"mid_block{_DOT}*", f"middle_block{_DOT}*"]
    word, number = block[:-2], int(block[-2:])
    if word == "OUT":
        level, layer = divmod(number, 3)
        names = [f"up_blocks.{level}.resnets.{layer}", f"up_blocks.{level}.attentions.{layer}"]
        if layer == 2:
            names.append(f"up_blocks.{level}.upsamplers")
        return _globs([f"output_blocks.{number}", *names])
    if number == 0:
        return ["conv_in", *_globs(["input_blocks.0"])]
    level, layer = divmod(number - 1, 3)
    names = [f"down_blocks.{level}.resnets.{layer}", f"down_blocks.{level}.attentions.{layer}"]
    if layer == 2:
        names = [f"down_blocks.{level}.downsamplers"]
    return _globs([f"input_blocks.{number}", *names])


def _globs(names: Sequence[str]) -> list[str]:
    return [name.replace(".", _DOT) + f"{_DOT}*" for name in names]
