"""How long steps take, where the time goes, and what that costs."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.subscribers.monitoring.overhead_meter import Goodput
from tests.support.models import batches, in_step, make_trainer, record


def figures(tmp_path: Path, timer: et.Subscriber, data: Any, epochs: int = 1, **options: Any) -> list[Any]:
    trainer = make_trainer(tmp_path, subscribers=[timer], **options)
    seen = record(trainer, et.MachineMeasured)
    trainer.fit(data(trainer) if callable(data) else data, epochs=epochs)
    return seen


def slow(seconds: float, count: int = 6) -> Any:
    """Data that makes each step wait, also those behind the compilation: nothing is made ahead."""

    def of(trainer: et.Trainer) -> Any:
        def batches_of(epoch: int) -> Any:
            for batch in in_step(trainer, batches(count)):
                time.sleep(seconds)
                yield batch

        return batches_of

    return of


# --- StepTimer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_each_epoch_tells_how_long_its_steps_took_and_what_they_waited_for(
    tmp_path: Path, backend: str
) -> None:
    seen = figures(tmp_path, subs.StepTimer(), slow(0.03), 2, flush_interval_s=0.001, backend=backend)
    assert [(event.step, event.source) for event in seen] == [(6, "StepTimer"), (12, "StepTimer")]
    for event in seen:
        metrics = event.metrics
        assert metrics["step_s"] >= 0.02
        assert 0 < metrics["step_s_p50"] <= metrics["step_s_p90"] <= metrics["step_s_p99"]
        assert metrics["steps_per_s"] == pytest.approx(1 / metrics["step_s"])
        assert metrics["data_wait_s"] >= 0.02
        assert metrics["data_wait_s"] > metrics["observer_wait_s"]
        assert "examples_per_s" not in metrics
        assert "mfu" not in metrics


def test_evaluations_and_the_time_between_epochs_are_no_time_of_steps(tmp_path: Path) -> None:
    def slow_evaluation(epoch: int) -> Any:
        time.sleep(0.5)
        return batches(1)

    trainer = make_trainer(tmp_path, subscribers=[subs.StepTimer(), subs.EvaluateEvery(steps=4)])
    seen = record(trainer, et.MachineMeasured)
    trainer.fit(batches(16), epochs=2, eval_data=slow_evaluation)
    assert sum(event.metrics["step_s"] * 16 for event in seen) < 0.5


@pytest.mark.parametrize("examples", [4, "examples"])
def test_examples_a_second_come_from_a_number_or_a_metric(tmp_path: Path, examples: int | str) -> None:
    metrics = figures(tmp_path, subs.StepTimer(examples=examples), batches(8))[0].metrics
    assert metrics["examples_per_s"] == pytest.approx(4 * metrics["steps_per_s"])


def test_a_metric_that_is_not_there_gives_no_examples_a_second(tmp_path: Path) -> None:
    assert (
        "examples_per_s" not in figures(tmp_path, subs.StepTimer(examples="nothing"), batches(8))[0].metrics
    )


def test_flops_are_those_of_the_compiled_step_and_mfu_is_their_share_of_the_peak(tmp_path: Path) -> None:
    def matmul(state: Any, batch: Any) -> Any:
        return state, {"sum": jnp.sum(batch @ state["w"])}

    trainer = et.Trainer(
        matmul,
        {"w": jnp.ones((64, 64))},
        subscribers=[subs.StepTimer(peak_flops=1e12)],
        run_dir=tmp_path,
    )
    seen = record(trainer, et.MachineMeasured)
    trainer.fit([np.ones((64, 64), np.float32)] * 10, epochs=1)
    metrics = seen[0].metrics
    assert metrics["flops_per_step"] == pytest.approx(2 * 64**3, rel=0.1)
    assert metrics["flops_per_s"] == pytest.approx(metrics["flops_per_step"] * metrics["steps_per_s"])
    assert metrics["mfu"] == pytest.approx(metrics["flops_per_s"] / 1e12)


def test_without_an_estimate_of_xla_there_are_no_flops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(self: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", silent)
    metrics = figures(tmp_path, subs.StepTimer(peak_flops=1e12), batches(4))[0].metrics
    assert not {"flops_per_step", "flops_per_s", "mfu"} & set(metrics)


def test_long_epochs_are_told_of_every_so_many_steps(tmp_path: Path) -> None:
    timer = subs.StepTimer(every_steps=10)
    seen = figures(tmp_path, timer, slow(0.002, 35), flush_interval_s=0.001)
    assert len(seen) >= 3
    assert all(later.step - event.step >= 10 for event, later in pairwise(seen[:-1]))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"examples": 0}, "examples"),
        ({"examples": ""}, "examples"),
        ({"peak_flops": 0.0}, "peak_flops"),
        ({"peak_flops": float("inf")}, "peak_flops"),
        ({"every_steps": 0}, "every_steps"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(et.ConfigurationError, match=match):
        subs.StepTimer(**arguments)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 20)), min_size=1, max_size=30))
def test_a_window_counts_in_the_quantiles_once_for_each_of_its_steps(
    windows: list[tuple[float, int]],
) -> None:
    timer = subs.StepTimer()
    timer._windows.extend(windows)
    timer._steps, timer._seconds = 1, 1.0
    measured = timer._metrics(LoopStatistics())
    repeated = np.repeat([seconds for seconds, _ in windows], [steps for _, steps in windows])
    expected = np.quantile(repeated, (0.5, 0.9, 0.99), method="inverted_cdf")
    assert [measured[f"step_s_p{percent}"] for percent in (50, 90, 99)] == expected.tolist()


# --- OverheadMeter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_slow_decider_exceeds_the_budget_and_is_named(
    tmp_path: Path, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.OverheadMeter(0.4, every_s=0.1)], backend=backend)
    seen = record(trainer, et.MachineMeasured, et.AlertRaised, et.AlertResolved)

    @trainer.on(et.StepCompleted, lag=0, name="ponders")
    async def ponder(event: et.StepCompleted) -> None:
        await anyio.sleep(0.06 if event.step <= 20 else 0)

    with caplog.at_level(logging.WARNING, logger="eventtrain"):
        trainer.fit(slow(0.015, 100)(trainer), epochs=1)
    alerts = [event for event in seen if isinstance(event, et.AlertRaised)]
    assert {(alert.name, alert.metric) for alert in alerts} == {("overhead", "overhead_share")}
    assert alerts[0].value > 0.4
    assert "ponders" in alerts[0].message
    assert alerts[0].message in caplog.text
    measured = [event.metrics for event in seen if isinstance(event, et.MachineMeasured)]
    assert max(metrics["handler_wall_s/ponders"] for metrics in measured) > 0.03
    assert sum(metrics["observer_wait_s"] for metrics in measured) >= 0.4
    assert {event.name for event in seen if isinstance(event, et.AlertResolved)} == {"overhead"}


async def test_what_is_raised_is_resolved_by_the_run_that_resumes(tmp_path: Path) -> None:
    said: list[Any] = []
    loops = [LoopStatistics(), LoopStatistics(1, 1, 1.0), LoopStatistics(2, 2, 2.0, observing_s=1.0)]

    def run(*loops: LoopStatistics) -> et.RunContext:
        left = list(loops)
        figures: Any = SimpleNamespace(statistics=lambda: left.pop(0))
        return et.RunContext("run", tmp_path, cast(Any, None), said.append, _figures=figures)

    first, second, other = (subs.OverheadMeter(every_s=0.5) for _ in range(3))
    await first.start(run(loops[2]))
    await first.handle(et.RunCompleted(step=2, reason="x"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for meter in (second, other):
        await meter.start(run(loops[1]))
        await meter.handle(et.RunCompleted(step=1, reason="x"))
    assert [event.kind for event in said if event.kind != "machine_measured"] == [
        "alert_raised",
        "alert_resolved",
    ]


def test_a_slow_observer_is_measured_and_costs_the_loop_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.OverheadMeter(every_s=30)])
    seen = record(trainer, et.MachineMeasured, et.AlertRaised)

    @trainer.on(et.StepCompleted, name="dawdles")
    async def dawdle(event: et.StepCompleted) -> None:
        await anyio.sleep(0.05)

    trainer.fit(slow(0.01, 20)(trainer), epochs=1)
    (last,) = seen
    assert last.source == "OverheadMeter"
    assert last.metrics["observer_wait_s"] < 0.01
    assert last.metrics["overhead_share"] < 0.05
    assert last.metrics["handler_wall_s/dawdles"] > 0.05
    assert last.metrics["handler_cpu_s/dawdles"] < last.metrics["handler_wall_s/dawdles"]


@pytest.mark.parametrize(("arguments", "match"), [({"budget": -0.1}, "budget"), ({"every_s": 0}, "every_s")])
def test_a_budget_that_cannot_work_is_refused_by_name(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(et.ConfigurationError, match=match):
        subs.OverheadMeter(**arguments)


def test_goodput_counts_pauses_and_the_time_between_attempts_and_repeated_steps_against_the_run() -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)

    def window(goodput: Goodput, first: int, last: int, at_s: float) -> None:
        event = et.StepsCompleted(step=last, first_step=first, last_step=last, epoch=0, metrics={})
        object.__setattr__(event, "time", began + timedelta(seconds=at_s))
        goodput.add(event)

    first = Goodput(began.timestamp())
    first.skip(began + timedelta(seconds=10))  # compiled
    window(first, 1, 10, 20.0)
    window(first, 11, 20, 30.0)
    assert first.share(began.timestamp() + 30) == pytest.approx(20 / 30)
    window(first, 21, 30, 60.0)  # 20 s of a pause
    assert first.share(began.timestamp() + 60) == pytest.approx(30 / 60)

    second = Goodput(first.began_s, productive_s=20.0)  # from the checkpoint of step 20, 100 s later
    window(second, 21, 30, 160.0)
    window(second, 31, 40, 170.0)
    assert second.share(began.timestamp() + 170) == pytest.approx(40 / 170)


def test_the_goodput_of_a_run_is_measured_and_continues_from_its_checkpoint(tmp_path: Path) -> None:
    meter, other = subs.OverheadMeter(), subs.OverheadMeter()
    trainer = make_trainer(tmp_path, subscribers=[meter])
    seen = record(trainer, et.MachineMeasured)
    trainer.fit(batches(6), epochs=3)
    assert 0 <= seen[-1].metrics["goodput_share"] <= 1
    other.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert other._loaded is not None
    assert other._loaded.began_s == meter._goodput.began_s
