"""Alerts on their way to a target: grouped, tried again, given up in time, and never lost unsaid."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.alerts import delivery as alert_delivery
from eventtrain.subscribers.alerts.delivery import DeliveryOptions, Sender, UndeliveredAlerts
from eventtrain.subscribers.alerts.message import Message, NotDelivered

SECRET = "s3cr3t-t0ken"


def alert(number: int) -> et.AlertRaised:
    return et.AlertRaised(name=str(number), message="m", seq=1, step=number)


class Fake:
    """A target that does with each message what it is told to."""

    def __init__(self, *does: Any) -> None:
        self.does = list(does)
        self.got: list[list[str]] = []
        self.ids: list[str] = []
        self.attached: list[Any] = []
        self.called = threading.Semaphore(0)

    def send(self, message: Message) -> None:
        self.got.append([event.name for event in message.events])
        self.ids.append(message.id)
        self.attached.append(list(message.attach))
        action = self.does.pop(0) if self.does else None
        self.called.release()
        if isinstance(action, threading.Event):
            action.wait(60)
        elif action is not None:
            raise action


class Made:
    """A sender, the failures that it publishes and its dead letters."""

    def __init__(self, folder: Path, target: Fake, **options: Any) -> None:
        self.failed: list[tuple[str, str]] = []
        self.path = folder / "dead.jsonl"
        settings = {"retries": 2, "retry_delay_s": 0.0, "group_s": 0.0, **options}
        undelivered = UndeliveredAlerts(self.path, "Alerts", self.publish)
        self.sender = Sender("ops", target, DeliveryOptions(**settings), undelivered=undelivered)

    def publish(self, event: et.Event) -> None:
        assert isinstance(event, et.SubscriberFailed)
        assert (event.subscriber, event.event_kind) == ("Alerts", "alert_raised")
        self.failed.append((str(event.step), event.error))

    def finish(self, timeout_s: float) -> None:
        self.sender.hasten()
        self.sender.join(timeout_s)

    @property
    def letters(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


@pytest.fixture
def held() -> Generator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_several_alerts_at_once_become_one_message_in_their_order(tmp_path: Path) -> None:
    target = Fake()
    made = Made(tmp_path, target, group_s=60.0)
    for number in range(5):
        made.sender.post(alert(number))
    made.sender.start()
    made.finish(60.0)
    assert target.got == [["0", "1", "2", "3", "4"]]
    assert made.letters == []


def test_what_may_pass_is_tried_again_with_the_same_id_and_what_may_not_is_given_up(tmp_path: Path) -> None:
    target = Fake(
        NotDelivered("busy", may_pass=True), OSError(SECRET), None, NotDelivered("no", may_pass=False)
    )
    made = Made(tmp_path, target)
    made.sender.start()
    made.sender.post(alert(1))
    for _ in range(3):
        assert target.called.acquire(timeout=60)
    made.sender.post(alert(2))
    made.finish(60.0)
    assert target.got == [["1"], ["1"], ["1"], ["2"]]
    assert len(set(target.ids)) == 2
    (letter,) = made.letters
    assert (letter["label"], letter["reason"]) == ("ops", "no, at attempt 1")
    assert et.parse_event(letter["event"]) == alert(2)
    assert made.failed == [("2", "1 alerts not delivered to ops: no, at attempt 1")]


def test_when_tries_are_used_up_the_reason_names_no_more_than_the_type_of_an_error(tmp_path: Path) -> None:
    made = Made(tmp_path, Fake(*[ValueError(SECRET)] * 3))
    made.sender.post(alert(1))
    made.sender.start()
    made.finish(60.0)
    assert [letter["reason"] for letter in made.letters] == ["ValueError, at attempt 3"]
    assert SECRET not in str(made.failed) + made.path.read_text()


def test_the_pauses_double_up_to_a_minute_and_shrink_when_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    class Noting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(-1.0 if timeout is None else timeout)
            return False

    made = Made(tmp_path, Fake(*[OSError()] * 9), retries=8, retry_delay_s=1.0)
    made.sender._hurry = Noting()
    assert made.sender._deliver(Message((alert(1),))) is not None
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60]
    waited.clear()
    made = Made(tmp_path, Fake(*[OSError()] * 9), retries=3, retry_delay_s=30.0)
    made.sender._hurry.set()
    made.sender._given_up = Noting()
    assert made.sender._deliver(Message((alert(1),))) is not None
    assert waited == [alert_delivery.HURRIED_DELAY_S] * 3


def test_a_target_that_hangs_is_left_after_the_time_given_and_what_it_lacks_is_kept(
    tmp_path: Path, held: threading.Event
) -> None:
    target = Fake(held)
    made = Made(tmp_path, target)
    made.sender.start()
    made.sender.post(alert(1))
    assert target.called.acquire(timeout=60)
    made.sender.post(alert(2))
    made.finish(0.01)
    assert made.sender.is_alive()
    assert made.sender.give_up() == 2
    assert [(letter["event"]["name"], letter["reason"]) for letter in made.letters] == [
        ("1", alert_delivery.ENDED),
        ("2", alert_delivery.ENDED),
    ]
    held.set()
    made.sender.join(60)
    assert len(made.letters) == 2
    assert target.got == [["1"]]
    assert made.sender.give_up() == 0


def test_so_many_may_wait_and_what_is_lost_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    monkeypatch.setattr(alert_delivery, "MOST_WAITING", 3)
    target = Fake(held)
    made = Made(tmp_path, target)
    made.sender.start()
    made.sender.post(alert(0))
    assert target.called.acquire(timeout=60)
    for number in range(1, 8):
        made.sender.post(alert(number))
    held.set()
    made.finish(60.0)
    assert target.got == [["0"], ["1", "2", "3"]]
    (letter,) = made.letters
    assert letter["reason"] == "4 alerts were lost, since 3 were waiting"
    assert letter["event"] is None
    assert made.failed == [("0", "not delivered to ops: 4 alerts were lost, since 3 were waiting")]


def test_what_was_lost_is_said_also_where_the_target_hangs_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    monkeypatch.setattr(alert_delivery, "MOST_WAITING", 1)
    target = Fake(held)
    made = Made(tmp_path, target)
    made.sender.start()
    made.sender.post(alert(0))
    assert target.called.acquire(timeout=60)
    for number in range(1, 4):
        made.sender.post(alert(number))
    made.finish(0.01)
    assert made.sender.give_up() == 2
    assert [letter["reason"] for letter in made.letters] == [
        *[alert_delivery.ENDED] * 2,
        "2 alerts were lost, since 1 were waiting",
    ]
    held.set()
    made.sender.join(60)
    assert len(made.letters) == 3


def test_what_is_posted_after_files_goes_with_them(tmp_path: Path) -> None:
    target = Fake()
    made = Made(tmp_path, target)
    made.sender.attach([tmp_path / "report.html"])
    made.sender.post(alert(1))
    made.sender.start()
    made.finish(60.0)
    assert target.attached == [[tmp_path / "report.html"]]


def test_a_full_disk_leaves_no_torn_row_and_a_torn_one_gets_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[et.Event] = []
    letters = UndeliveredAlerts(tmp_path / "below" / "dead.jsonl", "Alerts", failed.append)
    letters.record("ops", "why", [alert(1)])
    whole = letters.path.read_text()
    with letters.path.open("a") as file:
        file.write('{"time": "20')
    letters.record("ops", "why", [alert(2)])
    lines = letters.path.read_text().splitlines()
    assert [lines[0] + "\n", lines[1]] == [whole, '{"time": "20']
    assert json.loads(lines[2])["event"]["name"] == "2"
    before = letters.path.read_bytes()
    (tmp_path / "full").mkdir()
    broken = UndeliveredAlerts(tmp_path / "full", "Alerts", failed.append)  # a folder of that name
    broken.record("ops", "why", [alert(3)])
    assert "not delivered to ops: why; see dead.jsonl" in caplog.text
    assert "see full" not in caplog.text
    assert os.strerror(errno.EISDIR) in caplog.text
    write = os.write

    def failing(descriptor: int, data: Any) -> int:
        write(descriptor, data[:30])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(atomic_files.os, "write", failing)
        letters.record("ops", "why", [alert(3)])
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert letters.path.read_bytes() == before
    assert [event.step for event in failed] == [1, 2, 3, 3]


def test_titles_and_texts_say_how_much_there_is() -> None:
    raised, over = alert(1), et.AlertResolved(name="2", message="fine", seq=1)
    assert Message((raised,)).title == "[warning] 1"
    assert Message((over,)).title == "[resolved] 2"
    both = Message((raised, over, raised.model_copy(update={"severity": "critical"})))
    assert (both.title, both.severity) == ("2 alerts, 1 resolved (critical)", "critical")
    assert both.text == "[warning] 1: m\n[resolved] 2: fine\n[critical] 1: m"
    assert Message((over,)).severity is None


def test_a_long_text_is_cut_in_the_message_and_whole_in_its_events() -> None:
    long = alert(1).model_copy(update={"message": "m" * 5000})
    message = Message((long, alert(2)))
    assert message.text == f"[warning] 1: {'m' * 1000} ... (5000 characters)\n[warning] 2: m"
    assert message.to_json()["events"][0]["message"] == "m" * 5000
    assert Message((alert(3).model_copy(update={"message": "m" * 1000}),)).text == "m" * 1000
