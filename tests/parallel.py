"""What the processes of a data-parallel test do: ``python parallel.py FOLDER RANK RANKS PORT``.

Every scenario trains the same rows on the same tree, split over the processes, and process 0 writes
what came out. One process alone goes on with what two have left.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (one thread a process, no network)
import joint
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_tree as lt
from lora_tree.errors import StateError
from lora_tree.integrations.trainers.path_losses import PathTotals
from lora_tree.integrations.transformers import TreeTrainer

TRAINING = ("a", "a/b/c", "d")
# steps → micro-batches → one batch for each of two ranks
STEPS: list[list[tuple[list[str], list[str]]]] = [
    [
        (["a/b/c", "d"], ["", ""]),
        (["a", "a/b"], ["a/b/c", "a/b/c"]),
    ],  # d on one rank only; one of bare rows
    [
        (["d", "d"], ["", "d"]),
        (["", ""], ["", ""]),
    ],  # a and a/b/c have no rows on any rank; a batch of bare rows
    [(["a/b", ""], ["a", "a/b/c"]), (["d", "d"], ["a", "a"])],
    [(["", ""], ["", ""]), (["", ""], ["", ""])],  # nothing has rows
    [(["a/b/c", "a/b/c"], ["d", "d"]), (["a", "a"], ["d", "a"])],  # each on one rank
]


def rows() -> list[list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]]:
    """`STEPS` with a row for every path."""
    made = joint.rows(
        [path for step in STEPS for micro in step for batch in micro for path in batch]
    )
    taken = iter(made)
    return [
        [tuple([next(taken) for _ in batch] for batch in micro) for micro in step] for step in STEPS
    ]  # type: ignore[misc]


def columns(batch: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, list[str]]:
    ids, labels = (torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels"))
    return ids, labels, [row["path"] for row in batch]


def train(
    model: lt.TreeModel,
    called: nn.Module,
    optimizer: torch.optim.Optimizer,
    waits: Callable[[bool], contextlib.AbstractContextManager[Any]],
) -> None:
    """The loop that the docs show; ``waits``: whether gradients are shared after a micro-batch, or
    only later.
    """
    rank = dist.get_rank()
    for step in rows():
        mine = [columns(micro[rank]) for micro in step]
        counts = lt.token_counts(model.tree, [(labels, paths) for _, labels, paths in mine])
        for i, (ids, labels, paths) in enumerate(mine):
            with waits(i + 1 < len(mine)), model.route(paths):
                loss = lt.path_loss(
                    called(input_ids=ids, use_cache=False).logits, labels, paths, counts=counts
                )
                loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp(folder: Path) -> dict[str, list[Tensor]]:
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    optimizer = torch.optim.AdamW(joint.groups(model, *TRAINING))
    model.follow(optimizer)
    called = DistributedDataParallel(model)
    train(
        model,
        called,
        optimizer,
        lambda later: called.no_sync() if later else contextlib.nullcontext(),
    )
    return joint.factors(model.tree)


@contextlib.contextmanager
def unshared(model: FSDPModule, later: bool) -> Iterator[None]:
    model.set_requires_gradient_sync(not later)
    yield


def fsdp(folder: Path) -> dict[str, list[Tensor]]:
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    early = model.trainable(*TRAINING)
    mesh = init_device_mesh("cpu", (2,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    sharded = fully_shard(model, mesh=mesh)
    for wrong, message in (
        (lambda: model.trainable("a"), "the factors of a, a/b/c, d are sharded, and a is to train"),
        (lambda: model.trainable(*TRAINING, "a/b"), "and a, a/b, a/b/c, d are to train"),
        (lambda: model.activate("a"), "the base is sharded"),
        (lambda: model.follow(torch.optim.SGD(early)), "has parameters that are not that node's"),
    ):
        with contextlib.suppress(lt.errors.SpecError):
            try:
                wrong()
            except (StateError, lt.errors.SpecError) as error:
                assert message in str(error), error
            else:
                raise AssertionError(message)
    optimizer = torch.optim.AdamW(joint.groups(model, *TRAINING))
    model.follow(optimizer)
    assert all(hasattr(p, "full_tensor") for g in optimizer.param_groups for p in g["params"])
    train(model, sharded, optimizer, lambda later: unshared(sharded, later))
    with torch.no_grad(), model.route(["a/b/c", "d"]):
        sharded(input_ids=torch.zeros(2, 3, dtype=torch.int64))  # leaves whole factors behind
    with model.gathered() as tree:
        whole = joint.factors(tree)
        if dist.get_rank() == 0:
            tree.save(folder / "zoo")
    assert all(
        hasattr(t, "full_tensor")
        for v in model.tree.adapter("a").modules.values()
        for t in v.tensors
    )
    return whole


def trainer(folder: Path) -> dict[str, list[Tensor]]:
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    groups = joint.groups(model, *TRAINING)
    in_order = [row for step in rows() for micro in step for batch in micro for row in batch]
    args = joint.arguments(
        folder / "run",
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=2,
        ddp_backend="gloo",
        per_device_eval_batch_size=2,
    )
    made = TreeTrainer(
        model,
        args,
        groups=groups,
        loss="paths",
        train_dataset=in_order,
        eval_dataset=joint.rows(["a", "d", "a"], 8),
    )
    made.train()
    assert isinstance(made.model_wrapped, DistributedDataParallel)
    logs = [
        {k: v for k, v in log.items() if k.startswith("loss")}
        for log in made.state.log_history
        if "loss" in log
    ]
    found = made.evaluate()
    base = joint.base()
    again = lt.attach(joint.tree(base), base)
    resumed = TreeTrainer(
        again, args, loss="paths", groups=joint.groups(again, *TRAINING), train_dataset=in_order
    )
    resumed.train(resume_from_checkpoint=str(folder / "run/checkpoint-2"))
    one, other = joint.factors(model.tree), joint.factors(again.tree)
    assert all(
        torch.equal(x, y) for path in one for x, y in zip(one[path], other[path], strict=True)
    )
    drawn = {}
    for start in ("", "checkpoint-8"):  # in the middle of the second epoch of a sampler's own order
        base = joint.base()
        again = lt.attach(joint.tree(base), base)
        more: dict[str, Any] = dict(
            num_train_epochs=2, save_strategy="steps", save_steps=8, ddp_backend="gloo"
        )
        args = joint.arguments(folder / "drawn", **more)
        data: dict[str, Any] = dict(train_dataset=in_order, temperature=2.0)
        TreeTrainer(again, args, loss="paths", groups=joint.groups(again, *TRAINING), **data).train(
            resume_from_checkpoint=str(folder / "drawn" / start) if start else None
        )
        drawn[start] = joint.factors(again.tree)
    assert all(
        torch.equal(x, y)
        for p in one
        for x, y in zip(*(run[p] for run in drawn.values()), strict=True)
    )
    if dist.get_rank() == 0:
        told = {"logs": logs, "eval": {k: v for k, v in found.items() if k.startswith("eval_loss")}}
        (folder / "told.json").write_text(json.dumps(told))
    return one


def sharded() -> lt.TreeModel:
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    model.trainable(*TRAINING)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharded_trainer(folder: Path) -> dict[str, list[Tensor]]:
    model = sharded()
    in_order = [row for step in rows() for micro in step for batch in micro for row in batch]
    evaluated = dict(
        eval_dataset=joint.rows(["a", "d", "a"], 8), eval_strategy="steps", eval_steps=1
    )
    args = joint.arguments(
        folder / "run",
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=1,
        ddp_backend="gloo",
        **{key: value for key, value in evaluated.items() if key != "eval_dataset"},
    )
    data = dict(train_dataset=in_order, eval_dataset=evaluated["eval_dataset"])
    made = TreeTrainer(
        model,
        args,
        loss="paths",
        groups=joint.groups(model, *TRAINING),
        **data,
        save_to=folder / "zoo",
    )
    made.train()
    with model.gathered() as tree:
        whole = joint.factors(tree)
    assert args.save_only_model is False
    again = sharded()
    resumed = TreeTrainer(again, args, loss="paths", groups=joint.groups(again, *TRAINING), **data)
    resumed.train(resume_from_checkpoint=str(folder / "run/checkpoint-2"))
    with again.gathered() as tree:
        found = joint.factors(tree)
    assert all(
        torch.equal(x, y) for path in whole for x, y in zip(whole[path], found[path], strict=True)
    )
    made._load_from_checkpoint(str(folder / "run/checkpoint-1"))
    with model.gathered() as tree:
        assert not torch.equal(joint.factors(tree)["a"][0], whole["a"][0])
    made._load_from_checkpoint(str(folder / f"run/checkpoint-{len(STEPS)}"))
    for message, what in (
        ("a: every rank has a part", lambda: model.tree.flatten("a")),
        ("every rank has a part", lambda: model.tree.save(folder / f"parts-{dist.get_rank()}")),
    ):
        try:
            what()
        except lt.errors.LoraTreeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    with model.gathered() as tree:
        last = joint.factors(tree)
    assert all(
        torch.equal(x, y) for path in whole for x, y in zip(whole[path], last[path], strict=True)
    )
    return whole


def resumed_alone(folder: Path) -> dict[str, list[Tensor]]:
    """Go on in one process with what two have sharded and left after two steps."""
    model = sharded()
    in_order = [row for step in rows() for micro in step for batch in micro for row in batch]
    # As many micro-batches a step as two ranks had, so that each step has the same rows.
    args = joint.arguments(
        folder / "run", num_train_epochs=1, gradient_accumulation_steps=4, ddp_backend="gloo"
    )
    groups = joint.groups(model, *TRAINING)
    resumed = TreeTrainer(model, args, loss="paths", groups=groups, train_dataset=in_order)
    resumed.train(resume_from_checkpoint=str(folder.parent / "sharded_trainer/run/checkpoint-2"))
    with model.gathered() as tree:
        return joint.factors(tree)


def judged(folder: Path) -> dict[str, list[Tensor]]:
    """Hold rows back and judge a leaf by them, sharded."""
    model = sharded()
    made = TreeTrainer(
        model,
        joint.arguments(folder / "run", max_steps=10, ddp_backend="gloo"),
        groups=[{**group, "lr": 0.1} for group in joint.groups(model, *TRAINING)],
        train_dataset=joint.misleading_rows()[0],
        hold_back=0.25,
        save_to=folder / "zoo",
    )
    made.train()
    (verdict,) = made.verdicts
    assert model.tree["a/b/c"].weight == verdict.weight
    (folder / f"told-{dist.get_rank()}.json").write_text(json.dumps(vars(verdict)))
    with model.gathered() as tree:
        return joint.factors(tree)


BLENDED: Any = {"a/b": 0.5, "d": 0.5}


def blends(folder: Path) -> dict[str, list[Tensor]]:
    """A blend as a path of rows, on the second rank alone; an evaluation on the first alone."""
    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    mine = [["a", "d"], [BLENDED, "a"]][dist.get_rank()]
    optimizer = torch.optim.AdamW(joint.groups(model, "a", "d"))
    model.follow(optimizer)
    called = DistributedDataParallel(model)
    ids, labels, _ = columns(joint.rows(["", ""], 20 + dist.get_rank()))
    counts = lt.token_counts(model.tree, [(labels, mine)])
    with model.route(mine):
        logits = called(input_ids=ids, use_cache=False).logits
        lt.path_loss(logits, labels, mine, counts=counts).total.backward()
    optimizer.step()
    totals = PathTotals(model.tree)
    for paths in (["a", "d"], [["a", BLENDED], ["a", "d"]][dist.get_rank()]):
        table = totals.table(logits.detach(), labels, paths, shift=True)
        heard = [torch.zeros_like(table) for _ in range(2)]
        dist.all_gather(heard, table)
        for one in heard:
            totals.add(one)
    told = {"counts": counts, "means": totals.means()}
    (folder / f"told-{dist.get_rank()}.json").write_text(json.dumps(told))
    return joint.factors(model.tree)


SCENARIOS = {"ddp": ddp, "fsdp": fsdp, "trainer": trainer, "sharded_trainer": sharded_trainer}
"""Scenarios that train `STEPS`."""

OTHERS = {"blends": blends, "judged": judged}

ALONE = {"resumed_alone": resumed_alone}
"""What one process does with what two have left."""


def main() -> None:
    folder, rank, ranks, port = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "1",
    }
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name, scenario in ({**SCENARIOS, **OTHERS} if int(ranks) > 1 else ALONE).items():
        (folder / name).mkdir(exist_ok=True)
        try:
            found = scenario(folder / name)
        except BaseException:
            print(f"scenario {name}, rank {rank}", file=sys.stderr)
            raise
        if int(rank) == 0:
            flat = {
                f"{path} {i}": t.contiguous()
                for path, tensors in found.items()
                for i, t in enumerate(tensors)
            }
            save_file(flat, folder / name / "factors.safetensors")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
