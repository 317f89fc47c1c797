"""Opening a tree's folder: what tree.yaml, tree.lock, the folders and an undecided save say, put together.

No weights are read: files are compared with the lock by size and time, and hashed only where the size is right and the
time is not. Where a save happens meanwhile the folder is looked at again, so what is seen is all old or all new.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from ..base_names import other_base
from ..errors import FolderError, LoraTreeError, NewerFormat, SpecError, suggest
from ..formats import strict_json
from ..formats.limits import CONFIG_BYTES, LOCK_BYTES, YAML_BYTES
from ..formats.peft import CONFIG, WEIGHTS
from ..spec import TreeSpec
from ..storage import as_path
from . import disk
from .bounds import hub_hint, inside
from .disk import Glimpse, glimpse
from .lockfile import BaseLock, FileLock, NodeLock, TreeLock, fingerprint
from .lockfile import parse as parse_lock
from .pending import Pending, pending, progress
from .problem import HARMLESS, Kind, Problem
from .resolve import Entry, resolve
from .scan import FILES, Files, Scan, scan
from .source import broken_text, hashed
from .trained import TOP, stale_text, trained
from .yamlfile import read_spec

__all__ = [
    "Opened",
    "Place",
    "base_at_hand",
    "base_lock",
    "inspect",
    "local_base",
    "named_bases",
    "place_of",
    "unusable",
]

YAML = "tree.yaml"
_TRIES = 50


@dataclass(frozen=True)
class Place:
    """Where a tree lives: a folder, and the name of the YAML in it that counts (which may be absent)."""

    folder: str
    yaml: str = YAML

    @property
    def lock(self) -> str:
        """The name of the lock that goes with the YAML."""
        stem, kind = os.path.splitext(self.yaml)
        return f"{stem if kind == '.yaml' else self.yaml}.lock"

    @property
    def yaml_file(self) -> str:
        return os.path.join(self.folder, self.yaml)

    @property
    def spelled(self) -> str:
        """What its user would write for it."""
        return self.folder if self.yaml == YAML else self.yaml_file

    @property
    def lock_file(self) -> str:
        return os.path.join(self.folder, self.lock)


@dataclass
class Opened:
    """What a folder holds.

    Args:
        outside: whether adapters outside of the folder may be named.
        spec, yaml_bytes: the meaning and the bytes of tree.yaml; None where there is none.
        lock, lock_bytes: of tree.lock.
        scan: the adapters below the folder, whether they are nodes or not.
        entries: the nodes, depth-first.
        passed: the paths of adapters that are steps of a node's own training run, and no nodes.
        agreed: the base that the adapters name, where there is no tree.yaml and they agree.
        contents: node → hash of its files, as far as the lock gives it and they agree.
        base: what is known of the base now; looked at only where there is a lock.
        stale: node → why.
        problems: everything that is wrong.
    """

    place: Place
    outside: bool = True
    spec: TreeSpec | None = None
    yaml_bytes: bytes | None = None
    lock: TreeLock | None = None
    lock_bytes: bytes | None = None
    scan: Scan = field(default_factory=Scan)
    entries: dict[str, Entry] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    agreed: str | None = None
    contents: dict[str, str] = field(default_factory=dict)
    base: BaseLock = field(default_factory=BaseLock)
    stale: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def base_spelled(self) -> str | None:
        """The base as tree.yaml spells it; without a tree.yaml the one that the adapters name, where they agree."""
        return self.spec.base if self.spec is not None else self.agreed

    @property
    def base_name(self) -> str | None:
        """The base as the tree names it: a local folder as an absolute path."""
        if self.spec is None:
            # A name like ../base is one that a tree.yaml had, and the lock still has.
            relative = self.agreed is not None and self.agreed.startswith(".")
            return (local_base(self.agreed, self.place.folder) if relative else None) or self.agreed
        return local_base(self.spec.base, self.place.folder) or self.spec.base


def place_of(path: str | os.PathLike[str], *, make: bool = False) -> Place:
    """The place that a user means: a folder, or a YAML file in it.

    Raises:
        FolderError: there is nothing, or something else (with ``make`` a place that is yet to be made is fine).
    """
    where = os.path.abspath(as_path(path))
    folder, name = os.path.split(where)
    if os.path.isdir(where):
        return Place(where)
    if name.endswith((".yaml", ".yml")) and (
        make or _resolved(folder, name, _decided(folder)[0]) is not None
    ):
        if make and name.startswith("."):
            raise FolderError(
                f"{where}: a tree is not saved into a hidden file", f"name it {name.lstrip('.')}"
            )
        return Place(folder, name)
    if os.path.isfile(where):
        whole = name in (CONFIG, WEIGHTS)
        hint = (
            f"a single adapter: Adapter.load({folder!r})"
            if whole
            else "give the folder of a tree, or its tree.yaml"
        )
        raise FolderError(f"{where}: a file, but neither a folder nor a YAML file", hint)
    if make:
        return Place(where)
    near = (
        suggest(name, os.listdir(folder))
        if os.path.isdir(folder)
        else f"; nor is there a folder {folder}"
    )
    hub = hub_hint(os.fspath(path))
    raise FolderError(f"{where}: no such folder or tree.yaml{near}", *([hub] if hub else []))


def inspect(place: Place, *, outside: bool = True) -> Opened:
    """Everything that can be known of a place without reading weights; what is wrong is listed, not raised.

    Args:
        outside: whether tree.yaml may name adapters that lie outside of the folder. Where it may not, the files of a
            base outside are not looked at either.

    Raises:
        FolderError: it keeps changing under the eyes of the reader.
    """
    for _ in range(_TRIES):
        before = _version(place)
        opened = _inspect(place, outside=outside)
        if _version(place) == before:
            return opened
    raise FolderError(
        f"{place.folder}: keeps changing while it is read", "wait for the writers to finish"
    )


def local_base(name: str | None, folder: str) -> str | None:
    """The base's own folder, absolute, where ``name`` (seen from ``folder``) is one."""
    if not name or "\0" in name:
        return None
    path = os.path.normpath(os.path.join(folder, os.path.expanduser(name)))
    return path if os.path.isdir(path) else None


# ---------------------------------------------------------------------- private
def _version(place: Place) -> list[tuple[Glimpse | None, ...]]:
    """Look at the files that every save changes.

    Its progress comes before and after the others: a save that decides between two of these looks shows in the last
    one, even if it has replaced the lock already.
    """
    files = (os.path.join(place.folder, name) for name in (place.lock, place.yaml))
    return [progress(place.folder), tuple(map(glimpse, files)), progress(place.folder)]


def _inspect(place: Place, *, outside: bool) -> Opened:
    opened = Opened(place, outside=outside)
    wrong: list[tuple[Kind, LoraTreeError]] = []
    decided, broken = _decided(place.folder)
    if broken is not None:
        wrong.append(("record", broken))
    located = None
    try:
        opened.yaml_bytes = _bytes(place, place.yaml, decided, YAML_BYTES)
        if opened.yaml_bytes is not None:
            opened.spec, located = read_spec(opened.yaml_bytes, place.yaml_file)
        elif place.yaml == YAML and os.path.exists(os.path.join(place.folder, "tree.yml")):
            raise SpecError(
                f"{place.folder}/tree.yml: only tree.yaml is looked for",
                "rename it, or open it by name",
            )
    except LoraTreeError as error:
        wrong.append(("yaml", error))
    try:
        opened.lock_bytes = _bytes(place, place.lock, decided, LOCK_BYTES)
        if opened.lock_bytes is not None:
            opened.lock = parse_lock(opened.lock_bytes, place.lock_file)
    except LoraTreeError as error:
        wrong.append(("lock", error))
    # Next to a file of a newer version any other complaint, and its advice, would mislead.
    newer: list[tuple[Kind, LoraTreeError]] = [
        ("newer", said) for _, said in wrong if isinstance(said, NewerFormat)
    ]
    for kind, said in newer[:1] or wrong:
        kind = "folder" if isinstance(said, FolderError) else kind
        opened.problems.append(Problem("", kind, str(said)))
    if opened.problems:
        return opened  # the meaning of the folders is not known without them
    opened.scan = scan(place.folder, decided)
    resolved = resolve(opened.spec, located, opened.scan, place.folder, outside=outside)
    opened.entries, opened.passed = resolved.entries, resolved.passed
    opened.problems.extend(resolved.problems)
    if opened.spec is None:
        known = opened.lock.base.name if opened.lock is not None else None
        opened.agreed = known or _agreed(named_bases(opened).values())
    if opened.lock is not None:
        _compare(opened, opened.lock)
    return opened


def _decided(folder: str) -> tuple[Pending, LoraTreeError | None]:
    try:
        return pending(folder), None
    except LoraTreeError as error:
        return Pending(), error


def _resolved(folder: str, name: str, decided: Pending) -> str | None:
    file = decided.resolve(folder, name)
    return file if file is not None and os.path.lexists(file) else None


def _bytes(place: Place, name: str, decided: Pending, most: int) -> bytes | None:
    file = _resolved(place.folder, name, decided)
    if file is None:
        return None
    if not inside(file, place.folder):
        real = os.path.realpath(file)
        raise FolderError(
            f"{file}: a link that leads out of {place.folder}",
            f"open {real} itself, or copy it here",
        )
    return disk.read(file, most=most, inside=partial(inside, folder=place.folder))


def _compare(opened: Opened, lock: TreeLock) -> None:
    """The nodes against the lock: unlocked ones, then, on the lineages that are there now, stale ones."""
    for path, entry in opened.entries.items():
        if entry.files is None or entry.files.flaw is not None:
            continue
        known = lock.nodes.get(path)
        why = "not in the lock" if known is None else _changed(entry.files, known)
        if why is not None:
            text = f"{path}: {entry.files.folder}: {why}"
            cause = broken_text(entry.files)
            whole = text if cause is None else f"{text}: {cause}"
            opened.problems.append(Problem(path, "unlocked", whole, broken=cause is not None))
        elif known is not None:
            opened.contents[path] = known.content
    for path in lock.nodes:
        gone = opened.entries.get(path, Entry())
        if gone.files is None and not gone.null:
            opened.problems.append(
                Problem(path, "unlocked", f"{path}: in the lock, but its adapter is gone")
            )
    opened.base = base_lock(base_at_hand(opened), opened.base_spelled, [lock.base])
    lineages = {"": TOP}
    for path, entry in opened.entries.items():
        above = lineages[path.rpartition("/")[0]]
        lineages[path] = above.below(opened.contents.get(path), entry.weight, path)
        if path in opened.contents:
            stale = stale_text(path, trained(lock.nodes[path], lock), above, opened.base)
            if stale is not None:
                opened.stale[path] = stale
                opened.problems.append(Problem(path, "stale", stale))


def named_bases(opened: Opened) -> dict[str, str]:
    """Read which base each adapter names in its config: node → base; a config that can't be read names none."""
    found: dict[str, str] = {}
    for path, entry in opened.entries.items():
        at = entry.files.now.get(CONFIG) if entry.files is not None else None
        if at is None:
            continue
        try:
            config = strict_json.loads(disk.read(at[0], most=CONFIG_BYTES), at[0])
        except LoraTreeError:
            continue
        named = config.get("base_model_name_or_path")
        if isinstance(named, str) and named:
            found[path] = named
    return found


def _agreed(names: Iterable[str]) -> str | None:
    """The base that all of them mean, as the first one spells it; None where they do not agree."""
    names = list(dict.fromkeys(names))
    if not names or any(other_base(names[0], name) for name in names[1:]):
        return None
    return names[0]


def unusable(opened: Opened) -> dict[str, str]:
    """Find what can't be used in a folder: path → why, in one line or several.

    That is what a problem is known of, what lies below such a node, and, since headers are looked at here, adapters
    that are broken or of a kind that does not add up.
    """
    found: dict[str, str] = {}
    for problem in opened.problems:
        if problem.node and problem.kind not in HARMLESS:
            found.setdefault(problem.node, problem.text)
    for path, entry in opened.entries.items():
        above = path.rpartition("/")[0]
        if path in found:
            continue
        if above in found:
            found[path] = f"{path}: lies below {above}, which can't be used"
        elif entry.files is not None:
            reason = broken_text(entry.files, unknown_kinds=True)
            if reason is not None:
                found[path] = f"{path}: {reason}"
    return found


def base_at_hand(opened: Opened) -> str | None:
    """The base whose files may be looked at."""
    name = opened.base_name
    if name is None or opened.outside or inside(name, opened.place.folder):
        return name
    return None


def base_lock(name: str | None, spelled: str | None, before: list[BaseLock]) -> BaseLock:
    """What is known of a base now; where its files are not at hand, what was known of the one of that name before.

    Args:
        name: the base, a local folder as an absolute path.
        spelled: its name as tree.yaml has it.
    """
    if spelled is None:
        return BaseLock()
    found = fingerprint(name) if name else None
    remembered = next(
        (base.fingerprint for base in before if base.name == spelled and base.fingerprint), None
    )
    return BaseLock(name=spelled, fingerprint=found or remembered)


def _changed(files: Files, known: NodeLock) -> str | None:
    """How the files differ from the lock; the hash decides where only the time does."""
    locks: Mapping[str, FileLock] = dict(zip(FILES, (known.config, known.weights), strict=True))
    for name, stamp in files.stamps.items():
        if stamp.size != locks[name].size:
            return f"{name} has {stamp.size} bytes, the lock says {locks[name].size}"
    if all(stamp.mtime_ns == locks[name].mtime_ns for name, stamp in files.stamps.items()):
        return None
    try:
        return (
            None
            if hashed(files) == known.content
            else "its files have other contents than the lock says"
        )
    except LoraTreeError as error:
        return str(error)
