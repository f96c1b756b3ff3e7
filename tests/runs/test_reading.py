"""``read_events`` gives back what a run has written: selected, followed, over cuts, and at least once per cursor."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.runs.owner import LOCK, Owner
from eventtrain.testing import RecordingSubscriber


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": state["w"]}


def train(run_dir: Path, *subscribers: et.Subscriber, steps: int = 8) -> None:
    trainer = et.Trainer(step_fn, {"w": np.float32(0)}, subscribers=subscribers, run_dir=run_dir)
    trainer.fit([np.float32(n) for n in range(4)], steps=steps, progress=False)


def step(n: int, *, attempt: int = 1, stream: Literal["training", "published"] = "training") -> et.Event:
    event = et.StepCompleted(step=n, epoch=0, batch=n - 1, metrics={"loss": 1.0 / n})
    return event.model_copy(update={"run_id": "r", "attempt": attempt, "stream": stream, "seq": n + 1})


def ending(n: int, *, attempt: int = 1) -> et.Event:
    event = et.RunCompleted(step=n, reason="completed")
    return event.model_copy(update={"run_id": "r", "attempt": attempt, "stream": "training", "seq": n + 2})


def write(run_dir: Path, *events: et.Event) -> Path:
    path = run_dir / "events.jsonl"
    with path.open("a") as file:
        file.writelines(f"{event.model_dump_json()}\n" for event in events)
    return path


def hold(run_dir: Path, *, pid: int | None = None) -> None:
    (run_dir / LOCK).write_text(Owner(run_id="r", **({"pid": pid} if pid else {})).model_dump_json())


def steps_of(events: Iterator[et.Event]) -> list[int]:
    return [event.step for event in events]


def test_the_events_that_were_published_come_back_equal(tmp_path: Path) -> None:
    recorder = RecordingSubscriber()
    train(tmp_path, subs.JSONLLogger("logs/events.jsonl", events=et.Event), recorder)
    published = [event for event in recorder.recorded if event.stream == "training"]
    assert [event for event in et.read_events(tmp_path) if event.stream == "training"] == published
    assert len(published) > 10


def test_kinds_and_steps_select_and_other_rows_are_not_parsed(tmp_path: Path) -> None:
    path = write(tmp_path, *map(step, range(1, 5)), ending(4))
    with path.open("a") as file:
        file.write('{"kind":"step_completed","broken":')
        file.write("\n")
    assert steps_of(et.read_events(tmp_path, kinds=et.RunCompleted)) == [4]
    assert [e.kind for e in et.read_events(tmp_path, kinds=("run_completed", "run_failed"))] == [
        "run_completed"
    ]
    assert steps_of(et.read_events(tmp_path, kinds=et.RunCompleted | et.RunFailed)) == [4]
    with pytest.raises(et.EventParseError, match=r"events\.jsonl, byte"):
        list(et.read_events(tmp_path, kinds=et.StepCompleted))
    with pytest.raises(et.EventParseError, match=r"events\.jsonl, byte"):
        list(et.read_events(tmp_path, steps=range(2, 4)))


def test_steps_select_by_range(tmp_path: Path) -> None:
    write(tmp_path, *map(step, range(1, 10)), ending(9))
    assert steps_of(et.read_events(tmp_path, steps=range(3, 8, 2))) == [3, 5, 7]
    assert steps_of(et.read_events(tmp_path, steps=range(8, 10), kinds="step_completed")) == [8, 9]


def test_a_base_class_selects_its_subclasses(tmp_path: Path) -> None:
    train(tmp_path, subs.JSONLLogger("events.jsonl"))
    kinds = [event.kind for event in et.read_events(tmp_path, kinds=et.events.base.LifecycleEvent)]
    assert kinds == [
        "run_started", "epoch_started", "epoch_completed", "epoch_started", "epoch_completed", "run_completed",
    ]  # fmt: skip


class Ping(et.Event):
    text: str


def test_events_of_the_user_need_their_class(tmp_path: Path) -> None:
    write(tmp_path, Ping(text="hello", step=3))
    assert [e.text for e in et.read_events(tmp_path, types=(Ping,), kinds=Ping)] == ["hello"]
    with pytest.raises(et.EventParseError, match=r"kind 'ping'.*types="):
        list(et.read_events(tmp_path))
    assert list(et.read_events(tmp_path, kinds="step_completed")) == []


def test_rows_in_another_order_of_keys_are_read(tmp_path: Path) -> None:
    row = json.loads(step(3).model_dump_json())
    (tmp_path / "events.jsonl").write_text(
        step(1).model_dump_json() + "\n" + json.dumps(dict(reversed(row.items()))) + "\n"
    )
    assert steps_of(et.read_events(tmp_path, steps=range(2, 5))) == [3]
    assert steps_of(et.read_events(tmp_path, kinds="step_completed")) == [1, 3]


def test_a_torn_last_row_is_left_while_the_run_lives_and_reported_when_it_is_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, step(1), step(2))
    with path.open("a") as file:
        file.write(step(3).model_dump_json()[:50])
    hold(tmp_path)
    with caplog.at_level(logging.WARNING, "eventtrain"):
        assert steps_of(et.read_events(tmp_path)) == [1, 2]
        assert not caplog.records
        (tmp_path / LOCK).unlink()
        assert steps_of(et.read_events(tmp_path)) == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} ends in a torn row of 50 bytes, as a killed run leaves it. It was not read."
    ]


def test_rows_of_more_than_a_megabyte_are_read(tmp_path: Path) -> None:
    long = Ping(text="x" * 3_000_000, step=2)
    write(tmp_path, step(1), long, step(3))
    assert steps_of(et.read_events(tmp_path, types=Ping)) == [1, 2, 3]


def test_a_run_is_followed_until_it_ends(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    hold(tmp_path)
    events = et.read_events(tmp_path, follow=True)
    assert next(events).step == 1
    path = write(tmp_path, step(2))
    assert next(events).step == 2
    half = step(3).model_dump_json() + "\n"
    with path.open("a") as file:
        file.write(half[:40])
        file.flush()
        threading.Timer(0.3, lambda: (file.write(half[40:]), file.flush())).start()
        assert next(events).step == 3
    write(tmp_path, ending(3), step(4, stream="published"))
    (tmp_path / LOCK).unlink()
    assert [event.kind for event in events] == ["run_completed", "step_completed"]


def test_a_trainer_is_followed_from_another_thread(tmp_path: Path) -> None:
    seen: list[et.Event] = []
    trainer = et.Trainer(
        step_fn, {"w": np.float32(0)}, subscribers=[subs.JSONLLogger("events.jsonl")], run_dir=tmp_path
    )
    threads: list[threading.Thread] = []

    @trainer.on(et.StepCompleted, once=True, lag=0)
    def begin(event: et.Event) -> None:
        thread = threading.Thread(target=lambda: seen.extend(et.read_events(tmp_path, follow=True)))
        threads.append(thread)
        thread.start()

    trainer.fit([np.float32(1)] * 4, steps=20, progress=False)
    threads[0].join(20)
    assert not threads[0].is_alive()
    assert seen == list(et.read_events(tmp_path))
    assert seen[-1].kind == "run_completed"


def test_an_attempt_that_ended_does_not_end_the_next_one(tmp_path: Path) -> None:
    write(tmp_path, step(1), ending(1), step(2, attempt=2))
    hold(tmp_path)
    events = et.read_events(tmp_path, follow=True)
    assert [next(events).step for _ in range(3)] == [1, 1, 2]
    write(tmp_path, ending(2, attempt=2))
    (tmp_path / LOCK).unlink()
    assert [event.kind for event in events] == ["run_completed"]


def test_close_ends_a_reader_that_waits_in_another_thread(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    events = et.read_events(tmp_path, follow=True, cursor="one")
    seen: list[int] = []
    thread = threading.Thread(target=lambda: [seen.append(event.step) for event in events])
    thread.start()
    while not seen:
        thread.join(0.01)
    events.close()
    thread.join(10)
    assert not thread.is_alive()
    assert steps_of(et.read_events(tmp_path, cursor="one")) == []


def cut(path: Path, rows: int) -> None:
    """Truncates as a resumed run does: the same file is shorter, and then grows again."""
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, sum(map(len, lines[:rows])))


@pytest.mark.parametrize("grown", [0, 1, 3, 9])
def test_a_reader_that_is_ahead_of_a_cut_gets_every_row_written_after_it(tmp_path: Path, grown: int) -> None:
    path = write(tmp_path, *map(step, range(1, 7)))
    hold(tmp_path)
    events = et.read_events(tmp_path, follow=True)
    assert [next(events).step for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    cut(path, 3)
    again = [step(n, attempt=2) for n in range(4, 4 + grown)]
    write(tmp_path, *again, ending(3 + grown, attempt=2))
    (tmp_path / LOCK).unlink()
    assert list(events) == [*again, ending(3 + grown, attempt=2)]


@pytest.mark.parametrize("grown", [0, 1, 3, 9])
def test_a_cursor_that_is_ahead_of_a_cut_gets_every_row_written_after_it(tmp_path: Path, grown: int) -> None:
    path = write(tmp_path, *map(step, range(1, 7)))
    assert steps_of(et.read_events(tmp_path, cursor="one")) == [1, 2, 3, 4, 5, 6]
    cut(path, 3)
    again = [step(n, attempt=2) for n in range(4, 4 + grown)]
    write(tmp_path, *again)
    assert list(et.read_events(tmp_path, cursor="one")) == again
    write(tmp_path, step(30, attempt=2))
    assert steps_of(et.read_events(tmp_path, cursor="one")) == [30]


def test_an_event_counts_as_handled_when_the_next_one_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, *map(step, range(1, 5)))
    with et.read_events(tmp_path, cursor="one") as events:
        assert [next(events).step, next(events).step] == [1, 2]
    with et.read_events(tmp_path, cursor="one") as events:
        assert next(events).step == 2
    assert steps_of(et.read_events(tmp_path, cursor="one")) == [2, 3, 4]
    assert steps_of(et.read_events(tmp_path, cursor="one")) == []
    assert steps_of(et.read_events(tmp_path, cursor="other")) == [1, 2, 3, 4]


CONSUMER = """
import sys, time
import eventtrain as et
for event in et.read_events(sys.argv[1], cursor="one"):
    print(event.step, flush=True)
    time.sleep(0.02)
"""


@pytest.mark.slow
def test_a_killed_consumer_continues_and_misses_nothing(tmp_path: Path) -> None:
    write(tmp_path, *map(step, range(1, 101)))
    lives: list[list[int]] = []
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", CONSUMER, tmp_path], stdout=subprocess.PIPE, text=True
        ) as consumer:
            assert consumer.stdout is not None
            lives.append([int(consumer.stdout.readline()) for _ in range(20)])
            consumer.send_signal(signal.SIGKILL)
            lives[-1] += map(int, consumer.stdout.read().split())
    lives.append(steps_of(et.read_events(tmp_path, cursor="one")))
    seen = {n for life in lives for n in life}
    assert seen == set(range(1, 101))
    for before, life in pairwise(lives):
        assert life == list(range(life[0], life[-1] + 1))
        assert before[-1] - 20 < life[0] <= before[-1] + 1  # what was handled in the last 0.1 s comes again
        assert life[0] > before[0]


def test_one_reader_at_a_time_has_a_cursor(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    with et.read_events(tmp_path, cursor="one"):
        with pytest.raises(et.ConfigurationError, match="another reader uses this cursor"):
            et.read_events(tmp_path, cursor="one")
        et.read_events(tmp_path, cursor="two").close()
    et.read_events(tmp_path, cursor="one").close()


def test_a_cursor_that_is_damaged_or_of_another_log_is_refused(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    list(et.read_events(tmp_path, cursor="one"))
    (file,) = tmp_path.glob("*/one.json")
    (tmp_path / "other.jsonl").write_text(step(2).model_dump_json() + "\n")
    with pytest.raises(et.ConfigurationError, match=r"belongs to events.jsonl"):
        et.read_events(tmp_path / "other.jsonl", cursor="one")
    file.write_text("{}")
    with pytest.raises(et.ConfigurationError, match="is not a cursor"):
        et.read_events(tmp_path, cursor="one")


def test_reading_begins_behind_an_event(tmp_path: Path) -> None:
    path = write(tmp_path, *map(step, range(1, 7)))
    assert steps_of(et.read_events(tmp_path, after=step(4))) == [5, 6]
    cut(path, 2)
    write(tmp_path, step(3, attempt=2), step(4, attempt=2), step(5, attempt=2))
    assert steps_of(et.read_events(tmp_path, after=step(4))) == [3, 4, 5]
    assert steps_of(et.read_events(tmp_path, after=step(4, attempt=2))) == [5]
    with pytest.raises(et.ConfigurationError, match="has no seq"):
        et.read_events(tmp_path, after=et.StepCompleted(epoch=0, batch=0, metrics={}))
    with pytest.raises(et.ConfigurationError, match="at most one of after and cursor"):
        et.read_events(tmp_path, after=step(4), cursor="one")


def test_the_log_is_found_or_named(tmp_path: Path) -> None:
    with pytest.raises(et.ConfigurationError, match="has no log that can be read back"):
        et.read_events(tmp_path)
    with pytest.raises(et.ConfigurationError, match="does not exist"):
        et.read_events(tmp_path / "missing")
    (tmp_path / "alerts.dead.jsonl").write_text('{"url": 1}\n')
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.jsonl").write_text(step(1).model_dump_json() + "\n")
    assert steps_of(et.read_events(tmp_path)) == [1]
    (tmp_path / "two.jsonl").write_text(step(2).model_dump_json() + "\n")
    with pytest.raises(et.ConfigurationError, match=r"has 2 JSONL files: two.jsonl; a/one.jsonl"):
        et.read_events(tmp_path)
    assert steps_of(et.read_events(tmp_path / "two.jsonl")) == [2]
    write(tmp_path, step(3))
    assert steps_of(et.read_events(tmp_path)) == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": "step_complete"}, "Did you mean 'step_completed'"),
        ({"kinds": 3}, "kinds must be event classes"),
        ({"steps": (1, 2)}, "steps"),
        ({"cursor": "../x"}, "a cursor must be named by"),
        ({"types": (int,)}, "types must be event classes"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    write(tmp_path, step(1))
    with pytest.raises(et.ConfigurationError, match=message):
        et.read_events(tmp_path, **arguments)


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 5)),
            st.tuples(st.just("cut"), st.integers(0, 4)),
            st.tuples(st.just("read"), st.integers(1, 6)),
            st.tuples(st.just("reopen"), st.just(0)),
        ),
        max_size=25,
    )
)
def test_no_order_of_reads_writes_and_cuts_loses_a_row(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    path, rows, attempt, seen = write(folder), list[et.Event](), 1, list[et.Event]()
    reader = et.read_events(folder, cursor="one")
    for operation, count in [*operations, ("reopen", 0), ("read", 1000)]:
        if operation == "append":
            new = [step(len(rows) + n + 1, attempt=attempt) for n in range(count)]
            rows += new
            write(folder, *new)
        elif operation == "cut":
            rows = rows[: max(0, len(rows) - count)]
            attempt += 1
            cut(path, len(rows))
        elif operation == "read":
            seen += [event for _, event in zip(range(count), reader, strict=False)]
        if operation in ("reopen", "append"):  # one that has come to the end has finished
            reader.close()
            reader = et.read_events(folder, cursor="one")
    reader.close()
    newest = {(event.attempt, event.seq): n for n, event in enumerate(seen)}
    positions = [newest.get((event.attempt, event.seq), -1) for event in rows]
    assert -1 not in positions
    assert positions == sorted(positions)
