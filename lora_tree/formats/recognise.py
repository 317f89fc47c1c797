"""Recognise the format of an adapter's files, by a sign that messages can name.

    a folder with adapter_config.json         PEFT
    a folder with adapters.safetensors only   mlx-lm
    a folder with pytorch_lora_weights only   by the keys of that file, which diffusers writes
    a .safetensors file                       by its keys:
        lora_unet_…, lora_te1_…                   kohya, LyCORIS
        unet.….lora_A.weight, …                   diffusers
        ….lora_a, ….lora_b                        mlx-lm; its config lies beside it
        base_model.model.…                        PEFT; refused, since its config is missing

Law: no reader is tried to see if it fails. A folder is recognised by the names of its files, a file
by the keys in its header. The reader of that format then refuses every foreign key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import FormatError, UnsupportedAdapter, listing
from ..system.reading import is_file, is_folder
from .peft_keys import CONFIG, PREFIX, WEIGHTS
from .safetensors import open_tensors, parse_header

__all__ = [
    "DIFFUSERS_WEIGHTS",
    "MLX_WEIGHTS",
    "FileKind",
    "Recognised",
    "kind_of_keys",
    "recognise",
]

FileKind = Literal["peft", "kohya", "diffusers", "mlx"]

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_EXPECTED = (
    f"an adapter is a folder that holds {CONFIG} and {WEIGHTS}, or one .safetensors file "
    "with kohya's keys (lora_unet_…), diffusers' (unet.….lora_A.weight) or mlx-lm's (….lora_a)"
)
_COMPONENTS = r"(?:unet|transformer|text_encoder)(?:_[23])?"
_SIGNS: tuple[tuple[FileKind, re.Pattern[str], str], ...] = (
    ("peft", re.compile(re.escape(PREFIX)), "its keys begin with base_model.model."),
    ("kohya", re.compile(r"lora_(?:unet|te[123]?)_"), "its keys begin with lora_unet_ or lora_te_"),
    (
        "diffusers",
        re.compile(
            rf"{_COMPONENTS}\..*\.(?:lora_[AB]|lora\.(?:down|up)|lora_linear_layer\.|alpha)"
            r"|.*_lora\.(?:down|up)\.weight"
        ),
        "its keys begin with a component of a diffusers pipeline",
    ),
    ("mlx", re.compile(r"[^\n]+\.(?:lora_[ab]|m)\Z"), "its keys end in .lora_a and .lora_b"),
)
"""(format, pattern, description): a key belongs to the first format whose pattern matches its
beginning."""


@dataclass(frozen=True)
class Recognised:
    """A recognised adapter.

    Args:
        kind: of its files.
        sign: the key or file that it was recognised by, for messages.
        file: the one file with its factors; None for a PEFT folder, which `lora_tree.folder` reads.
    """

    kind: FileKind
    sign: str
    file: Path | None = None


def recognise(path: Path) -> Recognised:
    """Return the format of the adapter at ``path``. Only the header of a file is read.

    A path that can only be meant as a PEFT folder is recognised as one even if it does not exist:
    PEFT's reader then says what is missing.

    Raises:
        FormatError: a file of an unknown format; names some of its keys.
        UnsupportedAdapter: a pickle, or a GGUF file.
    """
    if is_folder(path):
        # mlx-lm's config has the same name as PEFT's, so the weights' file decides.
        if not is_file(path / WEIGHTS) and is_file(path / MLX_WEIGHTS):
            return Recognised("mlx", f"a folder with {MLX_WEIGHTS}", path / MLX_WEIGHTS)
        is_peft = is_file(path / CONFIG) or is_file(path / WEIGHTS)
        if is_peft or not is_file(path / DIFFUSERS_WEIGHTS):
            return Recognised("peft", f"a folder with {CONFIG} and {WEIGHTS}")
        return _file(path / DIFFUSERS_WEIGHTS)
    # Refused by its name alone: opening a pickle may run its code.
    if path.suffix in _PICKLES and is_file(path):
        raise UnsupportedAdapter(
            f"{path}: {path.suffix} files are pickles, which can run code when they are opened",
            "convert it where you trust it, and save it as .safetensors",
        )
    if path.suffix == ".gguf" and is_file(path):
        raise UnsupportedAdapter(
            f"{path}: GGUF adapters are written for llama.cpp, and not read: its converter has "
            "renamed the modules and turned some of their rows",
            "add the adapter that the file was made from",
        )
    # adapter_model.safetensors by itself is half an adapter: the user must name its folder.
    if path.name == WEIGHTS or path.suffix != ".safetensors" or not is_file(path):
        return Recognised("peft", "an adapter is a folder unless it is a .safetensors file")
    return _file(path)


def _file(path: Path) -> Recognised:
    """Return the format of a single file, by the keys of its header."""
    where = str(path)
    try:
        with open_tensors(path, where) as reading:
            header = parse_header(reading.head, reading.nbytes, where)
        kind, sign = kind_of_keys(header.tensors, where)
        if kind == "peft":
            raise FormatError(
                f"{where}: {sign}: the factors of a PEFT adapter, without the config that says "
                "their scales"
            )
    except FormatError as error:
        # The user may have meant another file, so every error says what an adapter is. The error
        # keeps its type, so that an UnsupportedAdapter is not taken for a broken file.
        raise type(error)(error.what, *error.todo, _EXPECTED) from error
    return Recognised(kind, sign, path)


def kind_of_keys(keys: Iterable[str], where: str) -> tuple[FileKind, str]:
    """Return the format of a single file and its sign, from the keys of its header.

    Raises:
        FormatError: the keys are of no known format, or of two; names some of them.

    >>> kind_of_keys(["lora_unet_mid_block_attentions_0_proj_in.alpha"], "style.safetensors")
    ('kohya', 'its keys begin with lora_unet_ or lora_te_')
    """
    kinds: dict[FileKind, str] = {}
    unknown = []
    # Sorted, so that the keys in an error do not depend on the order of the file.
    for key in sorted(keys):
        # Match only the beginning of a key: a hostile one may be as long as the header.
        hit = next((sign for sign in _SIGNS if sign[1].match(key[:500])), None)
        if hit is None:
            unknown.append(key[:200])
        else:
            kinds.setdefault(hit[0], hit[2])
    if len(kinds) > 1:
        raise FormatError(
            f"{where}: its keys are of {' and '.join(sorted(kinds))} at once, expected one format"
        )
    if not kinds:
        raise FormatError(
            f"{where}: no adapter of a known format: its keys are "
            f"{listing(unknown, most=3) or 'none'}"
        )
    ((kind, sign),) = kinds.items()
    return kind, sign
