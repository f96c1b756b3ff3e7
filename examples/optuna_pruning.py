"""A search with Optuna that stops trials which fall behind: ``python examples/optuna_pruning.py``.

Needs ``pip install optuna``. Pruning is a handler with ``lag=0``: it reports the metric of each epoch to the trial, and
stops the run before the next epoch if the study prunes it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna

import eventtrain as et

optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
x = np.random.default_rng(0).normal(size=(512, 4)).astype(np.float32)
y = x @ np.array([1, -2, 3, 0.5], np.float32)
data = et.ArrayLoader((x, y), batch_size=32)


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch[0] @ params - batch[1]) ** 2)


def train_step(state: Any, batch: Any) -> Any:
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}


def prune(trainer: et.Trainer[Any], trial: optuna.Trial, monitor: str) -> None:
    """Have ``trial`` decide after each epoch whether the run continues."""

    @trainer.on(et.EpochCompleted, lag=0, on_error="fail", name="optuna")
    def report(
        event: et.EpochCompleted, control: et.Control
    ) -> None:  # in a thread: a study may be in a database
        trial.report(float(event.metrics[monitor]), event.epoch)
        if trial.should_prune():
            control.stop("pruned")


def objective(trial: optuna.Trial) -> float:
    rate, params = trial.suggest_float("learning_rate", 1e-4, 0.1, log=True), jnp.zeros(4)
    opt_state = optax.inject_hyperparams(optax.sgd)(learning_rate=rate).init(params)
    trainer = et.Trainer(train_step, {"params": params, "opt_state": opt_state})
    prune(trainer, trial, "loss")
    result = trainer.fit(data, epochs=5)
    if result.stop_reason == "pruned":
        raise optuna.TrialPruned
    return float(result.history[-1].metrics["loss"])


def search(trials: int) -> optuna.Study:
    """Return a study of so many trials."""
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
    )
    study.optimize(objective, n_trials=trials)
    return study


if __name__ == "__main__":
    study = search(10)
    for trial in study.trials:
        print(trial.number, trial.state.name, f"{trial.params['learning_rate']:.2g}")
    print(f"best: {study.best_params['learning_rate']:.2g}")
