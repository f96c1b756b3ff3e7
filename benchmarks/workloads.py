"""Training steps of a chosen duration, and the bare jitted loop that is the reference of every ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

CANDIDATES = [
    (16, 16, 2), (16, 16, 4), (32, 16, 6), (32, 32, 6), (32, 64, 4), (64, 64, 4), (64, 128, 3), (128, 128, 3),
    (128, 192, 3), (256, 192, 3), (256, 256, 3), (256, 384, 3), (512, 384, 3), (512, 512, 3), (512, 768, 3),
    (1024, 768, 3), (1024, 1024, 3), (2048, 1024, 3),
]  # fmt: skip
"""Batch size, width and hidden layers of the networks tried, cheapest first."""


@dataclass(frozen=True)
class Workload:
    """One training step, ``step_fn(state, batch)`` with three metrics, and its batches on the device."""

    name: str
    step_fn: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    state: Any
    batches: list[Any]
    step_s: float
    """Seconds per step of the bare jitted loop on this machine."""

    def bare_loop(self, steps: int) -> float:
        """Runs ``steps`` steps of the bare jitted loop, with one block at the end; returns the seconds."""
        jitted = jax.jit(self.step_fn, donate_argnums=0)
        state = jax.tree.map(jnp.copy, self.state)
        state, metrics = jitted(state, self.batches[0])
        jax.block_until_ready((state, metrics))
        batches, count = self.batches, len(self.batches)
        began_s = perf_counter()
        for index in range(steps):
            state, metrics = jitted(state, batches[index % count])
        jax.block_until_ready((state, metrics))
        return perf_counter() - began_s


def network(batch_size: int, width: int, hidden: int, name: str) -> Workload:
    """Returns a tanh network with biases, Adam and an injected learning rate, and random batches for it."""
    optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    generator = np.random.default_rng(0)
    sizes = [width] * (hidden + 1)
    params = [
        {
            "kernel": jnp.asarray(generator.normal(size=(i, o)).astype(np.float32) / np.sqrt(i)),
            "bias": jnp.zeros(o),
        }
        for i, o in pairwise(sizes)
    ]
    batches = [
        {"x": jnp.asarray(generator.normal(size=(batch_size, width)).astype(np.float32))} for _ in range(8)
    ]

    def loss_fn(layers: list[dict[str, jax.Array]], batch: Any) -> jax.Array:
        hidden_values = batch["x"]
        for layer in layers:
            hidden_values = jnp.tanh(hidden_values @ layer["kernel"] + layer["bias"])
        return jnp.mean((hidden_values - batch["x"]) ** 2)

    def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), "examples": jnp.int32(batch_size)}
        return new, metrics

    state = {"params": params, "opt_state": optimiser.init(params)}
    return Workload(name, step_fn, state, batches, 0.0)


def calibrated(name: str, target_s: float) -> Workload:
    """Returns the candidate whose bare step is closest to ``target_s`` seconds on this machine."""
    best: Workload | None = None
    for batch_size, width, hidden in CANDIDATES:
        workload = network(batch_size, width, hidden, name)
        steps = max(20, int(0.1 / target_s))
        step_s = min(workload.bare_loop(steps) for _ in range(3)) / steps
        found = Workload(name, workload.step_fn, workload.state, workload.batches, step_s)
        if best is None or abs(np.log(step_s / target_s)) < abs(np.log(best.step_s / target_s)):
            best = found
        if step_s > 2 * target_s:
            break
    assert best is not None
    return best
