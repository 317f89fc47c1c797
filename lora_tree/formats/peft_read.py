"""Read a PEFT adapter: the two files of a folder → `Adapter`.

    adapter_config.json            what was trained, with which r and lora_alpha
    adapter_model.safetensors      header: the keys and shapes of the factors │ their numbers

The config and the header make an `Outline` (see `peft_outline`); then the numbers are read into one
buffer. No model is needed. The files do not record the order of two raw parameters of one module;
it is assumed, and `Adapter.assumed` names the module.

Written by PEFT's ``save_pretrained``, and so by the programs that train with PEFT.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

import torch

from ..adapter import Adapter
from ..errors import FormatError, LoraTreeWarning, UnsupportedAdapter, agreeing, listing
from ..lowrank import PARAMETER
from ..overlay import over
from ..storage import Allocate, Witness
from ..system.reading import Inside
from .config_file import read_config
from .peft_composed import composed_config, read_composed
from .peft_config import TURNED, is_orientation_known
from .peft_keys import CONFIG, WEIGHTS
from .peft_named import peft_header
from .peft_outline import PeftTexts, outline_of
from .peft_products import product_config, read_products
from .safetensors import open_tensors

__all__ = ["PICKLE", "read_adapter", "read_folder"]

PICKLE = "adapter_model.bin"
"""The weights' file of older PEFT, and of PEFT with safe_serialization=False."""


def read_folder(folder: Path) -> Adapter:
    """Read the PEFT adapter in ``folder``; see `read_adapter`."""
    return read_adapter(folder / CONFIG, folder / WEIGHTS, where=folder)


def read_adapter(
    config_file: str | Path,
    weights_file: str | Path,
    *,
    where: str | Path,
    outline: bool = False,
    allocate: Allocate | None = None,
    witness: Witness | None = None,
    inside: Inside | None = None,
) -> Adapter:
    """Read a PEFT adapter from its two files, in the dtypes of the file.

    The factors are copies in memory.

    Args:
        config_file, weights_file: the present paths of the two files.
        where: the folder that errors name.
        outline: read headers only; the factors are on the meta device, with shapes and dtypes but
            no numbers.
        allocate: allocates the one buffer that holds the factors; None: ordinary memory.
        witness: is called with every byte of the two files that is read.
        inside: where the files may lie, all links followed; None: anywhere.

    Raises:
        FormatError: a file is missing, broken, or not what the other one says; names the file and
            the key.
        UnsupportedAdapter: an adapter of a kind that does not add up, or a pickle.
    """
    config_named, weights_named = os.path.join(where, CONFIG), os.path.join(where, WEIGHTS)
    _check_present(config_file, weights_file, where)
    config = read_config(config_file, config_named, inside)
    witness_weights = None
    if witness:
        witness(CONFIG, memoryview(config))
        witness_weights = partial(witness, WEIGHTS)
    with (
        open_tensors(weights_file, weights_named, witness_weights, inside) as weights,
        # A serving caller may be in inference_mode. Tensors made in it could never train.
        torch.inference_mode(False),
    ):
        products = product_config(config, config_named)
        composed = composed_config(config, config_named)
        if products is not None or composed is not None:
            header = peft_header(weights.head, weights.nbytes, weights_named)
            tensors = dict(header.tensors)
            if not outline:
                # Not in the caller's memory: the adapter gets products of these tensors, which are
                # new and larger.
                in_memory = over(weights.numbers(header))
                tensors = {key: in_memory(tensor) for key, tensor in tensors.items()}
            if composed is not None:
                return read_composed(composed, tensors, weights_named)
            assert products is not None
            return read_products(products, tensors, weights_named)
        texts = PeftTexts(config, weights.head, weights.nbytes, config_named, weights_named)
        outlined = outline_of(texts)
        if outline:
            return outlined.adapter
        adapter = outlined.filled(weights.numbers(outlined.header, allocate), weights_named)
    _warn_if_turned(adapter, config_named)
    return adapter


def _check_present(config_file: str | Path, weights_file: str | Path, where: str | Path) -> None:
    """Check that both files are there.

    Raises:
        UnsupportedAdapter: the weights are there as a pickle alone.
        FormatError: one is missing.
    """
    has_config, has_weights = os.path.isfile(config_file), os.path.isfile(weights_file)
    # During a save the files are in its staging folder, and the pickle may be beside them or in the
    # adapter's own folder.
    pickles = [os.path.join(folder, PICKLE) for folder in (os.path.dirname(weights_file), where)]
    if not has_weights and any(os.path.isfile(pickle) for pickle in pickles):
        raise UnsupportedAdapter(
            f"{where}: {PICKLE} is a pickle, which can run code when it is opened; expected "
            f"{WEIGHTS}",
            "convert it where you trust it: load it in PEFT and save_pretrained() it again",
        )
    missing = [
        name
        for name, is_present in ((CONFIG, has_config), (WEIGHTS, has_weights))
        if not is_present
    ]
    if missing:
        raise FormatError(
            f"{where}: no {' and no '.join(missing)}", "a PEFT adapter is a folder with both files"
        )


def _warn_if_turned(adapter: Adapter, config_named: str) -> None:
    """Warn if the factors of fused experts may be swapped.

    PEFT before `TURNED` took A's input side from the wrong axis of (experts, out, in). If out and
    in are equal, its file looks the same, so only ``peft_version`` can tell.
    """
    if is_orientation_known(adapter.config):
        return
    fused = []
    for name, value in adapter.modules.items():
        if value.layout == PARAMETER and value.A.shape[0] > 1:
            fused.append(name)
    if not fused:
        return
    version = adapter.config.get("peft_version")
    turned = ".".join(map(str, TURNED))
    warnings.warn(
        LoraTreeWarning(
            f"{config_named}: it has target_parameters, and its peft_version is {version!r:.40}: "
            f"PEFT before {turned} wrote the factors of fused experts the other way round; "
            f"{listing(fused, most=2)} {agreeing(len(fused), 'is', 'are')} read as PEFT reads "
            f"{agreeing(len(fused), 'it', 'them')} since then",
            f"where such a PEFT trained it, train it again with {turned} or newer; "
            f'otherwise put "peft_version": "{turned}" into the file',
        ),
        stacklevel=2,
    )
