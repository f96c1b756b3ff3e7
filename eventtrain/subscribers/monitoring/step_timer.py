"""``StepTimer``: how long steps take and where the time goes, in examples and in floating-point operations a second."""

from __future__ import annotations

from collections import deque
from datetime import datetime
from functools import partial

import numpy as np

from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    MachineMeasured,
    RunResumed,
    RunStarted,
    StepsCompleted,
)
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber

WINDOWS_KEPT = 10_000
"""Quantiles are of so many of the newest windows at most."""


class StepTimer(Subscriber):
    """Publishes a ``MachineMeasured`` at the end of each epoch, of the steps since the one before.

    Its ``metrics``:

    - ``step_s``, ``step_s_p50``, ``step_s_p90``, ``step_s_p99``, ``steps_per_s``: the time from one step's completion
      to the next one's. It is taken from windows of metrics, so that steps shorter than the trainer's
      ``flush_interval_s`` count with the mean of their window. Evaluations are left out;
    - ``data_wait_s``, ``dispatch_s``, ``device_wait_s``, ``observer_wait_s``, ``observing_s``: of the training thread,
      for each step (``LoopStatistics``). Where ``device_wait_s`` is above 0, ``step_s`` is the time of the device;
    - ``examples_per_s``, where ``examples`` is given;
    - ``flops_per_step`` and ``flops_per_s`` of one device, where XLA estimates them; ``mfu``, their share of
      ``peak_flops``, where that is given. XLA counts the body of a loop once where it cannot tell how often it runs.

    Args:
        examples: how many there are in a batch; or the name of the metric that says so.
        peak_flops: floating-point operations that one device can do in a second, in the precision of the model.
        every_steps: publish after so many steps as well.

    Raises:
        ConfigurationError: an argument cannot work.
    """

    def __init__(
        self,
        *,
        examples: int | str | None = None,
        peak_flops: float | None = None,
        every_steps: int | None = None,
    ) -> None:
        if isinstance(examples, str):
            if not examples:
                raise ConfigurationError("StepTimer(examples=''): needs the name of a metric, or a number.")
        elif examples is not None:
            require_count("StepTimer", "examples", examples, at_least=1)
        if peak_flops is not None:
            require_number("StepTimer", "peak_flops", peak_flops, above=0)
        if every_steps is not None:
            require_count("StepTimer", "every_steps", every_steps, at_least=1)
        self._examples_from = examples
        self._peak_flops = peak_flops
        self._every_steps = every_steps
        self._run: RunContext | None = None
        self._flops: float | None = None
        self._asked_for_flops = False
        self._last: datetime | None = None
        self._before = LoopStatistics()
        self._forget()

    def _forget(self) -> None:
        self._windows: deque[tuple[float, int]] = deque(maxlen=WINDOWS_KEPT)
        self._steps = 0
        self._seconds = 0.0
        self._examples = 0.0

    async def start(self, run: RunContext) -> None:
        """Begin anew."""
        self._run, self._last, self._before = run, None, LoopStatistics()
        self._asked_for_flops, self._flops = False, None
        self._forget()

    async def on_run_started(self, event: RunStarted) -> None:
        """Nothing is measured yet."""
        self._last = None

    async def on_run_resumed(self, event: RunResumed) -> None:
        """The time before the first window is not one of steps."""
        self._last = None

    async def on_epoch_started(self, event: EpochStarted) -> None:
        """The next step's time begins here."""
        self._last = event.time

    async def on_eval_completed(self, event: EvalCompleted) -> None:
        """The next step's time begins here."""
        self._last = event.time

    async def on_steps_completed(self, event: StepsCompleted) -> None:
        """Take the time of a window."""
        last, self._last = self._last, event.time
        if last is None:
            return
        steps, seconds = event.last_step - event.first_step + 1, max(0.0, (event.time - last).total_seconds())
        self._windows.append((seconds / steps, steps))
        self._steps += steps
        self._seconds += seconds
        if isinstance(self._examples_from, int):
            self._examples += self._examples_from * steps
        elif self._examples_from in event.metrics:
            self._examples += float(event.metrics[self._examples_from].sum())
        if self._every_steps is not None and self._steps >= self._every_steps:
            await self._publish(event.step)

    async def on_epoch_completed(self, event: EpochCompleted) -> None:
        """Publish what the epoch has shown."""
        await self._publish(event.step)

    async def _publish(self, step: int) -> None:
        run = self._run
        if run is None or not self._steps or not self._seconds:
            return
        if not self._asked_for_flops:
            self._asked_for_flops = True
            self._flops = await in_own_thread(partial(_flops, run))
        metrics = self._figures(run.loop_statistics())
        self._forget()
        source = self.name or "StepTimer"
        await run.publish_async(MachineMeasured(step=step, source=source, metrics=metrics))

    def _figures(self, now: LoopStatistics) -> dict[str, Number]:
        step_s, steps = zip(*self._windows, strict=True)
        p50, p90, p99 = np.quantile(step_s, (0.5, 0.9, 0.99), weights=steps, method="inverted_cdf").tolist()
        steps_per_s = self._steps / self._seconds
        figures: dict[str, Number] = {
            "step_s": self._seconds / self._steps,
            "step_s_p50": p50,
            "step_s_p90": p90,
            "step_s_p99": p99,
            "steps_per_s": steps_per_s,
        }
        before, self._before = self._before, now
        dispatched = now.steps - before.steps
        if dispatched:
            for part in ("data_wait_s", "dispatch_s", "device_wait_s", "observer_wait_s", "observing_s"):
                figures[part] = (getattr(now, part) - getattr(before, part)) / dispatched
        if self._examples:
            figures["examples_per_s"] = self._examples / self._seconds
        if self._flops is not None:
            figures["flops_per_step"] = self._flops
            figures["flops_per_s"] = self._flops * steps_per_s
            if self._peak_flops is not None:
                figures["mfu"] = self._flops * steps_per_s / self._peak_flops
        return figures


def _flops(run: RunContext) -> float | None:
    """XLA's estimate for one step; None where there is none. Blocks."""
    program = run.program()
    flops = program.cost.get("flops", 0.0) if program is not None else 0.0
    return flops if flops > 0 else None
