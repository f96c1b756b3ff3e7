"""``EarlyStopping``: end the run when a metric no longer improves."""

from __future__ import annotations

from typing import Any

from eventtrain.control import Control
from eventtrain.events import EpochCompleted
from eventtrain.subscriber import RunContext, Subscriber
from eventtrain.subscribers.monitor import (
    Mode,
    best_to_json,
    check_version,
    make_monitor,
    require_count,
    require_number,
    warn_missing,
)

STATE_VERSION = 1


class EarlyStopping(Subscriber):
    """Stops the run at the end of an epoch, before the next one begins (``lag=0``), as Keras 3 does.

    Args:
        monitor: name of a metric of EpochCompleted.
        min_delta: how much better counts as an improvement.
        patience: stop at the ``patience``-th epoch in a row without one (0 and 1 both: at the first), never at epoch 0.
        mode: "min", "max", or "auto" by the metric's name.
        baseline: improvements below it do not start the count anew, and never stop the run themselves.
        start_from_epoch: earlier epochs (0-based) are not looked at.

    The count begins anew with every ``fit``, unless a saved state was loaded. An epoch whose metrics lack ``monitor``
    does not count; a NaN counts as no improvement.

    Raises:
        ConfigurationError: a negative patience, an unknown mode, a metric whose direction cannot be told.
    """

    lag = 0

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0,
        patience: int = 0,
        mode: Mode = "auto",
        baseline: float | None = None,
        start_from_epoch: int = 0,
    ) -> None:
        self._monitor = make_monitor("EarlyStopping", monitor, mode, min_delta)
        require_count("EarlyStopping", "patience", patience)
        require_count("EarlyStopping", "start_from_epoch", start_from_epoch)
        if baseline is not None:
            require_number("EarlyStopping", "baseline", baseline)
        self._patience = patience
        self._baseline = baseline
        self._start_from_epoch = start_from_epoch
        self._loaded = False
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        """The best value so far; None before the first."""
        self.best_epoch: int | None = None
        self.wait = 0
        """Epochs since the last improvement that counted."""
        self._warned = False

    async def start(self, run: RunContext) -> None:
        """Begin anew, unless a saved state was loaded."""
        if not self._loaded:
            self._reset()

    async def stop(self) -> None:
        """The next run begins anew."""
        self._loaded = False

    async def on_epoch_completed(self, event: EpochCompleted, control: Control) -> None:
        """Count, and stop the run when patience is at its end."""
        value = self._monitor.read(event.metrics)
        if value is None and not self._warned:
            self._warned = True
            warn_missing(self.name or "EarlyStopping", self._monitor.metric, event.metrics)
        if value is None or event.epoch < self._start_from_epoch:
            return
        if self._is_over(value, event.epoch):
            control.stop(reason=self._explain(event.epoch))

    def _is_over(self, value: float, epoch: int) -> bool:
        """Keras' state machine (``EarlyStopping.on_epoch_end``)."""
        self.wait += 1
        if self._monitor.improves(value, self.best):
            self.best = value
            self.best_epoch = epoch
            if self._baseline is None or self._monitor.improves(value, self._baseline):
                self.wait = 0
            return False
        return self.wait >= self._patience and epoch > 0

    def _explain(self, epoch: int) -> str:
        metric = self._monitor.metric
        if self.best is None or self.best_epoch is None:
            return f"early stopping: {metric} was never a number"
        return (
            f"early stopping: {metric} has not improved for {epoch - self.best_epoch} epochs "
            f"(best {self.best:.6g} in epoch {self.best_epoch + 1}, patience {self._patience})"
        )

    def state_dict(self) -> dict[str, Any]:
        """The count so far, as plain JSON data."""
        return {
            "version": STATE_VERSION,
            "best": best_to_json(self.best),
            "best_epoch": self.best_epoch,
            "wait": self.wait,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the count over; the run that follows goes on with it."""
        check_version("EarlyStopping", state, STATE_VERSION)
        self.best = None if state["best"] is None else float(state["best"])
        self.best_epoch = state["best_epoch"]
        self.wait = state["wait"]
        self._loaded = True
