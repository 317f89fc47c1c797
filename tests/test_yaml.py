"""tree.yaml: plain data, every mistake with its place, the same bytes every time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_tree.errors import SpecError
from lora_tree.folder.yamlfile import json_schema, parse_yaml, read_spec, render_yaml
from lora_tree.formats.limits import YAML_BYTES
from lora_tree.node_names import MAX_DEPTH
from lora_tree.sites.targets import fresh_adapter
from lora_tree.spec import LoraSpec, lora_spec

FILE = "zoo/tree.yaml"


def wrong(text: str | bytes) -> str:
    with pytest.raises(SpecError) as caught:
        read_spec(text.encode() if isinstance(text, str) else text, FILE)
    return str(caught.value)


def test_a_hint_comes_from_the_words_of_that_very_place() -> None:
    text = "version: 1\ndefaults: {rank_by_dept: [8]}\ncache: {host_budgte: 1}\n"
    text += "tree: {fr: {children: {cache: {wieght: 1, rank_by_dept: [8]}}}}"
    assert wrong(text).splitlines() == [
        "zoo/tree.yaml:2:12: unknown key 'rank_by_dept' in defaults; did you mean 'rank_by_depth'?",
        "  zoo/tree.yaml:3:9: unknown key 'host_budgte' in cache; did you mean 'host_budget'?",
        "  zoo/tree.yaml:4:32: unknown key 'wieght' in node fr/cache; did you mean 'weight'?",
        "  zoo/tree.yaml:4:43: unknown key 'rank_by_dept' in node fr/cache",
    ]


def test_the_page_of_the_design_reads() -> None:
    text = b"""
version: 1
base: org/model                    # hub id or folder
defaults: {r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj]}
tree:
  fr:
    children:
      legal: {adapter: ../elsewhere/legal, weight: 0.8}
      medical: {r: 8}
  de: {}
"""
    spec, _ = read_spec(text, FILE)
    assert spec.base == "org/model"
    assert spec.defaults.lora_alpha == 32.0
    assert spec.tree["fr"].children["legal"].weight == 0.8
    assert list(spec.tree) == ["fr", "de"]


# ---------------------------------------------------------------------- mistakes and their places
def test_a_typo_is_shown_with_its_place_and_its_repair() -> None:
    text = "version: 1\nbase: x\ntree:\n  fr:\n    children:\n      legal:\n        rnak: 3\n"
    assert (
        wrong(text) == "zoo/tree.yaml:7:9: unknown key 'rnak' in node fr/legal; did you mean 'r'?"
    )


def test_all_mistakes_are_listed_in_the_order_of_the_lines() -> None:
    text = (
        "version: 1\ntree:\n  fr: {wieght: 1}\n  de:\n  x: {target_modules: 3, r: yes}\n"
        "defaults: {r: 0}\nz: 1\n"
    )
    assert wrong(text).splitlines() == [
        "zoo/tree.yaml:3:8: unknown key 'wieght' in node fr; did you mean 'weight'?",
        "  zoo/tree.yaml:4:3: node de: got null, which should be a mapping; write {} where there "
        "is nothing to say",
        "  zoo/tree.yaml:5:7: node x: target_modules: got 3, which should be a valid list or "
        "should be a valid string",
        "  zoo/tree.yaml:5:26: node x: r: got 'yes', which should be a valid integer",
        "  zoo/tree.yaml:6:12: defaults.r: got 0, which should be greater than or equal to 1",
        "  zoo/tree.yaml:7:1: unknown key 'z'",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nversion: 1\n", ":2:1: duplicate key 'version', first at line 1"),
        ("version: 1\ntree: {a: {}, a: {}}", ":2:15: duplicate key 'a', first at line 2"),
        ("version: 0\n", ":1:1: version: got 0, which should be 1"),
        ("version: true\n", ":1:1: version: got true, which should be the number 1"),
        (
            "base: x\nversion: 2\n",
            ":2:1: written by a newer lora_tree (format 2); this one reads 1",
        ),
        ("base: x\n", ":1:1: 'version' is missing; write version: 1"),
        ("", ":1:1: the file is empty; a tree.yaml begins with version: 1"),
        ("# nothing\n", ":1:1: the file is empty"),
        ("- 1\n", ":1:1: the file: got a list, which should be a mapping"),
        (
            "version: 1\nbase: !!python/name:os.system x\n",
            ":2:7: a tag (tag:yaml.org,2002:python/name:os.system)",
        ),
        ("version: &a 1\n", ":1:10: an anchor or alias"),
        ("version: 1\nbase: *a\n", ":2:7: an anchor or alias"),
        ("version: 1\n<<: {base: x}\n", ":2:1: unknown key '<<'"),
        ("version: 1\n[1, 2]: 3\n", ":2:1: a key has to be a plain string"),
        ("version: 1\n---\nversion: 1\n", ":2:1: a second document"),
        ("%YAML 1.1\n---\nversion: 1\n", ":2:1: a directive"),
        ("version: [1\n", "not YAML"),
        ('version: "\\UFFFFFFFF"\n', "not YAML"),
        ('base: "\\ud800"\n', "half of a surrogate pair"),
        (
            "version: 1\ntree: {fr/legal: {}}",
            ":2:8: 'fr/legal' is not a valid node name; write fr/legal as {fr: {children: {legal: ",
        ),
        (
            "version: 1\ntree:\n  fr: {}\n  children:\n    legal: {}\n",
            ":5:5: unknown key 'legal' in node children; 'children' stands where the name of a "
            "node does: indent it below its node",
        ),
        (
            "version: 1\ntree:\n  fr:\n     r: 4\n    children: {}\n",
            "\n  look at the indentation: keys of one node begin in the same column",
        ),
        ("version: 1\ntree:\n\tfr: {}\n", "\n  indent with spaces: YAML allows no tabs there"),
        (
            "version: 1\ntree:\n  'fr: {}\n  de: {}\n",
            ":3:3: not YAML: a quote that is never closed",
        ),
        ("version: 1\ntree: {fr: {r: 4}\n", ":2:7: not YAML: a bracket that is never closed"),
        ("version: 1\ntree: {a b: {}}", ":2:8: 'a b' is not a valid node name"),
        (
            "version: 1\ntree: {con: {}}",
            ":2:8: node 'con' is not a valid node name; a name has letters from a to z and A to Z",
        ),
        ("version: 1\n\x00", "not YAML: unacceptable character #x0000: special characters are"),
        ("version: 1\ntree: {fr: {}, FR: {}}", ":2:16: node FR differs from fr only by case"),
        (
            "version: 1\ntree: {fr: {adapter: null, r: 8}}",
            ":2:28: node fr has no adapter (null), so r would say",
        ),
        (
            "version: 1\ntree: {fr: {adapter: x, r: 8}}",
            ":2:25: node fr has an adapter, so r would say",
        ),
        ("version: 1\ntree: {fr: {adapter: ''}}", "node fr: '' is not a folder's name"),
        (
            "version: 1\ntree: {fr: {weight: .inf}}",
            ":2:13: node fr: weight: got inf, which should be a finite number",
        ),
        ("version: 1\ntree: {fr: {weight: true}}", "node fr: weight: got true"),
        (
            "version: 1\ntree: {fr: {weight: {'*.q': heavy}}}",
            ":2:22: node fr: weight.*.q: got 'heavy', which should be a valid number\n",
        ),
        (
            "version: 1\ntree: {fr: {weight: {}}}",
            ":2:13: node fr: weight: got a mapping, which is not a weight: an empty mapping; write",
        ),
        (
            "version: 1\ntree: {fr: {weight: {'weight: (.*)': 1.0}}}",
            ": got a mapping, which is not a weight: pattern 'weight: (.*)' holds '(' of a regular",
        ),
        (
            "version: 1\ntree: {fr: {weight: heavy}}",
            "node fr: weight: got 'heavy', which should be a valid number or should be a mapping\n",
        ),
        (
            "version: 1\ndefaults: {rank_by_depth: []}",
            ":2:12: defaults.rank_by_depth: got a list, which should have one entry at least\n",
        ),
        (
            "version: 1\ndefaults: {target_modules: '('}",
            ":2:12: defaults.target_modules: got '(', which is not a regular expression: missing )",
        ),
        (
            "version: 1\ndefaults: {exclude_modules: '*'}",
            ":2:12: defaults.exclude_modules: got '*', which is not a",
        ),
        (
            "version: 1\ndefaults: {rank_pattern: {'[': 4}}",
            ":2:27: defaults.rank_pattern: the key '[' is not a regular expression: unterminated "
            "character set",
        ),
        (
            "version: 1\ntree: {fr: {rank_pattern: {a: 1, '(': 4}}}",
            ":2:34: node fr: rank_pattern: the key '(' is not",
        ),
        (
            "version: 1\ndefaults: {rank_pattern: {'a{99999999999}': 4}}",
            "the repetition number is too large",
        ),
        (
            "version: 1\ndefaults: {alpha_pattern: {'[': 4}}",
            ":2:28: defaults.alpha_pattern: the key '[' is not",
        ),
        (
            "version: 1\ndefaults: {alpha_pattern: {'(?i)a': 4}}",
            ":2:28: defaults.alpha_pattern: the key '(?i)a' is not",
        ),
        (
            "version: 1\ndefaults: {alpha_pattern: {x: .nan}}",
            ":2:28: defaults.alpha_pattern.x: got nan, which should be",
        ),
        (
            "version: 1\ndefaults: {alpha_pattern: {x: .inf}}",
            "got inf, which should be a finite number",
        ),
        (
            "version: 1\ndefaults: {alpha_pattern: {x: -1}}",
            "got -1, which should be greater than 0",
        ),
        (
            "version: 1\ndefaults: {layers_pattern: '['}",
            ":2:12: defaults.layers_pattern: got '[', which is not a",
        ),
        (
            "version: 1\ndefaults: {layers_pattern: [h, '(']}",
            ":2:12: defaults.layers_pattern: got a list, which holds '(', which is not a regular "
            "expression: missing )",
        ),
        (
            "version: 1\ndefaults: {layers_pattern: '(?P<idx>h)'}",
            "redefinition of group name 'idx'",
        ),
    ],
)
def test_what_is_refused_and_how(text: str, message: str) -> None:
    assert message in wrong(text) + "\n"


def test_bytes_that_are_no_text_have_a_place() -> None:
    assert wrong(b"version: 1\nbase: \xff\n") == "zoo/tree.yaml:2:7: not UTF-8"


def test_depth_and_size_are_bounded() -> None:
    assert "deep" in wrong("[" * 100_000)
    assert "deep" in wrong("{a: " * 100_000)
    assert f"{YAML_BYTES:,}" in wrong(b" " * (YAML_BYTES + 1))
    deep: dict[str, Any] = {}
    for _ in range(MAX_DEPTH):
        deep = {"children": {"a": deep}}
    assert f"the most is {MAX_DEPTH}" in wrong(render_yaml({"version": 1, "tree": {"a": deep}}))


def test_a_bomb_of_aliases_is_refused_at_its_first() -> None:
    bomb = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
    assert "an anchor or alias" in wrong(bomb)


def test_the_readme_s_mistake_has_the_place_that_it_says() -> None:
    page = (Path(__file__).parent.parent / "README.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (said,) = re.findall(r"answered with its place: `(.*)`", page)
    read_spec(text.encode(), FILE)
    assert wrong(text.replace("medical: {r: 8}", "medical: {rnak: 8}")) == said


# ---------------------------------------------------------------------- plain scalars
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("0o17", 15),
        ("017", 17),
        ("0xff", 255),
        ("1_000", "1_000"),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.INF", float("-inf")),
        ("~", None),
        ("Null", None),
        ("nULL", "nULL"),
        ("TRUE", True),
        ("12:30", "12:30"),
        ("2001-01-01", "2001-01-01"),
        ("'1'", "1"),
    ],
)
def test_plain_scalars_mean_what_the_core_schema_says(text: str, expected: object) -> None:
    found = parse_yaml(f"key: {text}".encode(), FILE).data["key"]
    assert (found, type(found)) == (expected, type(expected))


def test_keys_are_strings_whatever_they_look_like() -> None:
    spec, _ = read_spec(b"version: 1\ntree: {123: {}, no: {}, 1.5: {}, null: {}}", FILE)
    assert list(spec.tree) == ["123", "no", "1.5", "null"]


# ---------------------------------------------------------------------- writing
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["no", "1", "~", "a: b", "- x"]
)
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
DATA = st.recursive(
    st.dictionaries(TEXT, LEAF | st.lists(LEAF, max_size=3), max_size=4),
    lambda inner: st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(DATA)
def test_what_is_written_reads_as_the_same(data: dict[str, Any]) -> None:
    written = render_yaml(data)
    if data:
        assert parse_yaml(written, FILE).data == data
        assert render_yaml(parse_yaml(written, FILE).data) == written


def test_a_long_key_survives() -> None:
    data = {"rank_pattern": {"x" * 3000: 4, "y z" * 1000: {"a": 1}}}
    assert parse_yaml(render_yaml(data), FILE).data == data


# ----------------------------------------------------------------- the schema, and errors in Python
def test_the_committed_schema_is_current() -> None:
    committed = Path(__file__).parent.parent / "lora_tree" / "tree.schema.json"
    assert json.loads(committed.read_text()) == json_schema(), (
        "write json_schema() to lora_tree/tree.schema.json again"
    )


def test_the_schema_knows_the_words() -> None:
    schema = json_schema()
    words = {"version", "base", "defaults", "cache", "versions", "versions_budget", "tree"}
    assert set(schema["properties"]) == words
    assert schema["required"] == ["version"]
    node = schema["$defs"]["NodeSpec"]
    assert node["additionalProperties"] is False
    assert set(LoraSpec.model_fields) < set(node["properties"])


def test_every_mistake_at_one_place_is_told() -> None:
    first, second = wrong("version: 1\ndefaults: {rank_pattern: {'[': 0}}").splitlines()
    assert first.startswith(
        "zoo/tree.yaml:2:27: defaults.rank_pattern.[: got 0, which should be greater"
    )
    assert second.startswith(
        "  zoo/tree.yaml:2:27: defaults.rank_pattern: the key '[' is not a regular expression"
    )


def test_patterns_that_a_tree_yaml_allows_are_those_that_a_fresh_adapter_can_use() -> None:
    base = nn.ModuleDict(
        {"h": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(3)])}
    )
    text = b"""
version: 1
defaults:
  target_modules: [q_proj]
  layers_to_transform: [1, 2]
  layers_pattern: [x, "(h|layers)"]
  rank_pattern: {"2.q_proj|v": 3}
  alpha_pattern: {"1\\\\..*": 6}
"""
    made = fresh_adapter(base, read_spec(text, FILE)[0].defaults)
    assert {name: (value.rank, value.scale) for name, value in made.modules.items()} == {
        "h.1.q_proj": (8, 6 / 8),
        "h.2.q_proj": (3, 8 / 3),
    }


def test_a_mistake_in_python_reads_the_same() -> None:
    with pytest.raises(SpecError, match=r"^fr: unknown key 'rank'; did you mean 'r'\?$"):
        lora_spec({"rank": 3}, "fr")
    with pytest.raises(SpecError, match="fr: r: got '8', which should be a valid integer"):
        lora_spec({"r": "8"}, "fr")
    with pytest.raises(
        SpecError, match=r"^fr: rank_pattern: the key '\[' is not a regular expression"
    ):
        lora_spec({"rank_pattern": {"[": 4}}, "fr")
    with pytest.raises(
        SpecError, match=r"^fr: rank_pattern: the key '1' should be a valid string$"
    ):
        lora_spec({"rank_pattern": {1: 4}}, "fr")
