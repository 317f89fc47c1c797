"""Blame and bisect: which part of a lineage moves a loss, and which step of it made one worse.

    blame     the path without one part of one node, for every part, beside the whole path
    bisect    the base, then the path node by node; or one node, version by version

A part is left out by a blend, so nothing is trained, merged or written:

    {path: 1, node: {part: −1}, parent: {part: 1}}      1 − 1 at the node, 1 − 1 + 1 above it

All of these blends are rows of the same batches (`TreeModel.route`): a batch of 32 answers eight
questions about four rows in one forward. The effect on the answers themselves is measured by the
mean divergence of the next token, which needs no right answer:

    KL(p ‖ q) = Σ_v p(v) (log p(v) − log q(v)),     p of the whole path, q of what is compared
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..blend import Blend
from ..errors import PathError, SpecError
from ..model import TreeModel
from ..training.losses import IGNORED, row_losses
from ..tree import AdapterTree
from .evaluation import inputs_of
from .preferences import are_preferences
from .rows import Row

__all__ = ["Bisection", "Blame", "Part", "PartKind", "bisect", "blame"]

PartKind: TypeAlias = Literal["nodes", "kinds", "layers", "modules"]
"""The division of a node: none, or by the last words of names, by layers, by modules."""

_KINDS = ("nodes", "kinds", "layers", "modules")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
Tick: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Part:
    """A part of a node, and how the path does without it.

    Args:
        node: its path.
        part: the modules' last word, their layer, or the module; "" is all of the node.
        loss: of the path without it, in nats per learnt token.
        change: ``loss`` minus the loss of the whole path: above 0 where the part helps.
        divergence: the mean KL, in nats a token, of the answers without it from those with it.
    """

    node: str
    part: str
    loss: float
    change: float
    divergence: float


@dataclass(frozen=True)
class Blame:
    """The outcome of `blame`.

    Args:
        path: the path.
        loss: of the whole path, in nats per learnt token.
        tokens: learnt in the rows.
        parts: the ones that move the loss most first. Where the whole path's loss is not finite,
            these are the parts without which it is.
    """

    path: str
    loss: float
    tokens: int
    parts: tuple[Part, ...]

    def as_dict(self) -> dict[str, object]:
        """Return the figures as plain data, for JSON."""
        parts = [vars(part) for part in self.parts]
        return {"path": self.path, "loss": self.loss, "tokens": self.tokens, "parts": parts}


@dataclass(frozen=True)
class Bisection:
    """The outcome of `bisect`.

    Args:
        steps: in their order.
        losses: of each step, in nats per learnt token.
        tokens: learnt in the rows.
    """

    steps: tuple[str, ...]
    losses: tuple[float, ...]
    tokens: int

    @property
    def worst(self) -> str | None:
        """The step with the largest rise of the loss over the one before; None if none rises.

        A loss that is no longer finite is the largest rise of all.
        """
        rises = [
            _rise(before, after)
            for before, after in zip(self.losses, self.losses[1:], strict=False)
        ]
        if not rises or not max(rises) > 0.0:
            return None
        return self.steps[1 + rises.index(max(rises))]

    def as_dict(self) -> dict[str, object]:
        """Return the figures as plain data, for JSON."""
        losses = dict(zip(self.steps, self.losses, strict=True))
        return {"losses": losses, "worst": self.worst, "tokens": self.tokens}


def _rise(before: float, after: float) -> float:
    if not math.isfinite(before):
        return 0.0  # nothing is worse than that
    return after - before if math.isfinite(after) else math.inf


def blame(
    model: TreeModel,
    path: str,
    rows: Sequence[Row],
    *,
    by: PartKind = "nodes",
    nodes: Iterable[str] | None = None,
    batch: int = 32,
    tick: Tick = lambda: None,
) -> Blame:
    """Measure what each part of a lineage does to the loss of some rows, and to the answers.

    Args:
        model: of the tree; its base as for a `Run`.
        path: its lineage is examined.
        rows: see `read_rows`; their own paths do not count here.
        by: which parts: whole ``nodes``; in each node the modules of one name (``kinds``:
            ``q_proj``), of one layer (``layers``), or one by one (``modules``).
        nodes: only parts of these nodes of the lineage; None: of all.
        batch: rows of a forward, of all parts together.
        tick: called after every forward.

    Raises:
        PathError: a node is not there, or not on the lineage.
        SpecError: there are no rows, ``by`` is none of the four, or the lineage has no adapter.
        StateError, BaseMismatch: as `TreeModel.route`.
    """
    if by not in _KINDS:
        raise SpecError(f"by: expected one of {', '.join(_KINDS)}, got {by!r}")
    tree = model.tree
    lineage = tree.lineage(path)
    chosen = list(lineage if nodes is None else nodes)
    for node in chosen:
        if node not in lineage:
            raise PathError(f"{node!r} is not on the lineage of {path!r}: {', '.join(lineage)}")
    variants: dict[tuple[str, str], Blend] = {}
    for node in chosen:
        for part, modules in _parts_of(tree, node, by).items():
            variants[node, part] = _without(tree, path, node, modules if part else None)
    if not variants:
        raise SpecError(f"{path or 'the root'}: no node of its lineage has an adapter to blame")
    blends = [path, *variants.values()]
    losses, divergences, tokens = _measured(model, rows, blends, batch=batch, tick=tick)
    parts = []
    for at, (node, part) in enumerate(variants, 1):
        parts.append(Part(node, part, losses[at], losses[at] - losses[0], divergences[at]))
    parts.sort(key=lambda part: (*_order(part, losses[0]), part.node, part.part))
    return Blame(path, losses[0], tokens, tuple(parts))


def bisect(
    model: TreeModel,
    steps: str | Mapping[str, Blend],
    rows: Sequence[Row],
    *,
    batch: int = 32,
    tick: Tick = lambda: None,
) -> Bisection:
    """Measure the loss of some rows at every step, to see which step made it worse.

    Args:
        model: of the tree; its base as for a `Run`.
        steps: a path, whose steps are the base and the nodes of its lineage; or a name and a path
            or blend for each step, such as the versions of a node.
        rows: see `read_rows`; their own paths do not count here.
        batch: rows of a forward, of all steps together.
        tick: called after every forward.

    Raises:
        PathError: a node is not there.
        SpecError: there are no rows, or fewer than two steps.
        StateError, BaseMismatch: as `TreeModel.route`.
    """
    if isinstance(steps, str):
        named: Mapping[str, Blend] = {step: step for step in ["", *model.tree.lineage(steps)]}
    else:
        named = steps
    if len(named) < 2:
        raise SpecError(f"bisect needs two steps at least, got {len(named)}")
    losses, _, tokens = _measured(model, rows, list(named.values()), batch=batch, tick=tick)
    return Bisection(tuple(named), tuple(losses), tokens)


def _order(part: Part, whole: float) -> tuple[int, float]:
    """Return what parts are ordered by: what a part does to whether a loss is finite comes first.

    A change from a loss that is not finite is NaN, by which nothing can be sorted.
    """
    if math.isfinite(part.loss) != math.isfinite(whole):
        return 0, 0.0
    return (1, -abs(part.change)) if math.isfinite(part.change) else (2, 0.0)


# ---------------------------------------------------------------------- what is left out
def _parts_of(tree: AdapterTree, node: str, by: PartKind) -> dict[str, list[str]]:
    """Return the parts of a node: name → modules."""
    outline = tree.outline(node)
    if outline is None:
        return {}
    if by == "nodes":
        return {"": list(outline.modules)}
    found: dict[str, list[str]] = {}
    for module in outline.modules:
        found.setdefault(_part_of(module, by), []).append(module)
    return found


def _part_of(module: str, by: PartKind) -> str:
    """Return the name of the part to which a module belongs.

    >>> name = "model.layers.3.self_attn.q_proj"
    >>> [_part_of(name, by) for by in ("kinds", "layers", "modules")]
    ['q_proj', 'layer 3', 'model.layers.3.self_attn.q_proj']
    """
    if by == "kinds":
        return module.rpartition(".")[2]
    if by == "modules":
        return module
    layer = _LAYER.search(module)
    return f"layer {layer[1]}" if layer else "no layer"


def _without(tree: AdapterTree, path: str, node: str, modules: list[str] | None) -> Blend:
    """Return the blend that is a path without a node, or without some modules of it."""
    parent = tree.parent(node)
    if modules is None:
        if node == path:
            return parent
        # The node's entry takes its ancestors off too, and the parent's puts them back.
        blend: dict[str, Any] = {path: 1.0, node: -1.0}
        return blend | {parent: 1.0} if parent else blend
    removed: dict[str, float] = dict.fromkeys(modules, -1.0)
    blend = {path: 1.0, node: {"default": 0.0} | removed}
    if node == path:
        blend[path] = {"default": 1.0} | dict.fromkeys(modules, 0.0)
    above: set[str] = set()
    for ancestor in tree.lineage(parent) if parent else ():
        outline = tree.outline(ancestor)
        above.update([] if outline is None else outline.modules)
    # A pattern that matches no module is refused, so the parent's entry names only modules that an
    # ancestor has.
    back = {module: 1.0 for module in modules if module in above}
    if back:
        blend[parent] = {"default": 0.0} | back
    return blend


# ---------------------------------------------------------------------- the forwards
@torch.no_grad()
def _measured(
    model: TreeModel, rows: Sequence[Row], blends: Sequence[Blend], *, batch: int, tick: Tick
) -> tuple[list[float], list[float], int]:
    """Return each blend's mean loss on the rows, its mean KL from the first, and the tokens."""
    if not rows:
        raise SpecError("there are no rows to measure on", "pass the rows that read_rows returned")
    if are_preferences(rows):
        raise SpecError(
            f"{rows[0].where}: a row that prefers one answer to another has no loss of one path",
            'give rows with one answer: {"prompt": …, "completion": …}',
        )
    sums: list[list[float]] = [[] for _ in blends]
    divergences: list[list[float]] = [[] for _ in blends]
    was_training = model.training
    model.eval()
    try:
        for group in _groups(rows, len(blends), batch):
            reference: Tensor | None = None
            # All rows at the first blend, then all at the next.
            pairs = []
            for at in range(len(blends)):
                pairs += [(place, at) for place in range(len(group))]
            for first in range(0, len(pairs), batch):
                chunk = pairs[first : first + batch]
                inputs, labels = inputs_of(model, [group[place] for place, _ in chunk])
                with model.route([blends[at] for _, at in chunk]):
                    logits = model(**inputs).logits[:, : labels.shape[1]]
                # In fp32 at least, as losses are.
                wide = torch.promote_types(logits.dtype, torch.float32)
                chances = logits.to(wide).log_softmax(-1)
                losses, _ = row_losses(chances, labels, shift=False)
                # The rows under the first blend come first, and one chunk has all of them.
                if reference is None:
                    reference = chances[: len(group)]
                for i, (place, at) in enumerate(chunk):
                    sums[at].append(float(losses[i]))
                    # Another chunk may be padded less, and always at the end.
                    reference_row = reference[place, : labels.shape[1]]
                    divergences[at].append(_divergence(reference_row, chances[i], labels[i]))
                tick()
    finally:
        model.train(was_training)
    tokens = sum(row.learnt for row in rows)
    mean = [math.fsum(values) / tokens for values in sums]
    return mean, [math.fsum(values) / tokens for values in divergences], tokens


def _groups(rows: Sequence[Row], blends: int, batch: int) -> Iterator[list[Row]]:
    """Yield rows of similar length, so few that one forward holds all under the first blend."""
    if batch < 1:
        raise SpecError(f"batch must be at least 1, got {batch}")
    ordered = sorted(rows, key=lambda row: len(row.ids))
    size = max(1, batch // blends)
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def _divergence(whole: Tensor, other: Tensor, labels: Tensor) -> float:
    """Return the sum of KL(whole ‖ other) over a row's learnt tokens, from log p (tokens, V)."""
    there = labels != IGNORED
    p, q = whole[there], other[there]
    # 0 · log 0 is 0; as a product of floats it is NaN.
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return max(float(terms.sum()), 0.0)
