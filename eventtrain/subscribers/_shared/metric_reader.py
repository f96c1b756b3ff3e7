"""``MetricReader``: one metric out of events' metrics, and what to say when it is not there. Shared by all policies."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping

from eventtrain.errors import ConfigurationError
from eventtrain.events.models import Number

logger = logging.getLogger("eventtrain")


class MetricReader:
    """Finds one metric in events' metrics, and says once when it is not there.

    Args:
        owner: the subscriber's name in messages.
        metric: its name.
        strict: a metric that is not there is an error instead of a warning.
        evaluates: the metrics are those of epochs of a run that evaluates. One without any ``val_`` metric then had no
            evaluation (EvaluateEvery), so a metric with this prefix is not missing yet.
    """

    def __init__(self, owner: str, metric: str, *, strict: bool = False, evaluates: bool = False) -> None:
        self.metric = metric
        self._owner = owner
        self._strict = strict
        self._evaluates = evaluates and metric.startswith("val_")
        self._without_evaluation = 0
        self._said = False

    def read(self, metrics: Mapping[str, Number], *, unprefixed: bool = False) -> float | None:
        """The value, or None where it is missing.

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
            self._complain(self._explain(metrics))
        return None

    def end(self) -> None:
        """The run has ended, and ``read`` never gave a value.

        Raises:
            ConfigurationError: that was for want of an evaluation, and ``strict``.
        """
        if self._without_evaluation:
            self._complain(
                f"{self._owner} watches {self.metric!r}, and the run ended before an epoch with an evaluation "
                f"({self._without_evaluation} without one), so it decided nothing. Have EvaluateEvery(...) evaluate "
                "more often, or train longer."
            )

    def _complain(self, message: str) -> None:
        if self._strict:
            raise ConfigurationError(message)
        if not self._said:
            self._said = True
            logger.warning("%s", message)

    def _explain(self, metrics: Mapping[str, Number]) -> str:
        names = sorted(metrics, key=lambda name: -difflib.SequenceMatcher(None, self.metric, name).ratio())
        hint = (
            " Metrics of eval_data start with val_; does fit(...) have eval_data? With EvaluateEvery(...) only "
            "epochs in which it evaluates have them."
            if self.metric.startswith("val_")
            else ""
        )
        return (
            f"{self._owner} watches {self.metric!r}, which is not among the metrics there are "
            f"({', '.join(names) or 'none'}), so it decides nothing.{hint}"
        )
