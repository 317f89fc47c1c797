"""The overrides under each row of a batch at one module, and the increments that they drop.

    rows      0 1 2 3 4 5
    fr        █ █ █ · · ·      the module's forward over fr's override
    fr/legal  · · ·            (fr's own increment and those below add to it)
    de        · · · █ █ ·      over de's
                        █      the base's own output

A ground is computed once for all rows that stand on it, and replaces the base's output in those
rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import LoraTreeError, MergedOnly
from ...override import standing
from ...sites import Site
from ..plan import OverrideTerm, OverrideTerms, Terms
from ..rows.batch import Batch, tree_node
from ..sidepaths.ground import Ground
from .owed import RowSubset

__all__ = ["RowGrounds"]


class RowGrounds:
    """The grounds of a batch's rows at one module.

    Args:
        site: of the module.
        overrides: of all the batch's nodes, in the order of the sum.
        terms: the increments of all the batch's nodes there.
        batch: the whole batch, with its lineages.

    Raises:
        SpecError: the paths of a row's blend have different overrides; names the row.
        MergedOnly: an override of some rows, or of the bias, would drop a part of an increment.
    """

    def __init__(self, site: Site, overrides: OverrideTerms, terms: Terms, batch: Batch) -> None:
        self._site, self._batch = site, batch
        held: dict[str, dict[str, OverrideTerm]] = {}
        for override in overrides:
            held.setdefault(override.node, {})[override.attribute] = override
        stacks: dict[OverrideTerms, int] = {(): 0}
        """The overrides that count → their number; 0: none, the base's own tensors."""
        number: list[float] = []
        self.without: list[frozenset[str]] = []
        """Kind of the batch → the nodes whose increments its rows lose here."""
        for kind, lineages in enumerate(batch.lineages):
            effective = self._standing(kind, lineages, held)
            number.append(float(stacks.setdefault(effective, len(stacks))))
            self.without.append(self._dropped(effective, terms))
        self._stacks = list(stacks)
        of_kind = [(each,) for each in number]
        self._rows = Batch(("ground",), tuple(of_kind), batch.of_row)
        self._grounds: dict[int, Ground] = {}

    @property
    def is_uniform(self) -> bool:
        """True: all rows have the same ground."""
        return len({self._rows.kinds[kind] for kind in self._rows.of_row}) == 1

    @property
    def only(self) -> Ground | None:
        """The one ground of all rows; None for the base's own."""
        return self._ground(int(self._rows.kinds[self._rows.of_row[0]][0]))

    @property
    def nbytes(self) -> int:
        """The bytes of overrides that were copied, because their dtype or device was another."""
        made = [self._ground(i) for i in range(1, len(self._stacks))]
        return sum([ground.nbytes for ground in made if ground is not None])

    def applied(self, out: Tensor, x: Tensor, spread: tuple[int, int]) -> Tensor:
        """Return the output with every row over its own ground.

        Args:
            out: (rows, …), the module's own output.
            x: (rows, …), its input.
            spread: how the rows lie.
        """
        rows = self._rows.spread(*spread)
        for members, (number,) in rows.by_kind:
            ground = self._ground(int(number))
            assert ground is not None, "rows over the base's own are left out"
            subset = RowSubset(members, rows, out.device)
            made = ground.applied(subset.of(out), subset.of(x))
            if subset.is_whole:
                return made
            out = out.index_copy(0, subset.index, made.to(out.dtype))
        return out

    def _ground(self, number: int) -> Ground | None:
        if number == 0:
            return None
        if number not in self._grounds:
            self._grounds[number] = Ground(self._site, self._stacks[number])
        return self._grounds[number]

    def _standing(
        self,
        kind: int,
        lineages: Sequence[Sequence[str]],
        held: dict[str, dict[str, OverrideTerm]],
    ) -> OverrideTerms:
        values = {}
        for node, node_overrides in held.items():
            values[node] = {attribute: term.value for attribute, term in node_overrides.items()}
        try:
            effective = standing(lineages, values)
        except LoraTreeError as error:
            row = self._batch.of_row.index(kind)
            raise error.within(f"row {row}: {self._site.name}") from error
        override_terms: list[OverrideTerm] = []
        for attribute in sorted(effective):
            override_terms += [held[node][attribute] for node, _ in effective[attribute]]
        return tuple(override_terms)

    def _dropped(self, effective: OverrideTerms, terms: Terms) -> frozenset[str]:
        """Return the nodes whose increments these overrides drop.

        Raises:
            MergedOnly: an increment would lose only a part: some rows, or its bias.
        """
        dropped = set()
        for term in terms:
            for override in effective:
                if not override.node.startswith(f"{tree_node(term.node)}/"):
                    continue
                is_bias = override.attribute == self._site.bias_name
                if not is_bias and override.value.rows is None:
                    dropped.add(term.node)
                elif not is_bias or term.value.bias is not None:
                    raise MergedOnly(
                        f"{self._site.name}: {override.node} overrides a part of it, and its "
                        f"ancestor {term.node} has an increment there: the two can't be routed",
                        "activate one path at a time, or leave the module out of one of the nodes",
                    )
        return frozenset(dropped)
