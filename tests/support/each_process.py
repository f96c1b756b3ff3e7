"""Run by test_each_process.py: in two processes with a device each, and in one with both. Prints JSON lines."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import pjit
from jax._src.interpreters import pxla
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.stateful_metrics import F1

jax.distributed.initialize()
FOLDER, PROCESSES, ME = sys.argv[1], jax.process_count(), jax.process_index()
MESH = jax.make_mesh((2,), ("data",))
WHOLE, ROWS = NamedSharding(MESH, PartitionSpec()), NamedSharding(MESH, PartitionSpec("data"))
OPTIMISER = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
EXAMPLES = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)


def tell(what: str, value: Any) -> None:
    print(json.dumps({"what": what, "value": value}), flush=True)


def put(value: Any, sharding: NamedSharding) -> jax.Array:
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def new_state(weights: NamedSharding) -> Any:
    params = {"w": np.linspace(0, 1, 8, dtype=np.float32), "b": np.float32(0)}
    state = {"params": params, "opt_state": OPTIMISER.init(params)}
    return jax.tree.map(lambda leaf: put(leaf, weights if np.ndim(leaf) else WHOLE), state)


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch @ params["w"] + params["b"] - 1) ** 2)


def step_fn(state: Any, batch: Any) -> Any:
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    updates, opt_state = OPTIMISER.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}


def eval_fn(state: Any, batch: Any) -> Any:
    return {"loss": loss_fn(state["params"], batch), "f1": F1.of(batch[:, 0] > 0, batch[:, 1] > 0)}


def predict_fn(state: Any, batch: Any) -> Any:
    rows = batch @ state["params"]["w"] + state["params"]["b"]
    return {"sharded": rows, "replicated": jnp.mean(batch), "weights": state["params"]["w"]}


def new_trainer(name: str, weights: NamedSharding = ROWS, **options: Any) -> et.Trainer[Any]:
    return et.Trainer(
        step_fn,
        new_state(weights),
        eval_fn=eval_fn,
        predict_fn=predict_fn,
        run_dir=f"{FOLDER}/{name}",
        run_id=name,
        **options,
    )


def digest(tree: Any) -> Any:
    def of(leaf: Any) -> Any:
        assert type(leaf) is np.ndarray
        return [list(leaf.shape), hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()]

    return {name: of(leaf) for name, leaf in tree.items()}


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


DATA = et.ArrayLoader(EXAMPLES, 16, sharding=ROWS)


def infer() -> None:
    trainer = new_trainer("inference")
    batches = [put(EXAMPLES[:16], ROWS), put(EXAMPLES[16:32], ROWS)]
    tell("evaluate", trainer.evaluate(DATA))
    tell("evaluate global arrays", trainer.evaluate(batches))
    tell("evaluate_async", anyio.run(trainer.evaluate_async, DATA))
    tell("predict", digest(trainer.predict(DATA)))
    tell("predict global arrays", digest(trainer.predict(batches)))
    tell("predict_async", digest(anyio.run(trainer.predict_async, DATA)))
    trainer.fit(DATA, epochs=2)
    tell("evaluate after fit", trainer.evaluate(DATA))
    tell("predict after fit", digest(trainer.predict(DATA)))


def refuse_batches_of_one_process() -> None:
    trainer = new_trainer("refused")

    def session(call: str, batch: Any) -> Callable[[], Any]:
        def run() -> None:
            with trainer.session() as session:
                getattr(session, call)(batch)

        return run

    def end_epoch() -> None:
        with trainer.session() as session:
            session.step(put(EXAMPLES[:16], ROWS))
            session.end_epoch(eval_data=[EXAMPLES[:16]])

    half = EXAMPLES[:16]
    tell("refused step", error_of(session("step", half)))
    tell("refused step in a tree", error_of(session("step", {"x": [half]})))
    tell("refused step of jax.numpy", error_of(session("step", jnp.asarray(half))))
    tell("refused prepare", error_of(session("prepare", half)))
    tell("refused end_epoch", error_of(end_epoch))
    tell("refused evaluate", error_of(lambda: trainer.evaluate([half])))
    tell("refused predict", error_of(lambda: trainer.predict([half])))


def read_snapshots(weights: NamedSharding, name: str) -> None:
    """A handler that reads snapshots in pinned host memory, which takes no computation of both processes."""
    trainer = new_trainer(name, weights, snapshot="host", subscribers=[subs.Checkpointer("ckpt", every=4)])
    seen: list[str] = []

    @trainer.on(et.StepCompleted, every=3, per_host=False)
    async def take(event: et.StepCompleted, control: et.Control) -> None:
        control.snapshot("kept")

    @trainer.on(et.SnapshotTaken, per_host=True)
    async def read(event: et.SnapshotTaken, control: et.Control) -> None:
        kept = control.snapshots.get("kept")
        if event.tag == "kept" and kept is not None and not seen:
            try:
                seen.append(f"read {(await kept.to_host())['params']['w'].shape}")
            except et.EventTrainError as error:
                seen.append(f"{type(error).__name__}: {error}")

    @trainer.on(et.CheckpointFailed, per_host=True)
    async def failed(event: et.CheckpointFailed) -> None:
        seen.append(event.error)

    result = trainer.fit(DATA, epochs=3)
    tell(name, [result.step, seen])


def compute_in_a_handler() -> None:
    trainer = new_trainer("guarded")
    everything, errors = put(EXAMPLES, ROWS), []
    total = jax.jit(jnp.sum)
    total(everything)  # on the training thread, where it may be

    @trainer.on(et.EpochCompleted, per_host=True)
    async def compute(event: et.EpochCompleted) -> None:
        assert threading.current_thread() is not threading.main_thread()
        total(everything)

    @trainer.on(et.SubscriberFailed, where=lambda event: event.subscriber.endswith("compute"), per_host=True)
    async def failed(event: et.SubscriberFailed) -> None:
        errors.append(event.error)

    result = trainer.fit(DATA, epochs=2)
    tell("guarded", [result.step, len(errors) > 0, errors[:1]])
    total(everything)


class Noticed(et.Event):
    kind: Literal["noticed"] = "noticed"
    number: int
    bytes: str = ""


class OnEachHost(et.Subscriber):
    """Publishes an event of its own, and fails once, in each process."""

    per_host = True

    async def start(self, run: et.RunContext) -> None:
        self.run = run

    async def on_epoch_completed(self, event: et.EpochCompleted) -> None:
        self.run.publish(Noticed(step=event.step, number=10 * self.run.process_index + event.epoch))
        if event.epoch == 0:
            raise ValueError(f"of process {self.run.process_index}")


def watch_each_host() -> None:
    """The events of process 1 reach process 0, and those of process 0 stay there."""
    exporter = subs.PrometheusExporter(int(sys.argv[2]))
    watchers = [subs.DeviceStats(every_s=0.2), subs.Profiler(steps=((2, 3),)), exporter, OnEachHost()]
    trainer = new_trainer("watched", subscribers=watchers)
    seen: list[Any] = []
    ports: list[int | None] = []

    @trainer.on(et.Event, per_host=True)
    async def see(event: et.Event) -> None:
        if event.process is not None or isinstance(event, Noticed | et.SubscriberFailed | et.ProfileCaptured):
            path = getattr(event, "path", "").removeprefix(FOLDER)
            seen.append([event.kind, event.process, getattr(event, "number", None), path])

    @trainer.on(et.RunStarted, per_host=True)
    async def note_port(event: et.RunStarted) -> None:
        ports.append(exporter.port)

    def slowly(epoch: int) -> Any:
        for batch in DATA(epoch):
            time.sleep(0.15)
            yield batch

    trainer.fit(slowly, epochs=4)
    tell("seen", seen)
    tell("port", ports[0])


def flood() -> None:
    """Process 1 publishes more than can be forwarded: what is dropped is counted, and nothing waits."""
    trainer = new_trainer("flooded")
    numbers: list[int] = []
    dropped: list[int] = []

    @trainer.on(et.EpochCompleted, once=True, per_host=True)
    async def publish(event: et.EpochCompleted) -> None:
        if ME == 1:
            for number in range(3000):
                trainer.bus.publish(Noticed(step=event.step, number=number))

    @trainer.on(Noticed)
    async def count(event: Noticed) -> None:
        numbers.append(event.number)

    @trainer.on(et.SubscriberLagged, where=lambda event: event.process == 1)
    async def note_dropped(event: et.SubscriberLagged) -> None:
        dropped.append(event.dropped)

    def slowly(epoch: int) -> Any:
        for batch in DATA(epoch):
            time.sleep(0.1 if epoch == 0 else 0.4)
            yield batch

    trainer.fit(slowly, epochs=4)
    tell("flood", [numbers == sorted(set(numbers)), len(numbers), sum(dropped)])


def count_computations() -> None:
    """Steps, checkpoints, decisions and commands: 0 computations of several processes that are not the step's."""
    counted: list[str] = []
    trainer = new_trainer("counted", subscribers=[subs.Checkpointer("ckpt", every=100, max_to_keep=2)])
    watching = threading.Event()

    @trainer.on(et.StepCompleted, every=50, lag=5)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.99)

    @trainer.on(et.StepCompleted, every=70)
    async def command(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.1)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 20, per_host=True)
    async def begin(event: et.StepCompleted) -> None:
        watching.set()

    def of_run(name: str) -> None:
        if watching.is_set():
            counted.append(name)

    batch = put(EXAMPLES[:16], ROWS)
    with every_computation(of_run):
        result = trainer.fit([batch] * 1020, epochs=1)
        tell("counted", [result.step, len(counted), sorted(set(counted))])
        counted.clear()
        multihost_utils.broadcast_one_to_all(np.float32(1))
        tell("control", len(counted))


@contextmanager
def every_computation(seen: Callable[[str], None]) -> Generator[None]:
    """Calls ``seen`` with the name of each compiled function that is executed over several processes.

    Through JAX's Python path, which the caches of compiled calls otherwise leave out.
    """
    run, patches = pxla.ExecuteReplicated.__call__, pytest.MonkeyPatch()

    def call(self: Any, *arguments: Any) -> Any:
        results = run(self, *arguments)
        arrays = [leaf for leaf in jax.tree.leaves([arguments, results]) if isinstance(leaf, jax.Array)]
        if any(len(array.sharding.device_set) > jax.local_device_count() for array in arrays):
            seen(self.name)
        return results

    patches.setattr(pxla.ExecuteReplicated, "__call__", call)
    patches.setattr(pxla.MeshExecutable, "create_cpp_call", lambda self, params: None)
    patches.setattr(pjit, "_get_fastpath_data", lambda *args, **options: None)
    try:
        yield
    finally:
        patches.undo()


infer()
read_snapshots(ROWS, "sharded")
read_snapshots(WHOLE, "whole")
if PROCESSES > 1:
    refuse_batches_of_one_process()
    compute_in_a_handler()
    watch_each_host()
    flood()
    count_computations()
