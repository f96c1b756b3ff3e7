"""OpenTelemetry: spans and measurements, read back from the SDK's own exporters in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.trackers import opentelemetry as open_telemetry
from eventtrain.testing import ScriptedStep
from eventtrain.validation.optional_imports import MissingModule
from tests.subscribers.trackers.tracked_runs import ODD
from tests.support.saved_in_memory import MemoryCheckpointer

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry's SDK is not installed")
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SECRET = "s3cr3t-t0ken"


class Telemetry:
    """Providers as a program sets them up, and what they got."""

    def __init__(self, exporter: Any = None) -> None:
        self.exporter = exporter or InMemorySpanExporter()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.readings: list[Any] = []
        self.meter_provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def subscriber(self, **options: Any) -> subs.OpenTelemetry:
        return subs.OpenTelemetry(self.tracer_provider, self.meter_provider, **options)

    def spans(self, name: str = "") -> list[ReadableSpan]:
        """In the order in which they began."""
        spans = sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time)
        return [span for span in spans if span.name == f"eventtrain.{name}" or not name]

    def points(self, name: str) -> dict[Any, Any]:
        """Value of the attribute ``name`` (None if there is none) -> data point, of the newest reading that has it."""
        if data := self.reader.get_metrics_data():
            self.readings.insert(0, data)
        found = [
            [
                metric
                for resource in data.resource_metrics
                for scope in resource.scope_metrics
                for metric in scope.metrics
                if metric.name == f"eventtrain.{name}"
            ]
            for data in self.readings  # the SDK 1.30 has a gauge only in the first reading after it was set
        ]
        (metric,) = next(filter(None, found))
        return {point.attributes.get("name"): point for point in metric.data.data_points}


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": batch, 'odd "name"\n/ü': -batch}


def eval_fn(state: Any, batch: Any) -> Any:
    return {"accuracy": batch}


def trainer(run_dir: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer:
    return et.Trainer(
        step_fn, {"w": jnp.zeros(2)}, eval_fn=eval_fn, subscribers=subscribers, run_dir=run_dir, **options
    )


def data(epoch: int) -> list[Any]:
    return [np.float32(epoch), np.float32(epoch + 1)]


EVALUATION = [np.float32(0.5)]


def parent_of(span: ReadableSpan, spans: Sequence[ReadableSpan]) -> str | None:
    if span.parent is None:
        return None
    return next(one.name for one in spans if one.context.span_id == span.parent.span_id)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_run_epochs_evaluations_and_checkpoints_are_spans_with_the_right_parents_and_times(
    tmp_path: Path, telemetry: Telemetry, backend: str
) -> None:
    run = trainer(
        tmp_path,
        telemetry.subscriber(attributes={"team": "vision"}),
        subs.Checkpointer("checkpoints", every_epochs=1),
        run_id="run-7",
        backend=backend,
    )
    assert run.fit(data, epochs=2, eval_data=EVALUATION).step == 4
    spans = telemetry.spans()
    assert sorted((span.name, parent_of(span, spans)) for span in spans) == sorted(
        [("eventtrain.run", None)]
        + [("eventtrain.epoch", "eventtrain.run")] * 2
        + [("eventtrain.evaluation", "eventtrain.epoch")] * 2
        + [("eventtrain.checkpoint", "eventtrain.run")] * 2
    )
    by_id = {span.context.span_id: span for span in spans}
    for span in spans:
        assert span.attributes["team"] == "vision"
        assert span.status.status_code is trace.StatusCode.UNSET
        if span.parent is not None:
            parent = by_id[span.parent.span_id]
            assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time, span.name
            assert span.context.trace_id == parent.context.trace_id
    (root,) = telemetry.spans("run")
    assert {key: root.attributes[f"eventtrain.{key}"] for key in ("run_id", "step", "stop_reason")} == {
        "run_id": "run-7",
        "step": 4,
        "stop_reason": "completed",
    }
    first, second = telemetry.spans("epoch")
    assert (first.attributes["eventtrain.epoch"], second.attributes["eventtrain.epoch"]) == (0, 1)
    assert second.attributes["eventtrain.metric.loss"] == 1.5
    assert second.attributes["eventtrain.metric.val_accuracy"] == 0.5
    assert telemetry.spans("evaluation")[0].attributes["eventtrain.metric.accuracy"] == 0.5
    assert [span.attributes["eventtrain.step"] for span in telemetry.spans("checkpoint")] == [2, 4]


def test_what_a_run_says_is_measured(tmp_path: Path, telemetry: Telemetry) -> None:
    trainer(
        tmp_path, telemetry.subscriber(attributes={"team": "vision"}), subs.Checkpointer("ck", every=3)
    ).fit(data, epochs=3, eval_data=EVALUATION)
    assert telemetry.points("steps")[None].value == 6
    assert {name: point.value for name, point in telemetry.points("metric").items()} == {
        "loss": 3.0,
        'odd "name"\n/ü': -3.0,
    }
    assert telemetry.points("epoch.metric")["val_accuracy"].value == 0.5
    assert telemetry.points("evaluation.metric")["accuracy"].value == 0.5
    assert telemetry.points("epoch.duration")[None].count == 3
    assert telemetry.points("evaluation.duration")[None].count == 3
    sizes = telemetry.points("checkpoint.size")[None]
    assert sizes.count == telemetry.points("checkpoint.duration")[None].count == 2
    assert sizes.min > 0
    assert sizes.attributes == {"team": "vision"}


def test_half_a_surrogate_pair_in_a_name_or_an_error_costs_no_batch_of_an_exporter(
    telemetry: Telemetry,
) -> None:
    now = datetime.now(UTC)
    recorder = open_telemetry.Recorder(
        telemetry.tracer_provider,
        telemetry.meter_provider,
        attributes={},
        context=open_telemetry.otel_context.get_current(),
        run_id="run",
        step=0,
        time=now,
    )
    recorder.open()
    recorder.record(et.EpochStarted(epoch=0, time=now))
    metrics = {"\udc80": 1.0}
    recorder.record(et.EpochCompleted(epoch=0, metrics=metrics, steps=1, duration_s=1.0, time=now))
    recorder.record(et.CheckpointFailed(path="\udc80", error="OSError: \udc80", time=now))
    recorder.record(et.RunFailed(error="ValueError: \udc80", time=now))
    recorder.close()
    spans = [*telemetry.spans("epoch"), *telemetry.spans("checkpoint"), *telemetry.spans("run")]
    assert len(spans) == 3
    for span in spans:
        events = [value for event in span.events for value in event.attributes.values()]
        said = [*span.attributes, *span.attributes.values(), span.status.description or "", *events]
        assert any(r"\udc80" in str(text) for text in said)
        assert not any("\udc80" in str(text) for text in said)
    assert list(telemetry.points("epoch.metric")) == [r"\udc80"]


def test_nan_and_infinities_are_counted_and_stand_in_spans(
    tmp_path: Path, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, telemetry.subscriber()).fit([np.float32("nan")] * 2, epochs=1)
    assert telemetry.points("nonfinite")["loss"].value >= 1
    assert caplog.text == ""
    (epoch,) = telemetry.spans("epoch")
    assert np.isnan(epoch.attributes["eventtrain.metric.loss"])


def test_odd_names_and_errors_reach_an_exporter_that_writes_utf_8(
    tmp_path: Path, telemetry: Telemetry
) -> None:
    def odd(state: Any, batch: Any) -> Any:
        return {"w": state["w"] + batch}, dict.fromkeys(ODD, batch)

    run = et.Trainer(odd, {"w": jnp.zeros(2)}, subscribers=[telemetry.subscriber()], run_dir=tmp_path)

    @run.on(et.EpochCompleted, on_error="fail")
    async def fail(event: et.EpochCompleted) -> None:
        raise RuntimeError("half of a pair: \ud800")

    with pytest.raises(et.SubscriberError):
        run.fit(data, epochs=1)
    names = [name.replace("\ud800", "\\ud800") for name in ODD]
    assert telemetry.points("metric").keys() == set(names)
    (epoch,) = telemetry.spans("epoch")
    assert {f"eventtrain.metric.{name}" for name in names} <= {*(epoch.attributes or ())}
    assert "half of a pair: \\ud800" in str(telemetry.spans("run")[0].status.description)
    for span in telemetry.spans():
        attributes = [span.attributes or {}, *(event.attributes or {} for event in span.events)]
        texts = [f"{key}={value}" for found in attributes for key, value in found.items()]
        assert all(text.encode() for text in (*texts, span.status.description or "-"))


def test_hyperparameters_are_measured(tmp_path: Path, telemetry: Telemetry) -> None:
    script = ScriptedStep({"loss": [1.0]}, steps_per_epoch=4, learning_rate=0.5)
    et.Trainer(
        script.step_fn,
        script.state,
        subscribers=[telemetry.subscriber(), subs.LearningRateScheduler(lambda epoch, rate: rate / 2)],
        run_dir=tmp_path,
    ).fit(script.data, epochs=2)
    assert telemetry.points("hyperparam")["learning_rate"].value == 0.125


@pytest.mark.parametrize("way", ["fit", "fit_async"])
async def test_the_run_is_a_child_of_the_span_around_the_call(
    tmp_path: Path, telemetry: Telemetry, way: str
) -> None:
    tracer = telemetry.tracer_provider.get_tracer("service")
    run = trainer(tmp_path, telemetry.subscriber())
    if way == "fit_async":
        with tracer.start_as_current_span("request"):
            await run.fit_async(data, epochs=1)
    else:

        def call() -> None:
            with tracer.start_as_current_span("request"):
                run.fit(data, epochs=1)

        await anyio.to_thread.run_sync(call)
    (root,) = telemetry.spans("run")
    assert parent_of(root, telemetry.spans()) == "request"


def test_without_providers_the_global_ones_are_used(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: telemetry.tracer_provider)
    monkeypatch.setattr("opentelemetry.metrics.get_meter_provider", lambda: telemetry.meter_provider)
    monkeypatch.setattr(
        "opentelemetry.metrics._internal.get_meter_provider", lambda: telemetry.meter_provider
    )
    trainer(tmp_path, subs.OpenTelemetry()).fit(data, epochs=1)
    assert len(telemetry.spans("run")) == 1
    assert telemetry.points("steps")[None].value == 2


def test_without_any_provider_nothing_is_recorded_and_nothing_fails(tmp_path: Path) -> None:
    failed: list[et.Event] = []
    run = trainer(tmp_path, subs.OpenTelemetry())
    run.on(et.SubscriberFailed)(lambda event: failed.append(event))
    run.fit(data, epochs=1)
    assert failed == []


def test_a_run_that_fails_has_the_status_of_an_error_and_so_has_a_checkpoint(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, name: Path) -> None:
        raise OSError("no room")

    monkeypatch.setattr("eventtrain.subscribers._shared.atomic_files.rename", refuse)

    def breaking() -> Iterator[Any]:
        yield np.float32(1)
        yield np.float32(2)
        raise ValueError("the data broke")

    run = trainer(tmp_path, telemetry.subscriber(), subs.Checkpointer("ck", every=1, retries=0, at_end=False))
    with pytest.raises(ValueError, match="the data broke"):
        run.fit(lambda epoch: breaking(), epochs=1)
    (root,) = telemetry.spans("run")
    assert root.status.status_code is trace.StatusCode.ERROR
    assert "the data broke" in root.status.description
    (said,) = root.events
    assert said.name == "exception"
    assert said.attributes["exception.type"] == "ValueError"
    (epoch,) = telemetry.spans("epoch")
    assert epoch.status.status_code is trace.StatusCode.ERROR
    assert epoch.attributes["eventtrain.complete"] is False
    checkpoints = telemetry.spans("checkpoint")
    assert checkpoints
    assert {span.status.status_code for span in checkpoints} == {trace.StatusCode.ERROR}
    assert all("no room" in span.status.description for span in checkpoints)
    assert telemetry.points("checkpoint.failures")[None].value == len(checkpoints)


def test_a_run_that_resumes_has_a_span_of_its_own_and_goes_on_with_the_epoch(
    tmp_path: Path, telemetry: Telemetry
) -> None:
    checkpointer = MemoryCheckpointer(every=3)
    trainer(tmp_path, checkpointer).fit(data, epochs=3)
    trainer(tmp_path, checkpointer, telemetry.subscriber()).fit(data, epochs=3, resume=3)
    (root,) = telemetry.spans("run")
    assert (root.attributes["eventtrain.resumed"], root.attributes["eventtrain.start_step"]) == (True, 3)
    assert [span.attributes["eventtrain.epoch"] for span in telemetry.spans("epoch")] == [1, 2]
    assert telemetry.points("steps")[None].value == 3


class Hanging:
    """An exporter that does not come back until it is told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.asked = threading.Event()

    def export(self, spans: Any) -> Any:
        self.asked.set()
        self.go_on.wait(60)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None: ...


def test_an_exporter_that_hangs_delays_neither_training_nor_by_much_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = Hanging()
    telemetry = Telemetry(exporter)
    run = trainer(tmp_path, telemetry.subscriber(finish_timeout_s=0.2))
    try:
        assert run.fit(data, epochs=50, eval_data=EVALUATION).step == 100
        assert exporter.asked.is_set()
        assert not exporter.go_on.is_set()
    finally:
        exporter.go_on.set()
    assert "OpenTelemetry did not take everything within 0.2 s after the run" in caplog.text


class Broken:
    """An exporter that raises."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def export(self, spans: Any) -> Any:
        raise RuntimeError(f"no answer from {self.endpoint}")

    def shutdown(self) -> None: ...


def test_an_exporter_that_raises_costs_nothing_and_its_endpoint_is_shown_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry(Broken(f"http://me:{SECRET}@{SECRET}.invalid/{SECRET}?key={SECRET}"))
    caplog.set_level(logging.DEBUG, "eventtrain")
    subscriber = telemetry.subscriber()
    run = trainer(tmp_path, subscriber, subs.JSONLLogger("all.jsonl", et.Event), subs.Report())
    assert run.fit(data, epochs=2).step == 4
    said = [record for record in caplog.records if record.name == "eventtrain"]
    shown = [repr(subscriber), str(vars(subscriber)), *(record.getMessage() for record in said)]
    shown += [record.exc_text or "" for record in said]
    shown += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "all.jsonl").stat().st_size
    assert not [text for text in shown if SECRET in text]
    assert SECRET in caplog.text  # the SDK logs what its exporter raised: that is the program's own


async def test_events_that_nobody_announced_are_spans_all_the_same(telemetry: Telemetry) -> None:
    """As after an outage, or where somebody else's subscription options left something out."""
    now = datetime.now(UTC)
    recorder = open_telemetry.Recorder(
        telemetry.tracer_provider,
        telemetry.meter_provider,
        attributes={},
        context=open_telemetry.otel_context.get_current(),
        run_id="run",
        step=0,
        time=now,
    )
    recorder.open()
    for event in (
        et.EpochCompleted(epoch=0, metrics={"loss": 1.0}, steps=2, duration_s=2.0, time=now),
        et.EvalCompleted(epoch=0, metrics={"accuracy": 1.0}, steps=2, duration_s=3.0, time=now),
        et.CheckpointCommitted(path="ck", size_bytes=1, duration_s=4.0, time=now),
        et.CheckpointFailed(path="", error="nothing was begun", time=now),
    ):
        recorder.record(event)
    recorder.close()
    durations = {span.name: (span.end_time - span.start_time) / 1e9 for span in telemetry.spans()}
    assert durations["eventtrain.epoch"] == pytest.approx(2)
    assert durations["eventtrain.evaluation"] == pytest.approx(3)
    assert {round(s.end_time - s.start_time, -6) for s in telemetry.spans("checkpoint")} == {0, 4e9}


def test_the_end_of_one_thing_ends_what_was_left_open(telemetry: Telemetry) -> None:
    now = datetime.now(UTC)
    new = partial(et.EpochStarted, time=now)
    recorder = open_telemetry.Recorder(
        telemetry.tracer_provider,
        telemetry.meter_provider,
        attributes={},
        context=open_telemetry.otel_context.get_current(),
        run_id="run",
        step=0,
        time=now,
    )
    recorder.open()
    recorder.record(new(epoch=0))
    recorder.record(new(epoch=1))
    recorder.record(et.CheckpointStarted(path="ck", time=now))
    recorder.close()
    assert len(telemetry.spans("epoch")) == 2
    assert len(telemetry.spans("checkpoint")) == 1
    assert len(telemetry.spans("run")) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"tracer_provider": f"http://me:{SECRET}@host"},
            "tracer_provider=...): it must have a method get_tracer(), got str",
        ),
        ({"meter_provider": 1}, "meter_provider=...): it must have a method get_meter(), got int"),
        ({"finish_timeout_s": -1}, "finish_timeout_s must be a finite number >= 0, got -1"),
    ],
)
def test_arguments_that_cannot_work_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.OpenTelemetry(**wrong)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


def test_without_the_api_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'opentelemetry'")
    missing = MissingModule(error, "opentelemetry", "OpenTelemetry")
    monkeypatch.setattr(open_telemetry, "otel_trace", missing)
    with pytest.raises(
        et.ConfigurationError, match=r"No module named 'opentelemetry'.*'eventtrain\[opentelemetry\]'"
    ):
        subs.OpenTelemetry()
