"""Training programs that run in several JAX processes, or in one with as many devices, and write down what happened.

``python on_several_processes.py FOLDER SCENARIO...`` runs each scenario in turn, in the processes that are there. Each
process writes ``FOLDER/<scenario>-<process>.json``: what the scenario returns, its training sequence, and its state.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.device.compiled_step import CompiledStep
from tests.support.stateful_metrics import AUC, BINS, CLASSES, F1, Confusion

SEVERAL = "JAX_NUM_PROCESSES" in os.environ
if SEVERAL:
    jax.distributed.initialize()
PROCESS = jax.process_index()
MESH = jax.make_mesh((jax.device_count(),), ("data",))
ROWS, EVERYWHERE = NamedSharding(MESH, PartitionSpec("data")), NamedSharding(MESH, PartitionSpec())
WIDTH, BATCHES = 8, 12
OPTIMISER = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
VARIES = {"run_id", "seq", "time", "duration_s", "attempt", "process"}


def put(value: Any, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(value)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def new_state() -> Any:
    params = {"w": np.linspace(0, 1, WIDTH, dtype=np.float32), "b": np.float32(0)}
    state = {"params": params, "opt_state": jax.tree.map(np.asarray, OPTIMISER.init(params))}
    return jax.tree.map(lambda leaf: put(leaf, ROWS if np.ndim(leaf) == 1 else EVERYWHERE), state)


def loss_of(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch @ params["w"] + params["b"] - 1) ** 2)


def step_fn(state: Any, batch: Any) -> Any:
    loss, grads = jax.value_and_grad(loss_of)(state["params"], batch)
    updates, opt_state = OPTIMISER.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state}, {"loss": loss, "grad_norm": optax.tree.norm(grads)}


def eval_fn(state: Any, batch: Any) -> Any:
    return {"loss": loss_of(state["params"], batch)}


def with_state(batch: Any) -> dict[str, Any]:
    """Metrics with state of a batch that the devices share."""
    label, other = batch[:, 0] > 0, batch[:, 1] > 0
    score = jnp.arange(BINS) == jnp.clip(jnp.round(batch[:, 2:3] * 5 + 5), 0, BINS - 1)
    classes = [(batch[:, column, None] > np.array([0, 1])).sum(1)[:, None] for column in (3, 4)]
    predicted, true = [jnp.arange(CLASSES) == one for one in classes]
    return {
        "f1": F1.of(other, label),
        "auc": AUC((score & label[:, None]).sum(0), (score & ~label[:, None]).sum(0)),
        "confusion": Confusion((true[:, :, None] & predicted[:, None, :]).sum(0)),
        "largest": et.Max(jnp.max(batch)),
    }


def step_with_state(state: Any, batch: Any) -> Any:
    state, metrics = step_fn(state, batch)
    return state, metrics | with_state(batch)


def eval_with_state(state: Any, batch: Any) -> Any:
    return eval_fn(state, batch) | with_state(batch)


def data(epoch: int) -> Iterator[jax.Array]:
    rng = np.random.default_rng(epoch)
    for _ in range(BATCHES):
        yield put(rng.normal(size=(8, WIDTH)).astype(np.float32), ROWS)


def eval_data(epoch: int) -> Iterator[jax.Array]:
    rng = np.random.default_rng(99)
    for _ in range(3):
        yield put(rng.normal(size=(8, WIDTH)).astype(np.float32), ROWS)


def bits(tree: Any) -> str:
    """All arrays, whole, as hexadecimal digits. A computation of all processes."""
    whole = jax.jit(lambda leaves: leaves, out_shardings=EVERYWHERE)(tree)
    return "".join(np.asarray(leaf.addressable_data(0)).tobytes().hex() for leaf in jax.tree.leaves(whole))


class Sequence(et.Subscriber):
    """The training sequence of one process, as far as a rerun must repeat it."""

    events = et.Event
    per_host = True

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    async def handle(self, event: et.Event) -> None:
        if isinstance(event, et.CommandApplied) and event.command.due is None:
            return
        if isinstance(event, SEQUENCE):
            row = event.model_dump(mode="json")
            self.rows.append({key: value for key, value in row.items() if key not in VARIES})


CALLS: list[int] = []
"""How many steps each call of the compiled step has run."""


def count_calls() -> None:
    call = CompiledStep.__call__

    def counted(
        self: CompiledStep, carry: Any, batch: Any, start: int = 0, stop: int = 1, **options: Any
    ) -> None:
        call(self, carry, batch, start, stop, **options)
        CALLS.append(stop - start)

    CompiledStep.__call__ = counted


SEQUENCE = (
    et.RunStarted, et.RunResumed, et.RunCompleted, et.RunFailed, et.EpochStarted, et.EpochCompleted, et.StepStarted,
    et.StepCompleted, et.EvalStarted, et.EvalStepCompleted, et.EvalCompleted, et.HyperparamChanged, et.CommandApplied,
)  # fmt: skip
Scenario = Callable[..., dict[str, Any]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def in_groups(steps_per_call: int) -> Callable[[Scenario], Scenario]:
    """Adds the scenario with several steps per call, as ``NAME_in_groups``."""

    def add(function: Scenario) -> Scenario:
        SCENARIOS[f"{function.__name__}_in_groups"] = partial(function, steps_per_call=steps_per_call)
        return function

    return add


def trained(folder: Path, *subscribers: et.Subscriber, epochs: int = 3, **options: Any) -> dict[str, Any]:
    """Trains with these subscribers. Returns the sequence, the bits of the state, and why the run ended."""
    prepare: Callable[[et.Trainer[Any]], None] = options.pop("prepare", lambda _: None)
    loader, eval_loader = options.pop("loaders", (data, eval_data))
    sequence = Sequence()
    trainer = et.Trainer(
        **{"step_fn": step_fn, "eval_fn": eval_fn, "state": new_state()} | options,
        run_dir=folder,
        subscribers=[sequence, *subscribers],
    )
    prepare(trainer)
    CALLS.clear()
    result = trainer.fit(loader, epochs=epochs, eval_data=eval_loader)
    return {
        "rows": sequence.rows,
        "state": bits(result.state),
        "stop_reason": result.stop_reason,
        "run_id": trainer.run_id,
        "undelivered": dict(result.undelivered),
        "calls": [*CALLS],
    }


@scenario
def epoch_policies(folder: Path) -> dict[str, Any]:
    return trained(
        folder,
        subs.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True),
        subs.ReduceLROnPlateau(monitor="val_loss", patience=1, min_delta=0.5),
        subs.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        epochs=5,
    )


def three_deciders(trainer: et.Trainer[Any], *, at_once_every: int) -> None:
    @trainer.on(et.StepCompleted, every=5, lag=3)
    async def shrink(event: et.StepCompleted, control: et.Control) -> None:
        await _pause()
        control.scale_hyperparam("learning_rate", 0.9 if event.metrics["loss"] > 0.5 else 0.95)

    @trainer.on(et.StepCompleted, every=at_once_every, lag=0)
    async def at_once(event: et.StepCompleted, control: et.Control) -> None:
        await _pause()
        control.scale_hyperparam("learning_rate", 1.01)

    @trainer.on(et.EvalCompleted, lag=2)
    async def later(event: et.EvalCompleted, control: et.Control) -> None:
        await _pause()
        control.set_hyperparam("learning_rate", 0.07)


@scenario
def step_policies(folder: Path) -> dict[str, Any]:
    return trained(
        folder,
        subs.EvaluateEvery(steps=4),
        subs.GradientSpike(window=4, warmup=2, threshold=1.05),
        epochs=2,
        prepare=partial(three_deciders, at_once_every=7),
    )


@scenario
def decisions_between_groups(folder: Path) -> dict[str, Any]:
    """Deciders, evaluations and checkpoints divide the groups of four at steps of their own."""
    return trained(
        folder,
        subs.EvaluateEvery(steps=10),
        subs.Checkpointer("checkpoints", every=14, max_to_keep=None),
        subs.ReduceLROnPlateau(monitor="val_loss", patience=1, min_delta=0.5),
        epochs=4,
        prepare=partial(three_deciders, at_once_every=11),
        steps_per_call=4,
    )


@scenario
def averaged_weights(folder: Path) -> dict[str, Any]:
    return trained(
        folder, epochs=2, step_extensions=[et.EMA(0.9, use_for={"eval", "final"})], snapshot="copy"
    )


@scenario
def data_parallel(folder: Path) -> dict[str, Any]:
    """The loader makes the parts of the batches, and the trainer puts the state of each process on all devices."""
    params = {"w": jnp.linspace(0, 1, WIDTH), "b": jnp.float32(0)}
    examples = np.random.default_rng(0).normal(size=(96, WIDTH)).astype(np.float32)
    return trained(
        folder,
        epochs=2,
        state={"params": params, "opt_state": OPTIMISER.init(params)},
        batch_sharding=ROWS,
        loaders=[et.ArrayLoader(part, 8, sharding=ROWS) for part in (examples, examples[:24])],
    )


@in_groups(4)
@scenario
def metrics_with_state(folder: Path, **options: Any) -> dict[str, Any]:
    """Over the examples of all processes, per epoch and evaluation."""
    return trained(
        folder,
        subs.EarlyStopping(monitor="val_f1", mode="max", patience=9),
        epochs=2,
        step_fn=step_with_state,
        eval_fn=eval_with_state,
        **options,
    )


@in_groups(4)
@scenario
def samples(folder: Path, **options: Any) -> dict[str, Any]:
    """By step, by epoch and by command, at boundaries that have an evaluation too; of sharded weights and of a sum."""
    taken: list[Any] = []

    def prepare(trainer: et.Trainer[Any]) -> None:
        @trainer.on(et.StepCompleted, every=5, lag=3)
        async def ask(event: et.StepCompleted, control: et.Control) -> None:
            await _pause()
            control.evaluate()
            control.sample("total")

        @trainer.on(et.SampleTaken)
        async def take(event: et.SampleTaken) -> None:
            taken.append([event.step, event.name, np.asarray(event.value).tolist()])

    found = trained(
        folder,
        subs.Sample(lambda state: state["params"]["w"], every=4, every_epochs=1, name="weights"),
        subs.Sample(lambda state: jnp.sum(state["params"]["w"]), name="total"),
        subs.EvaluateEvery(steps=8),
        epochs=2,
        prepare=prepare,
        **options,
    )
    return found | {"samples": sorted(taken)}


@in_groups(4)
@scenario
def every_step_announced(folder: Path, **options: Any) -> dict[str, Any]:
    def prepare(trainer: et.Trainer[Any]) -> None:
        @trainer.on(et.StepStarted, lag=0)
        async def warm_up(event: et.StepStarted, control: et.Control) -> None:
            control.set_hyperparam("learning_rate", 0.001 * (event.step + 1))

    return trained(folder, epochs=1, prepare=prepare, **options)


@scenario
def stopped_by_a_decider(folder: Path) -> dict[str, Any]:
    def prepare(trainer: et.Trainer[Any]) -> None:
        @trainer.on(et.StepCompleted, lag=2)
        async def stop(event: et.StepCompleted, control: et.Control) -> None:
            if event.step == 17:
                control.stop("enough")

    return trained(folder, subs.Checkpointer("checkpoints", every=5), epochs=4, prepare=prepare)


@in_groups(5)
@scenario
def best_checkpoints(folder: Path, **options: Any) -> dict[str, Any]:
    best = subs.Checkpointer("best", monitor="val_loss", save_best_only=True, max_to_keep=1)
    found = trained(
        folder, best, subs.Checkpointer("all", every=5, every_epochs=1, max_to_keep=None), epochs=3, **options
    )
    found["folders"] = sorted(path.name for path in folder.glob("*/*") if path.is_dir())
    return found


@in_groups(4)
@scenario
def commands_at_any_time(folder: Path, **options: Any) -> dict[str, Any]:
    """Commands without a lag, from handlers of process 0 and from the control of every process."""
    answers: list[Any] = []

    def prepare(trainer: et.Trainer[Any]) -> None:
        @trainer.on(et.StepCompleted)
        async def observe(event: et.StepCompleted, control: et.Control) -> None:
            await _pause()
            control.scale_hyperparam("learning_rate", random.uniform(0.99, 1.01))

        @trainer.on(et.StepCompleted, every=6, per_host=True)
        async def ask(event: et.StepCompleted, control: et.Control) -> None:
            await _pause()
            applied = await control.scale_hyperparam("learning_rate", 1 + 0.001 * (PROCESS + 1)).result()
            answers.append((event.step, applied.step))
            try:
                await control.set_hyperparam("momentum", 0.5).result()
            except et.errors.CommandRejectedError as error:
                answers.append(str(error))

    found = trained(folder, epochs=3, prepare=prepare, **options)
    return found | {"answers": answers}


@in_groups(4)
@scenario
def commands_without_a_pause(folder: Path, **options: Any) -> dict[str, Any]:
    """A thread of each process sends commands from before the first step to the end, whatever the loop does."""
    sequence, ended = Sequence(), threading.Event()
    trainer = et.Trainer(
        step_fn, new_state(), eval_fn=eval_fn, run_dir=folder, subscribers=[sequence], **options
    )
    trainer.subscribe(subs.Checkpointer("checkpoints", every=9))
    trainer.subscribe(subs.EvaluateEvery(steps=5, epochs=1))
    sent = 0

    def send() -> None:
        nonlocal sent
        while not ended.is_set():
            trainer.control.scale_hyperparam("learning_rate", 1 + 1e-6 * PROCESS)
            sent += 1
            time.sleep(random.uniform(0.005, 0.03))

    sending = threading.Thread(target=send)
    sending.start()
    trainer.fit(data, epochs=3, eval_data=eval_data)
    with trainer.session(eval_data=eval_data) as session:
        first = next(data(0))
        session.prepare((first,) * options["steps_per_call"] if options else first)
        for epoch in range(2):
            for batch in data(epoch):
                session.step(batch)
                session.idle(random.uniform(0, 0.002))
            session.end_epoch()
        session.step(batch)  # and leave in the middle of an epoch
        session.idle(0.01)
    ended.set()
    sending.join()
    changed = [row for row in sequence.rows if row["kind"] == "hyperparam_changed"]
    return {
        "rows": sequence.rows,
        "state": bits(trainer.state),
        "run_id": trainer.run_id,
        "changed": len(changed),
    }


@in_groups(4)
@scenario
def everything_asked_by_the_last_process(folder: Path, **options: Any) -> dict[str, Any]:
    """Pause, resume, evaluate, checkpoint, snapshot, restore, stop: asked for by the process with the highest index."""
    answers: list[str] = []

    def prepare(trainer: et.Trainer[Any]) -> None:
        @trainer.on(et.StepCompleted, once=True, per_host=True)
        async def ask(event: et.StepCompleted, control: et.Control) -> None:
            if jax.process_count() - 1 > PROCESS:
                return
            asked = [
                control.pause(), control.set_hyperparam("learning_rate", 0.05), control.resume(),
                control.evaluate(), control.snapshot("before"), control.checkpoint("asked"),
                control.set_hyperparam("learning_rate", 0.2),
            ]  # fmt: skip
            answers.extend([(await command.result()).command.kind for command in asked])
            restored = control.restore("before")
            answers.append((await restored.result()).command.kind)
            control.snapshots["before"].release()
            answers.append((await control.stop("asked").result()).command.kind)

    found = trained(
        folder, subs.Checkpointer("checkpoints", at_end=False), epochs=200, prepare=prepare, **options
    )
    return found | {"answers": answers, "folders": sorted(path.name for path in folder.glob("checkpoints/*"))}


@scenario
def snapshots_of_one_tag(folder: Path) -> dict[str, Any]:
    """The last process releases the first snapshot of a tag when there is a second, and that one behind the run."""
    found: dict[str, Any] = {}

    def prepare(trainer: et.Trainer[Any]) -> None:
        @trainer.on(et.StepCompleted, once=True, per_host=True)
        async def ask(event: et.StepCompleted, control: et.Control) -> None:
            if jax.process_count() - 1 > PROCESS:
                return
            await control.snapshot("one").result()
            first = control.snapshots["one"]
            await control.snapshot("one").result()
            first.release()
            await control.snapshot(
                "two"
            ).result()  # process 0 has taken the request to release before this one
            await control.snapshot("three").result()
            found["second"] = control.snapshots["one"]
            await control.stop("asked").result()

    found |= trained(folder, epochs=200, prepare=prepare)
    second = found.pop("second", None)
    if second is not None:
        found["kept"] = not second.device.released
        second.release()
        found["released_behind_the_run"] = second.device.released
    return found


@scenario
def by_the_clock(folder: Path) -> dict[str, Any]:
    """Checkpoints and evaluations by the clock of process 0, which stops once there were enough of both."""

    def prepare(trainer: et.Trainer[Any]) -> None:
        seen: list[str] = []

        @trainer.on(et.CheckpointCommitted | et.EvalCompleted)
        async def count(event: et.CheckpointCommitted | et.EvalCompleted, control: et.Control) -> None:
            seen.append(event.kind)
            if seen.count("checkpoint_committed") >= 3 and seen.count("eval_completed") >= 2:
                control.stop("enough")

    checkpoints = subs.Checkpointer("checkpoints", every_s=0.2, max_to_keep=None, at_end=False)
    found = trained(
        folder,
        checkpoints,
        subs.EvaluateEvery(seconds=0.3),
        subs.MaxTime(60),
        epochs=100_000,
        prepare=prepare,
    )
    return found | {"folders": sorted(path.name for path in folder.glob("checkpoints/*"))}


def uploaded(folder: Path) -> dict[str, Any]:
    """Each process sends its files of every checkpoint to one store."""
    from eventtrain.subscribers.remote.object_store import ObjectStore

    sent: list[str] = []
    put = ObjectStore.put

    def recorded(store: ObjectStore, path: str, size_bytes: int, read: Callable[[int, int], bytes]) -> str:
        sent.append(path)
        return put(store, path, size_bytes, read)

    ObjectStore.put = recorded
    told: list[str] = []

    def prepare(trainer: et.Trainer[Any]) -> None:
        @trainer.on(et.CheckpointUploaded | et.CheckpointUploadFailed)
        async def tell(event: et.CheckpointUploaded | et.CheckpointUploadFailed) -> None:
            told.append(f"{event.kind} {event.step}")

    found = trained(
        folder,
        subs.Checkpointer("checkpoints", every=12, max_to_keep=None),
        subs.Uploader(str(folder / "store")),
        prepare=prepare,
    )
    ObjectStore.put = put
    return found | {"sent": sent, "told": told}


if find_spec("obstore") is not None:
    scenario(uploaded)


@scenario
def two_runs_of_one_trainer(folder: Path) -> dict[str, Any]:
    sequence = Sequence()
    trainer = et.Trainer(step_fn, new_state(), eval_fn=eval_fn, run_dir=folder, subscribers=[sequence])
    for _ in range(2):
        trainer.fit(data, epochs=1, eval_data=eval_data)
    with trainer.session() as session:
        for batch in data(5):
            session.step(batch)
    return {"rows": sequence.rows, "state": bits(trainer.state), "run_id": trainer.run_id}


def _logged(folder: Path, steps: int, *, resume: bool) -> dict[str, Any]:
    trainer = et.Trainer(
        step_with_state,
        new_state(),
        eval_fn=eval_with_state,
        run_dir=folder,
        run_id="run",
        subscribers=[
            subs.JSONLLogger("log.jsonl"),
            subs.Checkpointer("checkpoints", every=5, at_end=False, max_to_keep=None),
            subs.EarlyStopping(monitor="val_loss", patience=9, restore_best_weights=True),
            subs.ReduceLROnPlateau(monitor="val_loss", patience=1, min_delta=0.5),
        ],
    )
    result = trainer.fit(data, steps=steps, eval_data=eval_data, resume=resume)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "step": result.step,
        "state": bits(result.state),
        "logged": [row["step"] for row in rows if row["kind"] == "step_completed"],
        "epochs": [[row["metrics"], row["arrays"]] for row in rows if row["kind"] == "epoch_completed"],
    }


def stopped_early(folder: Path) -> dict[str, Any]:
    """Trains 28 of 40 steps. The newest checkpoint is that of step 25, in the middle of an epoch."""
    return _logged(folder.parent / "resumable", 28, resume=False)


def resumed(folder: Path) -> dict[str, Any]:
    """Continues from the newest checkpoint, to step 40."""
    return _logged(folder.parent / "resumable", 40, resume=True)


def not_interrupted(folder: Path) -> dict[str, Any]:
    """Trains the 40 steps at once."""
    return _logged(folder, 40, resume=False)


RESUMING: dict[str, Scenario] = {one.__name__: one for one in (stopped_early, resumed, not_interrupted)}


async def _pause() -> None:
    import anyio

    await anyio.sleep(random.uniform(0, 0.003))


def main(folder: Path, names: list[str]) -> None:
    count_calls()
    for name in names:
        faulthandler.dump_traceback_later(float(os.environ.get("HANGS_AFTER_S", "120")), exit=True)
        found = {**SCENARIOS, **RESUMING}[name](folder / name)
        (folder / f"{name}-{PROCESS}.json").write_text(json.dumps(found))
        print("finished", name, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(SCENARIOS))
