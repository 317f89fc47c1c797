"""Parse the adapter_config.json of a PEFT adapter: scales, targets, and the kinds that are refused.

    scale = lora_alpha / r      or, with use_rslora,      lora_alpha / sqrt(r)

``rank_pattern`` and ``alpha_pattern`` replace r and lora_alpha where ``(.*\\.)?(key)$`` matches the
module's name. The first key in the file's order wins, as in ``get_pattern_key`` of
``peft.utils.other`` (0.21). A raw parameter goes by ``module.parameter``.

The patterns are untrusted, and Python's ``re`` can take exponential time. So all patterns of one
file share one budget of matching work: see `patterns`.

Law: a config passes only if its increments are B·A·scale, apart from modules that are saved whole
and trained token rows (`peft_overrides`).
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
from .peft_overrides import SavedWhole

T = TypeVar("T")

__all__ = [
    "DERIVED",
    "EXTRACT",
    "FUSED",
    "TRAINING",
    "TURNED",
    "VARIANTS",
    "PeftConfig",
    "is_orientation_known",
    "mutates_base",
    "parse_config",
]

VARIANTS = {
    "use_dora": "DoRA rescales the whole weight, which is no sum of W and B·A",
    "alora_invocation_tokens": "aLoRA acts on the tokens after its invocation only",
    "use_qalora": "QALoRA pools the input before A, so B·A is no increment of the weight",
    "use_bdlora": "BD-LoRA stores one factor as its blocks, not as a matrix",
    "arrow_config": "Arrow routes between adapters by the input, which is no fixed increment",
    "kasa_config": "KaSA truncates the base's own weights and adds a diagonal between the factors",
    "monteclora_config": "MonteCLoRA draws new factors in every forward",
    "layer_replication": "it repeats layers of the base, which is another model",
    "megatron_config": "Megatron's parallel layers hold shards of the factors",
}
"""Fields of PEFT's LoraConfig (0.21) that make neither W + B·A nor a replacement, with the
reasons.
"""

MUTATING = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
"""The beginning of ``init_lora_weights`` → the method, for those that change the base's weights."""

EXTRACT = (
    "what PEFT merged (merge_and_unload, save_pretrained) comes in as a difference: "
    "lora-tree extract BASE MERGED --max-error 0.05"
)
"""The advice for adapters that do not add up to W + B·A."""

KINDS = ("LORA", "TRAINABLE_TOKENS")
"""The values of ``peft_type`` that are read here; the second has trained token rows, no factors."""

KNOWN_USES = {"use_rslora", "use_dora", "use_qalora", "use_bdlora"}
"""The ``use_…`` fields that are known here. If another one is set, it is a newer kind of LoRA."""

FUSED = ("gate_proj", "gate_up_proj", "up_proj", "down_proj")
"""Parameters of fused experts, in the order in which all of transformers 5 registers them."""

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
"""Fields that are derived from the values of an adapter; `Adapter.config` does not keep them."""

TRAINING = {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"}
"""Fields that matter only for initialisation and training; they are not written."""

TURNED = (0, 19, 1)
"""The first version of PEFT in which A has the in of a parameter (experts, out, in), and B the out.

Earlier versions took the second axis of every 3-D parameter for in, so A and B were swapped.
"""


@dataclass(frozen=True)
class PeftConfig:
    """A checked adapter_config.json.

    Args:
        where: the file, as errors name it.
        base: the base that it names; None if it names none.
        saved: the modules that are saved whole, and the trained token rows.
        velora: the factors were trained with VeLoRA, whose buffers may be in the same file.
        kept: the fields that do not change the value, for `Adapter.config`.
        work: the budget that all its patterns share.
    """

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
    saved: SavedWhole
    velora: bool
    kept: Mapping[str, Any]
    work: MatchingBudget = field(compare=False)

    def rank(self, name: str) -> int:
        """Return r of the module ``name``, or of the raw parameter ``module.parameter``."""
        return self.rank_pattern.first(name, self.r)

    def scale(self, name: str) -> float:
        """Return the scale of ``name``, by PEFT's own operations, so that the bits are equal."""
        alpha = self.alpha_pattern.first(name, self.lora_alpha)
        r = self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def targets(self, module: str) -> bool | None:
        """Return whether ``target_modules`` names the module; None if only a base can tell.

        The keys of the file already say what was trained, so the field matters only if a key is
        ambiguous. A pattern that can't be matched in bounded time is therefore no reason to refuse
        the file.
        """
        if not isinstance(self.target_modules, str):  # a list of suffixes, as PEFT writes it
            return _ends(module, self.target_modules)
        if self.target_modules.lower() == "all-linear":
            return None
        try:
            pattern = NamePattern(self.target_modules, self.work)
        except (re.error, ValueError, OverflowError, RecursionError):
            return None
        return pattern.matches(module)

    def parameters(self, module: str) -> tuple[str, ...]:
        """Return the parameters of ``module`` that ``target_parameters`` names.

        They are in the order of `FUSED` if it has them all, else in the order of the config. That
        order is unreliable: for some models PEFT writes the field from a set.
        """
        exact: list[str] = []
        by_suffix: list[str] = []
        for target in self.target_parameters:
            owner, _, parameter = target.rpartition(".")
            if owner == module:
                exact.append(parameter)
            elif _ends(f"{module}.{parameter}", (target,)):
                by_suffix.append(parameter)
        # a dict removes duplicates and keeps the order, which a set would not
        names = dict.fromkeys(exact or by_suffix)
        if names.keys() <= set(FUSED):
            return tuple(sorted(names, key=FUSED.index))
        return tuple(names)


def parse_config(data: bytes, where: str) -> PeftConfig:
    """Read and check an adapter_config.json; ``where`` names the file in errors.

    Raises:
        FormatError: it is broken; names the field, what was found and what was expected.
        UnsupportedAdapter: an adapter of a kind that does not add up to W + B·A.
    """
    fields = strict_json.loads(data, where)
    _refuse(fields, where)
    check = _ConfigChecks(fields, where)
    return PeftConfig(
        where=where,
        r=check.rank(fields.get("r", 8), "r"),
        lora_alpha=check.number(fields.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=check.flag("use_rslora"),
        lora_bias=check.flag("lora_bias"),
        bias=check.bias(),
        rank_pattern=check.patterns("rank_pattern", check.rank),
        alpha_pattern=check.patterns("alpha_pattern", check.number),
        target_modules=check.targets("target_modules"),
        target_parameters=check.names("target_parameters"),
        base=check.text("base_model_name_or_path"),
        saved=SavedWhole.of(fields, where),
        velora=bool(fields.get("velora_config")),
        kept={key: value for key, value in fields.items() if key not in DERIVED},
        work=check.work,
    )


def is_orientation_known(config: Mapping[str, Any]) -> bool:
    """Return whether ``peft_version`` proves that fused factors are oriented as since `TURNED`.

    Older versions of PEFT did not write the field.
    """
    version = re.match(r"\d{1,9}(?:\.\d{1,9})*", str(config.get("peft_version") or ""))
    return version is not None and tuple(map(int, version[0].split("."))) >= TURNED


def mutates_base(init: Any) -> str | None:
    """Return the method's name if this ``init_lora_weights`` changes the base before training."""
    if not isinstance(init, str):
        return None
    # LoftQ and PiSSA add parameters to the name: pissa_niter_16
    return next((name for start, name in MUTATING.items() if init.lower().startswith(start)), None)


def _refuse(fields: Mapping[str, Any], where: str) -> None:
    # Refuse other methods before any number is parsed: in their configs a field of the same name
    # may have another type.
    kind = fields.get("peft_type")
    if kind is None:
        raise FormatError(
            f"{where}: no peft_type; is this the adapter_config.json of a PEFT adapter?",
            "expected the file that PEFT's save_pretrained writes",
        )
    if kind not in KINDS:
        raise UnsupportedAdapter(
            f"{where}: peft_type is {str(kind)[:40]!r}, expected 'LORA', 'LOHA', 'LOKR', "
            "'ADALORA', 'VERA' or 'VBLORA'",
            "other methods do not add up to W + B·A: train it with LoRA, or convert it in PEFT",
            EXTRACT,
        )
    for name, reason in VARIANTS.items():
        if fields.get(name):
            raise UnsupportedAdapter(
                f"{where}: {name} = {str(fields[name])[:80]}: {reason}",
                f"train the adapter without {name}, or merge it into a base of its own with PEFT",
                EXTRACT,
            )
    # New kinds of LoRA get a field use_… in PEFT; a PEFT that is too old silently drops it.
    for name, value in fields.items():
        if name.startswith("use_") and name not in KNOWN_USES and value:
            raise UnsupportedAdapter(
                f"{where}: {name} = {str(value)[:80]} is a kind of LoRA that is not known here",
                f"expected none of the use_ fields but {', '.join(sorted(KNOWN_USES))}: upgrade "
                "lora_tree, or train it without",
            )
    method = mutates_base(fields.get("init_lora_weights"))
    if method:
        raise UnsupportedAdapter(
            f"{where}: init_lora_weights = {fields['init_lora_weights'][:40]!r}: {method} changed "
            "the base's own weights, and these factors are increments of the changed ones",
            "convert it in PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
            EXTRACT,
        )


class _ConfigChecks:
    """Checked access to the fields of one config.

    Types are compared exactly, because Python's bool is an int.
    """

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where
        self.work = MatchingBudget(where, FormatError)

    def mismatch(self, name: str, got: Any, expected: str) -> FormatError:
        return FormatError(f"{self.where}: {name}: got {str(got)[:80]!r}, expected {expected}")

    def rank(self, value: Any, name: str) -> int:
        # the bound is larger than any matrix; beyond it torch can't even represent a shape
        if type(value) is not int or not 0 < value < 2**31:
            raise self.mismatch(name, value, "a positive integer")
        return value

    def number(self, value: Any, name: str) -> int | float:
        # The negated comparison refuses NaN too. JSON's integers are unbounded, and the bound keeps
        # alpha / r a finite float.
        if type(value) not in (int, float) or not abs(value) < 2**1000:
            raise self.mismatch(name, value, "a number")
        return value  # type: ignore[no-any-return]

    def flag(self, name: str) -> bool:
        value = self.fields.get(name, False)
        if type(value) is not bool:
            raise self.mismatch(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self.mismatch(name, value, "a string or null")
        return value or None  # PEFT writes "" where it knows no base

    def bias(self) -> str:
        value = self.fields.get("bias", "none")
        if value not in ("none", "all", "lora_only"):
            raise self.mismatch("bias", value, "'none', 'all' or 'lora_only'")
        return str(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.mismatch(name, value, "a list of names or null")
        return tuple(value)

    def targets(self, name: str) -> tuple[str, ...] | str:
        value = self.fields.get(name)
        return value if isinstance(value, str) else self.names(name)

    def patterns(self, name: str, check: Callable[[Any, str], T]) -> ByPattern[T]:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.mismatch(name, value, "an object or null")
        entries = []
        for key, given in (value or {}).items():
            self.check_pattern(key, name)
            entries.append((key, check(given, f"{name}[{key!r}]")))
        return ByPattern(entries, self.work)

    def check_pattern(self, pattern: str, name: str) -> None:
        try:
            NamePattern(pattern, self.work)
            # PEFT puts the key into this pattern, which makes some keys invalid: (?i)q_proj, for
            # example, because flags must be at the start.
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise FormatError(
                f"{self.where}: {name}: {pattern[:80]!r} is no regular expression: {error}",
                "expected the end of a module's name, or a pattern for it: write . as \\.",
            ) from error
        except (ValueError, OverflowError, RecursionError) as error:
            raise FormatError(
                f"{self.where}: {name}: {pattern[:80]!r}: {error}",
                r"write it with names, ., \., [0-9], \d, (a|b), *, +, ? and {2,3}: "
                "these are matched in bounded time",
            ) from error


def _ends(name: str, with_one_of: Iterable[str]) -> bool:
    """Return whether a name equals one of these or ends in one after a dot: PEFT's rule."""
    return any(name == end or name.endswith(f".{end}") for end in with_one_of)
