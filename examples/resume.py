"""A run that can be killed at any moment. Start it, ``kill -9`` it, and start it again:

python examples/resume.py [run_dir]
python examples/resume.py [run_dir] --small    # 2 epochs, as in the tests

However often it is killed, it ends with the digest of an uninterrupted run, and its log has exactly one row per step.
"""

import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eventtrain as et
from eventtrain import subscribers as subs

optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


def loss_fn(params, batch):
    inputs, targets = batch
    return jnp.mean((jnp.tanh(inputs @ params["hidden"]) @ params["output"] - targets) ** 2)


def train_step(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}


rng = np.random.default_rng(0)
inputs = rng.normal(size=(65_536, 32)).astype(np.float32)
targets = np.sin(inputs.sum(axis=1, keepdims=True))
keys = jax.random.split(jax.random.key(0))
params = {
    "hidden": jax.random.normal(keys[0], (32, 256)) / 6,
    "output": jax.random.normal(keys[1], (256, 1)) / 16,
}

folders = [argument for argument in sys.argv[1:] if argument != "--small"]
trainer = et.Trainer(
    train_step,
    {"params": params, "opt_state": optimiser.init(params)},
    subscribers=[
        subs.Checkpointer("checkpoints", every=500),
        subs.JSONLLogger("events.jsonl"),
        subs.ReduceLROnPlateau("loss", patience=2),
    ],
    run_dir=folders[0] if folders else "runs/resume",
)
data = et.ArrayLoader((inputs, targets), batch_size=64, seed=1)
result = trainer.fit(data, epochs=2 if "--small" in sys.argv else 20, resume=True)
digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result.state)))
print(f"step {result.step} ({result.stop_reason}): state {digest.hexdigest()[:16]}")
