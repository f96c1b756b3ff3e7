"""Events arrive at a real nats-server, all of them once and in order, or are counted and reported."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.brokers import sender
from tests.support.brokers import NATSServer, events_in, nats_messages, running
from tests.support.models import batches, make_trainer

pytest.importorskip("nats", reason="nats-py is not installed")

STEPS = 1_500


def slow(steps: int = STEPS, step_s: float = 0.001) -> Callable[[int], Iterator[Any]]:
    made = batches(4)

    def data(epoch: int) -> Iterator[Any]:
        for n in range(steps):
            time.sleep(step_s)
            yield made[n % 4]

    return data


def stored(server: NATSServer, **options: Any) -> list[dict[str, Any]]:
    return events_in([message.data for message in asyncio.run(nats_messages(server.url, **options))])


def steps_of(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events if event["kind"] == "step_completed"]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "SEND_TIMEOUT_S", 1.0)
    monkeypatch.setattr(sender, "MOST_RETRY_S", 0.3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NATSServer]:
    with running(NATSServer(tmp_path / "nats")) as started:
        yield started


def fit(
    tmp_path: Path, events: subs.NATSEvents, disturb: Callable[[], None] = lambda: None, **options: Any
) -> dict[type[et.Event], list[Any]]:
    """Trains, calls ``disturb`` in a thread at step 200, and returns what the subscriber published."""
    trainer = make_trainer(tmp_path, subscribers=[events], run_id="mine", **options)
    seen: dict[type[et.Event], list[Any]] = {et.SubscriberFailed: [], et.SubscriberLagged: []}
    threads: list[threading.Thread] = []

    @trainer.on(tuple(seen))
    async def note(event: et.Event) -> None:
        seen[type(event)].append(event)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 200)
    async def begin(event: et.StepCompleted) -> None:
        threads.append(threading.Thread(target=disturb))
        threads[0].start()

    trainer.fit(slow(), epochs=1)
    for thread in threads:
        thread.join()
    return seen


def test_every_event_of_a_run_is_in_the_stream_once_in_order_as_it_was_published(
    tmp_path: Path, server: NATSServer
) -> None:
    events = subs.NATSEvents(server.url, steps="each")
    trainer = make_trainer(tmp_path, subscribers=[events, subs.JSONLLogger("log.jsonl")], run_id="my.run")
    trainer.fit(batches(50), epochs=2, eval_data=batches(2))
    found = stored(server)
    assert found[0]["kind"] == "run_started"
    assert found[-1]["kind"] == "run_completed"
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [event for event in found if event["kind"] != "snapshot_taken"] == log
    assert events.statistics.sent == len(found)
    assert events.statistics.dropped == events.statistics.outages == 0
    messages = asyncio.run(nats_messages(server.url))
    assert {message.subject for message in messages} == {"eventtrain.my_run.events"}
    assert [message.headers["Nats-Msg-Id"] for message in messages] == [
        f"my.run:1:{number}" for number in range(1, len(messages) + 1)
    ]
    assert all(isinstance(et.parse_event(event), et.Event) for event in found)


@pytest.mark.parametrize(("steps", "kinds"), [("windows", {"steps_completed"}), ("none", set())])
def test_steps_are_sent_as_windows_or_not_at_all(
    tmp_path: Path, server: NATSServer, steps: Any, kinds: set[str]
) -> None:
    class Mine(et.Event):
        pass

    events = subs.NATSEvents(server.url, steps=steps, types=(Mine,))
    trainer = make_trainer(tmp_path, subscribers=[events])
    trainer.on(et.EpochCompleted)(lambda event: trainer.bus.publish(Mine()))
    trainer.fit(batches(50), epochs=1)
    found = {event["kind"] for event in stored(server)}
    assert {kind for kind in found if "step" in kind} == kinds
    assert {"mine", "epoch_completed", "run_completed"} <= found


def killed(server: NATSServer) -> None:
    server.kill()
    time.sleep(1.0)
    server.start()


def stopped(server: NATSServer) -> None:
    server.signal(signal.SIGSTOP)
    time.sleep(2.0)
    server.signal(signal.SIGCONT)


@pytest.mark.parametrize("fault", [killed, stopped])
def test_a_server_that_is_killed_or_stopped_gets_everything_once_and_that_is_said(
    tmp_path: Path, server: NATSServer, fault: Callable[[NATSServer], None]
) -> None:
    events = subs.NATSEvents(server.url, steps="each")
    seen = fit(tmp_path, events, lambda: fault(server))
    found = stored(server)
    assert steps_of(found) == list(range(1, STEPS + 1))
    keys = [(event["stream"], event["seq"]) for event in found]
    assert len(keys) == len(set(keys))
    assert events.statistics.outages == len(seen[et.SubscriberFailed]) >= 1
    assert all(server.url in event.error for event in seen[et.SubscriberFailed])
    assert events.statistics.dropped == 0


def test_a_server_that_comes_later_gets_everything_and_a_small_limit_counts_what_it_drops(
    tmp_path: Path,
) -> None:
    for limit in (50_000, 300):
        late = NATSServer(tmp_path / f"nats-{limit}")
        events = subs.NATSEvents(late.url, steps="each", limit=limit)
        timer = threading.Timer(0.7, late.start)
        timer.start()
        try:
            seen = fit(tmp_path / f"{limit}", events)
            timer.join()
            found = stored(late)
        finally:
            late.kill()
        steps, now = steps_of(found), events.statistics
        assert steps == sorted(set(steps))
        assert now.sent == len(found)
        if limit == 300:
            assert STEPS - len(steps) <= now.dropped
            assert now.dropped == sum(event.dropped for event in seen[et.SubscriberLagged]) > 0
            assert {"run_started", "epoch_completed", "run_completed"} <= {event["kind"] for event in found}
        else:
            assert steps == list(range(1, STEPS + 1))
            assert now.dropped == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_a_server_training_is_not_held_up_and_the_end_says_what_was_not_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    absent = NATSServer(tmp_path / "nats")
    events = subs.NATSEvents(absent.url, steps="each", finish_timeout_s=0.5)
    began_s = time.monotonic()
    trainer = make_trainer(tmp_path, subscribers=[events])
    assert trainer.fit(batches(100), epochs=1).step == 100
    assert time.monotonic() - began_s < 8
    assert f"{absent.url}: the connection was refused" in caplog.text
    assert re_found(r"10\d events were not sent", caplog.text)
    assert events.statistics.waiting > 100
    assert not [thread for thread in threading.enumerate() if "NATSEvents" in thread.name and alive(thread)]


def re_found(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text) is not None


def alive(thread: threading.Thread) -> bool:
    thread.join(3)
    return thread.is_alive()


PERMISSIONS = """
authorization {
  users = [
    {user: "admin", password: "all"}
    {user: "trainer", password: "hunter2", permissions: {publish: ["$JS.API.>"], subscribe: ["_INBOX.>"]}}
  ]
}
"""


@pytest.mark.parametrize(
    ("login", "reason"),
    [
        ("trainer:hunter2", "the permissions of this user do not suffice"),
        ("trainer:swordfish", "refuses the user"),
    ],
)
def test_permissions_that_do_not_suffice_are_named_and_no_secret_is_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, login: str, reason: str
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(NATSServer(tmp_path / "nats", PERMISSIONS)) as server:
        events = subs.NATSEvents(f"nats://{login}@127.0.0.1:{server.port}", finish_timeout_s=0.5)
        trainer = make_trainer(tmp_path, subscribers=[events, subs.JSONLLogger("all.jsonl", events=et.Event)])
        failures: list[et.SubscriberFailed] = []
        trainer.on(et.SubscriberFailed)(failures.append)
        assert trainer.fit(slow(400), epochs=1).step == 400
    assert reason in failures[0].error
    shown = [caplog.text, repr(events), repr(vars(events)), (tmp_path / "run" / "all.jsonl").read_text()]
    assert not [text for text in shown for secret in ("hunter2", "swordfish") if secret in text]
    assert events.statistics.waiting > 0


def test_messages_above_the_limit_of_the_server_are_split_and_a_single_event_is_dropped_by_name(
    tmp_path: Path,
) -> None:
    class Large(et.Event):
        text: str

    with running(NATSServer(tmp_path / "nats", "max_payload: 4096")) as server:
        events = subs.NATSEvents(server.url, steps="each", types=(Large,))
        trainer = make_trainer(tmp_path, subscribers=[events])
        failures: list[et.SubscriberFailed] = []
        trainer.on(et.SubscriberFailed)(failures.append)
        trainer.on(et.StepCompleted, where=lambda event: event.step == 100)(
            lambda event: trainer.bus.publish(Large(text="x" * 5_000))
        )
        trainer.fit(slow(300), epochs=1)
        found = stored(server)
    assert steps_of(found) == list(range(1, 301))
    assert events.statistics.dropped == 1
    (failure,) = failures
    assert "was dropped: the server takes 3072 bytes in a message" in failure.error


def test_a_limit_of_the_stream_splits_messages_too(tmp_path: Path, server: NATSServer) -> None:
    async def make_stream() -> None:
        import nats

        client = await nats.connect(server.url)
        await client.jetstream().add_stream(
            name="eventtrain", subjects=["eventtrain.*.events"], max_msg_size=3_000
        )
        await client.close()

    asyncio.run(make_stream())
    events = subs.NATSEvents(server.url, steps="each")
    make_trainer(tmp_path, subscribers=[events]).fit(batches(4) * 50, epochs=1)
    assert steps_of(stored(server)) == list(range(1, 201))
    assert events.statistics.dropped == 0


def test_a_resumed_run_and_one_whose_folder_was_lost_lose_no_event_to_the_ids_of_another(
    tmp_path: Path, server: NATSServer
) -> None:
    """Message ids differ by attempt; where the attempt was forgotten, the server's answer tells."""
    for folder in ("a", "a", "b"):
        events = subs.NATSEvents(server.url, steps="each")
        trainer = make_trainer(tmp_path / folder, subscribers=[events], run_id="mine")
        trainer.fit(batches(20), epochs=1)
    found = stored(server)
    assert steps_of(found) == [*range(1, 21)] * 3
    assert [event["attempt"] for event in found if event["kind"] == "run_started"] == [1, 2, 1]


def test_two_of_them_in_one_run_lose_nothing_to_each_other(tmp_path: Path, server: NATSServer) -> None:
    both = [subs.NATSEvents(server.url, steps="none"), subs.NATSEvents(server.url, steps="none")]
    make_trainer(tmp_path, subscribers=both).fit(batches(2), epochs=1)
    kinds = [event["kind"] for event in stored(server)]
    assert kinds.count("run_started") == kinds.count("run_completed") == 2


# --- commands ---------------------------------------------------------------------------------------------------


def request(identity: str, *, expires_s: float = 30.0, **command: Any) -> bytes:
    expires = (datetime.now(UTC) + timedelta(seconds=expires_s)).isoformat()
    return json.dumps({"id": identity, "expires": expires, "command": command}).encode()


def test_commands_over_nats_are_carried_out_once_and_answered(tmp_path: Path, server: NATSServer) -> None:
    import nats

    answers: list[dict[str, Any]] = []
    change = {"kind": "set_hyperparam", "name": "learning_rate", "value": 0.125}

    async def steer() -> None:
        client = await nats.connect(server.url)
        requests = [
            request("a", **change),
            request("a", **change),
            b"garbage",
            request("b", expires_s=-1, **change),
            request("c", kind="set_hyperparam", name="learning_rte", value=1.0),
            request("d", kind="stop", reason="enough"),
        ]
        for data in requests:
            answer = await client.request("eventtrain.mine.commands", data, timeout=10)
            answers.append(json.loads(answer.data))
        await client.close()

    events = subs.NATSEvents(server.url, commands=True)
    seen = fit(tmp_path, events, lambda: asyncio.run(steer()))
    applied, doubled, garbage, expired, rejected, stop = answers
    assert et.parse_event(applied["applied"]).command.value == 0.125  # pyright: ignore
    assert doubled == {"id": "a", "refused": "its id was used before"}
    assert garbage["id"] is None
    assert expired["refused"] == "it has expired"
    assert "learning_rte" in rejected["refused"]
    assert "applied" in stop
    assert (events.statistics.commands, events.statistics.refused) == (2, 4)
    found = stored(server)
    (changed,) = [event for event in found if event["kind"] == "hyperparam_changed"]
    assert changed["new"] == 0.125
    (completed,) = [event for event in found if event["kind"] == "run_completed"]
    assert completed["reason"] == "enough"
    assert sum(event.count for event in seen[et.SubscriberFailed]) == 4


def test_commands_are_off_by_default(tmp_path: Path, server: NATSServer) -> None:
    import nats
    from nats.errors import NoRespondersError

    failures: list[Exception] = []

    async def steer() -> None:
        client = await nats.connect(server.url)
        try:
            await client.request("eventtrain.mine.commands", request("a", kind="stop"), timeout=5)
        except NoRespondersError as error:
            failures.append(error)
        await client.close()

    fit(tmp_path, subs.NATSEvents(server.url), lambda: asyncio.run(steer()))
    assert len(failures) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "http://host"}, {"url": "host:4222"}, {"url": "nats://"}, {"url": "nats://u:hunter2@"},
        {"url": "nats://u:hunter2@host:x"}, {"url": "nats://u:hunt er2@ho st"}, {"url": "nats://hunter2/x@"},
        {"stream": "a.b"}, {"stream": "hunter2>"}, {"limit": 0}, {"steps": "some"}, {"finish_timeout_s": -1.0},
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused_without_the_url(arguments: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError) as raised:
        subs.NATSEvents(**{"url": "nats://host", **arguments})
    assert "hunter2" not in str(raised.value) or "stream" in arguments
