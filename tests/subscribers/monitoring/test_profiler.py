"""Traces cover exactly the steps they were asked for; JAX's own reader says so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, make_trainer, record

HEARD = (et.ProfileCaptured, et.SubscriberFailed, et.CommandApplied, et.CommandRejected)


def traced(tmp_path: Path, *others: et.Subscriber, **options: Any) -> tuple[et.Trainer, list[Any]]:
    trainer = make_trainer(tmp_path, subscribers=others, **options)
    return trainer, record(trainer, *HEARD)


def xplane(path: str | Path) -> Path:
    (found,) = Path(path).glob("plugins/profile/*/*.xplane.pb")
    return found


def marked_steps(path: str | Path) -> list[int]:
    """The steps that the trace names, as TensorBoard reads them."""
    found: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how jaxlib makes its types: as an error it would end the process
        data = jax.profiler.ProfileData.from_file(str(xplane(path)))
        for plane in data.planes:
            for line in plane.lines:
                found += [
                    int(value)
                    for event in line.events
                    if event.name == "train"
                    for name, value in event.stats
                    if name == "step_num"
                ]
    return sorted(found)


def test_a_range_covers_exactly_its_steps(tmp_path: Path) -> None:
    trainer, seen = traced(tmp_path, subs.Profiler(((5, 8), (9, 10), (14, 14))))
    trainer.fit(batches(10), epochs=2, eval_data=batches(3))
    assert [(event.first_step, event.last_step, event.step) for event in seen] == [
        (5, 8, 8),
        (9, 10, 10),
        (14, 14, 14),
    ]
    assert [Path(event.path) for event in seen] == [
        tmp_path / "run" / "profile" / name for name in ("steps-5-8", "steps-9-10", "steps-14-14")
    ]
    assert [marked_steps(event.path) for event in seen] == [[5, 6, 7, 8], [9, 10], [14]]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_command_traces_the_steps_after_its_boundary(tmp_path: Path, backend: str) -> None:
    trainer, seen = traced(tmp_path, subs.Profiler(directory="traces"), backend=backend)

    @trainer.on(et.StepCompleted, lag=2)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 3:
            control.profile(3, reason="slow")

    trainer.fit(batches(12), epochs=1)
    applied, captured = seen
    assert (applied.step, applied.command.kind) == (5, "profile")
    assert captured.path == str(tmp_path / "run" / "traces" / "steps-6-8")
    assert marked_steps(captured.path) == [6, 7, 8]


def test_groups_of_steps_are_cut_where_a_trace_begins_and_ends(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", steps_per_call=4)
    plain.fit(batches(16), epochs=1)
    trainer, seen = traced(tmp_path, subs.Profiler(((6, 11),)), steps_per_call=4)
    trainer.fit(batches(16), epochs=1)
    (captured,) = seen
    assert (captured.first_step, captured.last_step) == (6, 11)
    xplane(captured.path)
    assert (trainer.state["params"]["w"] == plain.state["params"]["w"]).all()


def test_a_run_that_ends_within_a_range_has_the_steps_until_then(tmp_path: Path) -> None:
    trainer, seen = traced(tmp_path, subs.Profiler(((3, 100),)))
    trainer.fit(batches(5), epochs=1)
    (captured,) = seen
    assert (captured.first_step, captured.last_step) == (3, 5)
    assert marked_steps(captured.path) == [3, 4, 5]


def test_a_run_that_fails_ends_its_trace(tmp_path: Path) -> None:
    def broken(epoch: int) -> Any:
        yield from batches(4)
        raise OSError("the disk with the data is gone")

    trainer, seen = traced(tmp_path, subs.Profiler(((2, 100),)))
    with pytest.raises(OSError, match="gone"):
        trainer.fit(broken, epochs=1)
    assert [event.kind for event in seen] == ["profile_captured"]
    trainer.fit(batches(1), steps=1)  # another trace could begin


def test_a_profiler_that_cannot_work_ends_nothing(tmp_path: Path) -> None:
    trainer, seen = traced(tmp_path, subs.Profiler(((2, 3), (5, 6)), directory=tmp_path / "file"))

    def data(epoch: int) -> Any:  # begins when the Profiler has checked its folder
        (tmp_path / "file").rmdir()
        (tmp_path / "file").write_text("no folder")
        return batches(8)

    result = trainer.fit(data, epochs=1)
    assert (result.step, result.stop_reason) == (8, "completed")
    assert [(event.kind, event.subscriber, event.event_kind) for event in seen] == [
        ("subscriber_failed", "Profiler", "profile")
    ] * 2
    assert "NotADirectoryError" in seen[0].error


def test_a_trace_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    trainer, seen = traced(tmp_path, subs.Profiler(((2, 3),)))
    jax.profiler.start_trace(tmp_path / "own")
    try:
        trainer.fit(batches(6), epochs=1)
    finally:
        jax.profiler.stop_trace()
    assert [event.kind for event in seen] == ["subscriber_failed"]
    assert "already been started" in seen[0].error
    xplane(tmp_path / "own")


def test_writing_that_fails_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = jax.profiler.stop_trace

    def full() -> None:
        stop()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    trainer, seen = traced(tmp_path, subs.Profiler(((2, 3),)))
    assert trainer.fit(batches(6), epochs=1).step == 6
    assert [event.kind for event in seen] == ["subscriber_failed"]
    assert "No space left" in seen[0].error


def test_a_command_without_a_profiler_is_rejected_by_name(tmp_path: Path) -> None:
    trainer, seen = traced(tmp_path)

    @trainer.on(et.StepCompleted, once=True)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.profile(3)

    trainer.fit(batches(30), epochs=1)
    (rejected,) = seen
    assert "no Profiler is subscribed" in rejected.reason or "the run ended" in rejected.reason


def test_a_resumed_run_traces_what_is_ahead_and_says_what_it_missed(tmp_path: Path) -> None:
    def again() -> tuple[et.Trainer, list[Any]]:
        profiler = subs.Profiler(((2, 3), (5, 12), (15, 16)))
        checkpointer = subs.Checkpointer("checkpoints", every=8)
        return traced(tmp_path, profiler, checkpointer)

    first, seen = again()
    first.fit(batches(8), epochs=1)
    assert [(event.first_step, event.last_step) for event in seen] == [(2, 3), (5, 8)]
    second, seen = again()
    second.fit(batches(8), epochs=3, resume=True)
    failed, captured = seen
    assert "step 5 is over" in failed.error
    assert (captured.first_step, captured.last_step) == (15, 16)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        (((0, 3),), "an integer >= 1, got 0"),
        (((5, 4),), "an integer >= 5, got 4"),
        (((1, 5), (5, 9)), "begins before step 5 is over"),
        (((1.5, 3),), "an integer >= 1, got 1.5"),
        ((20, 22), "must be pairs"),
        (((20, 21, 22),), "must be pairs"),
    ],
)
def test_ranges_that_cannot_work_are_refused_by_name(steps: Any, match: str) -> None:
    with pytest.raises(et.ConfigurationError, match=match):
        subs.Profiler(steps)


def test_a_directory_outside_of_the_run_is_refused() -> None:
    with pytest.raises(et.ConfigurationError, match="run_dir"):
        subs.Profiler(directory="../elsewhere")


def test_steps_has_to_be_a_number_of_at_least_one(tmp_path: Path) -> None:
    trainer, _ = traced(tmp_path)
    with pytest.raises(et.ConfigurationError, match="Profile"):
        trainer.control.profile(0)
