"""Kill -9 at random moments of train, restore and gc: every acknowledged content is there
afterwards.

A worker trains, changes, removes, restores and cleans up in one folder, and acknowledges each act
through a pipe when it has returned. It is killed at a random moment, again and again. After every
kill the tree opens, every version that its history names has the bytes of its hash, and none of the
contents that were acknowledged is missing, but those beyond the bound. No step of a run is missing
in its record, or told twice.

The seed is printed; KILLS_SEED repeats a run as far as the machine's timing lets it, and KILLS says
how often each folder's worker is killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_tree as lt
from lora_tree.demo.bytelevel import new_base
from lora_tree.errors import FormatError
from lora_tree.runs import Row, Run, Settings
from lora_tree.runs.place import find_last_checkpoint
from lora_tree.spec import HistorySpec

KILLS = int(os.environ.get("KILLS", "110"))
SEED = int(os.environ.get("KILLS_SEED", str(time.time_ns() % 10**6)))
VERSIONS = 8
NODES = ("fr", "fr/legal", "fr/medical", "de")
LONGEST_S = 1.5


# ---------------------------------------------------------------------- the worker
def train(zoo: Path, base: Any, draw: random.Random) -> None:
    """What ``lora-tree train`` does; a run that was cut off goes on."""
    before = find_last_checkpoint(zoo / ".training")
    seed, nodes = draw.randrange(10**6), [draw.choice(NODES)]
    if before is not None and not before.is_finished:
        seed, nodes = before.about["settings"]["seed"], before.about["nodes"]
    tree = opened(zoo)
    if nodes[0] not in tree or tree[nodes[0]].weight == 0:
        return
    rows = [Row(nodes[0], tuple(range(n, n + 8)), tuple(range(n, n + 8)), "x:1") for n in range(4)]
    settings = Settings(steps=2, batch=2, lr=0.01, seed=seed, hold_back=0.0)
    model = lt.attach(tree, base)
    try:
        try:
            run = Run(model, rows, settings, zoo / ".training", nodes=nodes, records=zoo)
        except FormatError:
            # Another act has changed the ancestors on which the cut-off run began. Its user gives
            # it up.
            shutil.rmtree(zoo / ".training")
            return
        for _ in run.steps(save_every=1):
            pass
        if not run.was_over:
            run.save()
            model.trainable()
            tree.save(zoo, note=run.note("train"))
            run.finish()
    finally:
        model.detach()


def change(zoo: Path, base: Any, draw: random.Random) -> None:
    """Give a node other numbers, or another weight, or take it out."""
    tree = opened(zoo)
    path = draw.choice(tree.paths())
    what = draw.random()
    if what < 0.6:
        torch.manual_seed(draw.randrange(10**6))
        tree.update(path, adapter=random_adapter())
    elif what < 0.8:
        tree.update(path, weight=draw.choice([0.25, 0.5, 1.0]))
    elif not tree.children(path) and len(tree) > 1:  # a tree without nodes has nothing to train
        tree.remove(path)
    tree.save(zoo, note="change")


def restore(zoo: Path, base: Any, draw: random.Random) -> None:
    """Bring a version back; of a removed node, with the node above it."""
    history, tree = lt.history(zoo), opened(zoo)
    path = draw.choice(sorted(history))
    above = [node for node in NODES if path.startswith(node + "/") and node not in tree]
    number = draw.randrange(len(history[path])) + 1
    lt.restore(zoo, *above, f"{path}@{number}")


def clean(zoo: Path, base: Any, draw: random.Random) -> None:
    """Clean up; the bound is the one that the tree has."""
    lt.gc(zoo, runs=6)


def work(zoo: Path, base: Any, seed: int, acknowledge: int) -> None:
    """Act until killed; tell each act that has returned."""
    draw = random.Random(seed)
    warnings.simplefilter("ignore")
    while True:
        act = draw.choice([train, train, train, change, restore, clean])
        act(zoo, base, draw)
        os.write(acknowledge, (json.dumps([act.__name__, present(zoo)]) + "\n").encode())


# ---------------------------------------------------------------------- the judge
def opened(zoo: Path) -> lt.AdapterTree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.StaleWarning)
        return lt.load(zoo)


def random_adapter() -> lt.Adapter:
    name = "model.layers.0.self_attn.q_proj"
    return lt.Adapter({name: lt.LowRank(torch.randn(2, 32), torch.randn(32, 2))})


def present(zoo: Path) -> dict[str, str]:
    """Node → its content now."""
    found = {}
    for path, versions in lt.history(zoo).items():
        if versions[-1].is_present:
            found[path] = versions[-1].content
    return found


def removed_above(path: str, history: Mapping[str, Sequence[lt.Version]]) -> list[str]:
    """Return the nodes above one that are in the history and no longer in the tree."""
    above = [node for node in history if path.startswith(node + "/")]
    return [node for node in above if not history[node][-1].is_present]


def named(zoo: Path) -> dict[str, list[str]]:
    """Node → its different contents, the one it had last at the end."""
    found: dict[str, list[str]] = {}
    for path, versions in lt.history(zoo).items():
        contents = [version.content for version in versions]
        found[path] = [c for n, c in enumerate(contents) if c not in contents[n + 1 :]]
    return found


def read_all(zoo: Path, known: set[str]) -> None:
    """Read every content that was not read before; each is compared with its hash."""
    history = lt.history(zoo)
    for path, versions in history.items():
        # A node stands on the nodes above it: those that were removed, too, come with their last
        # version.
        above = [f"{node}@{len(history[node])}" for node in removed_above(path, history)]
        for number, version in enumerate(versions, 1):
            if version.content not in known:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", lt.StaleWarning)
                    tree, _ = lt.load_versions(zoo, *above, f"{path}@{number}")
                assert tree.adapter(path) is not None
                known.add(version.content)


def check_runs(zoo: Path) -> None:
    """Compare what is noted of every run: no step is missing, and none is told twice."""
    for run in lt.run_records(zoo):
        steps = [line.step for line in run.metrics()]
        assert steps == list(range(1, len(steps) + 1)), run
        if run.state in ("trained", "finished"):
            assert len(steps) == run.done == run.steps, run


def expected(before: dict[str, list[str]], told: list[dict[str, str]]) -> dict[str, list[str]]:
    """Return the contents that have to be there: of each node the last ones that were told."""
    contents = {path: list(own) for path, own in before.items()}
    for state in told:
        for path, content in state.items():
            own = contents.setdefault(path, [])
            if content in own:
                own.remove(content)
            own.append(content)
    # One less than the bound: the act that was killed may have added one more, and no act adds two.
    return {path: own[-VERSIONS:] for path, own in contents.items()}


@pytest.mark.parametrize("folder", range(2))
def test_every_acknowledged_content_is_there_after_a_kill(tmp_path: Path, folder: int) -> None:
    draw = random.Random(SEED + folder)
    print(f"KILLS_SEED={SEED}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = new_base(hidden=32, layers=1, window=16)
    zoo = tmp_path / "zoo"
    tree = lt.AdapterTree(base="org/model")
    tree.history = HistorySpec(versions=VERSIONS)
    for path in NODES:
        tree.add(path, adapter=random_adapter())
    tree.save(zoo)
    before, acts, whole = named(zoo), 0, set[str]()
    there = set(NODES)
    kinds: dict[str, int] = {}
    for kill in range(KILLS):
        told = killed_worker(zoo, base, draw, failed=tmp_path / "failed")
        for name, _ in told:
            kinds[name] = kinds.get(name, 0) + 1
        acts += len(told)
        assert {p.kind for p in lt.check(zoo)} <= {"stale", "leftover"}, f"kill {kill}"
        now = named(zoo)
        for path, contents in expected(before, [state for _, state in told]).items():
            missing = set(contents) - set(now.get(path, ()))
            assert not missing, f"kill {kill}: {path} lost {missing}"
        # No act takes out two nodes, and the one that was killed may have taken out one.
        there = set(told[-1][1]) if told else there
        lost = there - set(present(zoo))
        assert len(lost) <= 1, f"kill {kill}: {lost} were in the tree"
        there = set(present(zoo))
        read_all(zoo, whole)
        check_runs(zoo)
        before = now
    assert kinds.keys() == {"train", "change", "restore", "clean"}, kinds
    print(f"{KILLS} kills, {acts} acknowledged acts: {kinds}")
    # All of them once more, from the disk and not from what was noted on the way.
    read_all(zoo, set())
    lt.gc(zoo)
    assert {p.kind for p in lt.check(zoo)} <= {"stale"}


def killed_worker(
    zoo: Path, base: Any, draw: random.Random, *, failed: Path
) -> list[tuple[str, dict[str, str]]]:
    """Let a worker act for a random time, kill it, and return what it acknowledged."""
    reading, writing = os.pipe()
    seed = draw.randrange(10**9)
    # A fork: a new process would take seconds to import torch, and there are hundreds of them.
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(zoo, base, seed, writing)
        except BaseException:
            failed.write_text(traceback.format_exc())
        finally:
            os._exit(1)
    os.close(writing)
    time.sleep(draw.uniform(0.02, LONGEST_S))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().split(b"\n")
    assert not failed.exists(), failed.read_text()
    return [tuple(json.loads(line)) for line in lines[:-1]]  # type: ignore[misc]
