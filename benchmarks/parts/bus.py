"""Cost of the event bus beside other libraries: publishing, fan-out, isolation and latency.

The fan-out is compared with awaiting the same handlers one after the other. The libraries promise different things:
blinker's and psygnal's handlers run in the publisher, pyee starts a task for each call, abxbus keeps a history. The
isolation is the share of the events that the other handlers receive if one of them always raises.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, NamedTuple

import anyio
import anyio.from_thread
import numpy as np

import eventtrain as et
from benchmarks.figures import Budget, Figure, absent, compared, figure, in_pairs
from benchmarks.machine import Device
from eventtrain.events.parsing import parse_by_steps

PUBLISHED = 10_000
"""Events of a run of ``publish``: fewer than the limit of a Lossless queue, so that none is refused."""
WINDOW = 256
"""Events between two turns of the event loop in the fan-out: about one window of the training loop."""
HANDLERS = (1, 10, 100)


class Ping(et.Event):
    number: int = 0


Handler = Callable[[Any], Awaitable[None]]


class Library(NamedTuple):
    """One bus with its handlers subscribed."""

    send: Callable[[Sequence[Any]], Awaitable[None]]
    drain: Callable[[], Awaitable[Any]]
    make: Callable[[], Any] = Ping


async def nothing() -> None:
    pass


@asynccontextmanager
async def directly(handlers: Sequence[Handler]) -> AsyncGenerator[Library]:
    async def send(events: Sequence[Any]) -> None:
        for event in events:
            for handler in handlers:
                await handler(event)

    yield Library(send, nothing)


@asynccontextmanager
async def eventtrain(handlers: Sequence[Handler]) -> AsyncGenerator[Library]:
    async with et.EventBus() as bus:
        for handler in handlers:
            bus.subscribe(Ping, handler, disable_after=None)
        await bus.drain()

        async def send(events: Sequence[Any]) -> None:
            for event in events:
                bus.publish(event)

        yield Library(send, bus.drain)


@asynccontextmanager
async def asyncio_queue(handlers: Sequence[Handler]) -> AsyncGenerator[Library]:
    """One queue and one task per handler, by hand; a failure ends the task."""
    queues: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in handlers]

    async def work(queue: asyncio.Queue[Any], handler: Handler) -> None:
        while True:
            await handler(await queue.get())
            queue.task_done()

    async def send(events: Sequence[Any]) -> None:
        for event in events:
            for queue in queues:
                queue.put_nowait(event)

    workers = [asyncio.create_task(work(*pair)) for pair in zip(queues, handlers, strict=True)]

    async def drain() -> None:
        for queue, worker in zip(queues, workers, strict=True):
            joined = asyncio.create_task(queue.join())
            await asyncio.wait((joined, worker), return_when=asyncio.FIRST_COMPLETED)
            joined.cancel()

    yield Library(send, drain)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


@asynccontextmanager
async def anyio_streams(handlers: Sequence[Handler]) -> AsyncGenerator[Library]:
    """One memory object stream and one task per handler; a failure cancels the task group."""
    pairs = [anyio.create_memory_object_stream[Any](10**9) for _ in handlers]

    async def work(stream: Any, handler: Handler) -> None:
        async with stream:
            async for event in stream:
                await handler(event)

    async def send(events: Sequence[Any]) -> None:
        for event in events:
            for sender, _ in pairs:
                sender.send_nowait(event)

    async def drain() -> None:
        while any(sender.statistics().current_buffer_used for sender, _ in pairs):
            await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        for (_, stream), handler in zip(pairs, handlers, strict=True):
            tasks.start_soon(work, stream, handler)
        yield Library(send, drain)
        for sender, _ in pairs:
            sender.close()


@asynccontextmanager
async def blinker(handlers: Sequence[Handler]) -> AsyncGenerator[Library]:
    """Awaits the handlers one after the other, in the publisher."""
    import blinker

    signal = blinker.Signal()
    for handler in handlers:
        signal.connect(handler)

    async def send(events: Sequence[Any]) -> None:
        for event in events:
            await signal.send_async(event)

    yield Library(send, nothing)


@asynccontextmanager
async def pyee(handlers: Sequence[Handler]) -> AsyncGenerator[Library]:
    """Starts one task per event and handler."""
    from pyee.asyncio import AsyncIOEventEmitter

    emitter = AsyncIOEventEmitter()
    emitter.add_listener("error", lambda error: None)
    for handler in handlers:
        emitter.add_listener("ping", handler)

    async def send(events: Sequence[Any]) -> None:
        for event in events:
            emitter.emit("ping", event)

    yield Library(send, emitter.wait_for_complete)


@asynccontextmanager
async def psygnal(handlers: Sequence[Handler]) -> AsyncGenerator[Library]:
    """Queues the calls of all coroutines, and awaits them one after the other in one task."""
    import psygnal

    backend = psygnal.set_async_backend("asyncio")
    await backend.running.wait()

    class Source:
        ping = psygnal.Signal(object)

    source = Source()
    for handler in handlers:
        source.ping.connect(handler)

    async def send(events: Sequence[Any]) -> None:
        for event in events:
            source.ping.emit(event)

    yield Library(send, nothing)
    backend.close()


@asynccontextmanager
async def abxbus(handlers: Sequence[Handler]) -> AsyncGenerator[Library]:
    import abxbus

    class AbxPing(abxbus.BaseEvent[None]):
        number: int = 0

    bus = abxbus.EventBus(f"Bench{len(handlers)}", max_history_size=None)
    for index, handler in enumerate(handlers):

        async def call(event: Any, handler: Handler = handler) -> None:
            await handler(event)

        call.__name__ = f"call_{index}"
        bus.on(AbxPing, call)

    async def send(events: Sequence[Any]) -> None:
        for event in events:
            bus.emit(event)

    yield Library(send, bus.wait_until_idle, AbxPing)
    await bus.destroy()


Open = Callable[[Sequence[Handler]], AbstractAsyncContextManager[Library]]

LIBRARIES: dict[str, tuple[Open, int]] = {
    "eventtrain": (eventtrain, 10_000),
    "asyncio.Queue": (asyncio_queue, 10_000),
    "anyio streams": (anyio_streams, 10_000),
    "blinker": (blinker, 10_000),
    "psygnal": (psygnal, 10_000),
    "pyee": (pyee, 5_000),
    "abxbus": (abxbus, 200),
}
"""Name -> how it is opened, and calls of handlers per run: abxbus takes about a millisecond per event."""


class Counting:
    """Handlers that count, the first of which may raise."""

    def __init__(self, number: int, *, failing: bool = False) -> None:
        self.counts = [0] * number
        self.changed_s = 0.0
        self.handlers = [self._make(index, failing and index == 0) for index in range(number)]

    def _make(self, index: int, fails: bool) -> Handler:
        counts = self.counts

        async def handle(event: Any) -> None:
            counts[index] += 1
            if fails:
                raise ValueError("always")

        return handle

    async def all_of(self, events: int, library: Library) -> None:
        """Waits until every handler was called for every event, or nothing has happened for a second."""
        await library.drain()
        ends_s = time.perf_counter() + 1.0
        while min(self.counts) < events and time.perf_counter() < ends_s:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def fan_out(open_library: Open, handlers: int, events: int) -> float:
    """Returns the microseconds per event until every handler has handled it."""
    counting = Counting(handlers)
    async with open_library(counting.handlers) as library:
        made = [library.make() for _ in range(events)]
        began_s = time.perf_counter()
        for start in range(0, events, WINDOW):
            await library.send(made[start : start + WINDOW])
            await asyncio.sleep(0)
        await counting.all_of(events, library)
        took_s = time.perf_counter() - began_s
    if counting.counts != [events] * handlers:
        raise AssertionError(f"Of {events} events the {handlers} handlers received {counting.counts}.")
    return 1e6 * took_s / events


async def isolation(open_library: Open, events: int) -> float:
    """Returns the percentage of the events that nine handlers receive beside one that always raises."""
    counting = Counting(10, failing=True)
    with suppress(ExceptionGroup, ValueError):
        async with open_library(counting.handlers) as library:
            for _ in range(events):
                with suppress(Exception):  # the publisher receives the error, and continues
                    await library.send([library.make()])
                await asyncio.sleep(0)
            await counting.all_of(events, library)
    return 100 * sum(counting.counts[1:]) / (9 * events)


async def latency(open_library: Open, events: int) -> list[float]:
    """Returns the microseconds from publishing to the handler, one event per millisecond."""
    sent_s, found = 0.0, list[float]()

    async def handle(event: Any) -> None:
        found.append(1e6 * (time.perf_counter() - sent_s))

    async with open_library([handle]) as library:
        for _ in range(events):
            event = library.make()
            sent_s = time.perf_counter()
            await library.send([event])
            await asyncio.sleep(1e-3)
        await library.drain()
    return found


# --- publish from a thread ------------------------------------------------------------------------------------


class Minimal:
    """Minimal way to hand an item to another thread: one append, and a check whether that thread sleeps."""

    def __init__(self) -> None:
        self.waiting: deque[Any] = deque()
        self.asleep = False

    def publish(self, event: Any) -> None:
        self.waiting.append(event)
        if self.asleep:
            raise AssertionError


def nanoseconds(publish: Callable[[Any], None]) -> float:
    events = [Ping() for _ in range(PUBLISHED)]
    began_s = time.perf_counter()
    for event in events:
        publish(event)
    return 1e9 * (time.perf_counter() - began_s) / PUBLISHED


def publishing(budget_s: float) -> Figure:
    """Publishes from this thread while a handler keeps the event loop, in another thread, busy."""

    async def busy(bus: et.EventBus, started: threading.Event, free: threading.Event) -> int:
        async def hold(event: et.AlertRaised) -> None:
            started.set()
            free.wait()

        counting = Counting(1)
        subscriptions = [bus.subscribe(et.AlertRaised, hold), bus.subscribe(Ping, counting.handlers[0])]
        bus.publish(et.AlertRaised(name="hold"))
        await bus.drain()
        for subscription in subscriptions:
            subscription.cancel()
        return counting.counts[0]

    with anyio.from_thread.start_blocking_portal() as portal:
        bus = et.EventBus(block_warning_s=60.0)
        with portal.wrap_async_context_manager(bus):

            def ours() -> float:
                started, free = threading.Event(), threading.Event()
                received = portal.start_task_soon(busy, bus, started, free)
                started.wait()
                took_ns = nanoseconds(bus.publish)
                free.set()
                if received.result() != PUBLISHED:
                    raise AssertionError(f"Of {PUBLISHED} events {received.result()} arrived.")
                return took_ns

            return compared(
                "eventtrain",
                ours,
                lambda: nanoseconds(Minimal().publish),
                budget_s,
                at="publish from a thread",
                unit="ns",
                baseline="append and check",
            )


def parsing(budget_s: float) -> Figure:
    """Parses StepCompleted from its JSON, beside finding the kind first and then the class."""
    metrics = {"loss": 0.5, "grad_norm": 1.25, "accuracy": 0.9}
    event = et.StepCompleted(step=5, epoch=0, batch=4, metrics=metrics, run_id="run", seq=5)
    text = event.model_dump_json()

    def microseconds(parse: Callable[[str], et.Event]) -> float:
        began_s = time.perf_counter()
        for _ in range(PUBLISHED):
            parse(text)
        return 1e6 * (time.perf_counter() - began_s) / PUBLISHED

    return compared(
        "eventtrain",
        lambda: microseconds(et.parse_event),
        lambda: microseconds(parse_by_steps),
        budget_s,
        at="parse_event",
        baseline="kind first, then the class",
    )


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns publishing, fan-out, isolation and latency; libraries that are not installed are absent."""
    logging.disable(logging.CRITICAL)
    budget, handlers = Budget(budget_s), HANDLERS[:2] if quick else HANDLERS
    found = list[Figure]()
    for index, (name, (open_library, calls)) in enumerate(LIBRARIES.items()):
        share_s = budget.share(len(LIBRARIES) - index)
        try:
            anyio.run(fan_out, open_library, 1, 1)
        except ImportError as error:
            found.append(absent(name, f"not installed: {error}"))
            continue
        for number in handlers:
            events = max(20, calls // number)

            def run(open_library: Open, number: int = number, events: int = events) -> float:
                return anyio.run(fan_out, open_library, number, events)

            values, direct = in_pairs(
                lambda run=run, its=open_library: run(its),
                lambda run=run: run(directly),
                share_s / (len(handlers) + 1),
            )
            at = f"{number} handler{'s' * (number > 1)}"
            found.append(figure(name, values, direct, at=at, baseline="awaiting the handlers"))
        events = 50 if calls < 1000 else 300
        share = round(anyio.run(isolation, open_library, events), 1)
        found.append(Figure(name, "events beside a failing handler", "%", share))
        delays = anyio.run(latency, open_library, 2 * events)
        for percent in (50, 99):
            value = round(float(np.percentile(delays, percent)), 1)
            found.append(Figure(name, f"latency p{percent}", "us", value, pairs=len(delays)))
    return [*found, publishing(budget_s / 20), parsing(budget_s / 20)]
