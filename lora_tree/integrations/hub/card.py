"""The model card of a tree: README.md, with the metadata by which the hub finds it, and the tree.

    ---
    base_model: org/model            as much of it as the tree says; every other key stays
    tags: [lora_tree, lora, …]
    ---
    words of the repository's owner  stay, byte for byte
    <!-- lora_tree: … -->
    how to open it, the picture, the table of its nodes: rewritten by every push
    <!-- lora_tree: end -->

Law: a node's name is shown as text. It can't end the table, and no markup in it takes effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from ...drawn.drawing import arrange_nodes
from ...drawn.node_lines import NodeLine, lines_of, remark_text
from ...drawn.tree_picture import tree_picture
from ...errors import SpecError, plural, printable
from ...extras import need
from ...tree import AdapterTree

__all__ = ["CARD", "PICTURE", "TreeCard"]

CARD, PICTURE = "README.md", "lora_tree.svg"
BEGIN = "<!-- lora_tree: written by lora-tree push; write outside of this part -->"
END = "<!-- lora_tree: end -->"
TAGS = ("lora_tree", "lora", "adapters")
MOST_NODES = 200
"""Nodes in the picture and in the table: a page of thousands would not be read."""
_MARKUP = "\\`*_[]<>|~#$&"


@dataclass(frozen=True)
class TreeCard:
    """The facts about a tree that its card shows.

    Args:
        repository: where the tree will be.
        base: the portable name of its base.
        lines: its nodes.
    """

    repository: str
    base: str | None
    lines: Sequence[NodeLine]

    @classmethod
    def of(cls, tree: AdapterTree, repository: str, base: str | None) -> TreeCard:
        """Return the card of a tree; only headers are read."""
        return cls(repository, base, lines_of(tree, [])[0])

    # ------------------------------------------------------------------ the two files
    def picture(self) -> str:
        """Return the tree as an SVG document."""
        drawn = arrange_nodes([line.path for line in self.lines], limit=MOST_NODES)
        known = {line.path: line for line in self.lines}
        return tree_picture(self.repository, drawn, known, {}, self._total())

    def text(self, before: str | None, *, license: str | None, tags: Sequence[str]) -> str:
        """Return README.md.

        Args:
            before: the README.md that the repository has; None: it has none.
            license: for the metadata; None: the present entry stays.
            tags: further tags.

        Raises:
            SpecError: the metadata of ``before`` makes no sense.
        """
        card_of: Any = need("huggingface_hub", extra="hub", what="a model card").ModelCard
        # Without a block of metadata huggingface_hub would warn.
        text = before if before is not None and before.lstrip().startswith("---") else None
        try:
            card = card_of(text if text is not None else f"---\n{{}}\n---\n{before or ''}")
        except Exception as error:  # of its YAML parser, and its own
            raise SpecError(
                f"{self.repository}: {CARD}: its metadata can't be read: "
                f"{str(error).splitlines()[0]}",
                "correct it on the hub, between the two lines ---, or remove that block",
            ) from error
        self._describe(card.data, license, tags)
        card.text = self._body(card.text)
        return str(card)

    def _describe(self, data: Any, license: str | None, tags: Sequence[str]) -> None:
        """Put what the tree knows into the metadata; every other key stays."""
        if self.base is not None:
            data.base_model = self.base
            data.base_model_relation = "adapter"
        data.library_name = "lora_tree"
        if license is not None:
            data.license = license
        known = data.get("tags") or []
        known = [known] if isinstance(known, str) else list(known)
        data.tags = list(dict.fromkeys([*known, *TAGS, *tags]))

    def _body(self, before: str) -> str:
        """Return the text below the metadata, with our part in its place, or at the end."""
        head, begin, rest = before.partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not begin or not end:
            head, tail = before.rstrip("\n"), ""
            if not head:
                head = f"# {_plain(self.repository.rpartition('/')[2])}"
            head += "\n\n"
        return f"{head}{BEGIN}\n\n{self._part()}\n{END}{tail or chr(10)}"

    def _part(self) -> str:
        over = (
            f" over [{_plain(self.base)}](https://huggingface.co/{self.base})" if self.base else ""
        )
        rows = [
            f"A tree of LoRA adapters{over}: {plural(len(self.lines), 'node')}. The model of a "
            "node is the base plus its own increments and those of every node above it.",
            "",
            f"![the tree]({PICTURE})",
            "",
            "```",
            "pip install 'lora_tree[hub]'",
            f"lora-tree pull {self.repository} zoo",
            "```",
            "",
            "| node | | weight | rank | parameters | size |",
            "|---|---|--:|--:|--:|--:|",
        ]
        rows += [_row(line) for line in self.lines[:MOST_NODES]]
        if len(self.lines) > MOST_NODES:
            rows += ["", f"and {len(self.lines) - MOST_NODES:,} more"]
        return "\n".join(rows) + "\n"

    def _total(self) -> str:
        size = decimal(sum(line.bytes for line in self.lines))
        over = self.base or "an unnamed base"
        return f"{plural(len(self.lines), 'node')} over {over}, {size}"


def _row(line: NodeLine) -> str:
    """Return a node as a row of the table."""
    numbers: Mapping[str, str] = {}
    if line.ranks:
        numbers = {
            "rank": "/".join(map(str, line.ranks)),
            "parameters": f"{line.parameters:,}",
            "size": decimal(line.bytes),
        }
    cells = [
        _plain(line.path),
        _plain(remark_text(line, None)),
        line.weight_words,
        *(numbers.get(name, "") for name in ("rank", "parameters", "size")),
    ]
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line.

    >>> _plain("fr|</td>"), _plain("a_b")
    ('fr&#124;&#60;/td&#62;', 'a&#95;b')
    """
    # HTML's escapes, which all Markdown renderers show alike. Some renderers show a backslash, and
    # in some it does not keep a bar inside its cell.
    return "".join(f"&#{ord(sign)};" if sign in _MARKUP else sign for sign in printable(text))
