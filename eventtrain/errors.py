"""Every error eventtrain raises on purpose.

    EventTrainError
    ├── ConfigurationError      an option, a handler or an argument that cannot work
    ├── StepError               step_fn, eval_fn or predict_fn broke its contract
    │   ├── MetricsError        metrics that are no flat dict of scalars, or that changed
    │   └── StateError          the returned state differs in structure, shape or dtype
    ├── DataError               data that is empty, exhausted or of the wrong kind
    ├── HyperparamError
    │   ├── UnknownHyperparam
    │   ├── AmbiguousHyperparam
    │   └── ScheduledHyperparam
    ├── CommandRejected         what ``await command.result()`` raises
    ├── SnapshotError           a snapshot that is unknown, released or does not fit the device
    ├── StorageError            a store off the machine that cannot be reached, or refuses
    ├── StateInUse              ``trainer.state`` while a run owns it
    ├── AlreadyRunning          fit, evaluate or predict called while another one runs
    ├── BusError
    │   ├── BusClosed
    │   ├── QueueFull
    │   ├── EventReused
    │   └── WaitsForItself
    ├── NonFiniteMetric         a metric is NaN or infinite, and that was to be an error
    ├── SubscriberError         a subscriber with ``on_error="fail"`` failed
    └── EventParseError         JSON that is no known event

The *event* named ``CommandRejected`` is ``eventtrain.CommandRejected``; the exception of that name
lives here only.
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
    "ConfigurationError",
    "DataError",
    "EventParseError",
    "EventReused",
    "EventTrainError",
    "HyperparamError",
    "MetricsError",
    "NonFiniteMetric",
    "QueueFull",
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


class EventTrainError(Exception):
    """The root: ``except EventTrainError`` catches whatever eventtrain raises on purpose."""


class ConfigurationError(EventTrainError, ValueError):
    """An option, a handler or an argument that cannot work, found before anything ran."""


class StepError(EventTrainError):
    """``step_fn``, ``eval_fn`` or ``predict_fn`` raised or broke its contract."""


class MetricsError(StepError):
    """Metrics that are no flat dict of scalar arrays, or whose names or dtypes changed."""


class StateError(StepError):
    """The state that ``step_fn`` returned differs from the one given in structure, shape or dtype."""


class DataError(EventTrainError):
    """Training, evaluation or prediction data that is empty, exhausted or of the wrong kind."""


class HyperparamError(EventTrainError):
    """A hyperparameter that cannot be read or written."""


class UnknownHyperparam(HyperparamError):
    """No ``optax.inject_hyperparams`` state holds a hyperparameter of this name."""


class AmbiguousHyperparam(HyperparamError):
    """The name stands in several places of the optimiser state; ``path=`` decides."""


class ScheduledHyperparam(HyperparamError):
    """The hyperparameter follows a schedule, which would overwrite any value at the next update."""


class CommandRejected(EventTrainError):
    """A command was not carried out; ``reason`` says why."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class SnapshotError(EventTrainError):
    """A snapshot that is unknown, already released, or that the device has no room for."""


class StorageError(EventTrainError):
    """A store off the machine could not be reached, or refused; ``may_pass``: another try may succeed."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class StateInUse(EventTrainError):
    """``trainer.state`` was read while a run owns it; ``control.snapshot()`` gives a safe copy."""


class AlreadyRunning(EventTrainError):
    """A trainer runs one fit, evaluate or predict at a time."""


class BusError(EventTrainError):
    """The event bus cannot take or deliver an event."""


class BusClosed(BusError):
    """The bus was closed; what is published now would reach nobody."""


class QueueFull(BusError):
    """A ``Lossless`` queue is at its limit, so ``publish`` would have to lose an event."""


class EventReused(BusError):
    """One event instance was published twice; every publication needs an instance of its own."""


class WaitsForItself(BusError):
    """A handler waits for a checkpoint that cannot be complete before the handler returns."""


class NonFiniteMetric(EventTrainError):
    """A metric is NaN or infinite, and a policy was told to fail the run then."""


class SubscriberError(EventTrainError):
    """A subscription with ``on_error="fail"`` failed, which ends the run."""


class EventParseError(EventTrainError, ValueError):
    """Text that is no JSON, or that names a kind of event nobody announced."""


def did_you_mean(given: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns "Did you mean 'x'?" for the known name closest to ``given``, or ``otherwise`` if none is close."""
    nearest = difflib.get_close_matches(given, list(known), n=1)
    return f"Did you mean {nearest[0]!r}?" if nearest else otherwise


def listed(parts: Sequence[str], limit: int = 5) -> str:
    """Returns the first ``limit`` of ``parts``, separated by "; ", and how many more there are."""
    rest = len(parts) - limit
    return "; ".join([*parts[:limit], f"and {rest} more"] if rest > 0 else parts)


def first_lines(text: str, limit: int = 10) -> str:
    """Returns the first ``limit`` lines of ``text``, and how many more there are."""
    lines = text.splitlines()
    rest = len(lines) - limit
    return "\n".join([*lines[:limit], f"... and {rest} more lines"]) if rest > 0 else text
