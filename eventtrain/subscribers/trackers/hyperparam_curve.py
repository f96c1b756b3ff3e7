"""``HyperparamCurve``: hyperparameters as curves over the steps, with one value at most for each step. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from eventtrain.events import EpochCompleted, EpochStarted, HyperparamChanged


class Value(NamedTuple):
    """The value that step ``step`` was computed with."""

    step: int
    name: str
    value: float


class HyperparamCurveState(BaseModel):
    """What survives a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    last: dict[str, tuple[int, float]] = {}
    waiting: dict[str, tuple[int, float]] = {}


class HyperparamCurve:
    """Turns events, in their order, into values: the first, one at each change, one at the end of each epoch.

    A change at boundary k is a value of step k + 1, the first computed with it. It is given once step k + 1 is known
    to be there: several changes at one boundary are one value, the last.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}
        self._waiting: dict[str, tuple[int, float]] = {}

    def begin(self, step: int) -> None:
        """A run begins after ``step``: forget what was said of later ones."""
        self._last = {name: given for name, given in self._last.items() if given[0] <= step}
        self._waiting = {name: noted for name, noted in self._waiting.items() if noted[0] <= step + 1}

    def started(self, event: EpochStarted) -> None:
        """Note values not known yet."""
        for name, value in event.hyperparams.items():
            if name not in self._last and name not in self._waiting:
                self._waiting[name] = (event.step + 1, float(value))

    def changed(self, event: HyperparamChanged) -> list[Value]:
        """Note a change; what is due before it."""
        due = self.due(event.step)
        known = event.name in self._last or event.name in self._waiting
        self._waiting[event.name if known else event.path] = (event.step + 1, float(event.new))
        return due

    def due(self, step: int) -> list[Value]:
        """What was noted of steps up to ``step``, in order."""
        return sorted(self._take(step))

    def completed(self, event: EpochCompleted) -> list[Value]:
        """What is due at the end of an epoch, with the values of its last step."""
        values = self.due(event.step)
        for name, shown in event.hyperparams.items():
            at, value = self._last.get(name, (-1, float(shown)))
            if name not in self._waiting:
                value = float(
                    shown
                )  # else it was changed at this very boundary, and the last step had the old value
            if at < event.step:
                self._last[name] = (event.step, value)
                values.append(Value(event.step, name, value))
        return values

    def _take(self, step: int) -> Iterator[Value]:
        for name, (at, value) in list(self._waiting.items()):
            if at <= step:
                del self._waiting[name]
                self._last[name] = (at, value)
                yield Value(at, name, value)

    @property
    def state(self) -> HyperparamCurveState:
        """What ``restore`` takes."""
        return HyperparamCurveState(last=dict(self._last), waiting=dict(self._waiting))

    def restore(self, state: HyperparamCurveState) -> None:
        """Go on where ``state`` was read."""
        self._last, self._waiting = dict(state.last), dict(state.waiting)
