"""What a tree.yaml may say, as pydantic models; the YAML itself is read in ``folder/yamlfile.py``.

    version: 1
    base: org/model
    defaults: {r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj]}
    cache: {host_budget: 8GiB}
    tree:
      fr:
        weight: 0.9
        children:
          legal: {adapter: ../elsewhere/legal, weight: 0.8}

Every model refuses unknown keys. The words of `LoraSpec` are PEFT's, with PEFT's meaning and PEFT's
defaults.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from .budget import parse_bytes
from .errors import NewerFormat, PathError, SpecError
from .patterns import check_pattern

__all__ = [
    "FORMAT",
    "CacheSpec",
    "LoraSpec",
    "NodeSpec",
    "StrictModel",
    "TreeDefaults",
    "TreeSpec",
    "at_depth",
    "check_format",
    "check_name",
    "check_path",
]

FORMAT = 1  # of tree.yaml, of tree.lock and of the commit record: the newest that is read here

NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}"
_NAME = re.compile(rf"{NAME}\Z")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?\Z", re.IGNORECASE)
_OF_A_NODE = frozenset(("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"))
_OF_A_TREE = (".yaml", ".yml", ".lock")
MAX_DEPTH = 64
_MOST_HINTS = 50  # a spelling is compared with every word there is, which takes its time
_WORDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "targets": "target_modules",
    "modules": "target_modules",
    "path": "adapter",
}

T = TypeVar("T")
SpecT = TypeVar("SpecT", bound="LoraSpec")

Loc: TypeAlias = tuple[str | int, ...]
"""The way to a place in nested data: keys and indices."""


def _compiles(pattern: str, inside: str = "{}") -> str:
    """The pattern itself, where it is a regular expression, alone and where it will stand.

    Raises:
        ValueError: it is none, or it can't be matched in bounded time; says what.
    """
    try:
        check_pattern(pattern)
        re.compile(inside.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:  # a{99999999999} is an OverflowError
        raise ValueError(f"is not a regular expression: {error}") from error
    except ValueError as error:
        raise ValueError(f"can't be matched in bounded time: {error}") from error
    return pattern


def _end_of_name(pattern: str) -> str:
    return _compiles(pattern, r"(.*\.)?({})$")


def _size(value: int | str) -> int | str:
    try:
        parse_bytes(value)
    except SpecError as error:
        said = error.what.partition(": ")[2]
        raise ValueError(f"is no size: {said or error.todo[0]}") from error
    return value


Name = Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]
Weight = Annotated[float, Field(allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=1, le=65536)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pattern = Annotated[str, AfterValidator(_end_of_name)]
Size = Annotated[int | str, AfterValidator(_size)]


class StrictModel(BaseModel):
    """A value from a file: an unknown key or a value of another type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LoraSpec(StrictModel):
    """How a fresh adapter is made when the tree is attached; the words are those of PEFT's LoraConfig."""

    r: Rank | None = Field(default=None, description="rank; 8 where nothing says otherwise")
    lora_alpha: Alpha | None = Field(
        default=None,
        description="scale = lora_alpha / r, or / sqrt(r) with use_rslora; 8 where nothing says otherwise",
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
        for pattern in [value] if isinstance(value, str) else value or ():
            try:
                _compiles(pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
            except ValueError as error:
                raise (
                    error
                    if isinstance(value, str)
                    else ValueError(f"holds {pattern!r}, which {error}")
                ) from error
        return value

    def over(self, other: LoraSpec) -> LoraSpec:
        """This spec, with what it leaves open taken from ``other``."""
        mine = {name: getattr(self, name) for name in LoraSpec.model_fields}
        theirs = {name: getattr(other, name) for name in LoraSpec.model_fields}
        return LoraSpec(
            **{name: theirs[name] if mine[name] is None else mine[name] for name in mine}
        )

    @property
    def has_targets(self) -> bool:
        return bool(self.target_modules or self.target_parameters)


class TreeDefaults(LoraSpec):
    """What holds for the nodes of a tree that do not say otherwise.

    >>> defaults = TreeDefaults(rank_by_depth=[48, 8, 2])
    >>> [defaults.complete(LoraSpec(), path).r for path in ("all", "all/fr", "all/fr/legal", "all/fr/legal/x")]
    [48, 8, 2, 2]
    """

    rank_by_depth: Annotated[list[Rank], Field(min_length=1)] | None = Field(
        default=None,
        description="rank at depth 0, 1, …, the last one below that too; lora_alpha is then twice the rank",
    )
    decay_by_depth: Annotated[list[Decay], Field(min_length=1)] | None = Field(
        default=None,
        description="weight decay of AdamW at depth 0, 1, …, likewise, where nodes are trained",
    )

    @model_validator(mode="after")
    def _one_rank(self) -> TreeDefaults:
        # One lora_alpha over different ranks would give each depth another scale.
        if self.rank_by_depth and not (self.r is None and self.lora_alpha is None):
            raise ValueError("says rank_by_depth, so r and lora_alpha belong to single nodes")
        return self

    def complete(self, fresh: LoraSpec, path: str) -> LoraSpec:
        """Return the spec of a fresh node at ``path``, with what it leaves open as these say."""
        made = fresh.over(self)
        if self.rank_by_depth is None:
            return made
        rank = made.r or at_depth(self.rank_by_depth, path)
        alpha = made.lora_alpha or 2.0 * rank
        return made.model_copy(update={"r": rank, "lora_alpha": alpha})


def at_depth(values: Sequence[T], path: str) -> T:
    """Return the value that holds at a node's depth: the first for nodes at the top, the last one also below it.

    >>> at_depth([0, 1, 3], "fr/legal")
    1
    """
    return values[min(path.count("/"), len(values) - 1)]


class NodeSpec(LoraSpec):
    """One node: its weight, where its adapter lives, or how a fresh one is made, and its children."""

    adapter: str | None = Field(
        default=None,
        description="folder of a PEFT adapter, relative to tree.yaml; null: a node without an adapter of its own",
    )
    weight: Weight = Field(
        default=1.0, description="factor on this node's increments, on every path through it"
    )
    children: dict[Name, NodeSpec] = Field(
        default_factory=dict, description="the nodes below, by name"
    )


class CacheSpec(StrictModel):
    """How many bytes of adapters an attached tree may hold; see ``budget.py``."""

    host_budget: Size | None = Field(
        default=None, description="bytes in RAM: a number, or 512MiB, 8GiB, 8GB"
    )
    device_budget: Size | None = Field(
        default=None, description="bytes on the device that the base is on, likewise"
    )


class TreeSpec(StrictModel):
    """A whole tree.yaml."""

    version: Literal[1] = Field(description="version of this format")
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


def check_name(name: str) -> str:
    """A node's own name: a file name that is safe on every system, and that no file of an adapter has.

    Raises:
        PathError: it is not.
    """
    if (
        not isinstance(name, str)
        or not _NAME.match(name)
        or name.endswith(".")
        or _RESERVED.match(name)
    ):
        raise PathError(
            f"{name!r} is not a valid node name",
            "letters, digits, '-', '_' and '.', not first or last a dot, at most 128, and no "
            "device name like 'con'",
        )
    if name.lower() in _OF_A_NODE:
        raise PathError(
            f"{name!r} is not a valid node name: it is that of an adapter's file in the folder of "
            "the node above",
            "choose another name",
        )
    return name


def check_path(path: str) -> tuple[str, ...]:
    """The names on a path, ``"fr/legal"`` → ``("fr", "legal")``; the root ``""`` is ``()``.

    Raises:
        PathError: a name is not valid, or the path is too deep.
    """
    if not isinstance(path, str):
        raise PathError(f"a path is a string like 'fr/legal', got {path!r}")
    names = tuple(path.split("/")) if path else ()
    if len(names) > MAX_DEPTH:
        raise PathError(f"{path[:60]}…: {len(names)} levels deep, the most is {MAX_DEPTH}")
    for name in names:
        try:
            check_name(name)
        except PathError as error:
            raise error if len(names) == 1 else error.within(repr(path)) from error
    if names and names[0].lower().endswith(_OF_A_TREE):
        raise PathError(
            f"{names[0]!r} is not a valid name for a node at the top: "
            f"a tree's own files lie there, which end in {', '.join(_OF_A_TREE)}",
            "choose another name",
        )
    return names


def check_format(data: object, where: str, reads: int = FORMAT) -> None:
    """Refuse a file of ours in a format that a later version of this library writes.

    It is asked before anything else about the file: what else looks wrong in it is right there,
    most likely, and advice to repair or to remove it would destroy what the newer version knows.

    Args:
        data: the file's content, as far as it is known; its ``version`` is what counts.
        where: the file, with line and column where it has them.
        reads: the latest version that is known here.

    Raises:
        NewerFormat: the version is a number larger than that.
    """
    version = data.get("version") if isinstance(data, Mapping) else None
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
    if isinstance(source, LoraSpec) and not isinstance(source, TreeDefaults):
        source = source.model_dump(exclude_none=True)
    return _written(TreeDefaults, source, "defaults")


def _written(kind: type[SpecT], source: Any, where: str) -> SpecT:
    if isinstance(source, kind):
        return source
    given = {} if source is None else source
    if not isinstance(given, Mapping):
        raise SpecError(
            f"{where}: expected a mapping like dict(r=16, lora_alpha=32), got {given!r:.80}"
        )
    data = dict(given)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise SpecError(*(f"{where}: {text}" for _, text in explain(error, data, kind))) from error


def explain(error: ValidationError, data: Any, top: type[BaseModel]) -> list[tuple[Loc, str]]:
    """What pydantic found, in this library's words: (the way to the value or key, the message), one for each place."""
    found: dict[tuple[Loc, str], list[str]] = {}
    hints = 0
    for e in error.errors(include_url=False, include_context=False):
        loc, value = _within(e["loc"], data)
        match e["type"], e["loc"][-1:]:
            case "extra_forbidden", _:
                head, text = f"unknown key {loc[-1]!r}{_place(loc[:-1])}", ""
                hints += 1
                if hints <= _MOST_HINTS:
                    text = _nearest(str(loc[-1]), loc, top)
            case "missing", last:
                head, text = f"{last[0]!r} is missing{_place(loc)}", ""
            case _, ("[key]",) if loc[-2] not in ("tree", "children"):
                head, text = f"{_name(loc[:-1])}: the key {str(loc[-1])!r} {_plain(e['msg'])}", ""
            case _, ("[key]",):
                head = f"{str(loc[-1])!r} is not a valid node name"
                text = ": letters, digits, '-', '_' and '.', at most 128, no leading dot"
            case kind, _:
                hint = (
                    "; write {} where there is nothing to say"
                    if value is None and kind == "model_type"
                    else ""
                )
                text = (
                    "should be a mapping"
                    if kind in ("model_type", "dict_type")
                    else _plain(e["msg"])
                )
                head, text = f"{_name(loc)}: got {_short(value)}, which ", text + hint
        texts = found.setdefault((loc, head), [])  # the members of a union share a place and a head
        if text not in texts:
            texts.append(text)
    return [(loc, head + " or ".join(texts)) for (loc, head), texts in found.items()]


def node_path(loc: Loc) -> str:
    """The node that a place in a tree.yaml belongs to: ``("tree", "fr", "children", "legal", "r")`` is ``fr/legal``."""
    names = []
    for i in range(0, len(loc) - 1, 2):
        if loc[i] != ("children" if i else "tree"):
            break
        names.append(str(loc[i + 1]))
    return "/".join(names)


def _within(loc: Loc, data: Any) -> tuple[Loc, Any]:
    """As much of pydantic's location as leads into the data (it also names union members), and what lies there."""
    for depth, step in enumerate(loc):
        inside = isinstance(data, dict) and step in data
        inside = inside or (isinstance(data, list) and isinstance(step, int) and step < len(data))
        if not inside:
            return loc[:depth], data
        data = data[step]
    return loc, data


def _nearest(key: str, loc: Loc, top: type[BaseModel]) -> str:
    model = top
    if top is TreeSpec and len(loc) > 1:
        models: dict[object, type[BaseModel]] = {"defaults": LoraSpec, "cache": CacheSpec}
        model = models.get(loc[0], NodeSpec)
    words = {
        **{field: field for field in model.model_fields},
        **(_WORDS if "r" in model.model_fields else {}),
    }
    near = difflib.get_close_matches(key, list(words), n=1, cutoff=0.6)
    return f"; did you mean {words[near[0]]!r}?" if near else ""


def _name(loc: Loc) -> str:
    node = node_path(loc)
    rest = loc[2 * len(node.split("/")) if node else 0 :]
    said = ".".join(map(str, rest))
    return f"node {node}: {said}".removesuffix(": ") if node else said or "the file"


def _place(loc: Loc) -> str:
    return f" in {_name(loc)}" if loc else ""


def _plain(text: str) -> str:
    text = text.removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = (
        repr(value)
        if isinstance(value, (str, float))
        else str(value).lower().replace("none", "null")
    )
    return text if len(text) <= 80 else f"{text[:77]}…"
