"""Run the notebooks of examples/ and keep their outputs: ``make notebooks``.

    examples/*.ipynb  ──a new kernel, an empty folder──▶  the same cells, with outputs

Details that differ from run to run and mean nothing (the folder, times, a terminal's colours) are
left out, so that a diff shows the changes of a notebook.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
LIMIT_S = 300
"""Seconds that one cell may take."""
SETTINGS = {"COLUMNS": "110", "PYTHONWARNINGS": "ignore:::tqdm.auto"}
"""The kernel's environment variables: the width of a terminal, and no warnings or widgets."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""An escape sequence of a terminal, such as a colour; a page would show it as letters."""
PROGRESS = re.compile(r"━ \d+/\d+")
"""A progress bar, which a terminal erases at the end."""
CELL = re.compile(r"^/\S+/ipykernel_\d+/\d+\.py:\d+: ", re.MULTILINE)
"""The place of a warning in a cell: a temporary file that no longer exists."""


def executed(file: Path, place: Path) -> Any:
    """Return a notebook with the outputs of a run in the folder ``place``.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; its traceback is in the message.
    """
    notebook = nbformat.read(file, as_version=4)
    programs = Path(sys.executable).parent
    environment = os.environ | SETTINGS | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    client = NotebookClient(
        notebook,
        timeout=LIMIT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(place)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = _as_read(output.text, place)
            elif "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # the same picture twice
    return notebook


def _as_read(text: str, place: Path) -> str:
    """Return printed text without control sequences, bars and the folder's path."""
    text = CELL.sub("", CONTROL.sub("", text.replace("\r\n", "\n")))
    text = text.replace(str(place), "/data")
    lines = [line.rstrip() for line in text.splitlines() if not PROGRESS.search(line)]
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    """Run the notebooks that the arguments name, or all, and write them with their outputs."""
    files = [Path(name) for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb"))
    for file in files:
        with tempfile.TemporaryDirectory() as place:
            notebook = executed(file, Path(place).resolve())
        file.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
