"""The demo's figures, and how they are printed. All of them come from the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

__all__ = ["BASE_ROW", "Report"]

BASE_ROW = "base"


@dataclass(frozen=True)
class Report:
    """The outcome of one run.

    Args:
        folders: the tree, its base and the exported leaf.
        domains: the columns of ``bits``.
        bits: path (``base`` for the bare one) → held-out bits per byte on each domain, in the order
            of ``domains``.
        switch_ms: mode → median milliseconds of a switch between leaves.
        leaf: the path that was exported.
        leaf_rank: its rank after flattening.
        peft_difference: largest |difference| of a logit between the tree's merged model and PEFT
            with the exported leaf.
        peft_largest: largest |logit| among those compared.
        seconds: phase → wall clock.
    """

    folders: tuple[Path, Path, Path]
    domains: tuple[str, ...]
    bits: Mapping[str, tuple[float, ...]]
    switch_ms: Mapping[str, float]
    leaf: str
    leaf_rank: int
    peft_difference: float
    peft_largest: float
    seconds: Mapping[str, float]

    def __rich__(self) -> Group:
        zoo, base, export = self.folders
        switches = ", ".join(f"{mode} {ms:.2f} ms" for mode, ms in self.switch_ms.items())
        phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.seconds.items())
        lines = [
            "rows: the active path; columns: the domain it reads; lower is better, "
            "each column's best is bold",
            "",
            f"switching between leaves, median: {switches}",
            f"{self.leaf} as one adapter of rank {self.leaf_rank}, loaded in PEFT: logits differ "
            f"from the tree's by at most {self.peft_difference:.1e} "
            f"(the largest is {self.peft_largest:.1f})",
            f"time: {phases}; {sum(self.seconds.values()):.0f} s in all",
            "",
            f"written: {zoo} (the tree), {base} (its base), {export} ({self.leaf} for PEFT)",
            f"next:    lora-tree show {zoo}",
            f"         lora-tree generate {zoo} {self.leaf} --base {base} --prompt 'def '",
        ]
        return Group(self._table(), Text("\n".join(lines)))

    def _table(self) -> Table:
        table = Table(title="held-out bits per byte", title_justify="left")
        table.add_column("active path", no_wrap=True)
        for domain in self.domains:
            table.add_column(domain.rpartition("/")[2], justify="right", no_wrap=True)
        best = [min(column) for column in zip(*self.bits.values(), strict=True)]
        for path, row in self.bits.items():
            name = path if path == BASE_ROW else "  " * path.count("/") + path
            cells = []
            for bits, low in zip(row, best, strict=True):
                # min() returned one of these numbers, so comparing floats for equality is safe;
                # ties are all bold.
                cells.append(Text(f"{bits:.2f}", "bold" if bits == low else ""))
            table.add_row(name, *cells, end_section=path == BASE_ROW)
        return table
