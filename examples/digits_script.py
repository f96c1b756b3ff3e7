"""Handwritten digits for ``eventtrain run``. The model and the data are defined here, the subscribers in run.toml:

eventtrain run examples/digits_script.py --config examples/run.toml --set early_stopping.patience=8
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import eventtrain as et

optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=3e-3)


def metrics_of(params, batch):
    images, labels = batch
    hidden = jax.nn.relu(images @ params["hidden"])
    logits = hidden @ params["output"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == labels)}


def train_step(state, batch):
    grads, metrics = jax.grad(metrics_of, has_aux=True)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, metrics


def make_trainer(subscribers):
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": jax.random.normal(keys[0], (64, 128)) / 8,
        "output": jax.random.normal(keys[1], (128, 10)) / 11,
    }
    return et.Trainer(
        train_step,
        {"params": params, "opt_state": optimiser.init(params)},
        eval_fn=lambda state, batch: metrics_of(state["params"], batch)[1],
        subscribers=subscribers,
        run_dir="runs/digits",  # fixed, so that --resume finds the checkpoints
    )


digits = load_digits()
images = (digits.data / 16).astype(np.float32)
labels = digits.target.astype(np.int32)
data = et.ArrayLoader((images[:1400], labels[:1400]), batch_size=50)
eval_data = [(images[1400:], labels[1400:])]
