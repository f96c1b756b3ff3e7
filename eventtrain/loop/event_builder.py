"""Builds events from windows of metrics, in the one order of the training stream. Runs on the fetch thread."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from time import perf_counter
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from eventtrain.bus.barrier import Marker
from eventtrain.bus.core import BusCore
from eventtrain.bus.step_series import StepColumns
from eventtrain.bus.training_stream import Activation, EventSeries
from eventtrain.control.run_state import SavedMeans, SavedReduction, StreamRecord
from eventtrain.control.run_view import RunView
from eventtrain.device.metric_ring import MetricColumns
from eventtrain.device.reductions import Reduction
from eventtrain.device.stateful_metrics import FetchedStates, HostArray
from eventtrain.errors import MetricsError, first_lines
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
    """The meaning of the rows of an evaluation ring: consecutive batches of one set, all at one training step."""

    step: int
    epoch: int
    first_batch: int
    set_name: str = ""


@dataclass(frozen=True, slots=True)
class EvalSetEnd:
    """Comes with what the metrics with state computed, behind all rows of one set of an evaluation."""

    set_name: str


@dataclass(frozen=True, slots=True)
class EvalEnd:
    """Follows all sets of an evaluation: EvalCompleted can be built."""

    step: int
    epoch: int
    steps: int
    began_s: float


@dataclass(frozen=True, slots=True)
class EvalStates:
    """Comes with the states of the metrics of an evaluation that ends early."""


@dataclass(frozen=True, slots=True)
class EpochStates:
    """Comes with the states of the metrics of the epoch in progress, before the marker of a checkpoint."""


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


Derivations: TypeAlias = Mapping[str, Callable[[Mapping[str, Number]], Number]]
NOTHING: Derivations = MappingProxyType({})


class RunningMeans:
    """Reduces rows that arrive in windows, in float64. How the rows are cut into windows does not change the result.

    Args:
        weight: name of the metric that weights the means of the others; its own entry is its sum. None: every row
            counts once.
    """

    def __init__(self, weight: str | None) -> None:
        self._weight = weight
        self._sums: dict[str, float] = {}
        self._total = 0.0
        # Of metrics with a reduction of their own: that, and the weight of the rows that have a value.
        self._reductions: dict[str, Reduction] = {}
        self._weights: dict[str, float] = {}

    def add(
        self, columns: Mapping[str, np.ndarray], rows: int, reductions: Iterable[tuple[str, Reduction]] = ()
    ) -> None:
        """Add ``rows`` rows: name -> column of that length, any real dtype; and the reductions of some of them."""
        weights = np.ones(rows)
        if self._weight is not None and columns:
            weights = self._weights_in(columns, self._weight, f"Trainer(weight={self._weight!r})")
        self._total = _add_in_order(self._total, weights)
        own = dict(reductions)
        for name, column in columns.items():
            values = column.astype(np.float64)
            if name in own:
                self._reduce(name, values, own[name], weights, columns)
                continue
            with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN, as it should be
                weighted = values if name == self._weight else values * weights
                self._sums[name] = _add_in_order(self._sums.get(name, 0.0), weighted)

    def _reduce(
        self,
        name: str,
        values: np.ndarray,
        reduction: Reduction,
        weights: np.ndarray,
        columns: Mapping[str, np.ndarray],
    ) -> None:
        """Adds the values of a metric with a reduction of its own: those that are not NaN."""
        if reduction.how != "mean":
            weights = np.ones(len(values))
        elif reduction.weight is not None:
            weights = self._weights_in(
                columns, reduction.weight, f"{name!r}: et.Mean(weight={reduction.weight!r})"
            )
        present = ~np.isnan(values)
        before = self._sums.get(name, -math.inf if reduction.how == "max" else 0.0)
        values, weights = values[present], weights[present]
        with np.errstate(invalid="ignore", over="ignore"):
            match reduction.how:
                case "mean":
                    after = _add_in_order(before, values * weights)
                case "sum":
                    after = _add_in_order(before, values)
                case "max":
                    after = float(np.max(values, initial=before))
                case "last":
                    after = float(values[-1]) if len(values) else before
        self._sums[name], self._reductions[name] = after, reduction
        self._weights[name] = _add_in_order(self._weights.get(name, 0.0), weights)

    @staticmethod
    def _weights_in(columns: Mapping[str, np.ndarray], weight: str, subject: str) -> np.ndarray:
        if weight not in columns:
            raise MetricsError(
                f"{subject}: this metric is not among those returned ({', '.join(columns) or 'none'}). Return it from "
                "step_fn and eval_fn, for example the number of examples of the batch."
            )
        return columns[weight].astype(np.float64)

    @property
    def saved(self) -> SavedMeans:
        """The sums, for a checkpoint."""
        return SavedMeans(
            sums=dict(self._sums),
            total=self._total,
            reductions={
                name: SavedReduction(how=reduction.how, weight=reduction.weight, total=self._weights[name])
                for name, reduction in self._reductions.items()
            },
        )

    def resume(self, saved: SavedMeans) -> None:
        """Continue from these sums."""
        self._sums, self._total = dict(saved.sums), saved.total
        self._reductions = {name: Reduction(one.how, one.weight) for name, one in saved.reductions.items()}
        self._weights = {name: one.total for name, one in saved.reductions.items()}

    def means(self) -> dict[str, Number]:
        """Returns the values so far; NaN where the weights sum to zero, or no row has a value."""
        found: dict[str, Number] = {}
        for name, value in self._sums.items():
            own = self._reductions.get(name)
            total = self._total if own is None else self._weights[name]
            if own is None and name == self._weight:
                found[name] = value
            elif not total:
                found[name] = math.nan
            else:
                found[name] = value / total if own is None or own.how == "mean" else value
        return found


def with_derived(means: Mapping[str, Number], derive: Derivations) -> dict[str, Number]:
    """Returns ``means``, and what ``derive`` computes from them: one value after the other, in the order given.

    A function that asks for a metric that is not there is left out. inf where its result is too large for a float, NaN
    where it is not defined.

    Raises:
        MetricsError: a function raised something else, or did not return a number.
    """
    found = dict(means)
    for name, function in derive.items():
        try:
            value = function(MappingProxyType(found))
        except KeyError:
            continue
        except OverflowError:
            value = math.inf
        except (ArithmeticError, ValueError):
            value = math.nan
        except Exception as error:
            raise MetricsError(
                f"Trainer(derive={{{name!r}: ...}}) raised {type(error).__name__}: {first_lines(str(error))}"
            ) from error
        if isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, (bool, int, float)):
            raise MetricsError(
                f"Trainer(derive={{{name!r}: ...}}) returned {type(value).__name__}. Return a number, computed from "
                "the means that it is given by name."
            )
        found[name] = value
    return found


def _add_in_order(total: float, values: np.ndarray) -> float:
    # One after the other, not pairwise: how rows are cut into windows depends on timing, and the sum must not.
    return float(np.add.accumulate(np.concatenate(([total], values)))[-1])


class EventBuilder:
    """Builds the events of what the fetcher delivers, and feeds them to the bus. One per run; fetch thread only.

    Args:
        bus: gets the stream.
        view: shows the hyperparameters that follow a schedule.
        weight: name of the metric that weights the means of the others.
        derive: functions of the means, by the names of what they return.

    Attributes:
        history: the newest EpochCompleted events, at most ``HISTORY_LIMIT``.
        evaluated: the means of the last evaluation that ended.
        eval_states, epoch_states: of the metrics with state, in the evaluation and the epoch that were cut short.
    """

    def __init__(
        self, bus: BusCore, view: RunView, *, weight: str | None = None, derive: Derivations = NOTHING
    ) -> None:
        self._bus = bus
        self._view = view
        self._weight = weight
        self._derive = derive
        self._scheduled: Mapping[int, str] = {}
        self.history: deque[EpochCompleted] = deque(maxlen=HISTORY_LIMIT)
        self.evaluated: Mapping[str, Number] | None = None
        self.eval_states: tuple[HostArray, ...] = ()
        self.epoch_states: tuple[HostArray, ...] = ()
        # Of the sets of an evaluation that it has finished.
        self._eval_metrics: dict[str, Number] = {}
        self._eval_arrays: dict[str, HostArray] = {}
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
        self.eval_states, self.epoch_states = record.eval_states, record.epoch_states
        self._eval_metrics, self._eval_arrays = dict(record.eval_metrics), dict(record.eval_arrays)
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
            case FetchedStates(window=EvalSetEnd(set_name)):
                self._end_eval_set(set_name, item.arrays)
            case FetchedStates(window=EvalStates()):
                self.eval_states = tuple(item.arrays.values())
            case FetchedStates(window=EpochStates()):
                self.epoch_states = tuple(item.arrays.values())
            case FetchedStates(window=EpochEnd() as end):
                self._bus.feed([self._end_epoch(end, item.arrays)])
            case EpochEnd():
                self._bus.feed([self._end_epoch(item, {})])
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
                self.evaluated, self.epoch_states = None, ()
                if self._view.scheduled:  # the loop does not know the values of a schedule
                    hyperparams = FrozenDict({**item.hyperparams, **self._view.scheduled})
                    return item.model_copy(update={"hyperparams": hyperparams})
            case EvalStarted():
                self._eval_means = RunningMeans(self._weight)
                self.eval_states, self._eval_metrics, self._eval_arrays = (), {}, {}
            case Marker():
                item.barrier.run.stream = StreamRecord(
                    epoch_means=self._epoch_means.saved,
                    eval_means=self._eval_means.saved,
                    evaluated=None if self.evaluated is None else dict(self.evaluated),
                    epoch_states=self.epoch_states,
                    eval_states=self.eval_states,
                    eval_metrics=self._eval_metrics,
                    eval_arrays=self._eval_arrays,
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
        self._epoch_means.add(columns.metrics, columns.rows, columns.reductions)
        if self._scheduled:
            last = {name: columns.watched[index][-1].item() for index, name in self._scheduled.items()}
            self._view.scheduled = MappingProxyType(last)
        steps = range(window.first_step, window.first_step + columns.rows)
        sections = [
            _Section(
                steps[rows.start : rows.stop],
                _step_builder(metrics, window),
                StepColumns(window.first_step, window.first_batch, window.epoch, metrics),
            )
            for rows, metrics in _alike(columns)
        ]
        pieces: list[Event | EventSeries | Activation] = []
        announce = not window.announced and self._bus.has_subscribers(StepStarted)
        begin = steps.start
        for event in window.between:
            if event.step >= begin:
                pieces += self._pieces(range(begin, event.step + 1), sections, announce)
                begin = event.step + 1
            pieces.append(event)
        pieces += self._pieces(range(begin, steps.stop), sections, announce)
        if self._bus.has_subscribers(StepsCompleted):
            pieces += [
                StepsCompleted(
                    step=section.steps[-1],
                    first_step=section.steps[0],
                    last_step=section.steps[-1],
                    epoch=window.epoch,
                    first_batch=window.first_batch + section.steps[0] - window.first_step,
                    metrics=section.metrics,
                )
                for section in sections
            ]
        return pieces

    @staticmethod
    def _pieces(steps: range, sections: Sequence[_Section], announce: bool) -> Iterator[Event | EventSeries]:
        for section in sections:
            columns, build = section.columns, section.build
            part = range(max(steps.start, section.steps.start), min(steps.stop, section.steps.stop))
            if not announce:
                if part:
                    yield EventSeries(StepCompleted, part, build, columns)
                continue
            for step in part:
                batch = columns.first_batch + step - columns.first_step
                yield StepStarted(step=step - 1, epoch=columns.epoch, batch=batch)
                yield EventSeries(StepCompleted, range(step, step + 1), build, columns)

    def _end_epoch(self, end: EpochEnd, computed: Mapping[str, HostArray]) -> EpochCompleted:
        self.epoch_states = ()
        scalars, arrays = _sorted_out(computed)
        metrics = with_derived({**self._epoch_means.means(), **scalars}, self._derive)
        if self.evaluated is not None:
            metrics |= {f"val_{name}": value for name, value in self.evaluated.items()}
        event = EpochCompleted(
            step=end.step,
            epoch=end.epoch,
            metrics=metrics,
            arrays=arrays,
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
        self._eval_means.add(columns.metrics, columns.rows, columns.reductions)
        if not self._bus.has_subscribers(EvalStepCompleted):
            return []
        named = {_in_set(window.set_name, name): column for name, column in columns.metrics.items()}
        return [
            EvalStepCompleted(step=window.step, epoch=window.epoch, batch=batch, metrics=metrics)
            for batch, metrics in zip(
                count(window.first_batch), _rows(named, range(columns.rows)), strict=False
            )
        ]

    def _end_eval_set(self, set_name: str, computed: Mapping[str, HostArray]) -> None:
        scalars, arrays = _sorted_out(computed)
        metrics = with_derived({**self._eval_means.means(), **scalars}, self._derive)
        named = {_in_set(set_name, name): value for name, value in metrics.items()}
        if twice := sorted(named.keys() & self._eval_metrics.keys()):
            raise MetricsError(
                f"Two sets of eval_data have a metric named {twice[0]!r}, the last of them {set_name!r}. Rename a set."
            )
        self._eval_metrics |= named
        self._eval_arrays |= {_in_set(set_name, name): value for name, value in arrays.items()}
        self._eval_means = RunningMeans(self._weight)

    def _end_eval(self, end: EvalEnd) -> EvalCompleted:
        self.evaluated = self._eval_metrics
        return EvalCompleted(
            step=end.step,
            epoch=end.epoch,
            metrics=dict(self.evaluated),
            arrays=self._eval_arrays,
            steps=end.steps,
            duration_s=perf_counter() - end.began_s,
        )


def _sorted_out(computed: Mapping[str, HostArray]) -> tuple[dict[str, Number], dict[str, HostArray]]:
    """Returns the scalars, and the other arrays."""
    scalars = {name: value.item() for name, value in computed.items() if value.ndim == 0}
    return scalars, {name: value for name, value in computed.items() if value.ndim > 0}


def _in_set(set_name: str, name: str) -> str:
    return f"{set_name}_{name}" if set_name else name


@dataclass(frozen=True, slots=True)
class _Section:
    """Consecutive steps of a window that have the same metrics: those of its columns."""

    steps: range
    build: Callable[[Sequence[int]], Sequence[Event]]
    columns: StepColumns

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """The columns of these steps alone."""
        first = self.columns.first_step
        part = slice(self.steps.start - first, self.steps.stop - first)
        return {name: column[part] for name, column in self.columns.metrics.items()}


def _alike(columns: MetricColumns) -> list[tuple[range, dict[str, np.ndarray]]]:
    """Returns the rows that have the same metrics, with the columns of these: a NaN-aware one lacks those with NaN."""
    absent = {
        name: np.isnan(columns.metrics[name])
        for name, _ in columns.reductions
        if columns.metrics[name].dtype.kind == "f"
    }
    absent = {name: rows for name, rows in absent.items() if rows.any()}
    if not absent:
        return [(range(columns.rows), columns.metrics)]
    masks = np.stack([*absent.values()])
    edges = [0, *(np.flatnonzero((masks[:, 1:] != masks[:, :-1]).any(axis=0)) + 1).tolist(), columns.rows]
    return [
        (
            range(begin, end),
            {name: c for name, c in columns.metrics.items() if name not in absent or not absent[name][begin]},
        )
        for begin, end in pairwise(edges)
    ]


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
