from __future__ import annotations

import functools
import threading
import time
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import anyio
import anyio.lowlevel
import anyio.to_thread
import prometheus_client
import pytest

import eventtrain as et
from eventtrain.bus.bus import core_of
from eventtrain.bus.handlers import describe, takes_control
from eventtrain.validation.callables import is_async


class Ping(et.Event):
    number: int = 0


async def observe(event: Any) -> None: ...


async def decide(event: Any, control: Any) -> None: ...


async def with_default(event: Any, path: str = "", *, flag: bool = False) -> None: ...


async def control_by_name(event: Any, control: Any = None) -> None: ...


async def anything(*args: Any) -> None: ...


async def nothing() -> None: ...


async def three(event: Any, control: Any, more: Any) -> None: ...


async def keyword(event: Any, *, needed: int) -> None: ...


class Caller:
    async def __call__(self, event: Any) -> None: ...

    async def method(self, event: Any, control: Any) -> None: ...


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (observe, False),
        (decide, True),
        (with_default, False),
        (control_by_name, True),
        (anything, False),
        (Caller(), False),
        (Caller().method, True),
        (partial(three, more=1), True),
        (partial(decide, control=None), False),
        ([].append, False),
    ],
)
def test_the_signature_tells_whether_a_handler_takes_the_control(handler: Any, expected: bool) -> None:
    assert takes_control(handler) is expected


@pytest.mark.parametrize("handler", [nothing, three, keyword])
def test_a_handler_that_cannot_be_called_with_event_or_event_and_control_is_refused(handler: Any) -> None:
    with pytest.raises(
        et.ConfigurationError, match=rf"Cannot subscribe {handler.__name__}.*\(event\) or \(event, control\)"
    ):
        et.EventBus().subscribe(Ping, handler)


@pytest.mark.parametrize("thing", [3, None, "handler"])
def test_what_cannot_be_called_is_no_handler(thing: Any) -> None:
    with pytest.raises(
        et.ConfigurationError, match=r"expected a function of \(event\) or \(event, control\), got"
    ):
        et.EventBus().on(Ping)(thing)


def test_coroutine_functions_are_recognised_through_partials_and_objects() -> None:
    assert is_async(partial(partial(observe), 1))
    assert is_async(Caller())
    assert not is_async(print)
    assert describe(partial(observe)) == "observe"
    assert describe(Caller()) == "Caller"


def passed_through(function: Any) -> Any:
    """A decorator for plain functions, as many are."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Note:
    """A coroutine function behind something that is not one."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    async def note(self, event: Ping) -> None:
        await anyio.lowlevel.checkpoint()
        self.numbers.append(event.number)

    async def forgets_to_await(self, event: Ping) -> Any:
        return self.note(event)

    @passed_through
    async def decorated(self, event: Ping) -> None:
        await self.note(event)


def timed(note: Note) -> Any:
    async def handler(event: Ping) -> None:
        await note.note(event)

    return prometheus_client.Summary("handler_seconds", "of handlers", registry=None).time()(handler)


@pytest.mark.parametrize(
    "options", [{}, {"timeout_s": 5.0}, {"on_error": "retry"}, {"concurrency": 2}], ids=str
)
@pytest.mark.parametrize(
    "hidden",
    [
        lambda note: lambda event: note.note(event),
        lambda note: passed_through(note.note),
        lambda note: partial(passed_through(note.note)),
        lambda note: note.decorated,
        lambda note: note.forgets_to_await,
        timed,
        lambda note: MagicMock(side_effect=lambda event: note.note(event), spec=lambda event: None),
    ],
)
async def test_what_a_handler_returns_is_awaited(
    anyio_backend: object, hidden: Any, options: dict[str, Any]
) -> None:
    note = Note()
    async with et.EventBus() as bus:
        subscription = bus.subscribe(Ping, hidden(note), **options)
        for number in range(3):
            bus.publish(Ping(number=number))
        await bus.drain()
        assert sorted(note.numbers) == [0, 1, 2]
        assert subscription.statistics().delivered == 3


async def test_what_fails_behind_a_plain_function_is_a_failure_within_its_timeout_and_retries(
    anyio_backend: object,
) -> None:
    attempts = 0

    async def fails(event: Ping) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await anyio.sleep_forever()
        raise ValueError("never")

    async with et.EventBus() as bus:
        subscription = bus.subscribe(
            Ping, lambda event: fails(event), timeout_s=0.05, on_error="retry", retries=1, retry_delay_s=0
        )
        bus.publish(Ping())
        await bus.drain()
        assert attempts == 2
        assert subscription.statistics().errors == 2
        assert str(subscription.dead_letters[0].error) == "never"


def generator(event: Any) -> Any:
    yield event


async def async_generator(event: Any) -> Any:
    yield event


class GeneratorCaller:
    def __call__(self, event: Any) -> Any:
        yield event


@pytest.mark.parametrize(
    "handler",
    [generator, async_generator, partial(async_generator), GeneratorCaller(), GeneratorCaller().__call__],
)
async def test_a_generator_is_refused_or_fails_by_name_where_it_is_hidden(
    anyio_backend: object, handler: Any
) -> None:
    async with et.EventBus() as bus:
        with pytest.raises(et.ConfigurationError, match="contains a yield"):
            bus.subscribe(Ping, handler)
        subscription = bus.subscribe(Ping, lambda event: handler(event))
        bus.publish(Ping())
        await bus.drain()
        assert "returned a" in str(subscription.dead_letters[0].error)
        assert "generator of" in str(subscription.dead_letters[0].error)
        assert subscription.statistics().delivered == 0


async def always(event: Any) -> bool:
    return True


async def test_an_async_where_is_refused_or_fails_by_name(anyio_backend: object) -> None:
    async with et.EventBus() as bus:
        for where in (always, generator, async_generator, partial(always)):
            with pytest.raises(et.ConfigurationError, match="where must be a plain function"):
                bus.subscribe(Ping, observe, where=where)
            with pytest.raises(et.ConfigurationError, match="where must be a plain function"):
                await bus.wait_for(Ping, where=where)
            hidden = bus.subscribe(
                Ping, observe, where=lambda event, where=where: where(event), name="hidden"
            )
            bus.publish(Ping())
            await bus.drain()
            assert "and its result is used at once" in str(hidden.dead_letters[0].error)
            assert hidden.statistics().delivered == 0
            hidden.cancel()


async def test_without_a_trainer_a_handler_that_takes_the_control_fails_with_the_reason(
    anyio_backend: object,
) -> None:
    async with et.EventBus() as bus:
        subscription = bus.subscribe(Ping, decide)
        bus.publish(Ping())
        await bus.drain()
        assert "no Trainer uses this bus" in str(subscription.dead_letters[0].error)


class Attempts:
    """A control source that notes how each attempt ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    def begin_transaction(self, subscription: Any, event: Any) -> Any:
        ends = self.ends

        class Transaction:
            control = "the control"

            def commit(self) -> None:
                ends.append("committed")

            def discard(self) -> None:
                ends.append("discarded")

        return Transaction()


async def test_each_attempt_has_a_control_of_its_own_committed_only_on_success(anyio_backend: object) -> None:
    attempts, calls = Attempts(), 0
    async with et.EventBus() as bus:
        core_of(bus).control_source = attempts

        @bus.on(Ping, on_error="retry", retries=2, retry_delay_s=0, timeout_s=0.05)
        async def handle(event: Ping, control: Any) -> None:
            nonlocal calls
            calls += 1
            assert control == "the control"
            if calls == 1:
                raise ValueError("first")
            if calls == 2:
                await anyio.sleep_forever()

        bus.publish(Ping())
    assert attempts.ends == ["discarded", "discarded", "committed"]


async def test_a_plain_function_runs_in_a_thread_and_its_error_is_its_own(anyio_backend: object) -> None:
    threads: set[int] = set()
    async with et.EventBus() as bus:

        def handle(event: Ping) -> None:
            threads.add(threading.get_ident())
            if event.number == 1:
                raise ValueError("mine")

        subscription = bus.subscribe(Ping, handle)
        for number in range(3):
            bus.publish(Ping(number=number))
        await bus.drain()
        assert threading.get_ident() not in threads
        assert (subscription.statistics().delivered, subscription.statistics().errors) == (2, 1)


async def test_a_plain_handler_past_its_timeout_never_runs_beside_itself(anyio_backend: object) -> None:
    release, handled = threading.Event(), list[int]()
    running = peak = 0
    async with et.EventBus() as bus:

        def handle(event: Ping) -> None:
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            if event.number == 0:
                release.wait()
            handled.append(event.number)
            running -= 1

        subscription = bus.subscribe(Ping, handle, timeout_s=0.05)
        for number in range(3):
            bus.publish(Ping(number=number))
        with anyio.fail_after(10):
            while subscription.statistics().errors < 2:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            release.set()
            await bus.drain()
        assert peak == 1
        statistics = subscription.statistics()
        assert statistics.delivered + statistics.errors == 3
        assert 0 in handled  # late, and no longer counted as delivered
        assert statistics.delivered == len(handled) - 1


async def test_a_plain_handler_abandoned_at_the_end_blocks_nothing_and_writes_no_statistics(
    anyio_backend: object,
) -> None:
    release, returned = threading.Event(), threading.Event()
    with anyio.fail_after(10):
        async with et.EventBus(drain_timeout_s=0.02) as bus:

            def handle(event: Ping) -> None:
                release.wait()
                returned.set()

            subscription = bus.subscribe(Ping, handle)
            bus.publish(Ping())
        before = subscription.statistics()
        release.set()
        await anyio.to_thread.run_sync(returned.wait)
    after = subscription.statistics()
    assert (after.delivered, after.errors) == (before.delivered, before.errors) == (0, 0)


async def test_forty_blocked_plain_handlers_leave_a_services_own_threads_free(anyio_backend: object) -> None:
    release = threading.Event()
    async with et.EventBus() as bus:

        def block(event: Ping) -> None:
            release.wait()

        for _ in range(40):
            bus.subscribe(Ping, block)
        bus.publish(Ping())
        try:
            with anyio.fail_after(30):
                assert await anyio.to_thread.run_sync(lambda: 1) == 1
        finally:
            release.set()


async def test_cpu_time_of_a_plain_handler_is_charged(anyio_backend: object) -> None:
    async with et.EventBus() as bus:

        def burn(event: Ping) -> None:
            end_s = time.thread_time() + 0.03
            while time.thread_time() < end_s:
                pass

        subscription = bus.subscribe(Ping, burn)
        bus.publish(Ping())
        await bus.drain()
        assert 0.03 <= subscription.statistics().handler_cpu_s < 0.06


# --- annotations ------------------------------------------------------------------------------------------------


async def takes_ping(event: Ping) -> None: ...


async def takes_steps_or_epochs(event: et.StepCompleted | et.EpochCompleted) -> None: ...


async def takes_what_does_not_exist(event: Missing) -> None: ...  # noqa: F821


async def takes_anything(event) -> None: ...


class TakesPing:
    async def __call__(self, event: Ping) -> None: ...

    async def method(self, event: Ping, control: et.Control) -> None: ...


@pytest.mark.parametrize(
    ("handler", "event_type"),
    [
        (takes_ping, et.StepCompleted),
        (takes_ping, Ping | et.StepCompleted),
        (takes_steps_or_epochs, et.EvalCompleted),
        (TakesPing(), et.StepCompleted),
        (TakesPing().method, et.StepCompleted),
        (partial(takes_ping), et.StepCompleted),
        (lambda event: None, Ping),
    ],
)
def test_an_annotation_that_contradicts_the_event_is_refused_by_name(handler: Any, event_type: Any) -> None:
    if handler.__class__ is type(lambda: None) and handler.__name__ == "<lambda>":
        handler.__annotations__["event"] = int
    with pytest.raises(
        et.ConfigurationError, match=r"Cannot subscribe .* 'event' is annotated as .* is not\."
    ):
        et.EventBus().subscribe(event_type, handler)


def test_the_refusal_names_the_handler_the_events_and_the_annotation() -> None:
    with pytest.raises(et.ConfigurationError) as refused:
        et.EventBus().on(et.StepCompleted | Ping)(takes_steps_or_epochs)
    assert str(refused.value) == (
        "Cannot subscribe takes_steps_or_epochs to StepCompleted | Ping: its parameter 'event' is annotated as "
        "StepCompleted | EpochCompleted, which a Ping is not. Correct the event type or the annotation."
    )


@pytest.mark.parametrize(
    ("handler", "event_type"),
    [
        (takes_ping, Ping),
        (takes_ping, et.Event),  # a `where` may select
        (takes_steps_or_epochs, et.StepCompleted | et.EpochCompleted),
        (takes_steps_or_epochs, et.StepCompleted),
        (takes_what_does_not_exist, Ping),
        (takes_anything, Ping),
        (anything, Ping),
        (observe, Ping),
        ([].append, Ping),
        (partial(decide, control=None), Ping),
    ],
)
def test_an_annotation_that_fits_or_says_nothing_is_accepted(handler: Any, event_type: Any) -> None:
    assert et.EventBus().subscribe(event_type, handler).active
