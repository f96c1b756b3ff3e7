import jax
import jax.numpy as jnp
import optax

import eventtrain as et

optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.2)


def train_step(state, batch):
    loss, grads = jax.value_and_grad(lambda w: jnp.mean((w - batch) ** 2))(state["params"])
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}


params = jnp.zeros(3)
trainer = et.Trainer(train_step, {"params": params, "opt_state": optimiser.init(params)})


@trainer.on(et.EpochCompleted | et.HyperparamChanged)
async def report(event):
    print(event.step, event.metrics if event.kind == "epoch_completed" else f"{event.old} -> {event.new}")


@trainer.on(et.StepCompleted, every=100, lag=8)  # a decision takes effect exactly 8 steps later
async def decay(event, control):
    control.scale_hyperparam("learning_rate", 0.5, reason="another 100 steps")


result = trainer.fit([jnp.array([1.0, 2.0, 3.0])] * 150, epochs=2)
print(result.stop_reason, result.state["params"])
