"""``evaluate`` and ``predict`` outside a run: the state is only read, and the events are published on the bus."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import jax
import numpy as np

from eventtrain.bus.core import BusCore
from eventtrain.control.command_queue import CommandQueue
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.loop_statistics import LoopClock
from eventtrain.control.run_view import RunView
from eventtrain.data.epoch_iterator import EpochIterator
from eventtrain.data.sources import evaluation_sets
from eventtrain.device.fetcher import Fetcher
from eventtrain.device.model import Model
from eventtrain.device.placement import read
from eventtrain.device.state import PyTree, replicated_sharding
from eventtrain.errors import DataError, StepError, amend
from eventtrain.events import PredictCompleted, PredictStarted, PredictStepCompleted
from eventtrain.events.models import Number
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.evaluation import EvaluationDispatch, name_of_set
from eventtrain.loop.event_builder import EventBuilder
from eventtrain.loop.run_ahead import RunAhead
from eventtrain.loop.run_status import RunStatus
from eventtrain.trainer.processes import joined
from eventtrain.trainer.run import RunOptions

TOGETHER_S = 0.05
"""Outputs of `predict` are fetched one by one if a batch takes longer."""


class Inference:
    """Runs eval_fn and predict_fn over data on the calling thread, while the bus is served elsewhere. Blocks."""

    def __init__(self, model: Model, options: RunOptions, bus: BusCore, plane: ControlPlane) -> None:
        self._model = model
        self._options = options
        self._bus = bus
        self._plane = plane
        self._waiter = _BlockingWaiter(plane.queue)

    def evaluate(self, data: Any) -> dict[str, Number]:
        """Returns the means of eval_fn's metrics, in float64."""
        with self._joined():
            return self._evaluate(data)

    def predict(self, data: Any) -> PyTree:
        """Returns the outputs of predict_fn as NumPy arrays, joined along the first axis: on each process all rows."""
        with self._joined():
            return self._predict(data)

    @contextmanager
    def _joined(self) -> Generator[None]:
        """Join the other processes, if the state is on devices of several: what fails on one of them ends all."""
        if all(leaf.is_fully_addressable for leaf in self._model.leaves):
            yield
            return
        with joined(self._bus, self._plane, lambda lost: None) as agreement:
            self._waiter.agreement = agreement
            try:
                yield
                if self._waiter.cancelled:
                    agreement.leave(CancelledError("it was cancelled"))
            finally:
                self._waiter.agreement = None

    def _evaluate(self, data: Any) -> dict[str, Number]:
        model = self._model
        options = self._options
        builder = EventBuilder(self._bus, RunView(), weight=options.weight, derive=options.derive)
        fetcher = Fetcher(builder.take)
        fetcher.start()
        try:
            EvaluationDispatch(
                model.evaluation(model.leaves),
                model.leaves_for("eval", model.leaves, model.ext_leaves),
                RunStatus(model.step, model.epoch),
                fetcher=fetcher,
                ahead=RunAhead(self._options.pace.max_in_flight_calls, LoopClock()),
                continues=lambda: fetcher.failure is None and not self._waiter.cancelled,
            ).run(evaluation_sets(data), lambda name, batches: self._open(batches, name_of_set(name)))
        finally:
            fetcher.close()
        if fetcher.failure is not None:
            raise fetcher.failure
        if self._waiter.cancelled:
            return {}  # unused: the caller gets its cancellation
        self._drain()
        assert builder.evaluated is not None
        return dict(builder.evaluated)

    def _predict(self, data: Any) -> PyTree:
        model, step = self._model, self._model.step
        prediction = model.prediction()
        began_s, waiting, done = perf_counter(), deque[PyTree](), list[PyTree]()
        fetched_s = began_s

        def fetch(count: int) -> None:
            nonlocal fetched_s
            first, fetched_s = len(done), perf_counter()
            done.extend(jax.tree.map(read, waiting.popleft()) for _ in range(count))
            if self._bus.has_subscribers(PredictStepCompleted):
                self._bus.feed([PredictStepCompleted(step=step, batch=n) for n in range(first, len(done))])

        self._bus.feed([PredictStarted(step=step)])
        with self._open(data, "data to predict on") as batches:
            leaves = model.leaves_for("predict", model.leaves, model.ext_leaves)
            for index, batch in enumerate(batches):
                if self._waiter.cancelled:
                    break
                try:
                    if index == 0:
                        prediction.prepare(batch)
                    waiting.append(prediction(leaves, batch))
                except (StepError, DataError) as error:
                    amend(error, before=f"At batch {index} of the data to predict on: ")
                    raise
                if len(waiting) > self._options.pace.max_in_flight_calls:
                    # Short ones together: to wake the event loop for each would cost more than they do.
                    fetch(len(waiting) // 2 if perf_counter() - fetched_s < TOGETHER_S else 1)
        fetch(len(waiting))
        if self._waiter.cancelled:
            return None
        duration_s = perf_counter() - began_s
        self._bus.feed([PredictCompleted(step=step, steps=len(done), duration_s=duration_s)])
        self._drain()
        return jax.tree.map(_join, *done)

    @contextmanager
    def _open(self, data: Any, name: str) -> Generator[Iterator[Any]]:
        iterator = EpochIterator(
            data,
            self._model.epoch,
            steps_per_call=1,
            sharding=replicated_sharding(self._model.leaves),
            split=self._model.split,
            waiter=self._waiter,
            name=name,
        )
        try:
            yield iterator.batches()
        finally:
            iterator.close()

    def _drain(self) -> None:
        self._bus.submit(self._bus.wait_until_quiet, self._options.drain_timeout_s).result()


class _BlockingWaiter:
    """Waits for the prefetch thread until a stop arrives: the caller was cancelled. Nothing else can be served.

    Attributes:
        agreement: with the other processes; None without any.
    """

    def __init__(self, queue: CommandQueue) -> None:
        self._queue = queue
        self.agreement: Agreement | None = None

    @property
    def cancelled(self) -> bool:
        """Whether the caller was cancelled. Raises PeerLost if another process has failed or is gone."""
        if self.agreement is not None:
            self.agreement.check()
        return bool(self._queue.arrived)

    def wait(self, ready: Callable[[], object]) -> bool:
        while not ready():
            if self.cancelled:
                return False
            self._queue.wait(ready)
        return True

    def wake(self) -> None:
        self._queue.wake()


def _join(*outputs: np.ndarray) -> np.ndarray:
    return np.stack(outputs) if outputs[0].ndim == 0 else np.concatenate(outputs)
