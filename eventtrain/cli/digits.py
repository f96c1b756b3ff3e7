"""The model of ``eventtrain demo``: scikit-learn's handwritten digits, a small network, and its steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eventtrain.subscribers._shared.optional_imports import import_optional

WIDTHS = (64, 512, 256, 10)
DROPOUT = 0.4
SPLIT_SEED = 0
LEARNING_RATE = 1e-3

State = dict[str, Any]
Batch = tuple[Any, Any]


def split_digits() -> tuple[Batch, Batch, Batch]:
    """Returns 1,797 images of 8 x 8 pixels: 70% to train, 15% to decide, 15% for one test at the end.

    They are standardised with the mean and the deviation of the training part.
    """
    digits: Any = import_optional("sklearn.datasets", extra="demo", used_by="The demo").load_digits()
    images, labels = digits.data.astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    parts = np.split(order, [int(0.7 * len(order)), int(0.85 * len(order))])
    mean, deviation = images[parts[0]].mean(), images[parts[0]].std()
    train, validation, test = (((images[part] - mean) / deviation, labels[part]) for part in parts)
    return train, validation, test


optimiser = optax.inject_hyperparams(optax.adamw)(learning_rate=LEARNING_RATE, weight_decay=1e-2)


def new_state(seed: int) -> State:
    """Returns weights, optimiser state and the random key for dropout."""
    key, *layer_keys = jax.random.split(jax.random.key(seed), len(WIDTHS))
    params = [
        {"weight": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
        for k, m, n in zip(layer_keys, WIDTHS, WIDTHS[1:], strict=False)
    ]
    return {"params": params, "opt_state": optimiser.init(params), "dropout": key}


def logits(
    params: list[dict[str, jax.Array]], images: jax.Array, dropout: jax.Array | None = None
) -> jax.Array:
    """Returns the output for ``images`` float32[batch, 64]; a key drops hidden units at random."""
    hidden = images
    for index, layer in enumerate(params[:-1]):
        hidden = jax.nn.relu(hidden @ layer["weight"] + layer["bias"])
        if dropout is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(dropout, index), 1 - DROPOUT, hidden.shape)
            hidden = jnp.where(kept, hidden / (1 - DROPOUT), 0)
    return hidden @ params[-1]["weight"] + params[-1]["bias"]


def metrics_of(outputs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Returns mean loss and accuracy of a batch."""
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
    return {"loss": loss, "accuracy": (outputs.argmax(-1) == labels).mean()}


def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """Updates the weights once by AdamW."""
    images, labels = batch
    key, dropout = jax.random.split(state["dropout"])

    def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        metrics = metrics_of(logits(params, images, dropout), labels)
        return metrics["loss"], metrics

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
    metrics["grad_norm"] = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "dropout": key}, metrics


def evaluate_step(state: State, batch: Batch) -> dict[str, jax.Array]:
    """Returns the metrics without dropout."""
    return metrics_of(logits(state["params"], batch[0]), batch[1])
