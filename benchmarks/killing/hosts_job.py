"""A small training job of several processes that resumes from its folder, and a process that forks them quickly.

``python -m benchmarks.killing.hosts_job`` reads a ``Launch`` per line, forks its processes, and answers with their
process ids; after the line ``wait`` it answers with their exit statuses. A forked process has imported JAX and Orbax,
and ends as a program does: through the end of the interpreter.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import json
import logging
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eventtrain as et
from benchmarks.killing.mounts import leave_mounts, mount_tmpfs, unmount
from eventtrain import subscribers as subs
from eventtrain.events import TRAINING_SEQUENCE
from eventtrain.loop.agreement.agreement import Alone
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.checkpointing.orbax import ArrayFiles
from eventtrain.trainer import trainer as trainer_module

EPOCHS, STEPS, EVALS = 3, 12, 3
LOG = "events.jsonl"
OWN_LOG = "host-{}.jsonl"
RESULT = "result-{}.json"
FAILS_AT = 17
optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=0.05)


@dataclass
class Launch:
    """How to start the processes of one job.

    Attributes:
        folder: of the run, for all processes.
        port: of the coordinator.
        count: of the processes.
        faults: process -> name of a fault in it; see ``Job``.
        options: see ``Job``.
    """

    folder: str
    port: int
    count: int = 2
    faults: dict[str, str] = field(default_factory=dict[str, str])
    options: dict[str, Any] = field(default_factory=dict[str, Any])


class Job:
    """One process of the job.

    Faults: "late": the first batch takes 3 s; "late_run": the run begins 3 s later; "missing_run": it begins 9 s later;
    "data": the data raises in the second epoch; "slow": it takes 2 s there; "subscriber": a subscriber that may fail
    the run raises; "disk": this process's part of checkpoints cannot be written, twice; "full_disk": the same by
    a disk that is full; "unshared": this process has another directory.

    Options: ``early``: a handler of process 0 halves the rate as soon as the run starts. ``hold``: name of a mark where
    each process waits for a second. ``delays``: handlers in each process send commands without a lag, with random
    delays. ``alone``: each process applies its own commands, without an agreement.
    """

    def __init__(
        self, folder: Path, index: int, fault: str, options: dict[str, Any], *, owns_mounts: bool = False
    ) -> None:
        self._folder = folder
        self._index = index
        self._fault = fault
        self._options = options
        self._owns_mounts = owns_mounts
        self._run_dir = folder / f"of-{index}" if fault == "unshared" or options.get("alone") else folder
        mesh = Mesh(np.array(jax.devices()), ("data",))
        self._rows, self._whole = (
            NamedSharding(mesh, PartitionSpec("data")),
            NamedSharding(mesh, PartitionSpec()),
        )

    def run(self) -> None:
        """Trains, from the newest checkpoint if there is one, and writes the result to ``result-INDEX.json``."""
        if self._fault == "disk":
            _break_disk(2)
        if self._fault == "full_disk":
            _fill_disk(2, owns_mounts=self._owns_mounts)
        if self._options.get("alone"):
            trainer_module.joined = _alone
        trainer = self._trainer()
        if self._options.get("early"):

            @trainer.on(et.RunStarted)
            async def halve(event: et.RunStarted, control: et.Control) -> None:
                control.scale_hyperparam("learning_rate", 0.5)

        if self._options.get("delays"):
            self._add_delayed_commands(trainer)
        time.sleep({"late_run": 3.0, "missing_run": 9.0}.get(self._fault, 0.0))
        result = trainer.fit(
            self._batches, epochs=EPOCHS, eval_data=self._eval_batches, resume=True, progress=False
        )
        copy = jax.jit(lambda tree: tree, out_shardings=self._whole)(result.state)
        bits = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(copy)).hex()
        reached = {"step": result.step, "reason": result.stop_reason, "state": bits}
        (self._folder / RESULT.format(self._index)).write_text(json.dumps(reached))

    def _trainer(self) -> et.Trainer[Any]:
        params = {"w": np.linspace(0, 1, 8, dtype=np.float32), "b": np.float32(0)}
        state = jax.tree.map(
            lambda value: _put(value, self._rows if np.ndim(value) else self._whole),
            {"params": params, "opt_state": jax.tree.map(np.asarray, optimiser.init(params))},
        )
        own_log = subs.JSONLLogger(
            OWN_LOG.format(self._index), events=(*TRAINING_SEQUENCE, et.CheckpointFailed, et.PeerLost)
        )
        own_log.per_host = True
        trainer = et.Trainer(
            self._step,
            state,
            eval_fn=lambda state, batch: {"loss": loss_fn(state["params"], batch)},
            subscribers=[
                subs.JSONLLogger(LOG),
                own_log,
                subs.EarlyStopping("val_loss", patience=50, restore_best_weights=True),
                subs.ReduceLROnPlateau("loss", factor=0.7, patience=1, min_delta=1.0),
                subs.Checkpointer(
                    "checkpoints", every=5, max_to_keep=None, retries=1, retry_delay_s=0.1, when_full="wait"
                ),
            ],
            run_dir=self._run_dir,
            run_id="job",
            drain_timeout_s=10,
        )

        @trainer.on(et.StepCompleted, every=3, lag=5, name="shrinks")
        async def shrink(event: et.StepCompleted, control: et.Control) -> None:
            control.scale_hyperparam("learning_rate", 0.99)

        @trainer.on(et.SnapshotTaken, per_host=True, name="marks")
        async def mark(event: et.SnapshotTaken) -> None:
            self._reach("save")

        @trainer.on(et.StepCompleted, per_host=True, on_error="fail", name="fails")
        async def fail(event: et.StepCompleted) -> None:
            if self._fault == "subscriber" and event.step == FAILS_AT:
                raise RuntimeError("the subscriber of this process has failed")

        return trainer

    def _add_delayed_commands(self, trainer: et.Trainer[Any]) -> None:
        @trainer.on(et.StepCompleted, every=2, name="scales")
        async def scale(event: et.StepCompleted, control: et.Control) -> None:
            await anyio.sleep(random.uniform(0, 0.03))
            control.scale_hyperparam("learning_rate", random.uniform(0.9, 1.1))

        @trainer.on(et.StepCompleted, every=3, per_host=True, name="asks")
        async def ask(event: et.StepCompleted, control: et.Control) -> None:
            await anyio.sleep(random.uniform(0, 0.03))
            if self._index > 0:
                control.set_hyperparam("b1", random.uniform(0.85, 0.95))

    def _reach(self, name: str) -> None:
        """Creates a file of this name."""
        (self._folder / f"reached-{name}-{self._index}").touch()
        if name == self._options.get("hold"):
            time.sleep(1.0)

    def _step(self, state: Any, batch: Any) -> Any:
        self._reach("compile")
        return train_step(state, batch)

    def _batches(self, epoch: int, start: int = 0) -> Iterator[jax.Array]:
        for number in range(start, STEPS):
            time.sleep(0.004)
            if (epoch, number) == (0, 0):
                self._reach("first")
                if self._fault == "late":
                    time.sleep(3.0)
            if (epoch, number) == (1, 5):
                self._reach("epoch")
                if self._fault == "slow":
                    time.sleep(2.0)
                if self._fault == "data":
                    raise OSError("the disk with the data of this process is gone")
            yield _put(_random((epoch, number)), self._rows)

    def _eval_batches(self, epoch: int) -> Iterator[jax.Array]:
        for number in range(EVALS):
            if (epoch, number) == (1, 1):
                self._reach("eval")
            time.sleep(0.02)
            yield _put(_random((99, number)), self._rows)


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean((batch @ params["w"] + params["b"] - 1) ** 2)


def train_step(state: Any, batch: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    params = optax.apply_updates(state["params"], updates)
    rate = state["opt_state"].hyperparams["learning_rate"]
    return {"params": params, "opt_state": opt_state}, {"loss": loss, "rate": rate}


def _random(seed: tuple[int, ...]) -> Any:
    return np.random.default_rng(seed).normal(size=(8, 8)).astype(np.float32)


def _put(value: Any, sharding: NamedSharding) -> jax.Array:
    """Returns an array over the devices of all processes, each of which has all of ``value``."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _break_disk(times: int) -> None:
    """Has the next writes of this process's description of a checkpoint fail."""
    write, left = atomic_files.write_text, [times]

    def write_text(path: Path, text: str) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    atomic_files.write_text = write_text


def _fill_disk(times: int, *, owns_mounts: bool) -> None:
    """Has the next writes of this process's arrays of a checkpoint meet a full disk.

    A file system of one page that only this process sees; without mounts of its own, a limit for the size of its files.
    """
    save, left = ArrayFiles.save, [times]

    def save_to_full_disk(self: ArrayFiles, folder: Path, tree: Any) -> None:
        if not left[0]:
            save(self, folder, tree)
            return
        left[0] -= 1
        folder.mkdir(exist_ok=True)
        with _full(folder) if owns_mounts else _short_files():
            save(self, folder, tree)

    ArrayFiles.save = save_to_full_disk


@contextmanager
def _full(folder: Path) -> Generator[None]:
    mount_tmpfs(folder, 4096)
    try:
        yield
    finally:
        unmount(folder)


@contextmanager
def _short_files() -> Generator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _alone(*given: object) -> Generator[Alone]:
    yield Alone()


def _run_process(launch: Launch, index: int) -> None:
    folder, fault = Path(launch.folder), launch.faults.get(str(index), "")
    owns_mounts = fault == "full_disk" and leave_mounts()  # before there are threads
    output = os.open(folder / f"output-{index}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("eventtrain").setLevel(logging.INFO)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{launch.port}"
    jax.distributed.initialize(address, launch.count, index, coordinator_bind_address=address)
    Job(folder, index, fault, launch.options, owns_mounts=owns_mounts).run()


def fork_jobs() -> None:
    """Forks the processes of a job for each line on standard input."""
    warnings.simplefilter("ignore")  # JAX warns about every fork; no backend runs in this process
    gc.freeze()  # else each process copies the memory of all that was imported when it ends
    children: list[int] = []
    for line in sys.stdin:
        if line.strip() == "wait":
            statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            print(json.dumps(statuses), flush=True)
            children = []
            continue
        launch = Launch(**json.loads(line))
        for index in range(launch.count):
            child = os.fork()
            if child == 0:
                _run_process(launch, index)
                return  # as a program ends
            children.append(child)
        print(json.dumps(children), flush=True)


if __name__ == "__main__":
    fork_jobs()
