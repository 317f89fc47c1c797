"""Guess what went wrong in a merged checkpoint: each known mistake as multiples of the increments.

    expected      1 for every node          left out      0 for one node, or for all but one
    the base      0                         scale lost    1 / scale of each module
    merged twice  2                         weight lost   1 / the node's weight
    subtracted    −1                        alpha / r for alpha / √r, or the other way: √r, 1 / √r

Law: a mistake is named only if it explains the checkpoint up to rounding, or nearly (`NEAR`). If
none does, the best multiples are reported as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import listing

__all__ = [
    "EXPECTED",
    "NEAR",
    "Fit",
    "Guess",
    "Hypothesis",
    "best_guess",
    "hypotheses",
    "multiples_text",
    "solve_multiples",
]

NEAR = 0.02
"""The largest ‖rest‖ / ‖increments‖ at which a mistake explains a checkpoint."""
SAME = 0.03
"""A multiple this near to 1 or 0 counts as that."""


@dataclass(frozen=True)
class Fit:
    """One parameter's change M and its expected increments D_n, as inner products.

    Args:
        name: of the parameter.
        nodes: the nodes that change it, in the order of the sum.
        scales: alpha / r of each node's factors.
        weights: of each node in this module.
        ranks: of each node.
        gram: (n, n) float64, ⟨D_n, D_k⟩; each D_n includes its coefficient.
        along: (n,) float64, ⟨M, D_n⟩.
        change_square: ‖M‖², with M = W_merged − W_base.
        noise: the largest ‖M − ΣD‖² that rounding explains.
    """

    name: str
    nodes: tuple[str, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    ranks: tuple[int, ...]
    gram: Tensor
    along: Tensor
    change_square: float
    noise: float

    def rest(self, multiples: Tensor) -> float:
        """Return ‖M − Σ m_n D_n‖² for multiples (n,)."""
        value = self.change_square - 2 * multiples @ self.along + multiples @ self.gram @ multiples
        return max(float(value), 0.0)

    @property
    def expected(self) -> float:
        """The expected ‖M‖²: ‖ΣD‖²."""
        return max(float(self.gram.sum()), 0.0)


@dataclass(frozen=True)
class Hypothesis:
    """One mistake: the multiple that it gives each node in a parameter, and its description.

    Args:
        text: the description, for a person.
        common: node → multiple, the same in every parameter; nodes that are not in it have 1.
        lost: the mistake in every module's scale: ``"scale"`` divides by it, ``"root"`` multiplies
            by √r, ``"square"`` divides by √r; empty: none.
        unweighted: the nodes whose weight was left out.
    """

    text: str
    common: Mapping[str, float] = field(default_factory=dict)
    lost: str = ""
    unweighted: Collection[str] = ()

    def multiples(self, fit: Fit) -> Tensor:
        """Return the multiples of a parameter's nodes, (n,) float64."""
        found = []
        own = zip(fit.nodes, fit.scales, fit.weights, fit.ranks, strict=True)
        for node, scale, weight, rank in own:
            multiple = self.common.get(node, 1.0)
            if node in self.unweighted and weight:
                multiple /= weight
            if self.lost == "scale" and scale:
                multiple /= scale
            elif self.lost == "root":
                multiple *= math.sqrt(rank)
            elif self.lost == "square":
                multiple /= math.sqrt(rank)
            found.append(multiple)
        return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class Guess:
    """The likeliest mistake in words, and node → its multiple by least squares."""

    text: str
    multiples: Mapping[str, float] = field(default_factory=dict)


EXPECTED = Hypothesis("the path itself")


def hypotheses(nodes: Sequence[str], weighted: Sequence[str]) -> list[Hypothesis]:
    """Return the mistakes to try, the likelier ones first.

    Args:
        nodes: of the path or blend.
        weighted: those whose weight in the tree is not 1.
    """
    mistakes = [
        EXPECTED,
        Hypothesis("it is the base itself: nothing was merged", dict.fromkeys(nodes, 0.0)),
        Hypothesis("merged twice", dict.fromkeys(nodes, 2.0)),
        Hypothesis("subtracted instead of added", dict.fromkeys(nodes, -1.0)),
    ]
    for node in nodes if len(nodes) > 1 else ():
        mistakes.append(Hypothesis(f"{node} was left out", {node: 0.0}))
        mistakes.append(Hypothesis(f"{node} was merged twice", {node: 2.0}))
    for node in nodes if len(nodes) > 2 else ():
        others = {other: 0.0 for other in nodes if other != node}
        mistakes.append(Hypothesis(f"only {node} was merged, without {listing(others)}", others))
    if weighted:
        text = f"the weight of {listing(weighted)} was left out"
        mistakes.append(Hypothesis(text, unweighted=weighted))
    for node in weighted if len(weighted) > 1 else ():
        mistakes.append(Hypothesis(f"the weight of {node} was left out", unweighted=[node]))
    mistakes += [
        Hypothesis("the scale lora_alpha / r was left out", lost="scale"),
        Hypothesis("scaled by alpha / √r instead of alpha / r", lost="root"),
        Hypothesis("scaled by alpha / r instead of alpha / √r", lost="square"),
    ]
    return mistakes


def best_guess(fits: Sequence[Fit], tried: Sequence[Hypothesis]) -> tuple[Hypothesis | None, float]:
    """Return the mistake that explains most, and ‖rest‖ / ‖increments‖ under it.

    Returns:
        None instead of the mistake if the rest is more than rounding and more than `NEAR`.
    """
    whole = math.fsum(fit.expected for fit in fits)
    noise = math.fsum(fit.noise for fit in fits)
    best, least = EXPECTED, math.inf
    for hypothesis in tried:
        rest = math.fsum(fit.rest(hypothesis.multiples(fit)) for fit in fits)
        # If two explain it equally well, keep the earlier one, which is likelier.
        if rest < least * (1 - 1e-9):
            best, least = hypothesis, rest
    share = math.sqrt(least / whole) if whole else 0.0
    explains = least <= max(noise, NEAR**2 * whole)
    return (best if explains else None), share


def solve_multiples(fits: Sequence[Fit], nodes: Sequence[str]) -> tuple[dict[str, float], float]:
    """Return node → its multiple by least squares, and ‖rest‖² under these.

    Args:
        fits: the parameters, summed as one problem.
        nodes: the unknowns.
    """
    at = {node: i for i, node in enumerate(nodes)}
    gram = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    along = torch.zeros(len(nodes), dtype=torch.float64)
    for fit in fits:
        places = torch.tensor([at[node] for node in fit.nodes])
        gram[places[:, None], places[None]] += fit.gram
        along[places] += fit.along
    # With the pseudo-inverse, two nodes with the same increments share the multiple evenly.
    multiples = torch.linalg.pinv(gram, hermitian=True) @ along
    found = {node: float(multiples[i]) for node, i in at.items()}
    rest = math.fsum(fit.rest(multiples[[at[node] for node in fit.nodes]]) for fit in fits)
    return found, rest


def multiples_text(multiples: Mapping[str, float]) -> str:
    """Return the nodes whose multiple is not 1 as text: ``fr 0.5 times, fr/legal 0 times``."""
    parts = []
    for node, multiple in multiples.items():
        if abs(multiple - 1) > SAME:
            rounded = 0.0 if abs(multiple) <= SAME else multiple
            parts.append(f"{node} {rounded:.3g} times")
    return listing(parts)
