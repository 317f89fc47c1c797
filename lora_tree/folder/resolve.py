"""What a tree.yaml and the folders below it mean together: path → `Entry`.

tree.yaml says                      and the folder <path> holds   the node is
adapter: elsewhere                  no adapter                    the adapter that is named
adapter: null                       anything                      a group: no adapter of its own
the node, without ``adapter``       an adapter                    that adapter
                                    none                          fresh where it or defaults say how, else a group
nothing                             an adapter                    that adapter, with groups above it where needed
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import FormatError, LoraTreeError, PathError
from ..node_names import check_path
from ..spec import LoraSpec, NodeSpec, TreeSpec
from .bounds import inside, no_folder, tree_above
from .problem import Problem
from .scan import Files, Scan, look
from .yamlfile import Located, walk

__all__ = ["Entry", "Resolved", "is_step", "resolve", "step_of"]

_CHECKPOINT = re.compile(r"checkpoint-[0-9]+\Z")


@dataclass(frozen=True)
class Entry:
    """A node as its folder has it.

    Args:
        weight: factor on its increments.
        files: its adapter's files; None for a fresh node or a group.
        named: tree.yaml names the folder of the adapter.
        fresh: how its adapter is to be made.
        null: tree.yaml says that it has no adapter.
    """

    weight: float = 1.0
    files: Files | None = None
    named: bool = False
    fresh: LoraSpec | None = None
    null: bool = False


@dataclass(frozen=True)
class Resolved:
    """The nodes that tree.yaml and the folders describe together.

    Args:
        entries: the nodes, depth-first by name.
        problems: what can't be a node.
        passed: the paths of adapters that are steps of a node's own training run, which are passed over.
    """

    entries: dict[str, Entry]
    problems: list[Problem]
    passed: list[str]


def resolve(
    spec: TreeSpec | None,
    located: Located | None,
    scan: Scan,
    folder: str,
    *,
    outside: bool = True,
) -> Resolved:
    """Find every node, and what can't be one.

    Args:
        spec, located: what tree.yaml says, and where it says it; None where there is none.
        scan: what lies below ``folder``.
        outside: whether tree.yaml may name adapters that lie outside of ``folder``.
    """
    entries: dict[str, Entry] = {}
    problems = [Problem(path, "folder", text) for path, text in scan.wrong]
    passed: list[str] = []
    claimed: set[str] = set()
    for path, node, loc in walk(spec) if spec else ():
        at = f"{located.at((*loc, 'adapter'))}: node {path}: " if located else f"{path}: "
        if node.adapter is not None:
            claimed.add(os.path.relpath(_home(node.adapter, folder), folder))
        if (
            node.adapter is not None
            and not outside
            and not inside(_home(node.adapter, folder), folder)
        ):
            problems.append(Problem(path, "folder", at + _outside(node.adapter, folder)))
            continue
        try:
            entry = _listed(path, node, spec.defaults if spec else LoraSpec(), scan, folder)
        except LoraTreeError as error:
            problems.append(Problem(path, "adapter", f"{at}{error}"))
            continue
        entries[path] = entry
        if entry.named and entry.files is not None:
            if entry.files.flaw is not None:
                problems.append(Problem(path, "adapter", at + entry.files.flaw))
            if path in scan.found and os.path.relpath(entry.files.folder, folder) != path:
                text = f"{entry.files.folder} is named, but {scan.found[path].folder} holds an adapter too; remove one"
                problems.append(Problem(path, "adapter", at + text))
    for path, files in scan.found.items():
        key = path or "."
        if key in claimed or (path in entries and (entries[path].null or entries[path].named)):
            continue
        if _of_a_run(path, entries, claimed):
            passed.append(path)
            continue
        wrong = _misplaced(path, files, scan, entries)
        if wrong is not None:
            problems.append(wrong)
        elif path not in entries:
            for above in _above(path):
                entries.setdefault(above, Entry())
            entries[path] = Entry(files=files)
    root = os.path.realpath(folder)
    for path, target in scan.links.items():
        within = os.path.relpath(target, root)
        steps = (path, within)  # a run may hold a link to its last step, and a step may hold links
        if path in claimed or any(_of_a_run(step, entries, claimed) for step in steps):
            continue
        text = f"{os.path.join(folder, path)}: a link to {target}; a tree's folders are its own"
        todo = f"name it in tree.yaml ({{adapter: {target}}}), or move it away"
        problems.append(Problem(path, "folder", f"{text}: {todo}"))
    ordered = {path: entries[path] for path in sorted(entries, key=lambda path: path.split("/"))}
    return Resolved(ordered, [*problems, *_twins(ordered, folder)], passed)


def _listed(path: str, node: NodeSpec, defaults: LoraSpec, scan: Scan, folder: str) -> Entry:
    if node.adapter is not None:
        home = _home(node.adapter, folder)
        wrong = no_folder(home, node.adapter, folder)
        if wrong is not None:
            raise FormatError(*wrong)
        below = os.path.relpath(home, folder)
        files = scan.found.get("" if below == "." else below) or look(home)
        return Entry(node.weight, files, named=True)
    if "adapter" in node.model_fields_set:
        return Entry(node.weight, null=True)
    if path in scan.found:
        return Entry(node.weight, scan.found[path])
    own = LoraSpec(**{name: getattr(node, name) for name in LoraSpec.model_fields})
    made = own != LoraSpec() or defaults.has_targets
    return Entry(node.weight, fresh=own if made else None)


def _home(named: str, folder: str) -> str:
    """The folder of an adapter that tree.yaml names."""
    return os.path.normpath(os.path.join(folder, os.path.expanduser(named)))


def _outside(named: str, folder: str) -> str:
    return (
        f"adapter: {named} leads out of {folder}, and outside=False allows only what lies in it\n  "
        f"copy that adapter into the folder; or, where you trust this tree, open it with outside=True"
    )


def _above(path: str) -> Iterator[str]:
    names = path.split("/")[:-1]
    return ("/".join(names[: i + 1]) for i in range(len(names)))


def is_step(path: str) -> bool:
    """Its folder looks like a step of a Trainer's run: it is a node only where tree.yaml lists it."""
    return _CHECKPOINT.match(path.rpartition("/")[2]) is not None


def step_of(path: str) -> str | None:
    """Return the run that an adapter in a folder like ``run/checkpoint-500`` is a step of; None where it is none.

    >>> step_of("fr/run/checkpoint-500"), step_of("checkpoint-500"), step_of("fr/run")
    ('fr/run', None, None)
    """
    step = next((on for on in (*_above(path), path) if is_step(on)), "")
    return step.rpartition("/")[0] or None


def _of_a_run(path: str, entries: Mapping[str, Entry], claimed: set[str]) -> bool:
    """A step of the run that left the adapter of a node: ``french`` is the node, and ``french/checkpoint-500`` is not.

    A step that tree.yaml lists is a node like any other, and what lies in its folder is not its steps.
    """
    run = step_of(path)
    if run is None or any(on in entries for on in (*_above(path), path) if is_step(on)):
        return False
    return run in claimed or (run in entries and entries[run].files is not None)


def _misplaced(path: str, files: Files, scan: Scan, entries: Mapping[str, Entry]) -> Problem | None:
    """Why the adapter in a folder can't be the node of that path; a step among ``entries`` is listed in tree.yaml."""
    if not path:
        text = (
            f"{files.folder}: an adapter in the top folder, but the root of a tree is the bare base"
        )
        return Problem("", "folder", f"{text}: {_top(scan, files.folder)}")
    step = next((on for on in (*_above(path), path) if is_step(on) and on not in entries), None)
    if step is not None:
        text = f"{files.folder}: {step.rpartition('/')[2]} looks like a step of a Trainer's run, not like a node"
        todo = f"name the one you want in tree.yaml ({{adapter: {path}}}), and move the others away"
        return Problem(path, "folder", f"{text}; {todo}")
    try:
        check_path(path)
    except PathError as error:
        return Problem(path, "folder", f"{files.folder}: {error}")
    if files.flaw is not None:
        return Problem(path, "adapter", files.flaw)
    return None


def _top(scan: Scan, folder: str) -> str:
    """What a folder with an adapter of its own probably is, and what to do."""
    part = tree_above(folder)
    if part is not None:
        return f"this is the node {part[1]} of the tree {part[0]}; open that tree"
    if any(is_step(path.split("/")[0]) for path in scan.found):
        return "this looks like the output of a Trainer; open the folder above it, in which this run is a node"
    if len(scan.found) > 1:
        return (
            "where this is a node of a tree, open the folder above it; where it is PEFT's save of several adapters, "
            "whose 'default' lies in the top folder, copy its two files into a folder of their own below"
        )
    return "this is one adapter: open it with Adapter.load, open the folder above it, or name it in a tree.yaml"


def _twins(entries: dict[str, Entry], folder: str) -> Iterator[Problem]:
    folded: dict[str, str] = {}
    for path in entries:
        twin = folded.setdefault(path.casefold(), path)
        if twin != path:
            text = f"node {path} differs from {twin} only by case, which many disks can't hold; rename one of them"
            yield Problem(path, "folder", f"{folder}: {text}")
