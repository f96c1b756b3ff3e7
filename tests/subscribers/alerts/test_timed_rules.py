"""Rules judged by the clock: their judges with a clock of the test, and the thread that sees a hanging loop."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep, time
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.subscribers.alerts.alert_state import RuleAlerts
from eventtrain.subscribers.alerts.delivery import Delivery, DeliveryOptions
from eventtrain.subscribers.alerts.timed_rules import RuleWatcher, TimedRule
from eventtrain.subscribers.base import RunContext
from tests.subscribers.alerts.alert_servers import Target, serving


@dataclass
class Figures:
    pending: int = 0
    lag_s: float = 0.0


class Run:
    """What rules see of a run, as a test says."""

    def __init__(self, run_dir: Path = Path(), *, step: int = 0, **options: Any) -> None:
        self.step = step
        self.figures: dict[str, Any] = {}
        self.published: list[et.Event] = []
        self.context = RunContext(
            run_id="r",
            run_dir=run_dir,
            control=None,  # type: ignore[arg-type]
            publish=self.published.append,
            _bus=SimpleNamespace(statistics=lambda: self.figures),  # type: ignore[arg-type]
            _figures=SimpleNamespace(statistics=lambda: LoopStatistics(step=self.step)),  # type: ignore[arg-type]
            **options,
        )

    def judge(self, rule: TimedRule, now_s: float = 0.0) -> Any:
        """The judge of ``rule``, with no new events unless some are given."""
        judge = rule.watch(self.context, now_s, time())
        assert judge is not None
        return lambda now_s, *events: judge(now_s, events)


def test_a_stall_is_no_step_for_so_long_and_over_with_the_next_one() -> None:
    run = Run(step=3)
    judge = run.judge(subs.StallRule(after_s=10), now_s=100.0)
    assert judge(109.9) == {}
    assert judge(110.0) == {"": "no step for 10 s, since step 3"}
    run.step = 4
    assert judge(150.0) == {}
    assert judge(159.0) == {}
    assert judge(160.5) == {"": "no step for 10.5 s, since step 4"}


def test_a_deadline_is_missed_at_the_pace_of_the_last_seconds() -> None:
    run = Run(steps=100)
    judge = run.judge(subs.DeadlineRule(within_s=100, pace_s=10))
    assert judge(0.0) is None
    run.step = 20
    assert judge(10.0) == {}
    run.step = 25
    assert judge(20.0) == {"": "75 steps are left; at this pace the run ends 70 s late"}
    run.step = 60
    assert judge(30.0) == {}
    assert judge(100.0) == {"": "the deadline has passed and 40 steps are left"}
    run.step = 100
    assert judge(101.0) == {}


def test_compiling_before_the_first_step_is_not_part_of_the_pace() -> None:
    run = Run(step=5, start_step=5, steps=1000)
    judge = run.judge(subs.DeadlineRule(within_s=600))
    assert [judge(float(second)) for second in range(61)] == [None] * 61
    run.step = 15
    assert judge(61.0) == {}
    run.step = 16
    (late,) = judge(71.0).values()
    assert late.startswith("989 steps are left")


def test_a_subscriber_is_behind_by_backlog_by_lag_or_by_what_events_say_and_fine_when_it_is_quiet() -> None:
    run = Run()
    run.figures = {"slow": Figures(), "fine": Figures(pending=3)}
    judge = run.judge(subs.SlowSubscriberRule(backlog=10, lag_s=5.0, quiet_s=2.0))
    assert judge(0.0) == {}
    run.figures["slow"].pending = 12
    assert judge(1.0) == {"slow": "slow is behind: 12 events are waiting"}
    run.figures["slow"] = Figures(pending=1, lag_s=6.0)
    assert judge(2.0) == {"slow": "slow is behind: its oldest event has waited 6 s"}
    run.figures["slow"] = Figures()
    found = judge(3.0, et.SubscriberLagged(subscriber="log", dropped=3))
    assert set(found) == {"slow", "log"}
    assert found["log"] == "log is behind: 3 events were dropped"
    assert set(judge(4.5)) == {"log"}
    assert judge(5.5) == {}


def test_a_disk_is_low_below_the_limit_and_unknown_where_it_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = [2**30]

    def ask(path: Path) -> Any:
        assert path == tmp_path
        if free[-1] < 0:
            raise OSError("gone")
        return SimpleNamespace(free=free[-1])

    monkeypatch.setattr(shutil, "disk_usage", ask)
    rule = subs.LowDiskRule(below_bytes=2**30, every_s=3)
    assert rule.interval_s == 3
    judge = Run(tmp_path).judge(rule)
    assert judge(0.0) == {}
    free.append(2**29)
    assert judge(1.0) == {"": "512 MiB are free on the disk of the run, less than 1 GiB"}
    free.append(-1)
    assert judge(2.0) is None


@dataclass(frozen=True)
class BrokenRule(TimedRule):
    label_format = "broken"
    judged: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def interval_s(self) -> float:
        return 0.001

    def watch(self, run: RunContext, now_s: float, began_s: float) -> Any:
        def judge(now_s: float, events: Any) -> Any:
            self.judged.release()
            raise ValueError("out of order")

        return judge


def test_a_judge_that_raises_does_not_end_the_thread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, rule = Run(tmp_path).context, BrokenRule()
    options = DeliveryOptions(dead_letters=tmp_path / "dead.jsonl", finish_timeout_s=1.0)
    watcher = RuleWatcher(
        [RuleAlerts(rule)], run, Delivery(options, run, "test"), owner="test", clock=monotonic, began_s=0.0
    )
    for _ in range(3):
        assert rule.judged.acquire(timeout=30)
    watcher.join()
    assert not [thread for thread in threading.enumerate() if thread.name == "eventtrain test watch"]
    assert "Rule 'broken' of Alerts raised ValueError: out of order" in caplog.text


@pytest.fixture
def target() -> Iterator[Target]:
    with serving(Target()) as found:
        yield found


class Watched:
    """A session with ``rule``, on the test's own thread, which is the training thread."""

    def __init__(self, run_dir: Path, rule: Any, **options: Any) -> None:
        def step(state: Any, batch: Any) -> Any:
            return state, {"loss": batch}

        self.now_s = 0.0
        self.seen: list[et.Event] = []
        alerts = subs.Alerts([rule], clock=lambda: self.now_s, **options)
        self.trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=run_dir)
        self._came = threading.Event()

        @self.trainer.on(et.AlertRaised | et.AlertResolved)
        async def see(event: et.Event) -> None:
            self.seen.append(event)
            self._came.set()

    def hang_until_told(self) -> None:
        """Time passes, and the training thread does nothing."""
        deadline = monotonic() + 60
        while not self._came.wait(0.01):
            self.now_s += 100.0
            assert monotonic() < deadline, "no alert was raised"
        self._came.clear()

    def wait_until_told(self) -> None:
        assert self._came.wait(60), "no alert was raised or resolved"
        self._came.clear()


def test_a_training_thread_that_hangs_is_noticed_while_it_hangs(tmp_path: Path) -> None:
    watched = Watched(tmp_path, subs.StallRule(after_s=0.4))
    with watched.trainer.session() as session:
        for _ in range(3):
            session.step(np.float32(1))
        watched.hang_until_told()
        session.step(np.float32(1))
        watched.wait_until_told()
    raised, resolved = watched.seen
    assert isinstance(raised, et.AlertRaised)
    assert isinstance(resolved, et.AlertResolved)
    assert raised.name == resolved.name == "no step for 0.4 s"
    assert raised.message.startswith("no step for ")
    assert raised.message.endswith(" s, since step 3")
    assert (raised.step, resolved.step) == (3, 4)


@pytest.mark.allow_blocking
def test_an_event_loop_that_hangs_does_not_keep_a_stall_from_being_told(
    tmp_path: Path, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tmp_path, subs.StallRule(after_s=0.4), url=target.url, allow_private=True, group_s=0.0)
    blocked, told = threading.Event(), threading.Event()

    @watched.trainer.on(et.StepCompleted)
    async def block(event: et.StepCompleted) -> None:
        blocked.set()
        assert told.wait(60)

    with watched.trainer.session() as session:
        session.step(np.float32(1))
        session.block_until_ready()
        assert blocked.wait(60)
        deadline = monotonic() + 60
        while "Alert no step for 0.4 s: " not in caplog.text:
            watched.now_s += 100.0
            assert monotonic() < deadline
            sleep(0.01)
        target.wait_for(1)
        assert watched.seen == []
        told.set()
        watched.wait_until_told()
    (event,) = target.bodies[0]["events"]
    assert (event["run_id"], target.bodies[0]["run_id"]) == (watched.trainer.run_id,) * 2
    assert datetime.fromisoformat(event["time"]).year > 2000


def test_a_run_that_cannot_be_through_in_time_is_told(tmp_path: Path) -> None:
    rule = subs.DeadlineRule(at=datetime.now(UTC), name="late", severity="critical")
    seen: list[et.Event] = []
    came = threading.Event()

    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    trainer = et.Trainer(
        step, {"w": jnp.zeros(1)}, subscribers=[subs.Alerts([rule])], run_dir=tmp_path, drain_timeout_s=30
    )

    @trainer.on(et.AlertRaised)
    async def see(event: et.AlertRaised) -> None:
        seen.append(event)
        came.set()

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 3)
    async def wait(event: et.StepCompleted) -> None:
        await anyio.to_thread.run_sync(came.wait, 60)

    trainer.fit([np.float32(1)] * 5, epochs=1)
    (raised,) = seen
    assert isinstance(raised, et.AlertRaised)
    assert (raised.name, raised.severity) == ("late", "critical")
    assert raised.message.startswith("the deadline has passed and ")


def test_a_deadline_says_that_it_says_nothing_where_the_length_is_not_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    alerts = subs.Alerts([subs.DeadlineRule(within_s=1)])
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    trainer.fit(lambda epoch: iter([np.float32(1)]), epochs=1)
    assert "Rule 'behind schedule' of Alerts has no effect" in caplog.text


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        (subs.StallRule, {"after_s": 0}, "StallRule(after_s=0): after_s must be a finite number > 0, got 0"),
        (subs.LowDiskRule, {"below_bytes": 0}, "LowDiskRule(below_bytes=0)"),
        (subs.SlowSubscriberRule, {"backlog": 0}, "SlowSubscriberRule(backlog=0)"),
        (subs.DeadlineRule, {}, "give either at= or within_s="),
        (subs.DeadlineRule, {"at": datetime(2030, 1, 1)}, "has no time zone"),
        (subs.CheckpointFailedRule, {"severity": "bad"}, "CheckpointFailedRule(severity='bad')"),
        (subs.DeadlineRule, {"at": "2030-01-01T00:00:00+00:00"}, "at must be a datetime"),
        (subs.RunFailedRule, {"for_s": -1}, "RunFailedRule(for_s=-1)"),
        (subs.RunFailedRule, {"for_s": 1}, "RunFailedRule(for_s=1): can never be raised"),
        (subs.RunCompletedRule, {"for_steps": 1}, "RunCompletedRule(for_steps=1): can never be raised"),
    ],
)
def test_rules_that_cannot_work_are_refused_by_name(rule: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        rule(**options)
    assert said in str(caught.value)
