"""Signals and failures in a run of two processes: how each of them ends, and what a run that resumes makes of it.

A slice of the campaigns ``hosts`` and ``hosts_determinism`` (``make faults``), with fixed faults.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from benchmarks.campaigns import hosts, hosts_determinism
from benchmarks.killing.hosts import End, Job, compare, require_no_crash, server, undisturbed
from benchmarks.killing.hosts_job import LOG, OWN_LOG
from benchmarks.killing.jobs import rows
from eventtrain.loop.agreement.peers import BEAT_S, LOST_AFTER_S
from eventtrain.trainer.processes import END_AFTER_S, EXIT_AFTER_S, EXIT_CODE
from eventtrain.trainer.shared_paths import MARK

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.allow_blocking]

SLACK_S = 15.0
"""For a busy machine."""


def ended(job: Job, timeout_s: float = hosts.WHOLE_S) -> list[End]:
    ends = job.wait(timeout_s)
    require_no_crash(job)
    return ends


def statuses(ends: list[End]) -> list[int]:
    return [end.status for end in ends]


def kinds(folder: Path, index: int) -> list[str]:
    return [row["kind"] for row in rows(folder / OWN_LOG.format(index))]


@pytest.mark.parametrize(
    ("phase", "number", "to", "options"),
    [
        ("first", signal.SIGTERM, (1,), {"hold": "first"}),
        ("first", signal.SIGTERM, (0,), {"faults": {1: "late"}, "hold": "compile"}),
        ("compile", signal.SIGTERM, (0,), {}),
        ("epoch", signal.SIGTERM, (0,), {"faults": {1: "slow"}}),
        ("eval", signal.SIGTERM, (1,), {}),
        ("save", signal.SIGTERM, (0, 1), {}),
        ("epoch", signal.SIGINT, (1,), {}),
    ],
    ids=[
        "first-batch",
        "before-the-batch-of-the-other",
        "compile",
        "slow-data",
        "evaluation",
        "save",
        "ctrl-c",
    ],
)
def test_a_signal_to_one_process_ends_each_of_them_by_it(
    tmp_path: Path, phase: str, number: signal.Signals, to: tuple[int, ...], options: dict[str, Any]
) -> None:
    job = server().start(tmp_path, **options)
    job.reach(phase)
    job.send(number, *to)
    wanted = 143 if number == signal.SIGTERM else -signal.SIGINT
    ends = ended(job, hosts.GRACE_S)
    assert statuses(ends) == [wanted, wanted], job.output()
    assert max(end.took_s for end in ends) < 10, "it waited for drain_timeout_s"
    reason = "preempted" if number == signal.SIGTERM else "interrupted"
    last = [rows(tmp_path / OWN_LOG.format(index))[-1] for index in range(2)]
    assert [(row["kind"], row["reason"]) for row in last] == [("run_completed", reason)] * 2
    assert last[0]["step"] == last[1]["step"]
    output = job.output()
    assert output.count("does not reach JAX's preemption service") == 2  # once in each process
    named = f"another process of it received {number.name}"
    assert output.count(named) == 2 - len(to)
    if phase == "eval":
        compare(tmp_path)


def test_a_signal_while_process_0_waits_for_another_process_to_begin_ends_both_by_it(tmp_path: Path) -> None:
    job = server().start(tmp_path, faults={1: "late_run"})
    job.until(lambda: any((tmp_path / "checkpoints").glob(f"{MARK}*")), "waited for process 1")
    job.send(signal.SIGTERM, 0)
    assert statuses(ended(job, hosts.GRACE_S)) == [143, 143], job.output()
    assert not list((tmp_path / "checkpoints").iterdir())  # not one step was trained


@pytest.mark.parametrize(("fault", "codes"), [("late_run", [143, 143]), ("missing_run", [1, 143])])
def test_a_signal_while_another_process_waits_for_process_0_to_begin_ends_it_in_bounded_time(
    tmp_path: Path, fault: str, codes: list[int]
) -> None:
    job = server().start(tmp_path, faults={0: fault})
    job.until(lambda: "preemption service" in job.output(), "waited for process 0")
    job.send(signal.SIGTERM, 1)
    ends = ended(job, hosts.GRACE_S)
    assert statuses(ends) == codes, job.output()
    assert not list((tmp_path / "checkpoints").glob("*"))
    if fault == "missing_run":
        assert "Process 0 has not begun the run 5 s after a stop of this one" in job.output()


@pytest.mark.parametrize(("fault", "failing"), [("data", 1), ("subscriber", 0)])
def test_a_failure_in_one_process_is_the_failure_of_all_with_its_reason(
    tmp_path: Path, fault: str, failing: int
) -> None:
    undisturbed()
    job = server().start(tmp_path, faults={failing: fault})
    ends = job.wait(END_AFTER_S + hosts.END_S)
    assert ends[failing].status == 1, job.output()
    assert ends[1 - failing].status in (1, EXIT_CODE), job.output()
    other = rows(tmp_path / OWN_LOG.format(1 - failing))
    assert [row["kind"] for row in other].count("run_failed") == 1
    failed = [row["error"] for row in other if row["kind"] in ("peer_lost", "run_failed")]
    reason = "the disk with the data" if fault == "data" else "the subscriber of this process"
    assert len(failed) == 2
    assert all(f"Process {failing} of the run is lost" in error and reason in error for error in failed)
    assert kinds(tmp_path, failing).count("run_failed") == 1
    compare(tmp_path)


def test_the_survivor_of_a_killed_process_ends_in_time_with_its_last_events_on_disk(tmp_path: Path) -> None:
    undisturbed()
    job = server().start(tmp_path)
    job.reach("epoch")
    job.send(signal.SIGKILL, 1)
    survivor, killed = ended(job)
    assert killed.status == -signal.SIGKILL
    assert survivor.status in (1, EXIT_CODE), job.output()
    assert survivor.took_s < LOST_AFTER_S + 2 * BEAT_S + max(EXIT_AFTER_S, END_AFTER_S) + SLACK_S
    assert "PeerLost: Process 1 of the run is lost: it has given no sign of life" in job.output()
    assert {"peer_lost", "run_failed"} <= set(kinds(tmp_path, 0)[-4:])
    assert rows(tmp_path / LOG)[-1]["kind"] == "run_failed"
    compare(tmp_path)


def test_without_process_0_the_others_end_at_once_and_the_run_resumes(tmp_path: Path) -> None:
    undisturbed()
    job = server().start(tmp_path)
    job.reach("epoch")
    job.send(signal.SIGKILL, 0)
    _, survivor = job.wait(hosts.END_S)
    assert survivor.status in (1, EXIT_CODE, hosts.ABORTED), job.output()
    assert survivor.took_s < SLACK_S
    compare(tmp_path)


def test_a_process_that_is_stopped_for_some_seconds_changes_nothing(tmp_path: Path) -> None:
    expected = undisturbed()
    job = server().start(tmp_path)
    job.reach("epoch")
    job.send(signal.SIGSTOP, 1)
    time.sleep(3)
    job.send(signal.SIGCONT, 1)
    assert statuses(ended(job)) == [0, 0], job.output()
    assert hosts_determinism.states_of(tmp_path) == [expected.result] * 2
    assert rows(tmp_path / LOG) == expected.rows


@pytest.mark.parametrize("fault", ["disk", "full_disk"])
def test_a_full_disk_on_one_host_fails_that_checkpoint_on_all_by_name(tmp_path: Path, fault: str) -> None:
    expected = undisturbed()
    job = server().start(tmp_path, faults={1: fault})
    assert statuses(ended(job)) == [0, 0], job.output()
    for index in range(2):
        failed = [row for row in rows(tmp_path / OWN_LOG.format(index)) if row["kind"] == "checkpoint_failed"]
        assert [row["step"] for row in failed] == [5]
        assert " by process 1: " in failed[0]["error"]
        assert any(reason in failed[0]["error"] for reason in hosts.FULL), failed
    folders = sorted((tmp_path / "checkpoints").iterdir())  # hidden ones, too
    assert [folder.name for folder in folders] == [
        f"step-{step:08d}" for step in (10, 15, 20, 25, 30, 35, 36)
    ]
    for folder in folders:
        et.load_state(folder)
    assert hosts_determinism.states_of(tmp_path) == [expected.result] * 2


def test_a_command_before_another_process_has_its_first_batch_is_applied_there_too(tmp_path: Path) -> None:
    job = server().start(tmp_path, faults={1: "late"}, early=True)
    assert statuses(ended(job)) == [0, 0], job.output()
    first, second = hosts_determinism.states_of(tmp_path)
    assert first == second
    assert (first["step"], first["reason"]) == (36, "completed")


def test_a_directory_that_is_not_shared_is_refused_in_every_process_before_the_run_begins(
    tmp_path: Path,
) -> None:
    job = server().start(tmp_path, faults={1: "unshared"})
    assert statuses(ended(job)) == [1, 1], job.output()
    for index in range(2):
        error = (tmp_path / f"output-{index}").read_text().splitlines()[-1]
        assert error.startswith("eventtrain.errors.ConfigurationError: Checkpointer writes to "), error
        assert "give all of them the same directory" in error
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / LOG).exists()


def test_what_was_committed_when_processes_were_killed_in_a_save_can_be_read_and_resumed() -> None:
    undisturbed()
    counts = hosts.inject(hosts.kill_in_save, 2_000_003)
    assert counts["killed_in_save"] == 1


def test_commands_of_both_processes_with_random_delays_leave_both_with_one_state_and_log() -> None:
    assert hosts_determinism.trial(2_000_000)["commands"] > 10


def test_the_positive_control_without_an_agreement_the_states_differ() -> None:
    assert hosts_determinism.differs_alone()
