"""MaxTime: when a run has to end, over one run and several."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.saved_in_memory import MemoryCheckpointer

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class Time:
    """A clock and its timers, which go on when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[Time.Timer] = []

    def clock(self) -> float:
        return self.now_s

    def timer(self, delay_s: float, fire: Callable[[], None]) -> Time.Timer:
        self.timers.append(Time.Timer(self.now_s + delay_s, fire))
        return self.timers[-1]

    def advance(self, duration_s: float) -> None:
        """Let time pass, and what is due happen, on this thread."""
        self.now_s += duration_s
        for timer in self.timers:
            if timer.waiting and timer.due_s <= self.now_s:
                timer.waiting = False
                timer.fire()

    class Timer:
        daemon = False

        def __init__(self, due_s: float, fire: Callable[[], None]) -> None:
            self.due_s = due_s
            self.fire = fire
            self.waiting = False

        def start(self) -> None:
            assert self.daemon
            self.waiting = True

        def cancel(self) -> None:
            self.waiting = False


def make_trainer(tmp_path: Path, *policies: et.Subscriber, **options: Any) -> tuple[et.Trainer, list[Any]]:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=policies, run_dir=tmp_path, **options)
    ends: list[Any] = []
    trainer.on(et.RunCompleted)(lambda event: ends.append(event))
    return trainer, ends


def batches(time: Time, step_s: float, count: int) -> Iterator[np.float32]:
    """As the loop asks for a batch, the step before it has taken so long."""
    for _ in range(count):
        yield np.float32(1.0)
        time.advance(step_s)


@BACKENDS
def test_a_run_stops_when_its_time_is_used_up(tmp_path: Path, backend: str) -> None:
    time = Time()
    policy = subs.MaxTime(60, clock=time.clock, timer=time.timer)
    trainer, ends = make_trainer(tmp_path, policy, backend=backend)
    result = trainer.fit(lambda epoch: batches(time, 10.0, 100), epochs=1)
    assert result.stop_reason == "max time: 60 s are used up"
    assert result.step < 100  # how many depends on how far the prefetcher runs ahead
    assert [event.deterministic for event in ends] == [False]
    assert policy.elapsed_s >= 60


@BACKENDS
def test_a_run_that_keeps_within_its_time_is_left_alone(tmp_path: Path, backend: str) -> None:
    time = Time()
    policy = subs.MaxTime(60, clock=time.clock, timer=time.timer)
    trainer, ends = make_trainer(tmp_path, policy, backend=backend)
    result = trainer.fit(lambda epoch: batches(time, 10.0, 5), epochs=1)
    assert (result.stop_reason, result.step, policy.elapsed_s) == ("completed", 5, 50.0)
    assert [event.deterministic for event in ends] == [True]
    assert [timer.waiting for timer in time.timers] == [False]


def test_time_counts_over_runs_whose_state_is_carried_over(tmp_path: Path) -> None:
    time, limits = Time(), list[float]()
    state: dict[str, Any] | None = None
    for _ in range(3):
        policy = subs.MaxTime("00:00:01:30", clock=time.clock, timer=time.timer)
        if state is not None:
            policy.load_state_dict(state)
        trainer, _ = make_trainer(tmp_path, policy)
        began_s = time.now_s
        trainer.fit(lambda epoch: batches(time, 5.0, 4), epochs=1)
        limits.append(time.timers[-1].due_s - began_s)
        state = json.loads(json.dumps(policy.state_dict()))
        time.advance(1000.0)  # between two runs no time is used
    assert limits == [90.0, 70.0, 50.0]
    assert state == {"version": 1, "elapsed_s": 60.0}


@BACKENDS
def test_a_run_with_no_time_left_makes_no_step(tmp_path: Path, backend: str) -> None:
    time = Time()
    policy = subs.MaxTime(60, clock=time.clock, timer=time.timer)
    policy.load_state_dict({"version": 1, "elapsed_s": 60.0})
    trainer, _ = make_trainer(tmp_path, policy, backend=backend)
    result = trainer.fit(lambda epoch: batches(time, 1.0, 4), epochs=1)
    assert (result.step, result.stop_reason) == (0, "max time: 60 s are used up")
    assert trainer.fit(lambda epoch: batches(time, 1.0, 4), epochs=1).step == 4  # all of its time again


@BACKENDS
def test_a_run_that_waits_for_data_stops_too(tmp_path: Path, backend: str) -> None:
    never = threading.Event()

    def data(epoch: int) -> Iterator[np.float32]:
        yield np.float32(1.0)
        never.wait()

    trainer, ends = make_trainer(tmp_path, subs.MaxTime(0.05), backend=backend)
    try:
        result = trainer.fit(data, epochs=1)
    finally:
        never.set()
    assert result.stop_reason == "max time: 0.05 s are used up"
    assert [event.deterministic for event in ends] == [False]


@BACKENDS
def test_a_run_that_resumes_from_a_checkpoint_has_the_rest_of_its_time(tmp_path: Path, backend: str) -> None:
    time, checkpointer = Time(), MemoryCheckpointer(at_end=True)
    checkpointer.name = "memory"

    def fit(epochs: int, **options: Any) -> et.FitResult:
        policy = subs.MaxTime(60, clock=time.clock, timer=time.timer)
        trainer, _ = make_trainer(tmp_path, policy, checkpointer, backend=backend)
        trainer.on(et.EpochStarted, lag=0)(lambda event: time.advance(10.0))
        return trainer.fit([np.float32(1.0)] * 2, epochs=epochs, **options)

    assert fit(1).step == 2
    time.advance(1000.0)
    began_s = time.now_s
    assert fit(3, resume=2).step == 6
    assert [timer.due_s - began_s for timer in time.timers[1:]] == [50.0]


def test_a_paused_run_stops_too(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.MaxTime(0.05))

    @trainer.on(et.StepCompleted, lag=0, once=True)
    async def pause(event: et.StepCompleted, control: et.Control) -> None:
        control.pause()

    assert trainer.fit([np.float32(1.0)] * 9, epochs=1).stop_reason.startswith("max time")


def test_the_state_of_a_running_run_counts_its_time_so_far(tmp_path: Path) -> None:
    time = Time()
    policy = subs.MaxTime(60, clock=time.clock, timer=time.timer)
    trainer, _ = make_trainer(tmp_path, policy)
    with trainer.session() as session:
        session.step(np.float32(1.0))
        session.flush()
        session.wait(lambda: time.timers)
        time.advance(7.5)
        assert policy.state_dict() == {"version": 1, "elapsed_s": 7.5}
    assert policy.state_dict() == {"version": 1, "elapsed_s": 7.5}


@pytest.mark.parametrize(
    ("max_time", "seconds"),
    [
        (90, 90.0),
        (0.5, 0.5),
        (timedelta(hours=1), 3600.0),
        ("00:00:00:01", 1.0),
        ("01:02:03:04", 93784.0),
        ("100:00:00:00", 8_640_000.0),
        (1e300, threading.TIMEOUT_MAX),
    ],
)
def test_the_time_may_be_written_in_three_ways(tmp_path: Path, max_time: Any, seconds: float) -> None:
    time = Time()
    trainer, _ = make_trainer(tmp_path, subs.MaxTime(max_time, clock=time.clock, timer=time.timer))
    trainer.fit([np.float32(1.0)], epochs=1)
    assert [timer.due_s - 100.0 for timer in time.timers] == [seconds]


@pytest.mark.parametrize(
    "max_time", [0, -1, float("nan"), float("inf"), True, None, "90", "12:00:00", "00:00:00:00", timedelta(0)]
)
def test_a_time_that_cannot_be_is_refused(max_time: Any) -> None:
    with pytest.raises(et.ConfigurationError, match="max_time="):
        subs.MaxTime(max_time)


@pytest.mark.parametrize(
    "state",
    [{"version": 2}, {"version": 1}, {"version": 1, "elapsed_s": -1}, {"version": 1, "elapsed_s": "nan"}],
)
def test_a_state_that_cannot_be_taken_over_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(et.StateError, match="MaxTime cannot load"):
        subs.MaxTime(1).load_state_dict(state)
