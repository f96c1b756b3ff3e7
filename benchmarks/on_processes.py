"""The program of the part ``processes``: one of several processes that train together. Process 0 prints the figures."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from statistics import median
from time import perf_counter, thread_time
from typing import Any
from unittest import mock

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import eventtrain as et
from eventtrain.loop.agreement.agreement import Alone, Leader
from eventtrain.trainer import trainer as trainer_module

WIDTH = 192
BATCH = 64
OPTIMISER = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-4)


def main(seconds: float) -> None:
    """Measures for about ``seconds``."""
    logging.disable(logging.CRITICAL)
    jax.distributed.initialize()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    params = {f"w{layer}": np.eye(WIDTH, dtype=np.float32) for layer in range(2)}
    state = jax.tree.map(
        lambda leaf: put(leaf, everywhere),
        {"params": params, "opt": jax.tree.map(np.asarray, OPTIMISER.init(params))},
    )
    batch = put(np.ones((BATCH, WIDTH), np.float32), rows)

    def step_fn(state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> Any:
            hidden = batch
            for weights in params.values():
                hidden = jnp.tanh(hidden @ weights)
            return jnp.mean(hidden**2)

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        updates, opt = OPTIMISER.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"loss": loss}

    jitted = jax.jit(step_fn, donate_argnums=0)

    def bare(steps: int) -> float:
        carried = jax.tree.map(jnp.copy, state)
        carried, metrics = jitted(carried, batch)
        tokens = [metrics["loss"].block_until_ready()]
        began_s = perf_counter()
        for _ in range(steps):
            carried, metrics = jitted(carried, batch)
            tokens.append(metrics["loss"])
            if len(tokens) > 16:
                tokens.pop(0).block_until_ready()
        jax.block_until_ready(carried)
        return perf_counter() - began_s

    def trained(steps: int, *, agreed: bool) -> tuple[float, float]:
        apart = mock.patch.object(trainer_module, "joined", return_value=nullcontext(Alone()))
        with tempfile.TemporaryDirectory() as folder, nullcontext() if agreed else apart:
            trainer = et.Trainer(step_fn, state, run_dir=folder)
            with trainer.session() as session:
                for _ in range(50):
                    session.step(batch)
                session.block_until_ready()
                spent.clear()
                began_s = perf_counter()
                for _ in range(steps):
                    session.step(batch)
                asked_s = sum(spent)
                session.block_until_ready()
                return (perf_counter() - began_s) / steps, asked_s / steps

    spent: list[float] = []
    steps = 300
    once_s = bare(steps)
    pairs = max(3, min(15, int(seconds / (4 * once_s))))
    found: dict[str, list[Any]] = {"bare_s": [], "apart": [], "agreed": []}
    with ExitStack() as patches:
        for name in ("check", "is_open", "promise"):  # what process 0 calls at each step
            patches.enter_context(mock.patch.object(Leader, name, timed(getattr(Leader, name), spent)))
        for _ in range(pairs):
            found["bare_s"].append(bare(steps) / steps)
            found["apart"].append(trained(steps, agreed=False))
            found["agreed"].append(trained(steps, agreed=True))
    found |= latencies(step_fn, state, batch)
    if jax.process_index() == 0:
        print(json.dumps(found), flush=True)


def timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """Returns ``method``, which adds the seconds of CPU time that each call takes to ``spent``."""
    clock_s = median(-(thread_time() - thread_time()) for _ in range(1000))  # what reading the clock takes

    def call(*args: Any) -> Any:
        began_s = thread_time()
        returned = method(*args)
        spent.append(thread_time() - began_s - clock_s)
        return returned

    return call


def latencies(step_fn: Any, state: Any, batch: Any) -> dict[str, list[float]]:
    """Returns milliseconds, and steps, from a command of process 0 to its effect."""
    found: dict[str, list[float]] = {"command_ms": [], "command_steps": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = et.Trainer(step_fn, state, run_dir=folder)

        async def ask(control: et.Control) -> None:
            for _ in range(40):
                began_s, before = perf_counter(), trainer.step
                applied = await control.scale_hyperparam("learning_rate", 1.0).result()
                found["command_ms"].append(1e3 * (perf_counter() - began_s))
                found["command_steps"].append(applied.step - before)
                await anyio.sleep(0.02)
            await control.stop("measured").result()

        with trainer.session() as session:
            session.prepare(batch)
            if jax.process_index() == 0:
                threading.Thread(target=anyio.run, args=(ask, session.control)).start()
            while session.step(batch):
                pass
    return found


if __name__ == "__main__":
    main(float(sys.argv[1]))
