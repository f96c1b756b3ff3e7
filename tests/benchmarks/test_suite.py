"""The benchmark suite: its runner with parts that are made up, its pairs, tables and comparison, and one real part."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, replace
from math import log
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import charts, machine, suite, tables
from benchmarks.__main__ import main
from benchmarks.figures import Figure, absent, figure, in_pairs
from benchmarks.parts.loop import counters
from benchmarks.workloads import NETWORKS, Workload, calibrated

PARTS = {
    "works": "return [figure('eight subscribers', [2.0, 4.0, 3.0], [1.0, 1.0, 1.0], at='1 ms')]",
    "misses": "return [absent('CLU', 'not installed: No module named clu')]",
    "fails": "raise ValueError('of 100 events 99 arrived')",
    "crashes": "os._exit(3)",
    "hangs": "time.sleep(60)",
    "tells": "return [Figure(f'{quick}', unit='s', value=budget_s)]",
}


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of parts that are made up; returns its name."""
    folder = tmp_path / "stub_parts"
    folder.mkdir()
    for name, body in PARTS.items():
        (folder / f"{name}.py").write_text(
            "import os, time\n"
            "from benchmarks.figures import Figure, absent, figure\n"
            f"def figures(device, budget_s, quick):\n    {body}\n"
        )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return folder.name


def test_a_part_that_fails_or_crashes_is_reported_and_the_others_continue(
    stubs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    chosen: dict[str, tuple[float, float]] = {"fails": (10, 10), "crashes": (10, 10), "works": (10, 10)}
    assert main(["--out", str(out)], chosen, stubs) == 1
    document = json.loads(out.read_text())
    assert document["errors"] == {
        "fails": "exit code 1: ValueError: of 100 events 99 arrived",
        "crashes": "exit code 3: no error output",
    }
    assert [(one["part"], one["case"], one["ratio"]) for one in document["figures"]] == [
        ("works", "eight subscribers", 3.0)
    ]
    assert document["slug"] == machine.device().slug
    assert document["machine"] == machine.describe()
    assert "of 100 events 99 arrived" in capsys.readouterr().out


def test_an_absent_library_is_named_with_its_reason_and_is_not_a_failure(
    stubs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "a.json")], {"misses": (10.0, 10.0)}, stubs) == 0
    assert "Absent: CLU: not installed: No module named clu." in capsys.readouterr().out


def test_a_part_that_hangs_is_ended_and_the_rest_is_not_begun(stubs: str) -> None:
    notes: list[str] = []
    document = suite.run({"hangs": 5.0, "works": 5.0}, 3.0, package=stubs, note=notes.append)
    assert document["errors"] == {
        "hangs": "ended after 3 s, without figures",
        "works": "not begun: the parts before it took 3 s",
    }
    assert notes == [f"{name}: {error}" for name, error in document["errors"].items()]


def test_a_part_is_given_its_seconds_or_its_share_of_what_is_left(stubs: str) -> None:
    ample = suite.run({"tells": 20.0}, 1000.0, quick=True, package=stubs, note=lambda line: None)
    scarce = suite.run({"tells": 200.0}, 100.0, package=stubs, note=lambda line: None)
    (told,), (told_less,) = ample["figures"], scarce["figures"]
    assert told["case"] == "True"
    assert told["value"] < 20.0  # starting JAX is part of it
    assert told_less["value"] < 95.0
    assert ample["seconds"].keys() == {"tells"}


def test_an_unknown_part_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lop"])
    assert "Unknown part: lop. Known parts: loop, " in capsys.readouterr().err


def module_of(part: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NPROC", "1")  # checkpoints sets it when it is imported, and would leave it set
    return importlib.import_module(f"benchmarks.parts.{part}")


@pytest.mark.parametrize("part", suite.PARTS)
def test_every_part_has_figures_and_both_budgets(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(module_of(part, monkeypatch).figures)
    quick_s, whole_s = suite.PARTS[part]
    assert 0 < quick_s < whole_s


def test_the_budgets_of_all_parts_are_within_the_limits() -> None:
    for seconds, limit_s, promised_s in zip(
        zip(*suite.PARTS.values(), strict=True), suite.LIMIT_S, (180, 1200), strict=True
    ):
        assert sum(seconds) < limit_s < promised_s


def test_pairs_take_turns_and_the_first_one_does_not_count() -> None:
    calls: list[str] = []

    def note(name: str) -> int:
        calls.append(name)
        return len(calls)

    ours, other = in_pairs(lambda: note("ours"), lambda: note("other"), 0.0)
    assert calls == ["other", "ours", "ours", "other", "other", "ours", "ours", "other"]
    assert (ours, other) == ([3, 6, 7], [4, 5, 8])


def test_a_ratio_is_the_median_over_the_pairs() -> None:
    found = figure("a case", [2.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert (found.value, found.ratio, found.ratio_quartiles, found.pairs) == (4.0, 3.0, (2.5, 3.5), 3)


@dataclass(frozen=True)
class Predicted(Workload):
    """A workload whose steps take 10 us and 1 ns per operation, without running any."""

    operations: int = 0

    def bare_loop(self, steps: int) -> float:
        return steps * (10e-6 + 1e-9 * self.operations)


def predicted(batch_size: int, width: int, hidden: int, *, name: str = "") -> Workload:
    if batch_size > 4096:
        raise AssertionError("a network far beyond the target was tried")
    return Predicted(
        name, lambda state, batch: (state, {}), None, [], operations=batch_size * width * width * hidden
    )


@pytest.mark.parametrize("target_s", [1e-5, 1e-4, 1e-3, 1e-2])
def test_the_network_grows_to_the_duration_and_not_beyond(target_s: float) -> None:
    every_s = [predicted(*sizes).bare_loop(1) for sizes in NETWORKS if sizes[0] <= 4096]
    nearest_s = min(every_s, key=lambda step_s: abs(log(step_s / target_s)))
    assert calibrated(target_s, predicted).step_s == pytest.approx(nearest_s)


def document(*figures: Figure, **rest: Any) -> dict[str, Any]:
    return {
        "slug": "cpu-test",
        "measured": "2026-01-01",
        "revision": "abc",
        "quick": False,
        "load": 0.5,
        "machine": machine.describe(),
        "errors": {},
        "figures": [asdict(replace(one, part=one.part or "loop")) for one in figures],
        **rest,
    }


LOOP = (
    Figure("bare loop", "1 ms", "us", 1012.3),
    figure("8 subscribers", [10.1, 10.2, 10.3], [10.0, 10.0, 10.0], at="1 ms"),
    figure("8 subscribers", [210.0, 220.0], [100.0, 100.0], at="50 us"),
    absent("8 subscribers", "the nearest takes 1 s", at="100 ms"),
)


def test_a_report_names_figures_machine_and_what_is_missing() -> None:
    text = tables.report(document(*LOOP, errors={"bus": "exit code 1: gone"}, quick=True))
    assert "| time / bare loop | 1 ms | 50 us |" in text
    assert "| bare loop | 1,012 us |  |" in text
    assert "| 8 subscribers | **1.02** (1.01 to 1.02) | **2.15** (2.12 to 2.17) |" in text
    assert "Absent: 8 subscribers (100 ms): the nearest takes 1 s." in text
    assert "Not measured: exit code 1: gone." in text
    assert "A quick run" in text
    assert f"on {machine.describe()['processor']}, {machine.describe()['cores']} cores, load 0.5" in text


def test_two_results_are_compared_by_ratio_the_largest_change_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = (
        figure("8 subscribers", [10.1, 10.2, 10.3], [10.0, 10.0, 10.0], at="1 ms"),
        figure("8 subscribers", [100.0, 100.0], [100.0, 100.0], at="50 us"),
        Figure("bare loop", "1 ms", "us", 2024.6),
        Figure("of the second only", unit="us", value=1.0),
    )
    for name, figures in (("a", LOOP), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document(*figures, revision=name)))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| part | case | at | cpu-test a | cpu-test b | second / first |"
    assert lines[2:] == [
        "| loop | 8 subscribers | 50 us | 2.15 | 1 | 0.465 * |",
        "| loop | bare loop | 1 ms | 1012 us | 2025 us | 2.000 |",
        "| loop | 8 subscribers | 1 ms | 1.02 | 1.02 | 1.000 |",
    ]


def test_charts_are_drawn_of_parts_with_ratios(tmp_path: Path) -> None:
    growing = [
        replace(figure("subscribers", [float(n)], [1.0], at=f"{n:,}"), part="growth") for n in (1, 10, 1000)
    ]
    ratios = [figure(f"case {n}", [1.0 + n], [1.0], at="1 ms") for n in range(3)]
    found = document(*ratios, *growing, Figure("alone", unit="ms", value=1.0, part="control"))
    written = charts.draw(found, tmp_path)
    assert [path.name for path in written] == ["cpu-test-loop.svg", "cpu-test-growth.svg"]
    texts = ["".join(ElementTree.parse(path).getroot().itertext()) for path in written]
    assert "case 2" in texts[0]
    assert "number of subscribers" in texts[1]


def test_figures_of_a_loop_that_lost_events_are_refused() -> None:
    with pytest.raises(AssertionError, match="not valid"):
        counters(2).check(Path(), 100)


def test_a_state_without_room_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = module_of("checkpoints", monkeypatch)
    small = machine.Device("small", True, 10 * 10**9)
    assert checkpoints.too_large(small, 8000).startswith("needs 32 GB memory of the device, 10 GB are free")
    assert checkpoints.too_large(small, 1) == ""


@pytest.mark.slow
def test_a_real_part_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert main(["control", "--quick", "--out", str(out)], {"control": (4.0, 4.0)}) == 0
    found = json.loads(out.read_text())
    assert found["quick"] is True
    assert {one["unit"] for one in found["figures"]} == {"steps", "ms"}
    assert all(one["value"] > 0 and one["pairs"] > 0 for one in found["figures"])
    assert "| event to effect, from a handler |" in out.with_suffix(".md").read_text()
