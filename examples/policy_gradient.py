"""Policy gradient (REINFORCE with a baseline): an agent learns to catch a ball, in a loop of your own.

    python examples/policy_gradient.py            # until it catches nearly every ball; kill it and start it again
    python examples/policy_gradient.py --small    # a few steps, as in the tests

The environment is plain NumPy on the host. Each step of training needs the newest weights for its episodes, so the
loop is yours: it opens a session, reads ``session.state``, plays, and calls ``session.step``. The return of each
episode is an event of the example's own type, which is logged and subscribed to like any other. Episodes start from
the number of the step, so that a resumed run plays those that it would have played. Events that a program publishes
itself are outside of what a resume repeats exactly: after a kill, episodes of one step may be logged twice, with the
same number.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eventtrain as et
from eventtrain import subscribers as subs

HEIGHT, WIDTH, EPISODES = 8, 7, 32


class EpisodeCompleted(et.Event):
    """One episode of the environment has ended."""

    episode: int
    episode_return: float


class Catch:
    """``EPISODES`` games side by side: a ball falls one row a move and drifts; the paddle moves by -1, 0 or 1.

    The reward is 1 for a ball that is caught in the last row, otherwise -1.
    """

    def __init__(self, rng):
        self.ball = rng.integers(0, WIDTH, EPISODES)
        self.drift = rng.integers(-1, 2, EPISODES)
        self.paddle = rng.integers(0, WIDTH, EPISODES)
        self.row = 0

    def observe(self):
        """float32[episodes, features]"""
        ball, paddle = np.eye(WIDTH)[self.ball], np.eye(WIDTH)[self.paddle]
        drift, row = np.eye(3)[self.drift + 1], np.tile(np.eye(HEIGHT)[self.row], (EPISODES, 1))
        return np.concatenate([ball, paddle, drift, row], axis=1, dtype=np.float32)

    def move(self, actions):
        """Returns the reward of each game, and whether the games have ended."""
        self.paddle = np.clip(self.paddle + actions - 1, 0, WIDTH - 1)
        self.ball = np.clip(self.ball + self.drift * (self.row % 2), 0, WIDTH - 1)
        self.row += 1
        ended = self.row == HEIGHT - 1
        return np.where(self.ball == self.paddle, 1.0, -1.0) * ended, ended


def logits_of(params, observations):
    return jnp.tanh(observations @ params["hidden"] + params["bias"]) @ params["out"]


@jax.jit
def act(params, observations, key):
    return jax.random.categorical(key, logits_of(params, observations))


def play(params, step):
    """Returns the moves of all episodes for the weights after ``step`` steps: observations, actions, returns."""
    environment, key = Catch(np.random.default_rng([0, step])), jax.random.key(step)
    observations, actions, returns, ended = [], [], np.zeros(EPISODES), False
    while not ended:
        key, draw = jax.random.split(key)
        observations.append(environment.observe())
        actions.append(np.asarray(act(params, observations[-1], draw)))
        rewards, ended = environment.move(actions[-1])
        returns += rewards
    return np.stack(observations), np.stack(actions), returns.astype(np.float32)


optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)


def train_step(state, batch):
    observations, actions, returns = batch  # [moves, episodes, ...], [moves, episodes], [episodes]

    def loss_fn(params):
        log_p = jax.nn.log_softmax(logits_of(params, observations))
        chosen = jnp.take_along_axis(log_p, actions[..., None], axis=-1)[..., 0]
        entropy = -(jnp.exp(log_p) * log_p).sum(-1).mean()
        return -jnp.mean(chosen * (returns - state["baseline"])) - 0.01 * entropy, entropy

    (loss, entropy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    baseline = 0.9 * state["baseline"] + 0.1 * returns.mean()
    metrics = {"loss": loss, "entropy": entropy, "mean_return": returns.mean(), "baseline": baseline}
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "baseline": baseline}, metrics


def make_state():
    one, two = jax.random.split(jax.random.key(0))
    features = 2 * WIDTH + 3 + HEIGHT
    params = {
        "hidden": jax.random.normal(one, (features, 64)) / np.sqrt(features),
        "bias": jnp.zeros(64),
        "out": jax.random.normal(two, (64, 3)) / 80,
    }
    return {"params": params, "opt_state": optimiser.init(params), "baseline": jnp.float32(0)}


def main(steps):
    trainer = et.Trainer(
        train_step,
        make_state(),
        subscribers=[
            subs.Checkpointer("checkpoints", every=50),
            subs.JSONLLogger("episodes.jsonl", events=EpisodeCompleted),
        ],
        run_dir="runs/policy_gradient",
    )

    returns: list[float] = []

    @trainer.on(EpisodeCompleted)
    async def report(event: EpisodeCompleted) -> None:
        returns.append(event.episode_return)
        if len(returns) == 50 * EPISODES:
            print(f"episode {event.episode}: mean return of the last {len(returns)} {np.mean(returns):+.2f}")
            returns.clear()

    @trainer.on(et.StepCompleted, lag=4, where=lambda event: event.metrics["baseline"] > 0.95)
    async def stop(event: et.StepCompleted, control: et.Control) -> None:
        control.stop("solved")

    with trainer.session(resume=True) as session:
        while session.step_count < steps:
            step = session.step_count
            batch = play(session.state["params"], step)
            if not session.step(batch):
                break
            for number, value in enumerate(batch[-1]):
                event = EpisodeCompleted(
                    step=step, episode=step * EPISODES + number, episode_return=float(value)
                )
                trainer.bus.publish(event)
    baseline = float(trainer.state["baseline"])
    print(f"step {trainer.step} ({session.stop_reason or 'all steps'}): mean return {baseline:+.2f}")


if __name__ == "__main__":
    main(10 if "--small" in sys.argv else 2_000)
