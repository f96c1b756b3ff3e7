"""``TrackedCurves``: the points of a tracker's curves, from the events of a run. Pure.

Points of single steps are not made here: they come in windows, by ``step_rows``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    Call ``points`` with each event of the types ``events``. A hyperparameter has a point at the first step, at each
    change, and at the last step of each epoch. A change at boundary k is a point of step k + 1, the first that is
    computed with it. It is returned once that step is completed: several changes at one boundary are one point.
    """

    events = (RunStarted, EpochStarted, StepsCompleted, EvalCompleted, HyperparamChanged, EpochCompleted)

    def __init__(self) -> None:
        self.state = HyperparamCurveState()
        self.evaluated_at = -1
        """Step of the last evaluation that has points; a restart needs it and ``state``."""

    def points(self, event: Event) -> list[Points]:
        """Returns the points that ``event`` adds; none for an event of another type."""
        match event:
            case StepsCompleted():
                return self.due(event.last_step)
            case HyperparamChanged():
                return self._changed(event)
            case EpochCompleted():
                values = [*self.due(event.step), *self._at_the_end_of(event)]
                return [*values, *_of_metrics(event.step, "epoch", event.metrics)]
            case EvalCompleted() if event.step > self.evaluated_at:  # a command may evaluate a boundary again
                self.evaluated_at = event.step
                return _of_metrics(event.step, "eval", event.metrics)
            case EpochStarted():
                for name, value in event.hyperparams.items():
                    if not self._knows(name):
                        self.state.waiting[name] = (event.step + 1, float(value))
            case RunStarted(step=step):  # perhaps of another trainer, from the first step on
                last, waiting = self.state.last.items(), self.state.waiting.items()
                self.state = HyperparamCurveState(
                    last={name: point for name, point in last if point[0] <= step},
                    waiting={name: point for name, point in waiting if point[0] <= step + 1},
                )
                self.evaluated_at = min(self.evaluated_at, step)
            case _:
                pass
        return []

    def due(self, step: int) -> list[Points]:
        """Returns the points of hyperparameters that waited for ``step`` or an earlier one, in order."""
        due = {name: point for name, point in self.state.waiting.items() if point[0] <= step}
        self.state.last.update(due)
        for name in due:
            del self.state.waiting[name]
        return [
            _of_hyperparam(*point) for point in sorted((at, name, value) for name, (at, value) in due.items())
        ]

    def _knows(self, name: str) -> bool:
        return name in self.state.last or name in self.state.waiting

    def _changed(self, event: HyperparamChanged) -> list[Points]:
        due = self.due(event.step)
        name = event.name if self._knows(event.name) else event.path
        self.state.waiting[name] = (event.step + 1, float(event.new))
        return due

    def _at_the_end_of(self, event: EpochCompleted) -> Iterator[Points]:
        for name, shown in event.hyperparams.items():
            at, value = self.state.last.get(name, (-1, float(shown)))
            # A value that waits changed at this boundary, and the last step had the old one.
            if name not in self.state.waiting:
                value = float(shown)
            if at < event.step:
                self.state.last[name] = (event.step, value)
                yield _of_hyperparam(event.step, name, value)


def _of_hyperparam(step: int, name: str, value: float) -> Points:
    return Points(step, "hyperparams", {name: value})


def _of_metrics(step: int, group: str, metrics: Mapping[str, Number]) -> list[Points]:
    return [Points(step, group, metrics)] if metrics else []
