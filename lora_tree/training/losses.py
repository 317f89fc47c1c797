"""The loss of rows on different paths: each path's own mean, or the mean over all tokens.

    over="paths"    loss = Σ_p weight_p · ( Σ of p's own tokens' −log p(token) ) / tokens_p
    over="rows"     loss = Σ_p weight_p · ( Σ of p's own tokens' −log p(token) ) / Σ_p tokens_p

tokens_p counts over every micro-batch and every rank of one step of the optimiser.

Over paths, each path learns as if it were trained alone, however many rows the others have. Over
rows, every token weighs alike. Several levels that train at once want this: the nodes that paths
share then get gradients of the size that a single adapter would get (`levels.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..blend import Blend, spelled
from ..engine.upload import uploaded
from ..errors import SpecError, StateError, listing, plural
from ..tree import AdapterTree
from .rank_names import blends_of_all, ranks

__all__ = [
    "IGNORED",
    "PathLoss",
    "path_loss",
    "pooled_loss",
    "row_losses",
    "token_counts",
]

T = TypeVar("T")

IGNORED = -100
"""The label of a token that is not learnt, as in torch and transformers."""


@dataclass(frozen=True, eq=False)
class PathLoss:
    """The result of `path_loss`.

    Args:
        total: (), the loss to call ``backward`` on.
        by_path: path → (), detached: this batch's part of the mean over the path's tokens, before
            weights.
    """

    total: Tensor
    by_path: Mapping[str, Tensor]


def path_loss(
    logits: Tensor,
    labels: Tensor,
    paths: Sequence[Blend],
    *,
    counts: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    over: Literal["paths", "rows"] = "paths",
    shift: bool = True,
) -> PathLoss:
    """Return the cross-entropy: the sum over paths of each one's mean, or the mean over all tokens.

    Args:
        logits: (rows, tokens, vocabulary), any floating dtype; the computation is in fp32, or wider
            if they are.
        labels: (rows, tokens), int64; −100 where nothing is learnt.
        paths: one path or blend a row, as given to `TreeModel.route`; losses name each by its one
            spelling.
        counts: path → tokens that are learnt in the whole step, over micro-batches and ranks:
            `token_counts`. None: this batch is the whole step.
        weights: path → its weight in the sum; 1 where it is not named.
        over: "paths": the sum over paths of the mean over each path's own tokens. "rows": the mean
            over all tokens.
        shift: the logits at a token are for the next one, as causal models' are.

    Raises:
        SpecError: the numbers of rows and paths differ, a path has no count, all weights are of
            other paths, or ``over`` is another word.
        StateError: several ranks train and ``counts`` was not given.

    >>> labels = torch.tensor([[0, 1], [0, 1], [0, -100]])
    >>> loss = path_loss(torch.zeros(3, 2, 4), labels, ["fr", "fr", "de"])
    >>> parts = [(path, round(part.item(), 4)) for path, part in loss.by_path.items()]
    >>> round(loss.total.item(), 4), parts
    (1.3863, [('fr', 1.3863), ('de', 0.0)])
    """
    if over not in ("paths", "rows"):
        raise SpecError(f"over must be paths or rows, got {over!r}")
    names = list(map(spelled, paths))
    if len(names) != len(logits) or logits.shape[:2] != labels.shape:
        raise SpecError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and "
            f"{plural(len(names), 'path')} do not fit together",
            "labels are (rows, tokens), logits (rows, tokens, vocabulary), "
            "and every row has one path",
        )
    sums, tokens = row_losses(logits, labels, shift=shift)
    return pooled_loss(sums, tokens, names, counts=counts, weights=weights, over=over)


def pooled_loss(
    sums: Tensor,
    tokens: Tensor,
    paths: Sequence[Blend],
    *,
    counts: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    over: Literal["paths", "rows"] = "paths",
) -> PathLoss:
    """Return the loss of a batch from the rows' own losses, pooled as `path_loss` pools its rows.

    Args:
        sums: (rows,), each row's loss, summed over the tokens that it counts.
        tokens: (rows,), int64, how much a row counts: its tokens, or 1 for a pair of answers.
        paths, counts, weights, over: as in `path_loss`.

    Raises:
        SpecError, StateError: as `path_loss`.

    >>> pooled_loss(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]), ["fr", "fr"]).total.item()
    2.0
    """
    names = list(map(spelled, paths))
    if counts is None and ranks() > 1:
        raise StateError(
            "several ranks train, and each holds only a part of a path's tokens",
            "pass counts=token_counts(…)",
        )
    # One spelling for each blend: "fr" and {"fr": 1.0} are one path, and
    # its tokens are counted together.
    counts = None if counts is None else _by_spelling(counts, "counts")
    weights = _by_spelling(weights or {}, "weights")
    _known_paths(names, dict.fromkeys(names, 0) if counts is None else counts, weights)
    # Nothing is read back from the device below: a step must not wait for its loss.
    places: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        places.setdefault(name, []).append(row)
    if counts is None:
        of_row = _shares(names, places, tokens).to(sums.dtype)
    else:
        of_row = _like(sums, [1 / max(counts[name], 1) for name in names])
    means = sums * of_row
    taken = means if over == "paths" else sums / _all_tokens(tokens, counts)
    # Weights multiply the rows, not the paths' sums, so that one product is enough for all paths.
    weigh = _like(means, [weights.get(name, 1.0) for name in names])
    # Rows are sorted by path, so that only one list of indices goes to the device for all paths.
    in_order = list(itertools.chain.from_iterable(places.values()))
    parts = means.detach().index_select(0, _like(tokens, in_order))
    path_parts = torch.split(parts, [len(rows) for rows in places.values()])
    by_path = {name: part.sum() for name, part in zip(places, path_parts, strict=True)}
    # Data parallelism takes the mean over ranks, and this is a sum over them.
    return PathLoss((taken * weigh).sum() * ranks(), by_path)


def row_losses(logits: Tensor, labels: Tensor, *, shift: bool = True) -> tuple[Tensor, Tensor]:
    """Return each row's loss, summed over its tokens, and the number of these tokens.

    Args:
        logits: (rows, tokens, vocabulary), any floating dtype; the computation is in fp32, or wider
            if they are.
        labels: (rows, tokens), int64; −100 where nothing is learnt.
        shift: the logits at a token are for the next one.

    Returns:
        (rows,) sums of −log p(token), and (rows,) counts, int64.

    >>> sums, counts = row_losses(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, -100]]))
    >>> [round(x, 4) for x in sums.tolist()], counts.tolist()
    ([2.7726, 1.3863], [2, 1])
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    # In fp32 at least: a sum over a vocabulary in bf16 keeps two digits.
    flat = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    token_losses = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return token_losses.view(labels.shape).sum(1), labels.ne(IGNORED).sum(1)


def token_counts(
    tree: AdapterTree, batches: Iterable[tuple[Tensor, Sequence[Blend]]], *, shift: bool = True
) -> dict[str, int]:
    """Return path → the tokens that one step of the optimiser learns on it.

    They are counted over the step's micro-batches and over all ranks. Every rank of a distributed
    run has to call it, with its own micro-batches.

    Args:
        tree: of the paths.
        batches: (labels, paths) of every micro-batch of the step; labels (rows, tokens), paths one
            a row.
        shift: as in `path_loss`: the first token of a row is not learnt.

    Raises:
        SpecError: a batch has not as many paths as rows.

    >>> tree = AdapterTree(); _ = tree.add("fr")
    >>> batches = [torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, -100]])]
    >>> token_counts(tree, [(labels, ["fr"]) for labels in batches])
    {'fr': 3}
    """
    named: list[tuple[Tensor, list[str]]] = []
    for labels, paths in batches:
        names = list(map(spelled, paths))
        named.append((labels, names))
        if len(labels) != len(names):
            raise SpecError(
                f"labels of {plural(len(labels), 'row')}, and {plural(len(names), 'path')}",
                "give one path for every row",
            )
    own_counts = _counted(named, shift)
    if ranks() == 1:
        return own_counts
    # The ranks add up by position, so the order must be the same on all of them: the tree's, and
    # then that of the blends.
    order = ["", *tree.paths()]
    device = named[0][0].device if named else torch.device("cpu")
    strange = sorted(set(own_counts) - set(order))
    total = _over_ranks([*(own_counts.get(path, 0) for path in order), len(strange)], device)
    if total.pop():
        blends = blends_of_all(strange, device)
        total += _over_ranks([own_counts.get(blend, 0) for blend in blends], device)
        order += blends
    # A path that only another rank has rows of is counted here too: the sum over paths is over
    # those of all ranks.
    counts = dict(zip(order, total, strict=True))
    return {path: count for path, count in counts.items() if count or path in own_counts}


def _over_ranks(numbers: Sequence[int], device: torch.device) -> list[int]:
    total = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    found: list[int] = total.tolist()
    return found


def _shares(names: Sequence[str], places: Mapping[str, Sequence[int]], tokens: Tensor) -> Tensor:
    """Return (rows,) float64: one over the tokens of the row's path, counted on the device."""
    order = {name: place for place, name in enumerate(places)}
    which = _like(tokens, [order[name] for name in names])
    of_path = tokens.new_zeros(len(order)).index_add(0, which, tokens)
    return 1 / of_path.clamp(min=1).double().index_select(0, which)


def _all_tokens(tokens: Tensor, counts: Mapping[str, int] | None) -> Tensor | int:
    """Return how many tokens the whole step learns, at least 1."""
    return tokens.sum().clamp(min=1) if counts is None else max(sum(counts.values()), 1)


def _like(tensor: Tensor, numbers: Sequence[float]) -> Tensor:
    """Upload numbers to the device and in the dtype of ``tensor``; the host does not wait."""
    made = torch.tensor(numbers, dtype=tensor.dtype, device="cpu")
    return uploaded(made, tensor.device)


def _counted(batches: Iterable[tuple[Tensor, Sequence[str]]], shift: bool) -> dict[str, int]:
    counts: dict[str, int] = {}
    for labels, names in batches:
        learnt = (labels[:, 1:] if shift else labels).ne(IGNORED).sum(1).tolist()
        for name, count in zip(names, learnt, strict=True):
            counts[name] = counts.get(name, 0) + count
    return counts


def _by_spelling(numbers: Mapping[str, T], what: str) -> dict[str, T]:
    """Return the numbers with every path or blend in its one spelling.

    Raises:
        SpecError: two of them are the same blend.
    """
    by_spelling: dict[str, T] = {}
    for blend, number in numbers.items():
        name = spelled(blend)
        if name in by_spelling:
            raise SpecError(
                f"{what}: {blend!r} is {name!r}, which stands there already", "name each blend once"
            )
        by_spelling[name] = number
    return by_spelling


def _known_paths(
    names: Iterable[str], counts: Mapping[str, int], weights: Mapping[str, float]
) -> None:
    """Refuse rows without a count, and weights that are all of other paths.

    Raises:
        SpecError: names the path.
    """
    uncounted = [name for name in names if name not in counts]
    if uncounted:
        raise SpecError(
            f"{uncounted[0]!r} has rows here and no count",
            "counts are of all the step's micro-batches",
        )
    if counts and weights and not set(weights) & set(counts):
        raise SpecError(f"weights: expected paths of this step, got {listing(map(str, weights))}")
