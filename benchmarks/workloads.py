"""Training steps of a chosen length, and the bare jitted loop that every ratio is taken against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

CANDIDATES = [
    (8, 8, 1), (16, 32, 1), (32, 32, 2), (32, 64, 2), (64, 64, 2), (64, 96, 2), (64, 128, 2), (128, 128, 2), (128, 192, 2),
    (128, 256, 2), (256, 256, 2), (256, 384, 2), (256, 512, 2), (512, 512, 2), (512, 768, 2), (512, 1024, 2), (1024, 1024, 2),
    (1024, 1536, 2), (2048, 1536, 2),
]  # fmt: skip
"""Batch size, width and hidden layers of the networks tried, cheapest first."""


@dataclass(frozen=True)
class Workload:
    """One training step: ``step_fn(state, batch)`` with three metrics, batches that lie on the device already."""

    name: str
    step_fn: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    state: Any
    batches: list[Any]
    step_s: float
    """Seconds a step of the bare jitted loop takes here."""

    def bare_loop(self, steps: int) -> float:
        """Seconds for ``steps`` steps of the bare jitted loop: donation, no sync per step, one block at the end."""
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
    """A tanh network with momentum and an injected learning rate, on ``batch_size`` x ``width`` random inputs."""
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3, momentum=0.9)
    generator = np.random.default_rng(0)
    sizes = [width] * (hidden + 1)
    params = [
        jnp.asarray(generator.normal(size=(i, o)).astype(np.float32) / np.sqrt(i))
        for i, o in zip(sizes, sizes[1:], strict=False)
    ]
    batches = [
        {"x": jnp.asarray(generator.normal(size=(batch_size, width)).astype(np.float32))} for _ in range(8)
    ]

    def loss_fn(weights: list[jax.Array], batch: Any) -> jax.Array:
        hidden_values = batch["x"]
        for weight in weights:
            hidden_values = jnp.tanh(hidden_values @ weight)
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
    """The candidate whose bare step comes nearest to ``target_s`` seconds on this machine."""
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
