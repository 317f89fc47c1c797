"""The two bodies of text: packages of the Python standard library, and manual pages."""

from __future__ import annotations

import gzip
from pathlib import Path

from lora_tree.demo.corpus import LEAST_BYTES, Domain, find_corpus

__all__ = ["find_manuals", "find_packages"]

MANUALS = Path("/usr/share/man")
SECTIONS = ("1", "8")
LANGUAGES = ("de", "fr", "it", "ja")


def find_packages(leaves: int) -> list[Domain]:
    """Return at most ``leaves`` packages, of groups that have more than one."""
    _, found = find_corpus(children=3)
    groups = [_group(domain) for domain in found]
    crowded = {group for group in groups if groups.count(group) > 1}
    return [domain for domain in found if _group(domain) in crowded][:leaves]


def find_manuals(leaves: int, folder: Path = MANUALS) -> list[Domain]:
    """Return manual pages as leaves ``language/section``; none if they are not installed.

    The pages come with the packages that they describe, so machines differ in the pages they have.
    """
    found = []
    for language in LANGUAGES:
        for section in SECTIONS:
            files = sorted((folder / language / f"man{section}").glob("*.gz"))
            texts = [gzip.decompress(file.read_bytes()) for file in files]
            pages = [text for text in texts if len(text) > 200]
            if sum(map(len, pages)) < LEAST_BYTES:
                return []
            held = [page for i, page in enumerate(pages) if i % 5 == 2]
            kept = [page for i, page in enumerate(pages) if i % 5 != 2]
            found.append(Domain(f"{language}/{section}", tuple(kept), tuple(held)))
    return found[:leaves]


def _group(leaf: Domain) -> str:
    return leaf.path.partition("/")[0]
