"""Campaigns: what is kept of them, and that they go on where they were."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults, machine
from benchmarks.campaign import Campaign


class Trials:
    """Counts its trials; those of ``broken`` fail."""

    def __init__(self, *broken: int) -> None:
        self.seeds: list[int] = []
        self.broken = set(broken)

    def __call__(self, seed: int) -> dict[str, int]:
        self.seeds.append(seed)
        if seed in self.broken:
            raise AssertionError(f"{seed} is broken")
        return {"even": int(seed % 2 == 0)}


def campaign(trial: Any, **options: Any) -> Campaign:
    return Campaign(name="sample", trial=trial, trials=10, slice=3, batch=4, **options)


def test_each_batch_is_a_line_that_says_what_was_tried_where(tmp_path: Path) -> None:
    path = tmp_path / "results" / "sample.jsonl"
    assert faults.run(campaign(Trials(), packages=("pytest",)), range(10), faults.Ledger(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["first_seed"], line["last_seed"]) for line in lines] == [(0, 3), (4, 7), (8, 9)]
    assert lines[0]["counts"] == {"trials": 4, "even": 2}
    assert {"processor", "jax", "python", "pytest"} <= lines[0]["machine"].keys()
    assert {"revision", "date", "duration_s", "failures"} <= lines[0].keys()


def test_seeds_that_are_done_are_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "sample.jsonl"
    faults.run(campaign(Trials()), range(5), faults.Ledger(path))
    trials = Trials()
    assert faults.run(campaign(trials), range(12), faults.Ledger(path))
    assert trials.seeds == list(range(5, 12))
    assert faults.Ledger(path).counts() == {"trials": 12, "even": 6}


def test_failures_are_kept_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sample.jsonl"
    assert not faults.run(campaign(Trials(2, 7)), range(10), faults.Ledger(path))
    assert "seed 7: AssertionError: 7 is broken" in capsys.readouterr().out
    assert not faults.run(campaign(Trials(7)), range(10), faults.Ledger(path))
    assert faults.Ledger(path).failures() == {7: "AssertionError: 7 is broken"}
    trials = Trials()
    assert faults.run(campaign(trials), range(10), faults.Ledger(path))
    assert trials.seeds == [7]


def test_trials_that_test_too_little_are_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert faults.run(campaign(Trials(), least={"even": 0.5}), range(10), faults.Ledger(None))
    assert not faults.run(campaign(Trials(), least={"even": 0.6}), range(10), faults.Ledger(None))
    assert faults.run(campaign(Trials(), least={"even": 0.6}), range(9), faults.Ledger(None))  # may be chance
    assert "even in 5 of 10 trials, less than 60%" in capsys.readouterr().out


def test_an_interruption_costs_no_more_than_its_batch(tmp_path: Path) -> None:
    def interrupted(seed: int) -> dict[str, int]:
        if seed == 6:
            raise KeyboardInterrupt
        return {}

    path = tmp_path / "sample.jsonl"
    with pytest.raises(KeyboardInterrupt):
        faults.run(campaign(interrupted), range(10), faults.Ledger(path))
    trials = Trials()
    faults.run(campaign(trials), range(10), faults.Ledger(path))
    assert trials.seeds == list(range(4, 10))


def test_the_command_runs_a_slice_of_other_seeds_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials()
    monkeypatch.setattr(faults, "RESULTS", tmp_path)
    monkeypatch.setattr(faults, "names", lambda: ["sample"])
    monkeypatch.setattr(faults, "load", lambda name: campaign(trials))
    assert faults.main(["sample", "--slice"]) == 0
    assert trials.seeds == [faults.SLICE_FROM + number for number in range(3)]
    assert list(tmp_path.iterdir()) == []
    assert faults.main([]) == 0
    assert trials.seeds[3:] == list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["sample.jsonl"]


def test_a_campaign_that_does_not_exist_is_refused_with_those_that_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        faults.main(["kerass"])
    assert "Unknown campaign: kerass. Known campaigns: " in capsys.readouterr().err


def test_every_result_that_is_kept_has_a_campaign_and_no_failure() -> None:
    for path in faults.RESULTS.glob("*.jsonl"):
        assert path.stem in faults.names()
        assert faults.Ledger(path).failures() == {}


def test_new_results_do_not_make_the_tested_commit_dirty_and_other_changes_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, results = tmp_path / "benchmarks/machine.py", tmp_path / "benchmarks/results/one.jsonl"
    monkeypatch.setattr(machine, "__file__", str(code))
    results.parent.mkdir(parents=True)
    assert machine.revision() == "no checkout"
    for path in (code, results):
        path.write_text("")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    results.write_text("changed")
    commit = machine.revision()
    assert not commit.endswith("-dirty")
    code.write_text("changed")
    assert machine.revision() == f"{commit}-dirty"
