"""Traces of JAX's profiler, begun and ended between two steps, so that each covers exactly the steps requested."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import jax

from eventtrain.bus.core import BusCore
from eventtrain.control.requests import TraceRequest
from eventtrain.device.compiled_step import Carry
from eventtrain.errors import ConfigurationError
from eventtrain.events import ProfileCaptured, SubscriberFailed
from eventtrain.loop.lag_gates import NEVER
from eventtrain.loop.run_status import RunStatus


@dataclass
class _Trace:
    request: TraceRequest
    first: int
    last: int
    path: Path


class StepProfiler:
    """Runs JAX's profiler where requests and commands ask for it. Training thread only.

    It waits for the device before a trace begins and before it ends, and while the trace is written: profiling is the
    one thing that holds training by design. A failure is published as SubscriberFailed and ends nothing.

    Args:
        requests: of all subscribers.
        status, carry, bus: of the run.
        marks_steps: whether the trace names each step, as TensorBoard expects. Not if a dispatch runs several.
    """

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        status: RunStatus,
        carry: Carry,
        bus: BusCore,
        *,
        marks_steps: bool,
    ) -> None:
        self._requests = requests
        self._status = status
        self._carry = carry
        self._bus = bus
        self._marks_steps = marks_steps
        ranges = [
            (first, last, request)
            for request in requests
            for first, last in request.ranges
            if last > status.step
        ]
        self._wanted = sorted(ranges, key=lambda wanted: wanted[:2])
        self._commanded: list[int] = []
        self._trace: _Trace | None = None
        self._mark: AbstractContextManager[Any] | None = None

    def request(self, steps: int) -> None:
        """Trace the next ``steps`` steps: a command asked for it. Raises ConfigurationError without a Profiler."""
        if not self._requests:
            raise ConfigurationError(
                "no Profiler is subscribed, so the trace has no folder. Add subs.Profiler()."
            )
        self._commanded.append(steps)

    def next_step(self) -> int:
        """Returns the next boundary at which a trace begins or ends; NEVER if none does."""
        step = self._status.step
        if self._trace is not None:
            return step + 1 if self._marks_steps else self._trace.last
        return max(step, self._wanted[0][0] - 1) if self._wanted else NEVER

    def before_step(self) -> None:
        """Begin a trace, or mark the next step in it: that step is about to be dispatched."""
        self.end_due()
        while self._commanded:
            first, steps = self._status.step + 1, self._commanded.pop(0)
            self._wanted.insert(0, (first, first + steps - 1, self._requests[0]))
        while self._trace is None and self._wanted and self._wanted[0][0] <= self._status.step + 1:
            self._begin(*self._wanted.pop(0))
        if self._trace is not None and self._marks_steps:
            self._unmark()
            self._mark = jax.profiler.StepTraceAnnotation("train", step_num=self._status.step + 1)
            self._mark.__enter__()

    def end_due(self) -> None:
        """End the trace if its last step was dispatched. Called before anything but a step."""
        if self._trace is not None and self._status.step >= self._trace.last:
            self.close()

    def close(self) -> None:
        """End the trace, if there is one. Idempotent."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        last, began_s = self._status.step, perf_counter()
        try:
            self._carry.cursor.block_until_ready()
            self._unmark()
        finally:
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                self._report_failure(trace.request, error)
                return
        self._bus.notify(
            ProfileCaptured(
                step=last,
                path=str(trace.path),
                first_step=trace.first,
                last_step=last,
                duration_s=perf_counter() - began_s,
            )
        )

    def _begin(self, first: int, last: int, request: TraceRequest) -> None:
        step = self._status.step
        if first != step + 1:
            reason = f"cannot trace steps {first} to {last}: step {first} is over (this is step {step})"
            self._report_failure(request, RuntimeError(reason))
            return
        path = request.folder / f"steps-{first}-{last}"
        if jax.process_count() > 1:  # on one machine, JAX would give their files the same name
            path /= f"process-{jax.process_index()}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._carry.cursor.block_until_ready()
            jax.profiler.start_trace(path, profiler_options=_options(request.python))
        except Exception as error:  # for example, another trace is running, or the disk is full
            self._report_failure(request, error)
        else:
            self._trace = _Trace(request, first, last, path)

    def _unmark(self) -> None:
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.__exit__(None, None, None)

    def _report_failure(self, request: TraceRequest, error: Exception) -> None:
        failed = SubscriberFailed(
            step=self._status.step,
            subscriber=request.owner,
            event_kind="profile",
            error=f"{type(error).__name__}: {error}",
        )
        self._bus.notices.add((SubscriberFailed, request.owner), failed)


def _options(python: bool) -> Any:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = int(python)
    return options
