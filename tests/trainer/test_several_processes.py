"""Runs of several processes: the same decisions everywhere, and those of one process with as many devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.conftest import python_path
from tests.support import on_several_processes
from tests.support.several_processes import run_processes

pytestmark = pytest.mark.slow

PROGRAM = Path(on_several_processes.__file__)
EXACT = (
    "epoch_policies", "step_policies", "averaged_weights", "every_step_announced", "stopped_by_a_decider",
    "best_checkpoints", "two_runs_of_one_trainer", "metrics_with_state", "metrics_with_state_in_groups",
    "samples", "samples_in_groups", "data_parallel",
)  # fmt: skip
GROUPS = ("decisions_between_groups", "every_step_announced_in_groups", "best_checkpoints_in_groups")
"""Scenarios in which nothing depends on the clock; ``GROUPS`` with several steps per call."""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened in one process with two devices, by scenario."""
    folder = tmp_path_factory.mktemp("one")
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, str(PROGRAM), str(folder), *EXACT, *GROUPS]
    subprocess.run(command, env=environment, check=True, timeout=300)
    return {name: json.loads((folder / f"{name}-0.json").read_text()) for name in (*EXACT, *GROUPS)}


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``two_processes``."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two_processes(folder_of_two: Path) -> dict[str, list[Any]]:
    """What happened in each of two processes with a device each, by scenario."""
    folder = folder_of_two
    run_processes(2, PROGRAM, str(folder), timeout_s=400)
    names = on_several_processes.SCENARIOS
    return {name: [json.loads((folder / f"{name}-{i}.json").read_text()) for i in range(2)] for name in names}


@pytest.fixture(scope="module")
def resumable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run of two processes that was stopped, and what happened in one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    run_processes(2, PROGRAM, str(folder), "not_interrupted", "stopped_early")
    return folder, json.loads((folder / "not_interrupted-0.json").read_text())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_of_two_processes_resumes_on_one_two_and_four(
    resumable: tuple[Path, dict[str, Any]], tmp_path: Path, count: int
) -> None:
    stopped, whole = resumable
    folder = shutil.copytree(stopped, tmp_path / "copy")
    run_processes(count, PROGRAM, str(folder), "resumed", devices=2 if count == 1 else 1)
    found = json.loads((folder / "resumed-0.json").read_text())
    assert found["step"] == whole["step"] == 40
    assert found["logged"] == whole["logged"] == [*range(1, 41)]
    if count < 4:  # more devices add the parts of a sum in another order
        assert found["state"] == whole["state"]
        assert found["epochs"] == whole["epochs"]
    assert [arrays["confusion"] for _, arrays in found["epochs"]] == [
        arrays["confusion"] for _, arrays in whole["epochs"]
    ]


@pytest.mark.parametrize("name", [*EXACT, *GROUPS])
def test_two_processes_are_one_process_with_two_devices_bit_for_bit(
    one_process: dict[str, Any], two_processes: dict[str, list[Any]], name: str
) -> None:
    alone = one_process[name]
    for process in two_processes[name]:
        assert process["rows"] == alone["rows"]
        assert process["state"] == alone["state"]
        assert process.get("folders") == alone.get("folders")
    assert len(alone["rows"]) > 20


@pytest.mark.parametrize("name", ["samples", "samples_in_groups"])
def test_process_0_publishes_the_samples_that_one_process_makes(
    one_process: dict[str, Any], two_processes: dict[str, list[Any]], name: str
) -> None:
    first, second = two_processes[name]
    assert first["samples"] == one_process[name]["samples"]
    assert second["samples"] == []
    steps = [(step, sample) for step, sample, _ in first["samples"]]
    weights = [(step, "weights") for step in (4, 8, 12, 16, 20, 24)]
    assert steps == sorted([*weights, *((step, "total") for step in (8, 13, 18, 23))])


@pytest.mark.parametrize("name", GROUPS)
def test_processes_run_several_steps_per_call_and_the_same_ones(
    two_processes: dict[str, list[Any]], name: str
) -> None:
    first, second = two_processes[name]
    assert first["calls"] == second["calls"]
    if name == "every_step_announced_in_groups":
        assert set(first["calls"]) == {1}
    else:
        assert 1.4 * len(first["calls"]) < sum(first["calls"])
        assert len(set(first["calls"])) > 2  # some were divided


def test_processes_agree_on_what_happens_at_any_time(two_processes: dict[str, list[Any]]) -> None:
    for name, (first, second) in two_processes.items():
        assert first["rows"] == second["rows"], name
        assert first["state"] == second["state"], name
        assert first["run_id"] == second["run_id"], name


@pytest.mark.parametrize("name", ["commands_at_any_time", "commands_at_any_time_in_groups"])
def test_commands_of_every_process_take_effect_at_one_step(
    two_processes: dict[str, list[Any]], name: str
) -> None:
    found = two_processes[name]
    changes = [row for row in found[0]["rows"] if row["kind"] == "hyperparam_changed"]
    for process in found:
        steps = [answer for answer in process["answers"] if isinstance(answer, list)]
        rejected = [answer for answer in process["answers"] if isinstance(answer, str)]
        assert (
            min(len(steps), len(rejected)) >= 3
        )  # those that are asked for last come after the end of the run
        assert all(asked <= applied for asked, applied in steps)
        assert any("No hyperparameter 'momentum'" in reason for reason in rejected)
        assert {applied for _, applied in steps} <= {row["step"] for row in changes}


@pytest.mark.parametrize(
    "name", ["everything_asked_by_the_last_process", "everything_asked_by_the_last_process_in_groups"]
)
def test_every_command_can_be_asked_for_by_another_process(
    two_processes: dict[str, list[Any]], name: str
) -> None:
    first, second = two_processes[name]
    assert first["answers"] == []
    assert second["answers"] == [
        "pause", "set_hyperparam", "resume", "evaluate", "take_snapshot", "save_checkpoint", "set_hyperparam",
        "restore", "stop",
    ]  # fmt: skip
    assert (first["stop_reason"], second["stop_reason"]) == ("asked", "asked")
    assert len(first["folders"]) == 1
    assert first["folders"] == second["folders"]


def test_a_process_releases_the_snapshot_that_it_means_and_behind_the_run_its_own(
    two_processes: dict[str, list[Any]],
) -> None:
    first, second = two_processes["snapshots_of_one_tag"]
    assert (first["stop_reason"], second["stop_reason"]) == ("asked", "asked")
    assert second["kept"]
    assert second["released_behind_the_run"]


def test_what_goes_by_the_clock_of_process_0_happens_everywhere(two_processes: dict[str, list[Any]]) -> None:
    first, second = two_processes["by_the_clock"]
    assert (first["stop_reason"], second["stop_reason"]) == ("enough", "enough")
    assert len(first["folders"]) >= 3
    evaluations = [row for row in first["rows"] if row["kind"] == "eval_completed"]
    assert len(evaluations) >= 2


def test_each_process_uploads_what_it_has_written_and_the_whole_comes_back(
    two_processes: dict[str, list[Any]], folder_of_two: Path, tmp_path: Path
) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'eventtrain[upload]'")
    first, second = two_processes["uploaded"]
    assert first["told"] == [f"checkpoint_uploaded {step}" for step in (12, 24, 36)]
    assert second["told"] == []
    assert len(second["sent"]) >= 3
    assert all("/arrays/ocdbt.process_1/" in path for path in second["sent"])
    assert not any("/arrays/ocdbt.process_1/" in path for path in first["sent"])
    back = subs.download_checkpoint(str(folder_of_two / "uploaded/store"), tmp_path)
    there = folder_of_two / "uploaded/checkpoints" / back.name
    came, went = et.load_state(back), et.load_state(there)
    assert len(came) > 5
    for path, value in went.items():
        np.testing.assert_array_equal(came[path], value)
