"""Runs of two processes with a device each, beside one process with both devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eventtrain.cli.processes import reserved_port
from tests.support.several_processes import run_processes

PROGRAM = Path(__file__).parents[1] / "support" / "each_process.py"

pytestmark = pytest.mark.slow  # two processes that compile everything

Told = list[dict[str, Any]]
"""For each process: what it told -> the value."""


def _run(processes: int, folder: Path) -> Told:
    with reserved_port() as port:
        pass
    ended = run_processes(processes, PROGRAM, str(folder), str(port), devices=2 // processes)
    lines = [[json.loads(line) for line in one.stdout.splitlines() if line[:1] == "{"] for one in ended]
    return [{line["what"]: line["value"] for line in told} for told in lines]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return _run(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(1, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize(
    "what",
    [
        *("evaluate", "evaluate global arrays", "evaluate_async", "evaluate after fit"),
        *("predict", "predict global arrays", "predict_async", "predict after fit"),
    ],
)
def test_each_process_gets_all_that_one_process_with_all_devices_gets(
    two: Told, one: dict[str, Any], what: str
) -> None:
    assert [told[what] for told in two] == [one[what]] * 2
    if what == "predict":
        shapes = {name: shape for name, (shape, _) in one[what].items()}
        assert shapes == {"sharded": [64], "replicated": [4], "weights": [32]}


@pytest.mark.parametrize(
    ("what", "subject"),
    [
        ("step", "session.step was given NumPy arrays (batch: float32[16, 8])"),
        ("step in a tree", "session.step was given NumPy arrays (batch['x'][0]: float32[16, 8])"),
        ("step of jax.numpy", "session.step was given arrays of one process (batch: float32[16, 8])"),
        ("prepare", "session.prepare was given NumPy arrays"),
        ("end_epoch", "The evaluation data yields NumPy arrays"),
        ("evaluate", "The evaluation data yields NumPy arrays"),
        ("predict", "The data to predict on yields NumPy arrays"),
    ],
)
def test_a_batch_of_one_process_is_refused_by_name(two: Told, what: str, subject: str) -> None:
    errors = [told[f"refused {what}"] for told in two]
    assert any(
        error.startswith("DataError") for error in errors
    )  # the other may hear of it before its own batch
    for error in errors:
        assert error.removeprefix("PeerLost: Process 0 of the run is lost: ").startswith(
            f"DataError: {subject}"
        )


def test_reading_a_snapshot_in_a_handler_computes_nothing_in_several_processes(two: Told) -> None:
    for told in two:
        assert told["whole"] == [12, ["read (8,)"]]
        steps, (error,) = told["sharded"]
        assert steps == 12
        assert error.startswith("SnapshotError: ['opt_state']")
        assert "['w'] (float32[8]) of the snapshot of step " in error
        assert "is sharded over several processes" in error


def test_a_computation_of_all_processes_in_a_handler_is_its_failure_and_training_continues(two: Told) -> None:
    for told in two:
        steps, failed, errors = told["guarded"]
        assert (steps, failed) == (8, True)
        assert "thread guard" in errors[0]


def test_what_a_process_publishes_by_itself_reaches_process_0_with_its_number_and_nothing_comes_back(
    two: Told,
) -> None:
    seen_by_0, seen_by_1 = (told["seen"] for told in two)
    assert [number for kind, process, number, _ in seen_by_0 if (kind, process) == ("noticed", 1)] == [
        10,
        11,
        12,
        13,
    ]
    assert [number for kind, process, number, _ in seen_by_0 if (kind, process) == ("noticed", None)] == [
        0,
        1,
        2,
        3,
    ]
    kinds = {kind for kind, process, _, _ in seen_by_0 if process == 1}
    assert kinds == {"noticed", "subscriber_failed", "profile_captured", "machine_measured"}
    assert {process for _, process, _, _ in seen_by_1} == {None}


def test_events_beyond_the_limit_are_dropped_and_counted_on_the_way_to_process_0(two: Told) -> None:
    in_order, arrived, dropped = two[0]["flood"]
    assert in_order
    assert arrived >= 1000
    assert dropped > 0
    assert arrived + dropped == 3000
    assert two[1]["flood"] == [True, 0, 0]  # functions run in process 0 alone


def test_each_process_has_its_own_trace_and_port(two: Told) -> None:
    traces = [
        [path for kind, process, _, path in told["seen"] if (kind, process) == ("profile_captured", None)]
        for told in two
    ]
    assert traces == [[f"/watched/profile/steps-2-3/process-{index}"] for index in range(2)]
    assert two[1]["port"] == two[0]["port"] + 1


def test_no_computation_of_several_processes_is_run_beside_a_thousand_steps(two: Told) -> None:
    for told in two:
        steps, computations, names = told["counted"]
        assert steps == 1020
        assert names == ["jit(call)"]  # the step
        assert 950 <= computations <= 1000
        assert told["control"] == 1
