"""Runs one thing at a time for a trainer: on the calling thread, or in a thread beside the running event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
import jax
from anyio.from_thread import start_blocking_portal

from eventtrain.bus.core import BusCore
from eventtrain.control.command_queue import CommandQueue
from eventtrain.device.executable_cache import LowerOnCaller, lower_here
from eventtrain.device.model import Model
from eventtrain.device.state import with_x64_of_caller
from eventtrain.errors import AlreadyRunning, ConfigurationError

T = TypeVar("T")


class Execution:
    """``claim`` it, then work under ``serving``, or pass the work to ``beside_loop``.

    Args:
        model: is traced on the calling thread.
        queue: gets the stop on cancellation.
        bus: of the trainer.
        backend, backend_options: of the event loop that ``serving`` starts.

    Attributes:
        name: of the method in progress, for messages; empty if there is none.
    """

    def __init__(
        self,
        model: Model,
        queue: CommandQueue,
        bus: BusCore,
        backend: str,
        backend_options: dict[str, Any] | None,
    ) -> None:
        self._model = model
        self._queue = queue
        self._bus = bus
        self._backend = (backend, backend_options)
        self._claimed = threading.Lock()
        self.name = ""

    @property
    def busy(self) -> bool:
        """Whether something is in progress. Any thread."""
        return self._claimed.locked()

    @contextmanager
    def claim(self, name: str) -> Generator[None]:
        """Keep others from beginning for the length of the block.

        Raises:
            AlreadyRunning: something is in progress.
            ConfigurationError: this is one of several JAX processes.
        """
        if (processes := jax.process_count()) > 1:
            raise ConfigurationError(
                f"{name} was called in one of {processes} JAX processes (jax.process_count()). eventtrain runs in one "
                "process: checkpoints, logs and commands are not coordinated between several. Train on the devices of "
                "one, without jax.distributed.initialize()."
            )
        if not self._claimed.acquire(blocking=False):
            raise AlreadyRunning(
                f"{name} was called while {self.name} of the same trainer is in progress. Wait for it, "
                "stop it with control.stop(), or use another Trainer."
            )
        self.name = name
        self._queue.arrived.clear()  # a stop that came too late for the last run is not for this one
        try:
            yield
        finally:
            self.name = ""
            self._model.lower_on_caller = lower_here
            self._claimed.release()

    @contextmanager
    def serving(self) -> Generator[None]:
        """Have the bus served for the length of the block: by its owner's event loop, or by one in a new thread.

        Raises:
            ConfigurationError: the caller would block the event loop that serves the bus.
        """
        if self._bus.served_here:
            raise ConfigurationError(
                f"{self.name}() blocks and was called on the event loop that serves its bus, so it would wait for "
                f"itself. Await fit_async, evaluate_async or predict_async there, or call {self.name} in a thread."
            )
        if self._bus.running:
            yield
            return
        backend, options = self._backend
        with (
            start_blocking_portal(backend, options) as portal,
            portal.wrap_async_context_manager(self._bus.serve()),
        ):
            yield

    async def beside_loop(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread while this event loop serves the bus. Cancellation stops it, and waits."""
        outcome: list[T] = []
        failure: list[BaseException] = []
        finished = anyio.Event()
        on_caller: LowerOnCaller = anyio.from_thread.run_sync
        self._model.lower_on_caller = on_caller
        work_in_thread = with_x64_of_caller(work)

        async def run_thread() -> None:
            try:
                outcome.append(
                    await anyio.to_thread.run_sync(work_in_thread, limiter=anyio.CapacityLimiter(1))
                )
            except BaseException as error:
                failure.append(error)

        async def serve_and_run() -> None:
            try:
                with anyio.CancelScope(shield=True):
                    if self._bus.running:
                        await run_thread()
                    else:
                        async with self._bus.serve():
                            await run_thread()
            except Exception as error:
                failure.append(error)
            finally:
                finished.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve_and_run)
            try:
                await finished.wait()
            except anyio.get_cancelled_exc_class():
                self._queue.ask_to_stop("cancelled")
                self._queue.wake()
                raise
        if failure:
            raise failure[0]
        return outcome[0]
