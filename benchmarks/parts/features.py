"""Features that a run may use: its time per step, or per evaluation, over the same run without the feature.

Both runs are sessions of four epochs. After its runs the samples and the states that were handed out are counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp

import eventtrain as et
from benchmarks.figures import Budget, Figure, Loop, compared_loops, figure, in_pairs
from benchmarks.machine import Device
from benchmarks.parts.loop import EPOCHS, Observers, observed, require
from benchmarks.workloads import Workload, calibrated
from eventtrain import subscribers as subs

TARGET_S = 0.7e-3
CLASSES = 10
EVAL_BATCHES = 256


def update_norms() -> Observers:
    """Returns the extension, and a handler that counts the steps with its metrics."""
    seen: Counter[bool] = Counter()

    async def count(event: et.StepCompleted) -> None:
        seen["update_norm" in event.metrics] += 1

    def check(_: Path, steps: int) -> None:
        require(seen.total() == steps, f"{seen.total()} of {steps} steps")
        require(steps < 400 or 0.005 < seen[True] / steps <= 0.01, f"norms at {seen[True]} of {steps} steps")

    return Observers(extensions=(et.UpdateNorms(100),), handlers=[(et.StepCompleted, count, {})], check=check)


def counted_steps() -> Observers:
    """Returns the other half of ``update_norms``: a handler that counts the steps."""
    seen: Counter[bool] = Counter()

    async def count(event: et.StepCompleted) -> None:
        seen["update_norm" in event.metrics] += 1

    return Observers(
        handlers=[(et.StepCompleted, count, {})],
        check=lambda folder, steps: require(seen[False] == steps, f"{seen[False]} of {steps} steps"),
    )


def states_of_epochs() -> Observers:
    """Returns a handler that is given the state of the last step of each epoch."""
    seen: Counter[str] = Counter()

    async def look(event: et.EpochCompleted, state: Any) -> None:
        seen["epochs"] += jax.tree.leaves(state)[0].size > 0

    def check(_: Path, steps: int) -> None:
        require(seen["epochs"] >= EPOCHS and seen["epochs"] % EPOCHS == 0, f"{seen['epochs']} states")

    return Observers(handlers=[(et.EpochCompleted, look, {"with_state": True})], check=check)


def samples() -> Observers:
    """Returns a subscriber that takes one parameter array of the state every 100 steps."""
    seen: Counter[str] = Counter()

    async def count(event: et.SampleTaken) -> None:
        seen["samples"] += 1

    return Observers(
        [
            subs.Sample(
                lambda state: state["params"][0]["kernel"], every=100, every_epochs=None, name="kernel"
            )
        ],
        [(et.SampleTaken, count, {})],
        check=lambda folder, steps: require(
            steps < 100 or seen["samples"] > 0, f"no sample in {steps} steps"
        ),
    )


CASES: dict[str, tuple[Callable[[], Observers], Callable[[], Observers]]] = {
    "UpdateNorms(every=100)": (update_norms, counted_steps),
    "a handler with the state of each epoch": (states_of_epochs, Observers),
    "a sample every 100 steps": (samples, Observers),
}


@jax.tree_util.register_dataclass
@dataclass
class Confusion:
    """Counts of label and prediction: merged by addition, computed to an F1 score."""

    counts: jax.Array

    def merge(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts)

    def compute(self) -> jax.Array:
        true = jnp.diagonal(self.counts)
        return (2 * true / jnp.maximum(self.counts.sum(axis=0) + self.counts.sum(axis=1), 1)).mean()


def evaluations(workload: Workload) -> tuple[Loop, Loop]:
    """Returns the loops that evaluate with a confusion matrix as a state, and with the same counts as scalars."""

    def counts_of(state: Any, batch: Any) -> jax.Array:
        hidden = batch["x"]
        for layer in state["params"]:
            hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
        predicted, labels = hidden[:, :CLASSES].argmax(axis=1), batch["x"][:, :CLASSES].argmax(axis=1)
        return jnp.zeros((CLASSES, CLASSES), jnp.int32).at[labels, predicted].add(1)

    def stateful(state: Any, batch: Any) -> dict[str, Any]:
        return {"f1": Confusion(counts_of(state, batch))}

    def scalars(state: Any, batch: Any) -> dict[str, Any]:
        return {"f1": Confusion(counts_of(state, batch)).compute()}

    def loop(eval_fn: Any) -> Loop:
        trainer = et.Trainer(workload.step_fn, workload.state, eval_fn=eval_fn)
        data = [workload.batches[index % len(workload.batches)] for index in range(EVAL_BATCHES)]

        def run(evaluations: int) -> float:
            began_s = perf_counter()
            for _ in range(evaluations):
                trainer.evaluate(data)
            return perf_counter() - began_s

        run(2)
        return run

    return loop(stateful), loop(scalars)


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the time per step with each feature, and per evaluation with metrics that have a state."""
    logging.disable(logging.CRITICAL)
    budget, workload, found = Budget(budget_s), calibrated(TARGET_S), list[Figure]()
    for index, (case, (make, make_without)) in enumerate(CASES.items()):
        with ExitStack() as stack:
            ours = stack.enter_context(observed(workload, make()))
            without = stack.enter_context(observed(workload, make_without()))
            share_s = budget.share(len(CASES) + 1 - index)
            found.append(
                compared_loops(
                    case, ours, without, workload.step_s, share_s, at=workload.name, baseline="the run without it"
                )
            )  # fmt: skip
    loops = evaluations(workload)
    one_s = loops[0](1)
    count = max(1, int(budget.share(1) / 20 / one_s))
    times_ms = in_pairs(
        lambda: 1e3 * loops[0](count) / count, lambda: 1e3 * loops[1](count) / count, budget.share(1)
    )
    found.append(
        figure(
            "an evaluation with a confusion matrix",
            *times_ms,
            at=f"{EVAL_BATCHES} batches",
            unit="ms",
            baseline="with its F1 of each batch",
        )
    )
    return found
