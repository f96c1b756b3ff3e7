"""What a run says about its own time, its program and its subscribers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import eventtrain as et
from eventtrain.control.loop_statistics import LoopClock
from tests.support.jax_compilations import COMPILATIONS
from tests.support.models import batches, make_trainer


class Looker(et.Subscriber):
    """Keeps the run's context."""

    run: et.RunContext

    async def start(self, run: et.RunContext) -> None:
        self.run = run
        self.before = (run.loop_statistics(), run.program())

    async def on_epoch_completed(self, event: et.EpochCompleted) -> None:
        self.program = self.run.program()


class Steps(et.Subscriber):
    """Works at each step's event as a function says."""

    def __init__(self, work: Callable[[], Any], **options: Any) -> None:
        self._work = work
        for name, value in options.items():
            setattr(self, name, value)

    async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
        self._work()


def look(tmp_path, data: Any, *others: et.Subscriber, **options: Any) -> Looker:
    looker = Looker()
    make_trainer(tmp_path, subscribers=[looker, *others], **options).fit(data, epochs=1)
    return looker


def parts(figures: et.LoopStatistics) -> dict[str, float]:
    return {
        name: getattr(figures, name)
        for name in ("data_wait_s", "dispatch_s", "device_wait_s", "observer_wait_s", "observing_s")
    }


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_every_part_is_counted_once_and_all_of_them_fit_into_the_duration(tmp_path, steps_per_call):
    looker = look(tmp_path, batches(40), steps_per_call=steps_per_call)
    figures = looker.run.loop_statistics()
    assert (figures.step, figures.steps) == (40, 40)
    assert looker.before == (et.LoopStatistics(duration_s=looker.before[0].duration_s), None)
    assert 0 < sum(parts(figures).values()) <= figures.duration_s
    assert figures.dispatch_s > 0 < figures.observing_s
    assert figures == looker.run.loop_statistics()  # the run has ended


def test_slow_data_counts_as_waiting_for_data_from_the_first_batch_on(tmp_path):
    stepped = threading.Semaphore(1)

    def slow(epoch: int) -> Any:
        for batch in batches(3):
            assert stepped.acquire(timeout=30)  # nothing is made ahead, while the step compiles
            time.sleep(0.1)
            yield batch

    figures = look(tmp_path, slow, Steps(stepped.release)).run.loop_statistics()
    assert figures.data_wait_s >= 0.29
    assert figures.data_wait_s > 10 * figures.observer_wait_s


@pytest.mark.allow_blocking
def test_a_slow_decider_counts_as_waiting_for_observers_and_an_observer_does_not(tmp_path):
    decider = Steps(lambda: time.sleep(0.05), lag=0)
    assert look(tmp_path / "decides", batches(6), decider).run.loop_statistics().observer_wait_s >= 0.25
    observer = Steps(lambda: time.sleep(0.05))
    assert look(tmp_path / "observes", batches(6), observer).run.loop_statistics().observer_wait_s < 0.01


@pytest.mark.allow_blocking
def test_a_full_queue_counts_as_waiting_for_observers(tmp_path):
    slow = Steps(lambda: time.sleep(0.01), queue=et.Lossless(4))
    assert look(tmp_path, batches(20), slow).run.loop_statistics().observer_wait_s >= 0.1


def test_waits_within_waits_are_charged_once():
    clock = LoopClock()

    def wait_twice() -> None:
        clock.for_observers(lambda: time.sleep(0.05))
        clock.for_observers(lambda: clock.for_observers(lambda: time.sleep(0.05)))

    clock.for_data(lambda: clock.for_observers(wait_twice))
    clock.stop()
    figures = clock.read(0, 0)
    assert 0.1 <= figures.observer_wait_s <= figures.duration_s
    assert 0 <= figures.data_wait_s <= figures.duration_s - figures.observer_wait_s


def test_the_program_is_that_of_the_step_which_runs_and_nothing_is_compiled_for_it(tmp_path):
    looker = look(tmp_path, batches(3))
    COMPILATIONS.start()
    program = looker.run.program()
    assert program is not None
    assert looker.program is not None
    assert program.jaxpr == looker.program.jaxpr
    assert "lambda" in program.jaxpr
    assert "ENTRY" in program.hlo
    assert program.cost["flops"] > 0
    with pytest.raises(TypeError, match="item assignment"):
        program.cost["flops"] = 0.0  # type: ignore[index]
    assert COMPILATIONS.since() == 0


def test_the_statistics_are_those_of_all_subscriptions(tmp_path):
    looker = look(tmp_path, batches(3), Steps(lambda: None, name="steps"))
    figures = looker.run.statistics()
    assert set(figures) == {"Looker", "steps"}
    assert figures["steps"].delivered == 3
