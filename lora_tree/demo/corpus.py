"""What the demo reads: the Python standard library that is installed, as bytes, each domain in two parts.

    stdlib            the top-level modules: what the base is trained on
    net/email, …      packages, two levels: what the adapters are trained on

Held out is every fifth file (of the base's, every tenth) in the order of their names, or the end of a file that stands
alone. Nothing that is held out is ever trained on.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError

__all__ = ["Domain", "find_corpus"]

BASE_DOMAIN = "stdlib"
LEAST_BYTES = 60_000  # below it a domain is too small to train on and to hold some back

# Group → its packages, the likelier ones first: distributions leave some of them out, so each group has spares.
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
        return sum(map(len, self.train))


def find_corpus(stdlib: Path | None = None, *, children: int = 2) -> tuple[Domain, list[Domain]]:
    """The base's domain, and those of the leaves of the tree, in the order of their paths.

    Args:
        stdlib: the folder of the standard library; that of this Python where None.
        children: of each group, at most.

    Raises:
        FolderError: too little of the library is there to make a tree of.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    base = _domain(BASE_DOMAIN, sorted(stdlib.glob("*.py")), every=10)
    leaves: list[Domain] = []
    for group, packages in CANDIDATES.items():
        found = [
            _domain(f"{group}/{name}", sorted(stdlib.glob(where)))
            for name, where in packages.items()
        ]
        leaves += [domain for domain in found if domain.train_bytes >= LEAST_BYTES][:children]
    leaves.sort(key=lambda domain: domain.path)
    if base.train_bytes < 10 * LEAST_BYTES or len({leaf.path.split("/")[0] for leaf in leaves}) < 2:
        raise FolderError(
            f"{stdlib}: too few sources of the standard library to train on",
            "run the demo with a Python that has its library as .py files",
        )
    return base, leaves


def _domain(path: str, files: Sequence[Path], every: int = 5) -> Domain:
    texts = [text for text in (file.read_bytes() for file in files) if len(text) > 200]
    if len(texts) < every:
        cuts = [len(text) * (every - 1) // every for text in texts]
        pairs = list(zip(texts, cuts, strict=True))
        return Domain(path, tuple(t[:cut] for t, cut in pairs), tuple(t[cut:] for t, cut in pairs))
    held = every // 2
    return Domain(
        path,
        tuple(text for i, text in enumerate(texts) if i % every != held),
        tuple(text for i, text in enumerate(texts) if i % every == held),
    )
