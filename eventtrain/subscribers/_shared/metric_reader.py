"""``MetricReader``: reads one metric from events, and reports when it is missing."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping

from eventtrain.control.requests import TracedRun
from eventtrain.control.run_context import RunContext
from eventtrain.errors import ConfigurationError, did_you_mean
from eventtrain.events import EvalCompleted, Event
from eventtrain.events.models import Number

logger = logging.getLogger("eventtrain")

MOST_NAMES = 20
"""Names of metrics in one message."""


class MetricReader:
    """Reads one metric from events, and reports once when it is missing.

    Args:
        owner: the subscriber's name for messages.
        metric: its name.
        strict: a missing metric is an error instead of a warning.
        evaluates: the metrics are those of epochs of a run that evaluates. An epoch without any ``val_`` metric had no
            evaluation (EvaluateEvery), so a metric with this prefix is not missing yet.
    """

    def __init__(self, owner: str, metric: str, *, strict: bool = False, evaluates: bool = False) -> None:
        self.metric = metric
        self._owner = owner
        self._strict = strict
        self._evaluates = evaluates and metric.startswith("val_")
        self._without_evaluation = 0
        self._reported = False

    def for_run(self, owner: str, *, evaluates: bool = False) -> MetricReader:
        """Returns a reader of the same metric that has reported nothing yet; arguments as of the constructor."""
        return MetricReader(owner, self.metric, strict=self._strict, evaluates=evaluates)

    def look_up_in(self, run: RunContext, event: type[Event], *, unprefixed: bool = False) -> None:
        """Has the run fail before its first step if events of this class cannot have the metric. While it starts.

        Args:
            run: that starts.
            event: StepCompleted, EpochCompleted or EvalCompleted.
            unprefixed: as of ``read``.
        """

        def check(traced: TracedRun) -> None:
            if not traced.knows_evaluation and (event is EvalCompleted or self.metric.startswith("val_")):
                return
            known = traced.metrics[event]
            if (self.metric.removeprefix("val_") if unprefixed else self.metric) not in known:
                raise ConfigurationError(
                    self._explain([f"val_{name}" if unprefixed else name for name in known])
                )

        run.before_first_step(check)

    def read(self, metrics: Mapping[str, Number], *, unprefixed: bool = False) -> float | None:
        """Returns the value, or None if it is missing.

        Args:
            metrics: of an event.
            unprefixed: they are those of an evaluation, which lack the prefix ``val_`` of the epoch's.

        Raises:
            ConfigurationError: it is missing, and ``strict``.
        """
        value = metrics.get(self.metric.removeprefix("val_") if unprefixed else self.metric)
        if value is not None:
            return float(value)
        if self._evaluates and not any(name.startswith("val_") for name in metrics):
            self._without_evaluation += 1
        else:
            self._report(self._explain(metrics))
        return None

    def end(self) -> None:
        """Reports a run that ended before ``read`` returned a value.

        Raises:
            ConfigurationError: there was no evaluation, and ``strict``.
        """
        if self._without_evaluation:
            self._report(
                f"{self._owner} monitors {self.metric!r}, and the run ended before an epoch with an evaluation "
                f"({self._without_evaluation} without one), so it had no effect. Make EvaluateEvery(...) evaluate "
                "more often, or train longer."
            )

    def _report(self, message: str) -> None:
        if self._strict:
            raise ConfigurationError(message)
        if not self._reported:
            self._reported = True
            logger.warning("%s", message)

    def _explain(self, metrics: Iterable[str]) -> str:
        names = sorted(
            sorted(metrics), key=lambda name: -difflib.SequenceMatcher(None, self.metric, name).ratio()
        )
        listed = ", ".join(names[:MOST_NAMES]) or "none"
        if len(names) > MOST_NAMES:
            listed += f" and {len(names) - MOST_NAMES} more"
        if self.metric.startswith("val_") and not any(name.startswith("val_") for name in names):
            hint = (
                "Metrics of eval_data start with val_; does fit(...) have eval_data? With EvaluateEvery(...) only "
                "epochs with an evaluation have them."
            )
        else:
            hint = did_you_mean(self.metric, names)
        return (
            f"{self._owner} monitors {self.metric!r}, which is not among the metrics ({listed}), so it has no effect. "
            f"{hint}"
        ).rstrip()
