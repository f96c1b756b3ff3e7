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
        (Ping, {"every": 0}, r"every must be an integer >= 1, got 0\."),
        (Ping, {"every": 1.5}, r"every must be an integer >= 1, got 1\.5"),
        (Ping, {"every": True}, r"every must be .* got True"),
        (Ping, {"every_s": 0}, r"every_s must be a number of seconds > 0, got 0"),
        (Ping, {"every_s": float("nan")}, r"every_s must be .* got nan"),
        (Ping, {"timeout_s": -1}, r"timeout_s must be .* got -1"),
        (Ping, {"concurrency": 0}, r"concurrency must be an integer >= 1, got 0"),
        (Ping, {"on_error": "ignore"}, r"on_error must be \"isolate\", \"retry\" or \"fail\", got 'ignore'"),
        (Ping, {"retries": -1}, r"retries must be an integer >= 0, got -1"),
        (Ping, {"retry_delay_s": -0.1}, r"retry_delay_s must be .* got -0\.1"),
        (Ping, {"disable_after": 0}, r"disable_after must be an integer >= 1, or None for never, got 0"),
        (Ping, {"queue": 5}, r"queue must be Lossless\(\), .* got 5"),
        (Ping, {"queue": et.KeepLatest}, r"queue must be Lossless\(\), .* got <class"),
        (et.StepCompleted, {"lag": -1}, r"lag must be None or an integer >= 0, a number of steps, got -1"),
        (et.StepCompleted, {"lag": 1.5}, r"lag must be .* got 1\.5"),
        (Ping, {"lag": 1}, r"Ping is not one"),
        (et.Event, {"lag": 0}, r"Event is not one"),
        (et.CommandApplied, {"lag": 0}, r"CommandApplied is not one"),
        (et.HyperparamChanged, {"lag": 0}, r"HyperparamChanged is not one"),
        (et.StepCompleted | et.CommandApplied, {"lag": 0}, r"CommandApplied is not one"),
        (et.StepCompleted | Ping, {"lag": {Ping: 3}}, r"Ping is not one"),
        (
            et.StepCompleted,
            {"lag": 1, "queue": et.KeepLatest()},
            r"requires a Lossless queue; KeepLatest\(\)",
        ),
        (et.StepCompleted, {"lag": 1, "queue": et.DropOldest(3)}, r"DropOldest\(limit=3\)"),
        (et.StepCompleted, {"lag": 1, "concurrency": 2}, r"requires concurrency=1"),
        (et.StepCompleted, {"lag": 1, "every_s": 1.0}, r"every_s= exclude each other"),
        (et.StepCompleted, {"lag": 0, "per_host": True}, r"per_host=True exclude each other"),
        (et.StepCompleted, {"lag": {et.StepCompleted: 3}, "per_host": True}, r"process 0 decides for all"),
        (et.StepCompleted, {"per_host": 1}, r"per_host must be True or False, got 1"),
        (int, {}, r"expected an event class"),
        (Ping | int, {}, r"expected an event class"),
        ((), {}, r"an empty tuple of event types"),
        ("ping", {}, r"expected an event class"),
        ((Ping, "ping"), {}, r"expected an event class"),
        (Ping, {"evry": 3}, r"unknown option 'evry'\. Did you mean 'every'\?"),
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
        ((et.CommandApplied | Ping, et.StepCompleted), {"queue": None, "name": None}),
        (Ping, {"disable_after": None, "queue": et.DropNewest(1), "concurrency": 8}),
    ],
)
def test_options_that_work_are_taken(event_type: Any, options: dict[str, Any]) -> None:
    assert et.EventBus().subscribe(event_type, handle, **options).active
