"""Open a tree's folder: tree.yaml, tree.lock, the folders and a pending save, put together.

No weights are read. Files are compared with the lock by size and time, and hashed only if the size
is right and the time is not. If a save comes in between, the folder is looked at again. So the
result is all old or all new.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property, partial

from ...errors import FolderError, LoraTreeError, NewerFormat, SpecError, plural
from ...formats.limits import LOCK_BYTES, YAML_BYTES
from ...spec import TreeSpec
from .. import disk
from ..adapters.examine import broken_text, hashed
from ..adapters.scan import Files, Scan, scan
from ..bounds import inside
from ..disk import Glimpse, glimpse
from ..lockfile import BaseLock, FileLock, HubLock, NodeLock, TreeLock, parse_lock
from ..problem import HARMLESS, Kind, Problem
from ..trained import TOP, Lineages, Trained, stale_text, trained
from ..transactions.pending import Pending, pending, progress
from ..yamlfile import Located, read_spec
from .bases import agreed_base, base_lock, bases_of, local_base
from .resolve import FolderNode, resolve
from .tree_place import YAML, TreePlace

__all__ = ["Opened", "base_at_hand", "inspect", "named_bases", "refuse_no_tree", "unusable"]

_TRIES = 50


@dataclass
class Opened:
    """The content of a tree's folder.

    Args:
        outside: adapters outside of the folder may be named.
        spec, yaml_bytes: the meaning and the bytes of tree.yaml; None if there is none.
        lock, lock_bytes: the same of tree.lock.
        decided: a save that is not wholly carried out.
        scan: the adapters below the folder, whether they are nodes or not.
        entries: the nodes, depth-first.
        passed: the paths of adapters that are steps of a node's own training run, and no nodes.
        agreed: the base that the adapters name, if there is no tree.yaml and they agree.
        contents: node → the hash of its files, if they are those of the lock.
        base: the base as it is known now; looked at only if there is a lock.
        stale: node → why.
        problems: everything that is wrong.
    """

    place: TreePlace
    outside: bool = True
    spec: TreeSpec | None = None
    yaml_bytes: bytes | None = None
    lock: TreeLock | None = None
    lock_bytes: bytes | None = None
    decided: Pending = field(default_factory=Pending)
    scan: Scan = field(default_factory=Scan)
    entries: dict[str, FolderNode] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    agreed: str | None = None
    contents: dict[str, str] = field(default_factory=dict)
    base: BaseLock = field(default_factory=BaseLock)
    stale: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @cached_property
    def _lineages(self) -> Lineages:
        return Lineages({} if self.lock is None else self.lock.lineages)

    def trained(self, path: str) -> Trained | None:
        """Return what a node was trained on, if the lock has it."""
        known = None if self.lock is None else self.lock.nodes.get(path)
        if self.lock is None or known is None:
            return None
        return trained(known, self.lock, self._lineages)

    @property
    def base_spelled(self) -> str | None:
        """The base as tree.yaml spells it; without one, the base that all adapters name."""
        return self.spec.base if self.spec is not None else self.agreed

    @property
    def base_name(self) -> str | None:
        """The base as the tree names it: a local folder as an absolute path."""
        spelled, folder = self.base_spelled, self.place.folder
        # Without a tree.yaml, only a name like ../base can be relative to this folder: an earlier
        # tree.yaml had it, and the lock still does. Any other name is the adapters' own.
        if self.spec is None and not (spelled or "").startswith("."):
            return spelled
        return local_base(spelled, folder) or spelled

    @property
    def is_empty(self) -> bool:
        """True if there is no tree: no tree.yaml, no lock, no adapter, whole or broken."""
        has_own_files = self.spec is not None or self.lock is not None
        return not (has_own_files or self.entries or self.problems)


def inspect(place: TreePlace, *, outside: bool = True, repin: bool = False) -> Opened:
    """Return all that a place holds, without reading weights; problems are listed, not raised.

    Args:
        place: the folder.
        outside: tree.yaml may name adapters outside of the folder. If not, a base outside is not
            looked at either.
        repin: look up again what names of adapters on the hub mean, instead of asking the lock.

    Raises:
        FolderError: the folder keeps changing while it is read.
    """
    for _ in range(_TRIES):
        before = _version(place)
        opened = _inspect(place, outside=outside, repin=repin)
        if _version(place) == before:
            return opened
    text = f"{place.folder}: keeps changing while it is read"
    raise FolderError(text, "wait for the writers to finish")


def _version(place: TreePlace) -> list[tuple[Glimpse | None, ...]]:
    """Look at the files that every save changes."""
    files = (os.path.join(place.folder, name) for name in (place.lock, place.yaml))
    # The progress comes before and after the others: a save that decides between two of these looks
    # shows in the last one, even if it has replaced the lock already.
    return [progress(place.folder), tuple(map(glimpse, files)), progress(place.folder)]


def _inspect(place: TreePlace, *, outside: bool, repin: bool) -> Opened:
    opened = Opened(place, outside=outside)
    decided, located = _read_files(opened)
    if opened.problems:
        return opened  # without these files the meaning of the folders is not known
    opened.decided = decided
    opened.scan = scan(place.folder, decided)
    pins: dict[str, HubLock] = {}
    for path, node in opened.lock.nodes.items() if opened.lock is not None and not repin else ():
        if node.hub is not None:
            pins[path] = node.hub
    resolved = resolve(opened.spec, located, opened.scan, place.folder, outside=outside, pins=pins)
    opened.entries, opened.passed = resolved.entries, resolved.passed
    opened.problems.extend(resolved.problems)
    if opened.spec is None:
        known = opened.lock.base.name if opened.lock is not None else None
        opened.agreed = known or agreed_base(named_bases(opened).values())
    if opened.lock is not None:
        _compare_files(opened, opened.lock)
        _compare_lineages(opened, opened.lock)
    return opened


# ---------------------------------------------------------------------- the tree's own files
def _read_files(opened: Opened) -> tuple[Pending, Located | None]:
    """Read a pending save's record, tree.yaml and tree.lock; mistakes become problems."""
    place, decided, located = opened.place, Pending(), None
    wrong: list[tuple[Kind, LoraTreeError]] = []
    try:
        # Each file is read in a `try` of its own. So a mistake in one of them does not hide the
        # mistakes in the others.
        decided = pending(place.folder)
    except LoraTreeError as error:
        wrong.append(("record", error))
    try:
        opened.yaml_bytes = _bytes(place, place.yaml, decided, YAML_BYTES)
        if opened.yaml_bytes is not None:
            opened.spec, located = read_spec(opened.yaml_bytes, place.yaml_file)
        else:
            _refuse_other_ending(place)
    except LoraTreeError as error:
        wrong.append(("yaml", error))
    try:
        opened.lock_bytes = _bytes(place, place.lock, decided, LOCK_BYTES)
        if opened.lock_bytes is not None:
            opened.lock = parse_lock(opened.lock_bytes, place.lock_file)
    except LoraTreeError as error:
        wrong.append(("lock", error))
    opened.problems.extend(_problems(wrong))
    return decided, located


def _problems(wrong: list[tuple[Kind, LoraTreeError]]) -> list[Problem]:
    for _, error in wrong:
        if isinstance(error, NewerFormat):
            # Beside a file of a newer version any other complaint, and its advice, would mislead.
            return [Problem("", "newer", str(error))]
    found = []
    for kind, error in wrong:
        # A file that can't be read is a problem of the folder, not of the file's content.
        kind = "folder" if isinstance(error, FolderError) else kind
        found.append(Problem("", kind, str(error)))
    return found


def _bytes(place: TreePlace, name: str, decided: Pending, most: int) -> bytes | None:
    """Read one of the tree's own files, as a pending save leaves it; None if there is none."""
    file = decided.resolve(place.folder, name)
    if file is None or not os.path.lexists(file):
        return None
    if not inside(file, place.folder):
        real = os.path.realpath(file)
        text = f"{file}: a link that leads out of {place.folder}"
        raise FolderError(text, f"open {real} itself, or copy it here")
    # The file that is opened is checked again: the name may lead elsewhere by then.
    return disk.read_file(file, most=most, inside=partial(inside, folder=place.folder))


def _refuse_other_ending(place: TreePlace) -> None:
    """Refuse a tree.yml, which would be overlooked."""
    if place.yaml == YAML and os.path.exists(os.path.join(place.folder, "tree.yml")):
        raise SpecError(
            f"{place.folder}/tree.yml: only tree.yaml is looked for",
            "rename it, or open it by name",
        )


# ---------------------------------------------------------------------- against the lock
def _compare_files(opened: Opened, lock: TreeLock) -> None:
    """Find the nodes whose files differ from the lock; take the others' hashes from it."""
    reported = {problem.node for problem in opened.problems}
    for path, entry in opened.entries.items():
        if entry.files is None or entry.files.flaw is not None:
            continue
        known = lock.nodes.get(path)
        why = "not in the lock" if known is None else _changed(entry, entry.files, known)
        if why is None and known is not None:
            opened.contents[path] = known.content
            continue
        text = f"{path}: {entry.files.folder}: {why}"
        cause = broken_text(entry.files)
        if cause is not None:
            text = f"{text}: {cause}"
        opened.problems.append(Problem(path, "unlocked", text, broken=cause is not None))
    for path in lock.nodes:
        now = opened.entries.get(path, FolderNode())
        if path in reported:
            continue  # its problem is listed already, and "gone" may be wrong
        if now.files is None and not now.null and now.hub is None:
            text = f"{path}: in the lock, but its adapter is gone"
            opened.problems.append(Problem(path, "unlocked", text))


def _changed(entry: FolderNode, files: Files, known: NodeLock) -> str | None:
    """Say how the files differ from the lock; the hash decides if only the time does."""
    if len(files.names) != len(known.files):
        return "another kind of adapter than the lock speaks of"
    locked: dict[str, FileLock] = dict(zip(files.names, known.files, strict=True))
    for name, stamp in files.stamps.items():
        # Sizes are compared before anything is hashed: another size is another content, and to hash
        # the files would read every byte of them.
        if stamp.size != locked[name].size:
            return f"{name} has {plural(stamp.size, 'byte')}, the lock says {locked[name].size:,}"
    # The files of a commit never change, but their times differ between machines. The first read
    # hashes them.
    if entry.hub is not None and entry.hub == known.hub:
        return None
    if all(stamp.mtime_ns == locked[name].mtime_ns for name, stamp in files.stamps.items()):
        return None
    try:
        if hashed(files) == known.content:
            return None
    except LoraTreeError as error:
        return str(error)
    return "its files have other contents than the lock says"


def _compare_lineages(opened: Opened, lock: TreeLock) -> None:
    """Find the nodes that were trained on another lineage, or another base, than they have now."""
    opened.base = base_lock(base_at_hand(opened), opened.base_spelled, [lock.base])
    lineages = {"": TOP}
    for path, entry in opened.entries.items():  # parents first
        above = lineages[path.rpartition("/")[0]]
        lineages[path] = above.below(opened.contents.get(path), entry.weight, path)
        if path not in opened.contents:
            continue
        was = opened.trained(path)
        stale = None if was is None else stale_text(path, was, above, opened.base)
        if stale is not None:
            opened.stale[path] = stale
            opened.problems.append(Problem(path, "stale", stale))


# ---------------------------------------------------------------------- what follows from it
def named_bases(opened: Opened) -> dict[str, str]:
    """Return the base that each node's config names: node → base."""
    adapters = {
        path: entry.files for path, entry in opened.entries.items() if entry.files is not None
    }
    return bases_of(adapters)


def base_at_hand(opened: Opened) -> str | None:
    """Return the base if its files may be looked at."""
    name = opened.base_name
    if name is None or opened.outside or inside(name, opened.place.folder):
        return name
    return None


def unusable(opened: Opened) -> dict[str, str]:
    """Find the nodes that can't be used: path → why, in one line or several.

    These are the nodes with a problem, the nodes below them, and adapters that are broken or of a
    kind that does not add up. For the last, the headers of all adapters are read here.
    """
    reasons: dict[str, str] = {}
    for problem in opened.problems:
        if problem.node and problem.kind not in HARMLESS:
            reasons.setdefault(problem.node, problem.text)
    for path, entry in opened.entries.items():  # parents first, so that a reason reaches all below
        above = path.rpartition("/")[0]
        if path in reasons:
            continue
        if above in reasons:
            reasons[path] = f"{path}: lies below {above}, which can't be used"
        elif entry.files is not None:
            reason = broken_text(entry.files, unknown_kinds=True)
            if reason is not None:
                reasons[path] = f"{path}: {reason}"
    return reasons


def refuse_no_tree(opened: Opened) -> None:
    """Refuse a folder in which nothing says that it is a tree.

    Raises:
        FolderError: it has neither a tree.yaml nor an adapter.
    """
    if opened.is_empty:
        raise FolderError(
            f"{opened.place.folder}: no tree: no tree.yaml, "
            "and no folder below with an adapter_config.json",
            "give the folder that holds the folders of the adapters",
        )
