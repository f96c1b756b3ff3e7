"""Reading checkpoints back: where the values go, which one is found, and what is not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.checkpointing.manifest import MANIFEST
from eventtrain.subscribers.checkpointing.reader import find_checkpoint
from tests.subscribers.checkpointing.writing import Writing, state_of
from tests.support.models import batches, make_trainer, record


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With the steps 3, 9 (tagged), 5 and 5 once more, in this order."""
    writing = Writing(tmp_path)
    writing.write(3)
    writing.write(9, tag="mine")
    writing.write(5)
    writing.write(5)
    writing.close()
    return tmp_path


def largest(path: Path) -> Path:
    files = [file for file in (path / "arrays").rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


# --- which one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "name"),
    [
        (True, "step-00000005-2"),
        (3, "step-00000003"),
        (5, "step-00000005-2"),
        (9, "step-00000009-mine"),
        ("mine", "step-00000009-mine"),
        ("step-3", "step-00000003"),
        ("step-00000005", "step-00000005"),
        (Path("step-00000005"), "step-00000005"),
    ],
)
def test_a_checkpoint_is_found_by_step_tag_name_and_as_the_last_commit(
    directory: Path, which: Any, name: str
) -> None:
    found = find_checkpoint(directory, which)
    assert found is not None
    assert found.path == directory / name


def test_a_path_leads_to_it_from_anywhere(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for which in (directory / "step-00000003", str(directory / "step-00000003")):
        found = find_checkpoint(elsewhere, which)
        assert found is not None
        assert found.path == directory / "step-00000003"
    monkeypatch.chdir(directory.parent)
    found = find_checkpoint(elsewhere, f"{directory.name}/step-00000003")
    assert found is not None
    assert found.path == directory / "step-00000003"


@pytest.mark.parametrize("which", [4, "other", Path("other"), "../step-00000003"])
def test_what_is_not_there_is_refused_with_what_there_is(directory: Path, which: Any) -> None:
    with pytest.raises(et.SnapshotError, match=r"There is no checkpoint .*; found: step-00000003, "):
        find_checkpoint(directory, which)


def test_where_nothing_was_saved_true_finds_nothing(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, True) is None
    assert find_checkpoint(tmp_path / "not there", True) is None
    with pytest.raises(et.SnapshotError, match="found: none"):
        find_checkpoint(tmp_path, 1)


def shorter(path: Path) -> None:
    file = largest(path)
    file.write_bytes(file.read_bytes()[:-10])


def missing(path: Path) -> None:
    largest(path).unlink()


def zeros(path: Path) -> None:
    """As a power cut may leave a file that was not synced."""
    file = largest(path)
    file.write_bytes(bytes(file.stat().st_size))


def flipped(path: Path) -> None:
    file = largest(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def other_values(path: Path) -> None:
    """The manifest is of other arrays than those that lie there."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["arrays"]["state"]["['count']"]["crc32"] += 1
    (path / MANIFEST).write_text(json.dumps(manifest))


def an_array_that_was_never_written(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["arrays"]["state"]["['huge']"] = {"dtype": "float32", "shape": [2**40, 2**20], "crc32": 0}
    (path / MANIFEST).write_text(json.dumps(manifest))


def no_arrays(path: Path) -> None:
    shutil.rmtree(path / "arrays")


def half_a_manifest(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text[: len(text) // 2])


BREAK = [
    shorter,
    missing,
    zeros,
    flipped,
    other_values,
    an_array_that_was_never_written,
    no_arrays,
    half_a_manifest,
]


@pytest.mark.parametrize("breaks", BREAK)
def test_a_newer_one_that_is_not_whole_is_left_out_with_a_warning(
    directory: Path, caplog: pytest.LogCaptureFixture, breaks: Callable[[Path], None]
) -> None:
    breaks(directory / "step-00000005-2")
    found = find_checkpoint(directory, True)
    assert found is not None
    assert found.path.name == "step-00000005"
    assert np.asarray(found.state(state_of(0))["params"]["w"])[0] == 5
    assert "step-00000005-2" in caplog.text
    with pytest.raises(et.SnapshotError, match="step-00000005-2"):
        et.load_state(directory / "step-00000005-2", like=state_of(0))


def test_a_run_resumes_from_the_last_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make() -> et.Trainer:
        return make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=2)])

    make().fit(batches(6), epochs=1)
    flipped(tmp_path / "run/ck/step-00000006")
    trainer = make()
    seen = record(trainer, et.RunResumed)
    assert trainer.fit(batches(6), epochs=1, resume=True).step == 6
    assert [event.step for event in seen] == [4]
    assert "checkpoints that cannot be read are left out" in caplog.text


def test_a_named_checkpoint_is_looked_for_in_every_checkpointer(tmp_path: Path) -> None:
    def make() -> et.Trainer:
        one, other = subs.Checkpointer("a", every=2, at_end=False), subs.Checkpointer("b", every=3)
        one.name, other.name = "one", "other"
        return make_trainer(tmp_path, subscribers=[one, other])

    make().fit(batches(7), epochs=1)
    for step in (3, 4, 6, 7):
        trainer = make()
        seen = record(trainer, et.RunResumed)
        trainer.fit(batches(7), epochs=1, resume=step)
        assert [event.step for event in seen] == [step]
    with pytest.raises(et.SnapshotError, match="no checkpoint 5"):
        make().fit(batches(7), epochs=1, resume=5)


# --- where the values go ----------------------------------------------------------------------------------------


def test_numpy_stays_numpy_and_jax_arrays_go_where_like_is(directory: Path) -> None:
    like = {
        "params": {"w": np.zeros(50, np.float32)},
        "count": jnp.int32(0),
        "none": jnp.zeros((0, 2)),
        "f": np.sum,
        "text": "kept",
    }
    state = et.load_state(directory / "step-00000003", like=like)
    assert type(state["params"]["w"]) is np.ndarray
    assert isinstance(state["count"], jax.Array)
    assert (state["f"], state["text"], state["none"].shape) == (np.sum, "kept", (0, 2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"more": jnp.zeros(2)}, r"missing \[\"\['more'\]\"\], unexpected nothing"),
        (lambda s: {}, r"missing nothing, unexpected \[\"\['count'\]\""),
        (lambda s: {"count": s["count"], "more": s["count"]}, r"missing \[\"\['more'\]\"\], unexpected"),
        (lambda s: {"params": {"w": jnp.zeros(51)}}, r"\['params'\]\['w'\] is float32\[50\]"),
        (
            lambda s: s | {"count": jnp.float32(0)},
            r"step-00000003 does not fit `like`: \['count'\] is int32\[\], not float32\[\]\. Pass",
        ),
        (lambda s: s | {"count": jnp.zeros(1, jnp.int32)}, r"int32\[1\]"),
        (lambda s: s | {"count": jax.random.key(0)}, r"\['count'\] is int32\[\]"),
        (lambda s: s | {"none": jnp.zeros((0, 3))}, r"\['none'\] is float32\[0, 2\]"),
        (lambda s: {"w": jnp.zeros(51)}, r"\['params'\]\['w'\] is float32\[50\]"),
        (lambda s: {"v": jnp.zeros(50)}, "unexpected"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(directory: Path, change: Any, said: str) -> None:
    with pytest.raises(et.StateError, match=said):
        et.load_state(directory / "step-00000003", like=change(state_of(0)))


@pytest.mark.parametrize(
    "part",
    [
        lambda s: {"params": s["params"]},
        lambda s: {"params": jax.eval_shape(lambda: s["params"])},
        lambda s: {"count": s["count"], "none": s["none"]},
        lambda s: {"none": s["none"]},
        lambda s: {"count": np.int32(0), "text": "mine"},
    ],
)
def test_a_part_of_the_state_is_read_as_the_whole_has_it(directory: Path, part: Any) -> None:
    like = part(state_of(0))
    whole = et.load_state(directory / "step-00000003", like=state_of(0))
    loaded = et.load_state(directory / "step-00000003", like=like)
    assert loaded.keys() == like.keys()
    for name in loaded.keys() - {"text"}:
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded[name], whole[name]))
    assert loaded.get("text", "mine") == "mine"


def test_a_part_of_another_kind_is_refused_and_a_deep_one_is_read(tmp_path: Path) -> None:
    state = {
        "a": {"b": jnp.ones(2), "c": (jnp.ones(3), jnp.ones(4))},
        "opt": optax.adam(0.1).init(jnp.ones(2)),
    }
    checkpointer = subs.Checkpointer("ck")
    trainer = et.Trainer(lambda s, b: (s, {}), state, subscribers=[checkpointer], run_dir=tmp_path)
    trainer.fit([np.float32(1)], epochs=1)
    path = tmp_path / "ck/step-00000001"
    assert et.load_state(path, like={"a": {"b": jnp.zeros(2)}})["a"]["b"].tolist() == [1, 1]
    for other in (
        {"a": state["a"], "opt": optax.sgd(0.1).init(jnp.ones(2))},  # no leaf of its own, and not adam's
        {"a": {"c": (jnp.ones(3),)}},
        {"a": {"c": [jnp.ones(3)]}},
    ):
        with pytest.raises(et.StateError, match="missing nothing, unexpected"):
            et.load_state(path, like=other)


def test_a_state_that_is_one_array_comes_back(tmp_path: Path) -> None:
    trainer = et.Trainer(
        lambda state, batch: (state + batch, {"n": batch}),
        jnp.zeros(3),
        subscribers=[subs.Checkpointer("ck"), weights := subs.Checkpointer("w", save_weights_only=True)],
        run_dir=tmp_path,
    )
    assert weights.name == "Checkpointer-2"
    trainer.fit([np.float32(1)] * 2, epochs=1)
    for folder in ("ck", "w"):
        path = tmp_path / folder / "step-00000002"
        assert et.load_state(path)["."].tolist() == [2, 2, 2]
        assert et.load_state(path, like=jnp.zeros(3)).tolist() == [2, 2, 2]


def test_a_state_of_empty_arrays_alone_comes_back(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        return state, {"n": batch}

    state = {"none": jnp.zeros((0, 3), jnp.bfloat16)}
    trainer = et.Trainer(step, state, subscribers=[subs.Checkpointer("ck")], run_dir=tmp_path)
    trainer.fit([np.float32(1)], epochs=1)
    back = et.load_state(tmp_path / "ck/step-00000001", like=state)
    assert (back["none"].shape, back["none"].dtype) == ((0, 3), jnp.bfloat16)


def test_orbax_alone_reads_the_arrays(directory: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        tree = orbax.restore(directory / "step-00000003/arrays")
    assert list(tree) == ["state"]
    assert np.asarray(tree["state"]["['params']['w']"]).tolist() == [3.0] * 50


@pytest.mark.allow_blocking  # it blocks by design; Orbax must only not take the running loop for its own
async def test_reading_on_the_thread_of_an_event_loop_works(directory: Path) -> None:
    assert et.load_state(directory / "step-00000003")["['count']"] == 3


def test_a_checkpoint_goes_to_other_devices_and_shardings(run_on_devices: Any, tmp_path: Path) -> None:
    """Written on 4 devices by rows; read and gone on from on 1, and on 8 by columns."""

    def script() -> None:
        from pathlib import Path

        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        import eventtrain as et
        from eventtrain import subscribers as subs

        count = len(jax.devices())
        mesh = Mesh(np.array(jax.devices()), ("data",))
        spec = PartitionSpec("data") if count == 4 else PartitionSpec(None, "data")
        place = NamedSharding(mesh, spec)
        state = {
            "w": jax.device_put(jnp.arange(64, dtype=jnp.float32).reshape(8, 8), place),
            "n": jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec())),
        }

        def step(state, batch):
            return {"w": state["w"] * 0.5 + batch, "n": state["n"] + 1}, {"sum": state["n"]}

        expected = np.arange(64, dtype=np.float32).reshape(8, 8)
        for i in range(6):
            expected = expected * np.float32(0.5) + np.float32(i)
        checkpointer = subs.Checkpointer("ck", every=3, max_to_keep=None)
        trainer = et.Trainer(step, state, subscribers=[checkpointer], run_dir="run")
        data = [np.float32(i) for i in range(6)]
        if count == 4:
            trainer.fit(data, epochs=1)
            assert Path("run/ck/step-00000003").is_dir()
            return
        loaded = et.load_state("run/ck/step-00000003", like=state)
        assert loaded["w"].sharding == place
        result = trainer.fit(data, epochs=1, resume=3)
        assert result.step == 6
        assert result.state["w"].sharding == place, result.state["w"].sharding
        assert np.asarray(result.state["w"]).tobytes() == expected.tobytes()

    for devices in (4, 1, 8):
        run_on_devices(devices, script)
