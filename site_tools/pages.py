"""Pages of the site that are not files in docs/: a hook of mkdocs, named in mkdocs.yml.

    README.md, CONTRIBUTING.md, CHANGELOG.md      become pages; their links to docs/ become links
                                                  within the site
    examples/*.ipynb                              become pages, with their stored outputs
    typer's declarations of the commands          become commands.md
    the public names                              become python-*.md, filled by mkdocstrings
    files of the repository that a page links to  are copied beside it

Law: no text stands in the repository twice for the site's sake.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebook_pages import page_of

import lora_tree
from lora_tree.cli.application import COMMANDS, application
from lora_tree.cli.examples import EXAMPLES

ROOT = Path(__file__).parent.parent

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files at the top of the repository → their pages."""

HIDDEN = re.compile(r"<!-- python\n.*?-->\n?", re.DOTALL)
"""Code that the tests run before a snippet, and that a page hides."""

LINK = re.compile(r"\]\((?P<to>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")

STYLE = """\
.md-grid { max-width: 80rem }      /* lines of code have 100 columns */
.md-typeset pre > code { font-size: .8em }
"""

ROOMS = {
    "algebra": "python-algebra.md",
    "export": "python-files.md",
    "folder": "python-files.md",
    "formats": "python-files.md",
    "training": "python-training.md",
    "runs": "python-training.md",
    "integrations": "python-files.md",
    "model": "python-models.md",
    "fit": "python-models.md",
    "engine": "python-models.md",
}
"""Room of the package → the page that its public names are on; all others are on the first page."""

TITLES = {
    "python-trees.md": "Trees and adapters",
    "python-models.md": "Models",
    "python-algebra.md": "Working on a tree",
    "python-files.md": "Files",
    "python-training.md": "Training",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the files that pages link to."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_inside(text)))
    files.append(File.generated(config, "commands.md", content="\n".join(_commands())))
    for page, names in _public_names().items():
        files.append(File.generated(config, page, content="\n".join(_objects(page, names))))
    files.append(File.generated(config, "site.css", content=STYLE))
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        text, pictures = page_of(notebook)
        files.append(File.generated(config, f"{notebook.stem}.md", content=_inside(text)))
        for name, content in pictures.items():
            files.append(File.generated(config, f"pictures/{name}", content=content))
    for path in sorted(_linked_files(config)):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out code that only tests read, and point links out of docs/ to copies at hand."""
    return HIDDEN.sub("", markdown).replace("](../", "](")


def _inside(text: str) -> str:
    """Return a page of the top folder with its links as they are within the site."""

    def moved(link: re.Match[str]) -> str:
        to = link["to"].removeprefix("docs/")
        if to.endswith(".ipynb"):
            to = f"{Path(to).stem}.md"
        return f"]({PAGES.get(to, to)}{link['anchor'] or ''})"

    return LINK.sub(moved, text).replace('="docs/', '="')  # of pictures, too


def _linked_files(config: MkDocsConfig) -> Iterator[str]:
    """Yield the files outside of docs/ that its pages link to, relative to the repository."""
    for page in Path(config.docs_dir).glob("*.md"):
        for link in LINK.finditer(page.read_text(encoding="utf-8")):
            if link["to"].startswith("../") and not link["to"].endswith(".md"):
                yield link["to"].removeprefix("../")


# ---------------------------------------------------------------------- commands
def _commands() -> Iterator[str]:
    """Yield the page of all commands, from their declarations."""
    yield "# Commands\n"
    yield "Every command has `--help`. A folder of a tree is called `zoo/` here.\n"
    for name in COMMANDS:
        # An application imports only the command that it is asked for, so that it starts quickly.
        group: Any = typer.main.get_command(application([name]))
        command = group.commands[name]
        context = group.make_context("lora-tree", [name], resilient_parsing=True)
        own = type(context)(command, info_name=name, parent=context)
        yield f"## lora-tree {name}\n"
        yield f"{_first(command.help)}\n"
        yield "```sh"
        yield " ".join(command.get_usage(own).split()).removeprefix("Usage: ")
        yield from EXAMPLES.get(name, ())
        yield "```\n"
        rows = [row for row in map(_row, command.get_params(own)) if row]
        if rows:
            yield "| option | |"
            yield "|---|---|"
            yield from rows
            yield ""


def _first(text: str | None) -> str:
    return inspect.cleandoc(text or "").partition("\n\n")[0].replace("\n", " ")


def _row(parameter: Any) -> str:
    """Return a row of the table of options; empty for ``--help``, which every command has."""
    if "--help" in parameter.opts:
        return ""
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [(parameter.metavar or parameter.name.upper()).strip("[]")]
    said = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
    default = getattr(parameter, "default", None)
    if isinstance(default, (int, float, str)) and not isinstance(default, bool) and default != "":
        said = f"{said} Default: `{default}`."
    return f"| {', '.join(f'`{name}`' for name in names)} | {said} |"


# ---------------------------------------------------------------------- Python
def _public_names() -> dict[str, list[tuple[str, str]]]:
    """Return page → (public name, where it is defined), in alphabetical order."""
    found: dict[str, list[tuple[str, str]]] = {page: [] for page in TITLES}
    for name in sorted(lora_tree.__all__, key=str.lower):
        value = getattr(lora_tree, name)
        module = getattr(value, "__module__", "")
        if not inspect.isclass(value) and not inspect.isfunction(value):
            continue  # a type alias or a constant: the pages that use it say what it is
        room = module.split(".")[1]
        page = ROOMS.get(room, "python-trees.md")
        found[page].append((name, f"{module}.{value.__qualname__}"))
    return found


def _objects(page: str, names: list[tuple[str, str]]) -> Iterator[str]:
    yield f"# {TITLES[page]}\n"
    yield "Each name is an attribute of `lora_tree`.\n"
    for _, where in names:
        yield f"::: {where}\n"
