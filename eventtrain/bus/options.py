"""Subscription options: their types, their defaults, and the combinations that cannot work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, Union, get_args, get_origin

from eventtrain.bus.queues import Lossless, Queue
from eventtrain.errors import ConfigurationError, did_you_mean
from eventtrain.events import LOOP_EVENTS, Event
from eventtrain.validation.annotations import fits, shown
from eventtrain.validation.callables import require_plain

if TYPE_CHECKING:
    from typing_extensions import TypeForm

E = TypeVar("E", bound=Event)

EventTypes = type[Event] | UnionType | tuple[type[Event], ...]
"""An event class, a base class, a union or a tuple of them."""
if TYPE_CHECKING:
    EventTypesOf = TypeForm[E] | tuple[type[E], ...]
    """``EventTypes`` as type checkers see them: they infer ``E`` from a union, too."""
Lag = int | None | Mapping[type[Event], int | None]
OnError = Literal["isolate", "retry", "fail"]


class StreamOptions(TypedDict, Generic[E], total=False):
    """Options of a stream."""

    every: int
    """Only events with ``step % every == 0``; of epoch events, with ``(epoch + 1) % every == 0``. Default 1."""
    where: Callable[[E], bool] | None
    """Only events for which this predicate is true. It runs on the event loop, so it must be quick."""
    queue: Queue | None
    """``Lossless()`` by default; ``KeepLatest()``, ``DropOldest(n)``, ``DropNewest(n)``."""
    name: str | None
    """Name in messages and statistics. Default: the handler's qualified name."""


class SubscriptionOptions(StreamOptions[E], Generic[E], total=False):
    """Options of a subscription: arguments of ``subscribe`` and ``on``, attributes of a ``Subscriber``."""

    every_s: float | None
    """At most one event in so many seconds."""
    once: bool
    """Only the first such event; then the subscription ends."""
    lag: Lag
    """When commands take effect. None (default): as soon as they arrive. L: exactly L steps after the event. 0: before
    the next step. Or a mapping from event class to lag."""
    concurrency: int
    """Number of events that may be handled at once. Above 1, only the starts are in order. Default 1."""
    on_error: OnError
    """Reaction to an exception: "isolate" (default) reports it and continues, "retry" also tries again, "fail" ends
    the run."""
    retries: int
    """Attempts after the first, for ``on_error="retry"``. Default 3."""
    retry_delay_s: float
    """Delay before the first retry; it doubles each time. Default 0.1."""
    disable_after: int | None
    """Number of failures in a row after which the subscription is disabled; None for never. Default 100."""
    timeout_s: float | None
    """An attempt that takes longer is cancelled and counts as failed."""
    per_host: bool
    """In a run of several processes, whether each of them has the subscription. Default False: process 0 alone."""


OPTION_NAMES = tuple(SubscriptionOptions.__annotations__)


class OptionDefaults:
    """The options of ``SubscriptionOptions`` as attributes, with their defaults."""

    every: int = 1
    every_s: float | None = None
    where: Callable[[Any], bool] | None = None
    once: bool = False
    queue: Queue | None = None
    lag: Lag = None
    concurrency: int = 1
    on_error: OnError = "isolate"
    retries: int = 3
    retry_delay_s: float = 0.1
    disable_after: int | None = 100
    timeout_s: float | None = None
    per_host: bool = False
    name: str | None = None


class Options(OptionDefaults):
    """The checked options of one subscription.

    Args:
        given: option name -> value, those of ``SubscriptionOptions``.
        subscriber: name for messages.
        types: the event classes subscribed to.

    Raises:
        ConfigurationError: an unknown option, or a value or combination that cannot work.
    """

    def __init__(self, given: Mapping[str, Any], subscriber: str, types: tuple[type[Event], ...]) -> None:
        self._subscriber = subscriber
        for name in given:
            if name not in OPTION_NAMES:
                raise self._refusal(f"unknown option {name!r}. {did_you_mean(name, OPTION_NAMES)}")
        vars(self).update(given)
        self.policy = self.queue if self.queue is not None else Lossless()
        """The queue policy."""
        self._check_values()
        lags = self.lag.items() if isinstance(self.lag, Mapping) else [(kind, self.lag) for kind in types]
        for event_type, lag in lags:
            if not fits(event_type, type[Event]):
                raise self._refusal(
                    f"lag= maps event classes to numbers of steps, got {shown(event_type)} in it."
                )
            if lag is not None:
                self._check_lag(event_type, lag)

    def _refusal(self, problem: str) -> ConfigurationError:
        return ConfigurationError(f"Cannot subscribe {self._subscriber}: {problem}")

    def _check_values(self) -> None:
        for name, lowest in (("every", 1), ("concurrency", 1), ("retries", 0), ("disable_after", 1)):
            value = getattr(self, name)
            if not _is_integer(value, lowest) and not (value is None and name == "disable_after"):
                or_none = ", or None for never" if name == "disable_after" else ""
                raise self._refusal(f"{name} must be an integer >= {lowest}{or_none}, got {shown(value)}.")
        for name in ("every_s", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not (fits(value, float) and value > 0):
                raise self._refusal(f"{name} must be a number of seconds > 0, got {shown(value)}.")
        if not (fits(self.retry_delay_s, float) and self.retry_delay_s >= 0):
            raise self._refusal(
                f"retry_delay_s must be a number of seconds >= 0, got {shown(self.retry_delay_s)}."
            )
        if not fits(self.on_error, OnError):
            raise self._refusal(f'on_error must be "isolate", "retry" or "fail", got {shown(self.on_error)}.')
        for name in ("once", "per_host"):
            value = getattr(self, name)
            if not fits(value, bool):
                raise self._refusal(f"{name} must be True or False, got {shown(value)}.")
        if self.where is not None:
            if not callable(self.where):
                raise self._refusal(
                    f"where must be a function of an event, or None, got {shown(self.where)}."
                )
            require_plain(f"Cannot subscribe {self._subscriber}: where", self.where)
        if not isinstance(self.policy, Queue):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise self._refusal(
                f"queue must be Lossless(), KeepLatest(), DropOldest(n) or DropNewest(n), got {shown(self.policy)}."
            )

    def _check_lag(self, event_type: type[Event], lag: int) -> None:
        if not _is_integer(lag, 0):
            raise self._refusal(f"lag must be None or an integer >= 0, a number of steps, got {shown(lag)}.")
        if not issubclass(event_type, LOOP_EVENTS):
            raise self._refusal(
                f"a finite lag requires an event that the training loop publishes, and {event_type.__name__} is not "
                "one (nor are answers to commands, or eventtrain.Event as a whole). Use lag=None for it."
            )
        if not isinstance(self.policy, Lossless):
            raise self._refusal(
                f"a finite lag requires a Lossless queue; {self.policy!r} may drop the event to decide on."
            )
        if self.concurrency != 1:
            raise self._refusal("a finite lag requires concurrency=1, because decisions are made in order.")
        if self.per_host:
            raise self._refusal(
                "a finite lag and per_host=True exclude each other, because process 0 decides for all."
            )
        if self.every_s is not None:
            raise self._refusal(
                "a finite lag and every_s= exclude each other, because a rerun would choose other events."
            )


def event_classes(event_types: object) -> tuple[type[Event], ...]:
    """Converts a class, a base class, a union, or a tuple of these, to a tuple of classes.

    Raises:
        ConfigurationError: something in it is not an event class.
    """
    if isinstance(event_types, type) and issubclass(event_types, Event):
        return (event_types,)
    parts = event_types if isinstance(event_types, tuple) else get_args(event_types)
    if not isinstance(event_types, tuple) and get_origin(event_types) not in (Union, UnionType):
        raise ConfigurationError(
            f"Cannot subscribe to {shown(event_types)}: expected an event class such as eventtrain.EpochCompleted, a "
            "base class such as eventtrain.Event, or a union of them."
        )
    if not parts:
        raise ConfigurationError("Cannot subscribe to an empty tuple of event types.")
    return tuple(event_type for part in parts for event_type in event_classes(part))


def _is_integer(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value < 2**63
