"""Every node on every domain: a matrix of losses, and a picture of it.

            fr      fr/legal   de         columns: the rows of one path each
(base)      3.21    3.40       3.10       each row of the matrix: what is active
fr          2.80    3.05       3.11
fr/legal    2.84    2.61       3.20       mean loss in nats over a domain's learnt tokens; lower is better
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..blend import depth_first
from ..errors import SpecError, printable
from ..model import TreeModel
from ..training.diverged import BASE_LABEL
from ..training.losses import IGNORED, row_losses
from .rows import Row, padded

__all__ = ["LossMatrix", "evaluate"]


@dataclass(frozen=True)
class LossMatrix:
    """What `evaluate` returns.

    Args:
        paths: what was active; ``""`` is the bare base.
        domains: the paths of the rows.
        losses: (paths, domains), mean loss in nats over the domain's learnt tokens.
        tokens: learnt in each domain.
    """

    paths: tuple[str, ...]
    domains: tuple[str, ...]
    losses: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]

    def picture(self) -> str:
        """An SVG document: a heat map, each column from its best (dark) to its worst (light); grey what is not finite.

        >>> matrix = LossMatrix(("", "fr"), ("fr",), ((2.0,), (1.0,)), (10,))
        >>> matrix.picture().count("<rect"), "1.00" in matrix.picture()
        (2, True)
        """
        wide, high, left, top = 76, 26, 8 + 7 * max(len(p) for p in (BASE_LABEL, *self.paths)), 34
        size = left + wide * len(self.domains) + 8, top + high * len(self.paths) + 30
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
            'font-family="monospace" font-size="11">'
        ]
        for j, domain in enumerate(self.domains):
            short = _short(domain or BASE_LABEL)
            told = f"<title>{_escaped(domain or BASE_LABEL)}</title>{_escaped(short)}"
            parts.append(
                f'<text x="{left + wide * j + wide // 2}" y="{top - 10}" text-anchor="middle">{told}</text>'
            )
        for i, path in enumerate(self.paths):
            y = top + high * i
            parts.append(
                f'<text x="{left - 6}" y="{y + 17}" text-anchor="end">{_escaped(path or BASE_LABEL)}</text>'
            )
            for j in range(len(self.domains)):
                x, (fill, ink) = (
                    left + wide * j,
                    _shade(self.losses[i][j], [row[j] for row in self.losses]),
                )
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" fill="{fill}"/>'
                    f'<text x="{x + wide // 2}" y="{y + 17}" text-anchor="middle" fill="{ink}">'
                    f"{self.losses[i][j]:.2f}</text>"
                )
        parts.append(
            f'<text x="{left}" y="{size[1] - 10}">nats per token; lower is better</text></svg>'
        )
        return "\n".join(parts) + "\n"


@torch.no_grad()
def evaluate(
    model: TreeModel,
    rows: Sequence[Row],
    *,
    nodes: Sequence[str] | None = None,
    batch: int = 8,
    mode: Literal["merged", "unmerged"] = "merged",
    tick: Callable[[], object] = lambda: None,
) -> LossMatrix:
    """The loss of some nodes, and of the bare base, on every path's rows.

    Args:
        model: of the tree; its base as for a `Run`.
        rows: see `read_rows`; those of one path are a domain.
        nodes: what to make active, beside the bare base; None: every node that leads to an adapter.
        batch: rows at once.
        mode: how a path is made active.
        tick: called after every node.

    Raises:
        SpecError: no rows.
        PathError: a node is not there.
    """
    if not rows:
        raise SpecError("evaluate needs rows, got none")
    tree = model.tree
    domains: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: depth_first(row.path)):
        domains.setdefault(row.path, []).append(row)
    chosen = (
        [path for path in tree.paths() if tree[path].has_adapter] if nodes is None else list(nodes)
    )
    for path in chosen:
        tree.lineage(path)
    paths = ("", *(path for path in chosen if path))
    was = model.training
    model.eval()
    losses = []
    try:
        for path in paths:
            with model.using(path, mode=mode):
                losses.append(tuple(_mean(model, of, batch) for of in domains.values()))
            tick()
    finally:
        model.train(was)
    return LossMatrix(
        paths,
        tuple(domains),
        tuple(losses),
        tuple(sum(r.learnt for r in of) for of in domains.values()),
    )


def _mean(model: TreeModel, rows: Sequence[Row], batch: int) -> float:
    device = next(model.base.parameters()).device
    ordered = sorted(
        rows, key=lambda row: len(row.ids)
    )  # rows of a length together: less to fill up
    sums = []
    for i in range(0, len(ordered), batch):
        some = ordered[i : i + batch]
        if getattr(getattr(model.base, "config", None), "is_encoder_decoder", False):
            inputs: dict[str, Any] = _read_and_written(some, device)
            labels = inputs["labels"]  # the base puts them before its decoder, one token later
            logits = model(**inputs).logits
        else:
            inputs = padded(some, device=device)
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[:, :-1]
            labels = labels[:, 1:]
        sums.append(float(row_losses(logits, labels, shift=False)[0].sum()))
    return math.fsum(sums) / sum(row.learnt for row in rows)


def _read_and_written(rows: Sequence[Row], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows for an encoder, which reads what is not learnt, and a decoder, which writes what is.

    Raises:
        SpecError: a row has nothing to read; names its file and line.
    """
    read, written = [], []
    for row in rows:
        start = next(at for at, label in enumerate(row.labels) if label != IGNORED)
        if start == 0:
            raise SpecError(
                f"{row.where}: the base has an encoder, and this row has nothing for it to read",
                'give it a prompt: {"prompt": …, "completion": …}',
            )
        read.append(replace(row, ids=row.ids[:start], labels=row.ids[:start]))
        written.append(replace(row, ids=row.ids[start:], labels=row.labels[start:]))
    inputs = padded(read, device=device)
    return {**inputs, "labels": padded(written, device=device)["labels"]}


def _shade(loss: float, column: Sequence[float]) -> tuple[str, str]:
    """The colour of a loss's cell, and of its number."""
    if not math.isfinite(loss):
        return "rgb(208,208,208)", "#000"
    finite = [other for other in column if math.isfinite(other)]
    low, spread = min(finite), max(finite) - min(finite)
    good = 1 - (loss - low) / spread if spread > 0 else 1.0
    red, green, blue = (round(255 - good * (255 - dark)) for dark in (33, 102, 172))
    return f"rgb({red},{green},{blue})", "#fff" if good > 0.55 else "#000"


def _escaped(name: str) -> str:
    """A name as XML can hold it: there is no way to write most control characters in it."""
    return html.escape(printable(name))


def _short(name: str, most: int = 10) -> str:
    last = name.rpartition("/")[2]
    return last if len(last) <= most else f"{last[: most - 1]}…"
