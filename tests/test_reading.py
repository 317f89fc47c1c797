"""Opening files to read: missing means missing, and the file that is open is the one that was
checked.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lora_tree.errors import FolderError
from lora_tree.system import reading


def test_missing_is_what_the_system_calls_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("nowhere", "file/below", "loop", "dangling", "x" * 5000, "a\0b"):
        assert reading.stat_of(tmp_path / name) is None
        assert not reading.is_file(tmp_path / name)
        assert not reading.is_folder(tmp_path / name)
    assert reading.is_file(tmp_path / "file")
    assert reading.is_folder(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert reading.is_file(tmp_path / "link")
    assert not reading.is_file(tmp_path / "link", follow=False)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_any_other_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").write_bytes(b"x")
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuses)
        for ask in (reading.stat_of, reading.is_file, reading.is_folder):
            told = rf"file: can't tell whether it exists: {os.strerror(code)}"
            with pytest.raises(FolderError, match=told):
                ask(tmp_path / "file")


def test_what_is_no_plain_file_is_not_opened_and_no_file_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for path, follow in (
        (tmp_path / "pipe", True),
        (tmp_path, True),
        (tmp_path / "link", False),
        ("/dev/zero", True),
    ):
        with pytest.raises(OSError, match=r"not a plain file|a link"):
            reading.plain_file(path, follow=follow)
    with pytest.raises(OSError, match="leads to"):
        reading.plain_file(tmp_path / "file", inside=lambda real: False)
    assert not before or len(os.listdir("/proc/self/fd")) == before
    with reading.open_stream(tmp_path / "link") as stream:
        assert stream.read() == b"x"


@pytest.mark.parametrize("tells", [True, False], ids=["the system tells", "it does not"])
def test_where_a_file_lies_is_asked_of_the_open_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tells: bool
) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").write_bytes(folder.name.encode())
    (inside / "link").symlink_to(outside / "file")
    real_fstat, real_readlink = os.fstat, os.readlink

    def readlink(path: str) -> str:
        if str(path).startswith("/proc/"):
            raise OSError(errno.ENOENT, "no /proc")
        return real_readlink(path)

    def allowed(real: str) -> bool:
        return real.startswith(f"{os.path.realpath(inside)}/")

    if not tells:
        monkeypatch.setattr(os, "readlink", readlink)
    with reading.open_plain(inside / "file", inside=allowed) as file:
        assert os.read(file, 9) == b"in"
    with pytest.raises(OSError, match=r"leads to .*out/file"):
        reading.plain_file(inside / "link", inside=allowed)

    def swaps(file: int) -> os.stat_result:  # right after it was opened
        seen = real_fstat(file)
        if (inside / "link").is_symlink():
            (inside / "link").unlink()
            (inside / "link").write_bytes(b"harmless")
        return seen

    monkeypatch.setattr(os, "fstat", swaps)
    with pytest.raises(OSError, match=r"leads to .*out/file|became another file"):
        reading.plain_file(inside / "link", inside=allowed)
