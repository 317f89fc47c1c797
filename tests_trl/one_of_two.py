"""One of two processes that train a path with trl over gloo: ``python one_of_two.py FOLDER RANK
PORT``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (quiet, no network)
import torch.distributed as dist
from safetensors.torch import save_file
from small import DOMAIN, POLICY, losses, model
from test_trl import GROUPS, ours
from torch.nn.parallel import DistributedDataParallel

KINDS = ("sft", "dpo", "kto", "grpo")
ALIKE = ("kto", "grpo")
"""KTO pairs rows up within a process's own batch, and GRPO draws completions there: one process has
no such rows.
"""


def run(kind: str, folder: Path, *, batch: int) -> list[float]:
    """Train four steps on two rows each, and write the factors from the first process."""
    of = model()
    more: dict[str, Any] = dict(per_device_train_batch_size=batch)
    if "RANK" in os.environ:
        more |= dict(ddp_backend="gloo")
    if kind in ALIKE:
        more |= dict(per_device_train_batch_size=2)
    if kind == "grpo":
        more = {**GROUPS, "beta": 0.1, **more}
    trainer = ours(kind, of, folder / kind, **more)
    trainer.train()
    if dist.is_initialized():
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        if kind != "sft":
            assert trainer.ref_model.path == DOMAIN  # no wrapper: nothing of it trains
    if not dist.is_initialized() or dist.get_rank() == 0 or kind in ALIKE:
        rank = dist.get_rank() if dist.is_initialized() else 0
        numbers = {f"{i}": p.detach().contiguous() for i, p in enumerate(of.factors.of(POLICY))}
        save_file(numbers, folder / f"{kind}-{rank}.safetensors")
    return losses(trainer)


def main() -> None:
    folder, rank, port = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "1",
    }
    for kind in KINDS:
        run(kind, folder, batch=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
