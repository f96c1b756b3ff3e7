"""The profiler's traces: begun and ended between two steps, so that each covers exactly the steps it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import jax

from eventtrain.bus.core import BusCore
from eventtrain.control.requests import TraceRequest
from eventtrain.events import ProfileCaptured, SubscriberFailed
from eventtrain.loop.command_executor import CommandExecutor
from eventtrain.loop.lag_gates import NEVER
from eventtrain.loop.metric_windows import Position


@dataclass
class _Trace:
    plan: TraceRequest
    first: int
    last: int
    path: Path


class Tracer:
    """Runs JAX's profiler where plans and commands ask for it. Training thread only.

    It waits for the device before a trace begins and before it ends, and while the trace is written: profiling is the
    one thing that holds training up by design. Whatever fails is said by SubscriberFailed and ends nothing.

    Args:
        plans: of all subscribers.
        position, effects: of the run.
        bus: hears of each trace.
        wait_for_device: returns when everything dispatched so far is complete.
        marks_steps: whether the trace names each step, as TensorBoard wants it; not where several go in one dispatch.
    """

    def __init__(
        self,
        plans: Sequence[TraceRequest],
        position: Position,
        effects: CommandExecutor,
        bus: BusCore,
        wait_for_device: Callable[[], object],
        *,
        marks_steps: bool,
    ) -> None:
        self._position = position
        self._effects = effects
        self._bus = bus
        self._wait_for_device = wait_for_device
        self._marks_steps = marks_steps
        self._plans = plans
        ranges = [
            (first, last, plan) for plan in plans for first, last in plan.ranges if last > position.step
        ]
        self._wanted = sorted(ranges, key=lambda wanted: wanted[:2])
        self._trace: _Trace | None = None
        self._mark: AbstractContextManager[Any] | None = None

    def next_step(self) -> int:
        """The next boundary at which there is something to do; NEVER if none."""
        step = self._position.step
        if self._trace is not None:
            return step + 1 if self._marks_steps else self._trace.last
        return max(step, self._wanted[0][0] - 1) if self._wanted else NEVER

    def before_step(self) -> None:
        """The next step is about to be dispatched: begin a trace, or go on with one."""
        self.end_due()
        while self._effects.traces_asked:
            first, steps = self._position.step + 1, self._effects.traces_asked.pop(0)
            self._wanted.insert(0, (first, first + steps - 1, self._plans[0]))
        while self._trace is None and self._wanted and self._wanted[0][0] <= self._position.step + 1:
            self._begin(*self._wanted.pop(0))
        if self._trace is not None and self._marks_steps:
            self._unmark()
            self._mark = jax.profiler.StepTraceAnnotation("train", step_num=self._position.step + 1)
            self._mark.__enter__()

    def end_due(self) -> None:
        """End the trace if its last step was dispatched. Before anything but a step."""
        if self._trace is not None and self._position.step >= self._trace.last:
            self.close()

    def close(self) -> None:
        """End the trace, if there is one. Idempotent."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        last, began_s = self._position.step, perf_counter()
        try:
            self._wait_for_device()
            self._unmark()
        finally:
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                self._failed(trace.plan, error)
                return
        held_s = perf_counter() - began_s
        said = ProfileCaptured(
            step=last, path=str(trace.path), first_step=trace.first, last_step=last, duration_s=held_s
        )
        self._bus.notify(said)

    def _begin(self, first: int, last: int, plan: TraceRequest) -> None:
        step = self._position.step
        if first != step + 1:
            reason = f"steps {first} to {last} cannot be traced: step {first} is over (this is step {step})"
            self._failed(plan, RuntimeError(reason))
            return
        path = plan.folder / f"steps-{first}-{last}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._wait_for_device()
            jax.profiler.start_trace(path, profiler_options=_options(plan.python))
        except Exception as error:  # another trace is running, no space is left ...
            self._failed(plan, error)
        else:
            self._trace = _Trace(plan, first, last, path)

    def _unmark(self) -> None:
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.__exit__(None, None, None)

    def _failed(self, plan: TraceRequest, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        failed = SubscriberFailed(
            step=self._position.step, subscriber=plan.owner, event_kind="profile", error=text
        )
        self._bus.notify(failed)


def _options(python: bool) -> Any:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = int(python)
    return options
