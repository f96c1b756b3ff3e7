"""Every error that eventtrain raises on purpose.

    EventTrainError
    ├── ConfigurationError      an option, a handler or an argument cannot work
    ├── StepError               step_fn, eval_fn or predict_fn raised or broke its contract
    │   ├── MetricsError        metrics are not a flat dict of scalars, or changed
    │   └── StateError          the returned state differs in structure, shape or dtype
    ├── DataError               data is empty, exhausted or of the wrong type
    ├── HyperparamError         a hyperparameter cannot be read or written
    │   ├── UnknownHyperparam
    │   ├── AmbiguousHyperparam
    │   └── ScheduledHyperparam
    ├── CommandRejectedError    a command was not carried out
    ├── SnapshotError           a snapshot is unknown, released, or does not fit the device
    ├── StorageError            a remote store cannot be reached, or refuses
    ├── StateInUse              ``trainer.state`` was read during a run
    ├── AlreadyRunning          a second fit, evaluate or predict of one trainer
    ├── RunDirInUse             another run writes to the run_dir
    ├── RunNotReachable         no run answers at the control socket of a run_dir
    ├── BusError                the event bus cannot accept or deliver an event
    │   ├── BusClosed
    │   ├── QueueFull
    │   ├── EventReused
    │   └── WaitsForItself
    ├── NonFiniteMetric         a metric is NaN or infinite, and a policy was told to fail the run
    ├── SubscriberError         a subscription with ``on_error="fail"`` failed
    ├── PeerLost                another process of the run failed, or gives no sign of life
    ├── ProcessesDiverged       the processes of a run do not run the same program
    └── EventParseError         text is not the JSON of a known event

``CommandRejected`` is an alias of ``CommandRejectedError``. ``eventtrain.CommandRejected`` is the *event*.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AlreadyRunning",
    "AmbiguousHyperparam",
    "BusClosed",
    "BusError",
    "CommandRejected",
    "CommandRejectedError",
    "ConfigurationError",
    "DataError",
    "EventParseError",
    "EventReused",
    "EventTrainError",
    "HyperparamError",
    "MetricsError",
    "NonFiniteMetric",
    "PeerLost",
    "ProcessesDiverged",
    "QueueFull",
    "RunDirInUse",
    "RunNotReachable",
    "ScheduledHyperparam",
    "SnapshotError",
    "StateError",
    "StateInUse",
    "StepError",
    "StorageError",
    "SubscriberError",
    "UnknownHyperparam",
    "WaitsForItself",
]


LONGEST_MESSAGE = 10_000
"""Characters of a message; it may quote what a user gave."""


class EventTrainError(Exception):
    """Base class: ``except EventTrainError`` catches everything that eventtrain raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shortened(arg, LONGEST_MESSAGE) if isinstance(arg, str) else arg for arg in args))


class ConfigurationError(EventTrainError, ValueError):
    """An option, a handler or an argument cannot work. Raised before anything runs."""


class StepError(EventTrainError):
    """``step_fn``, ``eval_fn`` or ``predict_fn`` raised or broke its contract."""


class MetricsError(StepError):
    """Metrics are not a flat dict of scalar arrays, or their names or dtypes changed."""


class StateError(StepError):
    """The state that ``step_fn`` returned differs from the given one in structure, shape or dtype."""


class DataError(EventTrainError):
    """Training, evaluation or prediction data is empty, exhausted or of the wrong type."""


class HyperparamError(EventTrainError):
    """A hyperparameter cannot be read or written."""


class UnknownHyperparam(HyperparamError):
    """No ``optax.inject_hyperparams`` state holds a hyperparameter of this name."""


class AmbiguousHyperparam(HyperparamError):
    """Several places of the optimiser state hold this name; ``path=`` selects one."""


class ScheduledHyperparam(HyperparamError):
    """The hyperparameter follows a schedule, which would overwrite any value at the next update."""


class CommandRejectedError(EventTrainError):
    """A command was not carried out. Raised by ``await command.result()``; ``reason`` explains why."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


CommandRejected = CommandRejectedError


class SnapshotError(EventTrainError):
    """A snapshot is unknown or already released, or the device has no room for it."""


class StorageError(EventTrainError):
    """A remote store cannot be reached, or refuses. ``may_pass``: another attempt may succeed."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class StateInUse(EventTrainError):
    """``trainer.state`` was read while a run owns it. ``control.snapshot()`` gives a safe copy."""


class AlreadyRunning(EventTrainError):
    """A trainer runs one fit, evaluate or predict at a time."""


class RunDirInUse(EventTrainError):
    """Another run, of this or another process, writes to the ``run_dir``."""


class BusError(EventTrainError):
    """The event bus cannot accept or deliver an event."""


class BusClosed(BusError):
    """The bus was closed and delivers nothing more."""


class QueueFull(BusError):
    """A ``Lossless`` queue is at its limit, so ``publish`` would have to lose an event."""


class EventReused(BusError):
    """One event instance was published twice. Every publication needs an instance of its own."""


class WaitsForItself(BusError):
    """A handler waits for a checkpoint that cannot be complete before the handler returns."""


class NonFiniteMetric(EventTrainError):
    """A metric is NaN or infinite, and a policy was told to fail the run in that case."""


class SubscriberError(EventTrainError):
    """A subscription with ``on_error="fail"`` failed, which ends the run."""


class RunNotReachable(EventTrainError):
    """No run answers at the control socket of a ``run_dir``."""


class PeerLost(EventTrainError):
    """Another process of the run failed, or gives no sign of life, so this one cannot continue.

    Attributes:
        process: ``jax.process_index()`` of the other process.
    """

    def __init__(self, message: str, process: int) -> None:
        super().__init__(message)
        self.process = process


class ProcessesDiverged(EventTrainError):
    """The processes of a run do not run the same program, or were given different numbers of batches."""


class EventParseError(EventTrainError, ValueError):
    """Text is not JSON, or its ``kind`` is not that of a known event class."""


def did_you_mean(given: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns "Did you mean 'x'?" for the known name closest to ``given``, or ``otherwise`` if none is close."""
    if len(given) > 100:  # comparing takes quadratic time
        return otherwise
    nearest = difflib.get_close_matches(given, list(known), n=1)
    return f"Did you mean {nearest[0]!r}?" if nearest else otherwise


def amend(error: BaseException, *, before: str = "", after: str = "") -> None:
    """Puts text around the message of an error that is on its way, such as the place where it was raised."""
    message = str(error)
    if after:
        after = f"{chr(10) if chr(10) in message else ' ' if message.endswith('.') else '. '}{after}"
    error.args = (f"{before}{message}{after}",)


def is_logged(number: int) -> bool:
    """Whether the failure of this number, counted from 1, is logged: the 1st, 2nd, 4th, 8th ...

    What fails again and again, such as a handler at every step, must not flood the log.
    """
    return number & (number - 1) == 0


def listed(parts: Sequence[str], limit: int = 5) -> str:
    """Returns the first ``limit`` of ``parts``, separated by "; ", and how many more there are."""
    rest = len(parts) - limit
    return "; ".join([*parts[:limit], f"and {rest} more"] if rest > 0 else parts)


def shortened(text: str, limit: int = 200) -> str:
    """Returns ``text``, cut after ``limit`` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def first_lines(text: str, limit: int = 10) -> str:
    """Returns the first ``limit`` lines of ``text``, each of at most 500 characters, and how many more there are."""
    lines = text.splitlines()
    rest = len(lines) - limit
    kept = [shortened(line, 500) for line in lines[:limit]]
    return "\n".join([*kept, f"... and {rest} more lines"]) if rest > 0 else "\n".join(kept)


def printable(text: str, *, lines: bool = False) -> str:
    """Returns ``text`` with "?" for every character that a terminal may act on, line ends included unless ``lines``.

    For text from data (names, tags, reasons, errors) on its way to a terminal or a log.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else "?" for c in text)
