"""``StepTimer``: time of steps and of their parts, in examples and in floating-point operations a second."""

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
    Event,
    MachineMeasured,
    RunResumed,
    RunStarted,
    StepsCompleted,
)
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number

WINDOWS_KEPT = 10_000
"""Quantiles are of this many of the newest windows at most."""


class StepTimer(Subscriber):
    """Publishes a ``MachineMeasured`` at the end of each epoch, of the steps since the one before.

    Its ``metrics``:

    - ``step_s``, ``step_s_p50``, ``step_s_p90``, ``step_s_p99``, ``steps_per_s``: the time from one step's completion
      to the next one's. It is taken from windows of metrics, so steps shorter than the trainer's ``flush_interval_s``
      count with the mean of their window. Evaluations are left out;
    - ``data_wait_s``, ``dispatch_s``, ``device_wait_s``, ``observer_wait_s``, ``observing_s``: of the training thread,
      for each step (``LoopStatistics``). If ``device_wait_s`` is above 0, ``step_s`` is the time of the device;
    - ``examples_per_s``, if ``examples`` is given;
    - ``flops_per_step`` and ``flops_per_s`` of one device, if XLA estimates them; ``mfu``, their share of
      ``peak_flops``, if that is given. XLA counts the body of a loop once if it cannot tell how often it runs.

    Args:
        examples: number of examples in a batch, or name of the metric that has it.
        peak_flops: floating-point operations that one device can do in a second, in the precision of the model.
        every_steps: publish after this many steps as well.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    events = (RunStarted, RunResumed, EpochStarted, EvalCompleted, StepsCompleted, EpochCompleted)

    @checked
    def __init__(
        self,
        *,
        examples: int | str | None = None,
        peak_flops: float | None = None,
        every_steps: int | None = None,
    ) -> None:
        if not isinstance(examples, str):
            require_count("StepTimer", "examples", examples, at_least=1, optional=True)
        elif not examples:
            raise ConfigurationError(
                "StepTimer(examples=''): examples must be the name of a metric, or a number."
            )
        require_number("StepTimer", "peak_flops", peak_flops, above=0, optional=True)
        require_count("StepTimer", "every_steps", every_steps, at_least=1, optional=True)
        self._examples_from = examples
        self._peak_flops = peak_flops
        self._every_steps = every_steps
        self._run: RunContext | None = None
        self._flops: float | None = None
        self._has_flops = False
        self._last: datetime | None = None
        """When the next step began; None if unknown."""
        self._before = LoopStatistics()
        self._forget()

    def _forget(self) -> None:
        self._windows: deque[tuple[float, int]] = deque(maxlen=WINDOWS_KEPT)
        self._steps = 0
        self._seconds = 0.0
        self._examples = 0.0

    async def start(self, run: RunContext) -> None:
        """Begins from scratch."""
        self._run, self._last, self._before = run, None, LoopStatistics()
        self._has_flops, self._flops = False, None
        self._forget()

    async def handle(self, event: Event) -> None:
        """Adds the time of a window; publishes at the end of an epoch."""
        match event:
            case StepsCompleted():
                self._add(event)
                if self._every_steps is not None and self._steps >= self._every_steps:
                    await self._publish(event.step)
            case EpochCompleted():
                await self._publish(event.step)
            case EpochStarted() | EvalCompleted():
                self._last = event.time
            case _:  # the time before the first window is not one of steps
                self._last = None

    def _add(self, event: StepsCompleted) -> None:
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

    async def _publish(self, step: int) -> None:
        run = self._run
        if run is None or not self._steps or not self._seconds:
            return
        if not self._has_flops:
            self._has_flops = True
            self._flops = await in_own_thread(partial(_flops, run))
        metrics = self._metrics(run.loop_statistics())
        self._forget()
        source = self.name or "StepTimer"
        await run.publish_async(MachineMeasured(step=step, source=source, metrics=metrics))

    def _metrics(self, now: LoopStatistics) -> dict[str, Number]:
        step_s, steps = zip(*self._windows, strict=True)
        p50, p90, p99 = np.quantile(step_s, (0.5, 0.9, 0.99), weights=steps, method="inverted_cdf").tolist()
        steps_per_s = self._steps / self._seconds
        metrics: dict[str, Number] = {
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
                metrics[part] = (getattr(now, part) - getattr(before, part)) / dispatched
        if self._examples:
            metrics["examples_per_s"] = self._examples / self._seconds
        if self._flops is not None:
            metrics["flops_per_step"] = self._flops
            metrics["flops_per_s"] = self._flops * steps_per_s
            if self._peak_flops is not None:
                metrics["mfu"] = self._flops * steps_per_s / self._peak_flops
        return metrics


def _flops(run: RunContext) -> float | None:
    """Returns XLA's estimate for one step; None if there is none. Blocks."""
    program = run.program()
    flops = program.cost.get("flops", 0.0) if program is not None else 0.0
    return flops if flops > 0 else None
