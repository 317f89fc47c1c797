"""The adapter's own name in a key, as a state dict of a PEFT model has it.

    model.state_dict()                             save_pretrained
    q_proj.lora_A.my_adapter.weight                q_proj.lora_A.weight
    embed_tokens.lora_embedding_A.my_adapter       embed_tokens.lora_embedding_A
    score.modules_to_save.my_adapter.weight        score.modules_to_save.weight

A PEFT model holds several adapters, each under its name: "default", unless its user gave another.
PEFT's ``save_pretrained`` writes one of them and leaves the name out. A state dict that was
filtered and saved by hand, or by a trainer, still has it.

Law: the name is left out only if every factor of the file carries the same one. Anything else is an
error that names what the keys carry.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..errors import FormatError, listing, plural
from .peft_keys import PARTS
from .products import PRODUCT_PARTS
from .safetensors import Header, open_tensors, parse_header

__all__ = ["KeyNames", "adapter_name_of", "peft_header"]

_COMPOSED_PARTS = (
    *("lora_A", "lora_B", "lora_E", "ranknum"),
    *("vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"),
    *("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
)
_ENDS = (
    *PARTS,
    ".trainable_tokens_delta",
    *[f".{part}" for part in (*PRODUCT_PARTS, *_COMPOSED_PARTS)],
)
"""The ends of the keys of factors, in a file that carries no name."""

_TAILS = (".weight", ".bias")
_SAVED_WHOLE = ".modules_to_save."


class KeyNames:
    """The keys of a file, and the adapter's name that they carry.

    Args:
        keys: of one file.
        where: names the file in errors.

    Raises:
        FormatError: they carry the names of several adapters, or some carry one and some none.

    >>> keys = KeyNames(["q_proj.lora_A.late.weight", "q_proj.lora_B.late.weight"], "a.safetensors")
    >>> keys.name, keys.plain("q_proj.lora_A.late.weight")
    ('late', 'q_proj.lora_A.weight')
    """

    def __init__(self, keys: Iterable[str], where: str) -> None:
        self.name: str | None = None
        self._plain: dict[str, str] = {}
        carried: dict[str, str] = {}  # name → a key that carries it
        nameless: str | None = None
        saved_whole: list[str] = []
        # Sorted, so that the keys in an error do not depend on the order of the file.
        for key in sorted(keys):
            if key.endswith(_ENDS):
                nameless = key
            elif _SAVED_WHOLE in key:
                saved_whole.append(key)
            elif (without_name := _without_name(key)) is not None:
                self._plain[key], name = without_name
                carried.setdefault(name, key)
        if not carried:
            return
        for key in saved_whole:
            # The word behind modules_to_save is a name here, because the factors carry one.
            before, _, behind = key.partition(_SAVED_WHOLE)
            name, _, tensor = behind.partition(".")
            if tensor:
                self._plain[key] = before + _SAVED_WHOLE + tensor
                carried.setdefault(name, key)
        self.name, first = next(iter(carried.items()))
        if len(carried) > 1:
            raise FormatError(
                f"{where}: its keys name {plural(len(carried), 'adapter')}, expected one: "
                f"{listing([name[:80] for name in carried])}",
                "save each by itself: model.save_pretrained(FOLDER, selected_adapters=[NAME])",
            )
        if nameless is not None:
            raise FormatError(
                f"{where}: unexpected key {first[:200]!r}: it carries an adapter's name, and "
                f"{nameless[:200]!r} carries none",
                "the adapter's own name is no part of a key: save it with PEFT's save_pretrained",
            )

    def plain(self, key: str) -> str:
        """Return a key of the file as ``save_pretrained`` writes it."""
        return self._plain.get(key, key)


def peft_header(head: bytes, nbytes: int, where: str) -> Header:
    """Parse the header of PEFT's weights; an adapter's name is left out of its keys.

    Raises:
        FormatError: as `parse_header` and `KeyNames`.
    """
    header = parse_header(head, nbytes, where)
    names = KeyNames(header.tensors, where)
    if names.name is None:
        return header
    return replace(header, tensors={names.plain(key): t for key, t in header.tensors.items()})


def adapter_name_of(file: str | Path) -> str | None:
    """Return the adapter's name that the keys of a weights file carry; None if they carry none.

    Raises:
        FormatError: the file is broken, or its keys carry several names.
    """
    where = str(file)
    with open_tensors(file, where) as reading:
        header = parse_header(reading.head, reading.nbytes, where)
    return KeyNames(header.tensors, where).name


def _without_name(key: str) -> tuple[str, str] | None:
    """Split a key into (the key without an adapter's name, the name); None if it carries none.

    >>> _without_name("q_proj.lora_B.my_adapter.bias"), _without_name("norm.bias")
    (('q_proj.lora_B.bias', 'my_adapter'), None)
    """
    tail = next((tail for tail in _TAILS if key.endswith(tail)), "")
    before, _, name = key.removesuffix(tail).rpartition(".")
    plain = before + tail
    # torch allows no dot in the name of a module or parameter, so none is in an adapter's.
    return (plain, name) if name and plain.endswith(_ENDS) else None
