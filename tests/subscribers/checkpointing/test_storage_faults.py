"""A disk that fails: loud every time, nothing lost, older checkpoints whole, never half a one that looks whole."""

from __future__ import annotations

import errno
import itertools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.checkpointing import store as checkpoint_store
from eventtrain.subscribers.checkpointing import writer as checkpoint_writer
from eventtrain.subscribers.checkpointing.directory import committed_in
from eventtrain.subscribers.checkpointing.retention import Retention
from tests.subscribers.checkpointing.writing import Writing, state_of
from tests.support.models import batches, make_trainer, record

CALLS = ("make_folder", "write_text", "sync", "rename", "remove")


class Faults:
    """Counts what Checkpointers do to the disk themselves, and lets some of it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fails: Callable[[int, str], bool] = lambda number, name: False
        for name in CALLS:
            monkeypatch.setattr(atomic_files, name, self._counted(name, getattr(atomic_files, name)))

    def _counted(self, name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            self.count += 1
            if self.fails(self.count, name):
                raise OSError(errno.EIO, f"{name} fails, at call {self.count}")
            return original(*args)

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def whole(directory: Path) -> list[int]:
    """The steps of what looks like a checkpoint, each of which must be one."""
    looking = [path for path in directory.iterdir() if not path.name.startswith(".tmp-")]
    assert sorted(looking) == sorted(committed.path for committed in committed_in(directory))
    for path in looking:
        step = int(path.name[5:13])
        restored = et.load_state(path, like=state_of(0))
        assert np.asarray(restored["params"]["w"]).tobytes() == np.full(50, step, np.float32).tobytes()
        assert restored["count"] == step
    return sorted(int(path.name[5:13]) for path in looking)


def test_whichever_call_fails_it_is_said_and_older_checkpoints_stay_whole(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """Every call of the second of two saves fails once, with only the newest kept."""
    for number in itertools.count(1):
        directory = tmp_path / f"{number}"
        writing = Writing(directory, Retention(newest=1))
        assert writing.write(1).kind == "checkpoint_committed"
        caplog.clear()
        faults.count, before_it = 0, []  # Orbax does not write equally many files each time

        def fails(count: int, name: str, number: int = number, before_it: list[Any] = before_it) -> bool:
            if count < number:
                before_it.append(name)
            return count == number

        faults.fails = fails
        last = writing.write(2)
        faults.fails = lambda count, name: False
        if faults.count < number:
            assert last.kind == "checkpoint_committed"
            writing.close()
            break
        deleting = "rename" in before_it and "sync" in before_it[before_it.index("rename") :]
        assert last.kind == ("checkpoint_committed" if deleting else "checkpoint_failed"), (number, last)
        if deleting:
            assert "could not be deleted" in caplog.text
            assert whole(directory) in ([1, 2], [2])
        else:
            assert isinstance(last, et.CheckpointFailed)
            assert f"at call {number}" in last.error
            assert last.requested_by == "owner"
            assert whole(directory) == [1]
            assert not list(directory.glob(".tmp-*"))
        assert writing.request.in_flight == 0
        assert writing.write(3).kind == "checkpoint_committed"
        assert whole(directory) == [3]
        writing.close()
    # Make, write, sync of some files and folders, rename, sync; rename and remove the older one.
    assert number > 12


def test_nothing_of_a_checkpoint_is_to_be_seen_before_all_of_it_is_on_disk(
    tmp_path: Path, faults: Faults
) -> None:
    writing = Writing(tmp_path)
    writing.write(1)
    calls: list[tuple[str, list[str]]] = []

    def look(number: int, name: str) -> bool:
        calls.append((name, sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".")))
        return False

    faults.fails = look
    writing.write(2)
    writing.close()
    *before, last = calls
    assert all(seen == ["step-00000001"] for _, seen in before)
    assert [name for name, _ in before][:2] == ["make_folder", "write_text"]
    assert {name for name, _ in before[2:-1]} == {"sync"}
    assert before[-1][0] == "rename"
    assert last == ("sync", ["step-00000001", "step-00000002"])


def test_where_another_process_takes_the_name_first_the_next_one_is_taken(
    tmp_path: Path, faults: Faults
) -> None:
    writing = Writing(tmp_path)

    def faster(number: int, name: str) -> bool:
        other = tmp_path / "step-00000002"
        if name == "rename" and not other.exists():
            other.mkdir()
            (other / "theirs").touch()
        return False

    faults.fails = faster
    written = writing.write(2)
    writing.close()
    assert isinstance(written, et.CheckpointCommitted)
    assert Path(written.path).name == "step-00000002-2"
    assert [path.name for path in (tmp_path / "step-00000002").iterdir()] == ["theirs"]


def test_what_fails_for_a_while_is_tried_again(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    writing = Writing(tmp_path, retries=2)
    failures = 0

    def twice(number: int, name: str) -> bool:
        nonlocal failures
        failures += name == "rename"
        return name == "rename" and failures <= 2

    faults.fails = twice
    assert writing.write(1).kind == "checkpoint_committed"
    assert caplog.text.count("could not be written (attempt") == 2
    failures = -1  # one more than it tries
    assert writing.write(2).kind == "checkpoint_failed"
    assert [event.kind for event in writing.events].count("checkpoint_started") == 2
    assert whole(tmp_path) == [1]
    writing.close()


def test_what_is_no_fault_of_the_disk_is_not_tried_again(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    writing = Writing(tmp_path, retries=5)
    for tag in ("../escape", "a/b", "x" * 300, "\x00", "con\n"):
        before = faults.count
        failed = writing.write(1, tag=tag)
        assert isinstance(failed, et.CheckpointFailed)
        assert "ConfigurationError" in failed.error
        assert faults.count == before
    assert "attempt" not in caplog.text
    assert list(tmp_path.iterdir()) == []
    writing.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def noise_step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """The state of step k is 60 kB that cannot be compressed."""
    return {"x": state["x"] * 1.001 + batch, "n": state["n"] + 1}, {"n": state["n"]}


def noise_state() -> dict[str, Any]:
    noise = np.random.default_rng(0).normal(size=15_000).astype(np.float32)
    return {"x": jnp.asarray(noise), "n": jnp.int32(0)}


def states_after(steps: int) -> list[bytes]:
    trainer = et.Trainer(noise_step, noise_state())
    states: list[bytes] = []
    for _ in range(steps):
        trainer.fit([np.float32(1)], epochs=1)
        states.append(np.asarray(trainer.state["x"]).tobytes())
    return states


# Orbax gives up at the first array that cannot be written; the others then report to an event loop that it has closed.
orbax_leaves_others = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@orbax_leaves_others
def test_on_a_full_disk_training_goes_on_and_older_checkpoints_are_whole(small_disk: Path) -> None:
    trainer = et.Trainer(
        noise_step,
        noise_state(),
        run_dir=small_disk,
        subscribers=[subs.Checkpointer("ck", every=1, max_to_keep=None, retries=0, when_full="wait")],
    )
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed)
    assert trainer.fit([np.float32(1)] * 8, epochs=1).step == 8
    committed = [event.step for event in seen if isinstance(event, et.CheckpointCommitted)]
    failed = [event for event in seen if isinstance(event, et.CheckpointFailed)]
    assert 2 <= len(committed) < 8
    assert [*committed, *(event.step for event in failed)] == list(range(1, 9))
    assert all("No space left" in event.error or "ENOSPC" in event.error for event in failed), failed[0].error
    expected = states_after(len(committed))
    assert sorted(path.name for path in (small_disk / "ck").iterdir()) == [
        f"step-{step:08d}" for step in committed
    ]
    for step in committed:
        state = et.load_state(small_disk / f"ck/step-{step:08d}", like=noise_state())
        assert np.asarray(state["x"]).tobytes() == expected[step - 1]


def test_a_disk_that_stays_full_is_reported_in_few_lines_without_a_delay_and_at_the_end(
    small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def attempts(retries: int, delay_s: float, wait: Any) -> Iterator[int]:
        waits.extend([delay_s] * retries)
        return iter(range(1, retries + 2))

    monkeypatch.setattr(checkpoint_writer, "attempts", attempts)
    (small_disk / "rubbish").write_bytes(b"x" * 250_000)
    trainer = et.Trainer(
        noise_step,
        noise_state(),
        run_dir=small_disk,
        subscribers=[subs.Checkpointer("ck", every=1, max_to_keep=None, when_full="wait", retry_delay_s=7)],
    )
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed, et.SubscriberFailed)
    trainer.fit([np.float32(1)] * 20, epochs=1)
    newest = max(event.step for event in seen if isinstance(event, et.CheckpointCommitted))
    failed = [event for event in seen if isinstance(event, et.CheckpointFailed)]
    assert [event.step for event in failed] == list(range(newest + 1, 21))
    assert all("No space left on device: the checkpoint needs about" in event.error for event in failed)
    assert waits == [7, 7] * (
        newest + 1
    )  # each committed checkpoint might retry; of the failed ones only the first does
    lines = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert len(lines) <= 2 + 5 + 1, lines
    (event,) = [event for event in seen if isinstance(event, et.SubscriberFailed)]
    assert (event.subscriber, event.event_kind) == ("Checkpointer", "finish")
    assert f"the newest checkpoint is that of step {newest}; the last {20 - newest} could not" in event.error
    assert event.error in lines[-1]


def test_the_cause_of_a_failure_in_tensorstore_comes_first() -> None:
    path = "/a/long/path/of/a/checkpoint" * 20
    error = ValueError(
        f'RESOURCE_EXHAUSTED: Error writing "state/0" at local file "{path}": Failed to write 70388 bytes to file '
        f"19: No space left on device [os_error_code='28'] [tensorstore_spec='{{}}']"
    )
    text = checkpoint_writer._short(error)
    assert text.startswith('No space left on device (ValueError: RESOURCE_EXHAUSTED: Error writing "state/0"')
    assert len(text) < 250
    assert checkpoint_writer._short(OSError(28, "full")) == "OSError: [Errno 28] full"


def test_what_orbax_creates_again_after_a_failure_is_removed_at_the_end(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = Writing(tmp_path)
    removed: list[Path] = []
    remove = atomic_files.remove

    def note(path: Path) -> None:
        removed.append(path)
        remove(path)

    monkeypatch.setattr(atomic_files, "remove", note)
    faults.fails = lambda number, name: name == "write_text"
    writing.write(1)
    (late,) = removed
    (late / "arrays").mkdir(parents=True)  # another array of the failed save
    writing.close()
    assert list(tmp_path.iterdir()) == []


@orbax_leaves_others
def test_with_room_again_the_next_checkpoint_is_committed_and_only_then_an_old_one_deleted(
    small_disk: Path,
) -> None:
    (small_disk / "rubbish").write_bytes(b"x" * 290_000)
    trainer = et.Trainer(
        noise_step,
        noise_state(),
        run_dir=small_disk,
        subscribers=[subs.Checkpointer("ck", every=1, max_to_keep=1, retries=0, max_in_flight=1)],
    )
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed)

    @trainer.on(et.CheckpointFailed, once=True)
    def clean(event: et.CheckpointFailed) -> None:
        assert [path.name for path in (small_disk / "ck").iterdir()] == ["step-00000001"]
        (small_disk / "rubbish").unlink()

    trainer.fit([np.float32(1)] * 2, epochs=1)
    trainer.fit([np.float32(1)] * 2, epochs=1)
    assert [event.kind.removeprefix("checkpoint_") for event in seen] == [
        "committed", "failed", "committed", "committed"
    ]  # fmt: skip
    assert [path.name for path in (small_disk / "ck").iterdir()] == ["step-00000004"]


def test_a_limit_of_the_size_of_files_is_said_and_leaves_nothing_behind(run_on_devices: Any) -> None:
    def script() -> None:
        import resource
        from pathlib import Path

        import jax.numpy as jnp
        import numpy as np

        import eventtrain as et
        from eventtrain import subscribers as subs

        def step(state, batch):
            return {"x": state["x"] + batch}, {"n": batch}

        noise = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
        checkpointer = subs.Checkpointer("ck", every=1, max_to_keep=1, retries=0, at_end=False)
        trainer = et.Trainer(step, {"x": jnp.asarray(noise)}, subscribers=[checkpointer], run_dir="run")
        seen = []
        trainer.on(et.CheckpointCommitted | et.CheckpointFailed)(seen.append)
        trainer.fit([np.float32(1)], epochs=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        trainer.fit([np.float32(1)] * 2, epochs=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        kinds = [event.kind for event in seen]
        assert kinds == ["checkpoint_committed", "checkpoint_failed", "checkpoint_failed"], kinds
        assert "large" in seen[1].error or "EFBIG" in seen[1].error, seen[1].error
        assert [path.name for path in Path("run/ck").iterdir()] == ["step-00000001"]
        state = et.load_state("run/ck/step-00000001", like={"x": jnp.asarray(noise)})
        assert np.asarray(state["x"]).tobytes() == (noise + np.float32(1)).tobytes()

    run_on_devices(1, script)


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_after_a_failure_training_goes_on_or_stops_as_configured(
    tmp_path: Path, faults: Faults, on_failure: Any
) -> None:
    checkpointer = subs.Checkpointer("ck", every=2, retries=0, on_failure=on_failure, max_in_flight=1)
    trainer = make_trainer(tmp_path, subscribers=[checkpointer])
    seen = record(trainer, et.CheckpointFailed, et.RunCompleted)
    faults.fails = lambda number, name: name == "write_text"
    dealt_with = anyio.Event()

    @trainer.on(et.CheckpointFailed if on_failure == "continue" else et.CommandApplied)
    async def note(event: et.Event) -> None:
        dealt_with.set()

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 5)
    async def wait(event: et.StepCompleted, control: et.Control) -> None:
        await dealt_with.wait()

    result = trainer.fit(batches(9), epochs=1)
    assert seen[0].step == 2
    assert seen[0].requested_by == "Checkpointer"
    if on_failure == "continue":
        assert (result.step, result.stop_reason) == (9, "completed")
    else:
        assert result.stop_reason == "the checkpoint of step 2 failed"
        assert result.step <= 5


def test_a_directory_that_cannot_be_made_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ck").write_text("a file")
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=2)])
    with pytest.raises(
        et.ConfigurationError, match=r"Checkpointer cannot write .*ck: a file is in its place"
    ):
        trainer.fit(batches(2), epochs=1)
    assert trainer.step == 0


def test_a_failure_in_closing_orbax_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any) -> None:
        raise OSError(errno.EIO, "in the background")

    monkeypatch.setattr(checkpoint_store.CheckpointStore, "close", failing)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=2)])
    seen = record(trainer, et.SubscriberFailed)
    trainer.fit(batches(2), epochs=1)
    assert [(event.subscriber, event.event_kind) for event in seen] == [("Checkpointer", "stop")]
    assert "in the background" in seen[0].error
