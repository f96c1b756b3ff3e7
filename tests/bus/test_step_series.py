"""Steps that come as one item: the same events, for a handler that takes them whole."""

from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.bus.barrier import Barrier, SubscriptionCheckpoint
from eventtrain.bus.bus import core_of
from eventtrain.bus.queues import LosslessQueue
from eventtrain.bus.step_series import StepColumns, StepSeries
from eventtrain.bus.training_stream import EventSeries
from tests.support.models import batches, make_trainer


@pytest.fixture(autouse=True)
def on_every_event_loop(anyio_backend: object) -> None:
    """The async ones of these tests run on asyncio, uvloop and trio."""


class Whole(et.Subscriber):
    """Takes series, and keeps their events."""

    events = et.StepCompleted

    def __init__(self, **options: Any) -> None:
        self.series: list[StepSeries] = []
        self.single: list[et.Event] = []
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def seen(self) -> list[Any]:
        return [event for series in self.series for event in series.events()]

    async def handle(self, event: et.Event) -> None:
        self.single.append(event)

    async def handle_series(self, series: StepSeries) -> None:
        self.series.append(series)


class Single(Whole):
    """Gets events, since a subclass has changed what handling means."""

    async def handle(self, event: et.Event) -> None:
        await super().handle(event)


def steps(first: int, last: int) -> EventSeries:
    loss = np.arange(first, last + 1) / 4

    def build(wanted: Any) -> list[et.Event]:
        return [
            et.StepCompleted(step=step, epoch=2, batch=step - 1, metrics={"loss": loss[step - first].item()})
            for step in wanted
        ]

    columns = StepColumns(first_step=first, first_batch=first - 1, epoch=2, metrics={"loss": loss})
    return EventSeries(et.StepCompleted, range(first, last + 1), build, columns)


async def added(bus: et.EventBus, subscriber: Whole, **options: Any) -> Any:
    core = core_of(bus).subscribe(
        subscriber.events, subscriber.handle, options, take_series=subscriber.handle_series
    )
    await bus.drain()
    return core


def rows(events: list[Any]) -> list[dict[str, Any]]:
    return [json.loads(event.model_dump_json()) for event in events]


@pytest.mark.parametrize("every", [1, 3])
async def test_a_series_has_the_events_with_their_numbers_and_the_place_among_others(every: int) -> None:
    whole, single, other = Whole(), Single(), Single()
    async with et.EventBus() as bus:
        for subscriber, offer in ((whole, True), (single, False)):
            series = {"take_series": subscriber.handle_series} if offer else {}
            types = et.StepCompleted | et.EpochStarted
            core_of(bus).subscribe(types, subscriber.handle, {"every": every}, **series)
        core_of(bus).subscribe(et.StepCompleted, other.handle, {"every": 5})
        await bus.drain()
        core_of(bus).feed([steps(1, 200), et.EpochStarted(step=200, epoch=2), steps(201, 300)])
        await bus.drain()
    assert rows(whole.seen) == rows([e for e in single.single if e.kind == "step_completed"])
    assert [event.step for event in whole.seen] == [n for n in range(1, 301) if n % every == 0]
    assert rows(whole.single) == rows([e for e in single.single if e.kind == "epoch_started"])
    assert [series.metrics["loss"].tolist() for series in whole.series] == [
        [event.metrics["loss"] for event in series.events()] for series in whole.series
    ]
    for series in whole.series:
        assert [*series.batches] == [event.batch for event in series.events()]
        assert series.epoch == 2
    numbers = [event.seq for event in (*whole.seen, *other.single)]
    assert len({*numbers}) == len({event.step for event in (*whole.seen, *other.single)})


async def test_a_window_is_one_item_if_no_event_of_it_is_built() -> None:
    whole = Whole()
    async with et.EventBus() as bus:
        await added(bus, whole)
        core_of(bus).feed([steps(1, 900)])
        await bus.drain()
    assert [len(series) for series in whole.series] == [900]


@pytest.mark.parametrize(
    "options",
    [
        {"where": lambda event: True},
        {"once": True},
        {"every_s": 0.001},
        {"queue": et.DropOldest(5_000)},
        {"timeout_s": 60.0},
        {"on_error": "retry"},
        {"concurrency": 2},
        {"lag": 5},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_options_that_are_about_single_events_get_single_events(options: dict[str, Any]) -> None:
    whole = Whole()
    async with et.EventBus() as bus:
        (await added(bus, whole, **options)).activate()
        core_of(bus).feed([steps(1, 20)])
        await bus.drain()
    assert whole.series == []
    assert whole.single


async def test_a_failure_on_a_series_is_one_failure_and_each_of_its_events_a_dead_letter() -> None:
    class Failing(Whole):
        broken = True

        async def handle_series(self, series: StepSeries) -> None:
            if self.broken:
                raise OSError("disk full")
            await super().handle_series(series)

    failing, failures = Failing(), Whole()
    async with et.EventBus() as bus:
        bus.subscribe(et.SubscriberFailed, failures.handle)
        core = await added(bus, failing, disable_after=2)
        core_of(bus).feed([steps(1, 64)])
        await bus.drain()
        assert core.active
        assert core.statistics().errors == 1
        assert [letter.event.step for letter in core.failures.dead_letters] == [*range(1, 65)]
        failing.broken = False
        core.redeliver()
        core_of(bus).feed([steps(65, 70)])
        await bus.drain()
        assert [event.step for event in failing.single] == [*range(1, 65)]
        assert [event.step for event in failing.seen] == [*range(65, 71)]
        assert core.statistics().delivered == 70
    assert [event.error for event in failures.single] == ["OSError: disk full"]


async def test_waiting_series_count_as_their_events_and_are_in_the_checkpoint_as_such() -> None:
    free = anyio.Event()

    class Slow(Whole):
        async def handle_series(self, series: StepSeries) -> None:
            await free.wait()
            await super().handle_series(series)

    slow = Slow()

    async def save() -> SubscriptionCheckpoint:
        return SubscriptionCheckpoint({"n": len(slow.seen)})

    async with et.EventBus() as bus:
        core = core_of(bus).subscribe(
            et.StepCompleted,
            slow.handle,
            {"queue": et.Lossless(limit=100)},
            take_series=slow.handle_series,
            save=save,
        )
        await bus.drain()
        core_of(bus).feed([steps(1, 10), steps(11, 500)])
        with anyio.fail_after(5):
            while core.queue.room():  # noqa: ASYNC110
                await anyio.sleep(0.001)
        assert core.statistics().pending == 100 + 1  # ten are being handled, as one item
        barrier: Barrier[None] = Barrier(10, None)
        barrier.expect([core.name], seq=0)
        core.contribute_to(barrier)
        free.set()
        shares = await anyio.to_thread.run_sync(barrier.wait, 5.0)
        await bus.drain()
    assert [event.step for event in shares[core.name].unhandled] == [*range(11, 111)]
    assert [event.step for event in slow.seen] == [*range(1, 501)]


def test_a_queue_forgets_all_events_of_a_series() -> None:
    queue = LosslessQueue(10)
    queue.put([1])
    queue.put_series("series", 4)
    assert (len(queue), queue.room()) == (5, 5)
    assert queue.clear() == 5
    assert (len(queue), queue.room()) == (0, 10)


@pytest.mark.parametrize("every", [1, 4])
def test_a_log_of_series_is_the_log_of_their_events(tmp_path: Any, every: int) -> None:
    class ByEvent(subs.JSONLLogger):
        async def handle(self, event: et.Event) -> None:
            await super().handle(event)

    loggers = [subs.JSONLLogger("series.jsonl"), ByEvent("events.jsonl")]
    for logger in loggers:
        logger.every = every
    trainer = make_trainer(tmp_path, subscribers=loggers)

    @trainer.on(et.StepCompleted, every=10, lag=3)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.9)

    trainer.fit(batches(8), epochs=12)
    series, events = ((tmp_path / "run" / name).read_text() for name in ("series.jsonl", "events.jsonl"))
    assert series == events
    assert series.count('"kind":"step_completed"') == 96 // every


def test_a_series_handler_that_is_not_async_is_refused_by_name(tmp_path: Any) -> None:
    class Plain(et.Subscriber):
        events = et.StepCompleted

        async def handle(self, event: et.StepCompleted) -> None: ...

        def handle_series(self, series: StepSeries) -> None: ...

    with pytest.raises(et.ConfigurationError, match=r"Plain.handle_series must be written `async def"):
        make_trainer(tmp_path, subscribers=[Plain()])
