"""Anything may be written into a tree's folder: only the library's own errors come out, and nothing
outside is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from looks import looking
from sampling import slow
from zoo import adapter, tree

import lora_tree as lt
from lora_tree.errors import LoraTreeError, NewerFormat, SpecError
from lora_tree.folder import lockfile, yamlfile
from lora_tree.folder.transactions.record import HIDDEN

pytestmark = [slow, pytest.mark.filterwarnings("ignore::lora_tree.StaleWarning")]
CHEAP = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
DEAR = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "zoo"
    made = tree()
    adapter(5).save(folder.parent / "secret")
    made.save(folder)
    return folder


@pytest.fixture
def watch(zoo: Path) -> Iterator[None]:
    """Nothing of the neighbour's is opened, listed or changed, whatever the test does."""
    before = {p: p.read_bytes() for p in sorted(zoo.parent.glob("secret/*"))}
    with looking() as looked:
        yield
    assert looked
    assert not [path for path in looked if "secret" in path]
    assert {p: p.read_bytes() for p in sorted(zoo.parent.glob("secret/*"))} == before


def survives(folder: Path, *, write: bool = False) -> None:
    """Whatever lies there: it opens, or the library says why not; and check never raises."""
    try:
        loaded = lt.load(folder)
        for path in loaded.paths():
            loaded.adapter(path)
    except LoraTreeError as error:
        str(error).encode()
    for problem in lt.check(folder):
        problem.text.encode()
    if write:
        try:
            lt.lock(folder)
        except LoraTreeError:
            return


@st.composite
def mutated(draw: st.DrawFn, text: bytes, *, words: tuple[bytes, ...]) -> bytes:
    """A file with a few bytes changed, taken out, doubled, or replaced by what a parser trips
    over.
    """
    data = bytearray(text)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 12)))
        data[at:to] = draw(
            st.binary(max_size=3) | st.sampled_from(words) | st.just(bytes(data[at:to]) * 2)
        )
    return bytes(data)


# ---------------------------------------------------------------------- the parsers by themselves
YAML = (
    b"version: 1\nbase: org/model\ndefaults: {r: 16, target_modules: [q_proj], rank_pattern: "
    b"{'a.*': 4}}\n"
    b"tree:\n  fr:\n    weight: 0.5\n    children:\n      legal: {adapter: ../x, weight: 1e-1}\n  "
    b"de: {r: 2}\n"
)
YAML_WORDS = (
    *(
        b"&a ",
        b"*a",
        b"!!python/object:os.system ",
        b"!x ",
        b"<<: ",
        b"? ",
        b"- ",
        b"#",
        b"%YAML 1.1\n",
    ),
    *(
        b"\n---\n",
        b"\n...\n",
        b"{",
        b"}",
        b"[",
        b"]",
        b": ",
        b"|\n",
        b">-\n",
        b'"',
        b"'",
        b"\\",
        b"@",
        b"`",
    ),
    *(b"\t", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xc2\x85", b"\xe2\x80\xa8", b'"\\ud800"'),
    *(b"null", b"9" * 400, b"1e999", b".nan", b"0x", b"../../other", b"[" * 200, b"{a: " * 200),
)


@CHEAP
@given(mutated(YAML, words=YAML_WORDS))
def test_yaml(data: bytes) -> None:
    try:
        spec, _ = yamlfile.read_spec(data, "tree.yaml")
    except SpecError as error:
        assert str(error).startswith("tree.yaml")
    else:
        assert all(path for path, _, _ in yamlfile.walk(spec))


@CHEAP
@given(
    st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
)
def test_yaml_of_nothing_known(data: bytes) -> None:
    with pytest.raises(SpecError):
        yamlfile.read_spec(data, "tree.yaml")


JSON_WORDS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"null",
        b"true",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 400,
    ),
    *(
        b"\\ud800",
        b"\0",
        b"\xff",
        b"../other",
        b"/etc/passwd",
        b"-1",
        b"0.5",
        b'"version": 2',
        b'"nodes": 1',
    ),
    *(b"[" * 3000, b'{"a":' * 3000),
)
WORDS = ("version", "nodes", "fr", "base", "content", "size", "moves", "to", "stage", "deletes")
KEYS = st.sampled_from(["", "..", "../secret", *WORDS])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@CHEAP
@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40))
def test_a_lock_of_any_shape(data: bytes) -> None:
    try:
        lockfile.parse_lock(data, "tree.lock")
    except SpecError as error:
        assert str(error).startswith("tree.lock")
        assert isinstance(error, NewerFormat) or "lora-tree lock" in str(error)


@CHEAP
@given(st.data())
def test_a_mutated_lock(zoo: Path, data: st.DataObject) -> None:
    raw = data.draw(mutated((zoo / "tree.lock").read_bytes(), words=JSON_WORDS))
    try:
        again = lockfile.parse_lock(raw, "tree.lock")
    except SpecError as error:
        assert str(error).startswith("tree.lock")
    else:
        assert lockfile.parse_lock(lockfile.render_lock(again), "tree.lock") == again


# ---------------------------------------------------------------------- whole folders
@DEAR
@given(data=st.data())
def test_folders_with_mutated_files(zoo: Path, watch: None, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tree.yaml", "tree.lock", "fr/adapter_config.json"]))
    words = YAML_WORDS if name == "tree.yaml" else JSON_WORDS
    before = (zoo / name).read_bytes()
    try:
        (zoo / name).write_bytes(data.draw(mutated(before, words=words)))
        survives(zoo)
    finally:
        (zoo / name).write_bytes(before)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLACES = st.sampled_from(
    [
        *(
            f"fr/{CONFIG}",
            f"fr/legal/{WEIGHTS}",
            f"new/{CONFIG}",
            "tree.yaml",
            "tree.lock",
            f"x.lock/{CONFIG}",
        ),
        *(
            f"../secret/{CONFIG}",
            f"fr/../../secret/{CONFIG}",
            f"link/{CONFIG}",
            "/etc/passwd",
            "",
            ".",
        ),
        *(
            f"{CONFIG}/",
            f"fr//{CONFIG}",
            f"fr\0/{CONFIG}",
            "fr/x.txt",
            "tree.py",
            "..lock",
            "fr/.yaml",
        ),
        *(".lora_tree/commit.json", "a/" * 70 + CONFIG),
    ]
)
STAGES = st.sampled_from(
    [f"stage-{'0' * 32}", "..", "../../secret", "stage-x", f"stage-{'1' * 32}", ""]
)
WAS = st.sampled_from([None, None, {"size": 1, "mtime_ns": 1}, {"size": "1"}, "there"])
MOVES = st.builds(
    lambda to, size, digest, was: {"to": to, "size": size, "sha256": digest, "was": was},
    PLACES,
    st.integers(-1, 9) | st.just("1"),
    st.sampled_from(
        ["0" * 64, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", "x"]
    ),
    WAS,
)
DELETES = st.builds(lambda at, was: {"at": at, "was": was}, PLACES, WAS) | PLACES
RECORDS = st.builds(
    lambda stage, moves, deletes, version: {
        "version": version,
        "stage": stage,
        "moves": moves,
        "deletes": deletes,
    },
    STAGES,
    st.lists(MOVES, max_size=3),
    st.lists(DELETES, max_size=3),
    st.sampled_from([2, 2, 2, 1, 3, True]),
)


@DEAR
@given(
    record=RECORDS | JSON,
    as_link=st.sampled_from([None, None, None, "stage", "record", "hidden", "staged"]),
)
def test_records_that_nobody_should_trust(
    zoo: Path,
    watch: None,
    tmp_path_factory: pytest.TempPathFactory,
    record: Any,
    as_link: str | None,
) -> None:
    folder, secret = zoo / "inner", zoo.parent / "secret"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(zoo / "fr", folder / "fr")
    (folder / "link").symlink_to(secret)
    hidden, stage = folder / HIDDEN, folder / HIDDEN / f"stage-{'0' * 32}"
    if as_link == "hidden":
        hidden.symlink_to(secret)
    else:
        hidden.mkdir()
        if as_link == "stage":
            stage.symlink_to(secret)
        else:
            stage.mkdir()
            if as_link == "staged":
                (stage / "0").symlink_to(secret / CONFIG)
            else:
                (stage / "0").write_bytes(b"x")
        if as_link == "record":
            (hidden / "commit.json").symlink_to(secret / "adapter_config.json")
        else:
            (hidden / "commit.json").write_text(json.dumps(record))
    try:
        survives(folder, write=True)
        os.unlink(folder / "link")
        survives(folder, write=True)
    finally:
        shutil.rmtree(folder)


# Of whoever lives in the folder, beside the tree; none of it is known to a save of that tree.
OWN = {
    "uv.lock": b"# not JSON",
    "docker-compose.yml": b"services: {}\n",
    "notes.txt": b"x",
    f"mine/{CONFIG}": b"{}",
    f"mine/{WEIGHTS}": b"mine",
    f".lora_tree/stage-{'0' * 32}/notes": b"x",
}


@st.composite
def seemly(
    draw: st.DrawFn, places: tuple[str, ...] = (*OWN, "tree.yaml", "tree.lock", f"fr/{CONFIG}")
) -> Any:
    """A record that is well-formed, and of one tree more often than not; it guesses what it can't
    know.
    """
    place = st.sampled_from(places)
    was = st.none() | st.builds(
        lambda size, ns: {"size": size, "mtime_ns": ns}, st.integers(0, 20), st.integers()
    )
    digest = hashlib.sha256(b"x").hexdigest()
    moves = draw(st.lists(st.tuples(place, was), max_size=2, unique_by=lambda move: move[0]))
    taken = [to for to, _ in moves]
    deletes = draw(st.lists(st.tuples(place, was), max_size=3, unique_by=lambda gone: gone[0]))
    return {
        "version": 2,
        "stage": f"stage-{'0' * 32}",
        "moves": [{"to": to, "size": 1, "sha256": digest, "was": was} for to, was in moves],
        "deletes": [{"at": at, "was": was} for at, was in deletes if at not in taken],
    }


@DEAR
@given(record=seemly())
def test_a_record_touches_nothing_that_no_save_has_seen(
    zoo: Path, watch: None, record: Any
) -> None:
    folder = zoo / "inner"
    shutil.copytree(zoo / "fr", folder / "fr")
    for name, data in {
        **OWN,
        f".lora_tree/stage-{'0' * 32}/0": b"x",
        f".lora_tree/stage-{'0' * 32}/1": b"x",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / ".lora_tree/commit.json").write_text(json.dumps(record))
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    try:
        survives(folder, write=True)
        for name, data in OWN.items():
            assert (folder / name).read_bytes() == data
        for file, data in files.items():
            if "fr" in file.relative_to(folder).parts:
                assert file.read_bytes() == data, "it was there, and the record does not know it"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "place"),
    [
        ("move", f"../secret/{CONFIG}"),
        ("delete", f"../secret/{CONFIG}"),
        ("move", f"link/{CONFIG}"),
        ("delete", f"link/{CONFIG}"),
        ("stage is a link", f"fr/{CONFIG}"),
        ("staged file is a link", f"fr/{CONFIG}"),
        ("hidden is a link", f"fr/{CONFIG}"),
    ],
)
def test_a_record_that_is_right_but_for_one_thing(
    zoo: Path, watch: None, how: str, place: str
) -> None:
    folder, secret = zoo / "inner", zoo.parent / "secret"
    shutil.copytree(zoo / "fr", folder / "fr")
    data = b'{"planted": true}'
    stage, real = f"stage-{'0' * 32}", folder / "real"
    (real / stage).mkdir(parents=True)
    (real / stage / "0").write_bytes(data)
    move = {"to": place, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "was": None}
    deletes = [{"at": place, "was": None}] if how == "delete" else []
    record = {"version": 2, "stage": stage, "moves": [] if deletes else [move], "deletes": deletes}
    (real / "commit.json").write_text(json.dumps(record))
    hidden = folder / HIDDEN
    if how == "hidden is a link":
        hidden.symlink_to(real)
    else:
        real.rename(hidden)
    if how == "stage is a link":
        (hidden / stage).rename(folder / "real")
        (hidden / stage).symlink_to(folder / "real")
    if how == "staged file is a link":
        (hidden / stage / "0").rename(folder / "real")
        (hidden / stage / "0").symlink_to(folder / "real")
    if place.startswith("link"):
        (folder / "link").symlink_to(secret)
    try:
        before = (folder / "fr" / CONFIG).read_bytes()
        with pytest.raises(
            LoraTreeError, match=r"link|no file that a save writes|not the file that"
        ):
            lt.lock(folder)
        assert (folder / "fr" / CONFIG).read_bytes() == before
        survives(folder)
        assert (folder / "fr" / CONFIG).read_bytes() == before
    finally:
        shutil.rmtree(folder)


NAMES = ("fr", "FR", "a b", "con", "checkpoint-1", "..x", ".h", "é", "x.", "-", "0", "tree.lock")


@DEAR
@given(
    st.lists(st.sampled_from(NAMES), max_size=4),
    st.lists(st.sampled_from([CONFIG, WEIGHTS, "adapter_model.bin", "x"]), max_size=3),
    st.sampled_from(["file", "folder", "pipe", "loop", "dangling"]),
)
def test_folders_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], files: list[str], kind: str
) -> None:
    root = tmp_path_factory.mktemp("any")
    folder = root.joinpath(*names)
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        file = folder / name
        if file.exists() or file.is_symlink():
            continue
        match kind:
            case "file":
                file.write_bytes(b"{}")
            case "folder":
                file.mkdir()
            case "pipe":
                os.mkfifo(file)
            case "loop":
                file.symlink_to(folder)
            case _:
                file.symlink_to(root / "nowhere")
    survives(root, write=True)
    shutil.rmtree(root)


@pytest.mark.parametrize("name", ["tree.yaml", "tree.lock", ".lora_tree/commit.json"])
def test_links_in_place_of_our_own_files(zoo: Path, watch: None, name: str) -> None:
    folder = zoo / "inner"
    shutil.copytree(zoo / "fr", folder / "fr")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(zoo.parent / "secret/adapter_config.json")
    try:
        with pytest.raises(LoraTreeError, match="link"):
            lt.load(folder)
        survives(folder, write=True)
    finally:
        shutil.rmtree(folder)
