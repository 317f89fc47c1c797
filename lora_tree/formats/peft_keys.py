"""Convert names of modules to the keys of a PEFT file, and back.

    base_model.model.                                   before every key, left out below
    layers.0.self_attn.q_proj.lora_A.weight             q_proj
    layers.0.mlp.experts.lora_A.weight                  the parameter of experts registered last
    layers.0.mlp.experts.base_layer.lora_A.weight       the one before it
    attn.base_layer.out_proj.lora_A.weight              out_proj of the nn.MultiheadAttention attn
    embed_tokens.lora_embedding_A                       an embedding: no .weight at the end
    embed_tokens.base_layer.weight                      the base's own weight of that embedding

PEFT puts wrappers around a module, and each wrapper adds ``.base_layer`` to the names of everything
below it. So a key is the plain name with ``.base_layer`` after every wrapped module on the way.

Law: `key_path` is the only implementation of that rule, and a key that it would not write is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "CONFIG",
    "FILES",
    "NESTING",
    "PARTS",
    "PREFIX",
    "WEIGHTS",
    "ancestors",
    "key_path",
    "plain",
    "split_key",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
"""The two files of an adapter."""
NESTING = "lora_tree.nesting"
"""Our own entry in a file's metadata: module → its raw parameters, in the order of registration."""

PREFIX = "base_model.model."
PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_B.bias",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}


def split_key(path: str) -> tuple[str, str | None]:
    """Split a key without its prefix into (path, part); the part is None if it is no factor's.

    >>> split_key("mlp.up_proj.lora_A.weight"), split_key("norm.bias")
    (('mlp.up_proj', 'lora_A'), ('norm.bias', None))
    """
    # No suffix is the end of another, so their order does not matter.
    for suffix, part in PARTS.items():
        if path.endswith(suffix):
            return path.removesuffix(suffix), part
    return path, None


def plain(path: str) -> tuple[str, int]:
    """Turn a path into (the plain name, the depth of its module's wrapper).

    >>> plain("mlp.experts.base_layer.base_layer"), plain("attn.base_layer.out_proj")
    (('mlp.experts', 2), ('attn.out_proj', 0))
    """
    if "base_layer" not in path:  # nearly every key; there may be a hundred thousand
        return path, 0
    # At the end of a path, base_layer counts the wrappers of the module itself. Further up it
    # belongs to a module around this one.
    names = path.split(".")
    depth = 0
    while names and names[-1] == "base_layer":
        names.pop()
        depth += 1
    return ".".join(name for name in names if name != "base_layer"), depth


def key_path(name: str, wrappers: Mapping[str, int]) -> str:
    """Turn a plain name into the path in a key, given the number of wrappers of each module.

    >>> key_path("attn.out_proj", {"attn": 1})
    'attn.base_layer.out_proj'
    >>> key_path("attn.out_proj.bias", {"attn": 1, "attn.out_proj": 1})
    'attn.base_layer.out_proj.base_layer.bias'
    """
    names = name.split(".")
    path = names[0]
    for at in range(1, len(names)):
        around = wrappers.get(".".join(names[:at]), 0)
        path += ".base_layer" * around + "." + names[at]
    return path


def ancestors(name: str) -> list[str]:
    """Return the names of the modules above ``name``, nearest first.

    >>> ancestors("a.b.c")
    ['a.b', 'a']
    """
    found = []
    while "." in name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found
