"""A character language model in Flax NNX, on the help texts that come with Python.

    pip install flax
    python examples/char_lm.py            # 6 epochs; kill it at any moment and start it again: it continues
    python examples/char_lm.py --small    # a few steps of a tiny model, as in the tests

The optimiser warms up, clips the gradient, decays matrices only, and updates the weights after every second batch.
Twice an epoch the model continues a text, which is an event like any other (``SampleTaken``).
"""

import math
import re
import sys
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import eventtrain as et
from eventtrain import subscribers as subs


class Size(NamedTuple):
    context: int = 64
    width: int = 96
    blocks: int = 2
    batch: int = 16
    characters: int = 400_000
    epochs: int = 6


FULL = Size()
SMALL = Size(context=16, width=16, blocks=1, batch=16, characters=4_000, epochs=1)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm, self.other_norm = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(jax.nn.gelu(self.up(self.other_norm(x))))


class Model(nnx.Module):
    def __init__(self, alphabet, size, rngs):
        self.characters = nnx.Embed(alphabet, size.width, rngs=rngs)
        self.positions = nnx.Embed(size.context, size.width, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(size.width, rngs) for _ in range(size.blocks)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, alphabet, rngs=rngs)

    def __call__(self, tokens):
        x = self.characters(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        return self.head(self.norm(self.blocks(x)))


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_optimiser(steps, every):
    """Returns AdamW with warm-up and cosine decay for ``steps`` batches, of which ``every`` make one update."""
    updates = max(2, steps // every)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, updates // 10), updates, end_value=3e-4)
    adamw = optax.adamw(rate, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p))
    return optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), adamw), every_k_schedule=every)


def write(model, key, prompt, count):
    """Returns ``count`` tokens that the model continues ``prompt`` with."""

    def add(window, key):
        logits = model(window[None])[0, -1]
        token = jax.random.categorical(key, logits / 0.7)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(add, jnp.asarray(prompt), jax.random.split(key, count))[1]


def main(size=FULL):
    text = "\n".join(topics[name] for name in sorted(topics))
    text = re.sub(r"([ *.=^~-])\1{2,}", r"\1", text)[: size.characters]  # no rules and indentation
    alphabet = sorted(set(text))
    tokens = np.searchsorted(alphabet, list(text)).astype(np.int32)
    rows = tokens[: len(tokens) // (size.context + 1) * (size.context + 1)].reshape(-1, size.context + 1)
    held_out = len(rows) // 10
    data = et.ArrayLoader(rows[held_out:], batch_size=size.batch)
    val_data = et.ArrayLoader(rows[:held_out], batch_size=size.batch, shuffle=False)

    model = Model(len(alphabet), size, nnx.Rngs(0))
    optimiser = nnx.Optimizer(model, make_optimiser(size.epochs * len(data), every=2), wrt=nnx.Param)
    graph, state = nnx.split((model, optimiser))

    def train_step(state, batch):
        model, optimiser = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(loss_of)(model, batch)
        optimiser.update(model, grads)
        return nnx.state((model, optimiser)), {"loss": loss, **et.norms(grads, prefix="grad_norm", depth=0)}

    def sample(state):
        model, _ = nnx.merge(graph, state)
        return write(model, jax.random.key(0), rows[0, : size.context], 120)

    trainer = et.Trainer(
        train_step,
        state,
        eval_fn=lambda state, batch: {"loss": loss_of(nnx.merge(graph, state)[0], batch)},
        derive={"bits_per_character": lambda means: means["loss"] / math.log(2)},
        subscribers=[
            subs.Sample(
                sample,
                every=max(1, len(data) // 2),
                name="line",
                decode=lambda ids: "".join(alphabet[i] for i in ids),
            ),
            subs.Checkpointer("checkpoints", every=100),
            subs.JSONLLogger("events.jsonl"),
            subs.TerminateOnNaN(),
        ],
        run_dir="runs/char_lm",
    )

    @trainer.on(et.SampleTaken | et.EpochCompleted)
    async def report(event: et.SampleTaken | et.EpochCompleted) -> None:
        if isinstance(event, et.SampleTaken):
            print(f"step {event.step}: {event.value!r}")
        else:
            print(f"epoch {event.epoch}: {event.metrics['val_bits_per_character']:.2f} bits per character")

    result = trainer.fit(data, epochs=size.epochs, eval_data=val_data, resume=True)
    print(f"step {result.step} ({result.stop_reason})")


if __name__ == "__main__":
    main(SMALL if "--small" in sys.argv else FULL)
