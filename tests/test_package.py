"""The package as it is handed on: what the wheel and the sdist hold and say, and that the tests run
from there.
"""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from sampling import slow

import lora_tree as lt

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_THE_SOURCE = [
    "lora_tree",
    "tests",
    "tests_gpu",
    "tests_kills",
    "tests_notebooks",
    "tests_trl",
    "docs",
    "benchmarks",
    "deploy",
    "engines",
    "examples",
    "site_tools",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of a copy of the source, which has nothing else in
    it.
    """
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in OF_THE_SOURCE:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, source)
    for kind in ("sdist", "wheel"):
        code = f"from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"import sys; {code}", str(folder)],
            cwd=source,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return folder


def files(folder: Path) -> set[str]:
    return {
        str(file.relative_to(ROOT))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }


def test_the_wheel_holds_the_whole_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert inside == files(ROOT / "lora_tree")
    assert {"lora_tree/py.typed", "lora_tree/tree.schema.json"} <= inside


def test_the_wheel_says_what_it_is(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        said = {
            Path(n).name: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n
        }
    metadata = email.message_from_string(said["METADATA"])
    assert metadata["Version"] == lt.__version__
    classifiers = metadata.get_all("Classifier") or []
    assert "Operating System :: POSIX" in classifiers
    for minor in (11, 12, 13, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert "lora-tree = lora_tree.cli:main" in said["entry_points.txt"]
    description = metadata.get_payload()
    assert isinstance(description, str)
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert "ten lines of python" in description.lower()
    assert all(link.startswith("https://") for link in links), (
        "a link that leads nowhere outside the repository"
    )


def compared_with_peft(page: str) -> list[str]:
    """The rows of the table that says what PEFT does and what lora_tree does; links have only their
    text, since the page of the package can't lead into the repository.
    """
    table = re.search(r"^\| you want to \|.*\n(?:\|.*\n)+", page, re.MULTILINE)
    assert table is not None
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", table[0]).splitlines()


def test_the_page_of_the_package_has_the_figures_of_the_readme() -> None:
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/package.md"))
    rows = compared_with_peft(readme)
    assert len([row for row in rows if re.search(r"\d", row)]) >= 3, "rows with figures"
    assert compared_with_peft(page) == rows
    # A figure that is brought up to date on one of the two pages alone is found.
    for figure in set(re.findall(r"\d+(?:[.,]\d+)*", "\n".join(rows))):
        other = re.sub(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,]*\d)", "7", page)
        assert compared_with_peft(other) != rows, figure


def test_the_page_of_the_package_says_what_the_readme_says() -> None:
    readme, page = (
        " ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/package.md")
    )
    for start, end in (
        ("```python import lora_tree as lt", " ```"),
        ("You switch", "you convert nothing."),
        ("- **A path always", "- **Nothing good"),
    ):
        begin = readme.index(start)
        assert readme[begin : readme.index(end, begin)].strip() in page


@slow
def test_the_tests_run_from_the_sdist(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(built / "unpacked", filter="data")
    (top,) = (built / "unpacked").iterdir()
    held = {str(file.relative_to(top)) for file in top.rglob("*") if file.is_file()}
    assert set().union(*(files(ROOT / name) for name in OF_THE_SOURCE)) <= held
    chosen = ["tests/test_lowrank.py", "tests/test_folder.py", "-k", "concat or round_trip"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        cwd=top,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    code = "import lora_tree; print(lora_tree.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=top, capture_output=True, text=True
    ).stdout
    assert where.startswith(str(top))


def test_the_oldest_packages_that_are_tested_are_the_oldest_that_are_allowed() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = [
        *PROJECT["dependencies"],
        *(one for name in ("transformers", "peft", "hub") for one in extras[name]),
    ]
    asked += [one for one in extras["train"] if one.startswith("accelerate")]
    bounds = dict(re.fullmatch(r"([\w.]+)>=([\d.]+)", one).groups() for one in asked)  # type: ignore[union-attr]
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    for name, bound in bounds.items():
        assert f"{tested[name]}.0.0".startswith(f"{bound}."), name


def test_the_package_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_tree", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"lora-tree {lt.__version__}\n")
