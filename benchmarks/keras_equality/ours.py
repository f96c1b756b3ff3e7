"""Runs a case in eventtrain: in its training loop, or with the policies' handlers in a model of the loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np

import eventtrain as et
from benchmarks.keras_equality.cases import Case
from benchmarks.keras_equality.record import Record, bits
from eventtrain import subscribers as subs
from eventtrain.testing import RecordingSubscriber, ScriptedStep


def drive(case: Case) -> Record:
    """Returns the record of the run in eventtrain."""
    return through_fit(case) if case.through_fit else anyio.run(through_handlers, case)


def _make_policies(case: Case) -> list[Any]:
    return [getattr(subs, policy.name)(**policy.options) for policy in case.policies]


def _memory(policy: Any) -> dict[str, Any]:
    match policy:
        case subs.EarlyStopping():
            return {"best": policy.best, "best_epoch": policy.best_epoch, "wait": policy.wait}
        case subs.ReduceLROnPlateau():
            return {"best": policy.best, "wait": policy.wait, "cooldown_left": policy.cooldown_left}
        case _:
            return {}


# --- a real run ---------------------------------------------------------------------------------------------------


def through_fit(case: Case) -> Record:
    """Runs a real ``Trainer.fit``, on asyncio or trio, whose metrics follow the case."""
    per_step: dict[str, list[float]] = {"loss": [0.0]}
    per_epoch: dict[str, list[float]] = {"loss": [0.0]}
    for name, column in case.metrics.items():
        values = [np.float32(0.0 if value is None else value) for value in column]
        if name.startswith("val_"):
            per_epoch[name.removeprefix("val_")] = values
        else:
            per_step[name] = list(np.repeat(values, case.steps_per_epoch))
    script = ScriptedStep(
        per_step,
        eval_metrics=per_epoch,
        steps_per_epoch=case.steps_per_epoch,
        learning_rate=case.learning_rate,
    )
    policies = _make_policies(case)
    recorder = RecordingSubscriber(et.EpochStarted)
    watching = [recorder]
    if case.evaluate_every > 1:
        watching.append(subs.EvaluateEvery(epochs=case.evaluate_every))
    with tempfile.TemporaryDirectory() as folder:
        trainer = et.Trainer(
            script.step_fn,
            script.state,
            script.eval_fn,
            subscribers=[*watching, *policies],
            run_dir=folder,
            backend=("asyncio", "trio")[case.seed // 10 % 2],
        )
        result = trainer.fit(script.data, epochs=case.epochs, eval_data=script.eval_data, progress=False)
    began = [event.hyperparams["learning_rate"] for event in recorder.of(et.EpochStarted)]
    last = result.state["opt_state"].hyperparams["learning_rate"]
    return Record(
        epochs=result.epochs_completed,
        stopped=result.stop_reason != "completed",
        rates=tuple(bits(epoch.metrics["learning_rate"]) for epoch in result.history),
        # EpochStarted contains the rate before a schedule sets it for the epoch.
        rates_after=tuple(bits(rate) for rate in (*began[1:], last)),
        policies=tuple(_memory(policy) for policy in policies),
        weight=result.state["params"]["weight"].item(),
        last_weight=float(result.step),
    )


# --- handlers only ------------------------------------------------------------------------------------------------


async def through_handlers(case: Case) -> Record:
    """Calls the policies' own ``start`` and ``handle`` with a ``ModelledRun`` instead of the loop."""
    run = ModelledRun(case.learning_rate)
    policies = _make_policies(case)
    for number, policy in enumerate(policies):
        policy.name = f"{type(policy).__name__}-{number}"  # the bus also needs different names
        await policy.start(run)
    rates: list[int] = []
    rates_after: list[int] = []
    for epoch in range(case.epochs):
        started = et.EpochStarted(step=epoch * case.steps_per_epoch, epoch=epoch, hyperparams=run.hyperparams)
        await run.deliver(started, policies)
        rates.append(bits(run.rate))
        run.weight = float((epoch + 1) * case.steps_per_epoch)
        completed = et.EpochCompleted(
            step=(epoch + 1) * case.steps_per_epoch, epoch=epoch, metrics=case.metrics_of(epoch),
            hyperparams=run.hyperparams, steps=case.steps_per_epoch, duration_s=0.0,
        )  # fmt: skip
        await run.deliver(completed, policies)
        rates_after.append(bits(run.rate))
        if run.stopped:
            break
    last_weight = run.weight
    run.finish()
    return Record(
        epochs=len(rates),
        stopped=run.stopped,
        rates=tuple(rates),
        rates_after=tuple(rates_after),
        policies=tuple(_memory(policy) for policy in policies),
        weight=run.weight,
        last_weight=last_weight,
    )


class ModelledRun:
    """Context and control of a run, as seen by a policy with ``lag=0``.

    As in the loop, the commands of all handlers of an event wait until the last handler has returned, and are applied
    in the order of subscription. Values are float32.
    """

    def __init__(self, learning_rate: float) -> None:
        self.rate = np.float32(learning_rate)
        self.weight = 0.0
        self.stopped = False
        self.control = self
        self.step = 0
        self.start_step = 0
        self.steps = self.epochs = self.steps_per_epoch = self.total_steps = None
        self.can_evaluate = False  # each epoch has all of its metrics
        self.ended = None
        self.snapshots: dict[str, Any] = {}
        self._kept: dict[str, float] = {}
        self._final_restores: list[tuple[str, Callable[[], bool]]] = []
        self._commands: list[Callable[[], None]] = []

    def require_params(self, subject: str) -> None:
        """The weights are known."""

    async def deliver(self, event: et.Event, policies: list[Any]) -> None:
        """Passes ``event`` to its handlers, then applies their commands."""
        for policy in policies:
            if isinstance(event, policy.events):
                await policy.handle(event, self)
        commands, self._commands = self._commands, []
        for command in commands:
            command()

    def finish(self) -> None:
        """Ends the run: applies pending restores."""
        for tag, where in self._final_restores:
            if tag in self._kept and where():
                self.weight = self._kept[tag]

    # --- RunContext ---

    def before_first_step(self, check: Callable[[Any], None]) -> None:
        """Every metric that a policy monitors is there."""

    def require_hyperparam(self, name: str, path: str | None = None) -> str:
        return name

    def restore_at_end(self, tag: str, *, where: Callable[[], bool]) -> None:
        self._final_restores.append((tag, where))

    # --- Control ---

    @property
    def hyperparams(self) -> dict[str, float]:
        return {"learning_rate": float(self.rate)}

    def stop(self, reason: str) -> None:
        self._commands.append(lambda: setattr(self, "stopped", True))

    def snapshot(self, tag: str, *, reason: str) -> None:
        self._commands.append(lambda: self._kept.update({tag: self.weight}))

    def set_hyperparam(self, name: str, value: float, *, path: str | None, reason: str, at_step: int) -> None:
        self._commands.append(lambda: setattr(self, "rate", np.float32(value)))

    def scale_hyperparam(
        self, name: str, factor: float, *, minimum: float, path: str | None, reason: str
    ) -> None:
        self._commands.append(
            lambda: setattr(self, "rate", np.float32(max(float(self.rate) * factor, minimum)))
        )
