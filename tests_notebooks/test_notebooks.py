"""The notebooks of examples/ run from their first cell to their last, in a kernel of their own, and
print what they are kept with. Their claims are asserts in their own cells.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

# Two of them share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT / "site_tools"))

from notebooks import executed  # noqa: E402


def shown(notebook: Any) -> list[str]:
    """What each cell shows, in words. Losses, times and hashes differ: a word with a digit is 0."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            text = output.get("text") or " ".join(sorted(output.data))
            found.append(" ".join(re.sub(r"\S*\d\S*", "0", text).split()))
    return found


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_it_is_kept_with(file: Path, tmp_path: Path) -> None:
    kept = nbformat.read(file, as_version=4)
    assert any(cell.get("outputs") for cell in kept.cells)
    assert shown(executed(file, tmp_path)) == shown(kept)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_kept_whole_and_without_the_machine(file: Path) -> None:
    kept = nbformat.read(file, as_version=4)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert any("assert" in cell.source for cell in code)
    assert any("png" in kind or "svg" in kind for kind in " ".join(shown(kept)).split())
    assert not re.search(r"/tmp/|/home/|ipykernel_|\\u001b", file.read_text())


def test_there_are_four() -> None:
    assert len(NOTEBOOKS) == 4
