"""One run at a time writes to a run_dir, whoever started it and however the last one ended."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.trainer import run_directory
from eventtrain.trainer.run_directory import ATTEMPTS, LOCK, next_attempt
from tests.support.models import batches, make_trainer, new_state, step_fn

HOLDER = """
import sys, time
from pathlib import Path
from eventtrain import subscribers as subs
from eventtrain.trainer.run_directory import run_directory

with run_directory(Path(sys.argv[1]), "theirs", [subs.JSONLLogger("e.jsonl")]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["flock", "no flock"])
def locking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no flock":

        def refuses(*args: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(run_directory.fcntl, "flock", refuses)
    return request.param


def logger(tmp_path: Path, **options: Any) -> et.Trainer:
    return make_trainer(tmp_path, subscribers=[subs.JSONLLogger("e.jsonl")], **options)


@pytest.mark.usefixtures("locking")
def test_two_trainers_in_one_run_dir_are_refused_by_name(tmp_path: Path) -> None:
    with logger(tmp_path, run_id="first").session():
        second = logger(tmp_path)
        with pytest.raises(et.errors.RunDirInUse) as caught:
            second.fit(batches(2), epochs=1)
        assert f"the run first (process {os.getpid()} on " in str(caught.value)
        assert ", since 20" in str(caught.value)
        assert second.step == 0
        second.evaluate(batches(2))  # writes nothing there
        second.predict(batches(2))
    assert second.fit(batches(2), epochs=1).step == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [ATTEMPTS, "e.jsonl"]


class Identities(et.Subscriber):
    """What names each event of a run, its own among them."""

    events = et.Event
    name = "identities"

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.attempts: list[int] = []

    async def start(self, run: et.RunContext) -> None:
        self.attempts.append(run.attempt)
        run.publish(et.AlertRaised(name="started"))

    async def handle(self, event: et.Event) -> None:
        self.seen.append((event.run_id, event.attempt, event.stream, event.seq))


def test_attempt_stream_and_seq_name_one_event_over_any_number_of_restarts(tmp_path: Path) -> None:
    """The last two resume from the same checkpoint, as a run does that is killed before its next one."""
    seen: list[tuple[Any, ...]] = []
    attempts: list[int] = []
    for n, resume in enumerate((False, True, "half", "half")):
        identities = Identities()
        trainer = make_trainer(
            tmp_path, subscribers=[identities, subs.Checkpointer("c", every=100)], run_id="mine"
        )
        if n == 0:
            trainer.on(et.StepCompleted, where=lambda event: event.step == 2, lag=0)(
                lambda event, control: control.checkpoint("half")
            )
        trainer.fit(batches(4), epochs=1 if n == 0 else 2, resume=resume)
        seen += identities.seen
        attempts += identities.attempts
    assert attempts == [1, 2, 3, 4]
    assert {stream for _, _, stream, _ in seen} == {"training", "published"}
    assert {(run_id, attempt) for run_id, attempt, _, _ in seen} == {("mine", n) for n in attempts}
    assert len(seen) == len(set(seen))
    assert len({(stream, seq) for _, _, stream, seq in seen}) < len(seen)  # which alone would not do


@pytest.mark.allow_blocking  # a relative run_dir
def test_a_run_begun_again_and_a_second_fit_are_attempts_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    identities = Identities()
    trainer = et.Trainer(step_fn, new_state(), subscribers=[identities])
    trainer.fit(batches(1), epochs=1)
    with trainer.session():
        pass
    assert identities.attempts == [1, 2]
    assert list(tmp_path.iterdir()) == []  # nothing but the number of attempts was there
    plain = make_trainer(tmp_path, subscribers=[])
    seen: list[int] = []
    plain.on(et.RunStarted)(lambda event: seen.append(event.attempt))
    for _ in range(2):
        plain.fit(batches(1), epochs=1)
    assert seen == [1, 2]


def test_the_number_of_attempts_is_in_the_checkpoint_too(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        identities = Identities()
        make_trainer(tmp_path, subscribers=[identities, subs.Checkpointer("c")]).fit(
            batches(2), epochs=attempt, resume=True
        )
        assert identities.attempts == [attempt]
        (tmp_path / "run" / ATTEMPTS).unlink()  # the checkpoint alone was taken to another machine


@pytest.mark.parametrize("text", ["", "x", "-3", "9" * 100, "\x00", "²"])
def test_a_damaged_number_of_attempts_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / ATTEMPTS).write_text(text)
    assert next_attempt(tmp_path, 4) == 5
    assert next_attempt(tmp_path, 0) == 6


def hold(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_of_another_process_is_refused_until_it_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with hold(tmp_path) as process:
        try:
            with pytest.raises(et.errors.RunDirInUse, match=rf"the run theirs \(process {process.pid} on "):
                logger(tmp_path).fit(batches(2), epochs=1)
        finally:
            process.send_signal(signal.SIGKILL)
    assert logger(tmp_path).fit(batches(2), epochs=1).step == 2
    assert f"the run theirs (process {process.pid} on" in caplog.text
    assert "did not end properly; this run takes over its lock" in caplog.text


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, False),  # no process has that number
        ({"pid": os.getppid()}, True),
        ({"pid": os.getpid()}, False),  # the number of a killed process, as in a container that starts again
        ({"host": "another.example"}, True),
    ],
)
def test_without_flock_the_process_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], *, is_refused: bool
) -> None:
    monkeypatch.setattr(run_directory, "fcntl", None)
    owner = run_directory.Owner(pid=2**22 + 1, process="another", run_id="old").model_dump(mode="json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text(json.dumps({**owner, **changes}))
    if is_refused:
        with pytest.raises(
            et.errors.RunDirInUse, match=r"the run old .*If nothing of that run is left, delete "
        ):
            logger(tmp_path).fit(batches(2), epochs=1)
    else:
        assert logger(tmp_path).fit(batches(2), epochs=1).step == 2
        assert not (tmp_path / "run" / LOCK).exists()


def test_with_flock_a_lock_that_nothing_holds_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    for left in (
        "",
        "{",
        '{"pid": 1}',
        run_directory.Owner(host="another.example", run_id="x").model_dump_json(),
    ):
        (tmp_path / "run" / LOCK).write_text(left)
        assert logger(tmp_path).fit(batches(2), epochs=1).step == 2
    assert "on another.example" in caplog.text


def test_a_run_that_fails_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(et.DataError):
        logger(tmp_path).fit([], epochs=1)
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("subscribers", [[], [subs.EarlyStopping("loss")]])
def test_a_run_that_writes_nothing_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subscribers: list[et.Subscriber]
) -> None:
    monkeypatch.chdir(tmp_path)
    et.Trainer(step_fn, new_state(), subscribers=subscribers).fit(batches(2), epochs=1, progress=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc/run", "file/run", "x" * 300])
def test_a_run_dir_that_cannot_work_is_refused_by_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    trainer = et.Trainer(
        step_fn, new_state(), run_dir=tmp_path / place, subscribers=[subs.JSONLLogger("e.jsonl")]
    )
    with pytest.raises(et.ConfigurationError, match=r"Trainer\(run_dir=...\) cannot write"):
        trainer.fit(batches(2), epochs=1)


@pytest.mark.parametrize(
    "run_id", ["../../x", "..", ".hidden", "a/b", "a\\b", "", "a b", "-x", "é", "x" * 129, "a\0", 7]
)
def test_a_run_id_that_is_not_the_name_of_a_folder_is_refused(run_id: Any) -> None:
    with pytest.raises(et.ConfigurationError, match=r"Trainer\(run_id="):
        et.Trainer(step_fn, new_state(), run_id=run_id)


@pytest.mark.parametrize("run_id", ["a", "7", "_x", "run-1.2_b", "x" * 128])
def test_a_run_id_may_be_the_name_of_any_folder(run_id: str) -> None:
    assert et.Trainer(step_fn, new_state(), run_id=run_id).run_dir.name == run_id


def test_the_log_names_what_was_left_behind_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text(run_directory.Owner(run_id="x").model_dump_json())
    with caplog.at_level(logging.WARNING):
        trainer = logger(tmp_path)
        trainer.fit(batches(2), epochs=1)
        trainer.fit(batches(2), epochs=1)
    assert caplog.text.count("takes over") == 1
