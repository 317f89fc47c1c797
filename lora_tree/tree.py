"""AdapterTree: the nodes, their order, and the sum of a path or a blend of paths.

    W(path) = round_once( W0 + Σ weight_n · scale_n · B_n A_n )      n on the lineage of path

Law: a value depends on the path and on what the tree holds, never on the order in which nodes were
added: children are taken in the order of their names, parents before children. That order
(`AdapterTree.paths`) is the order of every sum.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import nn

from .adapter import Adapter
from .attached_models import AttachedModel, AttachedModels
from .blend import Blend, depth_first, parse_blend
from .combining import weighed_terms
from .errors import LoraTreeError, PathError, SpecError, TreeError, listing, plural, suggest_path
from .flattening import NodeTerms, flattened, resolved
from .given import check_iterable
from .lowrank import LowRank
from .node import Node
from .node_names import check_name, check_path, is_pattern
from .provenance import SaveNote
from .spec import CacheSpec, HistorySpec, LoraSpec, lora_spec, tree_defaults
from .storage import Source, as_path, names_of, storage
from .weights import GivenWeight, Weight, as_weight, blended, check_matched

__all__ = ["AdapterTree", "Node"]


class AdapterTree:
    """A tree of adapters over one base.

    Args:
        base: the base model's name: a hub id, or a folder as a string or a `Path`.
        defaults: how fresh adapters are made, in PEFT's words: ``r``, ``lora_alpha``,
            ``target_modules``, ….

    Raises:
        SpecError: ``defaults`` has an unknown word or a value of the wrong kind, or ``base`` is no
            name.

    >>> tree = AdapterTree(base="org/model", defaults=dict(r=16, target_modules=["q_proj"]))
    >>> _ = tree.add("fr"); _ = tree.add("fr/legal", weight=0.8)
    >>> tree.paths()
    ['fr', 'fr/legal']
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        defaults: LoraSpec | dict[str, Any] | None = None,
    ) -> None:
        self.base = _base_name(base)
        self.defaults = tree_defaults(defaults)
        self.cache = CacheSpec()
        self.history = HistorySpec()
        self.home: Path | None = None
        self._models = AttachedModels()
        self._graph: nx.DiGraph[str] = nx.DiGraph()
        # With the root in the graph, a node at the top has a parent like any other, and walks need
        # no case of their own for it. It has no `Node`, so lookups leave it out.
        self._graph.add_node("")
        self._of_path: dict[str, dict[str, Weight]] = {}
        """Path → its coefficients, as far as they were asked for since a weight has changed."""

    # ------------------------------------------------------------------ looking
    @property
    def graph(self) -> nx.DiGraph[str]:
        """The tree as a frozen networkx graph: paths, with each `Node` under ``node``; the root is
        ``""``.

        It is a copy: changes of its attributes do not reach the tree, and later changes of the tree
        do not reach the copy.
        """
        copy: nx.DiGraph[str] = nx.freeze(self._graph.copy())
        return copy

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and path != "" and path in self._graph

    def __len__(self) -> int:
        return len(self._graph) - 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths())

    def __getitem__(self, path: str) -> Node:
        self._known(path)
        if path == "":
            raise PathError("the root is the bare base and has no node")
        node: Node = self._graph.nodes[path]["node"]
        return node

    def __repr__(self) -> str:
        return f"AdapterTree({plural(len(self), 'node')}, base={self.base!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy or a pickle, to which no model is attached."""
        # Weak references to models can't be pickled. A deep copy would keep them, and would ask a
        # model that knows nothing of the copy before its nodes are changed.
        own = {"_graph": self._graph.copy(), "_models": AttachedModels(), "_of_path": {}}
        return vars(self) | own

    def paths(self, under: str = "") -> list[str]:
        """Return every path below ``under``, depth-first, children by name: the order of every sum.

        Raises:
            PathError: ``under`` is no node; suggests the nearest one.
        """
        self._known(under)
        found: list[str] = []
        # Reversed, because a stack gives back the last entry first and children come by name.
        stack = self.children(under)[::-1]
        while stack:
            path = stack.pop()
            found.append(path)
            stack.extend(self.children(path)[::-1])
        return found

    def children(self, path: str = "") -> list[str]:
        """Return the paths one step below ``path``, by name.

        Raises:
            PathError: ``path`` is no node; suggests the nearest one.
        """
        self._known(path)
        # networkx gives children in the order in which they were added, and a sum in that order
        # would change its last bits when a saved tree is opened again.
        return sorted(self._graph.successors(path))

    def leaves(self) -> list[str]:
        """Return the paths without children, depth-first."""
        return [path for path in self.paths() if not self._graph.out_degree(path)]

    def parent(self, path: str) -> str:
        """Return the path one step up; ``""`` for a top-level node.

        Raises:
            PathError: ``path`` is no node; suggests the nearest one.
        """
        self._known(path)
        return path.rpartition("/")[0]

    def lineage(self, path: str) -> list[str]:
        """Return the nodes from the root down to ``path``; ``[]`` for the bare base.

        Raises:
            PathError: ``path`` is no node; suggests the nearest one.
        """
        self._known(path)
        # A node's names were checked when it came into the tree, so its path is only taken apart.
        names = path.split("/") if path else []
        return ["/".join(names[: i + 1]) for i in range(len(names))]

    def common_ancestor(self, *paths: str) -> str:
        """Return the deepest node on the lineages of all ``paths``; ``""`` if only the base is.

        Raises:
            PathError: a path is no node; suggests the nearest one.
        """
        lineages = [self.lineage(path) for path in paths]
        shared = ""
        # zip ends with the shortest lineage: no common ancestor lies deeper than any of the paths.
        for level in zip(*lineages, strict=False):
            if len(set(level)) > 1:
                break
            shared = level[0]
        return shared

    def coefficients(self, blend: Blend) -> dict[str, Weight]:
        """Return node → coefficient, node weights included, in the order of the sum, without zeros.

        A coefficient is a number, or a number for each module if the node's weight, or one of the
        blend, is.

        Raises:
            PathError: a path is no node; suggests the nearest one.
            SpecError: a weight, or a node's coefficient, is not a finite number, or the blend is
                empty.

        >>> tree = AdapterTree()
        >>> for path in ("fr", "fr/legal", "fr/medical"): _ = tree.add(path)
        >>> tree.coefficients("fr/legal:0.5+fr/medical:0.5")
        {'fr': 1.0, 'fr/legal': 0.5, 'fr/medical': 0.5}
        """
        if isinstance(blend, str):
            # Taken before the nodes are read. If one is changed meanwhile, the tree has another
            # dictionary by then, and what was read here gets lost with this one.
            of_path = self._of_path
            known = of_path.get(blend)
            if known is None and blend in self._graph:
                known = of_path[blend] = self._own_weights(blend)
            if known is not None:
                return dict(known)
        coefficients = {}
        for path, shares in self._shares(blend).items():
            coefficient = blended(path, shares, self[path].weight)
            # A zero is left out, not multiplied: 0 · inf is NaN, and its files need not be read.
            if coefficient != 0.0:
                coefficients[path] = coefficient
        return coefficients

    def _own_weights(self, path: str) -> dict[str, Weight]:
        """Return the coefficients of one path: the weights of its nodes, without zeros."""
        weights = {}
        for node in self.lineage(path):
            weight = self._graph.nodes[node]["node"].weight
            if weight != 0.0:
                weights[node] = weight
        return weights

    def shares(self, blend: Blend) -> dict[str, Weight]:
        """Return node → the total weight of the entries through it, without the node's own weight.

        Raises:
            PathError, SpecError: as `coefficients`.
        """
        return {path: blended(path, each, 1.0) for path, each in self._shares(blend).items()}

    def _shares(self, blend: Blend) -> dict[str, list[Weight]]:
        found: dict[str, list[Weight]] = {}
        for path, weight in self._entries(blend).items():
            for ancestor in self.lineage(path):
                found.setdefault(ancestor, []).append(weight)
        return {path: found[path] for path in sorted(found, key=depth_first)}

    def _entries(self, blend: Blend) -> Mapping[str, Weight]:
        # A path of the tree needs no parsing: no name holds the ':' or '+' of a blend.
        if isinstance(blend, str) and blend in self._graph:
            return {blend: 1.0}
        return parse_blend(blend)

    def matching(self, patterns: Iterable[str]) -> list[str]:
        """Return the nodes that paths or patterns like ``"fr/*"`` name, in the order of the sum.

        Raises:
            PathError: one matches no node.
            SpecError: they are no list.

        >>> tree = AdapterTree()
        >>> for path in ("fr", "fr/legal", "de"): _ = tree.add(path)
        >>> tree.matching(["fr/*", "de"])
        ['de', 'fr/legal']
        """
        if isinstance(patterns, str):
            # Its letters would be taken for patterns, one by one.
            raise PathError(f"expected a list of paths or patterns, got the string {patterns!r}")
        check_iterable(patterns, "expected a list of paths or patterns")
        chosen: set[str] = set()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise PathError(
                    f"a path or pattern is a string like 'fr/*', got {pattern!r:.80}",
                    "pass several as separate arguments: trainable('fr', 'de')",
                )
            # A node of exactly that name comes first, then the pattern is tried.
            hits = {pattern} if pattern in self else set(fnmatch.filter(self.paths(), pattern))
            if not hits:
                raise PathError(
                    f"{pattern!r} matches no node{suggest_path(pattern, self.paths())}",
                    self._has(),
                )
            chosen |= hits
        return [path for path in self.paths() if path in chosen]

    # ------------------------------------------------------------------ changing
    def add(
        self,
        path: str,
        *,
        adapter: Adapter | str | os.PathLike[str] | None = None,
        weight: GivenWeight = 1.0,
        group: bool = False,
        **lora: Any,
    ) -> Node:
        """Put a node below an existing one.

        Args:
            path: its name; the node above must be there already.
            adapter: an `Adapter`, or a PEFT folder, or a ``.safetensors`` file of kohya's or
                diffusers'; files are read when first needed.
            weight: factor on its increments: a number, or a number for each module by patterns on
                its name, ``{"default": 1.0, "*.down_proj": 0.5, "layers.[0-7].*": 0}``. The first
                pattern that matches counts.
            group: the node has no adapter of its own, now or later.
            **lora: how to make a fresh adapter when the tree is attached (words of `LoraSpec`),
                over ``defaults``.

        Raises:
            PathError: the name is not valid, or the node above is missing.
            TreeError: the node exists, or one that differs only by case does.
            SpecError: a value makes no sense, or ``adapter``, ``group`` and ``lora`` were mixed; or
                a pattern of ``weight`` matches no module of the adapter.
            FormatError: the folder, or the file, does not hold a whole adapter.

        >>> tree = AdapterTree(defaults=dict(target_modules=["q_proj"]))
        >>> _ = tree.add("fr", r=16)                      # fresh: made when the tree is attached
        >>> import lora_tree as lt
        >>> q_proj = lt.LowRank(torch.ones(2, 4), torch.ones(4, 2))
        >>> legal = tree.add("fr/legal", adapter=lt.Adapter({"q_proj": q_proj}), weight=0.8)
        >>> legal.name, legal.weight, legal.has_adapter
        ('legal', 0.8, True)
        >>> _ = tree.add("de/legal")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lora_tree.errors.PathError: no node 'de' in the tree, below which de/legal would lie
          add it first, without an adapter: tree.add('de', group=True), ...
        """
        names = check_path(path)
        if not names:
            raise PathError("the root is the bare base; add nodes below it, like 'fr'")
        parent = "/".join(names[:-1])
        # The parent first: `_free` looks at its children, and for a parent that is not there
        # networkx would raise an error of its own.
        self._parent_of(path, parent)
        self._free(path)
        if sum((adapter is not None, group, bool(lora))) > 1:
            raise SpecError(
                f"{path}: a node has an adapter, or is a group, or is made fresh from "
                f"{listing(sorted(lora)) or 'r, …'}"
            )
        own_weight = as_weight(weight, f"{path}: weight")
        loaded, source, fresh = None, None, None
        if isinstance(adapter, Adapter):
            loaded = adapter
        elif adapter is not None:
            source = _source(path, adapter)
        elif not group:
            fresh = lora_spec(lora, path)
        # Everything is checked by now, so an error leaves the tree as it was. No attached model is
        # asked: a path that is active can't lead through a node that is new.
        node = Node(path, own_weight, loaded, source, fresh)
        _check_patterns(node)
        self.replace(node)
        return node

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Take a node out; its files stay until the tree is saved.

        Raises:
            PathError: there is no such node.
            TreeError: it has children and ``recursive`` was not given, or an attached model is
                using it.
        """
        self[path]  # raises if there is no such node
        below = self.paths(path)
        if below and not recursive:
            raise TreeError(
                f"{path} has children: {listing(below)}",
                "remove them first, move them, or take them along: remove(path, recursive=True), "
                "lora-tree rm --recursive",
            )
        self._models.check_unused([path, *below], "removed")
        self._graph.remove_nodes_from([path, *below])
        self._of_path = {}

    def move(self, path: str, to: str) -> None:
        """Give a node another path, its children with it.

        A node that was trained becomes stale below another parent.

        Raises:
            PathError: ``path``, or the node above ``to``, is missing; or ``to`` is not a valid
                path.
            TreeError: ``to`` exists or lies below ``path``, or an attached model is using the node.
        """
        self[path]
        names = check_path(to)
        if not names:
            raise PathError("the root is the bare base and can't be moved to")
        if to == path:
            return
        # With the slashes, or "french" would be taken for a node below "fr".
        if (to + "/").startswith(path + "/"):
            raise TreeError(f"{path} can't be moved below itself, to {to}")
        self._parent_of(to, "/".join(names[:-1]))
        # A node is not in its own way, so that a name may change in its case alone.
        self._free(to, but=path)
        below = self.paths(path)
        self._models.check_unused([path, *below], "moved")
        # Taken before they leave the graph, which drops their values. Parents come before children,
        # and go back in that order: see `replace`.
        nodes = [self[p] for p in (path, *below)]
        self._graph.remove_nodes_from([n.path for n in nodes])
        for node in nodes:
            self.replace(replace(node, path=to + node.path[len(path) :]))

    def rename(self, path: str, name: str) -> None:
        """Give a node another name below the same parent; see `move`.

        Raises:
            PathError: there is no such node, or ``name`` is not a valid name.
            TreeError: a sibling has that name, or an attached model is using the node.
        """
        parent = self.parent(path)
        self.move(path, f"{parent}/{check_name(name)}" if parent else check_name(name))

    def update(
        self,
        path: str,
        *,
        adapter: Adapter | str | os.PathLike[str] | None = None,
        weight: GivenWeight | None = None,
    ) -> Node:
        """Give a node another adapter or another weight, a number or one for each module.

        Raises:
            PathError: there is no such node.
            TreeError: an attached model is using it.
            SpecError: the weight is not a finite number, or ``adapter`` is neither an adapter nor a
                folder; or a pattern of the weight matches no module of the adapter.
            FormatError: the folder does not hold a whole adapter.
        """
        node = self[path]
        if weight is not None:
            node = replace(node, weight=as_weight(weight, f"{path}: weight"))
        if isinstance(adapter, Adapter):
            node = node.holding(adapter)
        elif adapter is not None:
            node = node.read_from(_source(path, adapter))
        if adapter is not None or weight is not None:
            _check_patterns(node)
        self._models.check_unused([path], "changed")
        self.replace(node)
        return node

    # ------------------------------------------------------------------ values
    def adapter(self, path: str) -> Adapter | None:
        """Return a node's own adapter, read when first needed; None for a group or a fresh node.

        It stays in memory from then on; if a model with a budget is attached, only as long as the
        budget allows.

        Raises:
            PathError: there is no such node.
            FolderError, FormatError: its files are gone, broken, or differ from the lock.
            BudgetError: it is larger than the budget leaves room for.
        """
        node = self[path]
        if node.loaded is not None or node.source is None:
            return node.loaded
        # A model with budgets reads it, since an adapter that the tree kept would not be counted.
        reader = self._models.reader
        if reader is not None:
            return reader.read_adapter(path, node.source)
        try:
            adapter = node.source.load()
        except LoraTreeError as error:
            raise error.within(path) from error
        self.replace(node.with_loaded(adapter, rereadable=True), was=node)
        return adapter

    def outline(self, path: str) -> Adapter | None:
        """Return a node's own adapter; if it is not in memory, its shapes on the meta device.

        Raises:
            PathError: there is no such node.
            FormatError: its files are gone or broken.
        """
        return self[path].outline()

    def terms(
        self,
        blend: Blend,
        *,
        base: nn.Module | None = None,
        bound: Callable[[str, Adapter], Adapter] | None = None,
    ) -> NodeTerms:
        """Return the terms of a blend, (node, coefficient, adapter), in the order of the sum.

        Increments and overrides that a deeper override replaces are dropped, so the adapters
        returned simply add up to the path. A weight per module is multiplied into the scales of its
        adapter, whose coefficient is then 1.

        Args:
            base: give every adapter the names that its modules have in this model today.
            bound: called with each (node, adapter) after the renaming; returns the adapter as a
                base needs it, for callers that know more of the base than its names.

        Raises:
            PathError, SpecError: as `coefficients`; or the paths of a blend have different
                overrides of a tensor; or a pattern of a weight matches no module.
            FolderError, FormatError: a node's files are gone, broken, or differ from the lock;
                names the node.
            BaseMismatch: an adapter can't be put into the base's names; names the node and the
                module.
        """
        path_terms = []
        for path, coefficient in self.coefficients(blend).items():
            adapter = self.adapter(path)
            if adapter is None:
                continue  # a group, or a fresh node that no base has made an adapter for
            path_terms.append((path, coefficient, adapter))
        terms = []
        # Patterns are meant for the adapter's own names, so weights come before renaming.
        for path, number, adapter in weighed_terms(path_terms):
            own = adapter if base is None else _named(path, adapter, base)
            terms.append((path, number, own if bound is None else bound(path, own)))
        if not any(adapter.overrides for _, _, adapter in terms):
            return terms  # nearly every tree
        return resolved(terms, self.counting_lineages(blend))

    def counting_lineages(self, blend: Blend) -> list[list[str]]:
        """Return for each path of a blend its nodes from the root down, without those of weight 0.

        They decide which overrides count; a path with a weight of 0 is left out.

        Raises:
            PathError, SpecError: as `coefficients`.

        >>> tree = AdapterTree()
        >>> for path in ("fr", "fr/legal", "de"): _ = tree.add(path)
        >>> tree.counting_lineages({"fr/legal": 0.5, "de": 0.5})
        [['fr', 'fr/legal'], ['de']]
        """
        lineages = []
        for path, weight in self._entries(blend).items():
            lineage = self.lineage(path)
            if weight != 0.0:
                lineages.append([node for node in lineage if self[node].weight != 0.0])
        return lineages

    def flatten(
        self,
        blend: Blend,
        rank: int | None = None,
        *,
        max_error: float | None = None,
        dtype: torch.dtype | None = None,
        base: nn.Module | None = None,
    ) -> Adapter:
        """Return one ordinary adapter equal to a whole lineage or blend.

        Args:
            blend: a path or a blend.
            rank: the largest rank to keep in any module; None keeps the sum exact, at rank Σr.
            max_error: the largest relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ allowed in any module.
            dtype: round the factors to it; None keeps them in fp32, or narrower where nothing has
                to be rounded.
            base: a model, also one on the meta device: the adapter gets the names that its modules
                have there today. It is needed where nodes name one module in two ways, because an
                earlier transformers named it otherwise.

        Returns:
            the adapter; its ``errors`` say what a truncation cost, and ``rounded`` which modules
            ``dtype`` rounded.

        Raises:
            PathError: a path is no node.
            ShapeMismatch: two nodes change one module in different shapes; names both and the
                module.
            BaseMismatch: two nodes were made for bases that differ; or name one module in two ways,
                and no base was given; or don't fit it.
            SpecError: ``rank`` and ``max_error`` can't both be met; or factors that are finite give
                some that are not.

        >>> import lora_tree as lt
        >>> tree = AdapterTree()
        >>> for path, r in (("fr", 2), ("fr/legal", 3)):
        ...     q_proj = lt.LowRank(torch.ones(r, 4), torch.ones(4, r))
        ...     _ = tree.add(path, adapter=lt.Adapter({"q_proj": q_proj}))
        >>> tree.flatten("fr/legal").ranks
        {'q_proj': 5}
        >>> short = tree.flatten("fr/legal", 1)
        >>> short.ranks, round(short.error, 6)
        ({'q_proj': 1}, 0.0)
        """
        terms = self.terms(blend, base=base)
        return flattened(terms, rank=rank, max_error=max_error, dtype=dtype, base=base)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        copy: bool = False,
        note: SaveNote | str | None = None,
        dry_run: bool = False,
    ) -> None:
        """Write the tree as a folder of nested PEFT adapters, atomically as a whole.

        What it replaces or deletes is kept in the folder's history, within the bound that
        ``versions`` of tree.yaml sets; see `lora_tree.restore`.

        Args:
            folder: made where missing. Files in it that no save wrote are never deleted.
            copy: bring adapters that live elsewhere into the folder; otherwise tree.yaml names
                where they are.
            note: what the save says of itself in tree.lock and in the history: the name of the
                program, or a `SaveNote` with what nodes were trained with.
            dry_run: write nothing; only raise what the save would raise.

        Raises:
            FolderError: the folder can't be written; or a removed node would come back, because no
                save wrote its files and so none deletes them; or the save would undo what another
                process has written there since the tree was opened.
            FormatError: PEFT has no way to write a node; names the node and the module.
            LoraTreeError: the tree in the folder can't be opened, or a node's files not be read.
        """
        if not isinstance(note, SaveNote):
            note = SaveNote() if note is None else SaveNote(by=note)
        storage().save_tree(self, as_path(folder), copy=copy, note=note, dry_run=dry_run)

    # ------------------------------------------------------------------ for the folder
    @classmethod
    def from_nodes(
        cls,
        nodes: Iterable[Node],
        *,
        base: str | None = None,
        defaults: LoraSpec | None = None,
        cache: CacheSpec | None = None,
        history: HistorySpec | None = None,
        home: Path | None = None,
    ) -> AdapterTree:
        """Return a tree of nodes whose paths are known to fit together, parents before children."""
        tree = cls(base, defaults)
        tree.cache = cache or tree.cache
        tree.history = history or tree.history
        for node in nodes:
            tree.replace(node)
        tree.home = home
        return tree

    # ------------------------------------------------------------------ for an attached model
    def attach(self, model: AttachedModel, *, reads: bool) -> None:
        """Consult a model, held weakly, before nodes change; see `lora_tree.attach`.

        Args:
            model: the model.
            reads: the model has budgets. From now on it reads adapters from files when they are
                needed, and the tree drops those that it read itself: no budget would count them.
        """
        self._models.add(model, reads=reads)
        if not reads:
            return
        for path in self.paths():
            node = self[path]
            # An adapter that is in memory alone stays: to drop it would lose it.
            if node.rereadable:
                self.replace(node.unloaded())

    def release(self, model: AttachedModel) -> None:
        """Stop consulting a model; a tree without a reader keeps what it reads itself."""
        self._models.drop(model)

    def replace(self, node: Node, *, was: Node | None = None) -> None:
        """Replace a node's value. For the library's own use: no attached model is consulted.

        Args:
            node: the new value; it is known to fit below its parent.
            was: the value that it was made from. If the tree holds another one by now, nothing
                happens: the node was changed, or removed, while its files were read.
        """
        before = self._graph.nodes.get(node.path, {}).get("node")
        if was is not None and before is not was:
            return
        # networkx adds a missing end of an edge by itself, and that node would have no `Node`. So
        # callers replace parents before children.
        self._graph.add_node(node.path, node=node)
        self._graph.add_edge(node.path.rpartition("/")[0], node.path)
        # A node that was read, or that a model has sent away, weighs what it did.
        if before is None or before.weight != node.weight:
            self._of_path = {}

    # ------------------------------------------------------------------ private
    def _known(self, path: str) -> None:
        if not isinstance(path, str):
            raise PathError(f"a path is a string like 'fr/legal', got {path!r}")
        if path not in self._graph:
            hint = suggest_path(path, self._graph)
            if is_pattern(path):
                hint = ": one path is wanted here, and this is a pattern"
            raise PathError(
                f"no node {path!r} in the tree{hint}",
                self._has(),
            )

    def _has(self) -> str:
        """Say in an error which nodes there are."""
        return f"the tree has: {listing(self.paths()) or 'no nodes yet'}"

    def _parent_of(self, path: str, parent: str) -> None:
        """Raise if the node above a new one is missing, and say how to make it."""
        if parent not in self._graph:
            above = parent.rpartition("/")[0]
            while above not in self._graph:  # the root is always there
                parent, above = above, above.rpartition("/")[0]
            raise PathError(
                f"no node {parent!r} in the tree, below which {path} would lie"
                f"{suggest_path(parent, self._graph)}",
                f"add it first, without an adapter: tree.add({parent!r}, group=True), "
                f"or lora-tree add FOLDER {parent} --group",
            )

    def _free(self, path: str, but: str | None = None) -> None:
        parent, folded = path.rpartition("/")[0], path.casefold()
        for sibling in self._graph.successors(parent):
            # Paths are folders in a saved tree, and many disks do not tell case apart.
            if sibling != but and sibling.casefold() == folded:
                detail = f"differs from {sibling} only by case"
                if sibling == path:
                    detail = "exists already"
                raise TreeError(f"{path} {detail}", "remove or rename the other one first")


def _check_patterns(node: Node) -> None:
    """Refuse a weight with a pattern that matches no module of the node's adapter, if it has one.

    Raises:
        SpecError: one matches none.
        FormatError: the files are gone or broken; names the node.
    """
    if isinstance(node.weight, float) or not node.has_adapter:
        return
    adapter = node.outline()  # names alone, no factors
    assert adapter is not None
    check_matched([(node.path, node.weight, adapter.module_names)])


def _named(path: str, adapter: Adapter, base: nn.Module) -> Adapter:
    try:
        return names_of(base).bound(adapter)
    except LoraTreeError as error:
        raise error.within(path) from error


def _source(path: str, folder: object) -> Source:
    if not isinstance(folder, (str, os.PathLike)):
        what = f"{path}: expected an Adapter or the folder of one, got {type(folder).__name__}"
        # The likeliest mistake: an adapter's modules without the `Adapter` around them.
        if isinstance(folder, (LowRank, Mapping)):
            raise SpecError(what, "lora_tree.Adapter({module: …}) is one")
        raise SpecError(what)
    return storage().source(as_path(folder))


def _base_name(base: object) -> str | None:
    name = os.fspath(base) if isinstance(base, os.PathLike) else base
    if name is not None and not isinstance(name, str):
        raise SpecError(f"base: a model's name is a hub id or a folder, got {base!r}")
    return name
