"""``StepTable``: the steps of a window as columns, rows or JSON lines, without one event object for each step. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, repeat
from typing import Any

import numpy as np
from pydantic_core import to_json

from eventtrain.bus.step_series import StepSeries
from eventtrain.events import Event, StepCompleted, StepsCompleted
from eventtrain.events.models import Number


def due_steps(window: StepsCompleted, every: int) -> range:
    """Returns the steps of ``window`` that are multiples of ``every``."""
    return range(window.first_step + -window.first_step % every, window.last_step + 1, every)


@dataclass(frozen=True, slots=True)
class StepTable:
    """Some steps of one epoch: their numbers, and one read-only array of that length for each metric.

    `seqs` are the numbers of their events in the training stream; None if they have none.
    """

    steps: range
    epoch: int
    batches: range
    metrics: Mapping[str, np.ndarray[Any, Any]]
    run_id: str
    attempt: int
    stream: str | None
    time: datetime
    seqs: Sequence[int] | None = None

    @classmethod
    def of(cls, window: StepsCompleted, every: int = 1) -> StepTable:
        """Returns the table of ``due_steps``, the steps that a subscription to StepCompleted would get."""
        steps = due_steps(window, every)
        skipped = steps.start - window.first_step
        first_batch = window.first_batch + skipped
        batches = range(first_batch, first_batch + every * len(steps), every)
        metrics: Mapping[str, np.ndarray[Any, Any]] = window.metrics
        if every > 1:
            metrics = {name: column[skipped::every] for name, column in metrics.items()}
        return cls(
            steps, window.epoch, batches, metrics, window.run_id, window.attempt, window.stream, window.time
        )

    @classmethod
    def of_series(cls, series: StepSeries) -> StepTable:
        """Returns the table of the events of ``series``."""
        return cls(
            series.steps,
            series.epoch,
            series.batches,
            series.metrics,
            series.run_id,
            series.attempt,
            "training",
            series.time,
            series.seqs,
        )

    @property
    def size_bytes(self) -> int:
        """Approximate memory use."""
        return 500 + sum(200 + column.nbytes for column in self.metrics.values())


def step_rows(window: StepsCompleted, every: int = 1) -> list[tuple[int, dict[str, Number]]]:
    """Returns each of ``due_steps`` with its metrics, as exact Python numbers."""
    table = StepTable.of(window, every)
    columns = [column.tolist() for column in table.metrics.values()]
    return [
        (step, dict(zip(table.metrics, (column[row] for column in columns), strict=True)))
        for row, step in enumerate(table.steps)
    ]


def follows(event: Event, before: StepCompleted | StepsCompleted) -> bool:
    """Returns whether ``event`` has the next step, or the next window, of the same epoch with the same metrics."""
    return (
        isinstance(event, (StepCompleted, StepsCompleted))
        and type(event) is type(before)
        and (event.first_step if isinstance(event, StepsCompleted) else event.step) == before.step + 1
        and event.epoch == before.epoch
        and event.metrics.keys() == before.metrics.keys()
    )


def number_texts(values: Iterable[Any]) -> list[bytes]:
    """Returns each number as JSON: the shortest digits that are read back as the same; NaN and infinities as text."""
    text = to_json(list(values), inf_nan_mode="strings")
    return text[1:-1].split(b",") if len(text) > 2 else []


def json_lines(table: StepTable) -> bytes:
    """Returns ``StepCompleted.model_dump_json()`` of each step, joined by line ends, without building the events.

    ``seq`` is 0 where the table has none. 0.5 us for a row of three metrics.
    """
    numbers = {"step": table.steps, "batch": table.batches, "seq": table.seqs}
    constant: dict[str, Any] = {
        "kind": StepCompleted.model_fields["kind"].default,
        "run_id": table.run_id,
        "attempt": table.attempt,
        "stream": table.stream,
        **({"seq": 0} if table.seqs is None else {}),
        "process": None,
        "time": table.time,
        "schema_version": StepCompleted.model_fields["schema_version"].default,
        "epoch": table.epoch,
    }
    literal, pieces = b"{", list[Iterable[bytes]]()
    for field in StepCompleted.model_fields:
        literal += b'"%b":' % field.encode()
        if field in constant:
            literal += to_json(constant[field]) + b","
        elif field == "metrics":
            literal += b"{"
            for name, column in table.metrics.items():
                pieces += [repeat(literal + _json_name(name) + b":"), number_texts(column.tolist())]
                literal = b","
            literal = (b"" if table.metrics else literal) + b"},"
        else:
            pieces += [repeat(literal), number_texts(numbers[field] or ())]
            literal = b","
    pieces.append(repeat(literal[:-1] + b"}\n"))
    return b"".join(chain.from_iterable(zip(*pieces, strict=False)))[:-1]


def _json_name(name: str) -> bytes:
    """Returns ``name`` as events write it: a lone surrogate, which UTF-8 cannot hold, as replacement characters."""
    return to_json(name.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
