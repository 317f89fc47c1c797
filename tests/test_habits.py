"""The habits that no linter knows: imports point inward, the map is complete, data is never code,
laws have tests.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_tree

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_tree"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MODULES = {
    ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): source
    for source in SOURCES
}

# From the inside out. A module may import what stands before it in its own ring, and what its ring
# may see.
RINGS = {
    "values": [
        "errors",
        "svg",
        "given",
        "callers",
        "base_names",
        "budget",
        "patterns",
        "weights",
        "lowrank",
        "overlay",
        "storage",
        "carried",
        "override",
        "nesting",
        "adapter",
        "nonfinite",
        "combining",
        "node_names",
        "spec_errors",
        "spec",
        "provenance",
        "blend",
        "spelling",
        "node",
        "attached_models",
        "flattening",
        "tree",
        "algebra",
    ],
    "files": ["system", "formats", "folder"],
    "binding": [
        "sites",
        "assembly",
        "renaming",
        "engine",
        "training",
        "cache",
        "path_model",
        "path_models",
        "attachment",
        "model",
        "fit",
    ],
    "edges": ["extras", "export", "runs", "drawn", "integrations", "demo", "explore", "cli"],
}
SEES = {
    "values": [],
    "files": ["values"],
    "binding": ["values"],
    "edges": ["values", "files", "binding"],
}
ENGINE = [
    *("unpromised", "upload", "slab", "hook", "marks", "last_used", "ledger", "plan"),
    *("arithmetic", "largest", "packing", "view", "host", "answers"),
    "kernels",
    "rows",
    "sidepaths",
    *("finite", "fresh", "binder", "planner"),
    "switching",
    "routing",
    *("prepared_segments", "behaviour", "blocks", "prepared", "stage", "unmerged"),
]
"""The engine's rooms and files, each of which imports what stands before it."""
FOLDER = [
    *("bounds", "disk", "atomic_folders", "problem"),
    *("hub_name", "yamlfile", "lockfile", "trained", "history_log"),
    "transactions",
    "adapters",
    "reading",
    "past",
    "saving",
    "transfer",
    "folder_storage",
]
"""The rooms and files of the folder, in the same way."""
INTEGRATIONS = [
    *("trackers", "hub", "diffusers"),
    "flat_cache",
    "vllm",
    "trainers",
    *("transformers", "trl"),
]
"""The integrations' rooms and files, in the same way."""
MAP = {"__init__", "__main__", "surface"}
OPTIONAL = {
    "cli",
    "demo",
    "integrations",
}  # where an import inside a function is how an extra stays optional


@functools.cache
def parsed(source: Path) -> ast.Module:
    """A file's syntax tree, which many of these tests read."""
    return ast.parse(source.read_text())


def none_of(problems: list[str]) -> None:
    """Fail with all problems of a rule at once, one a line."""
    assert not problems, "\n" + "\n".join(problems)


def at(source: Path, line: int) -> str:
    """``lora_tree/tree.py:12``."""
    return f"{source.relative_to(ROOT)}:{line}"


def room(source: Path) -> str:
    """The first name below the package: ``lora_tree/formats/peft.py`` → ``formats``."""
    return source.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def imported(source: Path) -> tuple[tuple[str, int], ...]:
    """(absolute module name, line) of all that a file imports, also inside its functions."""
    return tuple(imports(source, parsed(source)))


def imports(source: Path, node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what a part of a file imports, but for what only a type checker reads."""
    if (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    ):
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, node.lineno
    elif isinstance(node, ast.ImportFrom):
        here = ["lora_tree", *source.relative_to(PACKAGE).parent.parts]
        start = here[: len(here) - node.level + 1] if node.level else []
        target = [*start, *(node.module or "").split(".")] if node.module else start
        for alias in node.names:
            whole = ".".join([*target, alias.name])
            yield (whole if _is_module(whole) else ".".join(target)), node.lineno
    for child in ast.iter_child_nodes(node):
        yield from imports(source, child)


@functools.cache
def _is_module(name: str) -> bool:
    if not name.startswith("lora_tree."):
        return False
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def declared() -> set[str]:
    """Every distribution that pyproject.toml names, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + [
        d for extra in project["optional-dependencies"].values() for d in extra
    ]
    return {re.split(r"[\[<>=!~; ]", spec)[0].lower().replace("-", "_") for spec in named}


# ---------------------------------------------------------------------- layering
def test_every_room_has_its_place() -> None:
    rooms = {room(source) for source in SOURCES} - MAP
    unknown = rooms - {name for ring in RINGS.values() for name in ring}
    assert not unknown, f"give {sorted(unknown)} a place in RINGS"


def test_imports_point_inward() -> None:
    problems = []
    for source in SOURCES:
        mine = room(source)
        if mine in MAP:
            continue  # the map imports every room
        ring = next(ring for ring, rooms in RINGS.items() if mine in rooms)
        inner = RINGS[ring][: RINGS[ring].index(mine) + 1]
        allowed = set(inner)
        for seen in SEES[ring]:
            allowed.update(RINGS[seen])
        if ring == "edges":
            allowed.add("__init__")
        for name, line in imported(source):
            parts = name.split(".")
            theirs = parts[1] if len(parts) > 1 else "__init__"
            if parts[0] == "lora_tree" and theirs not in allowed:
                problems.append(
                    f"{at(source, line)}: {mine} imports {theirs}, which is further out"
                )
    none_of(problems)


@pytest.mark.parametrize(
    ("outer", "order"),
    [("engine", ENGINE), ("folder", FOLDER), ("integrations", INTEGRATIONS)],
)
def test_imports_inside_a_room_point_inward(outer: str, order: list[str]) -> None:
    package = f"lora_tree.{outer}"
    places = {name: place for place, name in enumerate(order)}
    # The room's own map imports all of it, so it is further out than every file.
    places[package] = len(order)
    problems = []
    found = set()
    for source in (PACKAGE / outer).rglob("*.py"):
        mine = source.relative_to(PACKAGE / outer).with_suffix("").parts[0]
        if mine == "__init__":
            continue
        found.add(mine)
        assert mine in places, f"give {mine} a place in {outer.upper()}"
        for name, line in imported(source):
            theirs = name.removeprefix(f"{package}.").split(".")[0]
            if name == package:
                theirs = package
            elif not name.startswith(f"{package}."):
                continue
            if places[theirs] > places[mine]:
                problems.append(
                    f"{at(source, line)}: {mine} imports {theirs}, which is further out"
                )
    none_of(problems)
    assert found == set(order), f"{outer.upper()} names what is not there"


def test_imports_stand_at_the_top() -> None:
    problems = []
    for source in SOURCES:
        if room(source) in OPTIONAL:
            continue
        for function in ast.walk(parsed(source)):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                for name, line in imports(source, function):
                    if name.startswith("lora_tree"):
                        problems.append(f"{at(source, line)}: imports {name} inside a function")
    none_of(problems)


def test_every_third_party_import_is_declared() -> None:
    owners = importlib.metadata.packages_distributions()
    known = declared()
    problems = []
    for source in SOURCES:
        for name, line in imported(source):
            top = name.split(".")[0]
            if top == "lora_tree" or top in sys.stdlib_module_names:
                continue
            named = {owner.lower().replace("-", "_") for owner in owners.get(top, [top])}
            if not named & known:
                problems.append(f"{at(source, line)}: {top} is not in pyproject.toml")
    none_of(problems)


def loaded_after(code: str) -> set[str]:
    """The top-level packages that a new process has imported after some code."""
    code = f"import sys\n{code}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_importing_the_package_stays_light() -> None:
    heavy = {"transformers", "peft", "accelerate", "huggingface_hub", "tokenizers", "typer", "rich"}
    assert not (heavy | {"torch"}) & loaded_after("import lora_tree; lora_tree.__version__")
    used = loaded_after("import lora_tree as lt; lt.AdapterTree(); lt.errors.SpecError('x')")
    assert "torch" in used
    assert not heavy & used


def test_a_value_that_is_imported_alone_finds_its_files() -> None:
    code = "from lora_tree.tree import AdapterTree; from lora_tree.errors import FolderError\n"
    loaded_after(code + "import tempfile; AdapterTree().save(tempfile.mkdtemp() + '/zoo')")


def test_the_version_is_said_once() -> None:
    assert importlib.metadata.version("lora_tree") == lora_tree.__version__


# ---------------------------------------------------------------------- the map
def in_order(names: list[str]) -> list[str]:
    """CONSTANTS, then Classes, then functions, each by name; ruff's RUF022 keeps the same order."""
    return sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))


def test_the_map_is_complete_and_sorted() -> None:
    public = {
        name
        for name in dir(lora_tree)
        if not name.startswith("_") and not isinstance(getattr(lora_tree, name), types.ModuleType)
    }
    assert set(lora_tree.__all__) == public - {"Any", "TYPE_CHECKING"}
    assert lora_tree.__all__ == in_order(lora_tree.__all__)
    everything: dict[str, object] = {}
    exec("from lora_tree import *", everything)
    assert public - {"Any", "TYPE_CHECKING"} <= set(everything)
    with pytest.raises(AttributeError, match="module 'lora_tree' has no attribute 'lode'"):
        lora_tree.lode  # noqa: B018


def test_every_all_is_sorted_and_true() -> None:
    problems = []
    for name in MODULES:
        if name.endswith("__main__"):
            continue
        if name == "lora_tree.integrations.trl" and importlib.util.find_spec("trl") is None:
            continue  # it has an environment of its own: make test-trl
        module = importlib.import_module(name)
        names = list(getattr(module, "__all__", []))
        if names != in_order(names):
            problems.append(f"{name}: __all__ is not sorted")
        missing = [each for each in names if not hasattr(module, each)]
        if missing:
            problems.append(f"{name}: __all__ lists {missing}, which it does not have")
    none_of(problems)


@functools.cache
def declared_in(module: str) -> set[str]:
    """The names in a module's ``__all__``, without importing it."""
    names: set[str] = set()
    for node in parsed(MODULES[module]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            with contextlib.suppress(ValueError):  # the map's is put together from its rooms
                names.update(ast.literal_eval(node.value))
    return names


def taken_from_others(source: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (module, name, line) of everything that a file takes from other modules of the package:
    ``from .disk import copy``, and ``disk.copy`` after ``from . import disk``.
    """
    tree = parsed(source)
    bound: dict[str, str] = {}
    here = source.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        start = here[: len(here) - node.level + 1] if node.level else ()
        module = ".".join([*start, *(node.module or "").split(".")]).rstrip(".")
        for alias in node.names:
            whole = f"{module}.{alias.name}"
            if whole in MODULES:
                bound[alias.asname or alias.name] = whole
            elif module in MODULES and alias.name != "*":
                yield module, alias.name, node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = bound.get(node.value.id, "")
            if module and f"{module}.{node.attr}" not in MODULES:
                yield module, node.attr, node.lineno


def test_what_other_modules_take_is_in_all() -> None:
    """A reader sees from ``__all__`` which names of a module others depend on."""
    problems = []
    for source in SOURCES:
        for module, name, line in taken_from_others(source):
            if not name.startswith("__") and name not in declared_in(module):
                where = f"{at(source, line)}: takes {name} from {module}"
                problems.append(f"{where}, which does not have it in __all__")
    none_of(problems)


# ---------------------------------------------------------------------- one name, one idea
def names_of(source: Path) -> Iterator[str]:
    """Yield the names of a file's classes, also of private ones, and of its public functions."""
    for node in parsed(source).body:
        if isinstance(node, ast.ClassDef):
            yield node.name.lstrip("_")
            continue
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function and not node.name.startswith("_"):
            yield node.name


def test_no_two_classes_or_public_functions_share_a_name() -> None:
    """A reader who searches for a name finds one thing; two would need their files' names too."""
    files: dict[str, list[str]] = {}
    for source in SOURCES:
        for name in names_of(source):
            files.setdefault(name, []).append(str(source.relative_to(PACKAGE)))
    shared = {name: where for name, where in files.items() if len(where) > 1}
    assert not shared, "\n".join(f"{name}: {', '.join(shared[name])}" for name in sorted(shared))


# ---------------------------------------------------------------------- texts in pieces
PIECE = re.compile(r"""(\s*(?:\w+ ?= ?|return )?)(f?)(["'])((?:(?!\3)[^\\]|\\.)*)\3(,?)""")
SHORT = 20


def odd_pieces(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, reason) for a text that goes on over several lines, and is cut oddly."""
    found = [PIECE.fullmatch(line) for line in lines]
    for number, (one, other) in enumerate(itertools.pairwise(found), start=1):
        if one is None or other is None or one[5] or other[1].strip():
            continue
        for line, piece in ((number, one), (number + 1, other)):
            if piece[2] and "{" not in piece[4].replace("{{", ""):
                yield line, "marked f, and has no placeholder"
        joined = len("".join(one.groups()[:4])) + len("".join(other.groups()[3:])) + 1
        is_line = one[4].endswith(r"\n")  # of several, as a program or a file has them
        if min(len(one[4]), len(other[4])) < SHORT and joined <= 100 and not is_line:
            yield number, "it and the next piece have room in one line"


def test_an_odd_piece_is_found() -> None:
    text = """
        f"{node}: an override has no buffer in a prepared model, "
        f"which "
        "holds increments alone",
    """
    assert {line for line, _ in odd_pieces(text.splitlines())} == {2, 3}
    mended = text.replace('f"which "\n        "holds', '"which holds')
    assert not list(odd_pieces(mended.splitlines()))


def test_a_text_over_several_lines_is_cut_where_a_line_ends() -> None:
    problems = []
    for source in SOURCES:
        for line, reason in odd_pieces(source.read_text().splitlines()):
            problems.append(f"{at(source, line)}: a piece of a text: {reason}")
    none_of(problems)


COUNTED = re.compile(r" (?:[\w-]+ )?(?!has |is |was |this |does )\w+s\b")


def counts_and_nouns(text: ast.JoinedStr) -> Iterator[ast.FormattedValue]:
    """Yield the lengths in a text that are followed by a noun in the plural."""
    for one, other in itertools.pairwise(text.values):
        if not isinstance(one, ast.FormattedValue) or not isinstance(other, ast.Constant):
            continue
        if ast.unparse(one.value).startswith("len(") and COUNTED.match(str(other.value)):
            yield one


def test_a_length_and_its_noun_are_put_together_by_plural() -> None:
    """A message with ``{len(nodes)} nodes`` says "1 nodes" on the day that there is one."""
    problems = []
    for source in SOURCES:
        for text in ast.walk(parsed(source)):
            if isinstance(text, ast.JoinedStr):
                for count in counts_and_nouns(text):
                    shown = ast.unparse(count.value)
                    where = at(source, count.lineno)
                    problems.append(f"{where}: {shown} and its noun: use errors.plural")
    none_of(problems)


# ---------------------------------------------------------------------- data, not code
CODE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
CODE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load"}


def test_data_is_never_code() -> None:
    problems = []
    for source in SOURCES:
        for name, line in imported(source):
            if name.split(".")[0] in CODE_MODULES:
                problems.append(f"{at(source, line)}: imports {name}")
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CODE_CALLS:
                problems.append(f"{at(source, node.lineno)}: calls {ast.unparse(node.func)}")
    none_of(problems)


def test_a_base_is_opened_at_one_place() -> None:
    """`extras.open_pretrained` says whether a base's own code may run; the demo opens only what it
    wrote.
    """
    for source in SOURCES:
        if room(source) in {"extras", "demo"}:
            continue
        for node in ast.walk(parsed(source)):
            called = (
                node.func.attr
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                else ""
            )
            assert called != "from_pretrained", (
                f"{source.relative_to(ROOT)}:{node.lineno}: use extras.open_pretrained"
            )


# ---------------------------------------------------------------------- the design says what is
DESIGN = ROOT / "docs" / "design.md"
PROOF = re.compile(r"^\| (\d+) \| `(tests\w*/\w+\.py)` \| `(\w+)` \|$", re.MULTILINE)


def defined(file: Path) -> set[str]:
    """The functions, classes and variables at the top of a file."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_law_has_tests_and_they_exist() -> None:
    page = DESIGN.read_text()
    laws = re.findall(r"^(\d+)\. \*\*", page, re.MULTILINE)
    proofs = PROOF.findall(page)
    assert laws
    assert {law for law, _, _ in proofs} == set(laws)
    for law, file, name in proofs:
        assert name in defined(ROOT / file), f"law {law}: {file} has no {name}"


def test_the_design_has_a_row_for_every_room() -> None:
    page = DESIGN.read_text()
    for rooms in RINGS.values():
        for name in rooms:
            assert f"`{name}/`" in page or f"`{name}.py`" in page, (
                f"docs/design.md: no row for {name}"
            )


def test_every_file_that_the_design_names_exists() -> None:
    page = DESIGN.read_text()
    for name in re.findall(
        r"`((?:lora_tree|tests|tests_gpu|tests_kills|tests_trl)/[\w/]+\.py)`", page
    ):
        assert (ROOT / name).is_file(), name
    # A table may list one room, or two: | in `engine/rows/` and `engine/routing/` | what it does |
    for head, table in re.findall(r"^\| in (`.*/`) \|.*\n((?:\|.*\n)+)", page, re.MULTILINE):
        named = set(re.findall(r"`(\w+\.py)`", table))
        there: set[str] = set()
        for room in re.findall(r"`([\w/]+)/`", head):
            there.update(file.name for file in (PACKAGE / room).glob("*.py"))
        there.discard("__init__.py")
        assert named == there, f"in {head} are other files: {sorted(named ^ there)}"
