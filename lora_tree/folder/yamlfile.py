"""tree.yaml: bytes → plain data with positions → `TreeSpec`, and back to bytes.

Law: data, not code. The text is read as a stream of events, with a stack of our own: no object is
ever constructed, and what YAML offers beyond plain data (tags, anchors, aliases, several documents)
is refused by line and column. Plain scalars mean what the core schema of YAML 1.2 says, so the node
``no`` stays a node; keys are always strings.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml import events as ev
from ruamel.yaml.error import MarkedYAMLError

from ..errors import PathError, SpecError, plural
from ..formats.limits import YAML_BYTES, YAML_VALUES
from ..node_names import MAX_DEPTH, check_path
from ..spec import NodeSpec, TreeSpec, check_format
from ..spec_errors import Loc, describe_invalid

__all__ = ["Located", "json_schema", "parse_yaml", "read_spec", "render_yaml", "walk"]

_MOST_MISTAKES = 50  # that one error lists
# A node and its children are two levels; then come a pattern and a list inside.
_MAX_NESTING = 2 * MAX_DEPTH + 4

_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# The number of digits is bounded, because Python raises a ValueError for an `int` of more than
# 4,300 digits. A longer text stays a string, and the schema refuses that with its line.
_INT = re.compile(r"[-+]?[0-9]{1,300}\Z")
_BASED = re.compile(r"0o[0-7]{1,300}\Z|0x[0-9a-fA-F]{1,300}\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL = re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")

_VERSION = re.compile(rb"^version[ \t]*:[ \t]*([0-9]{1,9})[ \t]*(?:#[^\n]*)?\r?$", re.MULTILINE)
_LONE = re.compile("[\ud800-\udfff]")
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*\Z")
# These are not strings to YAML 1.1.
_ELSEWHERE = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))


@dataclass
class _Spot:
    """The position of a value, and the positions of its parts."""

    line: int
    column: int
    parts: dict[str | int, _Spot] = field(default_factory=dict)


@dataclass(frozen=True)
class Located:
    """Plain data out of a YAML file, with the place of every key and entry."""

    data: Any
    file: str
    root: _Spot

    def at(self, loc: Loc) -> str:
        """Return the place that ``loc`` leads to, or the nearest around it: ``tree.yaml:7:9``."""
        line, column = self.position(loc)
        return f"{self.file}:{line}:{column}"

    def position(self, loc: Loc) -> tuple[int, int]:
        """Return line and column of that place, from 1."""
        spot = self.root
        for step in loc:
            if step not in spot.parts:
                break
            spot = spot.parts[step]
        return spot.line, spot.column

    def refuse(self, wrong: Iterable[tuple[Loc, str]]) -> SpecError:
        """Return the error that lists all mistakes, in the order of their lines."""
        ordered = sorted((self.position(loc), text) for loc, text in wrong)
        shown = ordered[:_MOST_MISTAKES]
        lines = [f"{self.file}:{line}:{column}: {text}" for (line, column), text in shown]
        if len(ordered) > len(shown):
            lines.append(f"and {len(ordered) - len(shown)} more")
        return SpecError(*lines)


@dataclass
class _Open:
    """A mapping or list that is being read."""

    value: dict[str, Any] | list[Any]
    spot: _Spot
    key: str | None = None


def read_spec(raw: bytes, file: str) -> tuple[TreeSpec, Located]:
    """Parse and check a tree.yaml.

    Raises:
        SpecError: not YAML, not plain data, or not what a tree.yaml may say; every mistake with
            line and column.
    """
    try:
        located = parse_yaml(raw, file)
    except SpecError:
        _check_newer(raw, file)  # a later format may well use what plain YAML has not
        raise
    check_format(located.data, located.at(("version",)))
    try:
        spec = TreeSpec.model_validate(located.data)
    except ValidationError as error:
        raise located.refuse(describe_invalid(error, located.data, TreeSpec)) from error
    contradictions = list(_contradictions(spec))
    if contradictions:
        raise located.refuse(contradictions)
    return spec, located


def _check_newer(raw: bytes, file: str) -> None:
    """Refuse a text of a later format by its ``version`` line, if it can't be read as YAML here."""
    match = _VERSION.search(raw)
    if match is not None:
        line = raw.count(b"\n", 0, match.start()) + 1
        check_format({"version": int(match[1])}, f"{file}:{line}:1")


def walk(spec: TreeSpec) -> Iterator[tuple[str, NodeSpec, Loc]]:
    """Yield every node that a tree.yaml lists: (path, its spec, the way to it)."""
    stack: list[tuple[str, NodeSpec, Loc]] = [
        (name, node, ("tree", name)) for name, node in spec.tree.items()
    ]
    # A stack gives back last what was put first, so both lists are reversed to keep the order of
    # the file.
    stack.reverse()
    while stack:
        path, node, loc = stack.pop()
        yield path, node, loc
        below = [
            (f"{path}/{name}", child, (*loc, "children", name))
            for name, child in node.children.items()
        ]
        stack.extend(reversed(below))


def parse_yaml(raw: bytes, file: str) -> Located:
    """Return YAML as dicts, lists, strings, numbers, booleans and None.

    Raises:
        SpecError: not YAML 1.2, or more than plain data; with line and column.
    """
    if len(raw) > YAML_BYTES:
        raise SpecError(f"{file}: {plural(len(raw), 'byte')}; the most is {YAML_BYTES:,}")
    try:
        # Some editors begin a file with a byte order mark, which is no part of the text.
        # "utf-8-sig" drops it.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].split(b"\n")
        raise SpecError(f"{file}:{len(before)}:{len(before[-1]) + 1}: not UTF-8") from error
    stack: list[_Open] = []
    top = _Open([], _Spot(1, 1))
    for number, event in enumerate(_events(text, file)):
        place = f"{file}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
        # The limit is checked while events are read, so a hostile file is refused before its values
        # fill the memory.
        if number > YAML_VALUES:
            raise SpecError(
                f"{place}: more than {YAML_VALUES:,} keys and values, which no tree has"
            )
        if isinstance(event, ev.DocumentStartEvent):
            if top.value:
                raise SpecError(f"{place}: a second document; one file holds one tree")
            if event.version not in (None, (1, 2)) or event.tags:
                raise SpecError(f"{place}: a directive; plain YAML 1.2 has none")
        elif isinstance(event, (ev.MappingEndEvent, ev.SequenceEndEvent)):
            stack.pop()
        elif isinstance(event, ev.NodeEvent):
            into = stack[-1] if stack else top
            opened = _take(event, into, place)
            if opened is not None:
                stack.append(opened)
                if len(stack) > _MAX_NESTING:
                    raise SpecError(
                        f"{place}: nested {len(stack)} deep; a tree has at most {MAX_DEPTH} levels"
                    )
    assert isinstance(top.value, list)
    return Located(top.value[0] if top.value else None, file, top.spot.parts.get(0, top.spot))


def _events(text: str, file: str) -> Iterator[Any]:
    stream = YAML(typ="safe", pure=True).parse(io.StringIO(text))
    while True:
        try:
            event = next(stream, None)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = str(error.problem or error.context)
            at_end = "end of stream" in problem or "<stream end>" in problem
            if at_end and error.context_mark is not None:
                # The mistake is not at the end of the file, but where something was opened.
                opened = "bracket" if "<stream end>" in problem else "quote"
                mark, problem = error.context_mark, f"a {opened} that is never closed"
            place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
            raise SpecError(f"{place}: not YAML: {problem}", *_advice(problem)) from error
        # Any other error of the YAML package's parser is a mistake in the text as well.
        except Exception as error:
            raise SpecError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
        if event is None:
            return
        yield event


def _advice(problem: str) -> Iterator[str]:
    """Say in plain words what the YAML package's two commonest complaints come from."""
    if "'\\t'" in problem:
        yield "indent with spaces: YAML allows no tabs there"
    elif "<block end>" in problem or "mapping values are not allowed" in problem:
        yield "look at the indentation: keys of one node begin in the same column"


def _take(event: Any, into: _Open, place: str) -> _Open | None:
    """Put a value where it belongs; return it if it is a mapping or list, to be filled."""
    if isinstance(event, ev.AliasEvent) or event.anchor is not None:
        raise SpecError(f"{place}: an anchor or alias (&, *); write the value out")
    if event.tag is not None:
        raise SpecError(f"{place}: a tag ({event.tag}); a tree.yaml is plain data")
    if isinstance(event, ev.ScalarEvent) and _LONE.search(event.value):
        raise SpecError(
            f"{place}: {event.value!r} holds half of a surrogate pair, which is no character"
        )
    spot = _Spot(event.start_mark.line + 1, event.start_mark.column + 1)
    if isinstance(into.value, dict) and into.key is None:
        if not isinstance(event, ev.ScalarEvent):
            raise SpecError(f"{place}: a key has to be a plain string")
        if event.value in into.value:
            first = into.spot.parts[event.value].line
            raise SpecError(f"{place}: duplicate key {event.value!r}, first at line {first}")
        into.key = event.value
        into.value[into.key] = None
        into.spot.parts[into.key] = spot
        return None
    opened: _Open | None = None
    value: Any
    if isinstance(event, ev.ScalarEvent):
        # Only a plain scalar gets a type from its look. A quoted one is a string, which is how a
        # tree.yaml says that "1.0" is a text.
        value = _scalar(event.value, place) if event.style is None else event.value
    else:
        value = {} if isinstance(event, ev.MappingStartEvent) else []
        opened = _Open(value, spot)
    if isinstance(into.value, dict):
        assert into.key is not None
        into.value[into.key] = value
        if opened is not None:  # an error about the value is shown at its key
            opened.spot = into.spot.parts[into.key]
        into.key = None
    else:
        into.spot.parts[len(into.value)] = spot
        into.value.append(value)
    return opened


def _scalar(text: str, place: str) -> Any:
    """Return the value of a plain scalar by the core schema of YAML 1.2 (§10.3.2)."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text):
        return int(text)
    if _BASED.match(text):
        return int(text[2:], 8 if text[1] == "o" else 16)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL.match(text):
        return float(text.replace(".", "", 1))
    return text


def _contradictions(spec: TreeSpec) -> Iterator[tuple[Loc, str]]:
    """Yield mistakes that no single field shows: case twins, words that contradict each other."""
    folded: dict[str, str] = {}
    for path, node, loc in walk(spec):
        try:
            check_path(path)
        except PathError as error:
            # The message is one line of several, and its advice would be a second one.
            yield loc, f"node {'; '.join([error.what, *error.todo])}"
        twin = folded.setdefault(path.casefold(), path)
        if twin != path:
            yield loc, f"node {path} differs from {twin} only by case"
        made = sorted(node.model_fields_set - {"adapter", "weight", "children"})
        if "adapter" in node.model_fields_set and made:
            has = "no adapter (null)" if node.adapter is None else "an adapter"
            yield (
                (*loc, made[0]),
                f"node {path} has {has}, so {', '.join(made)} would say nothing; take one out",
            )
        if node.adapter is not None and (not node.adapter or "\0" in node.adapter):
            yield (*loc, "adapter"), f"node {path}: {node.adapter!r} is not a folder's name"


# ---------------------------------------------------------------------- writing
def render_yaml(data: Mapping[str, Any]) -> bytes:
    """Return plain data as YAML, in the given order of keys; equal data gives equal bytes.

    Raises:
        SpecError: a string that UTF-8 can't hold.

    >>> nodes = {"fr": {"weight": 0.5}, "no": {}}
    >>> print(render_yaml({"version": 1, "tree": nodes}).decode(), end="")
    version: 1
    tree:
      fr:
        weight: 0.5
      "no": {}
    """
    lines: list[str] = []
    _block(data, "", lines)
    try:
        return "".join(f"{line}\n" for line in lines).encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"a string can't be written as UTF-8: {error.object[error.start : error.end]!r}"
        ) from error


def _block(data: Mapping[str, Any], indent: str, lines: list[str]) -> None:
    for key, value in data.items():
        name = _string(key)
        # A longer key than YAML's limit is written with a question mark.
        head = f"{indent}{name}:" if len(name) < 1000 else f"{indent}? {name}\n{indent}:"
        if isinstance(value, Mapping) and value:
            lines.append(head)
            _block(value, indent + "  ", lines)
        elif isinstance(value, (list, tuple)):
            lines.append(f"{head} [{', '.join(map(_atom, value))}]")
        else:
            lines.append(f"{head} {_atom(value)}")


def _atom(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return ".nan"
        return ".inf" if value > 0 else "-.inf"
    return "{}" if isinstance(value, Mapping) else json.dumps(value)


def _string(text: str) -> str:
    if _PLAIN.match(text) and text.lower() not in _ELSEWHERE and isinstance(_scalar(text, ""), str):
        return text
    # A JSON string is a double-quoted scalar of YAML 1.2. YAML also wants what is not printable to
    # be escaped, and JSON lets some of that stand.
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else _escape(c) for c in quoted)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xD800 <= code < 0xE000:
        return character  # a lone surrogate: encoding it fails, and says so
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of tree.yaml, for editors; made from the models that check it."""
    schema = TreeSpec.model_json_schema()
    schema["title"] = "tree.yaml of lora_tree"
    for model in (schema, *schema["$defs"].values()):
        for shape in model["properties"].values():
            # By itself the pattern only says what fitting names hold: JSON Schema lets any other
            # name pass, so an editor would not mark a wrong one.
            if "patternProperties" in shape:
                shape["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
