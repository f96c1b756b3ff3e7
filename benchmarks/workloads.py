"""Training steps of a chosen duration, and the bare jitted loop that is the reference of most ratios."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import inf, log, prod
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import optax

Sizes = tuple[int, ...]

NETWORKS: Sequence[Sizes] = (
    (16, 16, 2), (16, 16, 4), (32, 16, 6), (32, 32, 6), (32, 64, 4), (64, 64, 4), (64, 128, 3), (128, 128, 3),
    (128, 192, 3), (256, 192, 3), (256, 256, 3), (256, 384, 3), (512, 384, 3), (512, 512, 3), (512, 768, 3),
    (1024, 768, 3), (1024, 1024, 3), (2048, 1024, 3), (2048, 2048, 3), (4096, 2048, 4), (4096, 4096, 4),
    (8192, 4096, 6), (8192, 8192, 6), (16384, 8192, 8),
)  # fmt: skip
"""Batch size, width and hidden layers of the networks tried, cheapest first."""

TRANSFORMERS: Sequence[Sizes] = (
    (2, 64, 2, 32), (2, 128, 2, 64), (2, 128, 8, 64), (4, 256, 4, 64), (4, 256, 8, 128), (6, 384, 8, 256),
    (8, 512, 8, 512), (8, 512, 32, 512), (12, 768, 32, 512), (12, 1024, 32, 1024), (16, 1536, 32, 1024),
    (24, 2048, 32, 1024),
)  # fmt: skip
"""Layers, width, batch size and sequence length of the transformers tried, cheapest first."""
VOCABULARY = 8192


@dataclass(frozen=True)
class Workload:
    """One training step, ``step_fn(state, batch)`` with three metrics, and its batches on the device."""

    name: str
    step_fn: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    state: Any
    batches: list[Any]
    step_s: float = 0.0
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


def network(batch_size: int, width: int, hidden: int, name: str = "") -> Workload:
    """Returns a tanh network with biases, Adam and an injected learning rate, and random batches for it."""
    optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    keys = iter(jax.random.split(jax.random.key(0), hidden + 8))
    params = [
        {"kernel": jax.random.normal(next(keys), (i, o)) / i**0.5, "bias": jnp.zeros(o)}
        for i, o in pairwise([width] * (hidden + 1))
    ]
    batches = [{"x": jax.random.normal(next(keys), (batch_size, width))} for _ in range(8)]

    def loss_fn(layers: list[dict[str, jax.Array]], batch: Any) -> jax.Array:
        hidden_values = batch["x"]
        for layer in layers:
            hidden_values = jnp.tanh(hidden_values @ layer["kernel"] + layer["bias"])
        return jnp.mean((hidden_values - batch["x"]) ** 2)

    return _training(name, loss_fn, params, batches, batch_size, optimiser)


def transformer(layers: int, width: int, batch_size: int, length: int, name: str = "") -> Workload:
    """Returns a decoder that computes in bfloat16 with float32 weights and Adam, and random tokens for it."""
    optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-4)
    heads = max(1, width // 64)
    keys = iter(jax.random.split(jax.random.key(0), 4 * layers + 3))

    def weight(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) / rows**0.5

    params = {
        "embedding": weight(VOCABULARY, width),
        "layers": [
            {
                "qkv": weight(width, 3 * width),
                "out": weight(width, width),
                "up": weight(width, 4 * width),
                "down": weight(4 * width, width),
            }
            for _ in range(layers)
        ],
    }
    batches = [
        {"tokens": jax.random.randint(next(keys), (batch_size, length + 1), 0, VOCABULARY)} for _ in range(2)
    ]

    def normed(x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x.astype(jnp.float32)).astype(jnp.bfloat16)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        x = params["embedding"][batch["tokens"][:, :-1]]
        for layer in params["layers"]:
            q, k, v = jnp.split(
                (normed(x) @ layer["qkv"]).reshape(batch_size, length, 3 * heads, -1), 3, axis=2
            )
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.reshape(batch_size, length, width) @ layer["out"]
            x = x + jax.nn.gelu(normed(x) @ layer["up"]) @ layer["down"]
        logits = (normed(x) @ params["embedding"].T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean()

    return _training(name, loss_fn, params, batches, batch_size, optimiser)


def _training(
    name: str, loss_fn: Any, params: Any, batches: list[Any], batch_size: int, optimiser: Any
) -> Workload:
    def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "examples": jnp.int32(batch_size)}
        return new, metrics

    return Workload(name, step_fn, {"params": params, "opt_state": optimiser.init(params)}, batches)


def calibrated(
    target_s: float, make: Callable[..., Workload] = network, candidates: Sequence[Sizes] = NETWORKS
) -> Workload:
    """Returns the candidate whose bare step is closest to ``target_s`` seconds on this machine.

    Starts with the smallest and grows as far as the time per operation allows, which only falls with the size.
    """

    @cache
    def timed(index: int) -> Workload:
        workload = make(*candidates[index], name=duration(target_s))
        try:
            once_s = min(workload.bare_loop(1) for _ in range(2))
            steps = max(2, int(0.05 / once_s))
            return replace(workload, step_s=min(workload.bare_loop(steps) / steps for _ in range(3)))
        except jax.errors.JaxRuntimeError:  # the device has too little memory
            if index == 0:
                raise
            return replace(workload, step_s=inf)

    def work(sizes: Sizes) -> int:
        return prod(sizes) * sizes[1]

    index = 0
    while (step_s := timed(index).step_s) < target_s and index < len(candidates) - 1:
        reach = work(candidates[index]) * target_s / step_s
        index = max(index + 1, min(bisect_left(candidates, reach, key=work), len(candidates) - 1))
    return min(timed(max(0, index - 1)), timed(index), key=lambda near: abs(log(near.step_s / target_s)))


def fits(workload: Workload, target_s: float) -> bool:
    """Returns whether its step takes about ``target_s`` seconds: the smallest networks of a GPU do not."""
    return abs(log(workload.step_s / target_s)) < log(2)


def duration(seconds: float) -> str:
    """Returns the duration with its unit: ``50 us``, ``0.2 ms``."""
    return f"{1e6 * seconds:.0f} us" if seconds < 1e-4 else f"{1e3 * seconds:g} ms"
