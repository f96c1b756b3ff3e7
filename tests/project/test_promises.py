"""The promises that span the whole library; each injects its fault. ``docs/promises.md`` lists test and mutant."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import jax
import numpy as np
import pytest
from rich.console import Console

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.jax_compilations import COMPILATIONS
from tests.support.models import batches, make_trainer, record

ArrayImpl = type(jax.numpy.zeros(()))


def test_promise_1_all_steps_are_dispatched_while_one_subscriber_sleeps_and_one_blocks_its_thread(tmp_path):
    trainer = make_trainer(tmp_path, flush_interval_s=0.001)
    release = threading.Event()
    entered: list[str] = []

    @trainer.on(et.StepCompleted, name="sleeps")
    async def sleeps(event: et.StepCompleted) -> None:
        entered.append("sleeps")
        while not release.is_set():  # noqa: ASYNC110  # a threading event: set by the training thread
            await anyio.sleep(0.01)

    @trainer.on(et.StepCompleted, name="blocks")
    def blocks(event: et.StepCompleted) -> None:
        entered.append("blocks")
        release.wait(30)

    data = batches(8)
    with trainer.session() as session:
        for index in range(2_000):
            session.step(data[index % 8])
        session.block_until_ready()
        statistics = trainer.bus.statistics()
        assert {name: figures.delivered for name, figures in statistics.items()} == {"sleeps": 0, "blocks": 0}
        session.idle(0.2)
        assert sorted(set(entered)) == ["blocks", "sleeps"]  # they were at it, and nobody waited for them
        release.set()
    assert {name: figures.delivered for name, figures in trainer.bus.statistics().items()} == {
        "sleeps": 2_000,
        "blocks": 2_000,
    }


@contextmanager
def host_conversions() -> Iterator[Callable[[int], list[str]]]:
    """Notes, by thread, each conversion of a device array to a host value, and each wait for one that is no token."""
    found: dict[int, list[str]] = {}

    def note(what: str, array: Any) -> None:
        found.setdefault(threading.get_ident(), []).append(
            f"{what} of {getattr(array, 'dtype', type(array))}"
        )

    with pytest.MonkeyPatch.context() as patch:
        for name in ("__float__", "__int__", "__bool__", "__index__", "__array__", "item", "tolist"):
            real = getattr(ArrayImpl, name)

            def spy(self: Any, *args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
                note(_name, self)
                return _real(self, *args, **kwargs)

            patch.setattr(ArrayImpl, name, spy)
        real_block = ArrayImpl.block_until_ready

        def block(self: Any) -> Any:
            if not (
                self.shape == () and self.dtype == np.uint32
            ):  # a cursor: the wait that the loop permits itself
                note("block_until_ready", self)
            return real_block(self)

        patch.setattr(ArrayImpl, "block_until_ready", block)
        for module, name in ((np, "asarray"), (np, "array"), (jax, "device_get"), (jax, "block_until_ready")):
            real_function = getattr(module, name)

            def convert(
                value: Any, *args: Any, _real: Any = real_function, _name: str = name, **kwargs: Any
            ) -> Any:
                if any(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(value)):
                    note(_name, value)
                return _real(value, *args, **kwargs)

            patch.setattr(module, name, convert)
        yield lambda thread: found.get(thread, [])


@pytest.mark.parametrize(
    "convert",
    [
        float,
        lambda x: np.asarray(x),
        lambda x: x.item(),
        bool,
        lambda x: jax.device_get(x),
        lambda x: x.block_until_ready(),
    ],
)
def test_promise_2_the_tripwire_catches_each_kind_of_conversion(convert):
    value = jax.numpy.ones(())
    with host_conversions() as found:
        convert(value)
        assert found(threading.get_ident())


def test_promises_2_and_5_no_host_conversion_and_no_compilation_in_1000_steps_with_20_rate_changes(tmp_path):
    trainer = make_trainer(tmp_path, flush_interval_s=0.01)
    steps = record(trainer, et.StepCompleted)

    @trainer.on(et.StepCompleted, every=50, lag=10)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.5 - event.step / 4000)

    data = batches(8)
    with trainer.session() as session:
        session.step(data[0])
        COMPILATIONS.start()
        with host_conversions() as found:
            for index in range(1, 1050):
                session.step(data[index % 8])
            on_this_thread = list(found(threading.get_ident()))
            compilations = COMPILATIONS.since()
    # Each write of a hyperparameter reads back the one leaf that it has just put there: no step is waited for.
    assert [what for what in on_this_thread if "asarray" not in what and "__array__" not in what] == []
    assert len(on_this_thread) <= 2 * 20
    assert compilations == 0
    used = {event.step: event.metrics["rate"] for event in steps}
    for step in range(50, 1001, 50):
        value = np.float32(0.5 - step / 4000)
        assert (used[step + 10], used[step + 11]) == (np.float32(0.5 - (step - 50) / 4000), value)


def test_promise_5_the_counter_of_compilations_counts_one():
    COMPILATIONS.start()
    jax.jit(lambda x: x * 3.25)(np.float32(1))
    assert COMPILATIONS.since() == 1


def test_promise_4_no_donated_leaf_survives_outside_keeping_steps(tmp_path):
    trainer = make_trainer(tmp_path)
    data = batches(8)
    survivors = []
    kept = 0
    with trainer.session() as session:
        session.step(data[0])
        for index in range(200):
            loop = session._run.loop
            before, taken = list(loop.carry.leaves), dict(session.control.snapshots)
            session.step(data[index % 8])
            if dict(session.control.snapshots) == taken:
                survivors += [leaf for leaf in before if not leaf.is_deleted()]
            else:
                kept += not any(leaf.is_deleted() for leaf in before)
            if index % 50 == 10:
                session.control.snapshot(f"at {index}")
    assert survivors == []
    assert kept == 4


def controlled_run(tmp_path: Any, seed: int, lag: int | None) -> tuple[list[Any], np.ndarray, list[int]]:
    """A run whose deciders are slow at random: (command log, final weights, order in which handlers finished)."""
    trainer = make_trainer(tmp_path, flush_interval_s=0.002)
    log = record(trainer, et.CommandApplied, et.HyperparamChanged)
    finished: list[int] = []
    generator = random.Random(seed)

    for name, every in (("a", 3), ("b", 5)):

        @trainer.on(et.StepCompleted, every=every, lag=lag, name=name)
        async def decide(event: et.StepCompleted, control: et.Control, name: str = name) -> None:
            await anyio.sleep(generator.random() * 0.02)
            finished.append(event.step * 10 + ord(name) % 10)
            control.scale_hyperparam("learning_rate", 0.9 + event.metrics["loss"] % 0.1, reason=name)

    def paced(epoch: int) -> Any:
        for number, batch in enumerate(batches(60)):
            time.sleep(generator.random() * 0.001)
            while trainer.step < number - 4:  # it is read ahead, by up to 64 batches
                time.sleep(0.0005)
            yield batch

    result = trainer.fit(paced, epochs=1)
    told = [(type(e), e.step, getattr(e, "new", None), getattr(e, "reason", None)) for e in log]
    return told, np.asarray(result.state["params"]["w"]), finished


def test_promise_10_random_delays_change_neither_command_log_nor_final_parameters(tmp_path):
    load = threading.Event()
    burners = [threading.Thread(target=lambda: [None for _ in iter(load.is_set, True)]) for _ in range(1)]
    for burner in burners:
        burner.start()
    try:
        runs = [controlled_run(tmp_path / str(seed), seed, 7) for seed in range(8)]
    finally:
        load.set()
        for burner in burners:
            burner.join()
    logs, weights, orders = zip(*runs, strict=True)
    assert len({str(log) for log in logs}) == 1
    assert len({w.tobytes() for w in weights}) == 1
    assert len(logs[0]) > 30
    assert len({tuple(order) for order in orders}) >= 6  # the delays did change the order of arrival


def test_promise_10_without_a_lag_the_same_delays_do_change_the_run(tmp_path):
    runs = [controlled_run(tmp_path / str(seed), seed, None) for seed in range(4)]
    assert len({str(log) for log, _, _ in runs}) > 1


@pytest.mark.parametrize("seed", range(4))
async def test_promise_13_cancelling_the_task_group_at_a_random_point_settles_everything(
    tmp_path, seed, anyio_backend
):
    trainer = make_trainer(tmp_path)
    steps = record(trainer, et.StepCompleted)

    @trainer.on(et.StepCompleted, every=7, lag=3)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        await anyio.sleep(0.001)
        control.scale_hyperparam("learning_rate", 0.99)

    def endless(epoch: int) -> Any:
        while True:
            yield from batches(4)

    with anyio.move_on_after(random.Random(seed).uniform(0, 0.4)):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: trainer.fit_async(endless, epochs=1))
            await anyio.sleep_forever()
    assert [event.step for event in steps] == list(range(1, trainer.step + 1))
    assert np.isfinite(np.asarray(trainer.state["params"]["w"])).all()
    with anyio.fail_after(10):  # the run waits for the thread that reads its data half a second only
        while [t for t in threading.enumerate() if t.name.startswith("eventtrain")]:  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_promise_13_what_was_not_handled_in_time_is_listed(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path, drain_timeout_s=0.3)

    @trainer.on(et.StepCompleted, name="endless")
    async def endless(event: et.StepCompleted) -> None:
        await anyio.sleep(60)

    result = await trainer.fit_async(batches(5), epochs=1)
    assert result.undelivered == {"endless": 5}


@pytest.mark.allow_blocking
async def test_promise_12_one_failing_subscriber_hurts_nobody(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path)
    steps = record(trainer, et.StepCompleted)
    failures = record(trainer, et.SubscriberFailed)
    generator = random.Random(0)
    plain: list[int] = []

    @trainer.on(et.StepCompleted, disable_after=None, name="raises")
    async def raises(event: et.StepCompleted) -> None:
        if generator.random() < 0.5:
            raise ValueError("at random")

    @trainer.on(et.StepCompleted, name="plain")
    def in_a_thread(event: et.StepCompleted) -> None:
        plain.append(event.step)
        if event.step % 2:
            raise OSError("in a thread")

    result = await trainer.fit_async(batches(50), epochs=1)
    assert result.step == 50
    assert [event.step for event in steps] == list(range(1, 51))
    assert plain == list(range(1, 51))
    statistics = trainer.bus.statistics()
    assert statistics["plain"].errors == 25
    assert len(failures) == statistics["raises"].errors + 25


def sharded() -> None:
    import tempfile
    import threading  # noqa: F401

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import eventtrain as et

    assert len(jax.devices()) == 8
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
    optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=0.01)

    def step_fn(state, batch):
        def loss_fn(params):
            return jnp.mean((batch["x"].astype(params["w"].dtype) @ params["w"] - 1.0) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {
            "loss": loss
        }

    for dtype in (jnp.float32, jnp.bfloat16):
        for steps_per_call in (1, 4):
            params = {
                "w": jax.device_put(
                    jnp.zeros((16, 8), dtype), NamedSharding(mesh, PartitionSpec(None, "data"))
                )
            }
            state = {"params": params, "opt_state": optimiser.init(params)}
            rows = NamedSharding(mesh, PartitionSpec("data"))
            data = [{"x": jax.device_put(jnp.ones((32, 16)) * i, rows)} for i in range(1, 9)]
            trainer = et.Trainer(step_fn, state, run_dir=tempfile.mkdtemp(), steps_per_call=steps_per_call)
            seen, hosts = [], {}

            @trainer.on(et.StepCompleted, every=3, lag=2)
            async def decide(event, control):
                control.scale_hyperparam("learning_rate", 0.5)
                control.snapshot(f"s{event.step}")

            @trainer.on(et.SnapshotTaken)
            async def keep(event, control):
                hosts[event.step] = await control.snapshots[event.tag].to_host()  # noqa: B023

            @trainer.on(et.StepCompleted)
            async def watch(event):
                seen.append(event.step)  # noqa: B023

            result = trainer.fit(data, epochs=3)
            assert seen == list(range(1, 25))
            assert sorted(hosts) == [5, 8, 11, 14, 17, 20, 23], sorted(hosts)
            assert result.state["params"]["w"].sharding.spec == PartitionSpec(None, "data")
            assert result.state["params"]["w"].dtype == dtype
            assert trainer._model.compiled.compilations == 1
    print("sharded: fine")


def test_a_state_sharded_over_8_devices_works_unchanged(run_on_devices):
    assert "sharded: fine" in run_on_devices(8, sharded)


def test_promise_2_holds_with_everything_that_watches_the_machine(tmp_path):
    watchers = [
        subs.DeviceStats(0.02),
        subs.StepTimer(every_steps=100, examples="examples", peak_flops=1e12),
        subs.OverheadMeter(every_s=0.02),
        subs.Profiler(((700, 702),)),
        subs.ProgressBar(table=True, console=Console(file=io.StringIO(), force_terminal=True)),
    ]
    trainer = make_trainer(tmp_path, subscribers=watchers, flush_interval_s=0.01)
    seen = record(trainer, et.MachineMeasured, et.ProfileCaptured)
    data = batches(8)
    with trainer.session() as session:
        session.step(data[0])
        COMPILATIONS.start()
        with host_conversions() as found:
            for index in range(1, 1050):
                session.step(data[index % 8])
            on_this_thread = list(found(threading.get_ident()))
            compilations = COMPILATIONS.since()
    assert on_this_thread == []
    assert compilations == 0
    assert {getattr(event, "source", event.kind) for event in seen} >= {"DeviceStats", "profile_captured"}
