"""What holds for every subscriber that writes rows to files: JSONL, CSV and Parquet."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.loggers import file_logger, parquet_files, row_file
from tests.subscribers._shared.test_step_table import make_window
from tests.support.saved_in_memory import MemoryCheckpointer


def jsonl_steps(path: Path) -> list[int]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    events = [et.parse_event(line) for line in text.splitlines()]
    return [event.step for event in events if isinstance(event, et.StepCompleted)]


def csv_steps(path: Path) -> list[int]:
    with open(path, newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file, strict=True)]


def parquet_steps(path: Path) -> list[int]:
    return parquet.read_table(path)["step"].to_pylist() if any(path.iterdir()) else []


@dataclass(frozen=True)
class Kind:
    make: Callable[..., et.Subscriber]
    read: Callable[[Path], list[int]]


KINDS = {
    "jsonl": Kind(subs.JSONLLogger, jsonl_steps),
    "jsonl-by-window": Kind(
        lambda path, **options: subs.JSONLLogger(path, by="window", **options), jsonl_steps
    ),
    "csv": Kind(subs.CSVLogger, csv_steps),
    "parquet": Kind(subs.ParquetLogger, parquet_steps),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def context(run_dir: Path, **changes: Any) -> et.RunContext:
    control: Any = None
    return dataclasses.replace(et.RunContext("run", run_dir, control, lambda event: None), **changes)


def make_trainer(run_dir: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer:
    def step(state: Any, batch: Any) -> Any:
        return {"w": state["w"] + batch}, {"loss": jnp.sum(state["w"])}

    return et.Trainer(step, {"w": jnp.zeros(2)}, subscribers=subscribers, run_dir=run_dir, **options)


def events_for(kind: Kind, first_step: int, rows: int) -> list[et.Event]:
    if kind is KINDS["jsonl"]:
        return [
            et.StepCompleted(step=step, epoch=0, batch=step - 1, metrics={"loss": 0.5})
            for step in range(first_step, first_step + rows)
        ]
    return [make_window({"loss": np.full(rows, 0.5)}, rows, first_step=first_step)]


# --- resuming -------------------------------------------------------------------------------------------------


def test_a_run_resumed_from_each_checkpoint_has_each_step_once_and_what_was_cut_beside(
    tmp_path: Path,
) -> None:
    def loggers() -> list[et.Subscriber]:
        return [kind.make(name) for name, kind in KINDS.items()]

    batches = [np.float32(n) for n in range(5)]
    memory = MemoryCheckpointer(every=4)
    make_trainer(tmp_path, *loggers(), memory).fit(batches, epochs=3)
    whole = {name: kind.read(tmp_path / name) for name, kind in KINDS.items()}
    assert all(steps == list(range(1, 16)) for steps in whole.values())
    texts = {name: (tmp_path / name).read_bytes() for name in ("csv",)}
    for attempt, step in enumerate((12, 8, 4), 1):
        make_trainer(tmp_path, *loggers(), memory).fit(batches, epochs=3, resume=step)
        for name, kind in KINDS.items():
            assert kind.read(tmp_path / name) == list(range(1, 16)), (name, step)
            beside = kind.read(tmp_path / f"{name}.cut-{attempt}")
            # Windows that waited at the cut are in the checkpoint, and so in what is cut and written again.
            assert beside == list(range(beside[0], 16)), (name, step)
            assert beside[0] <= step + 1
        assert texts == {name: (tmp_path / name).read_bytes() for name in texts}


@kinds
async def test_a_run_that_finds_nothing_to_resume_from_sets_the_earlier_attempt_aside(
    tmp_path: Path, kind: Kind
) -> None:
    for changes in ({}, {"restarts": True}):
        logger = kind.make("log")
        await logger.start(context(tmp_path, **changes))
        for event in events_for(kind, 1, 3):
            await logger.handle(event)  # type: ignore[attr-defined]
        await logger.stop()
    for name in ("log", "log.cut-1"):
        assert await anyio.to_thread.run_sync(kind.read, tmp_path / name) == [1, 2, 3]


@kinds
async def test_a_state_of_another_file_cuts_nothing(tmp_path: Path, kind: Kind) -> None:
    first = kind.make("log")
    await first.start(context(tmp_path))
    state = first.state_dict()
    for event in events_for(kind, 1, 3):
        await first.handle(event)  # type: ignore[attr-defined]
    await first.stop()
    again = kind.make("log")
    again.load_state_dict({**state, "path": "elsewhere"})
    await again.start(context(tmp_path, resumed=True))
    await again.stop()
    assert await anyio.to_thread.run_sync(kind.read, tmp_path / "log") == [1, 2, 3]


@kinds
def test_a_state_that_does_not_fit_is_refused_by_name(kind: Kind) -> None:
    logger = kind.make("log")
    for wrong in ({}, {"version": 99}, {**logger.state_dict(), "path": 3}):
        with pytest.raises(et.StateError, match="Logger cannot load"):
            logger.load_state_dict(wrong)


# --- disks that fail ------------------------------------------------------------------------------------------


@kinds
def test_a_full_disk_is_said_and_the_run_goes_on_without_losing_a_row(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_logger, "RETRY_S", 0.01)
    full = threading.Event()
    failures: list[str] = []
    write, replace = os.write, os.replace

    def failing_write(descriptor: int, data: Any) -> int:
        if full.is_set():
            write(descriptor, data[:30])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    def failing_replace(old: Any, new: Any) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(atomic_files.os, "write", failing_write)
    monkeypatch.setattr(parquet_files.os, "replace", failing_replace)
    trainer = make_trainer(tmp_path, kind.make("log", flush_interval_s=0.01))

    @trainer.on(et.SubscriberFailed)
    async def see(event: et.SubscriberFailed) -> None:
        failures.append(event.error)

    @trainer.on(et.EpochStarted, lag=0)
    async def schedule(event: et.EpochStarted) -> None:
        if event.epoch == 1:
            full.set()
        elif event.epoch >= 2 and full.is_set():
            with anyio.move_on_after(60):
                while not failures and event.epoch == 6:  # noqa: ASYNC110  # the disk stays full until that was said
                    await anyio.sleep(0.01)
            if failures:
                full.clear()
        await anyio.sleep(0.02)

    trainer.fit([np.float32(1)] * 10, epochs=8)
    assert kind.read(tmp_path / "log") == list(range(1, 81))
    assert failures
    assert all("No space left" in text and "log" in text and "rows are kept" in text for text in failures)


@kinds
@pytest.mark.parametrize("resumes", [False, True])
def test_rows_that_a_full_disk_refuses_to_the_end_are_counted_as_undelivered_and_written_by_a_later_fit(
    tmp_path: Path,
    kind: Kind,
    resumes: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    logger: Any = kind.make("log", flush_interval_s=0.01)
    memory = MemoryCheckpointer(every=4)
    trainer = make_trainer(tmp_path, logger, memory)
    batches = [np.float32(1)] * 10
    with monkeypatch.context() as full:
        full.setattr(row_file.LogFile, "commit", refuse)
        result = trainer.fit(batches, epochs=1)
    lost = logger.unwritten
    assert lost >= 10
    assert result.undelivered == {type(logger).__name__: lost}
    (said,) = [line for line in caplog.messages if "failed in stop()" in line]
    assert f"{lost} rows are not in the file, and are lost when the program ends" in said
    assert "will be written" not in said
    result = trainer.fit(batches, epochs=2, resume=8) if resumes else trainer.fit(batches, epochs=1)
    assert result.undelivered == {}
    steps = kind.read(tmp_path / "log")
    assert steps == list(range(steps[0], 21))  # none twice
    assert steps[0] <= 9 if resumes else steps[0] == 1


@kinds
async def test_a_disk_that_stays_full_makes_training_wait_instead_of_filling_memory(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_logger, "WAITING_LIMIT_BYTES", 5_000)
    monkeypatch.setattr(file_logger, "LOOK_AGAIN_S", 0.001)
    monkeypatch.setattr(file_logger, "RETRY_S", 0.001)
    full = threading.Event()
    full.set()
    commits = {cls: cls.commit for cls in (row_file.RowFile, parquet_files.ParquetFiles)}

    def make_failing(cls: Any) -> Any:
        def failing(self: Any) -> None:
            if full.is_set():
                raise OSError(errno.ENOSPC, "No space left on device")
            commits[cls](self)

        return failing

    for cls in commits:
        monkeypatch.setattr(cls, "commit", make_failing(cls))
    logger: Any = kind.make("log", flush_interval_s=0.001)
    await logger.start(context(tmp_path))
    taken, failures = 0, 0
    events = [event for first in range(1, 101) for event in events_for(kind, first, 1)]

    async def feed() -> None:
        nonlocal taken, failures
        for event in events:
            try:
                await logger.handle(event)
            except OSError:
                failures += 1
            taken = event.step

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed)
        with anyio.move_on_after(0.3):
            while taken < 60:  # noqa: ASYNC110  # it is meant not to come
                await anyio.sleep(0.01)
        assert taken < 60
        full.clear()
    assert (taken, failures > 0) == (100, True)
    await logger.stop()
    assert await anyio.to_thread.run_sync(kind.read, tmp_path / "log") == list(range(1, 101))


@kinds
async def test_a_second_attempt_at_an_event_writes_no_second_row(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger: Any = kind.make("log", flush_interval_s=1000.0)
    await logger.start(context(tmp_path))
    logger._commits.error = OSError(errno.ENOSPC, "No space left on device")
    (event,) = events_for(kind, 1, 1)
    with pytest.raises(OSError, match="No space left"):
        await logger.handle(event)
    await logger.handle(event)
    await logger.stop()
    assert await anyio.to_thread.run_sync(kind.read, tmp_path / "log") == [1]


@kinds
def test_a_disk_that_is_slow_delays_no_step(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, waited = threading.Event(), list[bool]()
    for cls in (row_file.RowFile, parquet_files.ParquetFiles):

        def slow(self: Any, commit: Any = cls.commit) -> None:
            waited.append(ended.wait(60))
            commit(self)

        monkeypatch.setattr(cls, "commit", slow)
    # The run's end waits for the rows of its last epoch, but not longer than the trainer's drain_timeout_s.
    trainer = make_trainer(tmp_path, kind.make("log", flush_interval_s=0.01), drain_timeout_s=4.0)

    @trainer.on(et.RunCompleted)
    async def see(event: et.RunCompleted) -> None:
        ended.set()

    trainer.fit([np.float32(1)] * 50, epochs=4)
    assert waited
    assert all(waited)  # the run came to its end while the first write was under way
    assert kind.read(tmp_path / "log") == list(range(1, 201))


@kinds
async def test_a_disk_that_hangs_holds_the_end_up_only_as_long_as_the_trainer_waits(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    come_back = threading.Event()
    for cls in (row_file.RowFile, parquet_files.ParquetFiles):
        monkeypatch.setattr(cls, "commit", lambda self: come_back.wait(60))
    logger: Any = kind.make("log", flush_interval_s=1000.0)
    await logger.start(context(tmp_path))
    await logger.handle(events_for(kind, 1, 1)[0])
    with anyio.move_on_after(0.05) as scope:
        await logger.stop()
    assert scope.cancelled_caught
    come_back.set()


# --- paths ----------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("path", ["../log", "a/../../log", "..", Path("../log"), "", "a\0b"])
def test_a_path_that_leaves_run_dir_or_names_nothing_is_refused_by_name(kind: Kind, path: Any) -> None:
    with pytest.raises(et.ConfigurationError, match=r"Logger\("):
        kind.make(path)


@kinds
def test_a_place_where_nothing_can_be_written_is_said_before_anything_is_trained(
    tmp_path: Path, kind: Kind
) -> None:
    (tmp_path / "file").write_text("mine")
    trainer = make_trainer(tmp_path, kind.make("file/log"))
    with pytest.raises(et.ConfigurationError, match=r"Logger cannot write .*file/log: .* Give a path"):
        trainer.fit([np.float32(1)], epochs=1)
    assert trainer.step == 0
    assert (tmp_path / "file").read_text() == "mine"


@kinds
def test_an_absolute_path_is_the_users_own_choice(tmp_path: Path, kind: Kind) -> None:
    make_trainer(tmp_path / "run", kind.make(tmp_path / "elsewhere" / "log")).fit(
        [np.float32(1)] * 3, epochs=1
    )
    assert kind.read(tmp_path / "elsewhere" / "log") == [1, 2, 3]


# --- options --------------------------------------------------------------------------------------------------


@kinds
def test_an_interval_that_is_none_is_refused_by_name(kind: Kind) -> None:
    for wrong in (0, -1, float("nan"), "1", True):
        with pytest.raises(
            et.ConfigurationError, match=r"Logger\(flush_interval_s=.*must be a finite number > 0"
        ):
            kind.make("log", flush_interval_s=wrong)


@pytest.mark.parametrize("kind", [KINDS["jsonl"], KINDS["jsonl-by-window"], KINDS["csv"]])
async def test_with_fsync_each_group_is_on_the_disk_before_it_counts_as_written(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(atomic_files.os, "fsync", noting)
    for wanted in (False, True):
        logger: Any = kind.make(f"log-{wanted}", fsync=wanted, flush_interval_s=1000.0)
        await logger.start(context(tmp_path))
        await logger.handle(events_for(kind, 1, 1)[0])
        synced.clear()
        await logger.stop()
        size_bytes = (await anyio.Path(tmp_path / f"log-{wanted}").stat()).st_size
        assert (synced[-1:] == [size_bytes]) == wanted


def test_json_rows_by_window_are_the_events_but_for_time_and_number(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, subs.JSONLLogger("a"), subs.JSONLLogger("b", by="window", events=None))

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 3, lag=1)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.snapshot("x")

    trainer.fit([np.float32(n) for n in range(7)], epochs=2)

    def rows(name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [row["seq"] for row in found if row["kind"] == "step_completed" and name == "b"] == [0] * (
            14 if name == "b" else 0
        )
        left_out = {"seq", "time"}
        return sorted(
            ({k: v for k, v in row.items() if k not in left_out} for row in found),
            key=lambda r: json.dumps(r),
        )

    assert rows("a") == rows("b")


def test_events_without_steps_cannot_be_written_by_window() -> None:
    for events in (et.EpochCompleted, et.Event, et.StepsCompleted, (et.StepCompleted, et.StepsCompleted)):
        with pytest.raises(et.ConfigurationError, match=r"by='window', events="):
            subs.JSONLLogger("log", by="window", events=events)
    logger = subs.JSONLLogger("log", by="window", events=et.StepCompleted | et.EpochCompleted)  # type: ignore[arg-type]
    assert logger.events == (et.StepsCompleted, et.EpochCompleted)
    with pytest.raises(et.ConfigurationError, match=r"by='steps'"):
        subs.JSONLLogger("log", by="steps")  # type: ignore[arg-type]
