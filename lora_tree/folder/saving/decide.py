"""Decide all that a save changes, and write nothing: the nodes' files, tree.yaml, tree.lock,
deletions, and the versions that the history keeps.

    a node with                           becomes
    an adapter in memory alone            its two files, rendered
    parameters, which an optimiser moves  the same, unless its files say just that already
    an adapter whose files are gone       the same, from memory
    files in their place already          nothing: they stay as they are
    files elsewhere in any tree           a copy of their bytes
    files that its user named             its folder's name in tree.yaml (with ``copy``, or where
                                          it is another node's own folder: a copy)
    neither                               a line in tree.yaml: fresh, or null for a group

Law: a save deletes or replaces only files that are the tree's own (`ownership`). A save is refused
here, or by `Transaction.apply` before it stages a file; so a refused save has written nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ...adapter import Adapter
from ...errors import FolderError, LoraTreeError
from ...formats import peft
from ...formats.peft import CONFIG, FILES, WEIGHTS
from ...provenance import SaveNote
from ...tree import AdapterTree, Node
from .. import disk
from ..adapters.examine import Examined, adds_nothing, check_numbers, examine, examine_numbers
from ..adapters.hashing import ContentHash, by_pieces, weights_digest
from ..adapters.scan import Files
from ..adapters.source import FolderSource
from ..lockfile import content
from ..past.history_change import HistoryChange
from ..reading.bases import base_lock, local_base
from ..reading.last_seen import Seen, yaml_sha256
from ..reading.opening import Opened
from ..trained import TOP, Lineage, Trained, stale_text, trained
from ..transactions.changes import Changes, KeptAdapter, NewFile, NewLock, Origin
from ..yamlfile import render_yaml
from .ownership import Ownership
from .yaml_needs import YamlNeeds

__all__ = ["decide"]


def decide(
    tree: AdapterTree,
    opened: Opened,
    seen: Seen,
    *,
    copy: bool = False,
    note: SaveNote | None = None,
) -> Changes:
    """Return all that saving ``tree`` into a folder changes there.

    Args:
        tree: the tree to save.
        opened: the folder as it is now; the caller keeps other writers out.
        seen: the folder as this tree saw it last.
        copy: bring adapters that lie elsewhere into the folder.
        note: the note of the save, for tree.lock and the history.

    Raises:
        SpecError: the log of the history is broken.
        FolderError: the save would undo another process's, or a removed node would come back.
        FormatError: PEFT has no way to write a node; or its files are gone or broken, or it is new
            and they hold NaN or infinities. Names the node.
        UnlockedError: files that stay where they are have changed since the tree was opened.
    """
    draft = _Decisions(tree, opened, Ownership(opened, seen), copy)
    for path in tree.paths():
        try:
            _decide_node(draft, path)
        except LoraTreeError as error:
            raise error.within(path) from error
    leaving = draft.rights.leaving(tree, draft.kept)
    deletes: set[str] = set()
    for path in leaving:
        deletes.update(f"{path}/{name}" for name in FILES)
    _refuse_twins(draft.files, deletes)
    needs = YamlNeeds(tree, opened, draft.kept, leaving)
    yaml = _new_yaml(needs, draft.rights)
    if yaml is not None:
        draft.files.append(yaml)
    history = HistoryChange(tree, opened, draft.kept, note or SaveNote())
    log = history.log()
    if log is not None:
        draft.files.append(log)
    lock = _new_lock(draft, needs.spelled_base(), yaml, history)
    # The lock lists the times of new files. If there are none, its bytes are known by now.
    same_lock = not draft.files and lock.to_bytes({}) == opened.lock_bytes
    return Changes(
        tuple(draft.files),
        frozenset(deletes),
        history.archives(),
        history.forgets(),
        None if same_lock else lock,
        draft.kept,
        _nodes_after(draft, lock),
        tuple(history.nodes_over_budget),
    )


@dataclass
class _Decisions:
    """The decisions so far."""

    tree: AdapterTree
    opened: Opened
    rights: Ownership
    copy: bool
    kept: dict[str, KeptAdapter] = field(default_factory=dict)
    files: list[NewFile] = field(default_factory=list)

    @cached_property
    def known_folders(self) -> frozenset[str]:
        """The real paths of the adapters that the nodes in the folder have now."""
        nodes = self.opened.entries.values()
        files = [entry.files for entry in nodes if entry.files is not None]
        return frozenset(os.path.realpath(each.folder) for each in files)

    def folder_of(self, path: str) -> str:
        return os.path.join(self.opened.place.folder, path)


# ---------------------------------------------------------------------- one node
def _decide_node(draft: _Decisions, path: str) -> None:
    node = draft.tree[path]
    draft.rights.check_present(node)
    adapter = _only_in_memory(node, copy=draft.copy)
    rendered = _Rendered.of(adapter) if adapter is not None else None
    if rendered is not None and not _is_in_files(node, rendered):
        _refuse_new_numbers(draft, node, rendered.adapter)
        draft.kept[path] = _from_memory(draft, node, rendered)
    elif isinstance(node.source, FolderSource):
        draft.kept[path] = _from_files(draft, node, node.source)


def _refuse_new_numbers(draft: _Decisions, node: Node, adapter: Adapter) -> None:
    """Refuse numbers that are not finite, and that the tree did not have before this save.

    Raises:
        FormatError: there are some; names the module and the tensor.
    """
    source = node.source
    # Factors that may have trained are no longer those of the files that the user named.
    if not isinstance(source, FolderSource) or _may_have_trained(adapter):
        check_numbers(adapter)
    elif _is_new(draft, node, source):
        check_numbers(adapter, source.folder)


@dataclass(frozen=True)
class _Rendered:
    """An adapter, and the two files that it makes: file → its bytes, and their hashes."""

    adapter: Adapter
    data: Mapping[str, bytes]
    hashes: Mapping[str, str]
    content: str
    pieces: str | None

    @classmethod
    def of(cls, adapter: Adapter) -> _Rendered:
        data = peft.render(adapter)
        with closing(ContentHash(pieces=True, nbytes=len(data[WEIGHTS]))) as hashing:
            for name in FILES:
                hashing(name, memoryview(data[name]))
            return cls(adapter, data, hashing.digests(), hashing.content(), hashing.pieces())


def _only_in_memory(node: Node, *, copy: bool) -> Adapter | None:
    """Return a node's adapter if its files may not hold it yet; None if they do, or it has none.

    A single file can't be copied into a node's folder as it is, so it counts as not held there. Nor
    does PEFT open a file whose keys carry an adapter's name.
    """
    source, adapter = node.source, node.loaded
    if source is None:
        return adapter
    if not isinstance(source, FolderSource):
        return source.load() if adapter is None else adapter
    if adapter is not None and (_may_have_trained(adapter) or source.has_missing_files()):
        return adapter
    if copy and _needs_other_bytes(source):
        return source.load() if adapter is None else adapter
    return None


def _needs_other_bytes(source: FolderSource) -> bool:
    """Tell whether a copy of these files in a node's folder has to be written anew."""
    files = source.files()
    if files.single:
        return True
    # A tree's own files keep their bytes, by which its lock knows them.
    return source.root is None and peft.adapter_name_of(files.now[WEIGHTS][0]) is not None


def _is_in_files(node: Node, rendered: _Rendered) -> bool:
    """Tell whether a node's own files hold these bytes already: no step has changed them."""
    source = node.source
    if not isinstance(source, FolderSource) or source.content != rendered.content:
        return False
    return not source.has_missing_files()


def _may_have_trained(adapter: Adapter) -> bool:
    """Tell whether an optimiser may have changed a factor since the files were written."""
    return adapter.is_trainable


def _from_memory(draft: _Decisions, node: Node, rendered: _Rendered) -> KeptAdapter:
    """Decide to write a node's files from memory."""
    adapter, source = rendered.adapter, node.source
    draft.rights.check_replace(node, rendered.content)
    for name in FILES:
        # Only the weights are large. They are rendered again when they are written.
        origin: Origin = rendered.data[name]
        if name == WEIGHTS:
            origin = _weights_again(node, adapter)
        draft.files.append(NewFile(f"{node.path}/{name}", rendered.hashes[name], origin))
    on = None
    # A node that trained since it was opened was trained on the lineage of today. One that only
    # lost its files, or has the same numbers as before, was not.
    trained_since = node.loaded is not None and _may_have_trained(node.loaded)
    is_same = isinstance(source, FolderSource) and source.content == rendered.content
    if isinstance(source, FolderSource) and (is_same or not trained_since):
        on = source.trained
    return KeptAdapter(
        draft.folder_of(node.path),
        rendered.content,
        rendered.pieces,
        None,
        on,
        untrained=adds_nothing(adapter),
        written=True,
    )


def _weights_again(node: Node, adapter: Adapter) -> Callable[[], bytes]:
    """Return a function that renders weights; it keeps only the tree's own adapter in memory."""
    source = node.source
    if node.loaded is None and source is not None:
        # It was read for this save alone. A tree of such files may be larger than memory.
        return lambda: peft.render(source.load())[WEIGHTS]
    return lambda: peft.render(adapter)[WEIGHTS]


def _from_files(draft: _Decisions, node: Node, source: FolderSource) -> KeptAdapter:
    """Decide to leave a node's files where they are, to name them, or to copy them."""
    files, home = source.files(), draft.folder_of(node.path)
    # Real paths are compared, because the tree may have been opened through a link. By their names
    # alone, files in their place would look like files elsewhere and be copied onto themselves.
    if os.path.realpath(source.folder) == os.path.realpath(home):
        return _in_place(draft, node.path, source, files)
    if source.root is None and not draft.copy and not _is_other_nodes(draft, source.folder):
        examined = _examined(source, files, is_new=_is_new(draft, node, source))
        return KeptAdapter(
            files.folder,
            examined.content,
            examined.pieces,
            files.stamps,
            source.trained,
            examined.untrained,
            named=True,
            hub=source.hub,
        )
    draft.rights.check_replace(node, source.content)
    # Every byte is hashed here, not only when it is copied: a copy that turns out to be of another
    # content would be refused after it was written.
    weights, of_pieces = weights_digest(files.now[WEIGHTS][0])
    hashes = {CONFIG: disk.digest(files.now[CONFIG][0]), WEIGHTS: weights}
    whole_content = content(*hashes.values())
    if source.content not in (None, whole_content):
        raise FolderError(
            f"{source.folder}: its files have changed since the tree was opened",
            "open the tree again",
        )
    for name in FILES:
        origin = Path(files.now[name][0])
        draft.files.append(NewFile(f"{node.path}/{name}", hashes[name], origin))
    untrained, is_new = False, _is_new(draft, node, source)
    if source.trained is None:
        untrained = examine(files, is_new=is_new).untrained
    elif is_new:
        # The lock that they come with vouches for their bytes, not for their numbers.
        examine_numbers(files)
    pieces = by_pieces(hashes, of_pieces)
    return KeptAdapter(home, whole_content, pieces, None, source.trained, untrained, written=True)


def _is_other_nodes(draft: _Decisions, folder: str) -> bool:
    """Tell whether a folder is the place of a node of this tree.

    A tree.yaml that named it for a second node would take it from the first one.
    """
    top = os.path.realpath(draft.opened.place.folder)
    path = os.path.relpath(os.path.realpath(folder), top)
    return path in draft.tree and draft.tree[path].has_adapter


def _in_place(draft: _Decisions, path: str, source: FolderSource, files: Files) -> KeptAdapter:
    """Decide to leave files in their place, as the folder's lock knows them today."""
    found = _examined(source, files)
    lock, home = draft.opened.lock, draft.folder_of(path)
    known = lock.nodes.get(path) if lock else None
    if lock is None or known is None or known.content != found.content:
        return KeptAdapter(
            home, found.content, found.pieces, files.stamps, source.trained, found.untrained
        )
    # `lora-tree lock` may have accepted it on another lineage since the tree was opened.
    now = trained(known, lock)
    pieces = known.pieces or found.pieces
    return KeptAdapter(home, found.content, pieces, files.stamps, now, written=known.written)


def _examined(source: FolderSource, files: Files, *, is_new: bool = False) -> Examined:
    """Return the hashes of files that stay where they are, and whether they add anything."""
    if source.trained is not None:  # the lock has them, so no weights need be read
        return Examined(source.unchanged(files), source.pieces, source.trained.untrained)
    return examine(files, is_new=is_new)


def _is_new(draft: _Decisions, node: Node, source: FolderSource) -> bool:
    """Tell whether a save brings files into the tree: a broken node of the tree may not stop it."""
    home = draft.tree.home
    if home is not None and source.root == str(home.parent):
        return False
    return os.path.realpath(source.folder) not in draft.known_folders


# ---------------------------------------------------------------------- the folder as a whole
def _refuse_twins(files: Iterable[NewFile], deletes: Iterable[str]) -> None:
    """Refuse to write a file and to delete another one that differs only by case."""
    # On many disks the two are one file, so the deletion would remove the new one.
    folded = {file.place.casefold(): file.place for file in files}
    for place in sorted(deletes):
        twin = folded.get(place.casefold(), place)
        if twin != place:
            text = f"{twin} differs only by case from {place}, which this save deletes"
            raise FolderError(text, "save it under a third name first, then rename it")


def _new_yaml(needs: YamlNeeds, rights: Ownership) -> NewFile | None:
    """Return the tree.yaml to write; None if the folder says the same already."""
    if needs.is_up_to_date():
        return None
    place, old = needs.opened.place, needs.opened.yaml_bytes
    data = render_yaml(needs.data())
    if data == old:
        return None
    if old is not None:
        rights.check_yaml(old)
    return NewFile.of(place.yaml, data)


def _new_lock(
    draft: _Decisions, spelled_base: str | None, yaml: NewFile | None, history: HistoryChange
) -> NewLock:
    tree, opened = draft.tree, draft.opened
    before = [opened.lock.base] if opened.lock else []
    before += [kept.trained.base for kept in draft.kept.values() if kept.trained]
    base = base_lock(local_base(tree.base, "") or tree.base, spelled_base, before)
    lineages = _lineages(draft)
    trained_on: dict[str, Trained] = {}
    for path, kept in draft.kept.items():
        on = kept.trained or Trained(lineages[_parent(path)], base, kept.untrained)
        trained_on[path] = replace(on, made=history.made(path))
    return NewLock(opened.place.lock, base, _yaml_hash(opened, yaml), draft.kept, trained_on)


def _lineages(draft: _Decisions) -> dict[str, Lineage]:
    """Return the lineage that ends in each node, as the folder will hold them."""
    found = {"": TOP}
    for path in draft.tree.paths():  # parents first: a lineage is made of the one above it
        kept, weight = draft.kept.get(path), draft.tree[path].weight
        found[path] = found[_parent(path)].below(kept.content if kept else None, weight, path)
    return found


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _yaml_hash(opened: Opened, new: NewFile | None) -> str | None:
    """Return the hash of the tree.yaml if a save wrote it, this one or an earlier one."""
    if new is not None:
        return new.sha256
    found = yaml_sha256(opened.yaml_bytes)
    return found if opened.lock is not None and opened.lock.yaml == found else None


def _nodes_after(draft: _Decisions, lock: NewLock) -> dict[str, Node]:
    """Return the tree's nodes as they will be opened again, but for the stamps of new files."""
    lineages = _lineages(draft)
    nodes: dict[str, Node] = {}
    for path in draft.tree.paths():
        node, kept = draft.tree[path], draft.kept.get(path)
        if kept is None:
            nodes[path] = replace(node, home=None)
            continue
        on = lock.trained[path]
        source = FolderSource(
            kept.folder,
            None if kept.named else draft.opened.place.folder,
            kept.stamps or {},
            kept.content,
            on,
            node.source.within if isinstance(node.source, FolderSource) else None,
            kept.hub,
            kept.pieces,
        )
        home = None if kept.named else kept.folder
        stale = stale_text(path, on, lineages[_parent(path)], lock.base)
        nodes[path] = replace(node, source=source, home=home, stale=stale)
    return nodes
