from __future__ import annotations

from typing import Any

import pytest

import eventtrain as et


class Ping(et.Event):
    pass


async def handle(event: Any) -> None: ...


@pytest.mark.parametrize(
    ("event_type", "options", "message"),
    [
        (Ping, {"every": 0}, r"every=0 needs a whole number of at least 1"),
        (Ping, {"every": 1.5}, r"every=1\.5"),
        (Ping, {"every": True}, r"every=True"),
        (Ping, {"every_s": 0}, r"every_s=0 needs a positive number"),
        (Ping, {"every_s": float("nan")}, r"every_s=nan"),
        (Ping, {"timeout_s": -1}, r"timeout_s=-1"),
        (Ping, {"concurrency": 0}, r"concurrency=0"),
        (Ping, {"on_error": "ignore"}, r"on_error='ignore' is none of"),
        (Ping, {"retries": -1}, r"retries=-1"),
        (Ping, {"retry_delay_s": -0.1}, r"retry_delay_s=-0\.1"),
        (Ping, {"disable_after": 0}, r"disable_after=0"),
        (Ping, {"queue": 5}, r"queue=5 is none of"),
        (Ping, {"queue": et.KeepLatest}, r"is none of Lossless\(\)"),
        (et.StepCompleted, {"lag": -1}, r"lag=-1 needs None, 0 or a whole number"),
        (et.StepCompleted, {"lag": 1.5}, r"lag=1\.5"),
        (Ping, {"lag": 1}, r"Ping is none"),
        (et.Event, {"lag": 0}, r"Event is none"),
        (et.CommandApplied, {"lag": 0}, r"CommandApplied is none"),
        (et.HyperparamChanged, {"lag": 0}, r"HyperparamChanged is none"),
        (et.StepCompleted | et.CommandApplied, {"lag": 0}, r"CommandApplied is none"),
        (et.StepCompleted | Ping, {"lag": {Ping: 3}}, r"Ping is none"),
        (et.StepCompleted, {"lag": 1, "queue": et.KeepLatest()}, r"needs a Lossless queue; KeepLatest\(\)"),
        (et.StepCompleted, {"lag": 1, "queue": et.DropOldest(3)}, r"DropOldest\(limit=3\)"),
        (et.StepCompleted, {"lag": 1, "concurrency": 2}, r"needs concurrency=1"),
        (et.StepCompleted, {"lag": 1, "every_s": 1.0}, r"every_s= exclude each other"),
        (int, {}, r"event_type is an event class"),
        (Ping | int, {}, r"event_type is an event class"),
        ((), {}, r"no event type at all"),
        ("ping", {}, r"event_type is an event class"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(
    event_type: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(et.ConfigurationError, match=message):
        et.EventBus().subscribe(event_type, handle, **options)


def test_a_refused_subscription_leaves_nothing_behind() -> None:
    bus = et.EventBus()
    with pytest.raises(et.ConfigurationError):
        bus.subscribe(Ping, handle, every=0)
    assert bus.subscriptions == ()


@pytest.mark.parametrize(
    ("event_type", "options"),
    [
        (et.StepCompleted, {"lag": 0}),
        (et.EpochCompleted | et.StepCompleted, {"lag": 64, "every": 10}),
        (et.StepCompleted | Ping, {"lag": {et.StepCompleted: 3}}),
        (et.CommandApplied, {"lag": None}),
        (Ping, {"disable_after": None, "queue": et.DropNewest(1), "concurrency": 8}),
    ],
)
def test_options_that_work_are_taken(event_type: Any, options: dict[str, Any]) -> None:
    assert et.EventBus().subscribe(event_type, handle, **options).state == "active"
