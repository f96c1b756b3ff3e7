"""A run with policies, interrupted between any two epochs with their states carried over, ends like the whole one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eventtrain as et
from benchmarks.campaigns.determinism import BAD_STEP, OPTIMISER, batches, eval_fn, step_fn
from eventtrain import subscribers as subs
from eventtrain.bus.handlers import takes_control
from eventtrain.data.epoch_iterator import EpochIterator
from eventtrain.subscribers.base import event_routes
from eventtrain.testing import RecordingSubscriber

EPOCHS, STEPS_PER_EPOCH = 6, 10
"""The gradients of steps 20 and 33 are far out, and step 41 is NaN where somebody does something about it."""


@dataclass
class Time:
    """A clock that is moved when the loop asks for the batch of a step, and timers that go by it."""

    now_s: float = 0.0
    timers: list[Timer] = field(default_factory=list)

    def clock(self) -> float:
        return self.now_s

    def timer(self, duration_s: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now_s + duration_s, call))
        return self.timers[-1]

    def advance(self, duration_s: float) -> None:
        self.now_s += duration_s
        for timer in self.timers:
            if timer.running and timer.due_s <= self.now_s:
                timer.running = False
                timer.call()


@dataclass
class Timer:
    due_s: float
    call: Callable[[], None]
    daemon: bool = False
    running: bool = False

    def start(self) -> None:
        self.running = True

    def cancel(self) -> None:
        self.running = False


def plateau_of_steps() -> subs.ReduceLROnPlateau:
    policy = subs.ReduceLROnPlateau("loss", factor=0.9, patience=7, cooldown=9, patience_unit="steps")
    policy.lag = 0
    return policy


POLICIES: dict[str, Callable[[Time], et.Subscriber]] = {
    "early stopping": lambda _: subs.EarlyStopping(
        "val_loss", patience=4, min_delta=0.05, baseline=10, restore_best_weights=True
    ),
    "early stopping by evaluations": lambda _: subs.EarlyStopping(
        "val_loss", patience=1, patience_unit="evaluations", start_from_epoch=4, restore_best_weights=True
    ),
    "plateau": lambda _: subs.ReduceLROnPlateau("val_loss", factor=0.5, patience=2, cooldown=1),
    "plateau of steps": lambda _: plateau_of_steps(),
    "plateau of evaluations": lambda _: subs.ReduceLROnPlateau(
        "val_loss", factor=0.7, patience=3, patience_unit="evaluations"
    ),
    "schedule of epochs": lambda _: subs.LearningRateScheduler(lambda epoch, lr: lr * 0.9),
    "schedule of steps": lambda _: subs.LearningRateScheduler(
        optax.cosine_decay_schedule(0.1, EPOCHS * STEPS_PER_EPOCH), by="step"
    ),
    "schedule of the momentum": lambda _: subs.HyperparamScheduler(
        "momentum", optax.linear_schedule(0.9, 0.5, 50), by="step", lag=5
    ),
    "range test": lambda _: subs.LRFinder(1e-3, 0.3, num_steps=7, smoothing=0.5, then="apply", lag=0),
    "spikes": lambda _: subs.GradientSpike(window=30, warmup=15, cooldown=20, quantile=0.9, lag=0),
    "stop at NaN": lambda _: subs.TerminateOnNaN("stop", lag=0),
    "roll back at NaN": lambda _: subs.TerminateOnNaN("rollback", snapshot_every=16, lag=0),
    "time": lambda time: subs.MaxTime(45.5, clock=time.clock, timer=time.timer),
}
TOGETHER = [
    name
    for name in POLICIES
    if name not in ("early stopping by evaluations", "schedule of steps", "stop at NaN")
]
"""Beside those left out the others would have nothing to decide, or nobody could tell what they decide."""


class Renewable(et.Subscriber):
    """A policy, in whose place another one can be put that knows only what the first one saved."""

    def __init__(self, name: str, make: Callable[[], et.Subscriber]) -> None:
        self._make = make
        self.policy = make()
        self.events, _ = event_routes(self.policy, name)
        self.name = name
        self.every, self.lag, self.on_error = self.policy.every, self.policy.lag, self.policy.on_error

    async def start(self, run: et.RunContext) -> None:
        self.policy.name = self.name
        await self.policy.start(run)

    async def handle(self, event: et.Event, control: et.Control) -> None:
        handler = event_routes(self.policy, "policy")[1]
        await (handler(event, control) if takes_control(handler) else handler(event))

    async def stop(self) -> None:
        await self.policy.stop()

    def saved(self) -> Any:
        return json.loads(json.dumps(self.policy.state_dict(), allow_nan=False))

    def renew(self) -> None:
        saved = self.saved()
        self.policy = self._make()
        self.policy.load_state_dict(saved)


@dataclass
class Run:
    """One trainer, over one call of fit or several."""

    trainer: et.Trainer
    time: Time
    policies: list[Renewable]
    recorder: RecordingSubscriber
    with_nan: bool

    def fit(self, epochs: int) -> et.FitResult:
        return self.trainer.fit(self.data, epochs=epochs, eval_data=batches()[:2], progress=False)

    def data(self, epoch: int) -> Iterator[Any]:
        for step in range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1):
            yield batches()[step - 1 if step != BAD_STEP or self.with_nan else -1]

    def fit_interrupted(self, last_epoch: int) -> None:
        """Train up to the end of ``last_epoch``, and put new policies in the places of the old ones."""

        @self.trainer.on(et.EpochCompleted, lag=0, once=True, where=lambda event: event.epoch == last_epoch)
        async def interrupt(event: et.EpochCompleted, control: et.Control) -> None:
            control.stop("interrupted")

        assert self.fit(EPOCHS - self.trainer.epoch).stop_reason == "interrupted"
        for policy in self.policies:
            policy.renew()
        self.time.advance(1_000.0)  # between two runs no time is used

    def outcome(self, result: et.FitResult) -> dict[str, Any]:
        """What has to be equal."""
        steps = self.recorder.of(et.StepCompleted)
        changes = [e for e in self.recorder.of(et.HyperparamChanged) if e.old != e.new]
        restored = self.recorder.of(et.CheckpointRestored)
        return {
            "end": (result.step, self.trainer.epoch, result.stop_reason),
            "rates": [(event.step, event.metrics["rate"]) for event in steps],
            "changes": [(event.step, event.name, event.old, event.new) for event in changes],
            "restored": [(event.step, event.restored_step) for event in restored],
            "state": [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result.state)],
            "memory": [policy.saved() for policy in self.policies],
        }


def make_run(tmp_path: Path, names: Sequence[str], backend: str = "asyncio") -> Run:
    time = Time()
    policies = [Renewable(name, lambda name=name: POLICIES[name](time)) for name in names]
    recorder = RecordingSubscriber(
        (et.StepCompleted, et.CommandApplied, et.HyperparamChanged, et.CheckpointRestored)
    )
    params = {"w": jnp.zeros(3)}
    trainer = et.Trainer(
        step_fn,
        {"params": params, "opt_state": OPTIMISER.init(params)},
        eval_fn,
        subscribers=[*policies, subs.EvaluateEvery(steps=STEPS_PER_EPOCH // 2), recorder],
        run_dir=tmp_path,
        backend=backend,
    )
    return Run(trainer, time, policies, recorder, any("NaN" in name for name in names))


@pytest.fixture(autouse=True)
def moved_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves the clock on the training thread. Data is read ahead: a clock moved there would stop at any step."""
    ask = EpochIterator.next

    def ask_and_move(self: EpochIterator) -> Any:
        run = getattr(self._data, "__self__", None)
        if isinstance(run, Run) and run.trainer.step < (run.trainer.epoch + 1) * STEPS_PER_EPOCH:
            run.time.advance(1.0)
        return ask(self)

    monkeypatch.setattr(EpochIterator, "next", ask_and_move)


@pytest.mark.parametrize("name", POLICIES)
def test_a_run_interrupted_after_each_of_its_epochs_ends_like_the_whole_one(
    tmp_path: Path, name: str
) -> None:
    whole = make_run(tmp_path, [name])
    expected = whole.outcome(whole.fit(EPOCHS))
    assert expected["changes"] or expected["end"][2] != "completed"
    run = make_run(tmp_path, [name])
    epochs = math.ceil(expected["end"][0] / STEPS_PER_EPOCH)
    for epoch in range(epochs - 1):
        run.fit_interrupted(epoch)
    assert run.outcome(run.fit(EPOCHS - epochs + 1)) == expected


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_run_with_all_policies_interrupted_between_any_two_epochs_ends_like_the_whole_one(
    tmp_path: Path, backend: str
) -> None:
    whole = make_run(tmp_path, TOGETHER, backend)
    expected = whole.outcome(whole.fit(EPOCHS))
    deciders = {e.command.cause.subscriber for e in whole.recorder.of(et.CommandApplied) if e.command.cause}
    assert deciders == set(TOGETHER) - {"time"}
    assert expected["end"][0] > 4 * STEPS_PER_EPOCH
    for epoch in range(math.ceil(expected["end"][0] / STEPS_PER_EPOCH) - 1):
        run = make_run(tmp_path, TOGETHER, backend)
        run.fit_interrupted(epoch)
        assert run.outcome(run.fit(EPOCHS - epoch - 1)) == expected, f"after epoch {epoch}"
