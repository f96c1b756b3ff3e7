"""``ReduceLROnPlateau``: a smaller learning rate when a metric no longer improves."""

from __future__ import annotations

from typing import Any

import numpy as np

from eventtrain.control import Control
from eventtrain.errors import ConfigurationError
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


class ReduceLROnPlateau(Subscriber):
    """Multiplies a hyperparameter by ``factor`` before the next epoch begins (``lag=0``), as Keras 3 does.

    Args:
        monitor: name of a metric of EpochCompleted.
        factor: between 0 and 1.
        patience: cut at the ``patience``-th epoch in a row without an improvement (0 and 1 both: at the first).
        mode: "min", "max", or "auto" by the metric's name.
        min_delta: how much better counts as an improvement.
        cooldown: so many epochs after a cut do not count; the one that ends it does.
        min_lr: the value is never cut below it.
        hyperparam: its name in ``optax.inject_hyperparams``.

    The count begins anew with every ``fit``, unless a saved state was loaded. An epoch whose metrics lack ``monitor``
    does not count; a NaN counts as no improvement.

    Raises:
        ConfigurationError: a factor not between 0 and 1, negative counts, an unknown mode, a metric whose direction
            cannot be told; in the handler, and so by SubscriberFailed: the optimiser has no such hyperparameter.
    """

    lag = 0

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        mode: Mode = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0,
        hyperparam: str = "learning_rate",
    ) -> None:
        self._monitor = make_monitor("ReduceLROnPlateau", monitor, mode, min_delta)
        require_number("ReduceLROnPlateau", "factor", factor)
        if not 0 < factor < 1:
            raise ConfigurationError(
                f"ReduceLROnPlateau(factor={factor!r}): the hyperparameter is multiplied by it, so it has to lie "
                "between 0 and 1, both excluded."
            )
        require_count("ReduceLROnPlateau", "patience", patience)
        require_count("ReduceLROnPlateau", "cooldown", cooldown)
        require_number("ReduceLROnPlateau", "min_lr", min_lr)
        if min_lr < 0:
            raise ConfigurationError(f"ReduceLROnPlateau(min_lr={min_lr!r}): needs a number of at least 0.")
        self._factor = factor
        self._patience = patience
        self._cooldown = cooldown
        self._min_lr = min_lr
        self._hyperparam = hyperparam
        self._loaded = False
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        """The best value so far; None before the first."""
        self.wait = 0
        """Epochs since the last improvement or cut."""
        self.cooldown_counter = 0
        self._warned = False

    async def start(self, run: RunContext) -> None:
        """Begin anew, unless a saved state was loaded."""
        if not self._loaded:
            self._reset()

    async def stop(self) -> None:
        """The next run begins anew."""
        self._loaded = False

    async def on_epoch_completed(self, event: EpochCompleted, control: Control) -> None:
        """Count, and cut when patience is at its end."""
        value = self._monitor.read(event.metrics)
        if value is None:
            if not self._warned:
                self._warned = True
                warn_missing(self.name or "ReduceLROnPlateau", self._monitor.metric, event.metrics)
            return
        if self._hyperparam not in event.hyperparams:
            raise ConfigurationError(
                f"ReduceLROnPlateau(hyperparam={self._hyperparam!r}): the optimiser has no such hyperparameter; it has "
                f"{', '.join(event.hyperparams) or 'none'}. Build it with optax.inject_hyperparams."
            )
        if self._is_due(value, event.hyperparams[self._hyperparam]):
            best = "nothing" if self.best is None else f"{self.best:.6g}"
            comparison = f"{self._monitor.metric} {value:.6g} is no improvement on {best}"
            control.scale_hyperparam(
                self._hyperparam,
                self._factor,
                minimum=self._min_lr,
                reason=f"plateau: {comparison} (patience {self._patience})",
            )

    def _is_due(self, value: float, current: float) -> bool:
        """Keras' state machine (``ReduceLROnPlateau.on_epoch_end``)."""
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.wait = 0
        if self._monitor.improves(value, self.best):
            self.best = value
            self.wait = 0
        elif self.cooldown_counter == 0:
            self.wait += 1
            # In float32, as Keras compares: the device holds 0.001 as 0.0010000000475, which is no reason for a cut.
            if self.wait >= self._patience and np.float32(current) > np.float32(self._min_lr):
                self.cooldown_counter = self._cooldown
                self.wait = 0
                return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """The count so far, as plain JSON data."""
        return {
            "version": STATE_VERSION,
            "best": best_to_json(self.best),
            "wait": self.wait,
            "cooldown_counter": self.cooldown_counter,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the count over; the run that follows goes on with it."""
        check_version("ReduceLROnPlateau", state, STATE_VERSION)
        self.best = None if state["best"] is None else float(state["best"])
        self.wait = state["wait"]
        self.cooldown_counter = state["cooldown_counter"]
        self._loaded = True
