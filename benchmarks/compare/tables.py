"""The outcomes as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from .late import LateLeaf
from .systems import Outcome

__all__ = ["markdown", "markdown_of_curve", "markdown_of_late", "markdown_of_rules"]


def markdown(leaves: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Return, for each comparison and amount of data, a table of systems and one of leaves."""
    bare, *others = outcomes
    base = f"The bare base: {bare.bits[0]:.3f} bits per byte."
    text = [f"{len(leaves)} leaves: {', '.join(leaves)}. {base}\n"]
    for comparison, data in dict.fromkeys((o.comparison, o.data) for o in others):
        text.append(f"\n### {comparison}, {data}\n\n")
        text.append(
            "| system | ranks: root, group, leaf | trained parameters | rank on a path "
            "| bits per byte | ± | leaves better than pooled | rate, decay a step |\n"
        )
        text.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
        mine = [o for o in others if (o.comparison, o.data) == (comparison, data)]
        best = min(mean(o.bits) for o in mine)
        pooled = next(o for o in mine if o.system.name == "pooled")
        text += [_row(o, pooled, best) for o in mine]
        text += _of_leaves(leaves, mine)
    return "".join(text)


def markdown_of_curve(found: Sequence[tuple[int, str, float]]) -> str:
    """Return a table: steps down, systems across."""
    steps = sorted({count for count, _, _ in found})
    systems = list(dict.fromkeys(system for _, system, _ in found))
    bits = {(count, system): bit for count, system, bit in found}
    text = [f"| steps | {' | '.join(systems)} |\n", f"| ---: |{' ---: |' * len(systems)}\n"]
    for count in steps:
        cells = [f"{bits[count, system]:.3f}" for system in systems]
        text.append(f"| {count} | {' | '.join(cells)} |\n")
    return "".join(text)


def markdown_of_rules(found: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Return a table: a rule a row, its seeds across."""
    seeds = range(1, len(found[0][1]) + 1)
    text = [
        f"| decay | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |\n",
        f"| --- |{' ---: |' * (len(seeds) + 1)}\n",
    ]
    for name, bits in found:
        cells = " | ".join(f"{bit:.3f}" for bit in bits)
        text.append(f"| {name} | {cells} | {mean(bits):.3f} |\n")
    return "".join(text)


def markdown_of_late(found: Sequence[LateLeaf]) -> str:
    """Return a table: a share of the data a row, the mean over leaves."""
    systems = list(found[0].bits)
    text = [
        f"| share of its data | {' | '.join(systems)} | others lose, mean | others lose, most |\n",
        f"| ---: |{' ---: |' * (len(systems) + 2)}\n",
    ]
    for share in sorted({late.share for late in found}):
        mine = [late for late in found if late.share == share]
        cells = [f"{mean(late.bits[system] for late in mine):.3f}" for system in systems]
        lost = mean(late.others[0] for late in mine)
        most = max(late.others[1] for late in mine)
        text.append(f"| {share:.0%} | {' | '.join(cells)} | {lost:.2f} | {most:.2f} |\n")
    return "".join(text)


def _row(outcome: Outcome, pooled: Outcome, best: float) -> str:
    system, bits = outcome.system, mean(outcome.bits)
    told = f"**{bits:.3f}**" if bits == best else f"{bits:.3f}"
    deviation = _deviation(outcome.bits)
    ranks = [str(rank or "–") for rank in (system.root, system.group, system.leaf)]
    better = [
        mine < theirs for mine, theirs in zip(_by_leaf(outcome), _by_leaf(pooled), strict=True)
    ]
    won = "–" if outcome is pooled else f"{sum(better)} of {len(better)}"
    shrinks = ", ".join(f"{part:g}" for part in outcome.setting.shrinkage)
    return (
        f"| {system.name} | {', '.join(ranks)} | {outcome.parameters:,} | {system.on_path} "
        f"| {told} | {deviation:.3f} | {won} | {outcome.setting.rate:g}; {shrinks} |\n"
    )


def _of_leaves(leaves: Sequence[str], outcomes: Sequence[Outcome]) -> list[str]:
    """Return a table with a row for each leaf: the mean over seeds, and its deviation."""
    names = " | ".join(outcome.system.name for outcome in outcomes)
    text = [f"\n| leaf | {names} |\n", f"| --- |{' ---: |' * len(outcomes)}\n"]
    for i, leaf in enumerate(leaves):
        means, cells = [], []
        for outcome in outcomes:
            bits = [of_seed[i] for of_seed in outcome.of_leaves]
            means.append(mean(bits))
            cells.append(f"{mean(bits):.3f} ± {_deviation(bits):.3f}")
        best = means.index(min(means))
        cells[best] = f"**{cells[best]}**"
        text.append(f"| {leaf} | {' | '.join(cells)} |\n")
    return text


def _deviation(bits: Sequence[float]) -> float:
    return stdev(bits) if len(bits) > 1 else 0.0


def _by_leaf(outcome: Outcome) -> list[float]:
    return [mean(bits) for bits in zip(*outcome.of_leaves, strict=True)]
