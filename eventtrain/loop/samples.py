"""Samples: what the model makes at stated boundaries, dispatched here and waited for by other threads.

In a run of several processes each of them dispatches the sample, by order of process 0, which alone reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax

from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.requests import SampleRequest
from eventtrain.device.compiled_step import Carry
from eventtrain.device.model import Model
from eventtrain.device.state import PyTree
from eventtrain.device.stateful_metrics import host_array
from eventtrain.errors import (
    ConfigurationError,
    EventTrainError,
    ProcessesDiverged,
    StepError,
    did_you_mean,
)
from eventtrain.events import SubscriberFailed
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.agreement.log import MakeSample
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.request_schedule import RequestSchedule
from eventtrain.loop.run_status import RunStatus


@dataclass(eq=False, kw_only=True)
class Samples:
    """The samples of one run, compiled before its first step. Training thread only; never waits for the device.

    Raises:
        StepError: a function of a sample cannot be traced.
    """

    model: Model
    carry: Carry
    status: RunStatus
    plane: ControlPlane
    windows: MetricWindows
    agreement: Agreement

    def __post_init__(self) -> None:
        requests = self.plane.requests.samples
        self.schedule = RequestSchedule(requests, self.status)
        self._requests = {request.name: request for request in requests}
        for request in requests:
            self.model.sample(request.name, request.function, self.carry.leaves)

    def take(self, name: str) -> None:
        """Make the sample ``name`` from the present state.

        Raises:
            ConfigurationError: there is no such sample. StepError: it was left out, or the device refused it.
        """
        if not self.agreement.decides:
            return  # process 0 has ordered it before
        request = self._requests.get(name)
        if request is None:
            known = f"Known names: {', '.join(self._requests)}." if self._requests else ""
            raise ConfigurationError(
                f"no subscribers.Sample of this run is named {name!r}. {did_you_mean(name, self._requests, known)}"
            )
        self._take(request)

    def take_due(self) -> None:
        """Make the samples that are due at this boundary by step."""
        if self.schedule and self.agreement.is_open(self.status):
            self._take_each(self.schedule.take_due())

    def take_epoch(self, epochs: int) -> None:
        """Make the samples that are due at the end of the ``epochs``-th epoch."""
        if self.agreement.decides:
            self._take_each(self.schedule.take_epoch(epochs))

    def make_ordered(self, order: MakeSample) -> None:
        """Take part in a sample of process 0.

        Raises:
            ProcessesDiverged: this process has no such sample.
        """
        request = self._requests.get(order.name)
        if request is None:
            raise ProcessesDiverged(
                f"Process 0 makes the sample {order.name!r} at step {self.status.step}, and no subscriber of this "
                "process has it. Set per_host = True in the class that calls run.schedule_samples."
            )
        self._dispatch(request)

    def _take_each(self, requests: list[SampleRequest]) -> None:
        for request in requests:
            try:
                self._take(request)
            except EventTrainError as error:
                failed = SubscriberFailed(
                    step=self.status.step, subscriber=request.owner, event_kind="sample", error=str(error)
                )
                self.windows.emit(failed)

    def _take(self, request: SampleRequest) -> None:
        step = self.status.step
        self.agreement.record(self.status, MakeSample(name=request.name))
        try:
            made = self._dispatch(request)
        except RuntimeError as error:  # of the device, for example because it has no room
            if self.agreement.is_shared:
                raise  # the others may have dispatched it
            raise StepError(f"the sample {request.name!r} of step {step} failed: {error}") from error
        if not request.deliver(step, partial(jax.tree.map, host_array, made)):
            raise StepError(
                f"the sample {request.name!r} of step {step} was left out: too many wait to be read and published."
            )

    def _dispatch(self, request: SampleRequest) -> PyTree:
        model, carry = self.model, self.carry
        leaves = model.leaves_for("predict", carry.leaves, carry.ext_leaves)
        return model.sample(request.name, request.function, carry.leaves)(leaves, ())
