"""Locks between processes, with flock and without: one holder at a time, and none for ever."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from sampling import slow

from lora_tree.errors import FolderError
from lora_tree.system import claims, locks

ROOT = Path(__file__).parent.parent
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
PRELUDE = """
import fcntl, os, sys, time, warnings
warnings.simplefilter("ignore")
from lora_tree.system import locks
def refuse(file, operation):
    raise OSError({code}, os.strerror({code}))
if {code}:
    fcntl.flock = refuse
"""


def without_flock(patched: pytest.MonkeyPatch, code: int = errno.ENOSYS) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    patched.setattr(fcntl, "flock", refuse)
    patched.setattr(locks, "_warned", Everything())


class Everything(set[int]):
    """Every file system has been told of."""

    def __contains__(self, device: object) -> bool:
        return True


@pytest.fixture(params=[0, errno.ENOSYS], ids=["flock", "claims"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    if request.param:
        without_flock(monkeypatch, request.param)
    yield request.param
    assert not claims._own_claims


def start(code: int, body: str) -> subprocess.Popen[bytes]:
    text = PRELUDE.format(code=code) + body
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, cwd=ROOT)


def ended(process: subprocess.Popen[bytes]) -> int:
    process.communicate(timeout=120)
    return process.returncode


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_processes_that_count_in_one_file_lose_no_step(code: int, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    body = f"""
for _ in range(15):
    with locks.holding({str(tmp_path / "lock")!r}):
        with open({str(count)!r}) as file:
            seen = int(file.read())
        time.sleep(0.002)
        with open({str(count)!r}, "w") as file:
            file.write(str(seen + 1))
"""
    processes = [start(code, body) for _ in range(3)]
    assert [ended(process) for process in processes] == [0, 0, 0]
    assert count.read_text() == "45"
    assert names(tmp_path) == ["count", "lock"]


def test_threads_that_count_lose_no_step(code: int, tmp_path: Path) -> None:
    count = 0

    def run() -> None:
        nonlocal count
        for _ in range(10):
            with locks.holding(tmp_path / "lock"):
                seen = count
                time.sleep(0.001)
                count = seen + 1

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == 40


def test_shared_holders_keep_out_one_alone_and_not_each_other(code: int, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    first, second = locks.attempt(lock, shared=True), locks.attempt(lock, shared=True)
    assert first is not None
    assert second is not None
    assert locks.attempt(lock) is None
    first.release()
    first.release()
    assert locks.attempt(lock) is None
    second.release()
    alone = locks.attempt(lock)
    assert alone is not None
    assert locks.attempt(lock, shared=True) is None
    assert locks.acquire(lock, shared=True, wait_s=0.1) is None
    alone.release(remove=True)
    assert names(tmp_path) == []


def test_a_folder_is_locked_like_a_file_and_nothing_stays_in_or_beside_it(
    code: int, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    with locks.holding(tmp_path / "folder"):
        assert locks.attempt(tmp_path / "folder") is None
        assert names(tmp_path / "folder") == []
    assert names(tmp_path) == ["folder"]


def test_no_lock_is_made_where_none_is_asked_for(code: int, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="lock: can't lock it: No such file"):
        locks.attempt(tmp_path / "lock", make=False)
    assert names(tmp_path) == []


def test_a_killed_holder_is_in_nobodys_way(code: int, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    body = f"""
held = locks.attempt({str(lock)!r})
print("held", flush=True)
time.sleep(60)
"""
    holder = start(code, body)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert locks.attempt(lock) is None
    if code:
        assert re.fullmatch(rf"process {holder.pid} on '.*', for \d+ s", claims.owners(lock)[0])
    holder.send_signal(signal.SIGSTOP)  # it can touch nothing, and holds its lock
    assert locks.attempt(lock) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    held = locks.attempt(lock)
    assert held is not None
    held.release()
    assert names(tmp_path) == ["lock"]


def test_a_process_that_ends_leaves_no_claims(tmp_path: Path) -> None:
    body = f"held = locks.attempt({str(tmp_path / 'lock')!r}, shared=True); assert held"
    assert ended(start(errno.ENOSYS, body)) == 0
    assert names(tmp_path) == ["lock"]


def test_the_child_of_a_fork_leaves_its_parents_claims_alone(tmp_path: Path) -> None:
    body = f"""
held = locks.attempt({str(tmp_path / "lock")!r})
child = os.fork()
if not child:
    sys.exit(0)  # runs what was registered for the exit
os.waitpid(child, 0)
assert len(os.listdir({str(tmp_path)!r})) == 2
held.release()
"""
    assert ended(start(errno.ENOSYS, body)) == 0
    assert names(tmp_path) == ["lock"]


# ---------------------------------------------------------------------- whose claim is left over
def claim(folder: Path, *, age_s: float = 0, **said: object) -> Path:
    """A claim on ``lock`` by another process than this one; it tells what this process would, but
    for ``said``.
    """
    token = "ab" * 16
    me = {
        "host": "here",
        "machine": claims._machine(),
        "pid": os.getpid(),
        "started": claims._started(os.getpid()),
    }
    file = folder / f"lock.alone.{token}"
    file.write_text(json.dumps({"token": token, **me, "since": 0, **said}))
    times = time.time() - age_s
    os.utime(file, (times, times))
    return file


def taken(folder: Path) -> bool:
    """The lock can be had."""
    held = locks.attempt(folder / "lock")
    if held is not None:
        held.release()
    return held is not None


def test_whose_claim_is_left_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_flock(monkeypatch)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()

    claim(tmp_path, pid=child.pid, started="0")
    assert taken(tmp_path), "its process has ended"
    claim(tmp_path, started="1")
    assert taken(tmp_path), "another process has its number now"
    claim(tmp_path)
    assert taken(tmp_path), "this process knows nothing of it"
    claim(
        tmp_path, pid=os.getppid(), started=claims._started(os.getppid()), age_s=10 * claims.STALE_S
    )
    assert not taken(tmp_path), "its process runs, however long ago it was touched"
    claim(tmp_path, machine="elsewhere")
    assert not taken(tmp_path), "a process of another machine that was there just now"
    claim(tmp_path, machine="elsewhere", age_s=claims.STALE_S + 60)
    assert taken(tmp_path)
    claim(tmp_path, machine="elsewhere", age_s=-claims.STALE_S - 60)
    assert taken(tmp_path), "copied with a time that no holder writes"
    for broken in ({"pid": "7"}, {"more": 1}, {"started": None}):
        claim(tmp_path, **broken)
        assert not taken(tmp_path), "it may not be written to its end yet"
        claim(tmp_path, age_s=claims.STALE_S + 60, **broken)
        assert taken(tmp_path)


@slow
def test_a_claim_is_touched_while_it_is_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_flock(monkeypatch)
    monkeypatch.setattr(claims, "BEAT_S", 0.02)
    with locks.holding(tmp_path / "lock"):
        file = next(tmp_path.glob("lock.alone.*"))
        said = file.read_bytes()
        os.utime(file, (1, 1))
        until = time.monotonic() + 20
        while file.stat().st_mtime < time.time() - 60 and time.monotonic() < until:
            time.sleep(0.01)
        assert file.stat().st_mtime > time.time() - 60
        assert file.read_bytes() == said
    until = time.monotonic() + 20
    while claims._beating and time.monotonic() < until:
        time.sleep(0.01)
    assert not claims._beating, "no thread stays for locks that nobody holds"


def test_a_claim_that_is_a_link_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_flock(monkeypatch)
    file = tmp_path / f"lock.alone.{'ab' * 16}"
    (tmp_path / "other").write_text("{}")
    file.symlink_to(tmp_path / "other")
    with pytest.raises(FolderError, match=rf"lock\.alone\.{'ab' * 16}: a link"):
        locks.attempt(tmp_path / "lock")
    assert names(tmp_path) == ["lock", file.name, "other"]


def test_claims_of_what_is_not_there_any_more_are_cleared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = re.compile(r"lock\Z")
    file = claim(tmp_path)
    claims.clear(tmp_path, re.compile("other"))
    assert file.exists()
    claims.clear(tmp_path, mine)
    assert not file.exists()
    file = claim(tmp_path, machine="elsewhere")
    claims.clear(tmp_path, mine)
    assert file.exists(), "it may be held"


# ---------------------------------------------------------------------- what is said
def test_a_file_system_without_flock_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for code in NO_FLOCK:
        without_flock(monkeypatch, code)
        monkeypatch.setattr(locks, "_warned", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                with locks.holding(tmp_path / "lock"):
                    pass
        assert [str(warning.message).split("(")[0] for warning in caught] == [
            f"{tmp_path}: this file system has no flock "
        ]
        assert os.strerror(code) in str(caught[0].message)


def test_what_else_goes_wrong_names_the_file_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_flock(monkeypatch, errno.EIO)
    with pytest.raises(FolderError, match=rf"{tmp_path}/lock: can't lock it: Input/output error"):
        locks.attempt(tmp_path / "lock")
    assert names(tmp_path) == []
    (tmp_path / "lock").write_text("")
    with pytest.raises(FolderError, match="can't lock it"):
        locks.attempt(tmp_path / "lock")
    assert names(tmp_path) == ["lock"], "it was there before"


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_file_is_opened_without_following_links_and_without_waiting(
    tmp_path: Path, kind: str
) -> None:
    lock = tmp_path / "lock"
    if kind == "link":
        lock.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(lock)
    with pytest.raises(FolderError, match=rf"{lock}: "):
        locks.attempt(lock)
    assert not (tmp_path / "elsewhere").exists()
