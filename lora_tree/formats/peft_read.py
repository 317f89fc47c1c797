"""PEFT adapters in: the two files of a folder → `Adapter`.

    kind                A in the file          B in the file           LowRank
    Linear, Conv1D      (r, in)                (out, r)                the same
    Embedding           (r, vocab)             (dim, r)                the same
    ConvNd              (r, in, *kernel)       (out, r, 1, …)          A (r, in·kernel), B (out, r)
      with groups       (r, in, *kernel)       (out, r/groups, 1, …)   a batch of groups: (r/G, in·kernel), (out/G, r/G)
    raw parameter       (E·r, in)              (out, r·E)              a batch of experts: A expert-major, B rank-major

Everything but the numbers follows from the config and the header of the weights (`Outline`): the shapes, the scales,
and where each factor lies. Most adapters of a tree have the same two texts, and so one outline, which is made once;
what is left to do for each of them is to read its numbers.

No model is needed. What a file leaves open without one (the order of two raw parameters of one module) is assumed, and
the adapter says so (`Adapter.assumed`).
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter, over
from ..errors import FormatError, LoraTreeWarning, UnsupportedAdapter, listing
from ..lowrank import EMBEDDING, PARAMETER, Layout, LowRank
from ..storage import Allocate, Witness
from ..system.reading import Inside, open_stream
from . import peft_keys, strict_json
from .limits import CONFIG_BYTES
from .peft_config import FUSED, TURNED, VARIANTS, PeftConfig, parse_config, says_which_way
from .peft_keys import CONFIG, NESTING, WEIGHTS
from .pointer import check_pointer
from .safetensors import Header, open_tensors, parse_header

__all__ = ["read_adapter", "read_folder"]

PICKLE = "adapter_model.bin"
KEPT_OUTLINES = 8
MAX_KEPT_BYTES = (
    256 << 10
)  # of config and header; what is made of them takes some ten times as much

LEFTOVERS = {
    "lora_magnitude_vector": VARIANTS["use_dora"],
    "trainable_tokens": VARIANTS["trainable_token_indices"],
    "modules_to_save": VARIANTS["modules_to_save"],
    "lora_diag": VARIANTS["kasa_config"],
}
# names of embeddings and heads, which PEFT saves whole where the vocabulary was resized
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

_Parts = dict[str, Tensor]


def read_folder(folder: Path) -> Adapter:
    """Read the PEFT adapter in ``folder``; see `read`."""
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
    """Read a PEFT adapter from its two files; the factors are copies in memory, in the dtypes of the file.

    Args:
        config_file, weights_file: where the two files lie at the moment.
        where: the folder that errors name.
        outline: read headers only; the factors have shapes and dtypes, and no numbers (the meta device).
        allocate: makes the one buffer in which they lie; None: ordinary memory.
        witness: is shown every byte of the two files that is read.
        inside: where the files may lie, all links followed; None: anywhere.

    Raises:
        FormatError: a file is missing, broken, or not what the other one says; names the file and the key.
        UnsupportedAdapter: an adapter of a kind that does not add up, or a pickle.
    """
    has_config, has_weights = os.path.isfile(config_file), os.path.isfile(weights_file)
    folders = (os.path.dirname(weights_file), where)
    if not has_weights and any(os.path.isfile(os.path.join(folder, PICKLE)) for folder in folders):
        raise UnsupportedAdapter(
            f"{where}: {PICKLE} is a pickle, which can run code when it is opened; expected {WEIGHTS}",
            "convert it where you trust it: load it in PEFT and save_pretrained() it again",
        )
    missing = [name for name, there in ((CONFIG, has_config), (WEIGHTS, has_weights)) if not there]
    if missing:
        raise FormatError(
            f"{where}: no {' and no '.join(missing)}", "a PEFT adapter is a folder with both files"
        )
    config_named, weights_named = os.path.join(where, CONFIG), os.path.join(where, WEIGHTS)
    data = _bytes(config_file, config_named, inside)
    if witness:
        witness(CONFIG, memoryview(data))
    shown = partial(witness, WEIGHTS) if witness else None
    # read under inference_mode, it may be trained on top of later
    with (
        open_tensors(weights_file, weights_named, shown, inside) as weights,
        torch.inference_mode(False),
    ):
        texts = _Texts(data, weights.head, weights.nbytes, config_named, weights_named)
        found = (
            _outline(texts)
            if len(data) + len(weights.head) <= MAX_KEPT_BYTES
            else _outline.__wrapped__(texts)
        )
        if outline:
            return found.adapter
        adapter = found.filled(weights.numbers(found.header, allocate), weights_named)
    _warn_if_turned(adapter, config_named)
    return adapter


def _warn_if_turned(adapter: Adapter, config_named: str) -> None:
    """Warn where factors of fused experts may lie the other way round, which only shapes that differ would show."""
    fused = [
        name for name, v in adapter.modules.items() if v.layout == PARAMETER and v.A.shape[0] > 1
    ]
    if not fused or says_which_way(adapter.config):
        return
    said = adapter.config.get("peft_version")
    turned = ".".join(map(str, TURNED))
    warnings.warn(
        LoraTreeWarning(
            f"{config_named}: it has target_parameters, and its peft_version is {said!r:.40}: "
            f"PEFT before {turned} wrote the factors of fused experts the other way round; "
            f"{listing(fused, most=2)} are read as PEFT reads them since then",
            f"where such a PEFT trained it, train it again with {turned} or newer; "
            f'otherwise put "peft_version": "{turned}" into the file',
        ),
        stacklevel=2,
    )


def _bytes(file: str | Path, where: str, inside: Inside | None) -> bytes:
    try:
        with open_stream(file, inside=inside) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > CONFIG_BYTES:
                raise FormatError(
                    f"{where}: more than {CONFIG_BYTES >> 20} MiB, which no adapter config is"
                )
            data = stream.read(size)  # no more than that: what is asked for is allocated
            check_pointer(data, where, "JSON")
            return data
    except OSError as error:
        raise FormatError(f"{where}: can't be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class Outline:
    """An adapter without its numbers.

    Args:
        adapter: its tensors are views of the header's storage, on the meta device.
        header: of the weights.
        dead: module → a bias that PEFT wrote and never reads, which the adapter leaves out; zero, or it is refused.
    """

    adapter: Adapter
    header: Header
    dead: Mapping[str, Tensor]

    def filled(self, memory: Tensor, where: str) -> Adapter:
        """The adapter itself, its numbers in ``memory``: (header.nbytes,) uint8.

        Raises:
            UnsupportedAdapter: a dead bias is not zero.
        """
        there = over(memory)
        for name, bias in self.dead.items():
            if torch.count_nonzero(there(bias)):
                raise UnsupportedAdapter(
                    f"{where}: {name}: lora_B.bias is not zero, but PEFT never applies it to an nn.MultiheadAttention"
                )
        return self.adapter.with_tensors(lambda tensor: there(tensor).contiguous())


@dataclass(frozen=True)
class _Texts:
    """What an outline is made of, compared by that, and how errors name the two files."""

    config: bytes
    head: bytes
    nbytes: int
    config_named: str = field(compare=False)
    weights_named: str = field(compare=False)


@lru_cache(KEPT_OUTLINES)
def _outline(texts: _Texts) -> Outline:
    config = parse_config(texts.config, texts.config_named)
    header = parse_header(texts.head, texts.nbytes, texts.weights_named)
    reader = _Reader(config, texts.weights_named, header)
    return Outline(reader.adapter(), header, reader.dead)


class _Reader:
    """One weights file, read under one config: keys into groups, groups into modules."""

    def __init__(self, config: PeftConfig, where: str, header: Header) -> None:
        self.config, self.where, self.tensors = config, where, header.tensors
        self.recorded = _recorded(header.metadata, where)
        self.dead: dict[str, Tensor] = {}
        self.either: set[str] = (
            set()
        )  # modules that may be raw parameters, which only a base can tell

    def adapter(self) -> Adapter:
        groups: dict[str, dict[int, _Parts]] = {}  # module → wrappers deep → part → factor
        paths: dict[str, set[str]] = {}
        whole: dict[str, Tensor] = {}
        for key in sorted(self.tensors):
            path, part = self.split(key)
            if part:
                module, depth = peft_keys.plain(path)
                groups.setdefault(module, {}).setdefault(depth, {})[part] = self.tensors[key]
                paths.setdefault(module, set()).add(path)
            elif not (self.config.velora and key.endswith(".lora_velora_embed")):
                whole[path] = self.tensors[key]
        if not groups:
            raise FormatError(
                f"{self.where}: no lora_A and lora_B of any module",
                "the file holds no LoRA factors",
            )
        parameters = {module: self.parameters(module, depths) for module, depths in groups.items()}
        wrappers = {module: len(depths) for module, depths in groups.items()}
        for module in paths:
            self.check_paths(module, paths[module], wrappers)
        modules: dict[str, LowRank] = {}
        for module, depths in groups.items():
            owner = next(
                (a for a in peft_keys.ancestors(module) if a in groups and not parameters[a]),
                module,
            )
            if owner != module:
                self.check_attention(owner, module, depths[0])
            if not parameters[module]:
                modules[module] = self.module(module, depths[0], rank_of=owner)
                continue
            for (
                depth,
                parts,
            ) in depths.items():  # the outermost wrapper holds the parameter registered last
                name = f"{module}.{parameters[module][-1 - depth]}"
                if name in groups:
                    raise FormatError(
                        f"{self.where}: {name}: has factors both as a module and as a raw parameter"
                    )
                modules[name] = self.parameter(name, parts)
        for owner in {
            a for m in groups for a in peft_keys.ancestors(m) if a in groups and not parameters[a]
        }:
            modules[owner] = self.without_dead_bias(owner, modules[owner])
        nested = {m: names for m, names in parameters.items() if len(names) > 1 or m in self.either}
        return Adapter(
            modules,
            base=self.config.base,
            config=self.config.kept,
            unchanged=self.whole(whole, wrappers),
            nesting=nested,
            assumed=frozenset(module for module in nested if module not in self.recorded),
        )

    def split(self, key: str) -> tuple[str, str | None]:
        """A key → (path, part), refusing what is no key of a LoRA file."""
        for name, reason in LEFTOVERS.items():
            if name in key:
                raise UnsupportedAdapter(f"{self.where}: {key}: {reason}")
        if not key.startswith(peft_keys.PREFIX):
            raise FormatError(
                f"{self.where}: unexpected key {key[:200]!r}, expected {peft_keys.PREFIX}<module>.lora_A.weight",
                "kohya and diffusers name their keys otherwise; save the adapter with PEFT",
            )
        path, part = peft_keys.split(key.removeprefix(peft_keys.PREFIX))
        if part is None and ".lora_" in path and not key.endswith(".lora_velora_embed"):
            raise FormatError(
                f"{self.where}: unexpected key {key[:200]!r}, expected it to end in one of {' '.join(peft_keys.PARTS)}",
                "the adapter's own name is no part of a key: save it with PEFT's save_pretrained",
            )
        if "" in path.split(".") or not peft_keys.plain(path)[0]:
            raise FormatError(f"{self.where}: {key[:200]!r} names no module")
        return path, part

    def parameters(self, module: str, depths: Mapping[int, _Parts]) -> tuple[str, ...]:
        """The raw parameters that the wrappers of ``module`` hold, as registered; none where it is a module."""
        names = self.recorded.get(module) or self.config.parameters(module)
        if not names or (len(depths) == 1 and self.is_module(module, names, *depths.values())):
            if set(depths) != {0}:
                raise FormatError(
                    f"{self.where}: {module}: {len(depths)} nested factors, but target_parameters names none of its "
                    "parameters"
                )
            return ()
        if set(depths) != set(range(len(names))):
            raise FormatError(
                f"{self.where}: {module}: factors of {len(depths)} parameters, expected {len(names)}: "
                f"{', '.join(names)}",
                "name each trained parameter as module.parameter in target_parameters",
            )
        kinds = {
            (self.config.rank(f"{module}.{name}"), self.config.scale(f"{module}.{name}"))
            for name in names
        }
        if len(kinds) > 1 and module not in self.recorded:
            if set(names) <= set(FUSED):
                self.recorded[module] = (
                    names  # the factors can't change places any more, so it is taken as certain
                )
                return names
            raise FormatError(
                f"{self.where}: {module}: {' and '.join(names)} differ in r or lora_alpha, and the file does not say "
                "whose factors are whose",
                f"put the order in which the module registers them into the metadata of {WEIGHTS}: {NESTING!r} = "
                + repr(json.dumps({module: names})),
            )
        return names

    def is_module(self, module: str, names: tuple[str, ...], parts: _Parts) -> bool:
        """Whether factors are the module's own, where ``target_parameters`` names a parameter of it.

        Where a Linear and its raw weight have the same keys, ``target_modules`` says which was trained. Where that
        can't be read without the base, the parameter is assumed: the adapter is bound to whichever the base has.
        """
        if module in self.recorded:
            return False
        A = parts.get("lora_A")
        if A is None or A.ndim != 2:
            return True  # an embedding or a convolution: a parameter has a matrix, lora_A
        if A.shape[0] != self.config.rank(module) and len(names) == 1:
            return False  # the experts of a parameter, one below the other
        targeted = self.config.targets(module)
        if targeted is None:
            if len(names) > 1:
                return True  # several parameters would have several pairs
            self.either.add(module)
        return bool(targeted)

    def check_paths(self, module: str, paths: set[str], wrappers: Mapping[str, int]) -> None:
        expected = peft_keys.key_path(module, wrappers)
        for path in paths:
            if path != expected + ".base_layer" * peft_keys.plain(path)[1]:
                raise FormatError(
                    f"{self.where}: unexpected key {peft_keys.PREFIX}{path}.…, expected {peft_keys.PREFIX}{expected}.…"
                )

    def check_attention(self, owner: str, module: str, parts: _Parts) -> None:
        if module != f"{owner}.out_proj" or "lora_A" not in parts:
            raise FormatError(
                f"{self.where}: {module} lies in {owner}, which has factors of its own",
                "only the out_proj of an nn.MultiheadAttention may",
            )

    def pair(self, name: str, parts: _Parts) -> tuple[Tensor, Tensor]:
        """A and B, where they are all there is beside a bias."""
        kind = (
            "lora_embedding" if any(part.startswith("lora_embedding") for part in parts) else "lora"
        )
        first, second = f"{kind}_A", f"{kind}_B"
        present = set(parts) - (
            {"lora_B.bias"} if self.config.lora_bias and first == "lora_A" else set()
        )
        missing, extra = {first, second} - present, present - {first, second}
        if missing:
            raise FormatError(
                f"{self.where}: {name}: {' and '.join(sorted(missing))} missing, found {sorted(parts)}"
            )
        if extra:
            hint = "; adapter_config.json has lora_bias = false" if extra == {"lora_B.bias"} else ""
            raise FormatError(
                f"{self.where}: {name}: unexpected {' and '.join(sorted(extra))}{hint}"
            )
        return parts[first], parts[second]

    def module(self, name: str, parts: _Parts, *, rank_of: str) -> LowRank:
        """A Linear, Conv1D, Embedding or convolution."""
        A, B = self.pair(name, parts)
        r = self.config.rank(rank_of)
        embedding = "lora_embedding_A" in parts
        if A.ndim not in ((2,) if embedding else (2, 3, 4, 5)) or A.shape[0] != r:
            raise self.misshapen(
                name, "A", A, f"({r}, in)" if A.ndim == 2 else f"({r}, in, *kernel)", r
            )
        scale = self.config.scale(rank_of)
        if A.ndim == 2:
            if B.ndim != 2 or B.shape[1] != r:
                raise self.misshapen(name, "B", B, f"(out, {r})", r)
            bias = self.bias(name, parts, B.shape[0]) if not embedding else None
            return LowRank(A, B, scale, bias, EMBEDDING if embedding else Layout("linear"))
        groups = r // B.shape[1] if B.ndim == A.ndim and B.shape[1] else 0
        if (
            not groups
            or groups * B.shape[1] != r
            or B.shape[0] % groups
            or math.prod(B.shape[2:]) != 1
        ):
            raise self.misshapen(name, "B", B, f"(out, {r} / groups{', 1' * (A.ndim - 2)})", r)
        bias = self.bias(name, parts, B.shape[0])
        layout = Layout("conv", tuple(A.shape[2:]))
        A, B = A.flatten(1), B.flatten(1)  # (r, in·kernel) (out, r/G)
        if groups > 1:
            A = A.reshape(groups, -1, A.shape[1])  # (G, r/G, in·kernel)
            B = B.reshape(groups, -1, B.shape[1])  # (G, out/G, r/G)
        return LowRank(A, B, scale, bias, layout)

    def parameter(self, name: str, parts: _Parts) -> LowRank:
        """A raw parameter, (in, out) or with experts before."""
        A, B = self.pair(name, parts)
        r = self.config.rank(name)
        if "lora_B.bias" in parts or "lora_A" not in parts:
            raise FormatError(
                f"{self.where}: {name}: a raw parameter has lora_A and lora_B only, found {sorted(parts)}"
            )
        if A.ndim != 2 or A.shape[0] % r:
            raise self.misshapen(name, "A", A, f"(experts · {r}, in)", r)
        if B.ndim != 2 or B.shape[1] != A.shape[0]:
            raise self.misshapen(name, "B", B, f"(out, {A.shape[0]})", r)
        A = A.reshape(-1, r, A.shape[1])  # (E, r, in)
        B = B.reshape(B.shape[0], r, -1).permute(2, 0, 1)  # (E, out, r)
        return LowRank(A, B, self.config.scale(name), None, PARAMETER)

    def bias(self, name: str, parts: _Parts, out: int) -> Tensor | None:
        if not self.config.lora_bias:
            return None
        bias = parts.get("lora_B.bias")
        if bias is None:
            raise FormatError(
                f"{self.where}: {name}: lora_B.bias missing; adapter_config.json has lora_bias = true"
            )
        if bias.shape != (out,):
            raise FormatError(
                f"{self.where}: {name}: lora_B.bias is {tuple(bias.shape)}, expected ({out},)"
            )
        return bias

    def without_dead_bias(self, name: str, value: LowRank) -> LowRank:
        """The in-projection of an nn.MultiheadAttention, whose lora_bias PEFT writes and never reads."""
        if value.layout.kind != "linear" or value.A.ndim != 2:
            raise FormatError(
                f"{self.where}: {name}: expected the in-projection of an nn.MultiheadAttention"
            )
        if value.bias is not None:
            self.dead[name] = value.bias
        return LowRank(value.A, value.B, value.scale, None, value.layout)

    def misshapen(self, name: str, half: str, t: Tensor, expected: str, r: int) -> FormatError:
        return FormatError(
            f"{self.where}: {name}: lora_{half} is {tuple(t.shape)}, expected {expected}",
            f"{self.config.where} gives it r = {r}",
        )

    def whole(
        self, tensors: Mapping[str, Tensor], wrappers: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Tensors of the base that came along, by the plain names of its parameters."""
        found: dict[str, Tensor] = {}
        for path, tensor in tensors.items():
            name, depth = peft_keys.plain(path)
            module, _, kind = name.rpartition(".")
            known = depth == 0 and path in (peft_keys.key_path(name, wrappers), name)
            key = peft_keys.PREFIX + path
            if name in found:
                raise FormatError(
                    f"{self.where}: unexpected key {key[:200]!r}: a second value of {name}"
                )
            if kind == "bias":
                allowed = (
                    self.config.bias != "none" or f"{path.removesuffix('.bias')}.weight" in tensors
                )
            else:
                allowed = kind == "weight" and (
                    module in wrappers or module.rpartition(".")[2] in WHOLE
                )
            if known and allowed:
                found[name] = tensor
            elif kind == "weight":
                raise UnsupportedAdapter(
                    f"{self.where}: {key[:200]!r} is a whole weight: {VARIANTS['modules_to_save']}"
                )
            else:
                hint = "; adapter_config.json has bias = 'none'" if kind == "bias" else ""
                raise FormatError(f"{self.where}: unexpected key {key[:200]!r}{hint}")
        return found


def _recorded(metadata: Mapping[str, str], where: str) -> dict[str, tuple[str, ...]]:
    if NESTING not in metadata:
        return {}
    recorded = strict_json.loads(metadata[NESTING].encode("utf-8"), f"{where}: metadata {NESTING}")
    for module, names in recorded.items():
        if not (
            isinstance(names, list)
            and names
            and all(isinstance(name, str) and name for name in names)
        ):
            raise FormatError(
                f"{where}: metadata {NESTING}: {module}: expected a list of names, got {str(names)[:80]}"
            )
        if len(set(names)) != len(names):
            raise FormatError(
                f"{where}: metadata {NESTING}: {module}: a name occurs twice in {names}"
            )
    return {module: tuple(names) for module, names in recorded.items()}
