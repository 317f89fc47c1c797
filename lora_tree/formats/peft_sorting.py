"""Sort the keys of an adapter's weights: factors of modules, overrides, tensors of the base.

    layers.0.q_proj.lora_A.weight                    a wrapper of q_proj, at depth 0
    experts.base_layer.lora_A.weight                 a wrapper of experts, at depth 1
    score.modules_to_save.weight, …                  an override of score.weight
    embed_tokens.weight                              the base's own, carried along

Law: every key of the file ends up in `SortedKeys` or in an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import FormatError, UnsupportedAdapter
from ..override import Override
from . import peft_keys
from .peft_config import VARIANTS, PeftConfig
from .peft_factors import Parts
from .peft_keys import PREFIX
from .peft_overrides import TOKENS, TOKENS_ALONE, is_original, without_wrapper
from .safetensors import Header

__all__ = ["SortedKeys", "Wrappers", "sort_keys"]

LEFTOVERS = {
    "lora_magnitude_vector": VARIANTS["use_dora"],
    "lora_diag": VARIANTS["kasa_config"],
}
"""Parts of keys that only a refused kind of adapter has, whatever the config says."""

WHOLE = {
    "embed_in",
    "embed_out",
    "embed_tokens",
    "embeddings",
    "lm_head",
    "output",
    "shared",
    "word_embeddings",
    "wte",
}
"""Embeddings and heads, which PEFT writes whole if the vocabulary was resized.

That is its default, ``save_embedding_layers="auto"``.
"""

VELORA_BUFFER = ".lora_velora_embed"
"""The end of the key of VeLoRA's projection, which compresses activations and adds nothing to W."""

Wrappers = dict[int, Parts]
"""The wrappers around one module: depth → the tensors of that wrapper."""


@dataclass(frozen=True)
class SortedKeys:
    """The tensors of a file, sorted by kind.

    Args:
        config: of the adapter.
        where: names the file in errors.
        modules: module → its wrappers.
        paths: module → the paths of its keys, as the file spells them.
        overrides: name of a tensor of the base → its replacement.
        base_tensors: path → a whole tensor of the base that neither the config nor its key calls an
            override.
        repeated: name of a tensor → its two values, if the file has it under two keys.
    """

    config: PeftConfig
    where: str
    modules: dict[str, Wrappers] = field(default_factory=dict)
    paths: dict[str, set[str]] = field(default_factory=dict)
    overrides: dict[str, Override] = field(default_factory=dict)
    base_tensors: dict[str, Tensor] = field(default_factory=dict)
    repeated: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def depths(self) -> dict[str, int]:
        """Module → the number of wrappers around it."""
        return {module: len(wrappers) for module, wrappers in self.modules.items()}

    def check_paths(self) -> None:
        """Compare each key with the one that we would write: PEFT has only one spelling.

        Raises:
            FormatError: names the key, and the one expected.
        """
        depths = self.depths
        for module, paths in self.paths.items():
            expected = peft_keys.key_path(module, depths)
            for path in paths:
                if path != expected + ".base_layer" * peft_keys.plain(path)[1]:
                    raise FormatError(
                        f"{self.where}: unexpected key {PREFIX}{path}.…, expected "
                        f"{PREFIX}{expected}.…",
                        "PEFT adds .base_layer for each wrapper and nowhere else: save the adapter "
                        "again with PEFT",
                    )

    def carried(self) -> dict[str, Tensor]:
        """Return the tensors of the base that the file carries, by the names of its parameters.

        PEFT saves the own weight of a targeted embedding, embeddings and heads after a resize, and
        with ``bias="all"`` or ``"lora_only"`` all biases or those of trained modules. When the
        adapter is bound, each is compared with the base's: one that differs is an override.

        Raises:
            FormatError: PEFT writes no such tensor beside the factors; names the key.
        """
        depths = self.depths
        carried: dict[str, Tensor] = {}
        for path, tensor in self.base_tensors.items():
            name, depth = peft_keys.plain(path)
            shown = repr((PREFIX + path)[:200])
            if name in carried:
                raise FormatError(
                    f"{self.where}: unexpected key {shown}: a second value of {name}",
                    "save the adapter again with PEFT, which writes each tensor once",
                )
            is_spelled_right = depth == 0 and path in (peft_keys.key_path(name, depths), name)
            if is_spelled_right and self._may_be_carried(path, name, depths):
                carried[name] = tensor
                continue
            kind = name.rpartition(".")[2]
            if kind == "weight":
                raise FormatError(
                    f"{self.where}: {shown} is a whole weight, and the config names no "
                    "modules_to_save that it belongs to",
                    'name it there, where it is meant: "modules_to_save": '
                    f'["{name.rpartition(".")[0]}"] in {self.config.where}',
                    "a state dict of the whole model holds the base's weights too: save the "
                    "adapter alone, with PEFT's save_pretrained",
                )
            hint = "; adapter_config.json has bias = 'none'" if kind == "bias" else ""
            raise FormatError(
                f"{self.where}: unexpected key {shown}{hint}",
                "expected factors (lora_A, lora_B), and of the base's own tensors only biases and "
                "embeddings",
            )
        return carried

    def _may_be_carried(self, path: str, name: str, depths: Mapping[str, int]) -> bool:
        """Return whether PEFT may write the base's own parameter ``name`` beside the factors."""
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            return module in depths or module.rpartition(".")[2] in WHOLE
        if kind == "bias":
            # save_embedding_layers saves all parameters of a head: the bias comes with the weight.
            has_weight = f"{path.removesuffix('.bias')}.weight" in self.base_tensors
            return self.config.bias != "none" or has_weight
        return False


def sort_keys(header: Header, config: PeftConfig, where: str) -> SortedKeys:
    """Return the tensors of a file, sorted by their keys.

    Raises:
        FormatError: PEFT writes no such key, or the file has neither factors nor overrides.
        UnsupportedAdapter: a key belongs to a kind of adapter that does not add up to W + B·A.
    """
    sorted_keys = SortedKeys(config, where)
    # Sorted by name, so that the order in the file has no effect on the adapter or the error.
    for key in sorted(header.tensors):
        path, part = _split(key, where)
        tensor = header.tensors[key]
        if path.endswith(TOKENS_ALONE):
            module = path.removesuffix(TOKENS).removesuffix(TOKENS_ALONE)
            _override(sorted_keys, f"{module}.weight", key, config.saved.rows(module, tensor))
        elif part:
            module, depth = peft_keys.plain(path)
            sorted_keys.modules.setdefault(module, {}).setdefault(depth, {})[part] = tensor
            sorted_keys.paths.setdefault(module, set()).add(path)
        elif not (config.velora and key.endswith(VELORA_BUFFER)):
            _sort_whole(sorted_keys, key, path, tensor)
    config.saved.check_found(sorted_keys.overrides, where)
    if not sorted_keys.modules and not sorted_keys.overrides:
        raise FormatError(
            f"{where}: no lora_A and lora_B of any module",
            "the file holds no LoRA factors",
        )
    return sorted_keys


# ---------------------------------------------------------------------- private
def _sort_whole(found: SortedKeys, key: str, path: str, tensor: Tensor) -> None:
    """Sort a whole tensor: an override if its key or the config says so, else ``base_tensors``."""
    if is_original(path):
        return  # the base's original beside its replacement is not used
    path, is_wrapped = without_wrapper(path)
    name, _ = peft_keys.plain(path)
    known = found.overrides.get(name)
    if known is not None and known.rows is None and known.values.shape == tensor.shape:
        found.repeated[name] = known.values, tensor
    elif is_wrapped or (path == name and found.config.saved.has(name)):
        _override(found, name, key, Override(tensor))
    else:
        found.base_tensors[path] = tensor


def _override(found: SortedKeys, name: str, key: str, override: Override) -> None:
    if name in found.overrides:
        raise FormatError(
            f"{found.where}: unexpected key {key[:200]!r}: a second value of {name}",
            "save the adapter again with PEFT, which writes each tensor once",
        )
    found.overrides[name] = override


def _split(key: str, where: str) -> tuple[str, str | None]:
    """Split a key into (path, part); the part is None for a whole tensor.

    Raises:
        FormatError: PEFT writes no such key.
        UnsupportedAdapter: it belongs to a kind of adapter that does not add up.
    """
    for name, reason in LEFTOVERS.items():
        if name in key:
            raise UnsupportedAdapter(f"{where}: {key}: {reason}")
    if not key.startswith(PREFIX):
        raise FormatError(
            f"{where}: unexpected key {key[:200]!r}, expected {PREFIX}<module>.lora_A.weight",
            "a file of kohya or diffusers is loaded by its own name, without "
            "adapter_config.json: Adapter.load('FILE.safetensors')",
        )
    path, part = peft_keys.split_key(key.removeprefix(PREFIX))
    if part is None and ".lora_" in path and not key.endswith(VELORA_BUFFER):
        raise FormatError(
            f"{where}: unexpected key {key[:200]!r}, expected it to end in one of "
            f"{' '.join(peft_keys.PARTS)}",
            "the adapter's own name is no part of a key: save it with PEFT's save_pretrained",
        )
    if "" in path.split(".") or not peft_keys.plain(path)[0]:
        raise FormatError(
            f"{where}: {key[:200]!r} names no module, expected {PREFIX}<module>.lora_A.weight",
            "save the adapter again with PEFT",
        )
    return path, part
