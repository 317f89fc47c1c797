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
from that very place. A node that is gone from the tree while its files must stay would come back: that is refused,
before anything is written.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from ..adapter import Adapter
from ..errors import FolderError, LoraTreeError, listing
from ..formats import peft
from ..formats.peft import CONFIG, WEIGHTS
from ..spec import LoraSpec
from ..tree import AdapterTree, Node
from . import disk
from .commit import Transaction, writing
from .disk import Stamp
from .lockfile import ROOT, BaseLock, FileLock, NodeLock, TreeLock, content, lineage
from .lockfile import dump as dump_lock
from .opening import Opened, Place, base_lock, inspect, local_base, place_of, stale_text
from .problem import raise_any
from .resolve import resolve
from .scan import FILES, Files, Scan
from .source import FolderSource, Trained, hashed
from .yamlfile import dump as dump_yaml

__all__ = ["save_adapter", "save_tree"]


@dataclass(frozen=True)
class _Kept:
    """What a node's adapter is after the save."""

    files: Files
    content: str
    trained: Trained | None
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
    kept: dict[str, _Kept] = field(default_factory=dict)

    def folder_of(self, path: str) -> str:
        return os.path.join(self.place.folder, path)


def save_tree(tree: AdapterTree, folder: Path, *, copy: bool) -> None:
    """See `AdapterTree.save`."""
    place = place_of(folder, make=True)
    with ExitStack() as undo:
        _make_all(Path(place.folder), undo)
        with writing(Path(place.folder)) as transaction:
            plan = _Plan(tree, place, inspect(place), transaction, copy)
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
        undo.pop_all()


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """See `Adapter.save`."""
    files = peft.render(adapter)
    where = Path(os.path.abspath(folder))
    if not os.path.lexists(where):
        _new_adapter(files, where)
        return
    with writing(where) as transaction:
        for name in sorted(files):
            transaction.put(name, files[name])
        transaction.commit()


def _new_adapter(files: Mapping[str, bytes], where: Path) -> None:
    """A new folder, built under a hidden name beside its place."""
    with ExitStack() as undo:
        _make_all(where.parent, undo)
        beside = where.with_name(f".{where.name}.{uuid.uuid4().hex}")
        disk.make(beside)
        undo.callback(disk.drop, beside)
        for name in sorted(files):
            undo.callback(_remove, beside / name)
            disk.write(beside / name, files[name])
        disk.sync(beside)
        disk.rename(beside, where)
        undo.pop_all()
        disk.sync(where.parent)


def _remove(file: Path) -> None:
    with suppress(LoraTreeError):
        disk.remove(file)


def _make_all(folder: Path, undo: ExitStack) -> None:
    """Make a folder and those above it; ``undo`` takes back the ones that were made, as far as they are empty."""
    missing = [above for above in (folder, *folder.parents) if not os.path.lexists(above)]
    for above in reversed(missing):
        if disk.make(above):
            undo.callback(disk.drop, above)
            disk.sync(above.parent)


# ---------------------------------------------------------------------- adapters
def _settle_files(plan: _Plan, path: str) -> None:
    """Stage a node's files where they are not in their place."""
    node = plan.tree[path]
    try:
        rendered = _rendered(node)
        if rendered is not None:
            plan.kept[path] = _from_memory(plan, node, rendered)
        elif isinstance(node.source, FolderSource):
            plan.kept[path] = _from_files(plan, path, node.source)
    except LoraTreeError as error:
        raise error.within(path) from error


def _rendered(node: Node) -> Mapping[str, bytes] | None:
    """The files of an adapter that memory has and its own files have not, or not any more."""
    source, adapter = node.source, node.loaded
    if not isinstance(source, FolderSource):
        adapter = source.load() if adapter is None and source is not None else adapter
        return peft.render(adapter) if adapter is not None else None
    if adapter is None or not (_trains(adapter) or source.gone()):
        return None
    rendered = peft.render(adapter)
    return rendered if source.gone() or _content(rendered) != source.content else None


def _trains(adapter: Adapter) -> bool:
    """Its factors are parameters: an optimiser may have changed them in place since the files were written."""
    return any(isinstance(t, Parameter) for value in adapter.modules.values() for t in value.tensors)


def _content(rendered: Mapping[str, bytes]) -> str:
    return content(*(hashlib.sha256(rendered[name]).hexdigest() for name in FILES))


def _from_memory(plan: _Plan, node: Node, rendered: Mapping[str, bytes]) -> _Kept:
    whole, source = _content(rendered), node.source
    _may_replace(plan, node)
    stamps = {name: plan.transaction.put(f"{node.path}/{name}", rendered[name]).stamp for name in sorted(rendered)}
    # what was trained since was trained on the lineage of today; what only lost its files was not
    since = node.loaded is not None and _trains(node.loaded)
    trained = None
    if isinstance(source, FolderSource) and (source.content == whole or not since):
        trained = source.trained
    return _Kept(_placed(plan, node.path, stamps), whole, trained, written=True)


def _from_files(plan: _Plan, path: str, source: FolderSource) -> _Kept:
    files = source.files()
    home = plan.folder_of(path)
    if os.path.realpath(source.folder) == os.path.realpath(home):
        whole = source.unchanged(files)
        known = plan.target.lock.nodes.get(path) if plan.target.lock else None
        ours = known is not None and known.written and known.content == whole
        return _Kept(_placed(plan, path, files.stamps), whole, source.trained, written=ours)
    if source.root is None and not plan.copy:
        return _Kept(files, source.unchanged(files), source.trained, named=True)
    _may_replace(plan, plan.tree[path])
    staged = {name: plan.transaction.copy(f"{path}/{name}", files.now[name][0]) for name in FILES}
    whole = content(*(staged[name].sha256 for name in FILES))
    if source.content not in (None, whole):
        raise FolderError(f"{source.folder}: its files have changed since the tree was opened", "open the tree again")
    stamps = {name: staged[name].stamp for name in FILES}
    return _Kept(_placed(plan, path, stamps), whole, source.trained, written=True)


def _placed(plan: _Plan, path: str, stamps: Mapping[str, Stamp]) -> Files:
    home = plan.folder_of(path)
    return Files(home, {name: (os.path.join(home, name), stamp) for name, stamp in stamps.items()})


def _may_replace(plan: _Plan, node: Node) -> None:
    """Refuse to write over an adapter that neither a save wrote nor this node came from."""
    there = plan.target.scan.found.get(node.path)
    if there is None or _ours(plan, node.path, there):
        return
    if node.home is None or os.path.realpath(node.home) != os.path.realpath(there.folder):
        raise FolderError(
            f"{there.folder}: an adapter that no save wrote lies where this node's files belong",
            "move it away, or save to another folder",
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
    claimed = {os.path.relpath(kept.files.folder, plan.place.folder) for kept in plan.kept.values() if kept.named}
    back = []
    for path, files in plan.target.scan.found.items():
        if (path or ".") in claimed or (path in plan.kept and not plan.kept[path].named):
            continue
        if _ours(plan, path, files):
            for name in FILES:
                plan.transaction.delete(f"{path}/{name}")
        elif not _null(plan.tree, path):
            back.append(files.folder)
    if back:
        raise FolderError(
            f"{listing(back)}: no node's any more, but no save wrote them, so they stay and would come back",
            "move them out of the folder, or save the tree elsewhere",
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
    ours = plan.target.lock is not None and old is not None and plan.target.lock.yaml == hashlib.sha256(old).hexdigest()
    if old is not None and not ours and plan.tree.home != Path(plan.place.yaml_file):
        raise FolderError(
            f"{plan.place.yaml_file}: of another tree, and no save wrote it",
            "move it away, or save to another folder",
        )
    plan.transaction.put(plan.place.yaml, data)


def _says_the_same(plan: _Plan) -> bool:
    spec = plan.target.spec
    if spec is None and not any(not kept.named for kept in plan.kept.values()):
        return False  # without a single adapter in it, only a tree.yaml makes a folder a tree
    if _base_of(spec.base if spec else None, plan.place.folder) != _base_of(plan.tree.base, ""):
        return False
    if (spec.defaults if spec else LoraSpec()) != plan.tree.defaults:
        return False
    found = {path: kept.files for path, kept in plan.kept.items() if not kept.named}
    gone = {place.rpartition("/")[0] for place in plan.transaction.deletes}
    stays = {path: files for path, files in plan.target.scan.found.items() if path not in gone}
    entries, wrong = resolve(spec, None, Scan(stays | found), plan.place.folder)
    if wrong or list(entries) != plan.tree.paths():
        return False
    for path, entry in entries.items():
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
    nodes: dict[str, dict[str, Any]] = {}
    for path in reversed(tree.paths()):
        below = {child.rpartition("/")[2]: nodes[child] for child in tree.children(path) if child in nodes}
        said = dict(_said(plan, path, listed=bool(below)))
        if below:
            said["children"] = below
        if said or _listed(plan, path):
            nodes[path] = said
    if nodes:
        data["tree"] = {path: nodes[path] for path in tree.children() if path in nodes}
    return data


def _spelled_base(plan: _Plan) -> str | None:
    """The base as tree.yaml spells it: a local folder as seen from there."""
    local = local_base(plan.tree.base, "")
    return os.path.relpath(local, plan.place.folder) if local else plan.tree.base


def _said(plan: _Plan, path: str, *, listed: bool) -> Iterator[tuple[str, Any]]:
    """What tree.yaml has to say of one node, apart from its children."""
    node, kept = plan.tree[path], plan.kept.get(path)
    if kept is not None and kept.named:
        yield "adapter", os.path.relpath(kept.files.folder, plan.place.folder)
    elif kept is None and node.fresh is None and (listed or node.weight != 1.0 or not _above_files(plan, path)):
        yield "adapter", None
    if node.weight != 1.0:
        yield "weight", node.weight
    if kept is None and node.fresh is not None:
        yield from node.fresh.model_dump(exclude_none=True).items()


def _listed(plan: _Plan, path: str) -> bool:
    """A node that has nothing to say, and has to be named all the same."""
    return path not in plan.kept and plan.tree[path].fresh is not None


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
    before = [*([old.base] if old else []), *(kept.trained.base for kept in plan.kept.values() if kept.trained)]
    base = base_lock(local_base(tree.base, "") or tree.base, spelled, before)
    lineages = {"": ROOT}
    locked: dict[str, NodeLock] = {}
    nodes: list[Node] = []
    for path in tree.paths():
        node, kept = tree[path], plan.kept.get(path)
        above = lineages[path.rpartition("/")[0]]
        lineages[path] = lineage(above, kept.content if kept else None, node.weight)
        if kept is None:
            nodes.append(replace(node, home=None))
            continue
        trained = kept.trained or Trained(above, base)
        locked[path] = node_lock(kept.files, kept.content, trained, base, written=kept.written)
        source = FolderSource(
            kept.files.folder, None if kept.named else plan.place.folder, kept.files.stamps, kept.content, trained
        )
        home = None if kept.named else kept.files.folder
        nodes.append(replace(node, source=source, home=home, stale=stale_text(path, trained, above, base)))
    data = dump_lock(TreeLock(base=base, yaml=_yaml_hash(plan), nodes=locked))
    if data != plan.target.lock_bytes:
        plan.transaction.put(plan.place.lock, data)
    return nodes


def node_lock(files: Files, whole: str, trained: Trained, base: BaseLock, *, written: bool) -> NodeLock:
    """A node's entry in the lock; its base only where that is not the lock's own."""
    return NodeLock(
        content=whole,
        config=FileLock.of(files.stamps[CONFIG]),
        weights=FileLock.of(files.stamps[WEIGHTS]),
        trained_on=trained.on,
        base=trained.base if trained.base.differs(base) else None,
        written=written,
    )


def _yaml_hash(plan: _Plan) -> str | None:
    """The hash of the tree.yaml where a save wrote it, now or earlier."""
    for staged in plan.transaction.staged:
        if staged.to == plan.place.yaml:
            return staged.sha256
    old = plan.target.yaml_bytes
    found = hashlib.sha256(old).hexdigest() if old is not None else None
    return found if plan.target.lock is not None and plan.target.lock.yaml == found else None
