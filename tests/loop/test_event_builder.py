"""From windows to events: means that do not depend on the cut, notes in their place, schedules followed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventtrain.bus.bus import EventBus, core_of
from eventtrain.bus.core import BusCore
from eventtrain.bus.training_stream import EventSeries
from eventtrain.control.run_view import RunView
from eventtrain.device.fetcher import MetricColumns
from eventtrain.events import EpochStarted, HyperparamChanged, StepCompleted
from eventtrain.loop.event_builder import EpochEnd, EventBuilder, RunningMeans, TrainWindow


class Fed(BusCore):
    """A bus that keeps what it is fed."""

    def __init__(self) -> None:
        vars(self).update(vars(core_of(EventBus())))
        self.items: list[Any] = []

    def feed(self, items: Any) -> None:
        self.items += list(items)


values = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60)


@given(values, st.lists(st.integers(1, 10), max_size=30))
def test_means_are_bit_equal_however_the_rows_are_cut_into_windows(numbers, cuts):
    column = np.array(numbers, np.float32)
    weights = np.arange(1, len(column) + 1)
    whole, parts = RunningMeans("n"), RunningMeans("n")
    whole.add({"loss": column, "n": weights}, len(column))
    begin = 0
    for size in [*cuts, len(column)]:
        window = slice(begin, begin + size)
        if len(column[window]):
            parts.add({"loss": column[window], "n": weights[window]}, len(column[window]))
        begin += size
    assert repr(whole.means()) == repr(parts.means())


def test_means_are_float64_and_the_weight_shows_its_sum():
    means = RunningMeans("n")
    means.add({"loss": np.array([1.0, 4.0], np.float32), "n": np.array([3, 1], np.int32)}, 2)
    assert means.means() == {"loss": 1.75, "n": 4.0}


def test_means_of_no_weight_at_all_are_nan():
    means = RunningMeans("n")
    means.add({"loss": np.array([1.0]), "n": np.array([0])}, 1)
    assert np.isnan(means.means()["loss"])


def columns(first_step: int, rows: int, notes: tuple[Any, ...] = (), watched: Any = None) -> MetricColumns:
    window = TrainWindow(first_step, rows, 0, first_step - 1, notes, False)
    return MetricColumns({"loss": np.arange(rows, dtype=np.float32)}, rows, window, watched or {})


def test_what_was_said_at_a_boundary_stands_between_its_step_and_the_next():
    bus = Fed()
    notes = tuple(
        HyperparamChanged(step=step, name="learning_rate", path="", old=1.0, new=0.5) for step in (3, 5, 5)
    )
    EventBuilder(bus, RunView()).take(columns(first_step=4, rows=4, notes=notes))
    told = [item.steps if isinstance(item, EventSeries) else item.step for item in bus.items]
    assert told == [3, range(4, 6), 5, 5, range(6, 8)]
    events = [e for item in bus.items if isinstance(item, EventSeries) for e in item.build(item.steps)]
    assert [(e.step, e.batch, e.metrics) for e in events] == [
        (4, 3, {"loss": 0.0}),
        (5, 4, {"loss": 1.0}),
        (6, 5, {"loss": 2.0}),
        (7, 6, {"loss": 3.0}),
    ]
    assert all(type(event) is StepCompleted for event in events)


def test_a_built_event_equals_the_validated_one():
    bus = Fed()
    EventBuilder(bus, RunView()).take(columns(first_step=1, rows=2))
    (series,) = bus.items
    built = series.build(range(2, 3))[0]
    expected = StepCompleted(step=2, epoch=0, batch=1, metrics={"loss": 1.0})
    assert built == expected
    assert built.model_dump_json() == expected.model_dump_json()
    assert built.model_fields_set >= {"step", "epoch", "batch", "metrics"}
    with pytest.raises(TypeError, match="read-only"):
        built.metrics["loss"] = 0.0


def test_scheduled_hyperparameters_follow_the_newest_row():
    bus = Fed()
    view = RunView()
    builder = EventBuilder(bus, view)
    builder.watch({7: "learning_rate"})
    builder.take(columns(1, 2, watched={7: np.array([0.5, 0.25], np.float32)}))
    assert view.scheduled == {"learning_rate": 0.25}
    builder.take(EpochStarted(step=2, epoch=1, hyperparams={"learning_rate": 1.0, "b1": 0.9}))
    assert bus.items[-1].hyperparams == {"learning_rate": 0.25, "b1": 0.9}
    builder.take(EpochEnd(step=2, epoch=1, steps=0, began_s=0.0, hyperparams={"b1": 0.9}))
    assert builder.history[-1].hyperparams == {"b1": 0.9, "learning_rate": 0.25}


def test_infinities_of_both_signs_make_a_mean_that_is_nan_and_no_warning() -> None:
    means = RunningMeans(None)
    means.add({"loss": np.array([np.inf, 1.0])}, 2)
    means.add({"loss": np.array([-np.inf, 3e38], np.float32)}, 2)
    assert np.isnan(means.means()["loss"])
