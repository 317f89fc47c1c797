"""The demo's text: the Python standard library that is installed, as bytes, in domains.

    stdlib            the top-level modules, on which the base is trained
    net/email, …      packages in two levels, on which the adapters are trained

Each domain has two parts. Every fifth file (of the base's, every tenth) in the order of their names
is held out, or the end of a file that stands alone. Nothing that is held out is ever trained on.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError

__all__ = ["Domain", "find_corpus"]

BASE_DOMAIN = "stdlib"
LEAST_BYTES = 60_000  # a smaller domain is too small to train on and to hold some back

# Group → its packages, those most often installed first. Distributions leave some of them out
# (Debian has no tkinter, containers no idlelib), so each group has spares.
CANDIDATES: dict[str, dict[str, str]] = {
    "docs": {"pydoc": "pydoc_data/*.py"},
    "gui": {"tkinter": "tkinter/*.py", "idlelib": "idlelib/*.py", "turtledemo": "turtledemo/*.py"},
    "net": {
        "email": "email/*.py",
        "asyncio": "asyncio/*.py",
        "http": "http/*.py",
        "urllib": "urllib/*.py",
    },
    "tables": {
        "cp": "encodings/cp*.py",
        "iso8859": "encodings/iso8859*.py",
        "mac": "encodings/mac*.py",
    },
}


@dataclass(frozen=True)
class Domain:
    """One body of text in two parts, each a list of documents."""

    path: str
    train: tuple[bytes, ...]
    held_out: tuple[bytes, ...]

    @property
    def train_bytes(self) -> int:
        """Bytes of the part to train on."""
        return sum(map(len, self.train))


def find_corpus(stdlib: Path | None = None, *, children: int = 2) -> tuple[Domain, list[Domain]]:
    """Return the base's domain, and those of the tree's leaves in the order of their paths.

    Args:
        stdlib: the folder of the standard library; None: of this Python.
        children: the largest number of leaves in a group.

    Raises:
        FolderError: the library has too few sources to make a tree of.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    # Sorted, since a glob yields files as the file system has them: the same ones must be held out
    # on every machine.
    base = _domain(BASE_DOMAIN, sorted(stdlib.glob("*.py")), every=10)
    leaves: list[Domain] = []
    for group, packages in CANDIDATES.items():
        found = []
        for name, where in packages.items():
            domain = _domain(f"{group}/{name}", sorted(stdlib.glob(where)))
            if domain.train_bytes >= LEAST_BYTES:
                found.append(domain)
        leaves += found[:children]
    leaves.sort(key=lambda domain: domain.path)
    groups = {leaf.path.split("/")[0] for leaf in leaves}
    # With one group, every switch would be between paths that share an ancestor.
    if base.train_bytes < 10 * LEAST_BYTES or len(groups) < 2:
        raise FolderError(
            f"{stdlib}: too few sources of the standard library to train on",
            "run the demo with a Python that has its library as .py files",
        )
    return base, leaves


def _domain(path: str, files: Sequence[Path], every: int = 5) -> Domain:
    """Split some files into a part to train on and a part that is held out."""
    train, held_out = [], []
    texts = [file.read_bytes() for file in files]
    texts = [text for text in texts if len(text) > 200]  # an empty __init__.py says nothing
    for i, text in enumerate(texts):
        if len(texts) < every:
            # With too few files to hold one back, the end of each file is held back.
            cut = len(text) * (every - 1) // every
            train.append(text[:cut])
            held_out.append(text[cut:])
        elif i % every == every // 2:
            held_out.append(text)
        else:
            train.append(text)
    return Domain(path, tuple(train), tuple(held_out))
