"""What a trainer and its control look like at a prompt and in a notebook."""

from __future__ import annotations

import xml.dom.minidom
from pathlib import Path

import numpy as np

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, make_trainer

HOSTILE = "<img src=x onerror=alert(1)>"


def test_a_trainer_shows_where_it_is_and_what_its_subscribers_did(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.History()])
    assert repr(trainer) == f"<Trainer {trainer.run_id!r} at step 0, epoch 0, 1 subscribers>"

    @trainer.on(et.EpochCompleted, name=HOSTILE)
    async def observe(event: et.EpochCompleted) -> None: ...

    trainer.fit(batches(3), epochs=2, progress=False)
    shown = trainer._repr_html_()
    xml.dom.minidom.parseString(shown)
    assert "at step 6, epoch 2" in shown
    assert "History" in shown
    assert "learning_rate" in shown
    assert " arrays: " in shown
    assert "<img" not in shown
    assert "&lt;img" in shown
    trainer.close()
    assert ", closed" in repr(trainer)


async def test_in_a_run_both_can_be_looked_at_from_a_handler(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    seen: list[str] = []

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 2)
    async def look(event: et.StepCompleted, control: et.Control) -> None:
        seen.extend([repr(trainer), trainer._repr_html_(), repr(control), control._repr_html_()])

    await trainer.fit_async(batches(4), epochs=1)
    plain, whole, control, table = seen
    assert "at step 2, epoch 0, fit_async, 0 subscribers" in plain
    assert "in use by the run" in whole
    assert control.startswith("<Control at step 2: learning_rate=")
    assert "learning_rate" in table


def test_a_control_without_a_run_has_no_hyperparameters() -> None:
    trainer = et.Trainer(lambda state, batch: (state, {}), {"w": np.zeros(2)})
    assert repr(trainer.control) == "<Control at step 0>"
    assert "Control" in trainer.control._repr_html_()
