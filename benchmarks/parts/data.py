"""Cost of training, evaluating and predicting on NumPy data, against bare loops that are given the same batches.

A bare loop hands the NumPy batches to the jitted function, reads no metric and blocks once, at the end; that of
``predict`` fetches the outputs, 32 batches behind. The fixed cost of a call of ``fit``, ``evaluate`` or ``predict`` is
measured beside it, and subtracted.
"""

from __future__ import annotations

import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eventtrain as et
from benchmarks.figures import Budget, Figure, Loop, compared_loops, figure, without_fixed_cost
from benchmarks.machine import Device
from benchmarks.parts.peers import bare_loop
from benchmarks.workloads import Workload, calibrated

TARGETS_S = (50e-6, 1e-3)
EPOCH = 256
"""Batches in an epoch."""


class Data:
    """The same rows as batches in a list, from an ``ArrayLoader`` and from a generator."""

    def __init__(self, workload: Workload) -> None:
        self.rows, width = workload.batches[0]["x"].shape
        self.x = np.random.default_rng(0).normal(size=(EPOCH * self.rows, width)).astype(np.float32)
        self.list = [{"x": batch.copy()} for batch in np.split(self.x, EPOCH)]
        self.loader = et.ArrayLoader({"x": self.x}, self.rows)

    def generator(self, _: int) -> Iterator[Any]:
        yield from self.list

    def some(self, kind: str, batches: int) -> Any:
        """Returns ``batches`` batches as a list, a loader or a generator."""
        if kind == "ArrayLoader":
            x = self.x[np.arange(batches * self.rows) % len(self.x)]
            return et.ArrayLoader({"x": x}, self.rows, shuffle=False)
        listed = [self.list[index % EPOCH] for index in range(batches)]
        return listed if kind == "list" else lambda _: iter(listed)


def forward(state: Any, batch: Any) -> jax.Array:
    values = batch["x"]
    for layer in state["params"]:
        values = jnp.tanh(values @ layer["kernel"] + layer["bias"])
    return values


def evaluation(state: Any, batch: Any) -> dict[str, jax.Array]:
    return {"loss": jnp.mean((forward(state, batch) - batch["x"]) ** 2)}


def bare_evaluate(workload: Workload, data: Data) -> Loop:
    jitted = jax.jit(evaluation)

    def run(steps: int) -> float:
        metrics = None
        began_s = perf_counter()
        for index in range(steps):
            metrics = jitted(workload.state, data.list[index % EPOCH])
        jax.block_until_ready(metrics)
        return perf_counter() - began_s

    return run


def bare_predict(workload: Workload, data: Data) -> Loop:
    jitted = jax.jit(forward)

    def run(steps: int) -> float:
        waiting, outputs = deque[jax.Array](), list[np.ndarray]()
        began_s = perf_counter()
        for index in range(steps):
            waiting.append(jitted(workload.state, data.list[index % EPOCH]))
            if len(waiting) > 32:
                outputs.append(np.asarray(waiting.popleft()))
        outputs += map(np.asarray, waiting)
        np.concatenate(outputs)
        return perf_counter() - began_s

    return run


def loops(workload: Workload, data: Data, folder: Path) -> dict[str, tuple[Loop, Loop]]:
    """Returns each case with its bare loop."""

    def trainer(**options: Any) -> et.Trainer[Any]:
        run_dir = tempfile.mkdtemp(dir=folder)
        return et.Trainer(workload.step_fn, workload.state, run_dir=run_dir, **options)

    def fit(given: Any, steps_per_call: int) -> Loop:
        fitted = trainer(steps_per_call=steps_per_call)
        return without_fixed_cost(
            lambda steps: fitted.fit(given, steps=steps, progress=False), steps_per_call
        )

    def on_some(method: Callable[[Any], object], kind: str) -> Loop:
        made: dict[int, Any] = {}  # outside the measured time, except for the first call, which warms up

        def call(batches: int) -> None:
            if batches not in made:
                made[batches] = data.some(kind, batches)
            method(made[batches])

        return without_fixed_cost(call, 1)

    inference = trainer(eval_fn=evaluation, predict_fn=forward)
    bare_fit = bare_loop(workload.step_fn, workload.state, data.list)
    given = {"list": data.list, "ArrayLoader": data.loader, "generator": data.generator}
    return {
        **{f"fit, {kind}": (fit(one, 1), bare_fit) for kind, one in given.items()},
        **{f"fit, {kind}, 16 steps per call": (fit(one, 16), bare_fit) for kind, one in given.items()},
        **{
            f"evaluate, {kind}": (on_some(inference.evaluate, kind), bare_evaluate(workload, data))
            for kind in given
        },
        **{
            f"predict, {kind}": (on_some(inference.predict, kind), bare_predict(workload, data))
            for kind in given
        },
    }


def second_call(workload: Workload, data: Data, folder: Path) -> Figure:
    """Returns the milliseconds of a call of ``fit`` for one step, not the first."""
    trainer = et.Trainer(workload.step_fn, workload.state, run_dir=tempfile.mkdtemp(dir=folder))
    took_ms: list[float] = []
    for _ in range(8):
        began_s = perf_counter()
        trainer.fit(data.list, steps=1, progress=False)
        took_ms.append(1e3 * (perf_counter() - began_s))
    return figure("second call of fit, one step", took_ms[1:], at=workload.name, unit="ms")


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the time per step on each kind of data."""
    logging.disable(logging.CRITICAL)
    budget, found = Budget(budget_s), list[Figure]()
    targets = TARGETS_S[:1] if quick else TARGETS_S
    for turn, target_s in enumerate(targets):
        workload = calibrated(target_s)
        data = Data(workload)
        with tempfile.TemporaryDirectory() as folder:
            cases = loops(workload, data, Path(folder))
            if quick:
                cases = {
                    name: cases[name]
                    for name in ("fit, ArrayLoader", "evaluate, ArrayLoader", "predict, list")
                }
            for index, (name, (loop, bare)) in enumerate(cases.items()):
                share_s = budget.share((len(targets) - turn) * len(cases) - index)
                step_s = max(2 * workload.step_s, share_s / 16 / 20_000)  # at most 20,000 batches
                found.append(compared_loops(name, loop, bare, step_s, share_s, at=workload.name))
            found.append(second_call(workload, data, Path(folder)))
    return found
