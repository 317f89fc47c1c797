"""Saving a tree: what has to be written, what stays, what goes, as one transaction.

    a node with                           becomes
    an adapter in memory alone            its two files, rendered
    parameters, which an optimiser moves  the same, unless its files say just that already
    an adapter whose files are gone       the same, from memory
    files in their place already          nothing: they stay as they are
    files elsewhere in this or a tree     a copy of their bytes
    files that its user named             its folder's name in tree.yaml (with ``copy``: a copy)
    neither                               a line in tree.yaml: fresh, or null for a group

Law: save deletes or replaces only files that a save wrote, as the lock knows them, or those of the node that was opened
from that very place; and only where they are still what this tree saw there (`memory`). A node that is gone from the
tree while its files must stay would come back. Whatever is refused is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from ..adapter import Adapter
from ..errors import FolderError, LoraTreeError, listing
from ..formats import peft
from ..formats.peft import CONFIG, WEIGHTS
from ..spec import TreeSpec
from ..tree import AdapterTree, Node
from .alone import finish_nodes, make_all
from .commit import Transaction, writing
from .disk import Stamp
from .lockfile import BaseLock, FileLock, NodeLock, TreeLock, content
from .lockfile import dump as dump_lock
from .memory import Seen, digest, recall, remember
from .opening import Opened, Place, base_lock, inspect, local_base, place_of
from .problem import raise_any
from .resolve import is_step, resolve, step_of
from .scan import FILES, Files, Scan
from .source import FolderSource, adds_nothing, examine, hashed
from .trained import TOP, Trained, lineage_locks, stale_text, trained
from .yamlfile import dump as dump_yaml

__all__ = ["node_lock", "save_tree"]


@dataclass(frozen=True)
class _Kept:
    """What a node's adapter is after the save."""

    files: Files
    content: str
    trained: Trained | None
    untrained: bool = False
    named: bool = False
    written: bool = False


@dataclass
class _Plan:
    """A save in the making."""

    tree: AdapterTree
    place: Place
    target: Opened
    transaction: Transaction
    copy: bool
    seen: Seen
    kept: dict[str, _Kept] = field(default_factory=dict)

    def folder_of(self, path: str) -> str:
        return os.path.join(self.place.folder, path)


def save_tree(tree: AdapterTree, folder: Path, *, copy: bool) -> None:
    """See `AdapterTree.save`."""
    place = place_of(folder, make=True)
    with ExitStack() as undo:
        make_all(Path(place.folder), undo)
        with writing(Path(place.folder)) as transaction:
            finish_nodes(place.folder)
            plan = _Plan(tree, place, inspect(place), transaction, copy, recall(tree, place))
            raise_any(plan.target.problems, but=("stale", "unlocked", "leftover"))
            for path in tree.paths():
                _settle_files(plan, path)
            _clear(plan)
            _write_yaml(plan)
            nodes = _write_lock(plan)
            try:
                transaction.commit()
            finally:
                if transaction.decided or not transaction.staged:
                    tree.put(nodes, home=Path(place.yaml_file))
                    remember(tree, place, _seen(plan))
        undo.pop_all()


def _seen(plan: _Plan) -> Seen:
    """The folder as this save leaves it."""
    gone = {place.rpartition("/")[0] for place in plan.transaction.deletes}
    found = plan.target.scan.found
    files = {
        path: was for path, was in plan.seen.files.items() if path in found and path not in gone
    }
    files |= {
        path: (kept.files.stamps, kept.content)
        for path, kept in plan.kept.items()
        if not kept.named
    }
    staged = (file.sha256 for file in plan.transaction.staged if file.to == plan.place.yaml)
    return Seen(
        files, {**plan.seen.yaml, plan.place.yaml: next(staged, digest(plan.target.yaml_bytes))}
    )


# ---------------------------------------------------------------------- adapters
def _settle_files(plan: _Plan, path: str) -> None:
    """Stage a node's files where they are not in their place."""
    node = plan.tree[path]
    try:
        _still_in(plan, node)
        found = _rendered(node)
        if found is not None:
            plan.kept[path] = _from_memory(plan, node, *found)
        elif isinstance(node.source, FolderSource):
            plan.kept[path] = _from_files(plan, path, node.source)
    except LoraTreeError as error:
        raise error.within(path) from error


def _still_in(plan: _Plan, node: Node) -> None:
    """Refuse to bring back a node that another save took out."""
    path, lock = node.path, plan.target.lock
    here = path in plan.target.scan.found or lock is None or path in lock.nodes
    if node.has_adapter and path in plan.seen.files and not here:
        raise _undoes(plan, [plan.folder_of(path)], "taken out")


def _rendered(node: Node) -> tuple[Adapter, Mapping[str, bytes]] | None:
    """An adapter that memory has and its own files have not, or not any more; and the files that it makes."""
    source, adapter = node.source, node.loaded
    if not isinstance(source, FolderSource):
        adapter = source.load() if adapter is None and source is not None else adapter
        return (adapter, peft.render(adapter)) if adapter is not None else None
    if adapter is None or not (_trains(adapter) or source.gone()):
        return None
    rendered = peft.render(adapter)
    changed = source.gone() or _content(rendered) != source.content
    return (adapter, rendered) if changed else None


def _trains(adapter: Adapter) -> bool:
    """Its factors are parameters: an optimiser may have changed them in place since the files were written."""
    return any(
        isinstance(t, Parameter) for value in adapter.modules.values() for t in value.tensors
    )


def _content(rendered: Mapping[str, bytes]) -> str:
    return content(*(hashlib.sha256(rendered[name]).hexdigest() for name in FILES))


def _from_memory(plan: _Plan, node: Node, adapter: Adapter, rendered: Mapping[str, bytes]) -> _Kept:
    whole, source = _content(rendered), node.source
    _may_replace(plan, node, whole)
    stamps = {
        name: plan.transaction.put(f"{node.path}/{name}", rendered[name]).stamp
        for name in sorted(rendered)
    }
    # what was trained since was trained on the lineage of today; what only lost its files was not
    since = node.loaded is not None and _trains(node.loaded)
    old = (
        source
        if isinstance(source, FolderSource) and (source.content == whole or not since)
        else None
    )
    return _Kept(
        _placed(plan, node.path, stamps),
        whole,
        old.trained if old else None,
        untrained=adds_nothing(adapter),
        written=True,
    )


def _from_files(plan: _Plan, path: str, source: FolderSource) -> _Kept:
    files = source.files()
    home = plan.folder_of(path)
    if os.path.realpath(source.folder) == os.path.realpath(home):
        whole, untrained = _examined(source, files)
        known = plan.target.lock.nodes.get(path) if plan.target.lock else None
        if known is None or plan.target.lock is None or known.content != whole:
            return _Kept(_placed(plan, path, files.stamps), whole, source.trained, untrained)
        # `lora-tree lock` may have accepted it on another lineage since the tree was opened
        now = trained(known, plan.target.lock)
        return _Kept(_placed(plan, path, files.stamps), whole, now, written=known.written)
    if source.root is None and not plan.copy:
        whole, untrained = _examined(source, files)
        return _Kept(files, whole, source.trained, untrained, named=True)
    _may_replace(plan, plan.tree[path], source.content)
    staged = {name: plan.transaction.copy(f"{path}/{name}", files.now[name][0]) for name in FILES}
    whole = content(*(staged[name].sha256 for name in FILES))
    if source.content not in (None, whole):
        raise FolderError(
            f"{source.folder}: its files have changed since the tree was opened",
            "open the tree again",
        )
    stamps = {name: staged[name].stamp for name in FILES}
    untrained = source.trained is None and examine(files).untrained
    return _Kept(_placed(plan, path, stamps), whole, source.trained, untrained, written=True)


def _examined(source: FolderSource, files: Files) -> tuple[str, bool]:
    """The hash of files that stay where they are; and whether their increments are zero, where no lock says so."""
    if source.trained is not None:
        return source.unchanged(files), source.trained.untrained
    found = examine(files)
    return found.content, found.untrained


def _placed(plan: _Plan, path: str, stamps: Mapping[str, Stamp]) -> Files:
    home = plan.folder_of(path)
    return Files(home, {name: (os.path.join(home, name), stamp) for name, stamp in stamps.items()})


def _may_replace(plan: _Plan, node: Node, whole: str | None) -> None:
    """Refuse to write content ``whole`` over an adapter that is not this tree's to replace."""
    there = plan.target.scan.found.get(node.path)
    if there is None:
        return
    ours = _ours(plan, node.path, there)
    if not ours and (
        node.home is None or os.path.realpath(node.home) != os.path.realpath(there.folder)
    ):
        raise FolderError(
            f"{there.folder}: an adapter that no save wrote lies where this node's files belong",
            "move it away, or save to another folder",
        )
    if not plan.seen.knows(node.path, there) and (there.flaw is not None or whole != hashed(there)):
        raise _undoes(plan, [there.folder], "written")


def _undoes(plan: _Plan, what: list[str], how: str) -> FolderError:
    """The refusal to save over what this tree has not seen."""
    if plan.seen:
        return FolderError(
            f"{listing(what)}: {how} by somebody else since this tree was opened or saved, and this save would undo it",
            f"open the tree again, lt.load({plan.place.folder!r}), and change that one; or save into another folder",
        )
    return FolderError(
        f"{listing(what)}: of another tree, which this save would overwrite",
        "save into another folder; or open that tree and change it; or remove what is there first",
    )


def _ours(plan: _Plan, path: str, files: Files) -> bool:
    """A save wrote these files, and they are still what it wrote."""
    known = plan.target.lock.nodes.get(path) if plan.target.lock else None
    if known is None or not known.written or files.flaw is not None:
        return False
    locks = dict(zip(FILES, (known.config, known.weights), strict=True))
    same = all(FileLock.of(stamp) == locks[name] for name, stamp in files.stamps.items())
    return same or hashed(files) == known.content


def _clear(plan: _Plan) -> None:
    """Let go of adapters in the folder that are no node's any more; refuse where one would come back."""
    claimed = {
        os.path.relpath(kept.files.folder, plan.place.folder)
        for kept in plan.kept.values()
        if kept.named
    }
    back, unseen = [], []
    for path, files in plan.target.scan.found.items():
        if (path or ".") in claimed or (path in plan.kept and not plan.kept[path].named):
            continue
        run = step_of(path) if path in plan.target.passed else None
        if run is not None and (run in claimed or run in plan.kept):
            continue  # a step of a run whose node stays is passed over again
        ours = _ours(plan, path, files)
        if ours and not plan.seen.knows(path, files):
            unseen.append(files.folder)
        elif ours:
            for name in FILES:
                plan.transaction.delete(f"{path}/{name}")
        elif not _null(plan.tree, path):
            back.append(files.folder)
    if unseen:
        raise _undoes(plan, unseen, "written")
    if back:
        raise FolderError(
            f"{listing(back)}: no node's any more, but no save wrote them, so they stay and would come back",
            "move them out of the folder, save the tree elsewhere, or open the tree again to have them in it",
        )
    folded = {staged.to.casefold(): staged.to for staged in plan.transaction.staged}
    for place in sorted(plan.transaction.deletes):
        twin = folded.get(place.casefold(), place)
        if twin != place:
            text = f"{twin} differs from {place}, which has to go, only by case"
            raise FolderError(text, "save it under another name first")


def _null(tree: AdapterTree, path: str) -> bool:
    return path in tree and not tree[path].has_adapter and tree[path].fresh is None


# ---------------------------------------------------------------------- tree.yaml
def _write_yaml(plan: _Plan) -> None:
    """Stage a tree.yaml, unless what is there (or nothing at all) says the same already."""
    if _says_the_same(plan):
        return
    data = dump_yaml(_yaml_of(plan))
    old = plan.target.yaml_bytes
    if data == old:
        return
    ours = plan.target.lock is not None and old is not None and plan.target.lock.yaml == digest(old)
    if old is not None and digest(old) != plan.seen.yaml.get(plan.place.yaml):
        if not plan.seen and not ours:
            raise FolderError(
                f"{plan.place.yaml_file}: of another tree, and no save wrote it",
                "move it away, or save to another folder",
            )
        raise _undoes(plan, [plan.place.yaml_file], "written")
    plan.transaction.put(plan.place.yaml, data)


def _says_the_same(plan: _Plan) -> bool:
    spec = plan.target.spec
    if spec is None and not any(not kept.named for kept in plan.kept.values()):
        return False  # without a single adapter in it, only a tree.yaml makes a folder a tree
    if (
        spec is None
        and plan.tree.base is not None
        and (plan.transaction.staged or plan.transaction.deletes)
    ):
        return False  # other adapters may name another base, or agree no more
    if _base_of(plan.target.base_name, "") != _base_of(plan.tree.base, ""):
        return False
    said = spec or TreeSpec(version=1)
    if (said.defaults, said.cache) != (plan.tree.defaults, plan.tree.cache):
        return False
    found = {path: kept.files for path, kept in plan.kept.items() if not kept.named}
    gone = {place.rpartition("/")[0] for place in plan.transaction.deletes}
    stays = {path: files for path, files in plan.target.scan.found.items() if path not in gone}
    resolved = resolve(spec, None, Scan(stays | found), plan.place.folder)
    if resolved.problems or list(resolved.entries) != plan.tree.paths():
        return False
    for path, entry in resolved.entries.items():
        node, kept = plan.tree[path], plan.kept.get(path)
        there = os.path.realpath(entry.files.folder) if entry.files else None
        here = os.path.realpath(kept.files.folder) if kept else None
        if (entry.weight, entry.fresh, there) != (node.weight, None if kept else node.fresh, here):
            return False
    return True


def _base_of(name: str | None, folder: str) -> str | None:
    local = local_base(name, folder)
    return os.path.realpath(local) if local else name


def _yaml_of(plan: _Plan) -> dict[str, Any]:
    tree = plan.tree
    data: dict[str, Any] = {"version": 1}
    base = _spelled_base(plan)
    if base is not None:
        data["base"] = base
    defaults = tree.defaults.model_dump(exclude_none=True)
    if defaults:
        data["defaults"] = defaults  # patterns keep their order: the first that matches counts
    cache = tree.cache.model_dump(exclude_none=True)
    if cache:
        data["cache"] = cache
    nodes: dict[str, dict[str, Any]] = {}
    for path in reversed(tree.paths()):
        below = {
            child.rpartition("/")[2]: nodes[child]
            for child in tree.children(path)
            if child in nodes
        }
        listed = bool(below) or _listed(plan, path)
        said = dict(_said(plan, path, listed=listed))
        if below:
            said["children"] = below
        if said or listed:
            nodes[path] = said
    if nodes:
        data["tree"] = {path: nodes[path] for path in tree.children() if path in nodes}
    return data


def _spelled_base(plan: _Plan) -> str | None:
    """The base as tree.yaml spells it: a local folder as seen from there."""
    if plan.target.spec is None and plan.tree.base == plan.target.base_name:
        return plan.target.base_spelled
    local = local_base(plan.tree.base, "")
    return os.path.relpath(local, plan.place.folder) if local else plan.tree.base


def _said(plan: _Plan, path: str, *, listed: bool) -> Iterator[tuple[str, Any]]:
    """What tree.yaml has to say of one node, apart from its children."""
    node, kept = plan.tree[path], plan.kept.get(path)
    if kept is not None and kept.named:
        yield "adapter", os.path.relpath(kept.files.folder, plan.place.folder)
    elif (
        kept is None
        and node.fresh is None
        and (listed or node.weight != 1.0 or not _above_files(plan, path))
    ):
        yield "adapter", None
    if node.weight != 1.0:
        yield "weight", node.weight
    if kept is None and node.fresh is not None:
        yield from node.fresh.model_dump(exclude_none=True).items()


def _listed(plan: _Plan, path: str) -> bool:
    """A node that has nothing to say, and has to be named all the same."""
    return is_step(path) or (path not in plan.kept and plan.tree[path].fresh is not None)


def _above_files(plan: _Plan, path: str) -> bool:
    """A folder of this name will be there, without an adapter and with one below: a group by itself."""
    if path in plan.target.scan.found:
        return False
    return any(below in plan.kept and not plan.kept[below].named for below in plan.tree.paths(path))


# ---------------------------------------------------------------------- tree.lock
def _write_lock(plan: _Plan) -> list[Node]:
    """Stage the lock, and return the nodes as they will be opened again."""
    tree, old = plan.tree, plan.target.lock
    spelled = _spelled_base(plan)
    before = [
        *([old.base] if old else []),
        *(kept.trained.base for kept in plan.kept.values() if kept.trained),
    ]
    base = base_lock(local_base(tree.base, "") or tree.base, spelled, before)
    lineages = {"": TOP}
    locked: dict[str, NodeLock] = {}
    mentioned: list[Trained] = []
    nodes: list[Node] = []
    for path in tree.paths():
        node, kept = tree[path], plan.kept.get(path)
        above = lineages[path.rpartition("/")[0]]
        lineages[path] = above.below(kept.content if kept else None, node.weight, path)
        if kept is None:
            nodes.append(replace(node, home=None))
            continue
        trained = kept.trained or Trained(above, base, kept.untrained)
        mentioned.append(trained)
        locked[path] = node_lock(kept.files, kept.content, trained, base, written=kept.written)
        source = FolderSource(
            kept.files.folder,
            None if kept.named else plan.place.folder,
            kept.files.stamps,
            kept.content,
            trained,
            node.source.within if isinstance(node.source, FolderSource) else None,
        )
        home = None if kept.named else kept.files.folder
        nodes.append(
            replace(node, source=source, home=home, stale=stale_text(path, trained, above, base))
        )
    lineage_table = lineage_locks(mentioned)
    lock = TreeLock(base=base, yaml=_yaml_hash(plan), nodes=locked, lineages=lineage_table)
    data = dump_lock(lock)
    if data != plan.target.lock_bytes:
        plan.transaction.put(plan.place.lock, data)
    return nodes


def node_lock(
    files: Files, whole: str, trained: Trained, base: BaseLock, *, written: bool
) -> NodeLock:
    """A node's entry in the lock; its base only where that is not the lock's own."""
    return NodeLock(
        content=whole,
        config=FileLock.of(files.stamps[CONFIG]),
        weights=FileLock.of(files.stamps[WEIGHTS]),
        trained_on=trained.on.digest,
        base=trained.base if trained.base.differs(base) else None,
        written=written,
        untrained=trained.untrained,
    )


def _yaml_hash(plan: _Plan) -> str | None:
    """The hash of the tree.yaml where a save wrote it, now or earlier."""
    for staged in plan.transaction.staged:
        if staged.to == plan.place.yaml:
            return staged.sha256
    found = digest(plan.target.yaml_bytes)
    return found if plan.target.lock is not None and plan.target.lock.yaml == found else None
