"""A custom subscriber: asynchronous, with state that survives a restart, and decisions at exact steps.

It halves the learning rate when the loss jumps far above its running mean. With ``lag=8`` on StepCompleted the cut
takes effect exactly eight steps after the jump, however slow this handler or the machine is. The run is the same every
time.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eventtrain as et


class CutOnSpike(et.Subscriber):
    """Halves ``learning_rate`` when the loss exceeds ``factor`` times its running mean, at most once in 20 steps."""

    lag: ClassVar = {et.StepCompleted: 8}

    def __init__(self, factor: float = 5.0) -> None:
        self.factor = factor
        self.mean: float | None = None
        self.last_cut = -20

    async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
        loss = event.metrics["loss"]
        if self.mean is not None and loss > self.factor * self.mean and event.step - self.last_cut >= 20:
            self.last_cut = event.step
            control.scale_hyperparam(
                "learning_rate", 0.5, reason=f"loss {loss:.3g}, running mean {self.mean:.3g}"
            )
        self.mean = loss if self.mean is None else 0.9 * self.mean + 0.1 * loss

    async def on_hyperparam_changed(self, event: et.HyperparamChanged) -> None:
        print(f"step {event.step}: {event.name} {event.old:.3g} -> {event.new:.3g} ({event.reason})")

    def state_dict(self):
        return {"mean": self.mean, "last_cut": self.last_cut}

    def load_state_dict(self, state):
        self.mean, self.last_cut = state["mean"], state["last_cut"]


optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.05)


def train_step(state, batch):
    loss, grads = jax.value_and_grad(lambda w: jnp.mean((w - batch) ** 2))(state["params"])
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}


def batches(epoch: int):
    """Yields targets near 1; the batch with index 40 is broken."""
    rng = np.random.default_rng(epoch)
    for index in range(100):
        yield rng.normal(1.0, 0.3, 16).astype(np.float32) + (50.0 if index == 40 else 0.0)


if __name__ == "__main__":
    params = jnp.zeros(16)
    trainer = et.Trainer(
        train_step, {"params": params, "opt_state": optimiser.init(params)}, subscribers=[CutOnSpike()]
    )
    result = trainer.fit(batches, epochs=2)
    print(f"{result.step} steps; mean weight {result.state['params'].mean():.2f}")
