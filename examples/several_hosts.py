"""Trains on several processes, is killed at any moment, and continues on any number of processes.

    eventtrain launch -n 2 examples/several_hosts.py
    eventtrain launch -n 4 examples/several_hosts.py     # continues where the other was killed

Process 0 decides and logs; each process writes its own part of every checkpoint.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import eventtrain as et
from eventtrain import subscribers as subs

jax.distributed.initialize()
mesh = jax.make_mesh((jax.device_count(),), ("data",))
rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=0.05)


def put(value, sharding=everywhere):
    """Makes the parts of this process of an array over all devices. Each process has the same ``value``."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def step(state, batch):
    """Fits a line by least squares."""

    def loss_of(params):
        features, targets = batch
        return jnp.mean((features @ params["w"] + params["b"] - targets) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}


rng = np.random.default_rng(0)
features = rng.normal(size=(4096, 8)).astype(np.float32)
targets = features @ np.arange(8, dtype=np.float32) + 0.1 * rng.normal(size=4096).astype(np.float32)
data = et.ArrayLoader((features, targets), batch_size=64, sharding=rows)

params = {"w": np.zeros(8, np.float32), "b": np.float32(0)}
state = jax.tree.map(put, {"params": params, "opt_state": jax.tree.map(np.asarray, optimiser.init(params))})
trainer = et.Trainer(
    step,
    state,
    run_dir=Path(sys.argv[1] if len(sys.argv) > 1 else "runs/several-hosts"),
    run_id="several-hosts",
    subscribers=[
        subs.Checkpointer("checkpoints", every=20),
        subs.JSONLLogger("events.jsonl"),
        subs.ReduceLROnPlateau(monitor="loss", patience=2, min_delta=1e-3),
    ],
)


@trainer.on(et.EpochCompleted)
async def report(event: et.EpochCompleted) -> None:
    """Runs in process 0 alone."""
    print(f"epoch {event.epoch}: loss {event.metrics['loss']:.4f}", flush=True)


result = trainer.fit(data, epochs=10, resume=True, progress=False)
print(f"process {jax.process_index()} of {jax.process_count()}: {result.step} steps", flush=True)
