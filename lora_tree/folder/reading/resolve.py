"""Resolve: what tree.yaml and the folders below it mean together, as path → `FolderNode`.

tree.yaml says                      and the folder <path> holds   the node is
adapter: elsewhere, or hub:org/name no adapter                    the adapter that is named
adapter: null                       anything                      a group: no adapter of its own
the node, without ``adapter``       an adapter                    that adapter
                                    none                          fresh, if it or defaults say how;
                                                                  else a group
nothing                             an adapter                    that adapter, below groups
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ...errors import LoraTreeError, PathError
from ...formats.recognise import MLX_WEIGHTS
from ...node_names import check_path
from ...spec import LoraSpec, NodeSpec, TreeSpec
from ...weights import Weight, as_weight
from ..adapters.adapter_files import check_named
from ..adapters.scan import Files, Scan, find_files
from ..bounds import inside, tree_above
from ..hub_name import fetched, is_on_hub, parse_hub_name
from ..lockfile import HubLock
from ..problem import Problem
from ..yamlfile import Located, walk
from .training_steps import is_step, paths_above, step_of

__all__ = ["FolderNode", "Resolved", "resolve"]


@dataclass(frozen=True)
class FolderNode:
    """A node as its folder has it.

    Args:
        weight: factor on its increments: a number, or one for each module.
        files: its adapter's files; None for a fresh node or a group.
        named: tree.yaml names the folder of the adapter.
        fresh: how its adapter is to be made.
        null: tree.yaml says that it has no adapter.
        hub: if its adapter is on the model hub, its name there and the commit of its files. If
            ``files`` is None, it may not be fetched.
    """

    weight: Weight = 1.0
    files: Files | None = None
    named: bool = False
    fresh: LoraSpec | None = None
    null: bool = False
    hub: HubLock | None = None


@dataclass(frozen=True)
class Resolved:
    """The nodes that tree.yaml and the folders describe together.

    Args:
        entries: the nodes, depth-first by name.
        problems: the folders that can't be nodes.
        passed: the paths of adapters that are steps of a node's own training run, which are passed
            over.
    """

    entries: dict[str, FolderNode]
    problems: list[Problem]
    passed: list[str]


def resolve(
    spec: TreeSpec | None,
    located: Located | None,
    scan: Scan,
    folder: str,
    *,
    outside: bool = True,
    pins: Mapping[str, HubLock] | None = None,
) -> Resolved:
    """Find every node, and the folders that can't be one.

    Args:
        spec, located: the content of tree.yaml, and its positions; None if there is none.
        scan: the adapters below ``folder``.
        folder: the tree's.
        outside: whether tree.yaml may name adapters that lie outside of ``folder``.
        pins: node → the adapter on the hub and its commit, as the lock records them.
    """
    resolving = _Resolving(scan, folder, outside, pins or {})
    resolving.problems += [Problem(path, "folder", text) for path, text in scan.wrong]
    # The nodes of tree.yaml come first: an adapter in a folder is judged by it.
    if spec is not None:
        for path, node, loc in walk(spec):
            at = f"{located.at((*loc, 'adapter'))}: node {path}: " if located else f"{path}: "
            resolving.add_listed(path, node, spec.defaults, at)
    # The scan lists parents first, so the adapter of a run is known before its steps are judged.
    for path, files in scan.found.items():
        resolving.add_folder(path, files)
    # Links come last: whether one belongs to a run that is passed over depends on the nodes found
    # so far.
    for path, target in scan.links.items():
        resolving.judge_link(path, target)
    # Parents come before their children in this order. Callers rely on it: a lineage is made from
    # the one above it.
    ordered = {path: resolving.entries[path] for path in sorted(resolving.entries, key=_by_level)}
    problems = [*resolving.problems, *_twins(ordered, folder)]
    return Resolved(ordered, problems, resolving.passed)


def _by_level(path: str) -> list[str]:
    """Return the key that sorts paths depth-first: ``a/b`` before ``a-b``."""
    return path.split("/")


@dataclass
class _Resolving:
    """The findings so far.

    Args:
        claimed: the folders, relative to the tree's, that tree.yaml names; such a folder does not
            make a node at its own path.
    """

    scan: Scan
    folder: str
    outside: bool
    pins: Mapping[str, HubLock]
    entries: dict[str, FolderNode] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)

    # ------------------------------------------------------------------ a node that tree.yaml lists
    def add_listed(self, path: str, node: NodeSpec, defaults: LoraSpec, at: str) -> None:
        """Add a node of tree.yaml, or a problem in its place; ``at`` is its line, for messages."""
        if node.adapter is not None and is_on_hub(node.adapter):
            self._add_from_hub(path, node.adapter, as_weight(node.weight), at)
            return
        if node.adapter is not None:
            home = self._home(node.adapter)
            self.claimed.add(os.path.relpath(home, self.folder))
            if not self.outside and not inside(home, self.folder):
                text = at + _leads_out(node.adapter, self.folder)
                self.problems.append(Problem(path, "folder", text))
                return
        try:
            entry = self._listed(path, node, defaults)
        except LoraTreeError as error:
            self.problems.append(Problem(path, "adapter", f"{at}{error}"))
            return
        self.entries[path] = entry
        if entry.named and entry.files is not None:
            self._check_named(path, entry.files, at)

    def _add_from_hub(self, path: str, named: str, weight: Weight, at: str) -> None:
        """Add a node whose adapter is on the model hub."""
        pin = self.pins.get(path)
        if pin is not None and pin.adapter != named:
            pin = None  # tree.yaml names another one since it was locked
        if not self.outside:
            text = at + _on_the_hub(named, self.folder)
            self.problems.append(Problem(path, "hub", text))
            self.entries[path] = FolderNode(weight, named=True, hub=pin)
            return
        try:
            name = parse_hub_name(named)
            assert name is not None, "the caller has looked at its beginning"
            got = fetched(name, None if pin is None else pin.commit)
        except LoraTreeError as error:
            self.problems.append(Problem(path, "adapter", f"{at}{error}"))
            return
        files = find_files(got.place)
        hub = HubLock(adapter=named, commit=got.commit)
        self.entries[path] = FolderNode(weight, files, named=True, hub=hub)
        self._check_named(path, files, at)

    def _listed(self, path: str, node: NodeSpec, defaults: LoraSpec) -> FolderNode:
        if node.adapter is not None:
            return FolderNode(as_weight(node.weight), self._named_files(node.adapter), named=True)
        if "adapter" in node.model_fields_set:  # it says null, which a missing key does not
            return FolderNode(as_weight(node.weight), null=True)
        if path in self.scan.found:
            return FolderNode(as_weight(node.weight), self.scan.found[path])
        recipe = LoraSpec(**{name: getattr(node, name) for name in LoraSpec.model_fields})
        is_fresh = recipe != LoraSpec() or defaults.has_targets
        return FolderNode(as_weight(node.weight), fresh=recipe if is_fresh else None)

    def _named_files(self, named: str) -> Files:
        """Find the files of an adapter of which tree.yaml names the folder, or the one file."""
        home = self._home(named)
        check_named(home, named, self.folder)
        below = os.path.relpath(home, self.folder)
        # If it lies in the tree's own folder, the scan has found it already, and with it the files
        # of a pending save. But the scan takes every adapter_config.json for PEFT's.
        scanned = self.scan.found.get("" if below == "." else below)
        if scanned is None or self._is_mlx(below, scanned):
            return find_files(home)
        return scanned

    def _is_mlx(self, path: str, files: Files) -> bool:
        """Tell whether mlx-lm wrote a folder that looks like one half of PEFT's."""
        return files.flaw is not None and f"{path}/{MLX_WEIGHTS}" in self.scan.single

    def _check_named(self, path: str, files: Files, at: str) -> None:
        """Refuse a named adapter that is not whole, or that is not the node's only one."""
        if files.flaw is not None:
            self.problems.append(Problem(path, "adapter", at + files.flaw))
        own = self.scan.found.get(path)
        if own is not None and os.path.relpath(files.folder, self.folder) != path:
            text = f"{files.folder} is named, but {own.folder} holds an adapter too; remove one"
            self.problems.append(Problem(path, "adapter", at + text))

    def _home(self, named: str) -> str:
        """Return the folder of an adapter that tree.yaml names."""
        return os.path.normpath(os.path.join(self.folder, os.path.expanduser(named)))

    # ------------------------------------------------------------------ an adapter in a folder
    def add_folder(self, path: str, files: Files) -> None:
        """Add an adapter's folder as a node or as a problem, or pass it over."""
        # `os.path.relpath` spells the top folder ".", and a scan spells it "".
        if (path or ".") in self.claimed:
            return
        if path in self.entries and (self.entries[path].null or self.entries[path].named):
            return  # tree.yaml says that this adapter is not the node's
        if self._is_passed_over(path):
            self.passed.append(path)
            return
        problem = self._misplaced(path, files)
        if problem is not None:
            self.problems.append(problem)
        elif path not in self.entries:
            for above in paths_above(path):
                if above in self.claimed and above not in self.entries:
                    self.problems.append(
                        Problem(above, "folder", self._taken_adapter_text(above, path))
                    )
                self.entries.setdefault(above, FolderNode())  # a group
            self.entries[path] = FolderNode(files=files)

    def _taken_adapter_text(self, above: str, path: str) -> str:
        """Say that a node would lose its adapter, because tree.yaml names it for another one."""
        text = (
            f"{os.path.join(self.folder, above)}: tree.yaml names this adapter for another node, "
            f"and {path} lies below it"
        )
        todo = (
            f"say in tree.yaml what {above} is: {{}} for that adapter, "
            "{adapter: null} for a group"
        )
        return f"{text}; {todo}"

    def _is_passed_over(self, path: str) -> bool:
        """Tell whether this is a step of the run that left a node's adapter.

        If ``french`` is a node, ``french/checkpoint-500`` is none. But a step that tree.yaml lists
        is a node like any other, and the folders in it are not its steps.
        """
        run = step_of(path)
        if run is None or any(on in self.entries for on in _steps_on(path)):
            return False
        if run in self.claimed:
            return True
        return run in self.entries and self.entries[run].files is not None

    def _misplaced(self, path: str, files: Files) -> Problem | None:
        """Say why the adapter in a folder can't be the node of that path; None if it can."""
        if not path:
            text = (
                f"{files.folder}: an adapter in the top folder, "
                "but the root of a tree is the bare base"
            )
            advice = "\n  ".join(_advice_at_top(self.scan, files.folder))
            return Problem("", "folder", f"{text}\n  {advice}")
        unlisted = [on for on in _steps_on(path) if on not in self.entries]
        if unlisted:
            name = unlisted[0].rpartition("/")[2]
            text = f"{files.folder}: {name} looks like a step of a Trainer's run, not like a node"
            todo = (
                f"name the one you want in tree.yaml ({{adapter: {path}}}), "
                "and move the others away"
            )
            return Problem(path, "folder", f"{text}; {todo}")
        try:
            check_path(path)
        except PathError as error:
            todo = f"rename the folder, or name it in tree.yaml ({{adapter: {path}}})"
            return Problem(path, "folder", f"{files.folder}: {error}\n  {todo}")
        if self._is_mlx(path, files):
            text = f"{files.folder}: mlx-lm wrote this adapter, and only PEFT folders are nodes"
            todo = f"name it in tree.yaml ({{adapter: {path}}}), or move it away"
            return Problem(path, "adapter", f"{text}; {todo}")
        if files.flaw is not None:
            return Problem(path, "adapter", files.flaw)
        return None

    # ------------------------------------------------------------------ a link to a folder
    def judge_link(self, path: str, target: str) -> None:
        """Refuse a link to a folder, unless it belongs to a training run that is passed over."""
        if path in self.claimed:
            return
        # A run may hold a link to its last step, and a step may hold links.
        real_path = os.path.relpath(target, os.path.realpath(self.folder))
        if self._is_passed_over(path) or self._is_passed_over(real_path):
            return
        text = (
            f"{os.path.join(self.folder, path)}: a link to {target}; a tree's folders are its own"
        )
        todo = f"name it in tree.yaml ({{adapter: {target}}}), or move it away"
        self.problems.append(Problem(path, "folder", f"{text}: {todo}"))


def _steps_on(path: str) -> list[str]:
    """Return the paths on the way to ``path``, itself included, that look like steps of a run."""
    return [on for on in (*paths_above(path), path) if is_step(on)]


def _on_the_hub(named: str, folder: str) -> str:
    return (
        f"adapter: {named} is on the model hub, and outside=False allows only what lies in "
        f"{folder}\n"
        "  if you trust this tree, allow it, which fetches the adapter: outside=True, or "
        "vllm-args --outside"
    )


def _leads_out(named: str, folder: str) -> str:
    return (
        f"adapter: {named} leads out of {folder}, and outside=False allows only what lies in it\n"
        "  copy that adapter into the folder; or, if you trust this tree, allow it: "
        "outside=True, or vllm-args --outside"
    )


def _advice_at_top(scan: Scan, folder: str) -> list[str]:
    """Guess why a folder has an adapter of its own, and say what to do."""
    part = tree_above(folder)
    if part is not None:
        return [f"this is the node {part[1]} of the tree {part[0]}; open that tree"]
    if any(is_step(path.split("/")[0]) for path in scan.found):
        return [
            "this looks like the output of a Trainer; "
            "open the folder above it, in which this run is a node"
        ]
    if len(scan.found) > 1:
        return [
            "if this folder is a node of a tree, open the folder above it",
            "if PEFT saved several adapters here, the one called 'default' lies in the top "
            "folder: copy its two files into a folder of their own below",
        ]
    return [
        "this is one adapter: open it with Adapter.load, open the folder above it, "
        "or name it in a tree.yaml"
    ]


def _twins(entries: Iterable[str], folder: str) -> Iterator[Problem]:
    """Find paths that are the same on a disk that ignores case."""
    folded: dict[str, str] = {}
    for path in entries:
        twin = folded.setdefault(path.casefold(), path)
        if twin != path:
            text = (
                f"node {path} differs from {twin} only by case, which many disks can't hold; "
                "rename one of them"
            )
            yield Problem(path, "folder", f"{folder}: {text}")
