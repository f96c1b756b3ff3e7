"""A tail that is cut off lies beside its file, whole, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from eventtrain.subscribers._shared import atomic_files as whole_file

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
            whole_file.cut_tail(path, len(b"".join(LINES[:400])), beside)
    assert path.read_bytes() == b"".join(LINES)
    assert not beside.exists()
    whole_file.cut_tail(path, len(b"".join(LINES[:300])), beside, b"heading\n")
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
        whole_file.cut_tail(path, 10, tmp_path / "log.cut-1")
    assert path.read_bytes() == b"".join(LINES)
    assert [found.name for found in tmp_path.iterdir()] == ["log"]
