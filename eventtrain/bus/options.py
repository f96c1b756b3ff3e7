"""What a subscription may be told, and which of it cannot work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from eventtrain.bus.queues import Lossless, Queue
from eventtrain.errors import ConfigurationError
from eventtrain.events import LOOP_EVENTS, Event

EventTypes = type[Event] | UnionType | tuple[type[Event], ...]
Lag = int | None | Mapping[type[Event], int | None]
OnError = Literal["isolate", "retry", "fail"]


def event_classes(event_type: EventTypes) -> tuple[type[Event], ...]:
    """A class, a base class, a union or a tuple of them, as a tuple of classes.

    Raises:
        ConfigurationError: something in it is no event class.
    """
    if isinstance(event_type, tuple):
        parts: tuple[Any, ...] = event_type
    else:
        parts = get_args(event_type) if get_origin(event_type) in (Union, UnionType) else (event_type,)
    for part in parts:
        if not (isinstance(part, type) and issubclass(part, Event)):
            raise ConfigurationError(
                f"Cannot subscribe to {part!r}: event_type is an event class such as eventtrain.EpochCompleted, a base "
                "class such as eventtrain.Event, or a union of them."
            )
    if not parts:
        raise ConfigurationError("Cannot subscribe to no event type at all.")
    return parts


@dataclass(frozen=True)
class Options:
    """The options of one subscription, checked. See ``EventBus.subscribe``."""

    every: int = 1
    every_s: float | None = None
    where: Callable[[Any], bool] | None = None
    once: bool = False
    queue: Queue = Lossless()  # noqa: RUF009  # frozen
    lag: Lag = None
    concurrency: int = 1
    on_error: OnError = "isolate"
    retries: int = 3
    retry_delay_s: float = 0.1
    disable_after: int | None = 100
    timeout_s: float | None = None
    name: str | None = None

    def check(self, name: str, types: tuple[type[Event], ...]) -> None:
        """Raise ConfigurationError for values and combinations that cannot work."""

        def refuse(what: str) -> ConfigurationError:
            return ConfigurationError(f"Cannot subscribe {name}: {what}")

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        if not whole(self.every) or self.every < 1:
            raise refuse(f"every={self.every!r} needs a whole number of at least 1.")
        if self.every_s is not None and not self.every_s > 0:
            raise refuse(f"every_s={self.every_s!r} needs a positive number of seconds.")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise refuse(f"timeout_s={self.timeout_s!r} needs a positive number of seconds.")
        if not whole(self.concurrency) or self.concurrency < 1:
            raise refuse(f"concurrency={self.concurrency!r} needs a whole number of at least 1.")
        if self.on_error not in ("isolate", "retry", "fail"):
            raise refuse(f'on_error={self.on_error!r} is none of "isolate", "retry", "fail".')
        if not whole(self.retries) or self.retries < 0:
            raise refuse(f"retries={self.retries!r} needs a whole number of at least 0.")
        if not self.retry_delay_s >= 0:
            raise refuse(f"retry_delay_s={self.retry_delay_s!r} needs a number of seconds, not negative.")
        if self.disable_after is not None and (not whole(self.disable_after) or self.disable_after < 1):
            raise refuse(
                f"disable_after={self.disable_after!r} needs a whole number of at least 1, or None for never."
            )
        if not isinstance(self.queue, Queue):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise refuse(
                f"queue={self.queue!r} is none of Lossless(), KeepLatest(), DropOldest(n), DropNewest(n)."
            )
        lags: Iterable[tuple[type[Event], int | None]] = (
            self.lag.items() if isinstance(self.lag, Mapping) else [(kind, self.lag) for kind in types]
        )
        for kind, lag in lags:
            if lag is None:
                continue
            if not whole(lag) or lag < 0:
                raise refuse(f"lag={lag!r} needs None, 0 or a whole number of steps.")
            if not issubclass(kind, LOOP_EVENTS):
                raise refuse(
                    f"a finite lag needs an event that the training loop publishes, and {kind.__name__} is none "
                    "(answers to commands and eventtrain.Event as a whole are not either). Use lag=None for it."
                )
            if not isinstance(self.queue, Lossless):
                raise refuse(
                    f"a finite lag needs a Lossless queue; {self.queue!r} may drop the event to decide on."
                )
            if self.concurrency != 1:
                raise refuse("a finite lag needs concurrency=1: decisions are made in order.")
            if self.every_s is not None:
                raise refuse(
                    "a finite lag and every_s= exclude each other: a rerun would choose other events."
                )
