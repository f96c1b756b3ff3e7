"""What is left of killed runs goes; what a running one writes, and what is committed, stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.checkpointing import directory as checkpoint_folder
from eventtrain.subscribers.checkpointing.directory import (
    FOREIGN_AGE_S,
    THIS_PROCESS,
    committed_in,
    delete,
    free_path,
    remove_stale,
    temporary_path,
    try_to_remove,
)
from tests.subscribers.checkpointing.writing import Writing

MACHINE = checkpoint_folder._machine()
DEAD = 4_194_305  # above the highest process number there can be


def temporary(directory: Path, machine: str, process: object, token: str = "abcdef01") -> Path:
    folder = directory / f".tmp-{machine}-{process}-{token}-12345678-step-00000002"
    (folder / "arrays").mkdir(parents=True)
    (folder / "arrays/rest").write_text("half")
    return folder


def test_only_what_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        old = time.time() - FOREIGN_AGE_S - 60
        gone = [
            temporary(tmp_path, MACHINE, DEAD),
            temporary(tmp_path, MACHINE, os.getpid(), "00000000"),  # as in a container that starts anew
            temporary(tmp_path, MACHINE, "x"),
            temporary(tmp_path, MACHINE, 10**30),
            temporary(tmp_path, "elsewhere", os.getpid()),
        ]
        os.utime(gone[-1], (old, old))
        stays = [
            temporary(tmp_path, MACHINE, running.pid),
            temporary(tmp_path, MACHINE, os.getpid(), THIS_PROCESS),
            temporary(tmp_path, "elsewhere", DEAD),
        ]
        (tmp_path / "step-00000001").mkdir()
        remove_stale(tmp_path)
        assert [path for path in gone if path.exists()] == []
        assert [path for path in stays if not path.exists()] == []
        assert (tmp_path / "step-00000001").exists()
    finally:
        running.communicate(b"\n")
    remove_stale(tmp_path)
    assert not stays[0].exists()


def test_a_machine_with_dashes_in_its_name_knows_its_own_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "pod-7f-über.example")
    folder = temporary_path(tmp_path, "step-00000002")
    assert checkpoint_folder._machine() == "pod_7f__ber.example"
    folder.mkdir()
    remove_stale(tmp_path)
    assert folder.exists()
    monkeypatch.setattr(checkpoint_folder, "THIS_PROCESS", "ffffffff")
    remove_stale(tmp_path)
    assert not folder.exists()


def test_checkpoints_come_in_the_order_of_their_commits_and_broken_ones_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writing = Writing(tmp_path)
    for step in (5, 3, 4):
        writing.write(step)
    writing.close()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000009/eventtrain.json").write_text("{")
    assert [committed.manifest.step for committed in committed_in(tmp_path)] == [5, 3, 4]
    assert "step-00000009" in caplog.text
    assert committed_in(tmp_path / "nowhere") == []
    again = Writing(tmp_path)
    again.write(1)
    again.close()
    assert [committed.manifest.step for committed in committed_in(tmp_path)] == [5, 3, 4, 1]


def test_a_name_that_is_taken_gets_a_number_whatever_took_it(tmp_path: Path) -> None:
    assert free_path(tmp_path, "a").name == "a"
    (tmp_path / "a").write_text("a file")
    (tmp_path / "a-2").mkdir()
    assert free_path(tmp_path, "a").name == "a-3"


def test_a_checkpoint_loses_its_name_before_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = Writing(tmp_path)
    writing.write(1)
    writing.close()

    def failing(path: Path) -> None:
        assert path.name.startswith(".tmp-")
        raise OSError("half way")

    monkeypatch.setattr(atomic_files, "remove", failing)
    with pytest.raises(OSError, match="half way"):
        delete(tmp_path / "step-00000001")
    assert committed_in(tmp_path) == []
    (left,) = tmp_path.iterdir()
    assert not try_to_remove(left)
    monkeypatch.undo()
    assert try_to_remove(left)
    assert try_to_remove(left)  # it is gone
