"""Similar: find the nodes, or the flat adapters, that are alike.

All pairs are compared by the cosine of the angle between their increments (`gram`) and clustered by
average linkage over 1 − cosine (`clusters`). The result is figures, JSON, or a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import SpecError
from ..given import check_whole_number, unchecked
from ..lowrank import LowRank
from ..tree import AdapterTree
from .aligning import aligned
from .clusters import Join, average_linkage, groups, leaf_order
from .gram import gram
from .picture import heat_map
from .sums import check_spelling, read_uncached

__all__ = ["Likeness", "similar"]

Read: TypeAlias = Callable[[str], Adapter]
Of: TypeAlias = Literal["own", "lineage"]


@dataclass(frozen=True, eq=False)
class Likeness:
    """The cosines of all pairs of some adapters, and their clusters.

    Args:
        names: of the adapters, in the order of rows and columns.
        cosines: (n, n) in float64; 1 on the diagonal, 0 between a zero adapter and any other.
        norms: (n,) ‖ΔW‖ over all modules.
        joins: the clusters, as `lora_tree.algebra.clusters.average_linkage` gives them.
        error: the standard error of a cosine; 0 where they are exact.
    """

    names: tuple[str, ...]
    cosines: Tensor
    norms: Tensor
    joins: tuple[Join, ...]
    error: float = 0.0

    def groups(self, cosine: float = 0.5) -> list[list[str]]:
        """Return the clusters whose members have at least this cosine on average, largest first.

        Raises:
            SpecError: ``cosine`` is not a number between −1 and 1.
        """
        if isinstance(unchecked(cosine), bool) or not isinstance(unchecked(cosine), Real):
            raise SpecError(f"a cosine is a number between -1 and 1, got {cosine!r:.80}")
        if not -1.0 <= cosine <= 1.0:
            raise SpecError(f"a cosine lies between -1 and 1, got {cosine!r}")
        # Distances are 1 − cosine, so a least cosine is a largest distance.
        found = groups(list(self.joins), len(self.names), 1.0 - cosine)
        named_groups = []
        for members in found:
            named_groups.append([self.names[i] for i in members])
        return named_groups

    def order(self) -> list[str]:
        """Return the names in an order that puts each cluster's names side by side."""
        return [self.names[i] for i in leaf_order(list(self.joins), len(self.names))]

    def nearest(self, most: int = 10) -> list[tuple[str, str, float]]:
        """Return the pairs with the largest cosines, largest first.

        Raises:
            SpecError: ``most`` is not a whole number from 1.
        """
        check_whole_number(most, "most")
        count = len(self.names)
        if count < 2:
            return []
        # The matrix is symmetric: the part above the diagonal has every pair once.
        upper = torch.triu_indices(count, count, 1)
        values = self.cosines[upper[0], upper[1]]
        best = values.topk(min(most, len(values))).indices
        pairs = []
        for i in best.tolist():
            row, column = upper[:, i].tolist()
            pairs.append((self.names[row], self.names[column], float(values[i])))
        return pairs

    def picture(self) -> str:
        """Return an SVG document: all cosines as a heat map, clusters side by side."""
        at = leaf_order(list(self.joins), len(self.names))
        ordered = self.cosines[at][:, at] if at else self.cosines
        return heat_map([self.names[i] for i in at], ordered, self.error)

    def as_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return {
            "names": list(self.names),
            "norms": self.norms.tolist(),
            "cosines": self.cosines.tolist(),
            "error": self.error,
            "joins": [vars(join) for join in self.joins],
        }


def similar(
    among: AdapterTree | Mapping[str, Adapter],
    paths: Iterable[str] | None = None,
    *,
    of: Of = "own",
    exact: bool | None = None,
) -> Likeness:
    """Compare all pairs of a tree's nodes, or of named adapters.

    Args:
        among: a tree, whose adapters are read one after the other and not kept; or name → adapter.
        paths: which nodes, as paths or patterns; None: all that have an adapter.
        of: ``own`` compares the nodes' own increments, ``lineage`` the sums over their lineages.
        exact: True multiplies all factors with each other, False sketches them; None: exact if that
            takes at most a few seconds.

    Raises:
        PathError: a path or pattern matches no node.
        ShapeMismatch, BaseMismatch: the adapters are not of one base; names them and the module.
        SpecError: a factor is not finite; names the adapter and the module.
        FolderError, FormatError: a node's files are gone or broken; names the node.

    >>> from lora_tree import LowRank
    >>> x, y = (LowRank(torch.eye(1, 4), torch.eye(3)[:, i : i + 1]) for i in (0, 1))
    >>> zoo = {"a": Adapter({"q": x}), "b": Adapter({"q": y}), "c": Adapter({"q": x.scaled(3.0)})}
    >>> similar(zoo).groups()
    [['a', 'c'], ['b']]
    """
    if of not in ("own", "lineage"):
        raise SpecError(f"of: expected 'own' or 'lineage', got {of!r}")
    if isinstance(among, AdapterTree):
        return _of_tree(among, paths, of, exact)
    if paths is not None or of != "own":
        raise SpecError(
            "paths= and of='lineage' are for a tree, and these are adapters by name",
            "leave paths= and of= out, and give only the adapters to compare",
        )
    if not isinstance(unchecked(among), Mapping):
        raise SpecError(
            f"similar compares the nodes of a tree, or adapters by name, got {among!r:.80}",
            "similar(lora_tree.load('zoo/')), or similar({'fr': adapter, 'de': other})",
        )
    return _of_adapters(dict(among), exact)


def _of_tree(
    tree: AdapterTree, paths: Iterable[str] | None, of: Of, exact: bool | None
) -> Likeness:
    chosen = tree.paths() if paths is None else tree.matching(paths)
    if of == "own":
        # A group has nothing of its own to compare; its lineage may have.
        chosen = [path for path in chosen if tree[path].has_adapter]
        return _compare(
            chosen, lambda path: read_uncached(tree, path), lambda path: _outline(tree, path), exact
        )
    # A lineage has the modules of all its nodes, which their headers state.
    return _compare(chosen, tree.flatten, lambda path: _lineage_outline(tree, path), exact)


def _of_adapters(adapters: dict[str, Adapter], exact: bool | None) -> Likeness:
    for name, adapter in adapters.items():
        if not isinstance(name, str) or not isinstance(unchecked(adapter), Adapter):
            kind = type(adapter).__name__
            raise SpecError(f"similar takes name → Adapter, got {name!r} → {kind}")
    return _compare(list(adapters), adapters.__getitem__, adapters.__getitem__, exact)


def _compare(names: list[str], read: Read, outline: Read, exact: bool | None) -> Likeness:
    # A file may leave open how a module's raw parameters are ordered, and another one settle it.
    outlines = dict(zip(names, aligned([outline(name) for name in names]), strict=True))
    check_spelling([(name, 1.0, each) for name, each in outlines.items()])

    def aligned_read(name: str) -> Adapter:
        return read(name).renested(outlines[name].nesting)

    found = gram(names, aligned_read, outlines.__getitem__, exact=exact)
    cosines = found.cosines
    joins = average_linkage(1.0 - cosines) if names else []
    return Likeness(found.names, cosines, found.norms, tuple(joins), found.error)


def _outline(tree: AdapterTree, path: str) -> Adapter:
    return tree.outline(path) or Adapter({})


def _lineage_outline(tree: AdapterTree, path: str) -> Adapter:
    """Return the modules of a lineage's sum, without numbers, each of rank Σr.

    If nodes differ in a module's shape, the last one's is taken: `AdapterTree.flatten` raises when
    the sum is made, and names the nodes. Increments that an override drops are counted as well.
    """
    modules: dict[str, LowRank] = {}
    ranks: dict[str, int] = {}
    nesting: dict[str, tuple[str, ...]] = {}
    assumed: set[str] = set()
    for outline in aligned([_outline(tree, node) for node in tree.lineage(path)]):
        modules.update(outline.modules)
        nesting.update(outline.nesting)
        assumed |= outline.assumed
        for name, value in outline.modules.items():
            ranks[name] = ranks.get(name, 0) + value.rank
    whole = {name: _of_rank(value, ranks[name]) for name, value in modules.items()}
    return Adapter(whole, nesting=nesting, assumed=frozenset(assumed))


def _of_rank(value: LowRank, rank: int) -> LowRank:
    """Return a value of the same shape and layout and another rank, without numbers."""
    *batch, out, into = value.shape
    A = torch.empty(*batch, rank, into, dtype=value.dtype, device="meta")
    B = torch.empty(*batch, out, rank, dtype=value.dtype, device="meta")
    return LowRank(A, B, layout=value.layout)
