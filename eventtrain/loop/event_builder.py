"""Builds events from windows of metrics, in the one order of the training stream. Runs on the fetch thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np

from eventtrain.bus.barrier import Marker
from eventtrain.bus.core import BusCore
from eventtrain.bus.step_series import StepColumns
from eventtrain.bus.training_stream import Activation, EventSeries
from eventtrain.control.run_state import SavedMeans, StreamRecord
from eventtrain.control.run_view import RunView
from eventtrain.device.metric_ring import MetricColumns
from eventtrain.errors import MetricsError
from eventtrain.events import (
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    EvalStarted,
    EvalStepCompleted,
    Event,
    StepCompleted,
    StepsCompleted,
    StepStarted,
)
from eventtrain.events.models import FrozenDict, Number, copies


@dataclass(frozen=True, slots=True)
class TrainWindow:
    """The meaning of the rows of a training ring: consecutive steps of one epoch.

    Attributes:
        first_step, first_batch: of the first row.
        between: events published at boundaries inside this window, in order.
        announced: whether they include StepStarted of each step.
    """

    first_step: int
    rows: int
    epoch: int
    first_batch: int
    between: tuple[Event, ...]
    announced: bool


@dataclass(frozen=True, slots=True)
class EvalWindow:
    """The meaning of the rows of an evaluation ring: consecutive batches, all at one training step."""

    step: int
    epoch: int
    first_batch: int


@dataclass(frozen=True, slots=True)
class EvalEnd:
    """Follows all rows of an evaluation: EvalCompleted can be built."""

    step: int
    epoch: int
    steps: int
    began_s: float


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """Follows all rows of an epoch: EpochCompleted can be built."""

    step: int
    epoch: int
    steps: int
    began_s: float
    hyperparams: Mapping[str, Number]


HISTORY_LIMIT = 10_000
"""Epochs whose EpochCompleted is kept: about 20 MB with ten metrics each."""


class RunningMeans:
    """Means over rows that arrive in windows, in float64. How the rows are cut into windows does not change them.

    Args:
        weight: name of the metric that weights the others; its own entry is its sum. None: every row counts once.
    """

    def __init__(self, weight: str | None) -> None:
        self._weight = weight
        self._sums: dict[str, float] = {}
        self._total = 0.0

    def add(self, columns: Mapping[str, np.ndarray], rows: int) -> None:
        """Add ``rows`` rows: name -> column of that length, any real dtype."""
        if self._weight is not None and self._weight not in columns:
            raise MetricsError(
                f"Trainer(weight={self._weight!r}): this metric is not among those returned "
                f"({', '.join(columns) or 'none'}). Return it from step_fn and eval_fn, for example the number of "
                "examples of the batch."
            )
        weights = np.ones(rows) if self._weight is None else columns[self._weight].astype(np.float64)
        self._total = _add_in_order(self._total, weights)
        for name, column in columns.items():
            values = column.astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN, as it should be
                weighted = values if name == self._weight else values * weights
                self._sums[name] = _add_in_order(self._sums.get(name, 0.0), weighted)

    @property
    def saved(self) -> SavedMeans:
        """The sums, for a checkpoint."""
        return SavedMeans(sums=dict(self._sums), total=self._total)

    def resume(self, saved: SavedMeans) -> None:
        """Continue from these sums."""
        self._sums, self._total = dict(saved.sums), saved.total

    def means(self) -> dict[str, float]:
        """Returns the means so far; NaN where the weights sum to zero."""
        total = self._total or float("nan")
        return {name: value if name == self._weight else value / total for name, value in self._sums.items()}


def _add_in_order(total: float, values: np.ndarray) -> float:
    # One after the other, not pairwise: how rows are cut into windows depends on timing, and the sum must not.
    return float(np.add.accumulate(np.concatenate(([total], values)))[-1])


class EventBuilder:
    """Builds the events of what the fetcher delivers, and feeds them to the bus. One per run; fetch thread only.

    Args:
        bus: gets the stream.
        view: shows the hyperparameters that follow a schedule.
        weight: name of the metric that weights the means of the others.

    Attributes:
        history: the newest EpochCompleted events, at most ``HISTORY_LIMIT``.
        evaluated: the means of the last evaluation that ended.
    """

    def __init__(self, bus: BusCore, view: RunView, *, weight: str | None = None) -> None:
        self._bus = bus
        self._view = view
        self._weight = weight
        self._scheduled: Mapping[int, str] = {}
        self.history: deque[EpochCompleted] = deque(maxlen=HISTORY_LIMIT)
        self.evaluated: Mapping[str, Number] | None = None
        self._epoch_means = RunningMeans(weight)
        self._eval_means = RunningMeans(weight)
        self._fetched_s = 0.0

    def watch(self, names: Mapping[int, str]) -> None:
        """Follow the scheduled hyperparameters: index of the state leaf -> name. Before the first window."""
        self._scheduled = names

    def resume(self, record: StreamRecord) -> None:
        """Continue from a checkpoint. Before the first item."""
        self._epoch_means.resume(record.epoch_means)
        self._eval_means.resume(record.eval_means)
        self.evaluated = record.evaluated
        self._view.scheduled = MappingProxyType(dict(record.watched))

    def take(self, item: Any) -> None:
        """Take the next item from the fetcher, and feed the events that it means to the bus."""
        match item:
            case MetricColumns(window=TrainWindow() as window):
                self._bus.feed(self._train_window(item, window))
            case MetricColumns():
                self._bus.feed(self._eval_window(item, item.window))
            case EvalEnd():
                self._bus.feed([self._end_eval(item)])
            case EpochEnd():
                self._bus.feed([self._end_epoch(item)])
            case _:
                self._bus.feed([self._noted(item)])

    def emit(self, event: Event) -> None:
        """Feed ``event`` at once. Only when the fetch thread has ended, on the thread that ended it."""
        self.take(event)

    def _noted(self, item: Any) -> Any:
        """``item``, with what only this thread knows; it changes the means that are being computed."""
        match item:
            case EpochStarted():
                self._epoch_means = RunningMeans(self._weight)
                self.evaluated = None
                if self._view.scheduled:  # the loop does not know the values of a schedule
                    hyperparams = FrozenDict({**item.hyperparams, **self._view.scheduled})
                    return item.model_copy(update={"hyperparams": hyperparams})
            case EvalStarted():
                self._eval_means = RunningMeans(self._weight)
            case Marker():
                item.barrier.run.stream = StreamRecord(
                    epoch_means=self._epoch_means.saved,
                    eval_means=self._eval_means.saved,
                    evaluated=None if self.evaluated is None else dict(self.evaluated),
                    watched=dict(self._view.scheduled),
                )
            case _:
                pass
        return item

    # --- training ---------------------------------------------------------------------------------------

    def _train_window(
        self, columns: MetricColumns, window: TrainWindow
    ) -> list[Event | EventSeries | Activation]:
        self._fetched_s = perf_counter()
        self._epoch_means.add(columns.metrics, columns.rows)
        if self._scheduled:
            last = {name: columns.watched[index][-1].item() for index, name in self._scheduled.items()}
            self._view.scheduled = MappingProxyType(last)
        steps = range(window.first_step, window.first_step + columns.rows)
        build = _step_builder(columns.metrics, window)
        given = StepColumns(window.first_step, window.first_batch, window.epoch, columns.metrics)
        pieces: list[Event | EventSeries | Activation] = []
        announce = not window.announced and self._bus.has_subscribers(StepStarted)
        begin = steps.start
        for event in window.between:
            if event.step >= begin:
                pieces += self._pieces(range(begin, event.step + 1), build, given, announce)
                begin = event.step + 1
            pieces.append(event)
        pieces += self._pieces(range(begin, steps.stop), build, given, announce)
        if self._bus.has_subscribers(StepsCompleted):
            pieces.append(
                StepsCompleted(
                    step=steps[-1],
                    first_step=steps[0],
                    last_step=steps[-1],
                    epoch=window.epoch,
                    first_batch=window.first_batch,
                    metrics=columns.metrics,
                )
            )
        return pieces

    @staticmethod
    def _pieces(
        steps: range, build: Callable[[Sequence[int]], Sequence[Event]], columns: StepColumns, announce: bool
    ) -> Iterator[Event | EventSeries]:
        if not announce:
            if steps:
                yield EventSeries(StepCompleted, steps, build, columns)
            return
        for step in steps:
            batch = columns.first_batch + step - columns.first_step
            yield StepStarted(step=step - 1, epoch=columns.epoch, batch=batch)
            yield EventSeries(StepCompleted, range(step, step + 1), build, columns)

    def _end_epoch(self, end: EpochEnd) -> EpochCompleted:
        metrics: dict[str, Number] = dict(self._epoch_means.means())
        if self.evaluated is not None:
            metrics |= {f"val_{name}": value for name, value in self.evaluated.items()}
        event = EpochCompleted(
            step=end.step,
            epoch=end.epoch,
            metrics=metrics,
            hyperparams={**end.hyperparams, **self._view.scheduled},
            steps=end.steps,
            duration_s=max(0.0, self._fetched_s - end.began_s),
        )
        self.history.append(event)
        return event

    # --- evaluation -------------------------------------------------------------------------------------

    def _eval_window(
        self, columns: MetricColumns, window: EvalWindow
    ) -> list[Event | EventSeries | Activation]:
        self._eval_means.add(columns.metrics, columns.rows)
        if not self._bus.has_subscribers(EvalStepCompleted):
            return []
        return [
            EvalStepCompleted(step=window.step, epoch=window.epoch, batch=batch, metrics=metrics)
            for batch, metrics in zip(
                count(window.first_batch), _rows(columns.metrics, range(columns.rows)), strict=False
            )
        ]

    def _end_eval(self, end: EvalEnd) -> EvalCompleted:
        self.evaluated = self._eval_means.means()
        return EvalCompleted(
            step=end.step,
            epoch=end.epoch,
            metrics=dict(self.evaluated),
            steps=end.steps,
            duration_s=perf_counter() - end.began_s,
        )


def _rows(columns: Mapping[str, np.ndarray], rows: Sequence[int]) -> list[dict[str, Number]]:
    """Returns the values of ``columns`` in these rows, read-only."""
    if not columns:
        return [FrozenDict() for _ in rows]
    names = list(columns)
    return [
        FrozenDict(zip(names, row, strict=True))
        for row in zip(*(c[rows].tolist() for c in columns.values()), strict=True)
    ]


def _step_builder(
    columns: Mapping[str, np.ndarray], window: TrainWindow
) -> Callable[[Sequence[int]], Sequence[Event]]:
    """Returns a function that builds StepCompleted events of a window: one is validated, the others are copies of it.

    Their values come from the same ring, so they have the same types. A copy costs 1.1 us, validating 4.2.
    """
    pattern: list[StepCompleted] = []
    first_step, batch_of_step_0 = window.first_step, window.first_batch - window.first_step

    def build(steps: Sequence[int]) -> list[StepCompleted]:
        rows = _rows(columns, [step - first_step for step in steps])
        if not pattern:  # once per window, and only if an event of it is wanted
            pattern.append(
                StepCompleted(
                    step=steps[0], epoch=window.epoch, batch=batch_of_step_0 + steps[0], metrics=rows[0]
                )
            )
        return copies(
            pattern[0],
            (
                {"step": step, "batch": batch_of_step_0 + step, "metrics": row}
                for step, row in zip(steps, rows, strict=True)
            ),
        )

    return build
