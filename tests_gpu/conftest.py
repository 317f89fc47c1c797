"""Tests of the laws on CUDA; without a device none runs, and one line says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(
    0, str(Path(__file__).parent.parent / "tests")
)  # the contract for every device is there

import pytest
import torch

NO_DEVICE = "no CUDA device here: the tests of tests_gpu need one, and were skipped"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Collect nothing without a device."""
    return None if torch.cuda.is_available() else True


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Exit with success although no test was found, if there is no device."""
    if not torch.cuda.is_available():
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why nothing ran."""
    if not torch.cuda.is_available():
        terminalreporter.write_line(NO_DEVICE)
