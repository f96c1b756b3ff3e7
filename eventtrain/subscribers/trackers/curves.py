"""``TrackedCurves``: from events to points of a tracker's curves, but for those of single steps. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

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
from eventtrain.subscribers.trackers.hyperparam_curve import HyperparamCurve, HyperparamCurveState, Value


class Points(NamedTuple):
    """One step's points of the curves of one group, such as ``epoch``."""

    step: int
    group: str
    values: Mapping[str, Number]

    def named(self) -> dict[str, Number]:
        """By the name of the curve: ``<group>/<name>``."""
        return {f"{self.group}/{name}": value for name, value in self.values.items()}


class TrackedCurves:
    """Turns events, in their order, into points of ``epoch/...``, ``eval/...`` and ``hyperparams/...``, none twice."""

    events = (RunStarted, EpochStarted, StepsCompleted, EvalCompleted, HyperparamChanged, EpochCompleted)
    """What it has to hear of."""

    def __init__(self) -> None:
        self._hyperparams = HyperparamCurve()
        self.evaluated_at = -1
        """The step of the last evaluation there are points of; together with ``state`` what survives a restart."""

    def points(self, event: Event) -> list[Points]:
        """What ``event`` adds; an event of another kind adds nothing."""
        match event:
            case StepsCompleted():
                return self.due(event.last_step)
            case HyperparamChanged():
                return _of_hyperparams(self._hyperparams.changed(event))
            case EpochCompleted():
                return [
                    *_of_hyperparams(self._hyperparams.completed(event)),
                    *_of_metrics(event.step, "epoch", event.metrics),
                ]
            case EvalCompleted() if (
                event.step > self.evaluated_at
            ):  # else a command evaluated at this very boundary
                self.evaluated_at = event.step
                return _of_metrics(event.step, "eval", event.metrics)
            case EpochStarted():
                self._hyperparams.started(event)
            case RunStarted():  # perhaps another trainer's, from the first step on
                self._hyperparams.begin(event.step)
                self.evaluated_at = min(self.evaluated_at, event.step)
            case _:
                pass
        return []

    def due(self, step: int) -> list[Points]:
        """What was noted of steps up to ``step``."""
        return _of_hyperparams(self._hyperparams.due(step))

    @property
    def state(self) -> HyperparamCurveState:
        """What ``restore`` takes."""
        return self._hyperparams.state

    def restore(self, state: HyperparamCurveState, evaluated_at: int) -> None:
        """Go on where these were read."""
        self._hyperparams.restore(state)
        self.evaluated_at = evaluated_at


def _of_hyperparams(values: Iterable[Value]) -> list[Points]:
    return [Points(step, "hyperparams", {name: value}) for step, name, value in values]


def _of_metrics(step: int, group: str, metrics: Mapping[str, Number]) -> list[Points]:
    return [Points(step, group, metrics)] if metrics else []
