"""``RunSeries``: the metrics and hyperparameters of a run as curves, in bounded memory. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field

from eventtrain.events import EpochCompleted, EpochStarted, EvalCompleted, HyperparamChanged, StepsCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.curve import Curve, StateCurve
from eventtrain.subscribers._shared.display_text import issuer
from eventtrain.subscribers._shared.state import SavedState

logger = logging.getLogger("eventtrain")

MOST_CURVES = 200
"""Curves of each kind; more metrics are left out, with a warning. At most 11 MiB a kind."""
MOST_CHANGES = 200
"""Changes of hyperparameters whose steps are kept; the curve of the values is complete."""
MOST_PANELS = 24
"""Metrics that are drawn if none are named: a picture of more would be too small to read."""

COLLECTED = (EpochStarted, EpochCompleted, EvalCompleted, HyperparamChanged)
"""Events for ``RunSeries.add``, besides StepsCompleted."""
KINDS = ("steps", "epochs", "evaluations", "hyperparams")


class Change(BaseModel):
    """Change of a hyperparameter: steps after ``step`` are computed with ``new``."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: int
    name: str
    old: Number
    new: Number
    by: str
    reason: str


@dataclass(frozen=True)
class Panel:
    """Curves that are drawn in the same axes.

    Attributes:
        name: of the metric, without ``val_`` if the metric of training is there too; or of the hyperparameter.
        steps, epochs: the metric's value at each step, and its mean over each epoch, at the epoch's last step.
        evaluations: the metric with ``val_``.
        hyperparam: the values of a hyperparameter; the others are None then.
    """

    name: str
    steps: Curve | None = None
    epochs: Curve | None = None
    evaluations: Curve | None = None
    hyperparam: Curve | None = None

    @property
    def curves(self) -> list[Curve]:
        """All curves."""
        found = (self.steps, self.epochs, self.evaluations, self.hyperparam)
        return [curve for curve in found if curve is not None]


class RunSeries(SavedState):
    """The curves of one run so far; also the state in a checkpoint. One thread at a time.

    Attributes:
        metrics: names of those to collect, each together with its ``val_`` metric; None: all. Not saved.
        steps, epochs, evaluations: metric -> its values at steps, its means over epochs, and its values in
            evaluations, under names that begin with ``val_``.
        hyperparams: name -> its values; at a change there are two points of one step.
        changes: of hyperparameters, the first ``MOST_CHANGES``.
        changed: number of all changes.
        left_out: names of metrics that are not collected because there are too many. Not saved.
    """

    model_config = ConfigDict(extra="forbid", frozen=False, ser_json_inf_nan="strings")

    version: Literal[1] = 1
    metrics: tuple[str, ...] | None = Field(default=None, exclude=True)
    steps: dict[str, StateCurve] = Field(default_factory=dict[str, Curve])
    epochs: dict[str, StateCurve] = Field(default_factory=dict[str, Curve])
    evaluations: dict[str, StateCurve] = Field(default_factory=dict[str, Curve])
    hyperparams: dict[str, StateCurve] = Field(default_factory=dict[str, Curve])
    changes: list[Change] = Field(default_factory=list[Change])
    changed: int = 0
    left_out: set[str] = Field(default_factory=set[str], exclude=True)

    def add(self, event: object) -> None:
        """Adds the values of an event to the curves."""
        match event:
            case StepsCompleted():
                steps = range(event.first_step, event.last_step + 1)
                for name, column in event.metrics.items():
                    self.add_column(name, steps, column)
            case EpochStarted():
                self._put(self.hyperparams, event.hyperparams, event.step)
            case EpochCompleted():
                means = {name: mean for name, mean in event.metrics.items() if not name.startswith("val_")}
                self._put(self.epochs, means, event.step)
                self._put(self.hyperparams, event.hyperparams, event.step)
            case EvalCompleted():
                values = {f"val_{name}": value for name, value in event.metrics.items()}
                self._put(self.evaluations, values, event.step)
            case HyperparamChanged():
                name = event.path if event.path in self.hyperparams else event.name
                self._put(self.hyperparams, {name: event.old}, event.step)
                self._put(self.hyperparams, {name: event.new}, event.step)
                self._note_change(name, event)
            case _:
                pass

    def add_column(self, name: str, steps: ArrayLike, values: ArrayLike) -> None:
        """Adds the values of a metric at some steps, which files have without a StepsCompleted."""
        if (curve := self._curve(self.steps, name)) is not None:
            curve.add(steps, values)

    def add_evaluation(self, name: str, value: Number, step: int) -> None:
        """Adds one value of an evaluation; ``name`` begins with ``val_``."""
        self._put(self.evaluations, {name: value}, step)

    def panels(self, hyperparams: Iterable[str] | None = None, *, most: int | None = None) -> list[Panel]:
        """Returns what to draw: metrics, each together with its ``val_`` metric, then hyperparameters.

        Args:
            hyperparams: names of those to draw, in this order; None: all.
            most: limit of metrics that are not named by ``self.metrics``.
        """
        panels = [
            Panel(
                name,
                self.steps.get(name),
                self.epochs.get(name),
                self.evaluations.get(name if name.startswith("val_") else f"val_{name}"),
            )
            for name in self.metric_names()[: most if self.metrics is None else None]
        ]
        names = self.hyperparams if hyperparams is None else hyperparams
        rates = [name for name in names if name in self.hyperparams]
        return [*panels, *(Panel(name, hyperparam=self.hyperparams[name]) for name in rates)]

    def changing_hyperparams(self) -> list[str]:
        """Returns the names of the hyperparameters that had more than one value."""
        return [name for name, curve in self.hyperparams.items() if not curve.is_constant()]

    def metric_names(self) -> list[str]:
        """Returns the names of the metric panels, in the order of ``self.metrics`` if it is given."""
        found = dict.fromkeys([*self.epochs, *self.steps])
        for name in self.evaluations:
            if name.removeprefix("val_") not in found:
                found[name] = None
        if self.metrics is None:
            return list(found)
        named = [name if name in found else name.removeprefix("val_") for name in self.metrics]
        return [name for name in dict.fromkeys(named) if name in found]

    @property
    def marked(self) -> list[Change]:
        """The changes to mark: all, or none if there were more than are kept."""
        return self.changes if self.changed == len(self.changes) else []

    def copied(self) -> RunSeries:
        """Returns a copy, for another thread to draw."""
        curves: dict[str, Any] = {
            kind: {name: curve.copy() for name, curve in getattr(self, kind).items()} for kind in KINDS
        }
        return self.model_copy(update={**curves, "changes": list(self.changes)})

    def _note_change(self, name: str, event: HyperparamChanged) -> None:
        self.changed += 1
        if len(self.changes) < MOST_CHANGES:
            by, reason = issuer(event), event.reason
            self.changes.append(
                Change(step=event.step, name=name, old=event.old, new=event.new, by=by, reason=reason)
            )

    def _put(self, curves: dict[str, Curve], values: Mapping[str, Number], step: int) -> None:
        for name, value in values.items():
            if (curve := self._curve(curves, name)) is not None:
                curve.put(step, value)

    def _curve(self, curves: dict[str, Curve], name: str) -> Curve | None:
        """Returns the curve of ``name``, new if necessary; None if it is not collected."""
        if curves is not self.hyperparams and not self._is_wanted(name):
            return None
        curve = curves.get(name)
        if curve is None and len(curves) < MOST_CURVES:
            curve = curves[name] = Curve()
        elif curve is None and name not in self.left_out and len(self.left_out) < MOST_CURVES:
            if not self.left_out:
                logger.warning(
                    "There are more than %d curves; %r and others are left out.", MOST_CURVES, name
                )
            self.left_out.add(name)
        return curve

    def _is_wanted(self, name: str) -> bool:
        return self.metrics is None or name in self.metrics or name.removeprefix("val_") in self.metrics
