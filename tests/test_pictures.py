"""The pictures of the README: real output, well-formed, and nothing in them that runs or loads."""

from __future__ import annotations

import importlib
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
import zoo as small

from lora_tree.cli import main

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the site's tools, whose modules may be imported by name."""
    monkeypatch.syspath_prepend(ROOT / "site_tools")
    return ROOT / "site_tools"


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def words(picture: str) -> list[str]:
    """The text of each line of a session."""
    lines = ET.fromstring(picture).iter(f"{SVG}text")
    return [" ".join(piece.text or "" for piece in line) for line in lines]


def test_a_session_shows_what_a_command_printed(tools: Path, tmp_path: Path) -> None:
    small.tree().save(tmp_path / "zoo")
    terminal = module("terminal")
    shown = terminal.run_in_terminal("lora-tree show zoo", tmp_path, Path(sys.executable).parent)
    assert "\x1b[" in shown.output  # a terminal gets colours
    lines = words(terminal.session([shown]))
    assert lines[0] == "$ lora-tree show zoo"
    for path in small.tree().paths():
        name = path.rpartition("/")[2]
        assert any(re.search(rf"─ {name}\b", line) for line in lines), name
    assert str(tmp_path) not in shown.output


def test_a_session_escapes_wraps_and_waits(tools: Path) -> None:
    terminal = module("terminal")
    long = "x" * (terminal.COLUMNS + 5)
    shown = terminal.Shown("echo", f"\x1b[31m<script>&\x1b[0m  apart\n{long}\n")
    picture = terminal.session([shown, shown])
    assert "<script>" not in picture
    lines = words(picture)
    assert lines[:4] == ["$ echo", "<script>& apart", "x" * terminal.COLUMNS, "xxxxx"]
    delays = [float(found) for found in re.findall(r"animation-delay:([\d.]+)s", picture)]
    assert delays == sorted(delays)
    assert len(set(delays)) == 4  # two commands, and the output of each
    starts = re.findall(r'<tspan x="([\d.]+)"[^>]*>(?:&lt;script&gt;&amp;|apart)<', picture)
    first, apart = starts[:2]
    columns = (float(apart) - float(first)) / terminal.CHARACTER_WIDTH
    assert columns == pytest.approx(len("<script>&  "))


def test_no_light_colour_is_left_in_the_dark(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.tree().save(tmp_path / "zoo")
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path / "zoo"), "--svg", str(tmp_path / "tree.svg")])
    light = (tmp_path / "tree.svg").read_text()
    dark = module("pictures").in_the_dark(light)
    used = set(re.findall(r'(?:fill|stroke)="(#\w+)"', light))
    assert used
    assert not used & set(re.findall(r'(?:fill|stroke)="(#\w+)"', dark))
    assert words(dark) == words(light)


@pytest.mark.parametrize("name", ["tree-light", "tree-dark", "terminal"])
def test_a_picture_that_is_kept_loads_nothing_and_is_small(name: str) -> None:
    text = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text()
    tags = {element.tag.removeprefix(SVG) for element in ET.fromstring(text).iter()}
    assert tags <= {"svg", "rect", "text", "tspan", "polyline", "style", "title"}
    assert not re.search(r"href|url\(|@import", text)
    assert len(text) < 20_000


def test_the_readme_names_pictures_that_are_there() -> None:
    sources = re.findall(r'src(?:set)?="([^"]+)"', (ROOT / "README.md").read_text())
    assert len(sources) == 3
    for source in sources:
        assert (ROOT / source).is_file()
