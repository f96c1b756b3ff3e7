"""A classifier of spoken-like words: synthesised vowels in noise, and a convolution over their spectrograms.

    python examples/speech_like.py            # 8 epochs; kill it at any moment and start it again: it continues
    python examples/speech_like.py --small    # two short epochs, as in the tests

A word is two vowels, one after the other: "a-i" and "i-a" have the same spectrum and differ in their order. The data
is made while training runs, by a class with a ``start`` (so that a resumed run makes no batch twice) and a
``fingerprint`` (so that a run resumed with other data says so). The waves become spectrograms inside the compiled
step. The evaluation returns a confusion matrix beside the loss.
"""

import sys
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eventtrain as et
from eventtrain import subscribers as subs

RATE_HZ, LENGTH, FRAME, HOP = 8_000, 4_096, 256, 128
FORMANTS_HZ = {"a": (730, 1090), "i": (270, 2290), "u": (300, 870)}
WORDS = [(one, other) for one in FORMANTS_HZ for other in FORMANTS_HZ]


@dataclass(frozen=True)
class Words:
    """``batches`` batches of ``size`` words an epoch; each depends only on the seed, the epoch and its number."""

    batches: int
    size: int = 32
    seed: int = 0

    def __len__(self):
        return self.batches

    def __call__(self, epoch, start=0):
        for number in range(start, self.batches):
            yield self.make(np.random.default_rng([self.seed, epoch, number]))

    def fingerprint(self):
        return asdict(self)

    def make(self, rng):
        labels = rng.integers(0, len(WORDS), self.size)
        pitch_hz, middle = rng.uniform(90, 220, self.size), rng.uniform(0.35, 0.65, self.size)
        seconds = np.arange(LENGTH) / RATE_HZ
        harmonics_hz = pitch_hz[:, None] * np.arange(1, 31)  # (words, harmonics)
        waves = np.sin(2 * np.pi * harmonics_hz[:, :, None] * seconds)
        formants = np.array([[FORMANTS_HZ[vowel] for vowel in WORDS[label]] for label in labels])
        formants = formants * rng.uniform(0.9, 1.1, (self.size, 1, 2))  # (words, vowels, formants)
        distance = (harmonics_hz[:, None, :, None] - formants[:, :, None, :]) / 120
        loudness = np.exp(-0.5 * distance**2).sum(-1)  # (words, vowels, harmonics)
        second = 1 / (1 + np.exp(-80 * (np.arange(LENGTH) / LENGTH - middle[:, None])))
        vowels = loudness @ waves  # (words, vowels, time)
        sound = vowels[:, 0] * (1 - second) + vowels[:, 1] * second + rng.normal(0, 2.0, second.shape)
        return sound.astype(np.float32), labels.astype(np.int32)


def spectrogram(waves):
    """float32[words, time] -> float32[words, frames, frequencies], the logarithm of the power."""
    starts = np.arange(0, LENGTH - FRAME + 1, HOP)[:, None]
    frames = waves[:, starts + np.arange(FRAME)] * np.hanning(FRAME).astype(np.float32)
    return jnp.log1p(jnp.abs(jnp.fft.rfft(frames)) ** 2) / 5


def logits_of(params, waves):
    x = spectrogram(waves)
    for layer in params["convolutions"]:
        x = jax.lax.conv_general_dilated(x, layer["w"], (2,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"))
        x = jax.nn.relu(x + layer["b"])
    return x.reshape(len(x), -1) @ params["out"]


@jax.tree_util.register_dataclass
@dataclass
class Confusion:
    """Counts of (true, predicted) words, added up over the batches of an evaluation."""

    counts: jax.Array

    def merge(self, other):
        return Confusion(self.counts + other.counts)

    def compute(self):
        return {"matrix": self.counts, "accuracy": jnp.trace(self.counts) / self.counts.sum()}


def loss_of(params, batch):
    logits = logits_of(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), logits


def eval_step(state, batch):
    loss, logits = loss_of(state["params"], batch)
    counts = jnp.zeros((len(WORDS), len(WORDS)), jnp.int32).at[batch[1], logits.argmax(-1)].add(1)
    return {"loss": loss, "words": Confusion(counts)}


optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


def train_step(state, batch):
    (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}


def make_params():
    widths = (FRAME // 2 + 1, 32, 32)
    keys = jax.random.split(jax.random.key(0), 3)
    convolutions = [
        {"w": jax.random.normal(key, (5, fan_in, out)) / np.sqrt(5 * fan_in), "b": jnp.zeros(out)}
        for key, fan_in, out in zip(keys, widths, widths[1:], strict=False)
    ]
    return {"convolutions": convolutions, "out": jax.random.normal(keys[2], (8 * 32, len(WORDS))) / 16}


def main(small=False):
    data, val_data = Words(4 if small else 60), Words(2 if small else 20, seed=1)(0)
    val_data = list(val_data)
    params = make_params()
    trainer = et.Trainer(
        train_step,
        {"params": params, "opt_state": optimiser.init(params)},
        eval_fn=eval_step,
        subscribers=[
            subs.EarlyStopping("val_words/accuracy", mode="max", patience=3, restore_best_weights=True),
            subs.Checkpointer("checkpoints", every=25),
        ],
        run_dir="runs/speech_like",
    )
    matrices = []

    @trainer.on(et.EvalCompleted)
    async def remember(event: et.EvalCompleted) -> None:
        matrices.append(event.arrays["words/matrix"])
        print(f"step {event.step}: accuracy {event.metrics['words/accuracy']:.3f}")

    result = trainer.fit(data, epochs=2 if small else 8, eval_data=val_data, resume=True)
    print(f"step {result.step} ({result.stop_reason})")
    if matrices:
        for word, row in zip(WORDS, matrices[-1], strict=True):
            print("-".join(word), *(f"{count:3d}" for count in row))


if __name__ == "__main__":
    main(small="--small" in sys.argv)
