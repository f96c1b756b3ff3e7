"""Files that are appended to, replaced or cut completely or not at all, whatever fails meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from eventtrain.subscribers._shared.atomic_files import AppendedFile, cut_tail, write_atomically

LINES = [f"{n}\n".encode() for n in range(1000)]


class Killed(BaseException):
    """No handler of errors runs in a process that is killed."""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_that_dies_while_it_cuts_a_tail_loses_and_tears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path, beside = tmp_path / "log", tmp_path / "log.cut-1"
    path.write_bytes(b"".join(LINES))

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, moment, die)
        with pytest.raises(Killed):
            cut_tail(path, len(b"".join(LINES[:400])), beside)
    assert path.read_bytes() == b"".join(LINES)
    assert not beside.exists()
    cut_tail(path, len(b"".join(LINES[:300])), beside, b"heading\n")
    assert path.read_bytes() == b"".join(LINES[:300])
    assert beside.read_bytes() == b"heading\n" + b"".join(LINES[300:])
    assert {found.name for found in tmp_path.iterdir()} == {"log", "log.cut-1"}


def test_a_full_disk_leaves_the_tail_where_it_was_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(LINES))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cut_tail(path, 10, tmp_path / "log.cut-1")
    assert path.read_bytes() == b"".join(LINES)
    assert [found.name for found in tmp_path.iterdir()] == ["log"]


def test_a_replaced_file_has_its_old_content_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")
    fsync = os.fsync

    def look(descriptor: int) -> None:
        assert path.read_bytes() == b"old"
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", look)
        write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(OSError, match=r"cannot write .*folder"):
        write_atomically(path.parent, b"a folder is there")
    assert {found.name for found in tmp_path.rglob("*")} == {"folder", "file"}


# --- AppendedFile -------------------------------------------------------------------------------------------------


class Disk:
    """Takes three bytes of each append while it is ``full``, and does not shorten files while it is ``stuck``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = self.stuck = False
        write = os.write
        left = 3

        def failing_write(descriptor: int, data: Any) -> int:
            nonlocal left
            if not self.full:
                return write(descriptor, data)
            if not left:
                left = 3
                raise OSError(errno.ENOSPC, "No space left on device")
            left -= 1
            return write(descriptor, data[:1])

        def unless_stuck(shorten: Any) -> Any:
            def failing(file: Any, length: int) -> None:
                if self.stuck:
                    raise OSError(errno.EIO, "Input/output error")
                shorten(file, length)

            return failing

        monkeypatch.setattr(os, "write", failing_write)
        monkeypatch.setattr(os, "ftruncate", unless_stuck(os.ftruncate))
        monkeypatch.setattr(os, "truncate", unless_stuck(os.truncate))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_full_disk_gets_nothing_of_what_it_has_no_room_for(tmp_path: Path, disk: Disk) -> None:
    file = AppendedFile(tmp_path / "file")
    assert file.append(b"first\n") == 6
    disk.full = True
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            file.append(b"second\n")
        assert file.path.read_bytes() == b"first\n"
    disk.full = False
    assert file.append(b"second\n") == 13
    assert file.path.read_bytes() == b"first\nsecond\n"


def test_a_half_that_could_not_be_taken_back_is_before_anything_is_appended(
    tmp_path: Path, disk: Disk
) -> None:
    file = AppendedFile(tmp_path / "file")
    file.append(b"first\n")
    disk.full = disk.stuck = True
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            file.append(b"second\n")
        assert file.path.read_bytes() == b"first\nsec"
    disk.full = disk.stuck = False
    assert file.append(b"third\n") == 12
    assert file.path.read_bytes() == b"first\nthird\n"


def test_mend_takes_a_half_back_for_who_reads_the_file(tmp_path: Path, disk: Disk) -> None:
    file = AppendedFile(tmp_path / "file")
    file.append(b"first\n")
    disk.full = disk.stuck = True
    with pytest.raises(OSError, match="Input/output error"):
        file.append(b"second\n")
    disk.stuck = False
    file.repair()
    assert file.path.read_bytes() == b"first\n"


def test_a_file_that_was_taken_away_with_a_half_begins_anew(tmp_path: Path, disk: Disk) -> None:
    file = AppendedFile(tmp_path / "file")
    file.append(b"first\n")
    disk.full = disk.stuck = True
    with pytest.raises(OSError, match="Input/output error"):
        file.append(b"second\n")
    disk.full = disk.stuck = False
    file.path.unlink()
    assert file.append(b"third\n") == 6
    assert file.path.read_bytes() == b"third\n"
