"""Frames and ObservedRun: what readers get, how much it is, and that a slow one costs nothing."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

import eventtrain as et
from eventtrain.events import MachineMeasured
from eventtrain.events.commands import ScaleHyperparam, SetHyperparam, Stop
from eventtrain.subscribers._shared.curve import BUCKETS
from eventtrain.subscribers.dashboard import frames as frames_module
from eventtrain.subscribers.dashboard.frames import Frames, ShownRun
from eventtrain.subscribers.dashboard.observed_run import MOST_ROWS, MOST_TEXT, ObservedRun

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def window(first: int, values: Any, seconds: float = 0.0, name: str = "loss") -> et.StepsCompleted:
    column = np.asarray(values, np.float32)
    last = first + len(column) - 1
    return et.StepsCompleted(
        step=last, first_step=first, last_step=last, epoch=0, metrics={name: column},
        time=BEGAN + timedelta(seconds=seconds),
    )  # fmt: skip


class Reader:
    """What the page does with frames."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.seen: int | None = None
        self.sections: dict[str, Any] = {}
        self.curves: dict[tuple[str, str], list[list[float]]] = {}
        self.full = 0
        self.length = 0

    def read(self) -> None:
        self.seen, text = self.frames.after(self.seen)
        if text is None:
            return
        self.length = len(text)
        frame = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        self.full += frame["full"]
        for entry in frame["runs"].values():
            curves = entry.pop("curves", {})
            self.sections |= entry
            for kind, named in curves.items():
                for name, (width, start, data) in named.items():
                    rows = np.frombuffer(base64.b64decode(data), "<f8").reshape(2 if width == 1 else 4, -1)
                    old = self.curves.get((kind, name), [[] for _ in rows])
                    if len(old) != len(rows):
                        assert start == 0
                        old = [[] for _ in rows]
                    self.curves[kind, name] = [[*a[:start], *b] for a, b in zip(old, rows, strict=True)]


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of frames, as a list of one number."""
    clock = [0.0]
    monkeypatch.setattr(frames_module, "monotonic", lambda: clock[0])
    return clock


def shown() -> tuple[ShownRun, Frames]:
    run = ShownRun("a run", ObservedRun(run_id="r"))
    return run, Frames(lambda: [run])


def test_a_reader_of_changes_has_what_a_new_reader_gets(now_s: list[float]) -> None:
    run, frames = shown()
    old, slow = Reader(frames), Reader(frames)
    values = np.random.default_rng(0)
    step = 1
    for turn in range(60):
        count = int(values.integers(1, 200))
        run.observed.add(window(step, values.normal(size=count)))
        step += count
        now_s[0] += 1.0
        old.read()
        if turn % 7 == 0:
            slow.read()
    now_s[0] += 1.0
    new = Reader(frames)
    for reader in (old, slow, new):
        reader.read()
    for reader in (old, slow):
        assert reader.curves == new.curves
        assert reader.sections == new.sections
    assert (old.full, new.full) == (1, 1)
    assert slow.full > 1  # it was behind, and got everything instead of a queue
    lows, highs = new.curves["steps", "loss"][2:]
    assert min(lows) < -3
    assert max(highs) > 3


def test_ten_million_steps_are_at_most_1024_points_of_bounded_size(now_s: list[float]) -> None:
    run, frames = shown()
    values = np.zeros(100_000, np.float32)
    values[77] = 9.0
    for part in range(100):
        run.observed.add(window(part * 100_000 + 1, values))
    now_s[0] += 1.0
    reader = Reader(frames)
    reader.read()
    steps, _, _, highs = reader.curves["steps", "loss"]
    assert BUCKETS // 2 <= len(steps) <= BUCKETS
    assert highs.count(9.0) == 100
    assert reader.length < 60_000
    run.observed.add(window(10_000_001, [1.0]))
    now_s[0] += 1.0
    reader.read()
    assert reader.length < 2_000  # and one more step is one more point


def test_readers_share_a_frame_and_none_is_made_before_its_time(now_s: list[float]) -> None:
    run, frames = shown()
    run.observed.add(window(1, [1.0]))
    now_s[0] += 1.0
    number, text = frames.after(None)
    assert text is not None
    run.observed.add(window(2, [2.0]))
    assert frames.after(number) == (number, None)
    now_s[0] += 1.0
    one, other = frames.after(number), frames.after(number)
    assert one[0] == number + 1
    assert one[1] is other[1]
    now_s[0] += 1.0
    assert frames.after(one[0]) == (one[0], None)  # nothing has changed


def test_an_event_does_not_wait_while_a_frame_is_made_and_is_in_the_next_one(now_s: list[float]) -> None:
    run, frames = shown()
    run.add(window(1, [1.0]))
    with run.up_to_date():
        for step in range(2, 200):
            run.add(window(step, [step]))  # it would wait for itself
        assert run.observed.status.step == 1
    now_s[0] += 1.0
    reader = Reader(frames)
    reader.read()
    assert reader.curves["steps", "loss"] == [[*range(1, 200)], [*range(1, 200)]]


def test_events_wait_in_bounded_number_while_no_page_is_open() -> None:
    run, _ = shown()
    for step in range(1, 1001):
        run.add(window(step, [step]))
        assert len(run._waiting) < frames_module.MOST_WINDOWS  # pyright: ignore[reportPrivateUsage]
    assert run.observed.status.step >= 1000 - frames_module.MOST_WINDOWS


def test_windows_of_other_metrics_or_epochs_are_kept_apart() -> None:
    run, _ = shown()
    run.add(window(1, [1.0, 2.0]))
    run.add(window(3, [3.0], name="other"))
    run.add(window(4, [4.0]))
    run.add(window(5, [5.0]).model_copy(update={"epoch": 1}))
    run.add(window(9, [9.0]))  # a process that resumed
    with run.up_to_date() as observed:
        loss, other = (observed.series.steps[name].points() for name in ("loss", "other"))
    assert loss.steps.tolist() == [1, 2, 4, 5, 9]
    assert loss.means.tolist() == [1, 2, 4, 5, 9]
    assert (other.steps.tolist(), other.means.tolist()) == ([3], [3])


def test_a_run_that_is_no_longer_shown_is_named(now_s: list[float]) -> None:
    runs = [ShownRun("one", ObservedRun(run_id="1")), ShownRun("two", ObservedRun(run_id="2"))]
    frames = Frames(lambda: runs)
    now_s[0] += 1.0
    number, _ = frames.after(None)
    del runs[0]
    now_s[0] += 1.0
    assert json.loads(frames.after(number)[1] or "")["gone"] == ["1"]


def test_values_that_json_lacks_and_hostile_text_reach_the_reader_as_text(now_s: list[float]) -> None:
    run, frames = shown()
    observed = run.observed
    evil = "<script>alert(1)</script>\udc80" + "x" * 10_000
    observed.add(window(1, [np.nan, np.inf, 3.0]))
    observed.add(MachineMeasured(source="s", metrics={"x_percent": float("nan")}, step=3))
    observed.add(et.AlertRaised(name="a", message=evil, step=3))
    changed = et.HyperparamChanged(name="rate", path="p", old=1.0, new=float("inf"), reason=evil, step=3)
    observed.add(changed)
    now_s[0] += 1.0
    reader = Reader(frames)
    reader.read()
    assert reader.sections["changes"][0]["new"] == "Infinity"
    message = reader.sections["alerts"][0]["message"]
    assert message.startswith("<script>alert(1)</script>\\udc80")
    assert len(message) == MOST_TEXT
    _, values = reader.curves["steps", "loss"]
    assert np.isnan(values[0])
    assert values[2] == 3.0


def test_lists_are_bounded_and_keep_the_newest() -> None:
    observed = ObservedRun()
    for step in range(1, 1001):
        command = SetHyperparam(name="rate", value=0.1 * step, reason="dashboard")
        observed.add(et.CommandApplied(command=command, step=step))
    assert len(observed.commands) == MOST_ROWS
    assert observed.commands[-1].step == 1000
    assert observed.commands[-1].text == "rate = 100"


def test_the_newest_sample_of_each_name_is_shown() -> None:
    observed, image = ObservedRun(), b"\x89PNG\r\n\x1a\n" + b"x" * 100
    for step in (1, 2):
        observed.add(et.SampleTaken(name="text", media="text", value=f"<b>{step}</b>", step=step))
        observed.add(et.SampleTaken(name="image", media="image", value=image, step=step))
    observed.add(et.SampleTaken(name="large", media="image", value=image * 10_000, step=3))
    shown = {one.name: (one.step, one.text, one.image) for one in observed.samples}
    assert shown["text"] == (2, "<b>2</b>", "")
    assert shown["image"] == (2, "", base64.b64encode(image).decode())
    assert shown["large"][1:] == ("an image of 1.1 MB, too large to be shown here", "")


def test_the_lists_tell_what_happened_and_at_which_step() -> None:
    observed = ObservedRun()
    cause = et.Cause(event="epoch_completed", step=10, subscriber="ReduceLROnPlateau")
    scale = ScaleHyperparam(name="rate", factor=0.5, cause=cause)
    for event in (
        et.RunStarted(step=0),
        et.CommandApplied(command=scale, step=10),
        et.HyperparamChanged(name="rate", path="p", old=1.0, new=0.5, cause=cause, step=10),
        et.CommandRejected(command=Stop(), reason="too late", step=11),
        et.CheckpointStarted(path="/x/step-12", tag="t", step=12),
        et.CheckpointCommitted(path="/x/step-12", tag="t", size_bytes=5, duration_s=0.5, step=12),
        et.AlertRaised(name="high", severity="critical", message="m", metric="loss", step=13),
        et.AlertResolved(name="high", step=15),
        et.SubscriberFailed(subscriber="s", event_kind="k", error="e", step=16),
        et.RunCompleted(reason="enough", step=20),
    ):
        observed.add(event)
    assert (observed.commands[0].step, observed.commands[0].text) == (10, "rate × 0.5")
    assert (observed.commands[1].text, observed.commands[1].rejected) == ("stop", "too late")
    assert (observed.changes[0].by, observed.changes[0].new) == ("ReduceLROnPlateau", 0.5)
    (checkpoint,) = observed.checkpoints
    assert (checkpoint.name, checkpoint.state, checkpoint.size_bytes) == ("step-12", "committed", 5)
    assert (observed.alerts[0].severity, observed.alerts[0].resolved) == ("critical", 15)
    assert observed.notices[0].text == "failed on k: e"
    assert (observed.status.state, observed.status.reason) == ("stopped", "enough")


def test_speed_and_time_left_are_those_of_the_last_seconds() -> None:
    observed = ObservedRun()
    observed.begin(first_step=0, attempt=1, target_step=10_000, target_epoch=None)
    for second in range(100):
        first = second * 10 + 1 if second < 50 else 500 + (second - 50) * 100 + 1
        count = 10 if second < 50 else 100
        observed.add(window(first, np.zeros(count), seconds=second))
    assert observed.status.rate == pytest.approx(100)
    assert observed.status.left_s == pytest.approx((10_000 - observed.status.step) / 100)


def test_a_saved_run_is_the_same_run() -> None:
    observed = ObservedRun(run_id="r")
    observed.add(window(1, [1.0, np.nan]))
    observed.add(et.AlertRaised(name="a", step=2))
    loaded = ObservedRun.parse("Dashboard", observed.to_json())
    assert loaded.to_json() == observed.to_json()
    assert loaded.alerts == observed.alerts
