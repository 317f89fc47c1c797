"""The README and every page of docs/ tell the truth: what they show runs, and prints what they say
it prints.

    ```python … ```             runs, as code or as a session with >>>
    <!-- python … -->           runs too: what the page needs first and a reader does not
    ``` $ lora-tree … ```       runs, and its output is compared

The blocks of a page run in order, in an empty folder of their own.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_tree
from lora_tree.cli import main
from lora_tree.cli.application import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.is_file()
]
BLOCK = re.compile(
    r"^```python\n(.*?)^```$|^<!-- python\n(.*?)^-->$|^```\n(\$ lora-tree .*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def blocks(page: str) -> Iterator[tuple[int, str]]:
    """(line, code) of every snippet of a page, in order."""
    for match in BLOCK.finditer(page):
        (code,) = (group for group in match.groups() if group is not None)
        yield page.count("\n", 0, match.start()) + 2, code


def run(code: str, name: str, line: int, namespace: dict[str, object]) -> None:
    """Run one snippet as a reader would: plain code, a session with ``>>>``, or commands with their
    output.
    """
    if code.startswith("$ "):
        run_commands(code)
        return
    if ">>> " not in code:
        exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)
        return
    session = doctest.DocTestParser().get_doctest(code, namespace, name, name, line - 1)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        failed = (
            doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            .run(session, clear_globs=False)
            .failed
        )
    namespace.update(session.globs)
    assert not failed, report.getvalue()


# Losses and hashes depend on the versions of other packages; a page shows those of one run.
VARIES = re.compile(r"\b\d+\.\d{3}\b|\b[0-9a-f]{12}(?=…)")


def run_commands(text: str) -> None:
    """Run ``$ lora-tree …`` as a shell would, and compare what it prints; a page calls the folder
    /data.

    A page may break a long line, and leave out lines with a line of ``…``.
    """
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(),
            pytest.raises(SystemExit),
        ):
            warnings.simplefilter("default")
            main(shlex.split(command)[1:])
        got = " ".join(printed.getvalue().replace(str(Path.cwd()), "/data").split())
        wanted = [
            " ".join(piece.split()) for piece in re.split(r"^…$", expected, flags=re.MULTILINE)
        ]
        pattern = ".*".join(re.escape(VARIES.sub("0", piece)) for piece in wanted)
        found = VARIES.sub("0", got)
        assert re.fullmatch(pattern, found), f"$ {command}\n{printed.getvalue()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__snippet__"}
    for line, code in blocks(page.read_text()):
        run(code, str(page), line, namespace)


def test_every_command_is_in_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS if f"lora-tree {name}" not in text] == []


# What is longer than this does not fit beside code in an editor, or in a diff.
MOST_COLUMNS = 120
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$|^<!--.*?-->$", re.DOTALL | re.MULTILINE)
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md"]


def anchors(page: Path) -> set[str]:
    """The names by which links reach a page's headings, made as GitHub makes them."""
    text = FENCED.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: no file {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading {anchor}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_prose_of_a_page_fits_beside_code(page: Path) -> None:
    """Headings of benchmarks are printed by a command, and the rows of a table can't be broken."""
    prose = FENCED.sub("", page.read_text()).splitlines()
    lines = [line for line in prose if not line.startswith(("|", "#"))]
    assert not [line for line in lines if len(line) > MOST_COLUMNS]


def test_the_harness_itself_notices(tmp_path: Path) -> None:
    page = (
        "# A page\n<!-- python\nx = 1\n-->\n```python\nassert x == 1\ny = 2\n```\n"
        "```python\n>>> x + y\n3\n```\n"
    )
    namespace: dict[str, object] = {}
    for line, code in blocks(page):
        run(code, "page", line, namespace)
    assert [line for line, _ in blocks(page)] == [3, 6, 10]
    with pytest.raises(AssertionError, match=r"(?s)Expected:.*4.*Got:.*3"):
        run(">>> x + y\n4\n", "page", 1, namespace)
    version = f"$ lora-tree --version\nlora-tree {lora_tree.__version__}\n"
    run(version, "page", 1, namespace)
    run("$ lora-tree --version\nlora-tree\n…\n", "page", 1, namespace)
    with pytest.raises(AssertionError, match=r"(?s)\$ lora-tree --version.*lora-tree 0"):
        run("$ lora-tree --version\nlora-tree 99\n", "page", 1, namespace)
