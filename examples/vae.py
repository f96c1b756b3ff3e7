"""A variational autoencoder of digits: two optimisers, addressed by path, and a KL weight that grows.

    pip install scikit-learn matplotlib
    python examples/vae.py            # 40 epochs; then open runs/vae/report.html
    python examples/vae.py --small    # two short epochs, as in the tests

Encoder and decoder have an optimiser each. Both have a hyperparameter ``learning_rate``; ``path=`` selects one of
them, here for a schedule of the decoder and a policy of the encoder. The weight of the KL term is a hyperparameter of
the step itself (``et.hyperparams``). Every few epochs the decoder draws digits from noise, which the report shows.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import eventtrain as et
from eventtrain import subscribers as subs

PIXELS, HIDDEN, LATENT = 64, 128, 8
optimisers = {
    "encoder": optax.inject_hyperparams(optax.adam)(learning_rate=2e-3),
    "decoder": optax.inject_hyperparams(optax.adam)(learning_rate=2e-3),
}


def make_network(key, fan_in, fan_out):
    one, two = jax.random.split(key)
    return {
        "hidden": jax.random.normal(one, (fan_in, HIDDEN)) / np.sqrt(fan_in),
        "bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(two, (HIDDEN, fan_out)) / np.sqrt(HIDDEN),
        "out_bias": jnp.zeros(fan_out),
    }


def apply(network, x):
    return jax.nn.relu(x @ network["hidden"] + network["bias"]) @ network["out"] + network["out_bias"]


def loss_of(params, images, key, kl_weight):
    mean, log_var = jnp.split(apply(params["encoder"], images), 2, axis=-1)
    code = mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
    pixels = optax.sigmoid_binary_cross_entropy(apply(params["decoder"], code), images).sum(-1).mean()
    kl = 0.5 * (jnp.exp(log_var) + mean**2 - 1 - log_var).sum(-1).mean()
    return pixels + kl_weight * kl, {"elbo": -(pixels + kl), "pixels": pixels, "kl": kl}


def train_step(state, images):
    key = jax.random.fold_in(jax.random.key(1), state["step"])
    kl_weight = state["hyperparams"]["kl_weight"]
    grads, metrics = jax.grad(loss_of, has_aux=True)(state["params"], images, key, kl_weight)
    params, opt_states = {}, {}
    for name, optimiser in optimisers.items():
        updates, opt_states[name] = optimiser.update(grads[name], state["opt_state"][name])
        params[name] = optax.apply_updates(state["params"][name], updates)
    return {**state, "params": params, "opt_state": opt_states, "step": state["step"] + 1}, metrics


def eval_step(state, images):
    return loss_of(state["params"], images, jax.random.key(2), 1.0)[1]


def draw(state):
    """Returns 16 digits in a square, from the same noise each time."""
    noise = jax.random.normal(jax.random.key(3), (16, LATENT))
    images = jax.nn.sigmoid(apply(state["params"]["decoder"], noise)).reshape(4, 4, 8, 8)
    return images.transpose(0, 2, 1, 3).reshape(32, 32)


def make_state():
    one, two = jax.random.split(jax.random.key(0))
    params = {
        "encoder": make_network(one, PIXELS, 2 * LATENT),
        "decoder": make_network(two, LATENT, PIXELS),
    }
    return {
        "params": params,
        "opt_state": {name: optimisers[name].init(params[name]) for name in params},
        "hyperparams": et.hyperparams(kl_weight=0.0),
        "step": jnp.int32(0),
    }


def main(small=False):
    images = (load_digits().data / 16).astype(np.float32)
    data = et.ArrayLoader(images[: 200 if small else 1500], batch_size=50)
    epochs = 2 if small else 40
    trainer = et.Trainer(
        train_step,
        make_state(),
        eval_fn=eval_step,
        subscribers=[
            subs.HyperparamScheduler("kl_weight", lambda epoch: min(1.0, (epoch + 1) / 10)),
            subs.LearningRateScheduler(optax.cosine_decay_schedule(2e-3, epochs), path="decoder"),
            subs.ReduceLROnPlateau("val_elbo", mode="max", factor=0.5, patience=4, path="encoder"),
            subs.Sample(draw, every_epochs=1 if small else 10, name="digits", media="image"),
            subs.Checkpointer("checkpoints", every_epochs=5),
            subs.JSONLLogger("events.jsonl"),
            subs.Report("report.html"),
        ],
        run_dir="runs/vae",
    )

    @trainer.on(et.EpochCompleted, every=1 if small else 5)
    async def report(event: et.EpochCompleted) -> None:
        metrics = event.metrics
        print(f"epoch {event.epoch}: val_elbo {metrics['val_elbo']:.2f}, val_kl {metrics['val_kl']:.2f}")

    result = trainer.fit(data, epochs=epochs, eval_data=[images[1500:]], resume=True)
    print(f"step {result.step} ({result.stop_reason})")
    for path, value in trainer.control.hyperparams.items():  # the path, where several have the same name
        if "learning_rate" in path:
            print(f"{path} = {value:.2g}")


if __name__ == "__main__":
    main(small="--small" in sys.argv)
