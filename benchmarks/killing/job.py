"""A small training job that resumes from its folder, and a process that forks such jobs quickly.

``python -m benchmarks.killing.job`` reads a folder and a mode per line and forks a job for each. It answers with the
process id and, when the job has ended, with its exit status. Importing JAX and Orbax takes 1.4 s; forking a process
that has imported them, but has not started a backend, takes milliseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import uvicorn
from starlette.applications import Starlette

import eventtrain as et
from eventtrain import subscribers as subs

EPOCHS, STEPS = 5, 12
RESULT = "result.json"
OFTEN_S = 0.01
"""Sleeps between two groups of rows, so that many kills hit one that is being written."""
optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=0.05)


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def train_step(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    key, noise_key = jax.random.split(state["key"])
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    noise = 1e-3 * jax.random.normal(noise_key, grads["w"].shape)
    updates, opt_state = optimiser.update({"w": grads["w"] + noise}, state["opt_state"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {
        "loss": loss,
        "rate": state["opt_state"].hyperparams["learning_rate"],
        "first": batch["x"][0, 0],
    }
    return {"params": params, "opt_state": opt_state, "key": key}, metrics


def new_state() -> Any:
    params = {"w": jnp.zeros(8)}
    return {"params": params, "opt_state": optimiser.init(params), "key": jax.random.key(0)}


class Stage:
    """Reports the progress of the job by files in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reach(self, name: str) -> None:
        """Creates a file of this name."""
        (self._folder / f"reached-{name}").touch()

    def step_fn(self, state: Any, batch: Any) -> Any:
        """Makes compiling take a while."""
        self.reach("compile")
        time.sleep(0.3)
        return train_step(state, batch)

    def batches(self, loader: et.ArrayLoader) -> Any:
        """Yields batches slowly enough for a kill."""

        def batches(epoch: int, start: int = 0) -> Iterator[Any]:
            for index, batch in enumerate(loader(epoch, start=start), start):
                time.sleep(0.004)
                if (epoch, index) == (1, 5):
                    self.reach("epoch")
                yield batch

        return batches

    def eval_batches(self, batch: Any) -> Any:
        """Yields the same batch three times."""

        def batches(epoch: int) -> Iterator[Any]:
            for index in range(3):
                if (epoch, index) == (1, 1):
                    self.reach("eval")
                time.sleep(0.02)
                yield batch

        return batches


def run_job(folder: Path, how: str = "fit", every: int = 4) -> None:
    """Trains, from the newest checkpoint if there is one, and writes the result to ``result.json``.

    ``how``: "fit"; "service": beside a web server, until it shuts down; "files": with every file logger.
    """
    stage = Stage(folder)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4 * STEPS, 8)).astype(np.float32)
    data = {"x": x, "y": x @ np.linspace(-1, 1, 8, dtype=np.float32)}
    loader = et.ArrayLoader(data, batch_size=4, seed=7)
    stopping = subs.EarlyStopping("val_loss", patience=50, restore_best_weights=True)
    plateau = subs.ReduceLROnPlateau("loss", factor=0.7, patience=1, min_delta=1.0)
    trainer = et.Trainer(
        stage.step_fn,
        new_state(),
        eval_fn=lambda state, batch: {"loss": loss_fn(state["params"], batch)},
        subscribers=[
            subs.JSONLLogger("events.jsonl"),
            *(file_loggers() if how == "files" else ()),
            stopping,
            plateau,
            subs.GradientSpike("loss", window=8, warmup=4, threshold=1.0, cooldown=4, lag=3),
            subs.Checkpointer("checkpoints", every=every, max_to_keep=None),
        ],
        step_extensions=[et.EMA(0.9, use_for=["eval"])],
        run_dir=folder,
    )

    @trainer.on(et.StepCompleted, every=3, lag=5, name="shrinks")
    async def shrink(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.99)

    aim: dict[str, Any] = {"epochs": EPOCHS, "eval_data": stage.eval_batches(data), "resume": True}
    result = serve(trainer, stage.batches(loader), aim) if how == "service" else trainer.fit(
        stage.batches(loader), progress=False, **aim
    )  # fmt: skip
    if result.stop_reason == "preempted":
        return
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((result.state, trainer.extension_states())):
        value = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(np.asarray(value).tobytes())
    states = [stopping.state_dict(), plateau.state_dict()]
    reached = {
        "step": result.step,
        "reason": result.stop_reason,
        "state": digest.hexdigest(),
        "policies": states,
    }
    temporary = folder / f"{RESULT}.part"
    temporary.write_text(json.dumps(reached))
    temporary.rename(folder / RESULT)


def file_loggers() -> list[et.Subscriber]:
    """Returns the loggers besides ``events.jsonl``; ``benchmarks.killing.files`` reads their files."""
    return [
        subs.JSONLLogger("windows.jsonl", by="window", flush_interval_s=OFTEN_S),
        subs.CSVLogger("steps.csv", flush_interval_s=OFTEN_S),
        subs.CSVLogger("epochs.csv", per="epoch", flush_interval_s=OFTEN_S),
        subs.ParquetLogger("metrics", rows_per_part=25, flush_interval_s=OFTEN_S),
        subs.TensorBoardLogger("tensorboard", flush_interval_s=OFTEN_S),
    ]


def serve(trainer: et.Trainer, data: Any, aim: dict[str, Any]) -> et.FitResult:
    """Trains in the lifespan of a service, as in docs/in-a-service.md; uvicorn has its own signal handlers."""
    results: list[et.FitResult] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async def train() -> None:
            results.append(await trainer.fit_async(data, **aim))
            server.should_exit = True

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(train)
            yield
            trainer.control.stop("preempted")

    server = uvicorn.Server(uvicorn.Config(Starlette(lifespan=lifespan), port=0, log_level="critical"))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return results[0]


def fork_jobs() -> None:
    """Forks a job for each line on standard input."""
    warnings.simplefilter("ignore")  # JAX warns about every fork; no backend runs in this process
    file_loggers()  # imports pyarrow and tensorboardX once, and not in each job
    for line in sys.stdin:
        how, name = line.strip().split(" ", 1)
        folder = Path(name)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run_job(folder, how)
                status = 0
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException as error:
                (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    fork_jobs()
