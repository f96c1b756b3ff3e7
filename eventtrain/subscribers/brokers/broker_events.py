"""``BrokerEvents``: base of the subscribers that send the events of a run to a broker."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, Literal

from pydantic import SecretStr

from eventtrain.bus.step_series import StepSeries
from eventtrain.errors import ConfigurationError, SubscriberError
from eventtrain.events import (
    BUILT_IN,
    EvalStepCompleted,
    Event,
    PredictStepCompleted,
    StepCompleted,
    StepsCompleted,
    StepStarted,
)
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.base import RunContext, Subscriber, name_of
from eventtrain.subscribers.brokers.batches import BrokerStatistics, EventBuffer
from eventtrain.subscribers.brokers.sender import BrokerSender, Transport
from eventtrain.validation.arguments import require_choice, require_count, require_number

Steps = Literal["windows", "each", "none"]

OF_STEPS: dict[Steps, tuple[type[Event], ...]] = {
    "windows": (StepsCompleted,),
    "each": (StepCompleted, EvalStepCompleted),
    "none": (),
}
HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?"
NOT_ALWAYS = (StepStarted, StepCompleted, StepsCompleted, EvalStepCompleted, PredictStepCompleted)


class BrokerEvents(Subscriber, ABC):
    """Abstract. Puts each event into a buffer, which a thread sends; training never waits for the broker.

    Args:
        steps: how the steps are sent.
        limit: events that may wait for the broker.
        types: event classes of the user's own.
        finish_timeout_s: how long ``stop`` waits for the broker.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    disable_after = None  # a broker that was away for a day may be back

    def __init__(
        self, *, steps: Steps, limit: int, types: tuple[type[Event], ...], finish_timeout_s: float
    ) -> None:
        owner = type(self).__name__
        require_choice(owner, "steps", steps, ("windows", "each", "none"))
        require_count(owner, "limit", limit, at_least=1)
        require_number(owner, "finish_timeout_s", finish_timeout_s, at_least=0)
        always = tuple(kind for kind in BUILT_IN if kind not in NOT_ALWAYS)
        self.events = (*always, *OF_STEPS[steps], *types)
        self._limit = limit
        self._finish_timeout_s = finish_timeout_s
        self._buffer = EventBuffer(limit)
        self._sender: BrokerSender | None = None
        self._last: Event | None = None

    @property
    def statistics(self) -> BrokerStatistics:
        """Counts of the events of this run, or of the last one. Any thread."""
        return self._buffer.statistics

    @abstractmethod
    def _transport(self, run: RunContext, target: str) -> Transport:
        """Returns the client for a run; connects in ``open`` only."""

    @property
    @abstractmethod
    def _target(self) -> str:
        """The broker in messages, without secrets."""

    async def start(self, run: RunContext) -> None:
        """Starts the thread that sends. The broker need not be there."""
        self._buffer = EventBuffer(self._limit)
        self._sender = BrokerSender(
            self._owner, self._buffer, self._transport(run, self._target), run.publish, self._limit
        )
        self._sender.step = run.start_step
        self._sender.start()

    async def handle(self, event: Event) -> None:
        """Puts the event into the buffer; never waits."""
        if event is self._last:  # a retry of the handler sends nothing twice
            return
        self._last = event
        weight = 1
        if isinstance(event, StepsCompleted):
            weight = max(1, event.last_step - event.first_step + 1)
        self._buffer.put(event.__pydantic_serializer__.to_json(event), weight, lifecycle=event.lifecycle)
        if self._sender is not None:
            self._sender.step = event.step

    async def handle_series(self, series: StepSeries) -> None:
        """As ``handle`` for each of its events, whose JSON the thread makes."""
        self._buffer.put_table(StepTable.of_series(series))
        if self._sender is not None:
            self._sender.step = series.steps[-1]

    @property
    def unwritten(self) -> int:
        """Number of events that the broker lacks."""
        now = self.statistics
        return now.waiting + now.dropped

    async def finish(self) -> None:
        """Publishes how many events were dropped and which commands were refused, as far as that was not published."""
        if self._sender is not None:
            await self._sender.report()

    async def stop(self) -> None:
        """Sends what is left.

        Raises:
            SubscriberError: that took longer than ``finish_timeout_s``.
        """
        sender, self._sender = self._sender, None
        if sender is None:
            return
        in_time = await sender.finish(self._finish_timeout_s)
        now = self.statistics
        if not in_time:
            raise SubscriberError(
                f"{self._target} did not take everything within {self._finish_timeout_s:g} s after the run: "
                f"{now.waiting} events were not sent, and {now.dropped} were dropped before."
            )

    @property
    def _owner(self) -> str:
        return name_of(self)

    @property
    def _suffix(self) -> str:
        """Tells two of these in one run apart, in what they name at the broker; "" for the only one."""
        return "" if self._owner == type(self).__name__ else f":{self._owner}"


def plain(url: str | SecretStr) -> str:
    """Returns the text of a URL that may be secret."""
    return url.get_secret_value() if isinstance(url, SecretStr) else url


def public_target(owner: str, url: str | SecretStr, schemes: tuple[str, ...]) -> str:
    """Returns scheme, host and port of a URL, for messages: without user, password, path and query.

    Raises:
        ConfigurationError: it is not a URL of a broker. Its text is not quoted, since it may contain a password.
    """
    text = plain(url)
    scheme, separator, rest = text.partition("://")
    # The last "@" ends a password; one that contains a "/" would otherwise be taken for a host.
    host = re.split("[/?#]", rest.rpartition("@")[2])[0]
    if not separator or scheme not in schemes or not re.fullmatch(HOST, host):
        raise ConfigurationError(
            f"{owner}(url=...): expected {schemes[0]}://host:port, with {' or '.join(schemes)}. The "
            "URL given is not shown, since it may contain a password."
        )
    return f"{scheme}://{host}"


def require_token(owner: str, name: str, value: Any) -> None:
    """Raises ConfigurationError unless ``value`` can be part of a subject or a key: letters, digits, _ and -."""
    if not (isinstance(value, str) and re.fullmatch("[A-Za-z0-9_-]+", value)):
        raise ConfigurationError(
            f"{owner}({name}={value!r}): {name} must consist of letters, digits, _ and -."
        )
