"""Events arrive in a real Redis stream, all of them once and in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.brokers import sender
from tests.subscribers.brokers.test_nats_events import STEPS, fit, killed, slow, steps_of, stopped
from tests.support.brokers import RedisServer, events_in, running
from tests.support.models import batches, make_trainer

redis = pytest.importorskip("redis", reason="redis is not installed")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "SEND_TIMEOUT_S", 1.0)
    monkeypatch.setattr(sender, "MOST_RETRY_S", 0.3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running(RedisServer(tmp_path / "redis")) as started:
        yield started


def entries(server: RedisServer, key: str = "eventtrain:mine:events") -> list[tuple[str, bytes]]:
    with redis.Redis(port=server.port) as client:
        return [(name.decode(), fields[b"events"]) for name, fields in client.xrange(key)]


def test_every_event_is_in_the_stream_once_in_order(tmp_path: Path, server: RedisServer) -> None:
    for attempt in (1, 2):
        events = subs.RedisEvents(server.url, steps="each")
        make_trainer(tmp_path, subscribers=[events], run_id="mine").fit(batches(50), epochs=1)
        assert events.statistics.outages == events.statistics.dropped == 0
        found = events_in([body for name, body in entries(server) if name.startswith(f"{attempt}-")])
        assert steps_of(found) == list(range(1, 51))
        assert (found[0]["kind"], found[-1]["kind"]) == ("run_started", "run_completed")
        assert events.statistics.sent == len(found)


@pytest.mark.parametrize("fault", [killed, stopped])
def test_a_server_that_is_killed_or_stopped_gets_everything_once(
    tmp_path: Path, server: RedisServer, fault: Any
) -> None:
    events: Any = subs.RedisEvents(server.url, steps="each")
    seen = fit(tmp_path, events, lambda: fault(server))
    assert steps_of(events_in([body for _, body in entries(server)])) == list(range(1, STEPS + 1))
    assert len(seen[et.SubscriberFailed]) >= 1
    assert events.statistics.dropped == 0


def test_a_password_that_is_wrong_is_said_and_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(RedisServer(tmp_path / "redis", "--requirepass", "right")) as server:
        events = subs.RedisEvents(f"redis://:hunter2@127.0.0.1:{server.port}/0", finish_timeout_s=0.5)
        trainer = make_trainer(tmp_path, subscribers=[events])
        assert trainer.fit(slow(300), epochs=1).step == 300
    assert f"{server.url}: the server refuses the user or the password" in caplog.text
    assert "hunter2" not in caplog.text + repr(vars(events))


def test_a_stream_that_something_else_writes_to_is_named(
    tmp_path: Path, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis(port=server.port) as client:
        client.xadd("eventtrain:mine:events", {"other": "x"})  # an id made of the time: above all of ours
    events = subs.RedisEvents(server.url, finish_timeout_s=0.3)
    make_trainer(tmp_path, subscribers=[events], run_id="mine").fit(batches(2), epochs=1)
    assert "something else has written to the stream eventtrain:mine:events" in caplog.text
    assert events.statistics.waiting > 0


def test_a_stream_is_trimmed_to_about_the_number_given(tmp_path: Path, server: RedisServer) -> None:
    events = subs.RedisEvents(server.url, steps="each", max_messages=1)
    make_trainer(tmp_path, subscribers=[events], run_id="mine").fit(slow(400, 0.002), epochs=1)
    assert events.statistics.messages > 3
    assert time.monotonic() > 0
    assert len(entries(server)) <= 100 + 1  # nodes of 100 entries
