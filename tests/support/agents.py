"""A DQN and a PPO over a corridor, as functions: for loops of one's own, and for the bare loops they are compared with.

The corridor has 10 cells. An agent begins in the 4th and steps left or right; the last cell pays 1 and ends the
episode. State, environment and random key are one pytree, so that a checkpoint of it is a checkpoint of everything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

CELLS, START = 10, 3
OPTIMISER = optax.inject_hyperparams(optax.adam)(learning_rate=3e-3)


def moved(cell: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the next cell, the reward, and whether the episode has ended."""
    there = jnp.clip(cell + 2 * action - 1, 0, CELLS - 1)
    done = there == CELLS - 1
    return jnp.where(done, START, there), done.astype(jnp.float32), done


def network(key: jax.Array, outputs: int) -> dict[str, jax.Array]:
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (CELLS, 16)) * 0.3,
        "out": jax.random.normal(second, (16, outputs)) * 0.3,
    }


def forward(params: Any, cells: jax.Array) -> jax.Array:
    return jnp.tanh(jax.nn.one_hot(cells, CELLS) @ params["hidden"]) @ params["out"]


def updated(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
    updates, opt_state = OPTIMISER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


# --- DQN --------------------------------------------------------------------------------------------------

MEMORY, SAMPLED, SYNC = 64, 16, 10


class DQN(NamedTuple):
    params: Any
    target: Any
    opt_state: Any
    memory: Any  # of transitions
    count: jax.Array
    cell: jax.Array
    key: jax.Array


def new_dqn() -> DQN:
    params = network(jax.random.PRNGKey(0), 2)
    row = jnp.zeros(MEMORY, jnp.int32)
    memory = {"cell": row, "action": row, "reward": jnp.zeros(MEMORY), "there": row, "done": row > 0}
    return DQN(
        params,
        params,
        OPTIMISER.init(params),
        memory,
        jnp.int32(0),
        jnp.int32(START),
        jax.random.PRNGKey(1),
    )


@jax.jit
def interact(state: DQN) -> dict[str, Any]:
    """Returns one transition of the epsilon-greedy policy, with the cell and the key that follow."""
    key, explore, choose = jax.random.split(state.key, 3)
    greedy = jnp.argmax(forward(state.params, state.cell)).astype(jnp.int32)
    action = jnp.where(jax.random.uniform(explore) < 0.3, jax.random.randint(choose, (), 0, 2), greedy)
    there, reward, done = moved(state.cell, action)
    transition = {"cell": state.cell, "action": action, "reward": reward, "there": there, "done": done}
    return {"transition": transition, "cell": there, "key": key}


def dqn_step(state: DQN, batch: dict[str, Any]) -> tuple[DQN, dict[str, jax.Array]]:
    key, sample = jax.random.split(batch["key"])
    place = state.count % MEMORY
    memory = jax.tree.map(lambda rows, new: rows.at[place].set(new), state.memory, batch["transition"])
    count = state.count + 1
    drawn = jax.random.randint(sample, (SAMPLED,), 0, jnp.minimum(count, MEMORY))
    rows = jax.tree.map(lambda column: column[drawn], memory)

    def loss_fn(params: Any) -> jax.Array:
        best = forward(state.target, rows["there"]).max(-1)
        wanted = rows["reward"] + 0.9 * best * (1 - rows["done"])
        chosen = jnp.take_along_axis(forward(params, rows["cell"]), rows["action"][:, None], 1)[:, 0]
        return jnp.mean((chosen - wanted) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    params, opt_state = updated(state.params, state.opt_state, grads)
    state = DQN(params, state.target, opt_state, memory, count, batch["cell"], key)
    return state, {"loss": loss, "reward": batch["transition"]["reward"]}


# --- PPO --------------------------------------------------------------------------------------------------

ACTORS, LENGTH, ROUNDS = 8, 16, 4


class PPO(NamedTuple):
    params: Any
    opt_state: Any
    cells: jax.Array
    key: jax.Array


def new_ppo() -> PPO:
    params = network(jax.random.PRNGKey(2), 3)  # two logits and the value
    return PPO(params, OPTIMISER.init(params), jnp.full(ACTORS, START), jax.random.PRNGKey(3))


def policy(params: Any, cells: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = forward(params, cells)
    return jax.nn.log_softmax(out[..., :2]), out[..., 2]


@jax.jit
def rollout(state: PPO) -> dict[str, Any]:
    """Returns LENGTH moves of all actors with their advantages, and the cells and the key that follow."""

    def move(carry: Any, _: Any) -> tuple[Any, Any]:
        cells, key = carry
        key, draw = jax.random.split(key)
        logits, value = policy(state.params, cells)
        action = jax.random.categorical(draw, logits)
        logp = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        there, reward, done = moved(cells, action)
        return (there, key), {
            "cell": cells, "action": action, "logp": logp, "value": value, "reward": reward, "done": done,
        }  # fmt: skip

    (cells, key), moves = jax.lax.scan(move, (state.cells, state.key), None, LENGTH)

    def back(carry: Any, now: Any) -> tuple[Any, Any]:
        advantage, value = carry
        lives = 1.0 - now["done"]
        advantage = now["reward"] + 0.95 * value * lives - now["value"] + 0.95 * 0.9 * lives * advantage
        return (advantage, now["value"]), advantage

    last = policy(state.params, cells)[1]
    _, advantages = jax.lax.scan(back, (jnp.zeros(ACTORS), last), moves, reverse=True)
    return {"moves": {**moves, "advantage": advantages}, "cells": cells, "key": key}


def ppo_step(state: PPO, batch: dict[str, Any]) -> tuple[PPO, dict[str, jax.Array]]:
    moves = jax.tree.map(lambda column: column.reshape(-1), batch["moves"])

    def loss_fn(params: Any) -> jax.Array:
        logits, value = policy(params, moves["cell"])
        logp = jnp.take_along_axis(logits, moves["action"][:, None], 1)[:, 0]
        ratio, advantage = jnp.exp(logp - moves["logp"]), moves["advantage"]
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage).mean()
        return 0.5 * jnp.mean((value - moves["value"] - advantage) ** 2) - gain

    def improve(carry: Any, _: Any) -> tuple[Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(carry[0])
        return updated(*carry, grads), loss

    (params, opt_state), losses = jax.lax.scan(improve, (state.params, state.opt_state), None, ROUNDS)
    metrics = {"loss": losses[-1], "reward": moves["reward"].mean()}
    return PPO(params, opt_state, batch["cells"], batch["key"]), metrics
