"""Read an adapter in one ``.safetensors`` file, in the format that `recognise` found."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError
from ..overlay import over
from ..storage import Allocate, Witness
from ..system.reading import Inside, is_file
from .config_file import read_config
from .diffusers import read_diffusers
from .kohya import read_kohya
from .mlx import read_mlx
from .peft_keys import CONFIG
from .recognise import Recognised
from .safetensors import open_tensors, parse_header

__all__ = ["read_single"]


def read_single(
    recognised: Recognised,
    *,
    outline: bool = False,
    allocate: Allocate | None = None,
    witness: Witness | None = None,
    inside: Inside | None = None,
) -> Adapter:
    """Read a single file of another program's format into memory, in the file's dtypes.

    Args:
        recognised: the result of `recognise`.
        outline: return factors on the meta device, with shapes and dtypes but no numbers. The whole
            file is still read, because its scales are among the tensors.
        allocate: allocates the one buffer that holds the factors; None: ordinary memory.
        witness: is called with every byte of the file, and of the config that mlx-lm writes beside
            it.
        inside: where the file may lie, all links followed; None: anywhere.

    Raises:
        FormatError: the file is broken, or has keys of another format; names the file and the key.
        UnsupportedAdapter: an adapter of a kind that does not add up.
    """
    assert recognised.file is not None
    file, where = recognised.file, str(recognised.file)
    # Leave inference mode: tensors made in it could never train.
    shown = partial(witness, file.name) if witness is not None else None
    with open_tensors(file, where, shown, inside) as reading, torch.inference_mode(False):
        header = parse_header(reading.head, reading.nbytes, where)
        in_memory = over(reading.numbers(header, allocate))
        tensors: dict[str, Tensor] = {}
        for name, tensor in header.tensors.items():
            tensors[name] = in_memory(tensor).contiguous()
        if recognised.kind == "kohya":
            adapter = read_kohya(tensors, where)
        elif recognised.kind == "mlx":
            config = file.with_name(CONFIG)
            data = _config_beside(config, where, inside)
            if witness is not None:
                witness(CONFIG, memoryview(data))
            adapter = read_mlx(tensors, data, where, str(config))
        else:
            adapter = read_diffusers(tensors, header.metadata, where)
    if outline:
        return adapter.with_tensors(lambda tensor: tensor.to("meta"))
    return adapter


def _config_beside(config: Path, where: str, inside: Inside | None) -> bytes:
    """Return the bytes of the config in the folder of mlx-lm's file.

    Raises:
        FormatError: it is missing, or can't be read.
    """
    if not is_file(config):
        raise FormatError(
            f"{where}: no {CONFIG} beside it, which says the scale of mlx-lm's factors",
            "download both files of the adapter",
        )
    return read_config(config, str(config), inside)
