"""Training loops of other libraries and by hand that write a row per step, each against its own bare jitted loop.

All train the same layers on the same NumPy batches in memory, and write the loss of every step to a file. A bare loop
is the jitted step of that library with donation, which reads no metric and blocks once, at the end. Libraries that
cannot be imported are reported absent.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eventtrain as et
from benchmarks.figures import Budget, Figure, Loop, absent, compared_loops, without_fixed_cost
from benchmarks.machine import Device
from benchmarks.workloads import Workload, calibrated
from eventtrain import subscribers as subs

TARGETS_S = (0.2e-3, 1e-3)

Setup = Callable[[Workload, list[Any], Path], tuple[Loop, Loop]]
"""Returns the loop of a library and its bare loop, both compiled."""


def bare_loop(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batches: list[Any]) -> Loop:
    """Returns the jitted loop over ``batches`` in the memory of the host."""
    jitted = jax.jit(step, donate_argnums=0)

    def run(steps: int) -> float:
        carried, metrics = jax.tree.map(jnp.copy, state), None
        began_s = perf_counter()
        for batch in islice(cycle(batches), steps):
            carried, metrics = jitted(carried, batch)
        jax.block_until_ready((carried, metrics))
        return perf_counter() - began_s

    return run


def by_steps(
    workload: Workload, batches: list[Any], each: Callable[[int, Any], None], end: Any = None
) -> Loop:
    """Returns the jitted loop that gives the metrics of every step to ``each``."""
    jitted = jax.jit(workload.step_fn, donate_argnums=0)

    def run(steps: int) -> float:
        state = jax.tree.map(jnp.copy, workload.state)
        began_s = perf_counter()
        for step, batch in enumerate(islice(cycle(batches), steps), 1):
            state, metrics = jitted(state, batch)
            each(step, metrics)
        jax.block_until_ready(state)
        took_s = perf_counter() - began_s
        if end is not None:
            end()
        return took_s

    return run


def eventtrain(workload: Workload, batches: list[Any], folder: Path) -> tuple[Loop, Loop]:
    logger = subs.JSONLLogger("events.jsonl", by="window")
    trainer = et.Trainer(workload.step_fn, workload.state, subscribers=[logger], run_dir=folder)

    loop = without_fixed_cost(lambda steps: trainer.fit(batches, steps=steps, progress=False), 8)
    return loop, bare_loop(workload.step_fn, workload.state, batches)


def by_hand(workload: Workload, batches: list[Any], folder: Path) -> tuple[Loop, Loop]:
    file = (folder / "rows.jsonl").open("w")

    def each(step: int, metrics: Any) -> None:
        file.write(json.dumps({"step": step, "loss": float(metrics["loss"])}) + "\n")

    return by_steps(workload, batches, each), bare_loop(workload.step_fn, workload.state, batches)


def keras(workload: Workload, batches: list[Any], folder: Path) -> tuple[Loop, Loop]:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    rows, width = batches[0]["x"].shape
    layers = [keras.layers.Dense(width, activation="tanh") for _ in workload.state["params"]]
    model = keras.Sequential([keras.Input((width,)), *layers])
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse")
    x = np.concatenate([batch["x"] for batch in batches])
    file = (folder / "rows.jsonl").open("w")

    class Rows(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            file.write(json.dumps({"step": batch, "loss": float(logs["loss"])}) + "\n")

    def run(steps: int) -> float:
        epochs = max(1, steps // len(batches))
        began_s = perf_counter()
        model.fit(x, x, batch_size=rows, epochs=epochs, shuffle=False, verbose=0, callbacks=[Rows()])
        return (perf_counter() - began_s) * steps / (epochs * len(batches))

    run(len(batches))
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([jnp.copy(variable.value) for variable in group] for group in variables)  # fit donates them

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        logs, new = model.train_step(state, (batch["x"], batch["x"]))
        return new, logs

    return run, bare_loop(step, state, batches)


def clu(workload: Workload, batches: list[Any], folder: Path) -> tuple[Loop, Loop]:
    from clu import metric_writers

    writer = metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(str(folder))])

    def each(step: int, metrics: Any) -> None:
        writer.write_scalars(step, {"loss": metrics["loss"]})

    loop = by_steps(workload, batches, each, writer.flush)
    return loop, bare_loop(workload.step_fn, workload.state, batches)


def jloop(workload: Workload, batches: list[Any], folder: Path) -> tuple[Loop, Loop]:
    from jloop.callbacks import JsonlMetricsCallback
    from jloop.core import RunContext, Trainer

    jitted = jax.jit(workload.step_fn, donate_argnums=0)

    class Training(Trainer):
        def step(self, ctx: Any, batch: Any) -> Any:
            self.state, metrics = jitted(self.state, batch)
            self.log_pytree(ctx, {"loss": metrics["loss"]})

    def run(steps: int) -> float:
        with Training([JsonlMetricsCallback(folder)]) as trainer:
            trainer.state = jax.tree.map(jnp.copy, workload.state)
            began_s = perf_counter()
            trainer.run(RunContext(data_iter=islice(cycle(batches), steps)))
            jax.block_until_ready(trainer.state)
            return perf_counter() - began_s

    return run, bare_loop(workload.step_fn, workload.state, batches)


PEERS: dict[str, Setup] = {
    "eventtrain fit, JSON Lines": eventtrain,
    "float(loss) in the loop, JSON Lines": by_hand,
    "Keras 3 fit on JAX, a callback per batch": keras,
    "CLU, AsyncMultiWriter": clu,
    "jloop, JSON Lines": jloop,
}


def cases(quick: bool) -> Iterator[tuple[float, str]]:
    return ((target_s, name) for target_s in (TARGETS_S[:1] if quick else TARGETS_S) for name in PEERS)


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the time per step of each library that is installed."""
    logging.disable(logging.CRITICAL)
    budget, found = Budget(budget_s), list[Figure]()
    todo, workloads = list(cases(quick)), dict[float, Workload]()
    for index, (target_s, name) in enumerate(todo):
        if target_s not in workloads:
            workloads[target_s] = calibrated(target_s)
        workload = workloads[target_s]
        rows = np.random.default_rng(0).normal(size=(256, *workload.batches[0]["x"].shape)).astype(np.float32)
        batches = [{"x": batch} for batch in rows]
        share_s = budget.share(len(todo) - index)
        with tempfile.TemporaryDirectory() as folder:
            try:
                loop, bare = PEERS[name](workload, batches, Path(folder))
            except ImportError as error:
                found.append(absent(name, f"not installed: {error}", at=workload.name))
                continue
            step_s = 2 * workload.step_s
            found.append(
                compared_loops(
                    name, loop, bare, step_s, share_s, at=workload.name, baseline="its own bare loop"
                )
            )
    return found
