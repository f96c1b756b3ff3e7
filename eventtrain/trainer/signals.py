"""Turns Ctrl-C and SIGTERM into a stop at the next boundary.

Python's default handler raises between any two bytecodes, also between the call that donates the state and the
assignment of its result, which loses the state. Here the first signal stops the run at the next boundary, and its
exception is raised when state and bus are settled. A second signal aborts.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from eventtrain.errors import ConfigurationError

logger = logging.getLogger("eventtrain")

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "preempted"}


def checked_signals(numbers: Sequence[object]) -> tuple[signal.Signals, ...]:
    """Returns the signals that also preempt a run.

    Raises:
        ConfigurationError: one of them is not a signal that a program can handle.
    """
    known = {signal.Signals(number) for number in signal.valid_signals() if number in list(signal.Signals)}
    excluded = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP", "SIGINT")}
    for number in numbers:
        if number not in known or number in excluded or isinstance(number, bool):
            raise ConfigurationError(
                f"Trainer(preempt_on={list(numbers)!r}): {number!r} is not a signal that can preempt a run. Pass, for "
                "example, signal.SIGUSR1."
            )
    return tuple(signal.Signals(number) for number in numbers)  # pyright: ignore[reportArgumentType]  # checked


class SignalGuard:
    """Replaces the default handlers of SIGINT and SIGTERM by ``ask_to_stop(reason, number)`` while entered on the
    main thread.

    Other handlers, for example those of a server, stay as they are. On other threads it does nothing.

    Args:
        ask_to_stop: gets the reason and the number of a signal.
        preempt_on: more signals that are taken for SIGTERM.
    """

    def __init__(
        self, ask_to_stop: Callable[[str, int], None], preempt_on: Sequence[signal.Signals] = ()
    ) -> None:
        self._ask_to_stop = ask_to_stop
        self._reasons = {**dict.fromkeys(preempt_on, REASONS[signal.SIGTERM]), **REASONS}
        self._before: dict[signal.Signals, Any] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._reasons:
                handler = signal.getsignal(number)
                if handler in (signal.default_int_handler, signal.SIG_DFL):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # No lock is taken here: the thread that this interrupts may hold it.
        if self.received is not None:
            raise KeyboardInterrupt("A second signal aborts the run at once.")
        self.received = signal.Signals(number)
        self._ask_to_stop(self._reasons[self.received], self.received)

    def raise_received(self, elsewhere: int | None = None) -> None:
        """Raise the exception of the signal received: KeyboardInterrupt, or SystemExit(128 + number), 143 for SIGTERM.

        Args:
            elsewhere: number of the signal that ended the run, if another process of the run has received it.
        """
        received = self.received
        if received is None and elsewhere is not None:
            received = signal.Signals(elsewhere)
            logger.warning("The run has ended because another process of it received %s.", received.name)
        if received is not None:
            raise_signal(received)


def raise_signal(number: int) -> NoReturn:
    """Raises the exception by which a run ends that a signal has stopped."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
