"""What every test stands on: one thread a process (two of them share two cores), no network, the
same examples in every run (`make fuzz` draws new ones).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shell import Shell

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background with SIGINT ignored, and every process that a test
    # starts would inherit that, and never be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fuzz", deadline=None)
settings.load_profile("same")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """The folder of `zoo.tree()`; a file whose trees are others has a fixture of its own."""
    from zoo import tree

    tree().save(tmp_path / "zoo")
    return tmp_path / "zoo"


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """The command line in this process, which has imported what a new one takes seconds for."""
    from shell import Shell

    return Shell(capsys)
