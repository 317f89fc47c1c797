"""Windows and macOS, as far as they can be imitated: what their Python lacks is taken away."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from shell import save_base
from zoo import adapter, opened, tree, value

import lora_tree as lt
from lora_tree.errors import FolderError
from lora_tree.export import checkpoint_writer
from lora_tree.system import durable

# what `import fcntl` and these names give on Windows: an error
LACKS = """
import os, sys
import numpy, torch, tempfile, shutil, subprocess  # they look for it themselves
sys.modules["fcntl"] = None
for name in ("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC",
             "fchmod", "pread", "pwrite", "copy_file_range", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
import lora_tree as lt
from zoo import adapter, opened, tree, value
"""


def without_posix(body: str) -> str:
    """What such a process prints."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LACKS + body],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_values_in_memory_need_nothing_of_posix() -> None:
    body = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.v_proj(self.q_proj(x))

torch.manual_seed(0)
net, x = Net(), torch.ones(1, 8)
some = lt.AdapterTree()
some.add("fr", adapter=adapter(1))
some.add("fr/legal", adapter=adapter(2), weight=0.8)
q, v = (
    getattr(net, name).weight.detach() + sum(
        weight * own.modules[name].B @ own.modules[name].A
        for own, weight in ((adapter(1), 1), (adapter(2), 0.8))
    )
    for name in ("q_proj", "v_proj")
)
middle = torch.nn.functional.linear(x, q, net.q_proj.bias)
wanted = torch.nn.functional.linear(middle, v, net.v_proj.bias)
flat = some.flatten("fr/legal").modules["q_proj"]
torch.testing.assert_close(flat.dense(), q - net.q_proj.weight)
model = lt.attach(some, net)
for mode in ("merged", "unmerged"):
    model.activate("fr/legal", mode=mode)
    torch.testing.assert_close(net(x), wanted)
    model.deactivate()
print("done")
"""
    assert without_posix(body) == "done\n"


def test_a_tree_is_saved_opened_and_changed_with_lock_files_alone(tmp_path: Path) -> None:
    without_posix(f"""
folder = {str(tmp_path / "zoo")!r}
tree().save(folder)
again = opened(folder)
again.update("fr", adapter=adapter(9))
again.save(folder)
adapter(10).save(folder + "/one")
adapter(11).save(folder + "/one")
lt.lock(folder, accept_stale=True)
assert not os.path.exists(folder + "/.lora_tree"), os.listdir(folder + "/.lora_tree")
""")
    wanted = tree()
    wanted.update("fr", adapter=adapter(9))
    wanted.add("one", adapter=adapter(11))
    assert value(opened(tmp_path / "zoo")) == value(wanted)


def test_a_merged_checkpoint_is_refused_where_it_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pwrite")
    with pytest.raises(FolderError, match=r"has no pwrite\n  run it under Linux, WSL or macOS"):
        lt.export_model(lt.AdapterTree(), "", tmp_path / "merged", base=tmp_path)
    assert not (tmp_path / "merged").exists()


def test_no_more_is_written_at_once_than_macos_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    made = lt.AdapterTree()
    made.add("fr", adapter=lt.Adapter({name: lt.LowRank(torch.ones(1, 32), torch.ones(32, 1))}))
    whole = lt.export_model(made, "fr", tmp_path / "whole", base=base).folder / "model.safetensors"
    most, real = 1000, os.pwrite

    def pwrite(file: int, data: bytes, at: int) -> int:
        assert len(data) <= most, "Invalid argument"
        return real(file, data, at)

    monkeypatch.setattr(checkpoint_writer, "WRITE_BYTES", most)
    monkeypatch.setattr(checkpoint_writer, "PLAIN_BYTES", most)
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.delattr(os, "copy_file_range", raising=False)  # nor has macOS that
    parts = lt.export_model(made, "fr", tmp_path / "parts", base=base).folder / "model.safetensors"
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("works", [True, False], ids=["a disk", "a network share"])
def test_on_macos_the_disk_s_own_cache_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    asked: list[object] = []

    def control(file: int, command: int) -> int:
        asked.append(command)
        if not works:
            raise OSError(45, "Operation not supported")
        return 0

    other = ModuleType("fcntl")
    other.F_FULLFSYNC, other.fcntl = 51, control  # type: ignore[attr-defined]
    real = os.fsync
    monkeypatch.setitem(sys.modules, "fcntl", other)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "fsync", lambda file: (asked.append("fsync"), real(file)))
    with open(tmp_path / "file", "wb") as file:
        durable.sync_file(file.fileno())
    assert asked == ([51] if works else [51, "fsync"])
    assert fcntl is not other
