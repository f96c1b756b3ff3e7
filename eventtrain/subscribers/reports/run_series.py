"""``RunSeries``: the metrics and hyperparameters of a run as curves, collected from its events. Pure.

Shared by what draws them: of the whole run, also of one that resumes, in bounded memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

from eventtrain.errors import StateError
from eventtrain.events import EpochCompleted, EpochStarted, EvalCompleted, HyperparamChanged, StepsCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.reports.downsampling import SavedThinned, Thinned

logger = logging.getLogger("eventtrain")

NAMES_KEPT = 200
"""Curves of each kind; metrics beyond that are left out, and that is said. At most 11 MiB a kind."""
CHANGES_KEPT = 200
"""Changes of hyperparameters of which the step is kept; the curve of the values is kept whole."""

COLLECTED = (EpochStarted, EpochCompleted, EvalCompleted, HyperparamChanged)
"""What ``RunSeries.take`` looks at, besides StepsCompleted."""


class Change(BaseModel):
    """A hyperparameter was changed: steps after ``step`` are computed with ``new``."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: int
    name: str
    old: Number
    new: Number
    by: str
    reason: str


class RunSeriesState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    steps: dict[str, SavedThinned]
    epochs: dict[str, SavedThinned]
    evaluations: dict[str, SavedThinned]
    hyperparams: dict[str, SavedThinned]
    changes: tuple[Change, ...]
    changed: int


@dataclass(frozen=True)
class Panel:
    """What is drawn together.

    Attributes:
        name: of the metric, without ``val_`` where its training twin is there too; or of the hyperparameter.
        steps, epochs: its value at each step, and its mean over each epoch, at the epoch's last step.
        evaluations: of the metric with ``val_``.
        hyperparam: the values of a hyperparameter; the others are None then.
    """

    name: str
    steps: Thinned | None = None
    epochs: Thinned | None = None
    evaluations: Thinned | None = None
    hyperparam: Thinned | None = None

    @property
    def curves(self) -> Iterable[Thinned]:
        """All that are there."""
        found = (self.steps, self.epochs, self.evaluations, self.hyperparam)
        return [curve for curve in found if curve is not None]


@dataclass
class RunSeries:
    """The curves of one run so far. One thread at a time.

    Attributes:
        metrics: names of those collected, each with its ``val_`` twin; None: all.
        steps, epochs, evaluations: metric -> its values at steps, its means of epochs, and those of evaluations, whose
            names begin with ``val_``.
        hyperparams: name -> its values; where it jumps there are two points of one step.
        changes: of hyperparameters, the first ``CHANGES_KEPT``.
        changed: how many there were.
    """

    metrics: tuple[str, ...] | None = None
    steps: dict[str, Thinned] = field(default_factory=dict[str, Thinned])
    epochs: dict[str, Thinned] = field(default_factory=dict[str, Thinned])
    evaluations: dict[str, Thinned] = field(default_factory=dict[str, Thinned])
    hyperparams: dict[str, Thinned] = field(default_factory=dict[str, Thinned])
    changes: list[Change] = field(default_factory=list[Change])
    changed: int = 0
    left_out: set[str] = field(default_factory=set[str])

    def take(self, event: object) -> None:
        """Take in what an event says."""
        match event:
            case StepsCompleted():
                steps = range(event.first_step, event.last_step + 1)
                for name, column in event.metrics.items():
                    if self._wants(name) and (curve := self._curve(self.steps, name)) is not None:
                        curve.add(steps, column)
            case EpochStarted():
                self._put(self.hyperparams, event.hyperparams, event.step)
            case EpochCompleted():
                means = {
                    name: value
                    for name, value in event.metrics.items()
                    if not name.startswith("val_") and self._wants(name)
                }
                self._put(self.epochs, means, event.step)
                self._put(self.hyperparams, event.hyperparams, event.step)
            case EvalCompleted():
                means = {f"val_{name}": value for name, value in event.metrics.items()}
                wanted = {name: value for name, value in means.items() if self._wants(name)}
                self._put(self.evaluations, wanted, event.step)
            case HyperparamChanged():
                name = event.path if event.path in self.hyperparams else event.name
                self._put(self.hyperparams, {name: event.old}, event.step)
                self._put(self.hyperparams, {name: event.new}, event.step)
                self.changed += 1
                if len(self.changes) < CHANGES_KEPT:
                    by = event.cause.subscriber if event.cause is not None else ""
                    self.changes.append(
                        Change(
                            step=event.step,
                            name=name,
                            old=event.old,
                            new=event.new,
                            by=by,
                            reason=event.reason,
                        )
                    )
            case _:
                pass

    def panels(self, hyperparams: Iterable[str] | None = None) -> list[Panel]:
        """What to draw: each metric together with its ``val_`` twin, in the order asked for, then hyperparameters.

        Args:
            hyperparams: names of those wanted; None: all.
        """
        found = dict.fromkeys([*self.epochs, *self.steps])
        for name in self.evaluations:
            twin = name.removeprefix("val_")
            if twin not in found:
                found[name] = None
        wanted = list(found)
        if self.metrics is not None:
            twins = [name if name in found else name.removeprefix("val_") for name in self.metrics]
            wanted = [name for name in dict.fromkeys(twins) if name in found]
        panels = [
            Panel(
                name,
                self.steps.get(name),
                self.epochs.get(name),
                self.evaluations.get(name if name.startswith("val_") else f"val_{name}"),
            )
            for name in wanted
        ]
        rates = self.hyperparams if hyperparams is None else [n for n in hyperparams if n in self.hyperparams]
        return [*panels, *(Panel(name, hyperparam=self.hyperparams[name]) for name in rates)]

    @property
    def marked(self) -> list[Change]:
        """The changes that can be marked: all, or none where there were more than are kept."""
        return self.changes if self.changed == len(self.changes) else []

    def copy(self) -> RunSeries:
        """As it is now; for another thread to draw."""
        return RunSeries(
            self.metrics,
            *(
                {name: curve.copy() for name, curve in kind.items()}
                for kind in (self.steps, self.epochs, self.evaluations, self.hyperparams)
            ),
            changes=list(self.changes),
            changed=self.changed,
            left_out=set(self.left_out),
        )

    @property
    def saved(self) -> RunSeriesState:
        """For a checkpoint."""
        return RunSeriesState(
            steps=_saved(self.steps),
            epochs=_saved(self.epochs),
            evaluations=_saved(self.evaluations),
            hyperparams=_saved(self.hyperparams),
            changes=tuple(self.changes),
            changed=self.changed,
        )

    def load(self, owner: str, saved: RunSeriesState) -> None:
        """Go on from ``saved``. Raises StateError where it holds no curves; ``owner`` is named in it."""
        try:
            kinds = [
                {name: Thinned.of(one) for name, one in kind.items()}
                for kind in (saved.steps, saved.epochs, saved.evaluations, saved.hyperparams)
            ]
        except ValueError as error:
            raise StateError(
                f"{owner} cannot take over its state: {error}. It is broken; start without it."
            ) from error
        self.steps, self.epochs, self.evaluations, self.hyperparams = kinds
        self.changes, self.changed = list(saved.changes), saved.changed

    def _wants(self, name: str) -> bool:
        return self.metrics is None or name in self.metrics or name.removeprefix("val_") in self.metrics

    def _put(self, curves: dict[str, Thinned], values: Mapping[str, Number], step: int) -> None:
        for name, value in values.items():
            curve = self._curve(curves, name)
            if curve is not None:
                curve.put(step, value)

    def _curve(self, curves: dict[str, Thinned], name: str) -> Thinned | None:
        curve = curves.get(name)
        if curve is None and len(curves) < NAMES_KEPT:
            curve = curves[name] = Thinned()
        elif curve is None and name not in self.left_out and len(self.left_out) < NAMES_KEPT:
            if not self.left_out:
                logger.warning("There are more than %d curves; %r and others are left out.", NAMES_KEPT, name)
            self.left_out.add(name)
        return curve


def _saved(curves: Mapping[str, Thinned]) -> dict[str, SavedThinned]:
    return {name: curve.saved for name, curve in curves.items()}
