"""Alerts in real runs: raised once, resolved once, told by whatever watches them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.subscribers.alerts.alert_servers import Target, serving
from tests.support.saved_in_memory import MemoryCheckpointer


def step(state: Any, batch: Any) -> Any:
    return state, {"loss": batch}


def fit(
    tmp_path: Path,
    alerts: subs.Alerts,
    losses: list[float],
    on: Callable[[et.Trainer], None] | None = None,
    *others: et.Subscriber,
    **options: Any,
) -> list[et.Event]:
    """The alerts and failures of a run of one epoch."""
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[*others, alerts], run_dir=tmp_path)
    seen: list[et.Event] = []

    @trainer.on(et.AlertRaised | et.AlertResolved | et.SubscriberFailed)
    async def see(event: et.Event) -> None:
        seen.append(event)

    if on is not None:
        on(trainer)
    trainer.fit([np.float32(loss) for loss in losses], epochs=1, **options)
    return seen


def brief(events: list[et.Event]) -> list[tuple[str, int]]:
    return [(event.kind, event.step) for event in events]


def named(events: list[et.Event]) -> list[tuple[str, int, str]]:
    return [(event.kind, event.step, event.name) for event in events]  # type: ignore[attr-defined]


# --- by metrics -----------------------------------------------------------------------------------------------


def test_an_alert_is_raised_once_and_resolved_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rule = subs.Rule("loss", above=1.0, event=et.StepCompleted, severity="critical")
    seen = fit(tmp_path, subs.Alerts([rule]), [0.5, 2.0, 3.0, 1.0, 0.5, 9.0])
    assert brief(seen) == [("alert_raised", 2), ("alert_resolved", 4), ("alert_raised", 6)]
    raised = seen[0]
    assert isinstance(raised, et.AlertRaised)
    assert (raised.name, raised.severity, raised.metric, raised.value) == (
        "loss above 1",
        "critical",
        "loss",
        2.0,
    )
    assert raised.message == "loss = 2 at step 2 is above 1"
    records = [record for record in caplog.records if "loss above 1" in record.getMessage()]
    assert [record.levelno for record in records if record.levelno > logging.INFO] == [logging.CRITICAL] * 2


def test_a_rule_may_watch_what_is_measured_of_the_machine(tmp_path: Path) -> None:
    rules = [
        subs.Rule("gpu0_temperature_c", above=85.0, event=et.MachineMeasured),
        subs.Rule("steps_per_s", below=5.0, event=et.MachineMeasured, name="slow"),
    ]

    def measure(trainer: et.Trainer) -> None:
        @trainer.on(et.StepCompleted)
        async def publish(event: et.StepCompleted) -> None:
            hot = {"gpu0_temperature_c": event.metrics["loss"]}
            metrics = {"steps_per_s": 1.0} if event.step == 4 else hot
            trainer.bus.publish(et.MachineMeasured(step=event.step, source="test", metrics=metrics))

    seen = fit(tmp_path, subs.Alerts(rules), [50.0, 90.0, 60.0, 60.0], measure)
    assert named(seen) == [
        ("alert_raised", 2, "gpu0_temperature_c above 85"),
        ("alert_resolved", 3, "gpu0_temperature_c above 85"),
        ("alert_raised", 4, "slow"),
    ]


def test_the_non_finite_rule_sees_nan_and_infinity_and_the_others_do_not(tmp_path: Path) -> None:
    rules = [
        subs.Rule("loss", non_finite=True, event=et.StepCompleted),
        subs.Rule("loss", above=5.0, name="high", event=et.StepCompleted),
        subs.Rule("missing", below=5.0, event=et.MachineMeasured),
    ]
    assert named(fit(tmp_path, subs.Alerts(rules), [1.0, math.nan, math.inf, math.nan, 1.0])) == [
        ("alert_raised", 2, "loss not finite"),
        ("alert_raised", 3, "high"),
        ("alert_resolved", 5, "loss not finite"),
        ("alert_resolved", 5, "high"),
    ]


def test_epochs_are_judged_by_default_and_a_band_has_two_sides(tmp_path: Path) -> None:
    seen = fit(tmp_path, subs.Alerts([subs.Rule("loss", above=4.0, below=2.0)]), [0.0, 1.0])
    assert brief(seen) == [("alert_raised", 2)]


def test_alerts_of_one_window_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    rules = [
        subs.Rule("loss", above=5.0, name="later", event=et.StepCompleted),
        subs.SpikeRule("loss", window=3, event=et.StepCompleted),
        subs.NoImprovementRule("loss", patience=3, event=et.StepCompleted),
        subs.ForecastRule("loss", above=20.0, within=5, window=3, event=et.StepCompleted),
    ]
    assert named(fit(tmp_path, subs.Alerts(rules), [1.0, 1.0, 1.0, 3.0, 7.0, 0.5])) == [
        ("alert_raised", 4, "loss spike"),
        ("alert_raised", 4, "loss no better for 3"),
        ("alert_raised", 5, "later"),
        ("alert_raised", 5, "loss above 20 within 5 steps"),
        ("alert_resolved", 6, "later"),
        ("alert_resolved", 6, "loss spike"),
        ("alert_resolved", 6, "loss no better for 3"),
        ("alert_resolved", 6, "loss above 20 within 5 steps"),
    ]


def test_steps_are_judged_without_an_event_for_each(tmp_path: Path) -> None:
    alerts = subs.Alerts([subs.Rule("loss", above=1.0, event=et.StepCompleted), subs.StallRule()])
    assert et.StepsCompleted in alerts.events
    assert et.StepCompleted not in alerts.events


def test_a_metric_that_never_came_is_told_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def measure(trainer: et.Trainer) -> None:
        @trainer.on(et.StepCompleted)
        async def publish(event: et.StepCompleted) -> None:
            trainer.bus.publish(et.MachineMeasured(step=event.step, source="test", metrics={"loss": 0.0}))

    rules = [subs.Rule(name, above=1.0, event=et.MachineMeasured) for name in ("los", "loss")]
    fit(tmp_path, subs.Alerts(rules), [0.5], measure)
    told = [record.getMessage() for record in caplog.records if "had no effect" in record.getMessage()]
    assert told == ["Rule 'los above 1' of Alerts had no effect: no event had the metric 'los', only loss."]


# --- by what happens to the run -------------------------------------------------------------------------------


def test_the_end_of_a_run_is_told_by_its_reason_and_each_run_anew(tmp_path: Path) -> None:
    alerts = subs.Alerts([subs.RunCompletedRule(), subs.RunFailedRule()])
    for _ in range(2):
        (completed,) = fit(tmp_path, alerts, [1.0, 2.0])
        assert isinstance(completed, et.AlertRaised)
        assert (completed.name, completed.severity) == ("run completed", "info")
        assert completed.message == "after step 2: completed"


def test_another_run_begins_anew_and_one_that_goes_on_does_not(tmp_path: Path) -> None:
    rules = [
        subs.Rule("loss", non_finite=True, event=et.StepCompleted),
        subs.NoImprovementRule("loss", patience=2, event=et.StepCompleted),
    ]
    alerts = subs.Alerts(rules)
    assert brief(fit(tmp_path, alerts, [0.1, math.nan])) == [("alert_raised", 2)]
    assert brief(fit(tmp_path, alerts, [3.0, 2.0, math.nan])) == [("alert_raised", 3)]

    alerts = subs.Alerts(rules[:1])
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    seen: list[et.Event] = []

    @trainer.on(et.AlertRaised | et.AlertResolved)
    async def see(event: et.Event) -> None:
        seen.append(event)

    for losses in ([1.0, math.nan], [math.nan, 1.0]):
        trainer.fit([np.float32(loss) for loss in losses], epochs=1)
    assert brief(seen) == [("alert_raised", 2), ("alert_resolved", 4)]


def test_a_run_that_fails_is_told_with_its_error(tmp_path: Path) -> None:
    alerts = subs.Alerts([subs.RunCompletedRule(), subs.RunFailedRule()])
    seen: list[et.Event] = []

    def see(trainer: et.Trainer) -> None:
        @trainer.on(et.AlertRaised)
        async def note(event: et.AlertRaised) -> None:
            seen.append(event)

    class Broken(list[Any]):
        def __iter__(self) -> Any:
            yield np.float32(1)
            raise ZeroDivisionError("no more data")

    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    see(trainer)
    with pytest.raises(Exception, match="no more data"):
        trainer.fit(Broken([1]), epochs=1)
    (failed,) = seen
    assert isinstance(failed, et.AlertRaised)
    assert (failed.name, failed.severity) == ("run failed", "critical")
    assert "no more data" in failed.message


async def test_a_failed_checkpoint_is_an_alert_until_one_is_committed(tmp_path: Path) -> None:
    alerts = subs.Alerts([subs.CheckpointFailedRule()])
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    seen: list[et.Event] = []

    @trainer.on(et.AlertRaised | et.AlertResolved)
    async def see(event: et.Event) -> None:
        seen.append(event)

    @trainer.on(et.RunStarted, lag=0)
    async def fail(event: et.RunStarted) -> None:
        for failed in (True, True, False, True):
            if failed:
                trainer.bus.publish(et.CheckpointFailed(step=1, path="x", error="no space left"))
            else:
                trainer.bus.publish(et.CheckpointCommitted(step=1, path="x", size_bytes=1, duration_s=1.0))

    with anyio.fail_after(60):
        await trainer.fit_async([np.float32(1)], epochs=1)
    assert named(seen) == [
        ("alert_raised", 1, "checkpoint failed"),
        ("alert_resolved", 1, "checkpoint failed"),
        ("alert_raised", 1, "checkpoint failed"),
    ]


async def test_a_subscriber_that_lags_is_an_alert_of_its_name(tmp_path: Path) -> None:
    alerts = subs.Alerts([subs.SlowSubscriberRule()])
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    came = anyio.Event()

    @trainer.on(et.AlertRaised)
    async def see(event: et.AlertRaised) -> None:
        assert event.name == "slow subscriber: plots"
        assert event.message == "plots is behind: 7 events were dropped"
        came.set()

    @trainer.on(et.RunStarted, lag=0)
    async def lag(event: et.RunStarted) -> None:
        trainer.bus.publish(et.SubscriberLagged(subscriber="plots", dropped=7))
        with anyio.fail_after(60):
            await came.wait()

    with anyio.fail_after(60):
        await trainer.fit_async([np.float32(1)], epochs=1)
    assert came.is_set()


async def test_a_low_disk_is_told(tmp_path: Path) -> None:
    alerts = subs.Alerts([subs.LowDiskRule(below_bytes=2**60, every_s=0.01)])
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    came = anyio.Event()

    @trainer.on(et.AlertRaised)
    async def see(event: et.AlertRaised) -> None:
        assert event.message.endswith(" are free on the disk of the run, less than 1.05e+06 TiB")
        came.set()

    @trainer.on(et.RunStarted, lag=0)
    async def wait(event: et.RunStarted) -> None:
        with anyio.fail_after(60):
            await came.wait()

    with anyio.fail_after(60):
        await trainer.fit_async([np.float32(1)], epochs=1)
    assert came.is_set()


# --- what cannot work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (subs.Rule, {}),
        (subs.Rule, {"above": math.nan}),
        (subs.Rule, {"above": 1, "below": 2}),
        (subs.Rule, {"above": 1, "event": et.Event}),
        (subs.ForecastRule, {}),
        (subs.ForecastRule, {"above": 1, "below": 1}),
    ],
)
def test_rules_that_cannot_work_are_refused(rule: Any, options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError, match="'loss'"):
        rule("loss", **options)


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        (subs.Rule, {"above": 1, "for_steps": -1}, "for_steps=-1"),
        (subs.Rule, {"above": 1, "severity": "bad"}, "severity='bad'"),
        (subs.SpikeRule, {"window": 0}, "window=0"),
        (subs.SpikeRule, {"quantile": 1.5}, "quantile=1.5"),
        (subs.SpikeRule, {"times": 0.5}, "times=0.5"),
        (subs.SpikeRule, {"window": 3, "warmup": 4}, "warmup=4"),
        (subs.NoImprovementRule, {"patience": 0}, "patience=0"),
        (subs.NoImprovementRule, {"mode": "up"}, "mode='up'"),
        (subs.ForecastRule, {"above": math.inf}, "above=inf"),
        (subs.ForecastRule, {"above": 1, "window": 2}, "window=2"),
        (subs.ForecastRule, {"above": 1, "window": 1001}, "window=1001"),
        (subs.ForecastRule, {"above": 1, "every": 0}, "every=0"),
    ],
)
def test_arguments_of_rules_are_refused_by_name(rule: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        rule("loss", **options)
    assert f"{rule.__name__}({said}" in str(caught.value) or f"({said}" in str(caught.value).replace(
        ", ", "("
    )


def test_rules_need_names_of_their_own() -> None:
    with pytest.raises(et.ConfigurationError, match="loss above 1"):
        subs.Alerts([subs.Rule("loss", above=1.0), subs.Rule("loss", above=1.0)])
    with pytest.raises(et.ConfigurationError, match="at least one"):
        subs.Alerts([])


def test_an_option_that_would_hide_events_fails_the_run(tmp_path: Path) -> None:
    alerts = subs.Alerts([subs.Rule("loss", above=1.0)])
    alerts.every = 2
    with pytest.raises(et.ConfigurationError, match="every=2"):
        fit(tmp_path, alerts, [1.0])


# --- resuming -------------------------------------------------------------------------------------------------


def test_a_resumed_run_does_not_raise_what_is_raised(tmp_path: Path) -> None:
    rule = subs.Rule("loss", above=1.0, event=et.StepCompleted)
    first, second = subs.Alerts([rule]), subs.Alerts([rule])
    assert brief(fit(tmp_path, first, [2.0])) == [("alert_raised", 1)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert brief(fit(tmp_path, second, [2.0, 0.5])) == [("alert_resolved", 2)]


LOSSES = [1.0, 1.1, 0.9, 1.0, 2.5, 2.6, 1.0, 0.8, 3.0, 3.5, 4.0, 9.0, 0.5, 0.4]


def all_rules() -> list[Any]:
    return [
        subs.Rule("loss", above=2.0, for_steps=1, event=et.StepCompleted),
        subs.SpikeRule("loss", window=4, times=1.5, event=et.StepCompleted),
        subs.NoImprovementRule("loss", patience=4, event=et.StepCompleted),
        subs.ForecastRule("loss", above=12.0, within=6, window=4, event=et.StepCompleted),
        subs.RunCompletedRule(),
    ]


def test_a_resumed_run_raises_what_the_uninterrupted_run_raised_after_it(tmp_path: Path) -> None:
    checkpoints = MemoryCheckpointer(every=3)
    whole = fit(tmp_path / "whole", subs.Alerts(all_rules()), LOSSES, None, checkpoints)
    assert len(whole) > 8
    for step_resumed in sorted(checkpoints.saved):
        resumed = fit(
            tmp_path / str(step_resumed),
            subs.Alerts(all_rules()),
            LOSSES,
            None,
            checkpoints,
            resume=step_resumed,
        )
        # A window that was not judged at the cut is judged again, so alerts up to its step may come twice.
        after = [found for found in named(whole) if found[1] > step_resumed or "run" in found[2]]
        assert len(resumed) >= len(after)
        assert named(resumed) == named(whole)[-len(resumed) :]


def test_a_state_of_another_version_or_of_other_rules_is_not_taken_for_ones_own() -> None:
    alerts = subs.Alerts([subs.Rule("loss", above=1.0, name="x")])
    with pytest.raises(et.errors.StateError, match="version 1"):
        alerts.load_state_dict({"version": 1, "active": []})
    other = subs.Alerts([subs.SpikeRule("loss", name="x"), subs.Rule("loss", below=0.0)])
    alerts.load_state_dict(other.state_dict())
    assert alerts.state_dict()["rules"]["x"]["type"] == "Rule"


# --- beside any event loop ------------------------------------------------------------------------------------


async def test_it_works_beside_any_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Target()) as target:
        alerts = subs.Alerts(
            [subs.Rule("loss", above=1.0, event=et.StepCompleted), subs.StallRule(), subs.LowDiskRule()],
            target.url,
            allow_private=True,
        )
        trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
        with anyio.fail_after(60):
            await trainer.fit_async([np.float32(2), np.float32(0)], epochs=1)
        kinds = [event["kind"] for event in target.events if "loss" in event["name"]]
        assert kinds == ["alert_raised", "alert_resolved"]
