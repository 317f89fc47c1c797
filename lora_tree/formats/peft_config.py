"""adapter_config.json of a PEFT adapter: its scales and targets, and the kinds that we refuse.

    scale = lora_alpha / r      or, with use_rslora,      lora_alpha / sqrt(r)

``rank_pattern`` and ``alpha_pattern`` replace r and lora_alpha where ``(.*\\.)?(key)$`` matches the
module's name. The first key in the file's order wins, as in ``get_pattern_key`` of
``peft.utils.other`` (0.21). A raw parameter goes by ``module.parameter``.

The patterns come from strangers, and Python's ``re`` can take forever. So all patterns of one file
are matched out of one budget of work: see `patterns`.

Law: only configs whose increment is B·A·scale pass, beside modules that are saved whole and trained
token rows (`peft_overrides`).
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
    "mutates_base",
    "parse_config",
    "says_which_way",
]

VARIANTS = {
    "use_dora": "DoRA rescales the whole weight, which is no sum of W and B·A",
    "alora_invocation_tokens": "aLoRA acts on the tokens after its invocation only",
    "use_qalora": "QALoRA pools the input before A, so B·A is no increment of the weight",
    "use_bdlora": "BD-LoRA stores one factor as its blocks, not as a matrix",
    "arrow_config": "Arrow routes between adapters by the input, which is no fixed increment",
    "kasa_config": "KaSA truncates the base's own weights and adds a diagonal between the factors",
    "monteclora_config": "MonteCLoRA samples its factors anew in every forward",
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
"""How ``init_lora_weights`` begins for methods that change the base's weights → the method."""

EXTRACT = (
    "what PEFT merged (merge_and_unload, save_pretrained) comes in as a difference: "
    "lora-tree extract BASE MERGED --max-error 0.05"
)
"""The way in for what is no sum of W and B·A."""

KINDS = ("LORA", "TRAINABLE_TOKENS")
"""The ``peft_type`` that is read here; the second one has trained token rows and no factors."""

KNOWN_USES = {"use_rslora", "use_dora", "use_qalora", "use_bdlora"}
"""The ``use_…`` fields that we know. Another one that is set is a kind of LoRA newer than this."""

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
"""Fields that follow from the values of an adapter; `Adapter.config` does not keep them."""

TRAINING = {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"}
"""Fields that only the start or the course of a training needs; they are not written."""

TURNED = (0, 19, 1)
"""The first PEFT in which a parameter (experts, out, in) has A for its in and B for its out.

Before, PEFT took the second axis of every 3-D parameter for in, so the two were the other way
round.
"""


@dataclass(frozen=True)
class PeftConfig:
    """A checked adapter_config.json.

    Args:
        where: the file, as errors name it.
        base: the base that it names; None where it names none.
        saved: the modules that are saved whole, and the trained token rows.
        velora: the factors were trained with VeLoRA, whose buffers may lie beside them.
        kept: the fields that do not change the value, for `Adapter.config`.
        work: the budget out of which all its patterns are matched.
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
        """Return the scale of ``name``, by the very operations of PEFT, so that the bits agree."""
        alpha = self.alpha_pattern.first(name, self.lora_alpha)
        r = self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def targets(self, module: str) -> bool | None:
        """Return whether ``target_modules`` names the module; None where only a base can tell.

        PEFT writes it for its own sake: the keys of the file say what was trained. So it counts
        only where the keys can be read in two ways, and a pattern that can't be matched in bounded
        time is no reason to refuse a file.
        """
        if not isinstance(self.target_modules, str):  # a list of suffixes, as PEFT writes it
            return _ends(module, self.target_modules)
        if self.target_modules.lower() == "all-linear":
            return None
        try:
            pattern = NamePattern(self.target_modules, self.work)
        except (re.error, ValueError, OverflowError, RecursionError):
            return None
        return pattern.whole(module)

    def parameters(self, module: str) -> tuple[str, ...]:
        """Return the parameters of ``module`` that ``target_parameters`` names.

        They come in the order of `FUSED` where it has them all, else in that of the config. The
        latter says little: for some models PEFT writes it from a set.
        """
        exact: list[str] = []
        by_suffix: list[str] = []
        for target in self.target_parameters:
            owner, _, parameter = target.rpartition(".")
            if owner == module:
                exact.append(parameter)
            elif _ends(f"{module}.{parameter}", (target,)):
                by_suffix.append(parameter)
        # a dict drops what occurs twice and keeps the order, which a set would not
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


def says_which_way(config: Mapping[str, Any]) -> bool:
    """Return whether a fused parameter's factors are known to lie as in PEFT since `TURNED`.

    Its ``peft_version`` says so; older PEFT wrote none.
    """
    said = re.match(r"\d{1,9}(?:\.\d{1,9})*", str(config.get("peft_version") or ""))
    return said is not None and tuple(map(int, said[0].split("."))) >= TURNED


def mutates_base(init: Any) -> str | None:
    """Return the method's name if this ``init_lora_weights`` changes the base before training."""
    if not isinstance(init, str):
        return None
    # LoftQ and PiSSA add parameters to the name: pissa_niter_16
    return next((name for start, name in MUTATING.items() if init.lower().startswith(start)), None)


def _refuse(fields: Mapping[str, Any], where: str) -> None:
    # Every reason to refuse is looked for before any number: a config of another method may have
    # other types in fields of the same name.
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
    # PEFT calls a new kind of LoRA use_…, and a PEFT that is too old for it drops the field.
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
    """The fields of one config, each checked when it is read.

    Python's bool is an int and PEFT's JSON is read as it is, so types are compared exactly.
    """

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where
        self.work = MatchingBudget(where, FormatError)

    def wrong(self, name: str, got: Any, expected: str) -> FormatError:
        return FormatError(f"{self.where}: {name}: got {str(got)[:80]!r}, expected {expected}")

    def rank(self, value: Any, name: str) -> int:
        # larger than any matrix; torch could not even say the shape
        if type(value) is not int or not 0 < value < 2**31:
            raise self.wrong(name, value, "a positive integer")
        return value

    def number(self, value: Any, name: str) -> int | float:
        # Written so that it refuses NaN too. JSON's integers have no end, and the bound keeps
        # alpha / r a finite float.
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
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a string or null")
        return value or None  # PEFT writes "" where it knows no base

    def bias(self) -> str:
        value = self.fields.get("bias", "none")
        if value not in ("none", "all", "lora_only"):
            raise self.wrong("bias", value, "'none', 'all' or 'lora_only'")
        return str(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, value, "a list of names or null")
        return tuple(value)

    def targets(self, name: str) -> tuple[str, ...] | str:
        value = self.fields.get(name)
        return value if isinstance(value, str) else self.names(name)

    def patterns(self, name: str, check: Callable[[Any, str], T]) -> ByPattern[T]:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, value, "an object or null")
        entries = []
        for key, given in (value or {}).items():
            self.understood(key, name)
            entries.append((key, check(given, f"{name}[{key!r}]")))
        return ByPattern(entries, self.work)

    def understood(self, pattern: str, name: str) -> None:
        try:
            NamePattern(pattern, self.work)
            # PEFT puts the key into this pattern, where some keys are no regular expression any
            # more, (?i)q_proj for one: flags can't stand in the middle.
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
    """Return whether a name is one of these or ends in one after a dot, which is PEFT's rule."""
    return any(name == end or name.endswith(f".{end}") for end in with_one_of)
