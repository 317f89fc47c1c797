"""Read PEFT's AdaLoRA, VeRA and VB-LoRA folders, whose factors are composed of several tensors.

    AdaLoRA    ΔW = s · B diag(E) A         lora_A (r, in), lora_B (out, r), lora_E (r, 1)
                                            s = lora_alpha / (init_r + 1e-5), as in PEFT
    VeRA       ΔW = diag(b) B diag(d) A     vera_lambda_b (out,), vera_lambda_d (r,); and for all
                                            modules vera_A (r, in), vera_B (out, r)
    VB-LoRA    ΔW = B A                     vblora_logits_A (r, in / l, n), _B (out / l, r, n); and
                                            for all modules vblora_vector_bank (n, l): each piece of
                                            a factor is the softmax of its k largest logits times
                                            their vectors; or vblora_logits_A_topk_indices and
                                            _topk_weights: their places, and the weights
                                            without the last

A model's state dict, saved by hand, repeats the shared tensors in every module
(``<module>.vera_A``), and has AdaLoRA's ``<module>.ranknum``. PEFT loads it, and so does this
reader, if all copies are the same.

All three convert exactly, at their own rank. VeRA's shared factors are as large as the largest
module. A file does not state the width of a module's input, so A gets the full width, and a base
refuses it for a narrower module. PEFT can leave VeRA's projections out of the file and draw them
again from a seed, with numbers that may differ between systems: such a file is refused.

Sources: PEFT 0.21, tuners/adalora/layer.py, tuners/vera/layer.py, tuners/vblora/layer.py
(arXiv 2303.10512, 2310.11454, 2405.15179).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError, LoraTreeError, UnsupportedAdapter, plural
from ..lowrank import LowRank
from . import strict_json
from .peft_config import EXTRACT
from .peft_keys import PREFIX

__all__ = ["ComposedConfig", "composed_config", "read_composed"]

_ROOT = "base_model."
"""The prefix of the tensors that all modules share."""
_PARTS = {
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "VBLORA": ("vblora_logits_A", "vblora_logits_B"),
}
_RANKNUM = "ranknum"
"""AdaLoRA's count of ranks, by which PEFT divides; its save leaves it out, a state dict has it."""
_TOPK = (
    *("vblora_logits_A_topk_indices", "vblora_logits_A_topk_weights"),
    *("vblora_logits_B_topk_indices", "vblora_logits_B_topk_weights"),
)
"""The parts of a VB-LoRA that was saved with ``save_only_topk_weights``."""
_OPTIONAL: dict[str, tuple[str, ...]] = {"ADALORA": (_RANKNUM,), "VERA": (), "VBLORA": _TOPK}
_SHARED: dict[str, tuple[str, ...]] = {
    "ADALORA": (),
    "VERA": ("vera_A", "vera_B"),
    "VBLORA": ("vblora_vector_bank",),
}


@dataclass(frozen=True)
class ComposedConfig:
    """The checked config of an adapter with composed factors.

    Args:
        kind: its ``peft_type``.
        base: the base that it names.
        scale: of every module.
        topk: the number of vectors per piece, for VB-LoRA.
        rank: the rank by which the scale is divided, for AdaLoRA.
    """

    kind: str
    base: str | None
    scale: float
    topk: int
    rank: int = 0


def composed_config(config: bytes, where: str) -> ComposedConfig | None:
    """Return the checked config; None if it is of a kind that another reader handles.

    Raises:
        FormatError: it is broken.
        UnsupportedAdapter: it has parts that do not add up.
    """
    # Search the bytes first: nearly all adapters are LoRAs, whose config is parsed elsewhere.
    if not any(f'"{kind}"'.encode() in config for kind in _PARTS):
        return None
    fields = strict_json.loads(config, where)
    kind = fields.get("peft_type")
    if kind not in _PARTS:
        return None
    for name in ("modules_to_save", "use_dora"):
        if fields.get(name):
            raise UnsupportedAdapter(
                f"{where}: {name} = {str(fields[name])[:80]} beside {kind}, which is not read",
                EXTRACT,
            )
    if fields.get("bias", "none") != "none":
        raise UnsupportedAdapter(
            f"{where}: bias = {str(fields['bias'])[:40]!r} beside {kind}, which is not read",
            EXTRACT,
        )
    scale, rank = 1.0, 0
    if kind == "ADALORA":
        rank = _number(fields, "init_r", 12, where)
        alpha = fields.get("lora_alpha", 8)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or abs(alpha) > 1e30:
            raise FormatError(f"{where}: lora_alpha is {alpha!r:.80}, expected a number")
        # For an alpha of 0 or less PEFT uses the rank. It divides by init_r even after it has
        # pruned ranks.
        scale = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    base = fields.get("base_model_name_or_path")
    topk = _number(fields, "topk", 2, where)
    return ComposedConfig(kind, base if isinstance(base, str) else None, float(scale), topk, rank)


def _number(fields: Mapping[str, Any], name: str, default: int, where: str) -> int:
    number = fields.get(name, default)
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 1 << 20:
        raise FormatError(f"{where}: {name} is {number!r:.80}, expected a whole number from 1")
    return number


def read_composed(config: ComposedConfig, tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """Read a file's tensors under their config.

    Args:
        config: of `composed_config`.
        tensors: key → tensor; on the meta device for an outline.
        where: names the file in errors.

    Raises:
        FormatError: a key that the kind does not have, or parts that don't fit; names the key.
        UnsupportedAdapter: VeRA without its projections.
    """
    parts, shared = _PARTS[config.kind], _SHARED[config.kind]
    known = (*parts, *_OPTIONAL[config.kind])
    groups: dict[str, dict[str, Tensor]] = {}
    # A state dict repeats a shared tensor in every module: its name → the key of a copy → the copy.
    copies: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        if key.removeprefix(_ROOT) in shared and key.startswith(_ROOT):
            continue
        module, _, part = key.removeprefix(PREFIX).rpartition(".")
        if key.startswith(PREFIX) and module and part in shared:
            copies.setdefault(part, {})[key] = tensors[key]
            continue
        if not key.startswith(PREFIX) or part not in known or "" in module.split("."):
            raise FormatError(
                f"{where}: unexpected key {key[:200]!r}, expected {PREFIX}<module>.{parts[0]}"
                + "".join(f", {_ROOT}{name}" for name in shared)
            )
        groups.setdefault(module, {})[part] = tensors[key]
    if not groups:
        raise FormatError(f"{where}: no {parts[0]} of any module")
    common = _common(config.kind, tensors, copies, where)
    modules: dict[str, LowRank] = {}
    for module, own in groups.items():
        # Either form of a part of VB-LoRA's is enough here; `_vblora_of_topk` looks at both halves.
        missing = [part for part in parts if not _has_part(own, part)]
        if missing:
            raise FormatError(f"{where}: {module}: no {missing[0]} beside {next(iter(own))}")
        try:
            value = _COMPOSE[config.kind](own, common, config)
        except LoraTreeError as error:
            raise FormatError(f"{where}: {module}: {error.what}", *error.todo) from error
        if value is not None:
            modules[module] = value
    return Adapter(modules, base=config.base)


def _has_part(own: Iterable[str], part: str) -> bool:
    return any(name.startswith(part) for name in own)


def _common(
    kind: str,
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Mapping[str, Tensor]],
    where: str,
) -> list[Tensor]:
    """Return the tensors that all modules share.

    Args:
        kind: of the adapter.
        tensors: all of the file.
        copies: name of a shared tensor → key of a copy in a module → the copy.
        where: names the file in errors.

    Raises:
        FormatError: one is missing, or not a floating point matrix; or a copy differs from it.
        UnsupportedAdapter: VeRA's are not in the file.
    """
    shared = []
    for name in _SHARED[kind]:
        own_copies = copies.get(name, {})
        tensor = tensors.get(f"{_ROOT}{name}", next(iter(own_copies.values()), None))
        if tensor is None and kind == "VERA":
            raise UnsupportedAdapter(
                f"{where}: no {_ROOT}{name}: the projections were not saved, and the random "
                "numbers of another system or torch need not be the same",
                "load it in PEFT where it was trained, set config.save_projection = True, and save "
                "it again",
                EXTRACT,
            )
        if tensor is None or tensor.ndim != 2 or not tensor.is_floating_point():
            shape = "missing" if tensor is None else str(tuple(tensor.shape))
            raise FormatError(f"{where}: {_ROOT}{name}: {shape}, expected a matrix")
        for key, copy in own_copies.items():
            # PEFT loads all copies into one tensor, so of different ones the last would count.
            if not _is_same(copy, tensor):
                raise FormatError(
                    f"{where}: {key} differs from {name} elsewhere in the file, and all modules "
                    "share one",
                    "save it with PEFT's save_pretrained, which writes it once",
                )
        shared.append(tensor)
    return shared


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.is_meta or other.is_meta or torch.equal(one, other)


def _check(own: Mapping[str, Tensor], dimensions: Mapping[str, int]) -> None:
    """Refuse parts with another number of dimensions, or without a floating dtype."""
    for name, wanted in dimensions.items():
        tensor = own[name]
        if tensor.ndim != wanted or not tensor.is_floating_point():
            raise FormatError(
                f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, expected {wanted} dimensions "
                "of floating numbers"
            )


def _widened(*tensors: Tensor) -> list[Tensor]:
    """Return tensors in one dtype, at least fp32: products in bf16 would be rounded."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _adalora(
    own: Mapping[str, Tensor], common: list[Tensor], config: ComposedConfig
) -> LowRank | None:
    _check(own, {"lora_A": 2, "lora_B": 2, "lora_E": 2})
    A, B, E = own["lora_A"], own["lora_B"], own["lora_E"]
    if E.shape != (A.shape[0], 1) or B.shape[1] != A.shape[0]:
        raise FormatError(
            f"lora_A {tuple(A.shape)}, lora_E {tuple(E.shape)} and lora_B {tuple(B.shape)} do not "
            "multiply"
        )
    if A.shape[0] == 0:
        return None  # all ranks of this module were pruned
    B, E = _widened(B, E)
    scale, ranknum = config.scale, own.get(_RANKNUM)
    if ranknum is not None and not ranknum.is_meta:
        if ranknum.numel() != 1 or not float(ranknum) > 0.0:
            raise FormatError(f"{_RANKNUM} is {ranknum.tolist()!s:.80}, expected a number above 0")
        # PEFT loads it in place of init_r, from which the config's scale was computed.
        scale *= (config.rank + 1e-5) / (float(ranknum) + 1e-5)
    return LowRank(A.to(B.dtype), B * E.mT, scale)


def _vera(
    own: Mapping[str, Tensor], common: list[Tensor], config: ComposedConfig
) -> LowRank | None:
    _check(own, {"vera_lambda_b": 1, "vera_lambda_d": 1})
    A, B = common
    b, d = own["vera_lambda_b"], own["vera_lambda_d"]
    if not len(d) == A.shape[0] == B.shape[1] or len(b) > B.shape[0]:
        raise FormatError(
            f"vera_lambda_b {tuple(b.shape)} and vera_lambda_d {tuple(d.shape)} do not fit vera_A "
            f"{tuple(A.shape)} and vera_B {tuple(B.shape)}"
        )
    A, B, b, d = _widened(A, B, b, d)
    # All modules share the tensor A, so the module's own vectors go into B.
    return LowRank(A, b[:, None] * B[: len(b)] * d)


def _vblora(
    own: Mapping[str, Tensor], common: list[Tensor], config: ComposedConfig
) -> LowRank | None:
    (bank,) = common
    if any(name in own for name in _TOPK):
        return _vblora_of_topk(own, bank, config.topk)
    _check(own, {"vblora_logits_A": 3, "vblora_logits_B": 3})
    a, b = own["vblora_logits_A"], own["vblora_logits_B"]
    if a.shape[0] != b.shape[1] or not a.shape[2] == b.shape[2] == len(bank) >= config.topk:
        raise FormatError(
            f"vblora_logits_A {tuple(a.shape)} and _B {tuple(b.shape)} do not fit "
            f"{plural(len(bank), 'vector')}, of which {config.topk} count"
        )
    bank, a, b = _widened(bank, a, b)
    return _vblora_value(_pieces(a, bank, config.topk), _pieces(b, bank, config.topk))


def _vblora_of_topk(own: Mapping[str, Tensor], bank: Tensor, topk: int) -> LowRank:
    """Return the value of a module that has the places and weights of its vectors.

    Raises:
        FormatError: a part is missing or does not fit; or the weights are no shares of 1.
    """
    halves: list[Tensor] = []
    for half in "AB":
        name = f"vblora_logits_{half}"
        indices, weights = own.get(f"{name}_topk_indices"), own.get(f"{name}_topk_weights")
        if indices is None or weights is None or name in own:
            raise FormatError(
                f"{name}: expected its topk_indices and its topk_weights, and no more"
            )
        _check(own, {f"{name}_topk_weights": 3})
        shape = (*weights.shape[:2], topk)
        if indices.shape != shape or indices.is_floating_point() or weights.shape[2] != topk - 1:
            raise FormatError(
                f"{name}_topk_indices {tuple(indices.shape)} and _topk_weights "
                f"{tuple(weights.shape)} do not fit {plural(topk, 'vector')} for each piece"
            )
        wide, vectors = _widened(weights, bank)
        wide = torch.cat([wide, 1.0 - wide.sum(-1, keepdim=True)], dim=-1)  # PEFT leaves one out
        if not indices.is_meta:
            _check_topk(name, indices, wide, len(bank))
        halves.append((wide[..., None] * vectors[indices.long()]).sum(-2))
    a, b = halves
    if a.shape[0] != b.shape[1]:
        raise FormatError(f"vblora_logits_A has the rank {a.shape[0]}, and _B {b.shape[1]}")
    return _vblora_value(a, b)


def _check_topk(name: str, indices: Tensor, weights: Tensor, vectors: int) -> None:
    """Refuse places outside of the bank, and weights for which PEFT's logits are not numbers."""
    places = indices.long()
    if bool(((places < 0) | (places >= vectors)).any()):
        raise FormatError(f"{name}_topk_indices: expected places in {plural(vectors, 'vector')}")
    ordered = places.sort(dim=-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise FormatError(f"{name}_topk_indices: one piece has the same vector twice")
    if not bool((weights >= 0.0).all()):
        raise FormatError(
            f"{name}_topk_weights: weights below 0, or of more than 1 together, as rounding to a "
            "narrow dtype leaves them",
            "save it in PEFT with save_only_topk_weights = False",
        )


def _vblora_value(a: Tensor, b: Tensor) -> LowRank:
    A = a.flatten(1)  # (r, in / l, l) → (r, in)
    B = b.transpose(1, 2).flatten(0, 1)  # (out / l, r, l) → (out, r)
    return LowRank(A, B.contiguous())


def _pieces(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """Return the vectors that logits (…, n) choose from the bank (n, l): (…, l)."""
    largest, places = logits.topk(topk, dim=-1)
    return (torch.softmax(largest, dim=-1)[..., None] * bank[places]).sum(-2)


_Compose = Callable[[Mapping[str, Tensor], list[Tensor], ComposedConfig], LowRank | None]
_COMPOSE: dict[str, _Compose] = {"ADALORA": _adalora, "VERA": _vera, "VBLORA": _vblora}
