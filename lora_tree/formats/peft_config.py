"""adapter_config.json of a PEFT adapter: what it says about scales and targets, and what we must refuse.

    scale = lora_alpha / r      or, with use_rslora,      lora_alpha / sqrt(r)

``rank_pattern`` and ``alpha_pattern`` replace r and lora_alpha where ``(.*\\.)?(key)$`` matches the module's name, the
first key in the file's order winning (``peft.utils.other.get_pattern_key``); a raw parameter goes by
``module.parameter``. Patterns are somebody else's, and all those of one file are matched out of one budget of work: see
`patterns`. Only configs whose increment is B·A·scale and nothing else pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import FormatError, UnsupportedAdapter
from ..patterns import ByPattern, MatchingBudget, NamePattern
from . import strict_json

T = TypeVar("T")

__all__ = ["DERIVED", "FUSED", "TRAINING", "VARIANTS", "PeftConfig", "mutates_base", "parse_config"]

VARIANTS = {
    "use_dora": "DoRA rescales the whole weight, which is no sum of W and B·A",
    "modules_to_save": "its modules replace the base's, they do not add to them",
    "trainable_token_indices": "trained tokens replace rows of the embedding, they do not add to them",
    "alora_invocation_tokens": "aLoRA acts on the tokens after its invocation only, not on every input",
    "use_qalora": "QALoRA pools the input before A, so B·A is no increment of the weight",
    "use_bdlora": "BD-LoRA stores one factor as its blocks, not as a matrix",
    "arrow_config": "Arrow routes between adapters by the input, which is no fixed increment",
    "kasa_config": "KaSA truncates the base's own weights and adds a diagonal between the factors",
    "monteclora_config": "MonteCLoRA samples its factors anew in every forward",
    "layer_replication": "it repeats layers of the base, which is another model",
    "megatron_config": "Megatron's parallel layers hold shards of the factors",
}
MUTATING = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
KNOWN_USES = {"use_rslora", "use_dora", "use_qalora", "use_bdlora"}
FUSED = (
    "gate_proj",
    "gate_up_proj",
    "up_proj",
    "down_proj",
)  # as every fused experts of transformers registers them

# what the values of an adapter say themselves; not kept in Adapter.config
DERIVED = {
    "alpha_pattern",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_bias",
    "peft_type",
    "r",
    "rank_pattern",
    "runtime_config",
    "target_parameters",
}
# what only the start or the course of a training needs; not written
TRAINING = {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"}

TURNED = (0, 19, 1)
"""Since this PEFT, a parameter (experts, out, in) has its A for in and B for out. Before it was the other way round."""


@dataclass(frozen=True)
class PeftConfig:
    """A checked adapter_config.json; ``kept`` are the fields that do not change the value."""

    where: str
    r: int
    lora_alpha: int | float
    use_rslora: bool
    lora_bias: bool
    bias: str
    rank_pattern: ByPattern[int]
    alpha_pattern: ByPattern[int | float]
    target_modules: tuple[str, ...] | str
    target_parameters: tuple[str, ...]
    base: str | None
    velora: bool
    kept: Mapping[str, Any]
    work: MatchingBudget = field(compare=False)

    def rank(self, name: str) -> int:
        """r of the module ``name``, or of the raw parameter ``module.parameter``."""
        return self.rank_pattern.first(name, self.r)

    def scale(self, name: str) -> float:
        """The scale of ``name``, computed as PEFT does."""
        alpha, r = self.alpha_pattern.first(name, self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def targets(self, module: str) -> bool | None:
        """Whether ``target_modules`` names the module; None where only a base can tell.

        PEFT writes it for its own sake: the keys of the file say what was trained. So it is looked at only where the
        keys can be read in two ways, and a pattern that can't be matched in bounded time is no reason to refuse a file.
        """
        if not isinstance(self.target_modules, str):
            return _ends(module, self.target_modules)
        if self.target_modules.lower() == "all-linear":
            return None
        try:
            pattern = NamePattern(self.target_modules, self.work)
        except (re.error, ValueError, OverflowError, RecursionError):
            return None
        return pattern.whole(module)

    def parameters(self, module: str) -> tuple[str, ...]:
        """The parameters of ``module`` that ``target_parameters`` names, in the order of `FUSED` or else its own.

        That order says little: PEFT writes it from a set for some models.
        """
        exact, short = [], []
        for target in self.target_parameters:
            owner, _, parameter = target.rpartition(".")
            if owner == module:
                exact.append(parameter)
            elif _ends(f"{module}.{parameter}", [target]):
                short.append(parameter)
        names = dict.fromkeys(exact or short)
        return tuple(sorted(names, key=FUSED.index) if names.keys() <= set(FUSED) else names)


def parse_config(data: bytes, where: str) -> PeftConfig:
    """Read and check an adapter_config.json; ``where`` names the file in errors.

    Raises:
        FormatError: it is broken; names the field, what was found and what was expected.
        UnsupportedAdapter: an adapter of a kind that does not add up to W + B·A.
    """
    fields = strict_json.loads(data, where)
    _refuse(fields, where)
    check = _Checks(fields, where)
    targets = check.targets("target_modules")
    config = PeftConfig(
        where=where,
        r=check.rank(fields.get("r", 8), "r"),
        lora_alpha=check.number(fields.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=check.flag("use_rslora"),
        lora_bias=check.flag("lora_bias"),
        bias=check.bias(),
        rank_pattern=check.patterns("rank_pattern", check.rank),
        alpha_pattern=check.patterns("alpha_pattern", check.number),
        target_modules=targets,
        target_parameters=check.names("target_parameters"),
        base=check.text("base_model_name_or_path"),
        velora=bool(fields.get("velora_config")),
        kept={key: value for key, value in fields.items() if key not in DERIVED},
        work=check.work,
    )
    return config


def says_which_way(config: Mapping[str, Any]) -> bool:
    """Whether a config's ``peft_version`` says that a fused parameter's factors lie as in PEFT since `TURNED`."""
    said = re.match(r"\d{1,9}(?:\.\d{1,9})*", str(config.get("peft_version") or ""))
    return said is not None and tuple(map(int, said[0].split("."))) >= TURNED


def mutates_base(init: Any) -> str | None:
    """The name of the method, where this ``init_lora_weights`` changed the base's weights before the training."""
    if not isinstance(init, str):
        return None
    return next((name for start, name in MUTATING.items() if init.lower().startswith(start)), None)


def _refuse(fields: Mapping[str, Any], where: str) -> None:
    kind = fields.get("peft_type")
    if kind is None:
        raise FormatError(
            f"{where}: no peft_type; is this the adapter_config.json of a PEFT adapter?"
        )
    if kind != "LORA":
        raise UnsupportedAdapter(f"{where}: peft_type is {str(kind)[:40]!r}, expected 'LORA'")
    for name, reason in VARIANTS.items():
        if fields.get(name):
            raise UnsupportedAdapter(f"{where}: {name} = {str(fields[name])[:80]}: {reason}")
    for name, value in fields.items():
        if name.startswith("use_") and name not in KNOWN_USES and value:
            raise UnsupportedAdapter(
                f"{where}: {name} = {str(value)[:80]} is a kind of LoRA that is not known here"
            )
    method = mutates_base(fields.get("init_lora_weights"))
    if method:
        raise UnsupportedAdapter(
            f"{where}: init_lora_weights = {fields['init_lora_weights'][:40]!r}: {method} changed the base's own "
            "weights, and these factors are increments of the changed ones",
            "convert it in PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )


class _Checks:
    """Fields of one config, each with the error that says what it should have been."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where
        self.work = MatchingBudget(where, FormatError)

    def wrong(self, name: str, got: Any, expected: str) -> FormatError:
        return FormatError(f"{self.where}: {name}: got {str(got)[:80]!r}, expected {expected}")

    def rank(self, value: Any, name: str) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            raise self.wrong(name, value, "a positive integer")
        return value

    def number(self, value: Any, name: str) -> int | float:
        if type(value) not in (int, float) or not abs(value) < 2**1000:
            raise self.wrong(name, value, "a number")
        return value  # type: ignore[no-any-return]

    def flag(self, name: str) -> bool:
        value = self.fields.get(name, False)
        if type(value) is not bool:
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if not (value is None or isinstance(value, str)):
            raise self.wrong(name, value, "a string or null")
        return value or None

    def bias(self) -> str:
        value = self.fields.get("bias", "none")
        if value not in ("none", "all", "lora_only"):
            raise self.wrong("bias", value, "'none', 'all' or 'lora_only'")
        return str(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name)
        if value is None:
            return ()
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.wrong(name, value, "a list of names or null")
        return tuple(value)

    def targets(self, name: str) -> tuple[str, ...] | str:
        value = self.fields.get(name)
        return value if isinstance(value, str) else self.names(name)

    def patterns(self, name: str, check: Callable[[Any, str], T]) -> ByPattern[T]:
        value = self.fields.get(name)
        if not (value is None or isinstance(value, dict)):
            raise self.wrong(name, value, "an object or null")
        entries = []
        for key, given in (value or {}).items():
            self.understood(key, name)
            entries.append((key, check(given, f"{name}[{key!r}]")))
        return ByPattern(entries, self.work)

    def understood(self, pattern: str, name: str) -> None:
        try:
            NamePattern(pattern, self.work)
            re.compile(rf"(.*\.)?({pattern})$")  # as PEFT puts it: flags can't stand in the middle
        except re.error as error:
            raise FormatError(
                f"{self.where}: {name}: {pattern[:80]!r} is no regular expression: {error}"
            ) from error
        except (ValueError, OverflowError, RecursionError) as error:
            raise FormatError(
                f"{self.where}: {name}: {pattern[:80]!r}: {error}",
                r"write it with names, ., \., [0-9], \d, (a|b), *, +, ? and {2,3}: these are matched in bounded time",
            ) from error


def _ends(name: str, with_one_of: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in with_one_of)
