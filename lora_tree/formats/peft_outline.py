"""The outline of an adapter: everything that its config and its weights' header say, no numbers.

    keys ──▶ wrappers: module → depth → tensors ──▶ increments: name → LowRank
         └─▶ whole tensors of the base: replaced, or carried along        (peft_sorting.py)

Most adapters of a tree have the same config and header, and so the same outline. It is cached, and
for each further adapter only the numbers are read (`Outline.filled`).

PEFT puts one wrapper around a module, or one for each trained raw parameter of it (see
`peft_keys`). So the depth of a wrapper says which parameter it holds: the outermost holds the one
that the module registers last. PEFT's file does not record the order of registration. If our own
metadata do not record it either, an order is assumed, `Adapter.assumed` names the module, and the
order is corrected when the adapter is bound to a base.

Law: everything in the file and its config ends up in the outline or in an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError, UnsupportedAdapter, plural
from ..lowrank import LowRank
from ..overlay import over
from . import peft_keys, strict_json
from .peft_config import FUSED, PeftConfig, parse_config
from .peft_factors import FactorReader, Parts
from .peft_keys import NESTING, WEIGHTS
from .peft_named import peft_header
from .peft_sorting import Wrappers, sort_keys
from .safetensors import Header

__all__ = ["Outline", "PeftTexts", "outline_of"]

KEPT_OUTLINES = 8
MAX_KEPT_BYTES = 256 << 10
"""The largest config and header whose outline is cached; the outline takes ten times as much."""


@dataclass(frozen=True)
class Outline:
    """An adapter without its numbers.

    Args:
        adapter: its tensors are views of the header's storage, on the meta device.
        header: of the weights.
        unused_biases: module → a bias that PEFT writes but never applies. It must be zero, because
            the adapter leaves it out.
        repeated: name of a tensor → its two values, if the file has it under two keys. They must be
            equal.
    """

    adapter: Adapter
    header: Header
    unused_biases: Mapping[str, Tensor]
    repeated: Mapping[str, tuple[Tensor, Tensor]]

    def filled(self, memory: Tensor, where: str) -> Adapter:
        """Return the adapter itself, with its numbers in ``memory``: (header.nbytes,) uint8.

        Raises:
            UnsupportedAdapter: an unused bias is not zero.
            FormatError: the two values of a tensor differ.
        """
        in_memory = over(memory)
        for name, bias in self.unused_biases.items():
            if torch.count_nonzero(in_memory(bias)):
                raise UnsupportedAdapter(
                    f"{where}: {name}: lora_B.bias is not zero, but PEFT never applies it to an "
                    "nn.MultiheadAttention",
                    "train it without lora_bias, or set this bias to zero",
                )
        for name, (first, second) in self.repeated.items():
            if not torch.equal(in_memory(first), in_memory(second)):
                raise FormatError(
                    f"{where}: {name}: the file has it by two keys, with two values",
                    "save the adapter again with PEFT, which writes the same numbers to both",
                )
        # In the outline, a raw parameter's B is a permuted view. Make it contiguous once, here, and
        # not in every product.
        return self.adapter.with_tensors(lambda tensor: in_memory(tensor).contiguous())


@dataclass(frozen=True)
class PeftTexts:
    """The config and the header that make an outline, and the names of their files for errors.

    Names are not compared: two folders with the same texts share a cached outline.
    """

    config: bytes
    head: bytes
    nbytes: int
    config_named: str = field(compare=False)
    weights_named: str = field(compare=False)


def outline_of(texts: PeftTexts) -> Outline:
    """Return the outline of an adapter, from a cache of the last few texts.

    Raises:
        FormatError: one of the two is broken, or they do not fit each other; names the file and the
            key.
        UnsupportedAdapter: the adapter does not add up to W + B·A.
    """
    # lru_cache does not cache exceptions, so every error names its own folder.
    if len(texts.config) + len(texts.head) <= MAX_KEPT_BYTES:
        return _cached_outline(texts)
    return _make_outline(texts)


@lru_cache(KEPT_OUTLINES)
def _cached_outline(texts: PeftTexts) -> Outline:
    return _make_outline(texts)


def _make_outline(texts: PeftTexts) -> Outline:
    config = parse_config(texts.config, texts.config_named)
    header = peft_header(texts.head, texts.nbytes, texts.weights_named)
    return _OutlineMaker(config, texts.weights_named, header).outline()


@dataclass(frozen=True)
class _Registered:
    """The raw parameters of one module that its wrappers hold.

    Args:
        names: in the order in which the module registers them; empty if the wrapper holds the
            module's own factors.
        is_assumed: the file does not prove it; only a base can.
    """

    names: tuple[str, ...] = ()
    is_assumed: bool = False


class _OutlineMaker:
    """The work from one config and one header to an outline; `outline` is called once."""

    def __init__(self, config: PeftConfig, where: str, header: Header) -> None:
        self._config = config
        self._where = where
        self._header = header
        self._factors = FactorReader(config, where)
        self._recorded = _recorded_nesting(header.metadata, where)
        self._keys = sort_keys(header, config, where)
        self._registered: dict[str, _Registered] = {}

    def outline(self) -> Outline:
        for module, wrappers in self._keys.modules.items():
            self._registered[module] = self._raw_parameters(module, wrappers)
        self._keys.check_paths()
        increments: dict[str, LowRank] = {}
        attentions: set[str] = set()
        for module, wrappers in self._keys.modules.items():
            owner = self._module_around(module)
            if owner is not None:
                self._check_attention(owner, module, wrappers[0])
                attentions.add(owner)
            self._add_increments(increments, module, wrappers, rank_of=owner or module)
        unused_biases: dict[str, Tensor] = {}
        for owner in sorted(attentions):
            bias = self._in_projection_bias(owner, increments[owner])
            if bias is not None:
                unused_biases[owner] = bias
                increments[owner] = replace(increments[owner], bias=None)
        adapter = self._adapter(increments, self._keys.carried())
        return Outline(adapter, self._header, unused_biases, self._keys.repeated)

    # ------------------------------------------------------------------ modules and raw parameters
    def _raw_parameters(self, module: str, wrappers: Wrappers) -> _Registered:
        """Decide whether the wrappers of ``module`` hold its own factors or raw parameters'."""
        recorded = self._recorded.get(module)
        names = recorded or self._config.parameters(module)
        is_own: bool | None = not names
        if names and len(wrappers) == 1 and not recorded:
            is_own = self._is_its_own(module, names, next(iter(wrappers.values())))
        if is_own:
            if set(wrappers) != {0}:
                raise FormatError(
                    f"{self._where}: {module}: {plural(len(wrappers), 'nested factor')}, but "
                    "target_parameters names none of its parameters",
                    "name each trained parameter as module.parameter in target_parameters",
                )
            return _Registered()
        if set(wrappers) != set(range(len(names))):
            raise FormatError(
                f"{self._where}: {module}: factors of {plural(len(wrappers), 'parameter')}, "
                f"expected {len(names)}: {', '.join(names)}",
                "name each trained parameter as module.parameter in target_parameters",
            )
        if recorded:
            return _Registered(names)
        if not self._differ(module, names):
            return _Registered(names, is_assumed=is_own is None or len(names) > 1)
        # The parameters differ in r or alpha, so a wrong order would give wrong scales, which a
        # base could not correct afterwards. The order is known only for transformers' fused
        # experts.
        if set(names) <= set(FUSED):
            return _Registered(names)
        raise FormatError(
            f"{self._where}: {module}: {' and '.join(names)} differ in r or lora_alpha, and the "
            "file does not say whose factors are whose",
            f"put the order in which the module registers them into the metadata of {WEIGHTS}: "
            f"{NESTING!r} = " + repr(json.dumps({module: names})),
        )

    def _differ(self, module: str, parameters: tuple[str, ...]) -> bool:
        """Return whether the config gives these parameters different ranks or scales."""
        kinds = set()
        for parameter in parameters:
            name = f"{module}.{parameter}"
            kinds.add((self._config.rank(name), self._config.scale(name)))
        return len(kinds) > 1

    def _is_its_own(self, module: str, names: tuple[str, ...], parts: Parts) -> bool | None:
        """Return whether a pair is the module's own, not that of a raw parameter of it.

        A Linear and its raw weight have the same keys, so ``target_modules`` decides. Return None
        if only a base can tell: then the raw parameter is assumed until the adapter is bound.
        """
        A = parts.get("lora_A")
        if A is None or A.ndim != 2:
            return True  # an embedding or a convolution; a raw parameter has a matrix called lora_A
        if A.shape[0] != self._config.rank(module) and len(names) == 1:
            return False  # the stacked factors of several experts
        targeted = self._config.targets(module)
        if targeted is None and len(names) > 1:
            return True  # several parameters would have several pairs
        return targeted

    def _module_around(self, module: str) -> str | None:
        """Return the nearest module around this one that has its own factors."""
        for above in peft_keys.ancestors(module):
            if above in self._keys.modules and not self._registered[above].names:
                return above
        return None

    def _check_attention(self, owner: str, module: str, parts: Parts) -> None:
        """Check that a module inside another one is the out_proj of an nn.MultiheadAttention.

        PEFT (0.21) wraps that out_proj as a part of the attention, with the attention's r and
        alpha. No other wrapped module contains a wrapped module.
        """
        if module != f"{owner}.out_proj" or "lora_A" not in parts:
            raise FormatError(
                f"{self._where}: {module} lies in {owner}, which has factors of its own",
                "only the out_proj of an nn.MultiheadAttention may",
            )

    def _in_projection_bias(self, name: str, value: LowRank) -> Tensor | None:
        """Return the lora_bias of an in-projection, which PEFT (0.21) writes but never applies."""
        if value.layout.kind != "linear" or value.A.ndim != 2:
            raise FormatError(
                f"{self._where}: {name}: A is {tuple(value.A.shape)} ({value.layout.kind}), "
                "expected the in-projection of an nn.MultiheadAttention, since its out_proj has "
                "factors too",
                "save the adapter again with PEFT",
            )
        return value.bias

    # ------------------------------------------------------------------ putting it together
    def _add_increments(
        self, into: dict[str, LowRank], module: str, wrappers: Wrappers, *, rank_of: str
    ) -> None:
        names = self._registered[module].names
        if not names:
            into[module] = self._factors.module(module, wrappers[0], rank_of=rank_of)
            return
        for depth, parts in wrappers.items():
            # PEFT wraps the parameters in the order of registration, so the outermost wrapper holds
            # the last of them.
            name = f"{module}.{names[-1 - depth]}"
            if name in self._keys.modules:
                raise FormatError(
                    f"{self._where}: {name}: has factors both as a module and as a raw parameter",
                    "remove it from target_modules or from target_parameters, and save the adapter "
                    "again with PEFT",
                )
            into[name] = self._factors.parameter(name, parts)

    def _adapter(self, modules: Mapping[str, LowRank], unchanged: Mapping[str, Tensor]) -> Adapter:
        nesting: dict[str, tuple[str, ...]] = {}
        assumed: set[str] = set()
        for module, registered in self._registered.items():
            if registered.is_assumed or len(registered.names) > 1:
                nesting[module] = registered.names
            if registered.is_assumed:
                assumed.add(module)
        return Adapter(
            modules,
            base=self._config.base,
            config=self._config.kept,
            unchanged=unchanged,
            nesting=nesting,
            assumed=frozenset(assumed),
            overrides=self._keys.overrides,
        )


def _recorded_nesting(metadata: Mapping[str, str], where: str) -> dict[str, tuple[str, ...]]:
    """Return module → its raw parameters in order, as our own metadata record it."""
    if NESTING not in metadata:
        return {}
    where = f"{where}: metadata {NESTING}"
    recorded = strict_json.loads(metadata[NESTING].encode("utf-8"), where)
    nesting: dict[str, tuple[str, ...]] = {}
    for module, names in recorded.items():
        is_list = isinstance(names, list) and len(names) > 0
        if not is_list or not all(isinstance(name, str) and name for name in names):
            raise FormatError(
                f"{where}: {module}: expected a list of names, got {str(names)[:80]}",
                "lora_tree writes this entry: save the adapter with it again",
            )
        if len(set(names)) != len(names):
            raise FormatError(
                f"{where}: {module}: a name occurs twice in {names}, expected each once",
                "lora_tree writes this entry: save the adapter with it again",
            )
        nesting[module] = tuple(names)
    return nesting
