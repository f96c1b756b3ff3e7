"""``EvaluateEvery``: evaluates every n steps, epochs or seconds, instead of at the end of each epoch."""

from __future__ import annotations

from typing import Any

from eventtrain.errors import ConfigurationError
from eventtrain.events import RunStarted
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number


class EvaluateEvery(Subscriber):
    """Makes the loop evaluate on the run's ``eval_data`` at exactly these boundaries, and at no other.

    Args:
        steps: after each step whose number it divides, also in the middle of an epoch. Lightning:
            ``val_check_interval``.
        epochs: at the end of every ``epochs``-th epoch. Keras: ``validation_freq``; Lightning:
            ``check_val_every_n_epoch``.
        seconds: this long after the last evaluation that this requested, at the next step whose metrics arrive. It
            depends on the clock, so RunCompleted has ``deterministic=False``.

    Several may be given. Where they meet at one boundary there is one evaluation. ``EpochCompleted.metrics`` has the
    ``val_`` metrics of the last evaluation of its epoch, and none if there was no evaluation in it.

    A run without eval_fn or eval_data fails when it starts.

    Raises:
        ConfigurationError: no argument is given, or one is not positive.
    """

    @checked
    def __init__(
        self, *, steps: int | None = None, epochs: int | None = None, seconds: float | None = None
    ) -> None:
        if steps is None and epochs is None and seconds is None:
            raise ConfigurationError(
                "EvaluateEvery() would never evaluate. Give steps=, epochs= or seconds=; without EvaluateEvery there "
                "is an evaluation at the end of each epoch."
            )
        require_count("EvaluateEvery", "steps", steps, at_least=1, optional=True)
        require_count("EvaluateEvery", "epochs", epochs, at_least=1, optional=True)
        require_number("EvaluateEvery", "seconds", seconds, above=0, optional=True)
        self._plan: dict[str, Any] = {"every": steps, "every_epochs": epochs, "every_s": seconds}

    async def start(self, run: RunContext) -> None:
        """Registers the boundaries with the loop. Raises ConfigurationError if the run has nothing to evaluate on."""
        run.schedule_evaluations(self.name or "EvaluateEvery", **self._plan)

    async def on_run_started(self, event: RunStarted) -> None:
        """Does nothing: the loop follows the plan by itself, but every subscriber must handle an event."""
