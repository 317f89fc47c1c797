"""Trained: the lineage and base that a node was trained on, and their changes since.

A lineage is known by one hash, which says whether anything has changed. To say what has changed,
tree.lock also keeps the steps of every lineage that it mentions: for each adapter on the way down
its content, its weight and its name.

    trained on   fr (content a, weight 1.0)  >  fr/legal (content b, weight 0.8)
    now          fr (content c, weight 1.0)  >  fr/legal (content b, weight 0.5)
    so           the content of fr, the weight of fr/legal (was 0.8, now 0.5)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..provenance import Made, TrainedWith
from ..weights import Weight
from .disk import Stamp
from .lockfile import (
    ROOT,
    BaseLock,
    FileLock,
    HubLock,
    LineageLock,
    MadeLock,
    NodeLock,
    TreeLock,
    lineage,
    weight_line,
)

__all__ = [
    "TOP",
    "Lineage",
    "LineageStep",
    "Lineages",
    "Trained",
    "lineage_locks",
    "made_lock",
    "made_of",
    "node_lock",
    "stale_text",
    "trained",
    "training_locks",
]


@dataclass(frozen=True)
class LineageStep:
    """One adapter on the way down a lineage; its name is for messages and counts for nothing."""

    content: str
    weight: Weight
    node: str


@dataclass(frozen=True)
class Lineage:
    """A lineage: its hash, and the adapters on the way down, if the lock lists them."""

    digest: str
    steps: tuple[LineageStep, ...] | None = None

    def below(self, content: str | None, weight: Weight, node: str) -> Lineage:
        """Return the lineage of a node, given its parent's; without an adapter it is the same."""
        if content is None:
            return self
        digest = lineage(self.digest, content, weight)
        steps = None if self.steps is None else (*self.steps, LineageStep(content, weight, node))
        return Lineage(digest, steps)


TOP = Lineage(ROOT, ())


@dataclass(frozen=True)
class Trained:
    """The lineage and the base that a node was trained on.

    Args:
        on: the lineage of its parent at the time.
        base: the base at the time.
        untrained: its increments are zero, so they fit any lineage and any base.
        made: the time and the command that gave the node its content, if a save noted them.
    """

    on: Lineage
    base: BaseLock
    untrained: bool = False
    made: Made | None = None


# ---------------------------------------------------------------------- in and out of the lock
def trained(node: NodeLock, lock: TreeLock, lineages: Lineages | None = None) -> Trained:
    """Return the lineage that a node was trained on, by its lock.

    Args:
        node: its entry in the lock.
        lock: the lock.
        lineages: those of the lock, if many nodes are asked for; siblings then share theirs.
    """
    on = (lineages or Lineages(lock.lineages)).of(node.trained_on)
    made = made_of(node.made, lock.trainings)
    return Trained(on, node.base or lock.base, node.untrained, made)


class Lineages:
    """The lineages in a lock's table, each checked once; siblings share theirs.

    Args:
        table: hash → the last step of that lineage.
    """

    def __init__(self, table: Mapping[str, LineageLock]) -> None:
        self._table = table
        self._known = {ROOT: TOP}
        self._steps: dict[str, LineageStep] = {}

    def of(self, digest: str) -> Lineage:
        """Return a lineage; without steps if the table lacks one of them, or has a wrong one."""
        known = self._known.get(digest)
        if known is None:
            known = self._known[digest] = Lineage(digest, self._steps_of(digest))
        return known

    def _steps_of(self, digest: str) -> tuple[LineageStep, ...] | None:
        steps: list[LineageStep] = []
        while digest != ROOT:
            entry = self._table.get(digest)
            if entry is None:
                return None
            step = self._steps.get(digest)
            if step is None:
                # The table is only for messages, and anybody may have written it. A step counts if
                # its hash is right.
                if lineage(entry.above, entry.content, entry.own_weight) != digest:
                    return None
                step = LineageStep(entry.content, entry.own_weight, entry.node)
                self._steps[digest] = step
            steps.append(step)
            digest = entry.above
        return tuple(reversed(steps))


def lineage_locks(mentioned: Iterable[Trained]) -> dict[str, LineageLock]:
    """Return the lock's entries for every lineage that its nodes mention, each step once."""
    entries: dict[str, LineageLock] = {}
    for trained_with in mentioned:
        # A lineage of which the lock lists no steps stays known by its hash alone.
        above = ROOT
        for step in trained_with.on.steps or ():
            digest = lineage(above, step.content, step.weight)
            entry = LineageLock(
                above=above,
                content=step.content,
                weight=weight_line(step.weight),
                node=step.node,
            )
            entries.setdefault(digest, entry)
            above = digest
    return entries


def made_of(made: MadeLock | None, trainings: Mapping[str, TrainedWith]) -> Made | None:
    """Return the origin of a node by its entry in the lock."""
    if made is None:
        return None
    losses = None
    if made.before is not None and made.after is not None:
        losses = made.before, made.after
    training = None if made.training is None else trainings.get(made.training)
    return Made(made.when, made.by, losses, training)


def made_lock(made: Made | None) -> MadeLock | None:
    """Return the entry that says how a node was made; see `training_locks` for the rest of it."""
    if made is None:
        return None
    before, after = made.losses or (None, None)
    training = None if made.training is None else made.training.digest
    return MadeLock(when=made.when, by=made.by, before=before, after=after, training=training)


def training_locks(mentioned: Iterable[Trained]) -> dict[str, TrainedWith]:
    """Return what nodes were trained with, by its hash, each once."""
    found: dict[str, TrainedWith] = {}
    for one in mentioned:
        if one.made is not None and one.made.training is not None:
            found[one.made.training.digest] = one.made.training
    return found


def node_lock(
    stamps: Mapping[str, Stamp],
    content: str,
    on: Trained,
    base: BaseLock,
    *,
    pieces: str | None = None,
    written: bool,
    hub: HubLock | None = None,
) -> NodeLock:
    """Return a node's entry in the lock; it names a base only if that is not the lock's own.

    Args:
        stamps: size and time of its files.
        content: the hash of them.
        on: what it was trained on.
        base: the lock's base.
        pieces: the hash of the files by pieces, if it is known.
        written: a save wrote the files.
        hub: where it is on the model hub, if it is there.
    """
    files = [FileLock.of(stamp) for stamp in stamps.values()]
    is_pair = len(files) == 2  # of PEFT or of mlx-lm, the config first
    return NodeLock(
        content=content,
        pieces=pieces,
        config=files[0] if is_pair else None,
        weights=files[1] if is_pair else None,
        file=None if is_pair else files[0],
        trained_on=on.on.digest,
        base=on.base if on.base.differs(base) else None,
        written=written,
        untrained=on.untrained,
        made=made_lock(on.made),
        hub=hub,
    )


# ---------------------------------------------------------------------- stale
def stale_text(path: str, was: Trained, above: Lineage, base: BaseLock) -> str | None:
    """Say why a node is stale; None if it is not.

    Args:
        path: the node.
        was: what it was trained on.
        above: the lineage of its parent now.
        base: what is known of the base now.
    """
    if was.untrained:
        return None  # zero fits everything
    if was.base.differs(base):
        if was.base.name != base.name:
            return f"{path}: it was trained on {was.base.name}, the tree names {base.name}"
        return f"{path}: the files of the base {base.name} have changed since it was trained"
    if was.on.digest == above.digest:
        return None
    # A child of the root has no ancestor that could have changed, so it was moved there.
    parent = path.rpartition("/")[0]
    since = f"the lineage of {parent} has changed" if parent else "it was moved to the top"
    text = f"{path}: {since} since it was trained"
    if was.on.steps is None or above.steps is None:
        return f"{text} (on {was.on.digest[:12]}…, now {above.digest[:12]}…)"
    return f"{text}: {'; '.join(_changes(was.on.steps, above.steps))}"


def _changes(was: tuple[LineageStep, ...], now: tuple[LineageStep, ...]) -> list[str]:
    """Say what differs on the way down: contents, weights, and ancestors that came or went."""
    old = list(was)
    texts: list[str] = []
    new: list[LineageStep] = []
    # Contents come first: the same content under another name is the same node, renamed.
    for step in now:
        same = _taken(old, "content", step.content)
        if same is None:
            new.append(step)
        elif same.weight != step.weight:
            texts.append(_weight(same, step))
    # Among the rest, the same name with another content is a node that was trained again.
    for step in new:
        same = _taken(old, "node", step.node)
        if same is None:
            texts.append(f"{step.node} is above it now")
            continue
        contents = f"was {same.content[:12]}…, now {step.content[:12]}…"
        texts.append(f"the content of {step.node} ({contents})")
        if same.weight != step.weight:
            texts.append(_weight(same, step))
    texts.extend(f"{step.node} is no longer above it" for step in old)
    return texts or ["the order of the nodes above it"]


def _taken(steps: list[LineageStep], what: str, value: str) -> LineageStep | None:
    """Take the first step with this content, or of this node, out of a list."""
    for step in steps:
        if getattr(step, what) == value:
            steps.remove(step)
            return step
    return None


def _weight(was: LineageStep, now: LineageStep) -> str:
    return f"the weight of {now.node} (was {was.weight}, now {now.weight})"
