"""Images with augmentation: a small convolutional network in Flax Linen learns digits from 400 examples.

    pip install flax scikit-learn
    python examples/images.py            # 40 epochs; kill it at any moment and start it again: it continues
    python examples/images.py --plain    # the same without augmentation, to compare
    python examples/images.py --small    # two short epochs, as in the tests

The augmentation is NumPy code in the data path: ``ArrayLoader(transform=)`` calls it on a thread that reads ahead,
while the device trains. Its random numbers depend only on seed, epoch and batch, so a run that was killed continues
with the pictures that it would have had. There are two evaluation sets: pictures as they are, and moved ones.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

import eventtrain as et
from eventtrain import subscribers as subs

TRAINED_ON = 400


class Network(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(x))


def augment(batch, rng):
    """Turns each image by up to 10 degrees, scales it by up to 10 percent, and moves it by up to half a pixel."""
    images, labels = batch
    count, height, width, _ = images.shape
    angle = np.deg2rad(rng.uniform(-10, 10, (count, 1, 1)))
    scale = rng.uniform(0.9, 1.1, (count, 1, 1))
    down, right = rng.uniform(-0.5, 0.5, (2, count, 1, 1))
    y, x = np.mgrid[:height, :width] - (np.array([height, width]) - 1).reshape(2, 1, 1) / 2
    from_y = scale * (np.cos(angle) * y - np.sin(angle) * x) + down + (height - 1) / 2
    from_x = scale * (np.sin(angle) * y + np.cos(angle) * x) + right + (width - 1) / 2
    number = np.broadcast_to(np.arange(count).reshape(-1, 1, 1), from_y.shape)
    return map_coordinates(images[..., 0], (number, from_y, from_x), order=1)[..., None], labels


def metrics_of(logits, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == labels)}


def train_step(state, batch):
    images, labels = batch
    dropout = jax.random.fold_in(jax.random.key(1), state.step)

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images, train=True, rngs={"dropout": dropout})
        return metrics_of(logits, labels)

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), metrics


def eval_step(state, batch):
    images, labels = batch
    return metrics_of(state.apply_fn({"params": state.params}, images, train=False), labels)[1]


def make_trainer(run_dir, subscribers=()):
    network = Network()
    params = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)["params"]
    optimiser = optax.inject_hyperparams(optax.adamw)(learning_rate=2e-3, weight_decay=1e-3)
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optimiser)
    return et.Trainer(train_step, state, eval_fn=eval_step, subscribers=subscribers, run_dir=run_dir)


def load(augmented=True):
    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    images, labels = (digits.images[order, ..., None] / 16).astype(np.float32), digits.target[order]
    data = et.ArrayLoader(
        (images[:TRAINED_ON], labels[:TRAINED_ON]),
        batch_size=40,
        seed=0,
        transform=augment if augmented else None,
    )
    held_out = images[TRAINED_ON:], labels[TRAINED_ON:]
    return data, {"clean": [held_out], "moved": [augment(held_out, rng)]}


def main(small=False, augmented=True):
    data, val_data = load(augmented)
    subscribers = [
        subs.ReduceLROnPlateau("val_clean_loss", factor=0.5, patience=5),
        subs.Checkpointer("checkpoints", every=50, keep_best=1, monitor="val_clean_loss"),
        subs.JSONLLogger("events.jsonl"),
    ]
    trainer = make_trainer("runs/images" if augmented else "runs/images-plain", subscribers)

    @trainer.on(et.EpochCompleted)
    async def report(event: et.EpochCompleted) -> None:
        clean, moved = (event.metrics[f"val_{name}_accuracy"] for name in val_data)
        print(
            f"epoch {event.epoch}: loss {event.metrics['loss']:.3f}, accuracy {clean:.3f}, moved {moved:.3f}"
        )

    result = trainer.fit(data, epochs=2 if small else 40, eval_data=val_data, resume=True, progress=False)
    print(f"step {result.step} ({result.stop_reason})")


if __name__ == "__main__":
    main(small="--small" in sys.argv, augmented="--plain" not in sys.argv)
