"""``History``: the metrics of a run's epochs and steps, kept in memory as columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eventtrain.events import EpochCompleted, Event, StepsCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.optional_imports import import_optional, require_installed
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_choice, require_count
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.loggers.column_store import ColumnArray, ColumnStore, SavedColumns

if TYPE_CHECKING:
    import pandas

OWN = ("epoch", "step", "steps", "duration_s")
"""The first columns of ``History.epochs``."""


class HistoryState(SavedState):
    """State of a ``History``."""

    version: Literal[1] = 1
    epochs: SavedColumns
    steps: SavedColumns


class History(Subscriber):
    """Keeps the metrics and hyperparameters of each epoch, and optionally of each step.

    Args:
        steps: also keep every step's metrics, by windows: no event is built for a step.
        max_epochs, max_steps: rows kept; older ones are dropped and counted. A step takes 16 bytes and what its metrics
            take, twice that at most: of three float32, 100,000 steps are 2.8 to 5.6 MB in memory, and 3.7 MB in each
            checkpoint.

    A run that resumes has the history of the whole run. After the run, ``trainer.fit`` again adds to it. Any thread
    may read it, at any time.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    def __init__(self, steps: bool = False, *, max_epochs: int = 100_000, max_steps: int = 100_000) -> None:
        require_count("History", "max_epochs", max_epochs, at_least=1)
        require_count("History", "max_steps", max_steps, at_least=1)
        self.events = EpochCompleted | StepsCompleted if steps else EpochCompleted
        self._epochs = ColumnStore(max_epochs)
        self._steps = ColumnStore(max_steps)

    @property
    def epochs(self) -> dict[str, ColumnArray]:
        """One row for each epoch.

        ``epoch``, ``step`` (its last), ``steps``, ``duration_s``, then the metrics, those of evaluations with ``val_``,
        then the hyperparameters. A metric with one of the first four names is called ``metric_<name>``, a
        hyperparameter whose name is taken ``hyperparam_<name>``.
        """
        return self._epochs.columns()

    @property
    def steps(self) -> dict[str, ColumnArray]:
        """One row for each step: ``step``, ``epoch``, then the metrics, with the dtype they had on the device."""
        return self._steps.columns()

    @property
    def dropped_epochs(self) -> int:
        """Number of the oldest rows that were dropped."""
        return self._epochs.dropped

    @property
    def dropped_steps(self) -> int:
        """Number of the oldest rows that were dropped."""
        return self._steps.dropped

    def to_dataframe(self, rows: Literal["epochs", "steps"] = "epochs") -> pandas.DataFrame:
        """Returns ``epochs`` or ``steps`` as a pandas DataFrame.

        Raises:
            ConfigurationError: pandas is missing, or ``rows`` is neither.
        """
        require_choice("History.to_dataframe", "rows", rows, ("epochs", "steps"))
        frames = import_optional("pandas", extra="dataframe", used_by="History.to_dataframe()")
        require_installed(frames)
        return frames.DataFrame(self.epochs if rows == "epochs" else self.steps)

    async def start(self, run: RunContext) -> None:
        """Removes the rows of an attempt of which nothing was saved."""
        if run.restarts:
            self._epochs.clear()
            self._steps.clear()

    async def handle(self, event: Event) -> None:
        """Adds a row, or the rows of a window."""
        if isinstance(event, StepsCompleted):
            numbers = np.arange(event.first_step, event.last_step + 1)
            chunk = {"step": numbers, "epoch": np.full(len(numbers), event.epoch)}
            self._steps.add(_with_names(chunk, event.metrics, "metric"))
        elif isinstance(event, EpochCompleted):
            chunk = _with_names(
                _row({name: getattr(event, name) for name in OWN}), _row(event.metrics), "metric"
            )
            self._epochs.add(_with_names(chunk, _row(event.hyperparams), "hyperparam"))

    def state_dict(self) -> dict[str, Any]:
        """Returns all rows, as plain JSON data."""
        return HistoryState(epochs=self._epochs.saved, steps=self._steps.saved).model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the rows of a checkpoint.

        Raises:
            StateError: another version, or invalid data.
        """
        saved = HistoryState.parse(self.name or "History", state)
        self._epochs.load(saved.epochs)
        self._steps.load(saved.steps)


def _row(values: Mapping[str, Number]) -> dict[str, ColumnArray]:
    columns = {name: np.asarray([value]) for name, value in values.items()}
    return {name: c if c.dtype.kind in "biuf" else c.astype(np.float64) for name, c in columns.items()}


def _with_names(
    columns: Mapping[str, ColumnArray], more: Mapping[str, ColumnArray], prefix: str
) -> dict[str, ColumnArray]:
    """Returns both; the names of ``more`` that are taken get ``prefix``."""
    together = dict(columns)
    for name, column in more.items():
        free = name
        while free in together or (free != name and free in more):
            free = f"{prefix}_{free}"
        together[free] = column
    return together
