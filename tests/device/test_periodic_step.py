"""Extensions that are due at some steps only: the steps between run a program that has nothing of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.jax_compilations import COMPILATIONS
from tests.support.models import record

DATA = [np.float32(step) for step in range(1, 8)]


class EveryThird(et.StepExtension):
    """Counts the steps that compute it, and leaves it to ``is_due`` which those are."""

    name = "third"
    metric: Any = staticmethod(et.Last)

    def init(self, params: Any) -> Any:
        return jnp.int32(0)

    def is_due(self, step: int) -> bool:
        return step % 3 == 0

    def after_step(self, ext_state: Any, change: et.StepChange) -> Any:
        moved = change.params["w"] - change.old_params["w"]
        return ext_state + 1, {"moved": self.metric(moved), "old_weight": et.Last(change.old_params["w"])}


def add(state: Any, batch: Any) -> tuple[Any, Any]:
    return {"params": {"w": state["params"]["w"] + batch}}, {"loss": batch}


def make(tmp_path: Path, extension: et.StepExtension | None = None, **options: Any) -> et.Trainer[Any]:
    extensions = [extension or EveryThird(), et.EMA(0.5)]
    state = {"params": {"w": jnp.float32(0)}}
    return et.Trainer(add, state, step_extensions=extensions, run_dir=tmp_path, **options)


@pytest.mark.parametrize("snapshots", [False, True])
def test_an_extension_is_computed_at_the_steps_that_are_due_and_at_no_other(
    tmp_path: Path, snapshots: bool
) -> None:
    every_step = [subs.Checkpointer("ck", every=1)] if snapshots else []
    trainer = make(tmp_path, subscribers=every_step)
    steps = record(trainer, et.StepCompleted)
    with trainer.session() as session:
        for batch in DATA:
            session.step(batch)
    extensions = trainer.extension_states()
    moved = {event.step: (event.metrics.get("moved"), event.metrics.get("old_weight")) for event in steps}
    assert moved == dict.fromkeys(range(1, 8), (None, None)) | {3: (3.0, 3.0), 6: (6.0, 15.0)}
    assert extensions["third"] == 2
    assert 15.0 < jax.tree.leaves(extensions["ema"])[-1].real < 28.0  # followed the weights of every step


def test_a_resumed_run_computes_an_extension_at_the_same_steps(tmp_path: Path) -> None:
    make(tmp_path, subscribers=[subs.Checkpointer("ck", every=4)]).fit(DATA, steps=4)
    again = make(tmp_path, subscribers=[subs.Checkpointer("ck")])
    steps = record(again, et.StepCompleted)
    again.fit(DATA, steps=7, resume=True)
    assert [event.metrics.get("old_weight") for event in steps] == [None, 15.0, None]


def test_the_program_of_the_steps_between_has_nothing_of_the_extension(tmp_path: Path) -> None:
    class Sines(EveryThird):
        def after_step(self, ext_state: Any, change: et.StepChange) -> Any:
            return ext_state, {"sine": et.Last(jnp.sin(change.old_params["w"]))}

    programs: dict[int, str] = {}
    trainer = make(tmp_path, Sines())
    with trainer.session() as session:
        for step, batch in enumerate(DATA, 1):
            session.step(batch)
            program = session.program()
            assert program is not None
            programs[step] = program.jaxpr
    assert [step for step, jaxpr in programs.items() if " sin " in jaxpr] == [3, 6]


def test_both_programs_are_compiled_before_the_first_step(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with trainer.session() as session:
        session.step(DATA[0])
        COMPILATIONS.start()
        for batch in DATA[1:]:
            session.step(batch)
        assert COMPILATIONS.since() == 0


def test_a_metric_that_cannot_be_absent_is_refused(tmp_path: Path) -> None:
    extension = EveryThird()
    extension.metric = lambda value: value
    with pytest.raises(
        et.MetricsError, match=r"after_step returned the metric 'moved', which the steps at which"
    ):
        make(tmp_path, extension).fit(DATA, epochs=1)


def test_an_is_due_that_raises_is_named(tmp_path: Path) -> None:
    extension = EveryThird()
    extension.is_due = lambda step: step < 1 / 0
    with pytest.raises(et.errors.StepError, match=r"is_due raised ZeroDivisionError"):
        make(tmp_path, extension).fit(DATA, epochs=1)


def test_weights_are_averaged_at_their_steps_only(tmp_path: Path) -> None:
    trainer = make(tmp_path, et.SWA(2, every=3))
    with trainer.session() as session:
        for batch in DATA:
            session.step(batch)
    swa = trainer.extension_states()["swa"]
    weights = np.cumsum(DATA)
    assert int(swa["count"]) == 2
    assert float(swa["average"]["w"]) == pytest.approx((weights[1] + weights[4]) / 2)
