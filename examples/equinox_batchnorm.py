"""Equinox with batch normalisation: the model, its running statistics and the optimiser are one state.

    pip install equinox scikit-learn
    python examples/equinox_batchnorm.py            # until 5 epochs bring no improvement
    python examples/equinox_batchnorm.py --small    # two short epochs, as in the tests

The functions inside an Equinox module (activations) need no filter: eventtrain keeps what is not an array as it is.
With ``params=`` the statistics count as weights, so that the best weights come back with the statistics that they were
measured with.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import eventtrain as et
from eventtrain import subscribers as subs


class Network(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Linear(64, 64, key=keys[0]),
            eqx.nn.BatchNorm(64, axis_name="batch", mode="batch", momentum=0.9),
            jax.nn.relu,
            eqx.nn.Linear(64, 64, key=keys[1]),
            eqx.nn.BatchNorm(64, axis_name="batch", mode="batch", momentum=0.9),
            jax.nn.relu,
            eqx.nn.Linear(64, 10, key=keys[2]),
        ]

    def __call__(self, x, statistics):
        for layer in self.layers:
            if isinstance(layer, eqx.nn.BatchNorm):
                x, statistics = layer(x, statistics)
            else:
                x = layer(x)
        return x, statistics


def metrics_of(model, statistics, batch):
    images, labels = batch
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    logits, statistics = batched(images, statistics)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (statistics, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == labels)})


optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=3e-3)


def train_step(state, batch):
    model = state["model"]
    gradient = eqx.filter_grad(metrics_of, has_aux=True)
    grads, (statistics, metrics) = gradient(model, state["statistics"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {
        "model": eqx.apply_updates(model, updates),
        "statistics": statistics,
        "opt_state": opt_state,
    }, metrics


def eval_step(state, batch):
    model = eqx.nn.inference_mode(state["model"])  # uses the running statistics
    return metrics_of(model, state["statistics"], batch)[1][1]


def weights_and_statistics(state):
    return {"model": state["model"], "statistics": state["statistics"]}


def make_state():
    model, statistics = eqx.nn.make_with_state(Network)(jax.random.key(0))
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    return {"model": model, "statistics": statistics, "opt_state": opt_state}


def main(small=False):
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    data = et.ArrayLoader((images[:1200], labels[:1200]), batch_size=200 if small else 40)
    trainer = et.Trainer(
        train_step,
        make_state(),
        eval_fn=eval_step,
        params=weights_and_statistics,
        subscribers=[
            subs.EarlyStopping("val_loss", patience=5, restore_best_weights=True),
            subs.Checkpointer("checkpoints", every=20),
        ],
        run_dir="runs/equinox_batchnorm",
    )

    @trainer.on(et.EpochCompleted)
    async def report(event: et.EpochCompleted) -> None:
        metrics = event.metrics
        print(f"epoch {event.epoch}: loss {metrics['loss']:.3f}, val_accuracy {metrics['val_accuracy']:.3f}")

    val_data = [(images[1200:], labels[1200:])]
    result = trainer.fit(data, epochs=2 if small else 60, eval_data=val_data, resume=True)
    print(f"step {result.step} ({result.stop_reason})")
    print(f"accuracy of the best weights {trainer.evaluate(val_data)['accuracy']:.3f}")


if __name__ == "__main__":
    main(small="--small" in sys.argv)
