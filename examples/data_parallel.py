"""Data parallel training over a mesh: each device computes the gradient of its part of the batch.

    python examples/data_parallel.py            # on all GPUs, or on four devices that the CPU pretends to have
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python examples/data_parallel.py   # resumes on two
    python examples/data_parallel.py --fsdp     # the state is divided too
    python examples/data_parallel.py --small    # two short epochs, as in the tests

The step is that of one device. ``batch_sharding=`` says how batches are divided, and JAX divides the work. A
checkpoint is read on any number of devices.
"""

import os
import sys

os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=4"
)  # concerns CPUs only; before jax

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eventtrain as et
from eventtrain import subscribers as subs

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=3e-3)


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"] - y) ** 2)


def train_step(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    metrics = {"loss": loss, **et.norms(grads, prefix="grad_norm", depth=0)}
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, metrics


def make_state():
    one, two = jax.random.split(jax.random.key(0))
    params = {
        "in": jax.random.normal(one, (16, 256)) / 4,
        "bias": jnp.zeros(256),
        "out": jax.random.normal(two, (256,)) / 16,
    }
    return {"params": params, "opt_state": optimiser.init(params)}


def divided(leaf):
    """Returns a sharding that divides the first axis with the devices, if it can be divided equally."""
    for axis, size in enumerate(leaf.shape):
        if size % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    return everywhere


def main(small=False, fsdp=False):
    shapes = jax.eval_shape(make_state)
    shardings = jax.tree.map(divided if fsdp else lambda leaf: everywhere, shapes)
    x = np.random.default_rng(0).normal(size=(8192, 16)).astype(np.float32)
    y = np.sin(x).sum(axis=1)
    data = et.ArrayLoader((x[:1024], y[:1024]) if small else (x[:7168], y[:7168]), batch_size=128)
    trainer = et.Trainer(
        train_step,
        jax.jit(make_state, out_shardings=shardings)(),  # so that no device ever holds all of a divided state
        eval_fn=lambda state, batch: {"loss": loss_fn(state["params"], batch)},
        batch_sharding=rows,
        subscribers=[subs.Checkpointer("checkpoints", every=100)],
        run_dir="runs/data_parallel",
    )

    @trainer.on(et.EpochCompleted, every=1 if small else 5)
    async def report(event: et.EpochCompleted) -> None:
        print(
            f"epoch {event.epoch}: loss {event.metrics['loss']:.3f}, val_loss {event.metrics['val_loss']:.3f}"
        )

    result = trainer.fit(data, epochs=2 if small else 20, eval_data=[(x[7168:], y[7168:])], resume=True)
    part = result.state["params"]["in"].addressable_shards[0].data
    print(
        f"step {result.step} ({result.stop_reason}) on {mesh.size} devices; the first holds {part.shape} of (16, 256)"
    )


if __name__ == "__main__":
    main(small="--small" in sys.argv, fsdp="--fsdp" in sys.argv)
