"""JSONLLogger: every row whole and once, also when the disk fails, and never a blocked event loop."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.loggers import file_logger
from eventtrain.subscribers.loggers.jsonl_logger import JSONLFile
from eventtrain.subscribers.loggers.row_file import RowBuffer, RowFile


def make_trainer(run_dir: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer:
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    params = jnp.zeros(2)

    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch, "count": jnp.int32(3)}

    state = {"params": params, "opt_state": optimiser.init(params)}
    return et.Trainer(
        step, state, eval_fn=lambda s, b: {"loss": b}, subscribers=subscribers, run_dir=run_dir, **options
    )


def rows(path: Path) -> list[et.Event]:
    text = path.read_text()
    assert text.endswith("\n")
    return [et.parse_event(line) for line in text.splitlines()]


def context(run_dir: Path) -> et.RunContext:
    control: Any = None
    return et.RunContext("run", run_dir, control, lambda event: None)


def step_event(step: int) -> et.StepCompleted:
    return et.StepCompleted(step=step, epoch=0, batch=step - 1, metrics={"loss": 1 / step})


def test_the_default_is_the_training_sequence_in_order(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, subs.JSONLLogger("logs/run.jsonl"))

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 5)
    async def at_once(event: et.StepCompleted, control: et.Control) -> None:
        control.checkpoint()  # rejected or applied at a moment that depends on timing: not a row

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 3, lag=1)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.25)

    batches = [np.float32("nan"), np.float32("inf"), np.float32(1.5)] * 3
    trainer.fit(batches, epochs=2, eval_data=[np.float32(1)])
    events = rows(tmp_path / "logs" / "run.jsonl")
    kinds = [event.kind for event in events]
    assert kinds.count("step_completed") == 18
    assert kinds.count("command_applied") == kinds.count("hyperparam_changed") == 1
    assert (kinds[0], kinds[-1]) == ("run_started", "run_completed")
    seqs = [event.seq for event in events]
    assert seqs == sorted(set(seqs))
    steps = [event for event in events if isinstance(event, et.StepCompleted)]
    assert [event.step for event in steps] == list(range(1, 19))
    assert np.isnan(steps[0].metrics["loss"])
    assert steps[1].metrics["loss"] == float("inf")
    assert isinstance(steps[0].metrics["count"], int)


def test_a_row_is_the_events_json(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, subs.JSONLLogger("run.jsonl", events=et.StepCompleted | et.CommandApplied)
    )
    seen: list[et.Event] = []

    @trainer.on(et.StepCompleted | et.CommandApplied)
    async def see(event: et.Event, control: et.Control) -> None:
        seen.append(event)
        if isinstance(event, et.StepCompleted) and event.step == 1:
            control.set_hyperparam("learning_rate", 0.25)

    trainer.fit([np.float32(1)] * 50, epochs=1)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert lines == [event.model_dump_json() for event in seen]


def test_a_second_run_appends(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, subs.JSONLLogger("run.jsonl", events=et.StepCompleted))
    trainer.fit([np.float32(1)] * 3, epochs=1)
    trainer.fit([np.float32(1)] * 3, epochs=1)
    assert [event.step for event in rows(tmp_path / "run.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_torn_last_row_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    whole = step_event(1).model_dump_json() + "\n"
    for torn in (whole[:40], "x" * 10_000):
        path.write_text(whole + torn)
        trainer = make_trainer(tmp_path, subs.JSONLLogger("run.jsonl", events=et.StepCompleted))
        trainer.fit([np.float32(1)], epochs=1)
        assert [event.step for event in rows(path)] == [1, 1]
        assert (tmp_path / "run.jsonl.torn").read_text().endswith(torn + "\n")


async def test_rows_are_on_disk_half_a_second_later_without_a_further_event(tmp_path: Path) -> None:
    logger = subs.JSONLLogger("run.jsonl", events=et.StepCompleted)
    await logger.start(context(tmp_path))
    await logger.handle(step_event(1))
    with anyio.fail_after(0.5 + 2.0):  # the thread may have to wait for a busy machine
        while not await anyio.to_thread.run_sync((tmp_path / "run.jsonl").read_text):  # noqa: ASYNC110
            await anyio.sleep(0.01)
    await logger.stop()
    assert [event.step for event in rows(tmp_path / "run.jsonl")] == [1]


async def test_the_end_of_an_epoch_commits_at_once(tmp_path: Path) -> None:
    logger = subs.JSONLLogger("run.jsonl", flush_interval_s=1000.0)
    await logger.start(context(tmp_path))
    await logger.handle(step_event(1))
    await logger.handle(et.EpochCompleted(step=1, epoch=0, metrics={}, steps=1, duration_s=0.0))
    text = await anyio.to_thread.run_sync((tmp_path / "run.jsonl").read_text)
    assert text.count("\n") == 2
    await logger.stop()


async def test_an_event_after_stop_is_written_too(tmp_path: Path) -> None:
    logger = subs.JSONLLogger("run.jsonl", events=et.Event)
    await logger.start(context(tmp_path))
    await logger.stop()
    await logger.handle(step_event(1))
    text = await anyio.to_thread.run_sync((tmp_path / "run.jsonl").read_text)
    assert text == step_event(1).model_dump_json() + "\n"


async def test_it_writes_on_every_event_loop_without_blocking_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, subs.JSONLLogger("run.jsonl"))
    await trainer.fit_async([np.float32(1)] * 500, epochs=2)
    assert sum(isinstance(event, et.StepCompleted) for event in rows(tmp_path / "run.jsonl")) == 1000


def test_a_full_disk_is_loud_and_loses_tears_and_doubles_nothing(tmp_path: Path) -> None:
    """A limit on the file size is a real write error: the kernel takes a part of the group and refuses the rest."""
    path = tmp_path / "run.jsonl"
    file = JSONLFile(path, RowBuffer())
    file.prepare()
    wanted = [step_event(step).model_dump_json().encode() for step in range(1, 201)]

    def put(rows: list[bytes]) -> None:
        for row in rows:
            file.waiting.put(row, 1, len(row))

    put(wanted[:50])
    file.commit()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, hard))  # room for some rows and a half
    try:
        for start in (50, 100):
            put(wanted[start : start + 50])
            with pytest.raises(OSError, match="too large"):
                file.commit()
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.waiting.rows == 100
    put(wanted[150:])
    file.commit()
    assert path.read_bytes() == b"".join(row + b"\n" for row in wanted)


def test_a_write_error_fails_the_subscriber_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        tmp_path, subs.JSONLLogger("run.jsonl", events=et.StepCompleted | et.EpochCompleted)
    )
    broken = threading.Event()
    failures: list[str] = []

    @trainer.on(et.SubscriberFailed)
    async def see(event: et.SubscriberFailed) -> None:
        failures.append(event.error)

    write = os.write

    def failing(descriptor: int, data: Any) -> int:
        if broken.is_set():
            write(descriptor, data[:30])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(atomic_files.os, "write", failing)

    @trainer.on(et.EpochStarted, lag=0)
    async def schedule(event: et.EpochStarted) -> None:
        if event.epoch == 1:
            broken.set()
        elif event.epoch == 2:
            while not failures:  # noqa: ASYNC110  # the disk stays full until that was said
                await anyio.sleep(0.01)
            broken.clear()

    trainer.fit([np.float32(1)] * 10, epochs=4)
    events = rows(tmp_path / "run.jsonl")
    assert [event.step for event in events if isinstance(event, et.StepCompleted)] == list(range(1, 41))
    assert [event.epoch for event in events if isinstance(event, et.EpochCompleted)] == [0, 1, 2, 3]
    assert failures
    assert all("No space left" in text and "run.jsonl" in text for text in failures)


async def test_a_disk_that_stays_full_makes_training_wait_instead_of_filling_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = len(step_event(1).model_dump_json())
    monkeypatch.setattr(file_logger, "WAITING_LIMIT_BYTES", 10 * size_bytes - 5)
    monkeypatch.setattr(file_logger, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(file_logger, "RETRY_S", 0.01)
    full = threading.Event()
    full.set()
    commit = RowFile.commit

    def failing(self: RowFile[Any]) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(self)

    monkeypatch.setattr(RowFile, "commit", failing)
    logger = subs.JSONLLogger("run.jsonl", events=et.StepCompleted, flush_interval_s=0.01)
    await logger.start(context(tmp_path))
    taken = 0

    async def feed() -> None:
        nonlocal taken
        for step in range(1, 21):
            with suppress(OSError):
                await logger.handle(step_event(step))
            taken = step

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed)
        with anyio.move_on_after(0.3):
            while taken < 10:  # noqa: ASYNC110  # it is meant not to come
                await anyio.sleep(0.01)
        assert taken < 10  # the tenth waits
        full.clear()
    assert taken == 20
    await logger.stop()
    lines = (await anyio.to_thread.run_sync((tmp_path / "run.jsonl").read_text)).splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))


async def test_what_was_written_after_the_checkpoint_is_cut_off_at_resume_and_kept_beside(
    tmp_path: Path,
) -> None:
    path, logger = tmp_path / "run.jsonl", subs.JSONLLogger("run.jsonl")
    await logger.start(context(tmp_path))
    for step in (1, 2, 3):
        await logger.handle(step_event(step))
    await logger.flush()
    saved = json.loads(json.dumps(logger.state_dict()))
    assert saved == {"version": 1, "path": "run.jsonl", "offset": path.stat().st_size}
    for step in (4, 5):
        await logger.handle(step_event(step))
    await logger.stop()
    before = path.read_bytes()
    for attempt in (1, 2):  # a second kill leaves another tail
        resumed = subs.JSONLLogger("run.jsonl")
        resumed.load_state_dict(saved)
        await resumed.start(context(tmp_path))
        assert [event.step for event in rows(path)] == [1, 2, 3]
        cut = tmp_path / f"run.jsonl.cut-{attempt}"
        assert path.read_bytes() + cut.read_bytes() == before
        await resumed.handle(step_event(4))
        await resumed.handle(step_event(5))
        await resumed.stop()
        assert path.read_bytes() == before


async def test_a_state_of_another_file_cuts_nothing(tmp_path: Path) -> None:
    logger = subs.JSONLLogger("other.jsonl")
    await logger.start(context(tmp_path))
    await logger.handle(step_event(1))
    await logger.stop()
    again = subs.JSONLLogger("other.jsonl")
    again.load_state_dict({"version": 1, "path": "run.jsonl", "offset": 0})
    await again.start(context(tmp_path))
    await again.stop()
    assert [event.step for event in rows(tmp_path / "other.jsonl")] == [1]


async def test_a_file_that_lost_rows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = subs.JSONLLogger("run.jsonl")
    logger.load_state_dict({"version": 1, "path": "run.jsonl", "offset": 1000})
    await logger.start(context(tmp_path))
    await logger.stop()
    assert "it ends at offset=0, but ended at offset=1000 when the checkpoint was written" in caplog.text


async def test_a_run_that_finds_nothing_to_resume_from_sets_the_earlier_attempt_aside(tmp_path: Path) -> None:
    first = subs.JSONLLogger("run.jsonl")
    await first.start(context(tmp_path))
    await first.handle(step_event(1))
    await first.stop()
    again = subs.JSONLLogger("run.jsonl")
    await again.start(dataclasses.replace(context(tmp_path), restarts=True))
    await again.handle(step_event(1))
    await again.stop()
    assert [event.step for event in rows(tmp_path / "run.jsonl")] == [1]
    assert [event.step for event in rows(tmp_path / "run.jsonl.cut-1")] == [1]
