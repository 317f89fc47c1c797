"""Two processes come to what one does, on the same rows: with DDP, with FSDP2, and through a
trainer.

All of it runs in one pair of processes, over gloo on the loopback, and is compared with dense
algebra in this one.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import joint
import parallel
import pytest
import torch
from safetensors.torch import load_file
from sampling import slow
from torch import Tensor

import lora_tree as lt

pytestmark = slow

RANKS = 2
HERE = Path(__file__).parent
ENOUGH_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes left, when all have ended well."""
    made = tmp_path_factory.mktemp("parallel")
    _run(made, RANKS)
    _run(made, 1)
    return made


def _run(made: Path, ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:lora_tree",
        str(HERE / "parallel.py"),
        str(made),
    ]
    said = [made / f"said-{rank}-of-{ranks}.txt" for rank in range(ranks)]
    with ExitStack() as files:
        running = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), str(port)],
                env=environment,
                stderr=files.enter_context(said[rank].open("w")),
            )
            for rank in range(ranks)
        ]
        try:
            _all_end(running)
            codes = [process.poll() for process in running]
            assert codes == [0] * ranks, "\n".join(
                [str(codes), *(file.read_text() for file in said)]
            )
        finally:
            for process in running:
                process.kill()
                process.wait()


def _all_end(running: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended, one has failed (the others would wait for it), or it has been long
    enough.
    """
    end = time.monotonic() + ENOUGH_S
    while time.monotonic() < end and any(process.poll() is None for process in running):
        if any(process.poll() for process in running):
            time.sleep(2)  # for the others to say what they saw
            return
        time.sleep(0.05)


@pytest.fixture(scope="module")
def hand() -> joint.ByHand:
    """The same steps in one process, by dense algebra."""
    made = joint.ByHand(parallel.TRAINING)
    for step in parallel.rows():
        made.step([row for micro in step for batch in micro for row in batch])
    return made


def factors(of: Path) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    saved = load_file(of / "factors.safetensors")
    for name in sorted(saved, key=lambda name: (name.split()[0], int(name.split()[1]))):
        found.setdefault(name.split()[0], []).append(saved[name])
    return found


@pytest.mark.parametrize("scenario", list(parallel.SCENARIOS))
def test_two_processes_come_to_what_one_does(
    scenario: str, folder: Path, hand: joint.ByHand
) -> None:
    hand.same_as(factors(folder / scenario))


def test_what_two_processes_sharded_goes_on_in_one(folder: Path, hand: joint.ByHand) -> None:
    hand.same_as(factors(folder / "resumed_alone"))


@pytest.mark.parametrize("scenario", ["fsdp", "sharded_trainer"])
def test_what_was_sharded_is_saved_whole(scenario: str, folder: Path) -> None:
    saved, wanted = joint.factors(lt.load(folder / scenario / "zoo")), factors(folder / scenario)
    assert all(
        torch.equal(x, y) for path in wanted for x, y in zip(saved[path], wanted[path], strict=True)
    )


def test_a_trainer_tells_the_losses_of_all_processes(folder: Path, hand: joint.ByHand) -> None:
    told = json.loads((folder / "trainer/told.json").read_text())
    for log, wanted in zip(told["logs"], hand.losses, strict=True):
        paths = {f"loss/{path or '(base)'}": loss for path, loss in wanted.items()}
        assert {k: v for k, v in log.items() if k != "loss"} == pytest.approx(paths, rel=1e-9)
        assert math.isclose(log["loss"], sum(wanted.values()), rel_tol=1e-6)
    with torch.no_grad():
        means = {
            path: float(loss)
            for path, loss in hand.losses_of(joint.rows(["a", "d", "a"], 8)).items()
        }
    assert {p: told["eval"][f"eval_loss/{p}"] for p in means} == pytest.approx(
        means, rel=1e-9
    )  # no row twice


def test_a_blend_may_be_the_path_of_rows_on_one_rank_only(folder: Path) -> None:
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    optimizer = torch.optim.AdamW(joint.groups(model, "a", "d"))
    model.follow(optimizer)
    paths = ["a", "d", parallel.BLENDED, "a"]
    ids, labels, _ = parallel.columns([*joint.rows(["", ""], 20), *joint.rows(["", ""], 21)])
    counts = lt.token_counts(model.tree, [(labels, paths)])
    with model.route(paths):
        logits = model(input_ids=ids, use_cache=False).logits
        lt.path_loss(logits, labels, paths, counts=counts).total.backward()
    optimizer.step()
    saved = factors(folder / "blends")
    for path, wanted in joint.factors(model.tree).items():
        for mine, want in zip(saved[path], wanted, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-9)
    said = [json.loads((folder / f"blends/told-{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    assert said[0]["counts"] == counts
    assert len(said[0]["means"]) == 3


def test_two_processes_judge_a_leaf_as_dense_algebra_does(folder: Path) -> None:
    hand = joint.ByHand(())
    hand.factors = factors(folder / "judged")
    losses = {}
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        hand.tree.update("a/b/c", weight=part)
        losses[part] = float(hand.losses_of(joint.misleading_rows()[1])["a/b/c"])
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < 1
    for rank in range(RANKS):
        told = json.loads((folder / f"judged/told-{rank}.json").read_text())
        found = [told[name] for name in ("parent", "trained", "kept")]
        assert found == pytest.approx([losses[0.0], losses[1.0], losses[best]], rel=1e-9)
        assert (told["node"], told["rows"], told["weight"]) == ("a/b/c", 10, best)
    assert lt.load(folder / "judged/zoo")["a/b/c"].weight == best
