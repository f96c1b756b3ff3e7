"""``BrokerSender``: a thread that sends what an ``EventBuffer`` holds, again and again until the broker has it.

A transport is three coroutines, ``open``, ``send`` and ``close``. They run on an asyncio event loop of the thread, so
that the client of a broker needs no certain backend of the bus, and a handler that blocks the bus does not stop it.
The thread looks at the buffer 20 times a second: what the event loop of the bus does for an event is an append.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Protocol

import anyio

from eventtrain.errors import EventTrainError, QueueFull
from eventtrain.events import Event, SubscriberFailed, SubscriberLagged
from eventtrain.subscribers._shared.log_filter import quiet_libraries
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.brokers.batches import EventBuffer, Message

logger = logging.getLogger("eventtrain")

POLL_S = 0.05
"""How often the thread looks at the buffer; a message has the events of this time, or as many as fit into it."""
RETRY_S, MOST_RETRY_S = 0.1, 5.0
"""First and longest delay before the broker is tried again."""
MOST_BYTES = 2**20
"""Of the body of a message. Lowered when the broker takes no message of a size."""
OPEN_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
REPORT_S = 1.0
"""How often refused commands are reported."""


class BrokerError(Exception):
    """The broker did not take a message, or cannot be reached. Its text is shown, so it must not contain secrets.

    Attributes:
        too_large: the message is above a limit of the broker.
    """

    def __init__(self, text: str, *, too_large: bool = False) -> None:
        super().__init__(text)
        self.too_large = too_large


class Transport(Protocol):
    """The client of one broker. All coroutines run on the same event loop, one at a time.

    Attributes:
        target: the broker in messages, without secrets.
        most_bytes: of the body of a message; valid after ``open``.
    """

    target: str
    most_bytes: int

    async def open(self) -> None:
        """Connects. Raises BrokerError."""
        ...

    async def send(self, message: Message) -> None:
        """Returns when the broker has stored the message, now or earlier. Raises BrokerError."""
        ...

    async def close(self) -> None:
        """Disconnects; also after a failed ``open``."""
        ...


class BrokerSender(threading.Thread):
    """Sends the messages of ``buffer`` in their order, one at a time, until ``finish``.

    An outage begins with the first failure, or when the limit drops events; SubscriberFailed reports it. It ends when
    the broker takes messages again and at most half of the limit waits; SubscriberLagged then counts what was dropped.

    Args:
        owner: name of the subscriber.
        buffer: of the events.
        transport: to the broker. Used in this thread only.
        publish: ``EventBus.publish``.
        limit: of the buffer.
    """

    def __init__(
        self,
        owner: str,
        buffer: EventBuffer,
        transport: Transport,
        publish: Callable[[Event], None],
        limit: int,
    ) -> None:
        super().__init__(name=f"eventtrain {owner}", daemon=True)
        self.step = 0
        """Shown in what the thread publishes. Set by the event loop."""
        self._owner = owner
        self._buffer = buffer
        self._transport = transport
        self._publish = publish
        self._limit = limit
        self._ending = threading.Event()
        self._stopping = threading.Event()
        self._reports_now = threading.Event()
        self._unpublished: list[Event] = []
        self._in_outage = False
        self._most_bytes = MOST_BYTES
        self._reported_drops = 0
        self._refused: Counter[str] = Counter()
        self._report_at_s = 0.0

    # --- on the bus' event loop -------------------------------------------------------------------------------

    async def report(self) -> None:
        """Publishes what was counted and not published yet, while the subscribers still listen."""
        self._reports_now.set()
        while self._reports_now.is_set() and self.is_alive():  # noqa: ASYNC110  # another thread clears it
            await anyio.sleep(POLL_S / 5)

    async def finish(self, timeout_s: float) -> bool:
        """Sends what is left; returns whether the broker has everything within ``timeout_s``."""
        in_time = False
        try:
            self._ending.set()
            in_time = await in_own_thread(lambda: self._ended_within(timeout_s))
        finally:  # also if this is cancelled: the trainer's drain_timeout_s may be shorter
            self._stopping.set()
        return in_time and not self._buffer.waiting

    def _ended_within(self, timeout_s: float) -> bool:
        self.join(timeout_s)
        return not self.is_alive()

    # --- on the thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the thread's event loop."""
        with quiet_libraries(), asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            # Tasks of a client that fail on their own would be logged with text that may contain secrets.
            runner.get_loop().set_exception_handler(lambda loop, context: None)
            runner.run(self._serve())

    def refuse(self, reason: str) -> None:
        """Counts a refused command, to be reported together with others."""
        self._buffer.count(refused=1)
        self._refused[reason] += 1

    async def _serve(self) -> None:
        delay_s = RETRY_S
        while not self._is_done:
            began_s = monotonic()
            try:
                await self._bounded(self._transport.open(), OPEN_TIMEOUT_S, "it did not answer")
                await self._send_all()
            except BrokerError as error:
                self._begin_outage(str(error))
            except Exception as error:  # its text may contain secrets
                self._begin_outage(f"it failed with {type(error).__name__}")
            with suppress(Exception):
                await asyncio.wait_for(self._transport.close(), CLOSE_TIMEOUT_S)
            if monotonic() - began_s > MOST_RETRY_S:
                delay_s = RETRY_S  # it worked for a while
            await self._sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_S if self._ending.is_set() else MOST_RETRY_S)
        self._publish = _nowhere  # it would be sent by this very thread
        self._report(last=True)

    async def _send_all(self) -> None:
        """Sends messages until the run has ended and nothing is left. Raises BrokerError."""
        buffer, transport = self._buffer, self._transport
        while True:
            self._report()
            if not (self._ending.is_set() or buffer.has_whole_message):
                await asyncio.sleep(POLL_S)
            if self._stopping.is_set():
                return
            message = buffer.next_message(min(transport.most_bytes, self._most_bytes))
            if message is None:
                if self._ending.is_set():
                    return
                continue
            try:
                await self._bounded(
                    transport.send(message), SEND_TIMEOUT_S, "it did not acknowledge a message"
                )
            except BrokerError as error:
                if not error.too_large:
                    raise
                if buffer.split(message):
                    self._most_bytes = min(self._most_bytes, max(1, len(message.body) // 2))
                else:
                    buffer.drop(message)
                    self._log_and_publish(f"an event of {len(message.body)} bytes was dropped: {error}")
                    self._report_drops()
                continue
            buffer.acknowledge(message)
            if self._in_outage and buffer.waiting <= self._limit // 2:
                self._end_outage()

    async def _bounded(self, call: object, timeout_s: float, text: str) -> None:
        task = asyncio.ensure_future(call)  # pyright: ignore  # a coroutine
        ends_s = monotonic() + timeout_s
        while not task.done():
            left_s = ends_s - monotonic()
            if left_s <= 0 or self._stopping.is_set():
                task.cancel()
                await asyncio.wait([task], timeout=CLOSE_TIMEOUT_S)
                raise BrokerError(f"{text} within {timeout_s:g} s")
            await asyncio.wait([task], timeout=min(left_s, POLL_S))
            self._report()
        task.result()

    async def _sleep(self, delay_s: float) -> None:
        ends_s, ending = monotonic() + delay_s, self._ending.is_set()
        while monotonic() < ends_s and self._ending.is_set() == ending and not self._is_done:
            self._report()
            await asyncio.sleep(POLL_S)

    @property
    def _is_done(self) -> bool:
        if self._stopping.is_set():
            return True
        return self._ending.is_set() and not self._buffer.waiting

    # --- reports ----------------------------------------------------------------------------------------------

    def _begin_outage(self, text: str) -> None:
        if not self._in_outage and not self._stopping.is_set():
            self._in_outage = True
            self._buffer.count(outages=1)
            self._log_and_publish(text)

    def _end_outage(self) -> None:
        self._in_outage = False
        dropped = self._report_drops()
        logger.info("%s works again; %d events were dropped", self._transport.target, dropped)

    def _report_drops(self) -> int:
        dropped = self._buffer.statistics.dropped - self._reported_drops
        if dropped:
            self._reported_drops += dropped
            logger.error("%s lacks %d events, which were dropped", self._transport.target, dropped)
            self._put(SubscriberLagged(step=self.step, subscriber=self._owner, dropped=dropped))
        return dropped

    def _report(self, *, last: bool = False) -> None:
        """Reports what the limit drops and which commands were refused, and publishes what found no room before."""
        now_s, asked = monotonic(), self._reports_now.is_set()
        if now_s < self._report_at_s and not asked and not last:
            return
        self._report_at_s = now_s + REPORT_S
        if not self._in_outage and self._buffer.statistics.dropped > self._reported_drops:
            self._begin_outage(
                f"it is slower than the run: more than {self._limit} events wait, and more are dropped"
            )
        if asked or last:
            self._report_drops()
        for reason, count in self._refused.items():
            logger.warning("%s refused %d commands: %s", self._owner, count, reason)
            error = f"{count} commands were refused: {reason}"
            kind = "command"
            self._put(
                SubscriberFailed(
                    step=self.step, subscriber=self._owner, event_kind=kind, error=error, count=count
                )
            )
        self._refused.clear()
        waiting, self._unpublished = self._unpublished, []
        for event in waiting:
            self._put(event)
        self._reports_now.clear()

    def _log_and_publish(self, text: str) -> None:
        text = f"{self._transport.target}: {text}"
        logger.error("%s", text)
        self._put(SubscriberFailed(step=self.step, subscriber=self._owner, event_kind="send", error=text))

    def _put(self, event: Event) -> None:
        try:
            self._publish(event)
        except QueueFull:
            self._unpublished.append(event)
        except EventTrainError as error:  # the bus is closed; the log has it
            logger.debug("%s was not published: %s", event.kind, error)


def _nowhere(event: Event) -> None:
    """Takes the place of ``publish`` when all has ended; the log has what the event would say."""
