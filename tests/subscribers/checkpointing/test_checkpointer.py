"""Checkpointer: what is committed restores bit for bit, what fails says so, and nothing half-written looks whole."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.checkpointing import directory as checkpoint_folder
from eventtrain.subscribers.checkpointing import orbax as checkpoint_orbax
from eventtrain.subscribers.checkpointing import store as checkpoint_store
from eventtrain.subscribers.checkpointing import writer as checkpoint_writer

optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=0.125)


def new_state() -> dict[str, Any]:
    params = {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}
    return {
        "params": params,
        "half": jnp.ones(5, jnp.bfloat16),
        "opt_state": optimiser.init(params),
        "count": jnp.int32(0),
        "flag": jnp.array(True),
        "key": jax.random.key(7, impl="rbg"),
        "empty": jnp.zeros((0, 3)),
        "a/b ['c'] ü": jnp.uint8(3),
        "name": "static",
    }


def step_fn(state: dict[str, Any], batch: jax.Array) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    key, noise = jax.random.split(state["key"])

    def loss_fn(params: Any) -> jax.Array:
        target = batch + jax.random.normal(noise, params["w"].shape)
        return jnp.mean((params["w"] - target) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    params = optax.apply_updates(state["params"], updates)
    half = state["half"] * 0.9
    changed = {
        "params": params,
        "opt_state": opt_state,
        "key": key,
        "count": state["count"] + 1,
        "half": half,
    }
    return {**state, **changed}, {"loss": loss}


def states_by_step(data: list[np.ndarray]) -> list[list[bytes]]:
    """The states that a plain jitted loop goes through, on the host."""
    state = new_state()
    del state["name"]
    jitted = jax.jit(lambda state, batch: step_fn(state, batch)[0])
    states = [on_host(state)]
    for batch in data:
        state = jitted(state, batch)
        states.append(on_host(state))
    return states


def batches(count: int) -> list[np.ndarray]:
    return [np.float32(i) for i in range(count)]


def on_host(state: Any) -> list[bytes]:
    def raw(leaf: Any) -> bytes:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(state) if not isinstance(leaf, str)]


def make_trainer(tmp_path: Path, *checkpointers: et.Subscriber) -> tuple[et.Trainer, list[et.Event]]:
    trainer = et.Trainer(
        step_fn, new_state(), subscribers=checkpointers, run_dir=tmp_path / "run", run_id="run"
    )
    seen: list[et.Event] = []
    kinds = et.CheckpointStarted | et.CheckpointCommitted | et.CheckpointFailed | et.SubscriberFailed

    @trainer.on(kinds)
    async def see(event: et.Event) -> None:
        seen.append(event)

    return trainer, seen


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "ck").iterdir())


def test_every_committed_state_restores_bit_for_bit(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.Checkpointer("ck", every=5, max_to_keep=None))
    trainer.fit(batches(20), epochs=1)
    expected = states_by_step(batches(20))
    committed = [event for event in seen if isinstance(event, et.CheckpointCommitted)]
    assert [event.step for event in committed] == [5, 10, 15, 20]
    assert [event.kind for event in seen] == ["checkpoint_started", "checkpoint_committed"] * 4
    for event in committed:
        restored = subs.restore_state(event.path, like=new_state())
        assert on_host(restored) == expected[event.step]
        assert restored["name"] == "static"
        assert restored["key"].dtype == new_state()["key"].dtype
        files = [path for path in Path(event.path).rglob("*") if path.is_file()]
        assert event.size_bytes == sum(path.stat().st_size for path in files)
        metadata = json.loads((Path(event.path) / "eventtrain.json").read_text())
        assert (metadata["step"], metadata["tag"], metadata["schema_version"]) == (
            event.step,
            f"step-{event.step}",
            2,
        )


def test_without_like_arrays_come_by_their_path(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.Checkpointer("ck", every=1))
    trainer.fit(batches(1), epochs=1)
    arrays = subs.restore_state(tmp_path / "run" / "ck" / "step-00000001")
    assert arrays["['half']"].dtype == jnp.bfloat16
    assert arrays["['count']"] == 1
    assert arrays["['empty']"].shape == (0, 3)
    assert "['name']" not in arrays


def test_epochs_schedule_and_commands_are_both_served(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.Checkpointer("ck", every_epochs=2))

    @trainer.on(et.EpochCompleted, lag=0, where=lambda event: event.epoch == 2)
    async def ask(event: et.EpochCompleted, control: et.Control) -> None:
        control.checkpoint("asked")
        control.checkpoint("twice")

    trainer.fit(batches(3), epochs=4)
    assert not [event for event in seen if isinstance(event, et.SubscriberFailed | et.CheckpointFailed)]
    names = [Path(e.path).name for e in seen if isinstance(e, et.CheckpointCommitted)]
    assert names == ["step-00000006", "step-00000009-asked", "step-00000009-twice", "step-00000012"]
    expected = states_by_step(batches(3) * 4)
    for name in folders(tmp_path):
        assert (
            on_host(subs.restore_state(tmp_path / "run/ck" / name, new_state())) == expected[int(name[5:13])]
        )


def test_the_oldest_goes_only_after_the_new_one_is_committed(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.Checkpointer("ck", every=2, max_to_keep=2))
    at_commit: list[list[str]] = []

    @trainer.on(et.CheckpointCommitted)
    def look(event: et.CheckpointCommitted) -> None:
        at_commit.append([name for name in folders(tmp_path) if not name.startswith(".")])

    trainer.fit(batches(12), epochs=1)
    assert folders(tmp_path) == ["step-00000010", "step-00000012"]
    assert all(names for names in at_commit)
    assert len(at_commit) == 6


def test_a_run_that_goes_on_counts_its_earlier_checkpoints_and_overwrites_none(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.Checkpointer("ck", every=2, max_to_keep=3))
    trainer.fit(batches(4), epochs=1)
    trainer.fit(batches(4), epochs=1)
    assert folders(tmp_path) == ["step-00000004", "step-00000006", "step-00000008"]
    other = et.Trainer(
        step_fn,
        new_state(),
        subscribers=[subs.Checkpointer("ck", every=4)],
        run_dir=tmp_path / "run",
        run_id="other",
    )
    other.fit(batches(4), epochs=1)
    assert folders(tmp_path) == ["step-00000004", "step-00000004-2", "step-00000006", "step-00000008"]


@pytest.mark.parametrize("where", ["save", "sync", "rename"])
def test_a_failed_save_is_said_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    trainer, seen = make_trainer(tmp_path, subs.Checkpointer("ck", every=5, max_to_keep=1, retries=0))
    calls = 0

    def failing(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return call

    target, name = {
        "save": (checkpoint_orbax.ArrayFiles, "save"),
        "sync": (checkpoint_store.CheckpointStore, "_sync"),
        "rename": (atomic_files, "rename"),
    }[where]
    monkeypatch.setattr(target, name, failing(getattr(target, name)))
    trainer.fit(batches(10), epochs=1)
    failed = [event for event in seen if isinstance(event, et.CheckpointFailed)]
    assert [event.step for event in failed] == [10]
    assert "No space left" in failed[0].error
    assert folders(tmp_path) == ["step-00000005"]
    assert (
        on_host(subs.restore_state(tmp_path / "run/ck/step-00000005", new_state()))
        == states_by_step(batches(5))[-1]
    )


def test_orbax_is_only_ever_called_on_one_thread_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    for name in ("__init__", "write", "close"):
        original = getattr(checkpoint_store.CheckpointStore, name)

        def noting(*args: Any, original: Any = original, **options: Any) -> Any:
            threads.add(threading.current_thread().name)
            return original(*args, **options)

        monkeypatch.setattr(checkpoint_store.CheckpointStore, name, noting)
    trainer, _ = make_trainer(tmp_path, subs.Checkpointer("ck", every=1, max_to_keep=1))
    trainer.fit(batches(3), epochs=1)
    assert len(threads) == 1
    assert "Checkpointer" in threads.pop()


@pytest.mark.parametrize("tag", ["../escape", "a/b", "", "x" * 300])
def test_a_tag_that_is_no_folder_name_fails_by_name(tmp_path: Path, tag: str) -> None:
    trainer, seen = make_trainer(tmp_path, subs.Checkpointer("ck", at_end=False))

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 1, lag=0)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.checkpoint(tag)

    trainer.fit(batches(2), epochs=1)
    failed = [event for event in seen if isinstance(event, et.CheckpointFailed)]
    if tag == "":  # no tag at all
        assert folders(tmp_path) == ["step-00000001"]
        return
    assert len(failed) == 1, seen
    assert "tag" in failed[0].error
    assert folders(tmp_path) == []
    assert sorted(path.name for path in tmp_path.rglob("[!.]*")) == ["ck", "run"]


def test_what_a_killed_run_left_is_removed_and_never_in_the_way(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "ck"
    machine = checkpoint_folder._machine()
    stale = directory / f".tmp-{machine}-4194305-abc-step-00000002"  # above any process number there can be
    stale.mkdir(parents=True)
    (stale / "rest").write_text("half")
    trainer, seen = make_trainer(tmp_path, subs.Checkpointer("ck", every=2))
    trainer.fit(batches(2), epochs=1)
    assert folders(tmp_path) == ["step-00000002"]
    assert isinstance(seen[-1], et.CheckpointCommitted)


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"every": 1.5}, {"every_epochs": -1}, {"every_s": 0}, {"max_to_keep": 0}, {"every": True}],
)
def test_schedules_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.Checkpointer("ck", **options)
    assert next(iter(options)) in str(caught.value)


def test_two_checkpointers_get_two_names_and_both_write(tmp_path: Path) -> None:
    second = subs.Checkpointer("b", every=2)
    trainer, seen = make_trainer(tmp_path, subs.Checkpointer("a", every=2), second)
    assert second.name == "Checkpointer-2"
    trainer.fit(batches(2), epochs=1)
    parents = {Path(event.path).parent.name for event in seen if isinstance(event, et.CheckpointCommitted)}
    assert parents == {"a", "b"}


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(et.SnapshotError, match="not a checkpoint"):
        subs.restore_state(tmp_path)
    trainer, _ = make_trainer(tmp_path, subs.Checkpointer("ck", every=1))
    trainer.fit(batches(1), epochs=1)
    path = tmp_path / "run/ck/step-00000001"
    with pytest.raises(et.StateError, match="more"):
        subs.restore_state(path, {**new_state(), "more": jnp.zeros(2)})
    with pytest.raises(et.StateError, match="int32"):
        subs.restore_state(path, {**new_state(), "count": jnp.float32(0)})
    with pytest.raises(et.StateError, match="rbg"):
        subs.restore_state(path, {**new_state(), "key": jax.random.key(7)})
    metadata = json.loads((path / "eventtrain.json").read_text())
    (path / "eventtrain.json").write_text(json.dumps({**metadata, "schema_version": 99}))
    with pytest.raises(et.SnapshotError, match="99"):
        subs.restore_state(path)


async def test_it_works_beside_any_event_loop(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.Checkpointer("ck", every=5, every_s=60))
    await trainer.fit_async(batches(10), epochs=1)
    assert {event.step for event in seen if isinstance(event, et.CheckpointCommitted)} >= {5, 10}
    assert not [event for event in seen if isinstance(event, et.CheckpointFailed | et.SubscriberFailed)]


def test_a_sharded_state_comes_back_sharded(run_on_devices: Any) -> None:
    def script() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        import eventtrain as et
        from eventtrain import subscribers as subs

        mesh = Mesh(np.array(jax.devices()), ("data",))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        state = {
            "w": jax.device_put(jnp.arange(32, dtype=jnp.bfloat16).reshape(8, 4), rows),
            "n": jnp.int32(0),
        }

        def step(state, batch):
            w = (state["w"] * 0.5 + batch).astype(state["w"].dtype)
            return {"w": w, "n": state["n"] + 1}, {"sum": w.astype(jnp.float32).sum()}

        trainer = et.Trainer(step, state, subscribers=[subs.Checkpointer("ck", every=3)], run_dir="run")
        result = trainer.fit([np.float32(i) for i in range(6)], epochs=1)
        restored = subs.restore_state("run/ck/step-00000006", like=state)
        assert restored["w"].sharding == rows, restored["w"].sharding
        assert len(restored["w"].addressable_shards) == 8
        assert np.asarray(restored["w"]).tobytes() == np.asarray(result.state["w"]).tobytes()
        assert int(restored["n"]) == 6

    run_on_devices(8, script)


def test_one_command_is_served_by_all_checkpointers_however_long_one_of_them_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write the same cut, and the one who is done first does not take it from the other."""
    first_is_done = threading.Event()
    copy_to_host = checkpoint_writer.CheckpointWriter._parts

    def after_the_first(self: Any, claimed: Any) -> Any:
        if self._owner == "b":
            assert first_is_done.wait(30)
        return copy_to_host(self, claimed)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_parts", after_the_first)
    one, other = subs.Checkpointer("a", at_end=False), subs.Checkpointer("b", at_end=False)
    one.name, other.name = "a", "b"
    trainer, seen = make_trainer(tmp_path, one, other)

    @trainer.on(et.CheckpointCommitted)
    async def note(event: et.CheckpointCommitted) -> None:
        first_is_done.set()

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 2)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.checkpoint("asked")

    trainer.fit(batches(3), epochs=1)
    assert [event.kind for event in seen].count("checkpoint_committed") == 2, seen


# --- the end of a run -------------------------------------------------------------------------------------------


async def test_who_stops_before_still_hears_of_the_last_checkpoint(tmp_path: Path) -> None:
    """An Uploader, say, that stands before the Checkpointer: nobody stops before everything is written and said."""

    class Listening(et.Subscriber):
        heard: ClassVar[list[str]] = []

        async def on_checkpoint_committed(self, event: et.CheckpointCommitted) -> None:
            self.heard.append(Path(event.path).name)

        async def stop(self) -> None:
            self.heard.append("stop")

    listening = Listening()
    trainer, _ = make_trainer(tmp_path, listening, subs.Checkpointer("ck"))
    await trainer.fit_async(batches(3), epochs=1)
    assert listening.heard == ["step-00000003", "stop"]


def test_what_is_not_written_within_the_drain_timeout_is_said_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    write = checkpoint_store.CheckpointStore.write

    def held_up(self: Any, *args: Any, **options: Any) -> Any:
        assert released.wait(60)
        return write(self, *args, **options)

    monkeypatch.setattr(checkpoint_store.CheckpointStore, "write", held_up)
    trainer = et.Trainer(
        step_fn,
        new_state(),
        subscribers=[subs.Checkpointer("ck", every=2)],
        run_dir=tmp_path / "run",
        drain_timeout_s=0.5,
    )
    failed: list[et.SubscriberFailed] = []

    @trainer.on(et.SubscriberFailed)
    async def note(event: et.SubscriberFailed) -> None:
        failed.append(event)

    assert trainer.fit(batches(5), epochs=1).step == 5
    assert "has written the checkpoints of the steps [2, 4, 5]" in caplog.text
    assert [(event.event_kind, event.error) for event in failed] == [
        ("finish", "did not finish in time"),
        ("stop", "did not finish in time"),
    ]
    released.set()
    (thread,) = [one for one in threading.enumerate() if one.name.startswith("eventtrain Checkpointer")]
    thread.join(30)
    assert not thread.is_alive()
    assert folders(tmp_path) == ["step-00000002"]  # the one in progress; the others were given up
    assert "the run ended before its turn came" in caplog.text


def test_a_snapshot_in_pinned_host_memory_is_written_as_any_other(tmp_path: Path) -> None:
    trainer = et.Trainer(
        step_fn,
        new_state(),
        subscribers=[subs.Checkpointer("ck", every=2)],
        run_dir=tmp_path / "run",
        snapshot="host",
    )
    trainer.fit(batches(4), epochs=1)
    expected = states_by_step(batches(4))
    for step in (2, 4):
        state = et.load_state(tmp_path / f"run/ck/step-{step:08d}", like=new_state())
        assert on_host(state) == expected[step]


def test_checkpoints_by_the_clock_are_taken_and_the_run_stays_reproducible(tmp_path: Path) -> None:
    """They change nothing of the run, whenever they come."""
    trainer, seen = make_trainer(tmp_path, subs.Checkpointer("ck", every_s=1e-6, at_end=False))
    ended: list[et.RunCompleted] = []

    @trainer.on(et.RunCompleted)
    async def note(event: et.RunCompleted) -> None:
        ended.append(event)

    trainer.fit(batches(5), epochs=1)
    assert [event for event in seen if isinstance(event, et.CheckpointCommitted)]
    assert ended[0].deterministic


def test_the_best_value_goes_on_with_a_resumed_run(tmp_path: Path) -> None:
    def make() -> tuple[et.Trainer, subs.Checkpointer, list[int]]:
        best = subs.Checkpointer("best", monitor="score", mode="max", save_best_only=True, max_to_keep=None)
        best.name = "best"
        table = jnp.asarray([1.0, 9.0, 5.0, 10.0, 3.0], jnp.float32)

        def step(state: Any, batch: Any) -> Any:
            return {"n": state["n"] + 1}, {"score": table[state["n"]]}

        trainer = et.Trainer(
            step, {"n": jnp.int32(0)}, subscribers=[best, subs.Checkpointer("all")], run_dir=tmp_path
        )
        steps: list[int] = []

        @trainer.on(et.CheckpointCommitted, where=lambda event: "/best/" in event.path)
        async def note(event: et.CheckpointCommitted) -> None:
            steps.append(event.step)

        return trainer, best, steps

    first, _, steps = make()
    first.fit([np.float32(0)], epochs=2)
    assert steps == [1, 2]
    second, best, steps = make()
    second.fit([np.float32(0)], epochs=5, resume=True)
    assert steps == [4]
    assert best.state_dict()["best"] == {"version": 1, "value": 10.0, "step": 4, "before": 9.0}
    assert best.state_dict()["runs"] == [first.run_id, second.run_id]
    with pytest.raises(et.StateError, match="best cannot load"):
        best.load_state_dict({"version": 7})
