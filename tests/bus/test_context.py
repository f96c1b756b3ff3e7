"""Handlers run in a copy of a context (contextvars), which no event inherits from another one."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest

import eventtrain as et
from tests.support.models import batches, make_trainer

request: ContextVar[Any] = ContextVar("request", default="-")


class Ping(et.Event):
    number: int = 0


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("suspends", [False, True])
async def test_what_a_handler_sets_is_gone_at_its_next_event(
    anyio_backend: object, suspends: bool, concurrency: int
) -> None:
    seen: list[Any] = []
    request.set("bus")
    async with et.EventBus() as bus:

        async def handle(event: Ping) -> None:
            seen.append(request.get())
            if event.number % 5 == 2:
                request.set(np.zeros(3))  # its __eq__ has no truth value
            if suspends:
                await anyio.lowlevel.checkpoint()
            if event.number % 5 == 2:
                assert isinstance(request.get(), np.ndarray)

        subscription = bus.subscribe(Ping, handle, concurrency=concurrency)
        for number in range(60):
            bus.publish(Ping(number=number))
        await bus.drain()
        assert subscription.statistics().delivered == 60
    assert seen == ["bus"] * 60


async def test_what_is_set_and_reset_costs_no_new_context_and_tokens_stay_valid(
    anyio_backend: object,
) -> None:
    async with et.EventBus() as bus:

        async def handle(event: Ping) -> None:
            token = request.set(event.number)
            await anyio.lowlevel.checkpoint()
            request.reset(token)

        subscription = bus.subscribe(Ping, handle)
        for number in range(5):
            bus.publish(Ping(number=number))
        await bus.drain()
        assert subscription.statistics().delivered == 5


class Notes(et.Subscriber):
    """Notes the value of ``request`` in each of its methods."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    async def start(self, run: et.RunContext) -> None:
        self.seen["start"] = request.get()

    async def on_step_completed(self, event: et.StepCompleted) -> None:
        self.seen["handler"] = request.get()

    async def on_run_completed(self, event: et.RunCompleted) -> None:
        self.seen["end"] = request.get()

    async def finish(self) -> None:
        self.seen["finish"] = request.get()

    async def stop(self) -> None:
        self.seen["stop"] = request.get()


def expected(value: str) -> dict[str, Any]:
    return dict.fromkeys(("start", "handler", "end", "finish", "stop", "function", "plain"), value)


def noting_trainer(tmp_path: Path, **options: Any) -> tuple[et.Trainer[Any], dict[str, Any]]:
    notes = Notes()
    trainer = make_trainer(tmp_path, subscribers=[notes], **options)

    @trainer.on(et.EpochCompleted)
    async def function(event: et.EpochCompleted) -> None:
        notes.seen["function"] = request.get()

    @trainer.on(et.EpochCompleted)
    def plain(event: et.EpochCompleted) -> None:
        notes.seen["plain"] = request.get()

    return trainer, notes.seen


async def test_a_run_on_a_shared_bus_has_the_context_of_its_caller(
    anyio_backend: object, tmp_path: Path
) -> None:
    request.set("service")
    outside: list[Any] = []
    async with et.EventBus() as bus:

        @bus.on(et.RunCompleted)
        async def note(event: et.RunCompleted) -> None:
            outside.append(request.get())

        trainer, seen = noting_trainer(tmp_path, bus=bus)
        for number in ("41", "42"):
            request.set(number)
            await trainer.fit_async(batches(3), epochs=1)
            assert seen == expected(number)
            seen.clear()
        request.set("thread")
        await anyio.to_thread.run_sync(lambda: trainer.fit(batches(3), epochs=1))
        assert seen == expected("thread")
        await bus.drain()
    assert outside == ["service"] * 3


async def test_a_run_on_a_bus_of_its_own_has_the_context_of_its_caller(
    anyio_backend: object, tmp_path: Path
) -> None:
    trainer, seen = noting_trainer(tmp_path)
    request.set("mine")
    await trainer.fit_async(batches(3), epochs=1)
    assert seen == expected("mine")


def test_fit_and_session_have_the_context_of_their_caller(anyio_backend: Any, tmp_path: Path) -> None:
    backend, options = anyio_backend
    trainer, seen = noting_trainer(tmp_path, backend=backend, backend_options=options)
    token = request.set("fit")
    trainer.fit(batches(3), epochs=1)
    assert seen == expected("fit")
    request.set("session")
    with trainer.session() as session:
        for batch in batches(3):
            session.step(batch)
        session.end_epoch()
    assert seen == expected("session")
    request.reset(token)
