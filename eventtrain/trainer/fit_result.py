"""``FitResult``: what ``fit`` returns, and how a notebook shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted
from eventtrain.notebook import html
from eventtrain.subscribers._shared.metric_html import metrics_html
from eventtrain.subscribers._shared.run_series import MOST_PANELS, RunSeries
from eventtrain.subscribers.loggers.history import OWN, epoch_columns
from eventtrain.validation.annotations import fits, shown
from eventtrain.validation.arguments import require_choice
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

S = TypeVar("S")

MOST_LEFT = 10
"""Subscriptions with undelivered events that a notebook shows."""


@dataclass(frozen=True)
class FitResult(Generic[S]):
    """The result of ``fit``. Its repr leaves out the state and the history, which may fill many screens.

    Attributes:
        state: the state reached, on the device. It belongs to the caller. With a step extension whose ``use_for`` has
            "final" it holds the weights of the extension; ``trainer.state`` holds those that training continues with.
        step: updates completed over the trainer's life.
        epochs_completed: of this call.
        stop_reason: "completed", or the reason given to ``control.stop``, "interrupted", "preempted", "cancelled".
        history: the EpochCompleted events of this call, of more than 10,000 epochs the newest 10,000. All are in a log,
            and ``subscribers.History(max_epochs=...)`` keeps as many as you want.
        undelivered: subscription name -> events not handled within ``drain_timeout_s``, and rows or messages that its
            subscriber could not write or send (``Subscriber.unwritten``); empty if there are none.
    """

    state: S = field(repr=False)
    step: int
    epochs_completed: int
    stop_reason: str
    history: list[EpochCompleted] = field(repr=False)
    undelivered: Mapping[str, int]

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns a row for each epoch of ``history``, as ``subscribers.History.to_dataframe`` does.

        Raises:
            ConfigurationError: pandas is missing.
        """
        frames = import_optional("pandas", extra="dataframe", used_by="FitResult.to_dataframe()")
        require_installed(frames)
        return frames.DataFrame(epoch_columns(self.history))

    def plot(
        self,
        metrics: Sequence[str] | None = None,
        *,
        scale: Literal["auto", "linear", "log"] = "auto",
        theme: Literal["light", "dark"] = "light",
    ) -> Figure:
        """Returns a matplotlib figure of ``history``: each metric over the epochs with its ``val_`` metric.

        A notebook shows it, and ``figure.savefig(path)`` writes it. pyplot does not know it.

        Args:
            metrics: names of those to draw; None: the first 24. Hyperparameters that changed are drawn after them.
            scale: of the metrics; "auto": logarithmic if all values are positive and the highest is 100 times the
                lowest.
            theme: its colours.

        Raises:
            ConfigurationError: matplotlib is missing, or an argument is invalid.
        """
        require_choice("FitResult.plot", "scale", scale, ("auto", "linear", "log"))
        require_choice("FitResult.plot", "theme", theme, ("light", "dark"))
        if isinstance(metrics, str) or not fits(metrics, Sequence[str] | None):
            raise ConfigurationError(
                f"FitResult.plot: metrics must be a tuple of names, such as ('loss',), got {shown(metrics)}."
            )
        plotting = import_optional(
            "eventtrain.subscribers.reports.plotting", extra="plots", used_by="FitResult.plot()"
        )
        require_installed(plotting)
        series = RunSeries(metrics=None if metrics is None else tuple(metrics))
        for event in self.history:
            series.add(event)
            for name, value in event.metrics.items():
                if name.startswith("val_"):
                    series.add_evaluation(name, value, event.step)
        return plotting.figure(
            series.panels(series.changing_hyperparams(), most=MOST_PANELS),
            (),
            title=f"step {self.step:,}: {self.stop_reason}",
            colours=plotting.LIGHT if theme == "light" else plotting.DARK,
            scale=scale,
        )

    def _repr_html_(self) -> str:
        note = f"step {self.step:,}, {self.epochs_completed:,} epochs"
        left = [
            (f"not handled by {name}", f"{count:,} events or rows")
            for name, count in self.undelivered.items()
        ]
        table = metrics_html(epoch_columns(self.history), {}, OWN)
        return html.box(html.title(self.stop_reason, note), html.facts(left[:MOST_LEFT]), table)
