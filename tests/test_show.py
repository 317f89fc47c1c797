"""`lora-tree show` of small, large, stale, broken and hostile trees: as a table, as JSON and as a
picture.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import zoo as trees
from sampling import sampled, slow

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.drawn.drawing import arrange_nodes

if sys.platform != "win32":
    import fcntl
    import pty
    import struct
    import termios

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "\x1b]52;c;cm0gLXJmIH4=\x07</text><script>alert(1)</script>"


def show(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with warnings.catch_warnings(), pytest.raises(SystemExit) as exit_:
        warnings.simplefilter("default")
        main(["show", *map(str, arguments)])
    printed = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, printed.out, printed.err


def names(out: str) -> list[str]:
    """The names behind the guides, in order."""
    return [
        line.split("── ")[1].split("  ")[0].strip() for line in out.splitlines() if "──" in line
    ]


def on_a_terminal(columns: int, *arguments: str | Path) -> str:
    """What a terminal of so many columns is sent."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    # COLUMNS and NO_COLOR of the environment would count more than the terminal.
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_tree.cli", "show", *map(str, arguments)],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.DEVNULL,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # Linux tells the end like this
            break
        if not part:
            break
        said += part
    os.close(master)
    process.wait(60)
    return said.decode().replace("\r\n", "\n")


# ---------------------------------------------------------------------- choosing
def test_a_node_is_shown_with_what_is_below_it(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = show(capsys, zoo, "fr")
    assert (code, names(out)) == (0, ["fr", "legal", "medical"])
    assert "3 of 6 nodes over org/model" in out
    assert names(show(capsys, zoo, "fr/legal")[1]) == ["fr/legal"]


def test_an_earlier_version_is_shown_in_its_place(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = lt.load(zoo)
    was = tree.adapter("fr/legal")
    assert was is not None
    tree.update("fr/legal", weight=0.5)
    tree.save(zoo)
    code, out, _ = show(capsys, zoo, "fr/legal@1", "--json")
    told = json.loads(out)
    assert (code, told["versions"]) == (0, ["fr/legal@1"])
    (line,) = told["nodes"]
    assert (line["path"], line["weight"], line["bytes"]) == ("fr/legal", 0.8, was.nbytes)
    tree.remove("fr", recursive=True)
    tree.save(zoo)
    _, _, err = show(capsys, zoo, "fr/legal@1")
    assert "add --on fr@1" in err
    assert "restore" not in err
    _, out, _ = show(capsys, zoo, "fr/legal@1", "--on", "fr@1")
    assert names(out) == ["fr/legal"]
    assert out.startswith(f"{zoo} with fr/legal@1, fr@1 ")


def test_levels_are_hidden_and_counted(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = show(capsys, zoo, "--depth", "1")
    assert names(out) == ["de", "fr (+2)", "grp (+1)"]
    assert "3 lines are hidden" in out
    assert "6 nodes over org/model" in out  # the totals are of the whole tree


def test_a_pattern_or_a_word_chooses_nodes_and_draws_those_above_them(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = show(capsys, zoo, "--filter", "fr/*")
    assert names(out) == ["fr", "legal", "medical"]
    assert "2 of 6 nodes" in out
    assert names(show(capsys, zoo, "--filter", "egal")[1]) == ["fr", "legal"]
    told = json.loads(show(capsys, zoo, "--filter", "fr/*", "--json")[1])
    assert [node["path"] for node in told["nodes"]] == ["fr/legal", "fr/medical"]


def test_siblings_are_sorted_from_the_largest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = lt.AdapterTree()
    for path, weight in {"a": 1.0, "b": 3.0, "c": 2.0, "c/x": 1.0, "c/y": 5.0}.items():
        tree.add(path, adapter=trees.adapter(1), weight=weight)
    tree.save(tmp_path / "zoo")
    _, out, _ = show(capsys, tmp_path / "zoo", "--sort", "weight")
    assert names(out) == ["b", "c", "y", "x", "a"]
    _, out, _ = show(capsys, tmp_path / "zoo", "--sort", "bytes")
    assert names(out) == ["a", "b", "c", "x", "y"]  # all alike: by name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("frr",), r"no node 'frr' in the tree; did you mean 'fr'?"),
        (("--filter", "legl"), "no path matches --filter 'legl'"),
        (("--filter", "x/*"), "a pattern is like 'fr/*'"),
    ],
)
def test_a_typo_says_what_to_do(
    zoo: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = show(capsys, zoo, *arguments)
    assert (code, out) == (1, "")
    assert said in err


# ---------------------------------------------------------------------- the drawing
def oracle(paths: set[str], depth: int) -> list[tuple[str, int]]:
    """(path, nodes hidden below it), slowly: for each path look at all the others."""
    shown = [path for path in paths if len(path.split("/")) <= depth]
    shown.sort(key=lambda path: path.split("/"))
    found = []
    for path in shown:
        below = [other for other in paths if other.startswith(f"{path}/")]
        hidden = [other for other in below if len(other.split("/")) > depth]
        mine = [other for other in hidden if "/".join(other.split("/")[:depth]) == path]
        found.append((path, len(mine)))
    return found


def test_every_node_is_drawn_once_or_counted_once() -> None:
    draw = random.Random(0)
    for _ in range(50):
        paths: set[str] = set()
        for _ in range(draw.randrange(1, 40)):
            above = draw.choice(["", *sorted(paths)])
            name = draw.choice("abcde") + draw.choice("-x0")
            paths.add(f"{above}/{name}".lstrip("/"))
        for depth in range(1, 6):
            drawn = arrange_nodes(paths, depth=depth)
            assert [(node.path, node.hidden) for node in drawn] == oracle(paths, depth)
            assert len(drawn) + sum(node.hidden for node in drawn) == len(paths)


def test_guides_join_a_node_to_its_siblings() -> None:
    drawn = arrange_nodes(["a", "a/b", "a/b/c", "a/d", "e", "lost/deep/x"])
    assert [node.guide + node.name for node in drawn] == [
        "├── a",
        "│   ├── b",
        "│   │   └── c",
        "│   └── d",
        "├── e",
        "└── lost/deep/x",
    ]


def test_what_must_be_seen_is_drawn_however_deep_it_lies() -> None:
    paths = [f"n{i}" for i in range(5)] + ["n4/a", "n4/a/b", "n1/a"]
    drawn = arrange_nodes(paths, limit=6, always=["n4/a/b"])
    assert [node.path for node in drawn] == ["n0", "n1", "n2", "n4", "n4/a", "n4/a/b"]


# ---------------------------------------------------------------------- a terminal
@slow
@pytest.mark.skipif(sys.platform == "win32", reason="opens a pseudo-terminal")
def test_ten_thousand_nodes_stay_usable(tmp_path: Path) -> None:
    head = ["version: 1", "base: org/model", "defaults: {r: 4, target_modules: [q_proj]}", "tree:"]
    lines = list(head)
    for i in range(100):
        lines += [f"  n{i:02d}:", "    r: 8", "    children:"]
        lines += [f"      c{j:02d}: {{r: 8}}" for j in range(99)]
    (tmp_path / "tree.yaml").write_text("\n".join(lines) + "\n")
    began = time.monotonic()
    said = on_a_terminal(100, tmp_path)
    assert time.monotonic() - began < 60
    assert "10,000 nodes over org/model" in said
    assert "9,900 lines are hidden" in said
    assert said.count("(+99)") == 100
    assert len(said.splitlines()) < 110


@pytest.mark.skipif(sys.platform == "win32", reason="opens a pseudo-terminal")
@pytest.mark.parametrize("columns", sampled([60, 80, 100, 160], [60, 100]))
def test_no_line_of_the_table_is_wrapped(zoo: Path, columns: int) -> None:
    tree = trees.opened(zoo)
    tree.update("fr", adapter=trees.adapter(9))
    tree.save(zoo)
    said = on_a_terminal(columns, zoo)
    assert names(said) == ["de", "fr", "legal", "medical", "grp", "x"]
    if columns >= 80:
        assert said.count("stale: parent fr changed (weights)") == 2
    lines = said.splitlines()
    (total,) = (i for i, line in enumerate(lines) if "6 nodes over" in line)
    assert total == 1 + 6  # the heading and a line for each node


@pytest.mark.skipif(sys.platform == "win32", reason="opens a pseudo-terminal")
def test_colours_are_for_terminals_alone(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (zoo / "fr/medical/adapter_model.safetensors").write_bytes(b"x")
    red = "\x1b[31m"
    said = on_a_terminal(100, zoo)
    assert red in said
    assert "medical" in said.split(red)[1].splitlines()[0]
    code, out, _ = show(capsys, zoo)
    assert code == 1
    assert "\x1b" not in out
    assert "1 broken" in out
    (row,) = (line for line in out.splitlines() if "── medical" in line)
    assert "unlocked: adapter_model.safetensors has 1 byte," in row


# ---------------------------------------------------------------------- stale
def test_a_stale_node_says_in_a_few_words_which_ancestor_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = lt.AdapterTree(base="org/model")
    for i, path in enumerate(("fr", "fr/legal", "fr/legal/eu", "de", "de/x")):
        tree.add(path, adapter=trees.adapter(i))
    tree.save(tmp_path / "zoo")
    tree = lt.load(tmp_path / "zoo")
    tree.update("fr", adapter=trees.adapter(9))
    tree.update("de", weight=0.5)
    tree.save(tmp_path / "zoo")
    _, out, _ = show(capsys, tmp_path / "zoo")
    told = {}
    for line in out.splitlines():
        name, is_stale, reason = line.rpartition("── ")[2].partition("stale: ")
        if is_stale:
            told[name.split()[0]] = reason.strip()
    assert told == {
        "legal": "parent fr changed (weights)",
        "eu": "ancestor fr changed (weights)",
        "x": "parent de changed (weight 1.0 → 0.5)",
    }
    tree = trees.opened(tmp_path / "zoo")
    tree.move("fr/legal/eu", "eu")
    tree.save(tmp_path / "zoo")
    _, out, _ = show(capsys, tmp_path / "zoo", "eu")
    assert "stale: moved to the top, fr is gone from above it" in out


# ---------------------------------------------------------------------- the picture
def test_the_picture_shows_every_node_and_obeys_no_name(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = show(capsys, zoo, "--svg", tmp_path / "tree.svg")
    drawn = [part.text for part in ElementTree.parse(tmp_path / "tree.svg").iter(f"{SVG}text")]
    assert code == 0
    for name in ("de", "fr", "legal", "medical", "grp", "x"):
        assert name in drawn
    assert any("r 2" in (text or "") for text in drawn)
    code, out, _ = show(capsys, zoo, "--svg", tmp_path / "again.svg", "--json")
    assert (code, json.loads(out)["base"]) == (0, "org/model")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "tree.svg").read_bytes()
    odd = tmp_path / "<script>alert(1)<&script>"
    zoo.rename(odd)
    (odd / HOSTILE.replace("/", "-")).mkdir()
    trees.adapter(7).save(odd / HOSTILE.replace("/", "-"))
    show(capsys, odd, "--svg", tmp_path / "tree.svg")
    root = ElementTree.parse(tmp_path / "tree.svg").getroot()
    kinds = {part.tag.removeprefix(SVG) for part in root.iter()}
    assert kinds == {"svg", "rect", "text", "polyline", "title"}
    used = {name for part in root.iter() for name in part.attrib}
    assert not {name for name in used if name.startswith("on") or "href" in name}
    assert "\x1b" not in (tmp_path / "tree.svg").read_text()
    assert any("<script>alert(1)" in (part.text or "") for part in root.iter())


def test_a_picture_in_a_missing_folder_names_the_path_that_was_given(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = show(capsys, zoo, "--svg", "no such/tree.svg")
    assert code == 1
    assert err.split("error: ")[1:] == [
        "no such/tree.svg: can't write it: there is no folder no such\n"
        "  create the folder first: mkdir -p 'no such'\n"
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["show", "ZOO", "--svg"],
        ["similar", "ZOO", "--picture"],
        ["runs", "ZOO", "--picture"],
        ["eval", "ZOO", "--data", "rows.jsonl", "--base", "base", "--picture"],
        ["train", "ZOO", "fr", "--data", "rows.jsonl", "--base", "base", "--picture"],
    ],
    ids=lambda command: command[0],
)
def test_a_picture_named_for_another_format_is_refused_before_the_work(
    command: list[str], zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tree.png"
    arguments = [str(zoo) if word == "ZOO" else word for word in command]
    with pytest.raises(SystemExit) as left:
        main([*arguments, str(file)])
    assert left.value.code == 1
    assert capsys.readouterr().err.split("error: ")[1:] == [
        f"{file}: a picture is written as SVG\n"
        f"  name a file that ends in .svg: {tmp_path / 'tree.svg'}\n"
    ]
    assert not file.exists()


def test_a_picture_that_the_system_refuses_is_named_as_it_was_given(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tree.svg").mkdir()
    code, _, err = show(capsys, zoo, "--svg", tmp_path / "tree.svg")
    assert code == 1
    assert err == f"error: {tmp_path}/tree.svg: can't write it: Is a directory\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree.svg", "zoo"]


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--data", "no.jsonl", "--picture"),
        ("train", "--data", "no.jsonl", "--picture"),
        ("similar", "--picture"),
        ("explore", "--html"),
    ],
    ids=lambda words: str(words[0]),
)
def test_a_command_that_works_for_minutes_refuses_a_missing_folder_first(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The tree does not exist either: a command that opened it first would name the tree.
    command, *rest = words
    with pytest.raises(SystemExit, match="1"):
        main([command, str(tmp_path / "zoo"), *rest, str(tmp_path / "no" / "out.svg")])
    said = capsys.readouterr().err
    assert f"{tmp_path}/no/out.svg: can't write it: there is no folder {tmp_path}/no" in said
