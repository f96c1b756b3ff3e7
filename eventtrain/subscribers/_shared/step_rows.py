"""A window of steps, by rows. Pure."""

from __future__ import annotations

from eventtrain.events import StepsCompleted
from eventtrain.events.models import Number

Row = tuple[int, dict[str, Number]]
"""A step and its metrics."""


def due_steps(event: StepsCompleted, every: int) -> range:
    """The steps of the window that are a multiple of ``every``."""
    return range(event.first_step + -event.first_step % every, event.last_step + 1, every)


def step_rows(event: StepsCompleted, every: int = 1) -> list[Row]:
    """The rows of ``due_steps``; values are Python's, exact."""
    steps = due_steps(event, every)
    chosen = slice(steps.start - event.first_step, None, every)
    columns = [column[chosen].tolist() for column in event.metrics.values()]
    names = list(event.metrics)
    return [
        (step, dict(zip(names, (column[i] for column in columns), strict=True)))
        for i, step in enumerate(steps)
    ]
