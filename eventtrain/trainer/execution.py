"""Runs one thing at a time for a trainer: on the calling thread, or in a thread beside the running event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import anyio
import jax

from eventtrain.bus.cancellation import persist
from eventtrain.bus.core import BusCore
from eventtrain.bus.wakeup import LoopThread
from eventtrain.control.command_queue import CommandQueue
from eventtrain.device.executable_cache import lower_here
from eventtrain.device.model import Model
from eventtrain.device.state import with_x64_of_caller
from eventtrain.errors import AlreadyRunning, ConfigurationError
from eventtrain.trainer.functions import Functions

T = TypeVar("T")

logger = logging.getLogger("eventtrain")

END_S = 1.0
"""How long the end of ``serving`` waits for its event loop."""
LEFT_END_S = 10.0
"""How long the next ``serving`` waits for an event loop that was left behind."""


class EventLoopThread:
    """Serves a bus by an event loop in a thread of its own.

    A daemon, and not anyio's blocking portal: a handler that blocks the loop must not hold the end of a run, nor keep
    the program alive.
    """

    def __init__(self, bus: BusCore, backend: str, backend_options: dict[str, Any] | None) -> None:
        self._bus = bus
        self._backend = (backend, backend_options)
        self._started = threading.Event()
        self._stop: Callable[[], object] = lambda: None
        self.failure: BaseException | None = None
        """The exception that ended the event loop, if one did."""
        self._thread = threading.Thread(target=self._run, name="eventtrain-loop", daemon=True)

    def start(self) -> None:
        """Blocks until the bus is served. Raises what keeps the event loop from it."""
        self._thread.start()
        self._started.wait()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        backend, options = self._backend
        try:
            anyio.run(self._serve, backend=backend, backend_options=options)
        except BaseException as error:
            self.failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        loop, stopped = LoopThread(), anyio.Event()
        self._stop = lambda: loop.run_soon(stopped.set)
        async with self._bus.serve():
            self._started.set()
            await stopped.wait()

    def end(self, timeout_s: float) -> bool:
        """Ends the event loop. Returns whether it has ended within ``timeout_s`` seconds."""
        self._stop()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class Execution:
    """``claim`` it, then work under ``serving``, or pass the work to ``beside_loop``.

    Args:
        model: is traced on the calling thread.
        queue: gets the stop on cancellation.
        bus: of the trainer.
        functions: receive events while something is in progress.
        backend, backend_options: of the event loop that ``serving`` starts.

    Attributes:
        name: of the method in progress, for messages; empty if there is none.
        closed: the trainer was closed, so that nothing begins any more.
    """

    def __init__(
        self,
        model: Model,
        queue: CommandQueue,
        bus: BusCore,
        functions: Functions,
        backend: str,
        backend_options: dict[str, Any] | None,
    ) -> None:
        self._model = model
        self._queue = queue
        self._bus = bus
        self._functions = functions
        self._backend = (backend, backend_options)
        self._claimed = threading.Lock()
        self._left_behind: EventLoopThread | None = None
        self.closed = False
        self.name = ""

    @property
    def busy(self) -> bool:
        """Whether something is in progress. Any thread."""
        return self._claimed.locked()

    @contextmanager
    def claim(self, name: str) -> Generator[None]:
        """Keep others from beginning for the length of the block.

        Raises:
            AlreadyRunning: something is in progress, or the run of another trainer uses the bus.
            ConfigurationError: the trainer was closed, or compilation is off.
        """
        if self.closed:
            raise ConfigurationError(f"{name}() cannot start: this trainer was closed. Make a new one.")
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
            raise ConfigurationError(
                f"{name} was called while jax.disable_jit() is on, and the step is always compiled. Use "
                "Trainer(debug=True), which runs step_fn uncompiled before each step."
            )
        if not self._claimed.acquire(blocking=False):
            raise AlreadyRunning(
                f"{name} was called while {self.name} of the same trainer is in progress. Wait for it, "
                "stop it with control.stop(), or use another Trainer."
            )
        try:
            self._bus.require_no_run()
            self.name = name
            self._queue.arrived.clear()  # a stop that came too late for the last run is not for this one
            with self._functions.receiving(name):
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
            AlreadyRunning: a handler still blocks the event loop of an earlier run.
        """
        if self._bus.served_here:
            raise ConfigurationError(
                f"{self.name}() blocks and was called on the event loop that serves its bus, so it would wait for "
                f"itself. Await fit_async, evaluate_async or predict_async there, or call {self.name} in a thread."
            )
        if self._left_behind is not None and not self._left_behind.end(LEFT_END_S):
            raise AlreadyRunning(
                f"{self.name}() cannot start: {self._bus.blocked_by()} still blocks the event loop of the run before. "
                "Give what it waits for a timeout, and use another Trainer."
            )
        self._left_behind = None
        if self._bus.running:
            yield
            return
        loop = EventLoopThread(self._bus, *self._backend)
        loop.start()
        try:
            yield
        except BaseException as error:
            if loop.failure is not None and error.__cause__ is None:
                error.__cause__ = loop.failure
            raise
        finally:
            if not loop.end(END_S):
                self._left_behind = loop
                logger.error(
                    "The event loop of %s() was left behind in its thread: %s blocks it.",
                    self.name, self._bus.blocked_by(),
                )  # fmt: skip

    async def beside_loop(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread while this event loop serves the bus. Cancellation stops it, and waits."""
        outcome: Future[T] = Future()
        failure: list[Exception] = []
        loop, finished = LoopThread(), anyio.Event()
        self._model.lower_on_caller = partial(_call_on, loop)
        work_in_thread = with_x64_of_caller(work)

        def run() -> None:
            _settle(outcome, work_in_thread)
            loop.run_soon(finished.set)

        async def run_thread() -> None:
            # A thread of its own, which anyio would abandon if this task were cancelled by other code.
            context = copy_context()
            threading.Thread(
                target=partial(context.run, run), name="eventtrain-training", daemon=True
            ).start()
            await persist(finished.wait)

        async def serve_and_run() -> None:
            try:
                with anyio.CancelScope(shield=True):
                    if self._bus.running:
                        await run_thread()
                    else:
                        async with self._bus.serve():
                            await run_thread()
            except Exception as error:  # of serving
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
        return outcome.result()


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    """Gives ``future`` what ``function`` returns or raises."""
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _call_on(loop: LoopThread, function: Callable[[], Any]) -> Any:
    """Returns what ``function`` returns on the thread of ``loop``. Blocks; not to be called on that thread."""
    result: Future[Any] = Future()
    if not loop.run_soon(partial(_settle, result, function)):
        raise ConfigurationError(
            "The event loop that called fit_async has ended, so the step cannot be traced on it."
        )
    return result.result()
