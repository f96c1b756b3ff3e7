"""The processes of a run: how a trainer joins the others, and what it does when one of them is lost."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from time import sleep
from typing import Any, NoReturn

import jax

from eventtrain.bus.core import BusCore
from eventtrain.control.control_plane import ControlPlane
from eventtrain.errors import PeerLost as PeerLostError
from eventtrain.events import PeerLost
from eventtrain.events.models import Frozen
from eventtrain.loop.agreement.agreement import Agreement, Alone, Follower, Leader
from eventtrain.loop.agreement.channel import Channel, open_channel
from eventtrain.loop.agreement.peers import Loss

logger = logging.getLogger("eventtrain")

END_AFTER_S = 15.0
"""How long the training thread may take to leave ``fit`` once another process is lost."""
EXIT_AFTER_S = 5.0
"""How long JAX may wait for a process that is gone when the interpreter ends. Left alone, it waits for 100 s. A process
that has failed waits as long for process 0, which JAX aborts it with if that hangs and ends after ``END_AFTER_S``."""
EXIT_TOGETHER_S = 20.0
"""How long process 0, which the others cannot do without, waits for them after a run that failed. Left alone, JAX waits
for 300 s if one of them hangs."""
EXIT_CODE = 75
"""Exit code of a process that cannot end by itself since another one is lost: EX_TEMPFAIL, so that a launcher starts it
again."""
FAILED_CODE = 1
"""The same where the run failed in this process: the code of an exception."""


class Opening(Frozen):
    """Facts that process 0 tells the others before the run begins.

    Attributes:
        run_id, attempt: of the run.
        resume: the checkpoint from which it resumes; None if it starts from scratch.
        mark: name of the files by which the others see that they share a directory.
    """

    run_id: str
    attempt: int
    resume: Path | None = None
    mark: str


class _Watch:
    """Reports a process that is lost, and ends this process where it would wait for that one for ever.

    That is in a computation, so that the training thread cannot leave ``fit``, and later at the end of the
    interpreter, where JAX waits for all processes. Functions that are registered with ``atexit`` after this watch was
    made are called before its time begins to run.
    """

    def __init__(
        self, bus: BusCore, plane: ControlPlane, end_events: Callable[[PeerLostError], None]
    ) -> None:
        self._bus = bus
        self._plane = plane
        self._end_events = end_events
        self._timer: threading.Timer | None = None
        self._ended = threading.Event()
        self._exits = threading.Event()
        self._exit_code: int | None = None
        self.agreement: Agreement | None = None
        atexit.register(self._exits.set)

    def report(self, lost: PeerLostError, how: Loss) -> None:
        """Publishes PeerLost, and the last events too if JAX is about to end this process. Any thread."""
        self._end_with(EXIT_CODE, EXIT_TOGETHER_S if how == "failed" else EXIT_AFTER_S)
        if self._ended.is_set():
            return
        self._bus.notify(PeerLost(step=self._plane.view.step, process=lost.process, error=str(lost)))
        self._plane.queue.wake()
        if self.agreement is not None and self.agreement.ended:
            return
        if how == "cut_off":
            self._end_events(lost)  # within 0.2 s, wherever the training thread is
        if self._timer is None:
            self._timer = threading.Timer(END_AFTER_S, self._end_process, [lost])
            self._timer.daemon = True
            self._timer.start()

    def _end_process(self, lost: PeerLostError) -> None:
        if self._ended.is_set():
            return
        logger.critical(
            "Training waits inside a computation for a process that is lost, so fit cannot return. This process ends "
            "with exit code %d. Start the run again with fit(resume=True). (%s)",
            EXIT_CODE, lost,
        )  # fmt: skip
        try:
            self._end_events(lost)
        finally:
            _exit(EXIT_CODE)

    def end(self, error: BaseException | None) -> None:
        """The run has ended, because of ``error`` or by itself."""
        self._ended.set()
        if self._timer is not None:
            self._timer.cancel()
        if error is not None:
            self._end_with(_code_of(error), EXIT_TOGETHER_S if jax.process_index() == 0 else EXIT_AFTER_S)
        if self._exit_code is None:
            atexit.unregister(self._exits.set)

    def _end_with(self, code: int, after_s: float) -> None:
        """Has the process end with ``code`` if the end of the interpreter takes longer than ``after_s``."""
        if self._exit_code is None:
            self._exit_code = code
            threading.Thread(
                target=self._end_late, args=[code, after_s], name="eventtrain-exit", daemon=True
            ).start()

    def _end_late(self, code: int, after_s: float) -> None:
        self._exits.wait()
        sleep(after_s)
        logger.error(
            "A run of this process failed, and JAX waits for the other processes. The process ends with exit code %d.",
            code,
        )  # fmt: skip
        _exit(code)


def _code_of(error: BaseException) -> int:
    """Returns the exit code of a program that ``error`` ends."""
    match error:
        case PeerLostError():
            return EXIT_CODE
        case SystemExit(code=int(code)):
            return code
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
        case _:
            return FAILED_CODE


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # it may be closed
            stream.flush()
    os._exit(code)


def no_other_thread() -> AbstractContextManager[object]:
    """Has JAX refuse computations of several processes in other threads than this one, for the length of the block.

    They would come at another place in the order of computations on each process, and all would wait for ever.
    """
    guard: Any = getattr(jax, "thread_guard", None)  # not in every version of JAX
    return nullcontext() if guard is None else guard(True)


def _delete_runs(channel: Channel, count: int) -> None:
    """Deletes the keys of the runs that every process has left, since it has begun the one after it."""
    runs = channel.below("runs")
    known = runs.all()
    begun = min(int(known.get(str(index), "0")) for index in range(count))
    deleted = int(known.get("deleted", "0"))
    if begun > deleted + 1:
        for number in range(deleted + 1, begun):
            channel.delete(f"run/{number}")
        runs.set("deleted", str(begun - 1), overwrite=True)


@contextmanager
def joined(
    bus: BusCore, plane: ControlPlane, end_events: Callable[[PeerLostError], None]
) -> Generator[Agreement]:
    """Joins the other processes for the length of the block, which is one run. Blocks at the end until they know.

    Args:
        bus, plane: of the trainer.
        end_events: publishes the end of the run, and delivers everything, beside a training thread that hangs.
    """
    if jax.process_count() == 1:
        yield Alone()
        return
    index, count = jax.process_index(), jax.process_count()
    channel = open_channel()
    number = channel.increment(f"runs/{index}")  # the same on each process, as they run the same program
    if number == 1:
        _report_preemption_service()
    if index == 0:
        _delete_runs(channel, count)
    watch = _Watch(bus, plane, end_events)
    run_channel = channel.below(f"run/{number}")
    if index == 0:
        agreement = Leader(run_channel, count, plane, watch.report, bus.publish)
    else:
        agreement = Follower(run_channel, index, count, plane.queue, watch.report)
        bus.forward = agreement.forward
        plane.view.ask_to_release = agreement.ask_to_release
    watch.agreement = agreement
    failure: BaseException | None = None
    try:
        with no_other_thread():
            yield agreement
    except BaseException as error:
        failure = error
        agreement.leave(error)
        raise
    else:
        agreement.end()
        agreement.leave()
    finally:
        bus.forward = plane.view.ask_to_release = None
        watch.end(failure)


def _report_preemption_service() -> None:
    """Log that JAX's own handler of SIGTERM, which Python does not know, is replaced. It cannot be put back."""
    is_replaced = signal.getsignal(signal.SIGTERM) not in (None, signal.SIG_DFL)
    if is_replaced and getattr(jax.config, "jax_enable_preemption_service", False):
        logger.info(
            "SIGTERM ends the run, and does not reach JAX's preemption service: "
            "multihost_utils.reached_preemption_sync_point() stays False. Set jax_enable_preemption_service=False."
        )
