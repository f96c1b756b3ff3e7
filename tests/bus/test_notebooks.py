"""A notebook cell that is run again subscribes its functions in place of those that it subscribed before."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

import eventtrain as et


class Notebook:
    """A stand-in for IPython: runs the text of cells in one namespace, as ``__main__``."""

    def __init__(self, patch: pytest.MonkeyPatch, **names: Any) -> None:
        self.execution_count = 1
        self.names = {"__name__": "__main__", "et": et, **names}
        patch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: self))

    def run(self, cell: str) -> None:
        exec(compile(cell, f"<cell {self.execution_count}>", "exec"), self.names)
        self.execution_count += 1


DECORATED = """
@on(et.StepCompleted)
@on(et.EpochCompleted)
def report(event): seen.append((event.kind, VERSION))
"""
GIVEN = """
bus.subscribe(et.StepCompleted, report)
bus.subscribe(et.StepCompleted, report, every=2)
bus.subscribe(et.EpochCompleted, report)
"""


def subscribed(bus: et.EventBus) -> list[str]:
    return [repr(subscription) for subscription in bus.subscriptions]


async def test_a_cell_that_is_run_again_replaces_its_handlers_and_names_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with et.EventBus() as bus:
        seen: list[tuple[str, int]] = []
        notebook = Notebook(monkeypatch, bus=bus, on=bus.on, seen=seen)
        for version in (1, 2, 3):  # the cell is changed and run again
            notebook.run(DECORATED.replace("VERSION", str(version)))
        assert subscribed(bus) == [
            "<Subscription 'report' to EpochCompleted, active>",
            "<Subscription 'report-2' to StepCompleted, active>",
        ]
        bus.publish(et.EpochCompleted(epoch=0, metrics={}, steps=1, duration_s=1.0))
        bus.publish(et.StepCompleted(epoch=0, batch=0, metrics={}))
        await bus.drain()
        assert sorted(seen) == [("epoch_completed", 3), ("step_completed", 3)]
        assert "The handler report-2 of cell 3 replaces the one of cell 2" in caplog.text


async def test_a_function_of_an_earlier_cell_that_is_given_again_is_subscribed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = et.EventBus()
    notebook = Notebook(monkeypatch, bus=bus)
    notebook.run("def report(event): pass")
    notebook.run(GIVEN)
    once = subscribed(bus)
    assert len(once) == 3
    notebook.run(GIVEN)
    assert subscribed(bus) == once
    notebook.run("bus.subscribe(et.EvalCompleted, report)")  # other events
    assert len(subscribed(bus)) == 4


@pytest.mark.parametrize(
    "cell",
    [
        "for _ in range(2):\n    @on(et.StepCompleted)\n    def report(event): pass",
        "@on(et.StepCompleted)\ndef report(e): pass\n@on(et.StepCompleted)\ndef report(e): pass",
    ],
)
async def test_within_one_cell_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    bus = et.EventBus()
    Notebook(monkeypatch, on=bus.on).run(cell)
    assert len(bus.subscriptions) == 2


@pytest.mark.parametrize(
    "cell",
    [
        "on(et.StepCompleted)(lambda event: None)",
        "@on(et.StepCompleted)\ndef _(event): pass",
        "def make():\n    def report(event): pass\n    return report\non(et.StepCompleted)(make())",
        "class A:\n    def report(self, event): pass\non(et.StepCompleted)(A().report)",
    ],
)
async def test_what_has_no_name_of_its_own_is_kept(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    bus = et.EventBus()
    notebook = Notebook(monkeypatch, on=bus.on)
    notebook.run(cell)
    notebook.run(cell)
    assert len(bus.subscriptions) == 2


async def test_outside_of_a_notebook_functions_of_one_name_are_kept() -> None:
    bus = et.EventBus()
    for _ in range(2):
        exec(DECORATED, {"__name__": "__main__", "et": et, "on": bus.on})
    assert len(bus.subscriptions) == 4


async def test_functions_of_two_trainers_on_one_bus_do_not_replace_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bus = et.EventBus()
    first, second = (
        et.Trainer(lambda state, batch: (state, {}), {"w": jnp.zeros(2)}, bus=bus, run_dir=tmp_path / name)
        for name in "ab"
    )
    notebook = Notebook(monkeypatch, first=first, second=second, bus=bus)
    for _ in range(2):
        for on in ("first.on", "second.on", "bus.on"):
            notebook.run(DECORATED.replace("@on", f"@{on}"))
    assert len(bus.subscriptions) == 6
