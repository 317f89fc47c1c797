"""The laws on CUDA. Without a device nothing runs, and one line says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(
    0, str(Path(__file__).parent.parent / "tests")
)  # the contract is written there, for every device

import pytest
import torch

NO_DEVICE = "no CUDA device here: the tests of tests_gpu need one, and were skipped"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Nothing is collected where nothing can run."""
    return None if torch.cuda.is_available() else True


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """No test was found: that is right without a device."""
    if not torch.cuda.is_available():
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why nothing ran."""
    if not torch.cuda.is_available():
        terminalreporter.write_line(NO_DEVICE)
