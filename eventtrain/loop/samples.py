"""Samples: what the model makes at stated boundaries, dispatched here and waited for by other threads."""

from __future__ import annotations

from dataclasses import dataclass

from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.requests import SampleRequest
from eventtrain.device.compiled_step import Carry
from eventtrain.device.model import Model
from eventtrain.errors import ConfigurationError, EventTrainError, StepError, did_you_mean
from eventtrain.events import SubscriberFailed
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
        request = self._requests.get(name)
        if request is None:
            known = f"Known names: {', '.join(self._requests)}." if self._requests else ""
            raise ConfigurationError(
                f"no subscribers.Sample of this run is named {name!r}. {did_you_mean(name, self._requests, known)}"
            )
        self._take(request)

    def take_due(self) -> None:
        """Make the samples that are due at this boundary by step."""
        if self.schedule:
            self._take_each(self.schedule.take_due())

    def take_epoch(self, epochs: int) -> None:
        """Make the samples that are due at the end of the ``epochs``-th epoch."""
        self._take_each(self.schedule.take_epoch(epochs))

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
        model, carry, step = self.model, self.carry, self.status.step
        leaves = model.leaves_for("predict", carry.leaves, carry.ext_leaves)
        try:
            made = model.sample(request.name, request.function, carry.leaves)(leaves, ())
        except RuntimeError as error:  # of the device, for example because it has no room
            raise StepError(f"the sample {request.name!r} of step {step} failed: {error}") from error
        if not request.deliver(step, made):
            raise StepError(
                f"the sample {request.name!r} of step {step} was left out: too many wait to be read and published."
            )
