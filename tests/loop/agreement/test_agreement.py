"""How far process 0 promises ahead."""

from __future__ import annotations

import pytest

from eventtrain.loop.agreement.agreement import MOST_AHEAD, Pace
from eventtrain.loop.agreement.log import Moment


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
