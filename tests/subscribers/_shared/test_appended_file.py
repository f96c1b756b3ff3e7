"""A file to which data is appended whole or not at all, on disks that take only a part of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from eventtrain.subscribers._shared import appended_file
from eventtrain.subscribers._shared.appended_file import AppendedFile


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

        monkeypatch.setattr(appended_file.os, "write", failing_write)
        monkeypatch.setattr(appended_file.os, "ftruncate", unless_stuck(os.ftruncate))
        monkeypatch.setattr(appended_file.os, "truncate", unless_stuck(os.truncate))


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
    file.mend()
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
