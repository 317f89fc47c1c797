"""trl over two processes comes to what one process does, on the same rows: one pair of processes,
over gloo.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import one_of_two
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
ENOUGH_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left, when both have ended well."""
    made = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(HERE / "one_of_two.py"), str(made)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    running = []
    try:
        for rank in range(2):
            said = (made / f"said-{rank}.txt").open("w")
            running.append(
                subprocess.Popen(
                    [*command, str(rank), port], env=environment, stdout=said, stderr=said
                )
            )
        codes = [process.wait(timeout=ENOUGH_S) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    told = "\n".join((made / f"said-{rank}.txt").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], told
    return made


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_processes_come_to_what_one_does(kind: str, folder: Path, tmp_path: Path) -> None:
    one_of_two.run(kind, tmp_path, batch=2)
    alone = load_file(tmp_path / f"{kind}-0.safetensors")
    together = load_file(folder / f"{kind}-0.safetensors")
    for name, wanted in alone.items():
        torch.testing.assert_close(together[name], wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", one_of_two.ALIKE)
def test_processes_with_rows_of_their_own_end_with_the_same_bits(kind: str, folder: Path) -> None:
    one, other = (load_file(folder / f"{kind}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(name for name in one if one[name].abs().max() > 1e-3)
