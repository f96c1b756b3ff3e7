"""Runs for the tests of trackers: what they are told is known, and a run can be killed and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np

import eventtrain as et
from eventtrain.testing import ScriptedStep
from tests.conftest import python_path

ODD = [
    "a,b",
    'say "x"',
    "two\nlines",
    "tab\there",
    "größe/損失",
    "a/b/c",
    "a b",
    "a_b",
    "",
    " ",
    "\ud800 alone",
    "=1+1",
]
"""Names of metrics that some format or other could take amiss."""


def context(run_dir: Path, said: list[Any] | None = None, **options: Any) -> et.RunContext:
    control: Any = SimpleNamespace(snapshots={}, hyperparams={})
    return et.RunContext("run", run_dir, control, (said if said is not None else []).append, **options)


def curves_of(rows: Iterable[tuple[int, dict[str, Any]]]) -> dict[str, dict[int, Any]]:
    """Name -> step -> value; no step twice."""
    found: dict[str, dict[int, Any]] = {}
    for step, row in rows:
        for name, value in row.items():
            assert step not in found.setdefault(name, {}), (name, step)
            found[name][step] = value
    return found


def window(first: int, last: int, **columns: Any) -> et.StepsCompleted:
    steps = np.arange(first, last + 1)
    metrics = columns or {"loss": 1 / steps}
    return et.StepsCompleted(step=last, first_step=first, last_step=last, epoch=0, metrics=metrics)


def scripted_run(
    run_dir: Path, *subscribers: et.Subscriber, steps_per_epoch: int = 5, **options: Any
) -> et.Trainer:
    """Its loss at step k is 1 / k; the learning rate can be set."""
    script = ScriptedStep(
        {"loss": [1 / k for k in range(1, 101)]},
        eval_metrics={"loss": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]},
        steps_per_epoch=steps_per_epoch,
        learning_rate=0.5,
    )
    return et.Trainer(
        script.step_fn,
        script.state,
        eval_fn=script.eval_fn,
        subscribers=subscribers,
        run_dir=run_dir,
        **options,
    )


def data(steps: int = 5) -> list[Any]:
    return [np.zeros((), np.float32)] * steps


def failures(trainer: et.Trainer) -> list[et.SubscriberFailed]:
    seen: list[et.SubscriberFailed] = []

    @trainer.on(et.SubscriberFailed)
    async def note(event: et.SubscriberFailed) -> None:
        seen.append(event)

    return seen


class Lowering(et.Subscriber):
    """Sets the learning rate at the end of each epoch."""

    lag = 0

    async def on_epoch_completed(self, event: et.EpochCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.5 / (event.epoch + 2))


def wait_for_snapshots(trainer: et.Trainer) -> None:
    """Has the epochs but the first wait until a state was kept, read and released, however fast the steps are."""
    taken: list[int] = []

    @trainer.on(et.SnapshotTaken)
    async def note(event: et.SnapshotTaken) -> None:
        taken.append(event.step)

    @trainer.on(et.EpochStarted, lag=0)
    async def wait(event: et.EpochStarted) -> None:
        with anyio.fail_after(60):
            while event.epoch and (not taken or trainer.control.snapshots):  # noqa: ASYNC110
                await anyio.sleep(0.001)


PROGRAM = """
import os, signal
from pathlib import Path
import eventtrain as et
from eventtrain import subscribers as subs
from tests.subscribers.trackers.tracked_runs import Lowering, data, scripted_run

tracker = {tracker}
die_at = {die_at}
checkpointer = subs.Checkpointer("checkpoints", every={every}, max_to_keep=None, at_end=False)
trainer = scripted_run(Path("run"), checkpointer, tracker)

@trainer.on(et.StepsCompleted | et.CheckpointCommitted)
async def die(event):
    newest = max((int(path.name[-8:]) for path in Path("run/checkpoints").glob("step-*")), default=0)
    if die_at is not None and trainer.control.step >= die_at and newest >= die_at - {every}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)

trainer.subscribe(Lowering())
trainer.fit(data(), epochs=6, eval_data=data(1), resume=True)
"""


def own_environment() -> dict[str, str]:
    """For a process that stands for a program of its own: it does not share this one's process of W&B."""
    shared = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return shared | {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu"}


def run_and_kill(
    folder: Path, tracker: str, die_at: int | None, before: str = "pass", *, every: int = 7
) -> str:
    """Runs thirty steps in a process of its own, or goes on with them, and kills it at about step ``die_at``.

    Returns what it said.

    Args:
        folder: it runs in; the run lies in ``run``.
        tracker: source text of the subscriber.
        die_at: None to let it end.
        before: a statement before the end, such as a wait for what has to be on disk.
        every: steps between two checkpoints.
    """
    script = PROGRAM.format(tracker=tracker, die_at=die_at, before=before, every=every)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=folder,
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == (0 if die_at is None else -signal.SIGKILL), done.stdout + done.stderr
    return done.stdout + done.stderr
