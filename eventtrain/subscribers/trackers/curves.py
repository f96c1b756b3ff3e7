"""``TrackedCurves``: the points of a tracker's curves, from the events of a run. Pure.

Points of single steps are not made here: they come in windows, by ``step_rows``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from eventtrain.events import (
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    Event,
    HyperparamChanged,
    RunStarted,
    StepsCompleted,
)
from eventtrain.events.models import Number

HyperparamValue = tuple[int, str, float]
"""Step that was computed with the value, name, value."""


class Points(NamedTuple):
    """One step's points of the curves of one group, such as ``epoch``."""

    step: int
    group: str
    values: Mapping[str, Number]

    def named(self) -> dict[str, Number]:
        """Returns the values by the name of their curve: ``<group>/<name>``."""
        return {f"{self.group}/{name}": value for name, value in self.values.items()}


class HyperparamCurveState(BaseModel):
    """State saved with checkpoints: name -> step and value, of the newest points and of those not due yet."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    last: dict[str, tuple[int, float]] = {}
    waiting: dict[str, tuple[int, float]] = {}


class TrackedCurves:
    """Turns events, in their order, into points of ``epoch/...``, ``eval/...`` and ``hyperparams/...``, none twice.

    Call ``points`` with each event of the types ``events``.
    """

    events = (RunStarted, EpochStarted, StepsCompleted, EvalCompleted, HyperparamChanged, EpochCompleted)

    def __init__(self) -> None:
        self._hyperparams = HyperparamCurve()
        self.evaluated_at = -1
        """Step of the last evaluation that has points; a restart needs it and ``state``."""

    def points(self, event: Event) -> list[Points]:
        """Returns the points that ``event`` adds; none for an event of another type."""
        match event:
            case StepsCompleted():
                return self.due(event.last_step)
            case HyperparamChanged():
                return _of_hyperparams(self._hyperparams.changed(event))
            case EpochCompleted():
                values = _of_hyperparams(self._hyperparams.completed(event))
                return [*values, *_of_metrics(event.step, "epoch", event.metrics)]
            case EvalCompleted() if (
                event.step > self.evaluated_at
            ):  # a command may evaluate the same boundary again
                self.evaluated_at = event.step
                return _of_metrics(event.step, "eval", event.metrics)
            case EpochStarted():
                self._hyperparams.started(event)
            case RunStarted():  # perhaps of another trainer, from the first step on
                self._hyperparams.begin(event.step)
                self.evaluated_at = min(self.evaluated_at, event.step)
            case _:
                pass
        return []

    def due(self, step: int) -> list[Points]:
        """Returns the points of hyperparameters that waited for ``step`` or an earlier one."""
        return _of_hyperparams(self._hyperparams.due(step))

    @property
    def state(self) -> HyperparamCurveState:
        """State for ``restore``."""
        return self._hyperparams.state

    def restore(self, state: HyperparamCurveState, evaluated_at: int) -> None:
        """Continues from a saved state."""
        self._hyperparams.state = state
        self.evaluated_at = evaluated_at


class HyperparamCurve:
    """Curves of hyperparameters over the steps: the first value, each change, and the last step of each epoch.

    A change at boundary k is a point of step k + 1, the first that is computed with it. It is returned once that step
    is completed: several changes at one boundary are one point, the last.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}
        self._waiting: dict[str, tuple[int, float]] = {}

    def begin(self, step: int) -> None:
        """Forgets the points of steps after ``step``, after which a run begins."""
        self._last = {name: point for name, point in self._last.items() if point[0] <= step}
        self._waiting = {name: point for name, point in self._waiting.items() if point[0] <= step + 1}

    def started(self, event: EpochStarted) -> None:
        """Takes the values that are not known yet."""
        for name, value in event.hyperparams.items():
            if name not in self._last and name not in self._waiting:
                self._waiting[name] = (event.step + 1, float(value))

    def changed(self, event: HyperparamChanged) -> list[HyperparamValue]:
        """Takes a change; returns the points that are due before it."""
        due = self.due(event.step)
        known = event.name in self._last or event.name in self._waiting
        self._waiting[event.name if known else event.path] = (event.step + 1, float(event.new))
        return due

    def due(self, step: int) -> list[HyperparamValue]:
        """Returns the points that waited for ``step`` or an earlier one, in order."""
        due = {name: point for name, point in self._waiting.items() if point[0] <= step}
        self._last.update(due)
        for name in due:
            del self._waiting[name]
        return sorted((at, name, value) for name, (at, value) in due.items())

    def completed(self, event: EpochCompleted) -> list[HyperparamValue]:
        """Returns the points that are due at the end of an epoch, with those of its last step."""
        values = self.due(event.step)
        for name, shown in event.hyperparams.items():
            at, value = self._last.get(name, (-1, float(shown)))
            if (
                name not in self._waiting
            ):  # else it changed at this boundary, and the last step had the old value
                value = float(shown)
            if at < event.step:
                self._last[name] = (event.step, value)
                values.append((event.step, name, value))
        return values

    @property
    def state(self) -> HyperparamCurveState:
        """State saved with checkpoints."""
        return HyperparamCurveState(last=dict(self._last), waiting=dict(self._waiting))

    @state.setter
    def state(self, state: HyperparamCurveState) -> None:
        self._last, self._waiting = dict(state.last), dict(state.waiting)


def _of_hyperparams(values: Iterable[HyperparamValue]) -> list[Points]:
    return [Points(step, "hyperparams", {name: value}) for step, name, value in values]


def _of_metrics(step: int, group: str, metrics: Mapping[str, Number]) -> list[Points]:
    return [Points(step, group, metrics)] if metrics else []
