"""A model small enough to compile in a blink, which reports the learning rate that each step really used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eventtrain as et

OPTIMISER = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    rate = state["opt_state"].hyperparams["learning_rate"]
    updates, opt_state = OPTIMISER.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {"loss": loss, "rate": rate, "examples": jnp.int32(batch["x"].shape[0])}
    return {"params": params, "opt_state": opt_state}, metrics


def eval_fn(state: Any, batch: Any) -> dict[str, Any]:
    return {"loss": loss_fn(state["params"], batch), "examples": batch["x"].shape[0]}


def predict_fn(state: Any, batch: Any) -> jax.Array:
    return batch["x"] @ state["params"]["w"]


def new_state(rate: float = 0.5) -> Any:
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    params = {"w": jnp.zeros((3,))}
    return {"params": params, "opt_state": optimiser.init(params)}


def examples(count: int = 32) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 3)).astype(np.float32) * 0.1
    return {"x": x, "y": x @ np.array([1.0, -2.0, 0.5], np.float32)}


def batches(count: int, size: int = 4) -> list[dict[str, jax.Array]]:
    """``count`` batches that lie on the device."""
    arrays = examples(count * size)
    return [
        {name: jnp.asarray(array[i * size : (i + 1) * size]) for name, array in arrays.items()}
        for i in range(count)
    ]


def in_step(trainer: et.Trainer, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, each made when the steps of all before it are dispatched: data is read ahead otherwise."""
    first = trainer.step
    for index, batch in enumerate(batches):
        deadline_s = time.monotonic() + 60
        while trainer.step < first + index and time.monotonic() < deadline_s:
            time.sleep(0.0005)
        yield batch


def make_trainer(tmp_path: Any, **options: Any) -> et.Trainer:
    options.setdefault("eval_fn", eval_fn)
    options.setdefault("predict_fn", predict_fn)
    options.setdefault("drain_timeout_s", 10.0)
    return et.Trainer(step_fn, new_state(), run_dir=tmp_path / "run", **options)


def record(trainer: et.Trainer, *kinds: type[et.Event]) -> list[Any]:
    """Every event of ``kinds`` (all if none is named), in order of delivery; filled while the trainer runs."""
    seen: list[Any] = []

    @trainer.on(kinds or (et.Event,), name="record")
    async def keep(event: et.Event) -> None:
        seen.append(event)

    return seen
