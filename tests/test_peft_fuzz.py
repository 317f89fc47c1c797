"""Broken PEFT folders, by the thousand: what comes out is an adapter or an error of ours, never
anything else.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling import slow

from lora_tree import Adapter, LowRank
from lora_tree.errors import LoraTreeError, LoraTreeWarning
from lora_tree.formats import peft
from lora_tree.lowrank import EMBEDDING, PARAMETER, Layout
from lora_tree.patterns import ByPattern, MatchingBudget, NamePattern

pytestmark = slow

CONFIG, WEIGHTS = peft.CONFIG, peft.WEIGHTS
many = settings(
    max_examples=500,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


def whole() -> dict[str, bytes]:
    """A folder with every kind of key in it."""
    torch.manual_seed(0)
    parameter = LowRank(torch.randn(2, 1, 3), torch.randn(2, 4, 1), layout=PARAMETER)
    modules = {
        "lin": LowRank(torch.randn(2, 3), torch.randn(4, 2), 1.5),
        "conv": LowRank(torch.randn(2, 2, 6), torch.randn(2, 2, 2), layout=Layout("conv", (3,))),
        "embed_tokens": LowRank(torch.randn(2, 9), torch.randn(4, 2), layout=EMBEDDING),
        "x.up": parameter,
        "x.down": parameter,
        "attn": LowRank(torch.randn(2, 3), torch.randn(9, 2)),
        "attn.out_proj": LowRank(torch.randn(2, 3), torch.randn(3, 2)),
    }
    return peft.render(
        Adapter(
            modules,
            nesting={"x": ("up", "down")},
            unchanged={"embed_tokens.weight": torch.randn(9, 4)},
        )
    )


FILES = whole()
LENGTH = int.from_bytes(FILES[WEIGHTS][:8], "little")
HEADER, BODY = FILES[WEIGHTS][8 : 8 + LENGTH], FILES[WEIGHTS][8 + LENGTH :]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**63, 10**30, -(10**400)]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        [
            "lin",
            "x.up",
            "(",
            "(?i)a",
            "[[a]",
            ".*",
            "all-linear",
            "LORA",
            "lora_only",
            "pissa",
            "base_layer",
        ]
    ),
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.just("lin"), inner, max_size=3)
    ),
    max_leaves=6,
)


def check(folder: Path, config: bytes, weights: bytes) -> None:
    """Only errors of ours come out of a read, and what was read can be written or is refused by
    us.
    """
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    with warnings.catch_warnings(), contextlib.suppress(LoraTreeError):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*its peft_version is", LoraTreeWarning)
        peft.render(peft.read_folder(folder))


def mutated(data: bytes, at: int, remove: int, insert: bytes) -> bytes:
    at %= len(data) + 1
    return data[:at] + insert + data[at + remove :]


edits = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.integers(0, 3),
        st.binary(max_size=3)
        | st.sampled_from(
            [b"0", b"-", b"9" * 20, b'"', b"{", b"[[", b"}", b"\\ud800", b"\x00", b"null"]
        ),
    ),
    min_size=1,
    max_size=4,
)


def test_the_folder_that_is_broken_here_is_whole(tmp_path: Path) -> None:
    check(tmp_path, FILES[CONFIG], FILES[WEIGHTS])
    assert len(peft.read_folder(tmp_path)) == 7


@many
@given(edits=edits)
def test_bytes_of_the_config(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    data = FILES[CONFIG]
    for edit in edits:
        data = mutated(data, *edit)
    check(tmp_path, data, FILES[WEIGHTS])


@many
@given(
    fields=st.dictionaries(
        st.sampled_from(sorted(json.loads(FILES[CONFIG]))), anything, min_size=1, max_size=3
    )
)
def test_fields_of_the_config(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = json.loads(FILES[CONFIG]) | fields
    check(tmp_path, json.dumps(config).encode(), FILES[WEIGHTS])


@many
@given(edits=edits, fix_length=st.booleans())
def test_bytes_of_the_header(
    tmp_path: Path, edits: list[tuple[int, int, bytes]], fix_length: bool
) -> None:
    header = HEADER
    for edit in edits:
        header = mutated(header, *edit)
    length = len(header) if fix_length else LENGTH
    check(tmp_path, FILES[CONFIG], length.to_bytes(8, "little") + header + BODY)


@many
@given(
    renamed=st.dictionaries(
        st.sampled_from([key for key in json.loads(HEADER) if key != "__metadata__"]),
        st.sampled_from([key for key in json.loads(HEADER) if key != "__metadata__"]).flatmap(
            lambda key: st.sampled_from(
                [key, key + ".x", key.replace("lin", "attn"), key.replace("x.", "x.base_layer.")]
            )
        )
        | st.text(max_size=12).map("base_model.model.".__add__),
        max_size=3,
    ),
    entry=st.fixed_dictionaries(
        {}, optional={"dtype": anything, "shape": anything, "data_offsets": anything}
    ),
    metadata=anything | st.dictionaries(st.just("lora_tree.nesting"), anything.map(json.dumps)),
)
def test_names_and_entries_of_the_header(
    tmp_path: Path, renamed: dict[str, str], entry: dict[str, Any], metadata: Any
) -> None:
    header = json.loads(HEADER)
    header = {renamed.get(key, key): value for key, value in header.items()}
    if entry:
        header[max(header)] = header[max(header)] | entry
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    check(tmp_path, FILES[CONFIG], len(text).to_bytes(8, "little") + text + BODY)


@pytest.mark.parametrize("name", FILES)
def test_files_cut_short_anywhere(tmp_path: Path, name: str) -> None:
    for length in range(len(FILES[name]) - 1):
        files = FILES | {name: FILES[name][:length]}
        check(tmp_path, files[CONFIG], files[WEIGHTS])
        if name == WEIGHTS:
            with pytest.raises(LoraTreeError):
                peft.read_folder(tmp_path)


@pytest.mark.parametrize(
    "length", [0, 1, LENGTH - 1, LENGTH + 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1]
)
def test_lengths_of_the_header(tmp_path: Path, length: int) -> None:
    check(tmp_path, FILES[CONFIG], length.to_bytes(8, "little") + HEADER + BODY)


# ---------------------------------------------------------------------- patterns on names
pieces = st.sampled_from(
    ["a", "b", "1", ".", r"\.", r"\d", "[ab]", "[^a]", "[0-3]", "^", "$", r"\b", "_", "-"]
)
patterns = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.builds("".join, st.lists(inner, max_size=4)),
        st.builds("({}|{})".format, inner, inner),
        st.builds("{}|{}".format, inner, inner),
        st.builds("({}{}){}".format, st.sampled_from(["?=", "?!", "?i:"]), inner, inner),
        st.builds(
            "(?:{}){}".format,
            inner,
            st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}", "{,2}", "{0,2}?", ""]),
        ),
    ),
    max_leaves=6,
)


@settings(many, max_examples=3000)
@given(patterns, st.lists(st.text("ab1._-", max_size=7), min_size=1, max_size=8))
def test_a_pattern_matches_what_re_says(text: str, names: list[str]) -> None:
    pattern = NamePattern(text)
    for name in names:
        assert pattern.matches_end(name) == bool(re.match(rf"(.*\.)?({text})$", name)), name
        assert pattern.matches(name) == bool(re.fullmatch(text, name)), name


@settings(many, max_examples=1000)
@given(
    st.sampled_from(["a", r"a\.", "[ab]", "ab", "."]),
    st.sampled_from(["?<=", "?<!"]),
    patterns,
    st.lists(st.text("ab1.", max_size=7), min_size=1, max_size=8),
)
def test_a_look_behind_matches_what_re_says(
    before: str, kind: str, after: str, names: list[str]
) -> None:
    text = f".*({kind}{before}){after}"
    pattern = NamePattern(text)
    for name in names:
        assert pattern.matches(name) == bool(re.fullmatch(text, name)), name


layers = st.builds(
    ".".join, st.lists(st.sampled_from(["a", "b", "ab", "1", "12", "h"]), min_size=1, max_size=6)
)


@settings(many, max_examples=1000)
@given(st.sampled_from(["a", "[^.]*", "(a|b)", "a?b?", r"\w+", "[ab]{1,2}"]), layers)
def test_the_layer_of_a_name_is_the_one_that_re_says(text: str, name: str) -> None:
    match = re.match(rf"(?:^|.*?\.)(?:{text})\.(?P<idx>\d+)\.", name)
    assert NamePattern(text).layer(name) == (int(match["idx"]) if match else None)


spellings = st.sampled_from(
    ["a.b", r"a\.b", "^a.b", r"^a\.b", "b", ".b", "a.", "a.b.1", "^b", r"^a\.b\.1", "a-b"]
)


@settings(many, max_examples=1000)
@given(st.lists(spellings | patterns, max_size=6), st.text("ab1.-\n", max_size=7))
def test_the_first_of_several_patterns_counts(texts: list[str], name: str) -> None:
    wanted = next((i for i, text in enumerate(texts) if re.match(rf"(.*\.)?({text})$", name)), -1)
    assert (
        ByPattern(((text, i) for i, text in enumerate(texts)), MatchingBudget("a test")).first(
            name, -1
        )
        == wanted
    )


@many
@given(st.text(r"ab1.\\()[]{}*+?|^$,-d:=!\n", max_size=12), st.text("ab1.\n", max_size=8))
def test_a_pattern_of_any_kind_is_understood_as_re_does_or_refused(text: str, name: str) -> None:
    try:
        pattern = NamePattern(text)
    except (ValueError, re.error):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pattern.matches_end(name) == bool(re.match(rf"(.*\.)?({text})$", name))
