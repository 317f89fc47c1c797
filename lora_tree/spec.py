"""The contents of a tree.yaml, as pydantic models; ``folder/yamlfile.py`` reads the YAML itself.

    version: 1
    base: org/model
    defaults: {r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj]}
    cache: {host_budget: 8GiB}
    tree:
      fr:
        weight: 0.9
        children:
          legal: {adapter: ../elsewhere/legal, weight: 0.8}

The words of `LoraSpec` are PEFT's, with PEFT's meaning and PEFT's defaults.

Law: every model refuses unknown keys and values of another type. If a misspelled key were ignored,
something else would be trained than the author wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from .budget import parse_bytes, why_no_size
from .errors import NewerFormat, SpecError
from .node_names import NAME
from .patterns import check_pattern
from .spec_errors import describe_invalid
from .weights import why_no_patterns

__all__ = [
    "FORMAT",
    "CacheSpec",
    "FormatVersion",
    "HistorySpec",
    "LoraSpec",
    "NodeSpec",
    "StrictModel",
    "TreeDefaults",
    "TreeSpec",
    "at_depth",
    "check_format",
    "lora_spec",
    "tree_defaults",
]

FORMAT = 1
"""The newest format of tree.yaml, tree.lock and the commit record that is read here."""

T = TypeVar("T")
SpecT = TypeVar("SpecT", bound="LoraSpec")


def _compiles(pattern: str, inside: str = "{}") -> str:
    """Return a pattern if it is a regular expression, alone and inside another one.

    Args:
        inside: the pattern into which PEFT puts it, with ``{}`` for its place.

    Raises:
        ValueError: it is no regular expression, or can't be matched in bounded time.
    """
    # Both ways, because they fail apart: (?i)q_proj compiles alone, but flags can't stand in the
    # middle of the expression into which PEFT puts it.
    try:
        check_pattern(pattern)
        re.compile(inside.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        # a{99999999999} is an OverflowError, a thousand nested groups are a RecursionError
        raise ValueError(f"is not a regular expression: {error}") from error
    except ValueError as error:
        raise ValueError(f"can't be matched in bounded time: {error}") from error
    return pattern


def _end_of_name(pattern: str) -> str:
    return _compiles(pattern, r"(.*\.)?({})$")


def _layers_pattern(pattern: str) -> str:
    return _compiles(pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")


def _size(value: int | str) -> int | str:
    why = why_no_size(value)
    if why is not None:
        raise ValueError(f"is not a size: {why}")
    return value


def _weight(numbers: dict[str, float]) -> dict[str, float]:
    why = why_no_patterns(numbers)  # the numbers themselves are finite: see `Number`
    if why is not None:
        raise ValueError(f"is not a weight: {why}")
    return numbers


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # True equals 1 in Python, so the literal 1 would accept it
        raise ValueError("should be the number 1")
    return value


# pydantic's strict mode takes no "8" for 8; the bounds below refuse what would fail only later.
Name = Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=1, le=65536)]  # a typo like 160000000 would allocate gigabytes
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pattern = Annotated[str, AfterValidator(_end_of_name)]
Row = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int | str, AfterValidator(_size)]
FormatVersion = Annotated[Literal[1], BeforeValidator(_no_bool)]
Versions = Annotated[int, Field(ge=0, le=1000)]  # each is an entry of a file that is read whole

VERSIONS = 5
VERSIONS_BUDGET = "16GiB"


class StrictModel(BaseModel):
    """A value from a file: an unknown key or a value of another type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LoraSpec(StrictModel):
    """The recipe of an adapter that is made when the tree is attached, in LoraConfig's words."""

    r: Rank | None = Field(default=None, description="rank; 8 where nothing says otherwise")
    lora_alpha: Alpha | None = Field(
        default=None,
        description="scale = lora_alpha / r, or / sqrt(r) with use_rslora; "
        "8 where nothing says otherwise",
    )
    use_rslora: bool | None = Field(
        default=None, description="scale by lora_alpha / sqrt(r) (arXiv 2312.03732)"
    )
    lora_bias: bool | None = Field(default=None, description="a trained bias on B")
    target_modules: list[str] | str | None = Field(
        default=None, description="suffixes of module names, or one regex, or 'all-linear'"
    )
    exclude_modules: list[str] | str | None = Field(
        default=None, description="suffixes, or one regex, to leave out"
    )
    layers_to_transform: list[int] | int | None = Field(
        default=None, description="layer indices to adapt"
    )
    layers_pattern: list[str] | str | None = Field(
        default=None, description="name of the module list that holds the layers"
    )
    target_parameters: list[str] | None = Field(
        default=None, description="suffixes of raw parameters (fused experts)"
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="ends of the names of modules that train whole, as heads do"
    )
    trainable_token_indices: list[Row] | dict[str, list[Row]] | None = Field(
        default=None,
        description="rows of the input embedding that train; or such rows by the embedding's name",
    )
    rank_pattern: dict[Pattern, Rank] | None = Field(
        default=None, description="regex on the end of a module name → its r"
    )
    alpha_pattern: dict[Pattern, Alpha] | None = Field(
        default=None, description="regex on the end of a module name → its alpha"
    )
    init_lora_weights: Literal["kaiming", "gaussian"] | None = Field(
        default=None,
        description="how A is drawn (B is zero): Kaiming uniform, or normal with deviation 1/r",
    )

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _regex(cls, value: Any) -> Any:
        return _compiles(value) if isinstance(value, str) else value

    @field_validator("layers_pattern")
    @classmethod
    def _regexes(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _layers_pattern(value)
        # One by one, so that the error tells which pattern of the list is meant.
        for pattern in value or ():
            try:
                _layers_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"holds {pattern!r}, which {error}") from error
        return value

    def over(self, other: LoraSpec) -> LoraSpec:
        """Return this spec, with the fields that it leaves open taken from ``other``."""
        fields: dict[str, Any] = {}
        # LoraSpec's own fields: a NodeSpec has more, and they are no part of how it is made.
        for name in LoraSpec.model_fields:
            own = getattr(self, name)
            fields[name] = getattr(other, name) if own is None else own
        return LoraSpec(**fields)

    @property
    def has_targets(self) -> bool:
        """True if it names modules to adapt or to replace."""
        factors = self.target_modules or self.target_parameters
        return bool(factors or self.modules_to_save or self.trainable_token_indices)


class TreeDefaults(LoraSpec):
    """Defaults for the nodes of a tree that do not say otherwise.

    >>> defaults = TreeDefaults(rank_by_depth=[48, 8, 2])
    >>> paths = ("all", "all/fr", "all/fr/legal", "all/fr/legal/x")
    >>> [defaults.complete(LoraSpec(), path).r for path in paths]
    [48, 8, 2, 2]
    """

    rank_by_depth: Annotated[list[Rank], Field(min_length=1)] | None = Field(
        default=None,
        description="rank at depth 0, 1, …, the last one below that too; "
        "lora_alpha is then twice the rank",
    )
    decay_by_depth: Annotated[list[Decay], Field(min_length=1)] | None = Field(
        default=None,
        description="weight decay of AdamW at depth 0, 1, …, likewise, where nodes are trained",
    )

    @model_validator(mode="after")
    def _one_rank(self) -> TreeDefaults:
        # One lora_alpha over different ranks would give each depth another scale.
        if self.rank_by_depth and not (self.r is None and self.lora_alpha is None):
            raise ValueError(
                "sets r or lora_alpha beside rank_by_depth; set those at single nodes, or leave "
                "them out"
            )
        return self

    def complete(self, fresh: LoraSpec, path: str) -> LoraSpec:
        """Return the spec of a fresh node at ``path``, completed by these defaults."""
        made = fresh.over(self)
        if self.rank_by_depth is None:
            return made
        rank = made.r or at_depth(self.rank_by_depth, path)
        alpha = made.lora_alpha or 2.0 * rank
        # model_copy checks nothing, and need not: both numbers come from fields that were checked.
        return made.model_copy(update={"r": rank, "lora_alpha": alpha})


def at_depth(values: Sequence[T], path: str) -> T:
    """Return the value for a node's depth: the first at the top, the last also further down.

    >>> at_depth([0, 1, 3], "fr/legal")
    1
    """
    return values[min(path.count("/"), len(values) - 1)]


class NodeSpec(LoraSpec):
    """One node: its weight, its adapter's folder or how a fresh one is made, and its children."""

    adapter: str | None = Field(
        default=None,
        description="folder of a PEFT adapter, relative to tree.yaml; "
        "null: a node without an adapter of its own",
    )
    weight: Number | Annotated[dict[str, Number], AfterValidator(_weight)] = Field(
        default=1.0,
        description="factor on this node's increments, on every path through it: a number, or "
        "patterns on the names of modules, each with its number; the first that matches counts, "
        "and 'default' is for the rest",
    )
    children: dict[Name, NodeSpec] = Field(
        default_factory=dict, description="the nodes below, by name"
    )


class CacheSpec(StrictModel):
    """The bytes that the adapters of an attached tree may take; see ``budget.py``."""

    host_budget: Size | None = Field(
        default=None, description="bytes in RAM: a number, or 512MiB, 8GiB, 8GB"
    )
    device_budget: Size | None = Field(
        default=None, description="bytes on the device that the base is on, likewise"
    )


class HistorySpec(StrictModel):
    """The bounds on the earlier contents that are kept of nodes; fields of tree.yaml itself.

    >>> HistorySpec().most, HistorySpec(versions=0).most
    (5, 0)
    """

    versions: Versions | None = Field(
        default=None,
        description=f"earlier contents that are kept of a node; {VERSIONS} if absent, 0 for none",
    )
    versions_budget: Size | None = Field(
        default=None,
        description="bytes that all of them may take: a number, or 8GiB; "
        f"{VERSIONS_BUDGET} if absent",
    )

    @property
    def most(self) -> int:
        """The number of earlier contents that are kept of a node."""
        return VERSIONS if self.versions is None else self.versions

    @property
    def budget_bytes(self) -> int:
        """The bytes that all earlier contents of a tree may take."""
        return parse_bytes(self.versions_budget or VERSIONS_BUDGET)


class TreeSpec(HistorySpec):
    """A whole tree.yaml."""

    # Without a default: a file that does not say its format can't be told from a newer one.
    version: FormatVersion = Field(description="version of this format")
    base: str | None = Field(
        default=None, description="the base model: a hub id, or a folder relative to tree.yaml"
    )
    defaults: TreeDefaults = Field(
        default_factory=TreeDefaults, description="for fresh adapters that do not say otherwise"
    )
    cache: CacheSpec = Field(
        default_factory=CacheSpec, description="budgets, where the caller does not give others"
    )
    tree: dict[Name, NodeSpec] = Field(
        default_factory=dict, description="the nodes below the root, by name"
    )

    @property
    def history(self) -> HistorySpec:
        """The fields that are about the history."""
        return HistorySpec(versions=self.versions, versions_budget=self.versions_budget)


def check_format(data: object, where: str, reads: int = FORMAT) -> None:
    """Refuse a file of this library in a format that only a later version writes.

    Call it before any other check of the file: everything else that looks wrong in it is most
    likely right in the newer format, and advice to repair or to remove it would destroy data.

    Args:
        data: the file's content; only its ``version`` is looked at.
        where: the file, with line and column where it has them.
        reads: the latest version that is known here.

    Raises:
        NewerFormat: the version is a number larger than that.
    """
    version = data.get("version") if isinstance(data, Mapping) else None
    # YAML's `true` is an int in Python, but it is no version.
    if isinstance(version, int) and not isinstance(version, bool) and version > reads:
        raise NewerFormat(
            f"{where}: written by a newer lora_tree (format {str(version)[:20]}); this one reads "
            f"{reads}",
            "upgrade: pip install --upgrade lora_tree",
        )


def lora_spec(source: LoraSpec | dict[str, Any] | None, where: str) -> LoraSpec:
    """Return the `LoraSpec` that a caller wrote in Python.

    Raises:
        SpecError: an unknown word, or a value of the wrong kind; with the nearest known word.
    """
    return _written(LoraSpec, source, where)


def tree_defaults(source: LoraSpec | dict[str, Any] | None) -> TreeDefaults:
    """Return the `TreeDefaults` that a caller wrote in Python; raises like `lora_spec`."""
    # A tree asks its defaults to complete a node's spec, which a plain LoraSpec can't.
    if isinstance(source, LoraSpec) and not isinstance(source, TreeDefaults):
        source = source.model_dump(exclude_none=True)
    return _written(TreeDefaults, source, "defaults")


def _written(kind: type[SpecT], source: Any, where: str) -> SpecT:
    if isinstance(source, kind):
        return source
    given = {} if source is None else source
    if not isinstance(given, Mapping):
        raise SpecError(
            f"{where}: expected a mapping like dict(r=16, lora_alpha=32), got {given!r:.80}",
            "the words are those of PEFT's LoraConfig",
        )
    data = dict(given)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise SpecError(
            *(f"{where}: {text}" for _, text in describe_invalid(error, data, kind))
        ) from error
