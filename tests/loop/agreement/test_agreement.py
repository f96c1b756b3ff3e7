"""How far process 0 promises ahead, and how a process waits for it to begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import eventtrain as et
from eventtrain.control.control_plane import ControlPlane
from eventtrain.errors import PeerLost
from eventtrain.loop.agreement import agreement
from eventtrain.loop.agreement.agreement import MOST_AHEAD, Follower, Pace
from eventtrain.loop.agreement.channel import Channel
from eventtrain.loop.agreement.log import Moment
from tests.support.key_values import KeyValues


def paced(step_s: float, steps: int, pace: Pace | None = None, at_s: float = 0.0) -> tuple[Pace, list[int]]:
    pace = pace or Pace()
    return pace, [pace.steps_ahead(Moment(1, step), at_s + step * step_s) for step in range(steps)]


@pytest.mark.parametrize(
    ("step_s", "expected"), [(1e-4, MOST_AHEAD), (1e-3, 20), (3e-3, 6), (9e-3, 2), (0.05, 0)]
)
def test_promises_reach_as_far_as_20_ms_of_steps(step_s: float, expected: int) -> None:
    _, ahead = paced(step_s, 1000)
    assert ahead[0] == 0
    assert ahead[-1] in (expected, expected - 1, min(expected + 1, MOST_AHEAD))


def test_steps_that_are_dispatched_at_once_after_a_wait_do_not_count() -> None:
    pace, ahead = paced(9e-3, 100)
    assert ahead[-1] == 2
    began_s = 100 * 9e-3
    burst = [pace.steps_ahead(Moment(1, 100 + step), began_s + 0.025 + step * 5e-5) for step in range(16)]
    assert max(burst) <= 2
    later = [pace.steps_ahead(Moment(1, 116 + step), began_s + 0.026 + step * 9e-3) for step in range(50)]
    assert max(later) <= 3


def test_a_new_phase_keeps_the_pace() -> None:
    pace, ahead = paced(3e-3, 100)
    assert pace.steps_ahead(Moment(2, 0), 1.0) == ahead[-1]


class Waiting:
    """Process 1 of a run that process 0 has not begun."""

    def __init__(self) -> None:
        self.store = KeyValues()
        self.queue = ControlPlane(et.EventBus()._core).queue
        self.follower = Follower(Channel(self.store, "run/"), 1, 2, self.queue, ignore)


def ignore(*arguments: Any) -> None: ...


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    monkeypatch.setattr(agreement, "READ_S", 0.02)
    monkeypatch.setattr(agreement, "coordinator_host", lambda: None)
    waiting = Waiting()
    yield waiting
    waiting.follower.leave()


@pytest.mark.allow_blocking
def test_a_stopped_process_leaves_a_run_that_process_0_does_not_begin_and_says_why(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "BEGIN_S", 0.1)
    waiting.queue.ask_to_stop("preempted", 15)
    with pytest.raises(PeerLost, match="Process 0 has not begun the run"):
        waiting.follower.begin("")
    assert waiting.store.values["run/left/1"].startswith("PeerLost: Process 0 has not begun the run")


@pytest.mark.allow_blocking
def test_a_stopped_process_joins_a_run_that_process_0_begins_in_time(waiting: Waiting) -> None:
    waiting.queue.ask_to_stop("preempted", 15)
    waiting.store.key_value_set("run/opening", "facts")
    assert waiting.follower.begin("") == "facts"
    assert len(waiting.queue.arrived) == 1  # it is asked for in the run
