"""The manifest: what it says comes back as it was, and what somebody else wrote into it runs nothing."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.bus.barrier import SubscriptionCheckpoint
from eventtrain.control.run_state import SavedCommand, pack, unpack
from eventtrain.subscribers.checkpointing.manifest import (
    MANIFEST,
    SavedArray,
    checksum,
    named_leaves,
    nested,
    part_of,
    read_manifest,
    sealed,
)
from tests.subscribers.checkpointing.writing import Writing, complete_cut

json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def equal(one: Any, other: Any) -> bool:
    """As JSON sees it, with NaN equal to NaN and -0.0 not to 0.0."""
    return repr(one) == repr(other)


@pytest.mark.slow
def test_the_states_of_subscribers_come_back_as_they_were(tmp_path: Path) -> None:
    writing = Writing(tmp_path)
    steps = iter(range(1, 1000))

    @given(st.dictionaries(st.text(), json_data, max_size=4), st.floats())
    def check(state: dict[str, Any], loss: float) -> None:
        step = next(steps)
        metrics = {"loss": loss, "n": 2**60, "ok": True}
        unhandled = et.StepCompleted(step=step, epoch=0, batch=step, metrics=metrics)
        share = SubscriptionCheckpoint(state, (unhandled,), (True,), spent=True)
        written = writing.write(step, cut=complete_cut(step, {"it": share}), loss=loss)
        assert isinstance(written, et.CheckpointCommitted), written
        manifest = read_manifest(Path(written.path))
        assert manifest.facts is not None
        back = manifest.facts.shares["it"].share()
        assert equal(back.state, state)
        assert back.unhandled == (unhandled,)
        assert (back.decided_on, back.spent) == ((True,), True)
        assert equal(manifest.metrics, {"loss": loss})
        assert manifest.step == step

    check()
    writing.close()


def test_the_kinds_on_disk_are_those_of_earlier_versions_whatever_the_classes_are_called(
    tmp_path: Path,
) -> None:
    share = SubscriptionCheckpoint({"n": 1}, (), (), spent=False)
    written = Writing(tmp_path).write(1, cut=complete_cut(1, {"it": share}))
    assert isinstance(written, et.CheckpointCommitted), written
    facts = json.loads((Path(written.path) / MANIFEST).read_text())["facts"]
    assert facts["kind"] == "run_facts"
    assert (facts["loop"]["kind"], facts["stream"]["kind"]) == ("loop_facts", "stream_facts")
    assert facts["stream"]["epoch_means"]["kind"] == "saved_means"
    assert facts["shares"]["it"]["kind"] == "saved_share"
    assert SavedCommand.model_fields["kind"].default == "saved_order"


@given(
    st.dictionaries(
        st.sampled_from(["state", "extensions", "kept/a", "kept/a/b", "kept/c.d", "kept_extensions/a"]),
        st.dictionaries(st.text(min_size=1), st.integers(), max_size=3),
    )
)
def test_parts_are_nested_and_found_again(parts: dict[str, dict[str, int]]) -> None:
    tree = nested(parts)
    assert set(tree) <= {"state", "extensions", "kept", "kept_extensions"}
    assert {part: part_of(tree, part) for part in parts} == parts
    assert part_of(tree, "kept/none") == {}


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1.5),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.zeros((3, 0)),
        np.array([True, False]),
        np.array([1.5, -0.0, np.nan], ml_dtypes.bfloat16),
        np.array([1.5, 2], ml_dtypes.float8_e4m3fn),
        np.array([1 + 2j]),
        np.float16(2),
    ],
)
def test_every_kind_of_array_has_a_checksum_of_its_bytes(array: Any) -> None:
    stored, known = np.asarray(array), SavedArray.of(array)
    assert known.crc32 == checksum(np.array(array, order="C"))
    assert (known.shape, jnp.dtype(known.dtype)) == (np.shape(array), np.asarray(array).dtype)
    if stored.size:
        changed = np.array(stored, order="C")
        raw = changed.reshape(-1).view(np.uint8)
        raw[-1] ^= 1
        assert checksum(changed) != known.crc32


def test_leaves_are_named_by_their_paths_and_what_is_no_array_is_left_out() -> None:
    state = {"a": [jnp.zeros(2), "text", 3], "k": jax.random.key(0), "f": np.sum, "s": np.array(["x"])}
    assert list(named_leaves(state)) == ["['a'][0]", "['k']"]
    assert list(named_leaves(jnp.zeros(2))) == ["."]


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def hostile(tmp_path: Path) -> list[Any]:
    blob = pickle.dumps(Bomb(tmp_path / "exploded"))
    call = f"__import__('pathlib').Path({str(tmp_path / 'exploded')!r}).touch()"
    return [
        blob,
        b"\x80\x04" + blob,
        call,
        "[" * 100_000,
        "9" * 5_000,
        "NaN",
        "null",
        "[]",
        '"text"',
        json.dumps({"format": call}),
        "\xff\xfe",
    ]


def test_a_file_that_is_no_manifest_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    for content in hostile(tmp_path):
        (tmp_path / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode("latin1"))
        with pytest.raises(et.SnapshotError, match="not a checkpoint of eventtrain"):
            read_manifest(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    writing = Writing(tmp_path_factory.mktemp("whole"))
    path = Path(writing.write(3, cut=complete_cut(3, {"it": SubscriptionCheckpoint({"a": 1})})).path)  # type: ignore[attr-defined]
    writing.close()
    return json.loads((path / MANIFEST).read_text())


WRONG = [
    ("step", -1),
    ("step", "__import__('os')"),
    ("step", 1.5),
    ("arrays", {"state": {"x": {"dtype": "O", "shape": ["a"], "crc32": 0}}}),
    ("arrays", []),
    ("arrays", {"state": {"x": {"dtype": "nonsense", "shape": [1], "crc32": 0}}}),
    ("arrays", {"state": {"x": {"dtype": "object", "shape": [1], "crc32": 0}}}),
    ("arrays", {"state": {"x": {"dtype": "float32", "shape": [-1], "crc32": 0}}}),
    ("facts", {"loop": "x"}),
    ("facts", {"loop": {}, "stream": {}, "shares": {}, "surplus": 1}),
    ("surplus", 1),
    ("time", "yesterday"),
    ("files", {"../../etc/passwd": "x"}),
    ("tag", {"$eval": "1"}),
    ("step", 4),
    ("epoch", 1),
    ("weights_only", True),
    ("kept_steps", {"best": 2}),
    ("params", {"['w']": "['params']['nowhere']"}),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_manifest_with_something_wrong_is_refused_by_name(
    tmp_path: Path, manifest: dict[str, Any], key: str, value: Any
) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(sealed({**manifest, key: value})))
    with pytest.raises(et.SnapshotError, match=f"(?s)is damaged.*{key}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 3, 99, "2", None, math.inf])
def test_another_version_is_refused_with_what_to_do(
    tmp_path: Path, manifest: dict[str, Any], version: Any
) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "schema_version": version}))
    with pytest.raises(et.SnapshotError, match="the version of eventtrain that wrote it"):
        read_manifest(tmp_path)


@pytest.mark.slow
def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    """Of the whole text: each bit is flipped alone; the result is refused, or means the same."""
    writing = Writing(tmp_path)
    share = SubscriptionCheckpoint(
        {"best": 0.1}, (et.StepCompleted(step=3, epoch=0, batch=3, metrics={}),), (True,)
    )
    path = Path(writing.write(3, cut=complete_cut(3, {"it": share}), loss=0.5).path)  # type: ignore[attr-defined]
    writing.close()
    whole, original = (path / MANIFEST).read_bytes(), read_manifest(path)
    accepted = 0
    for bit in range(
        0, 8 * len(whole), 3
    ):  # 3 and 8 have no common factor, so every bit of a byte has its turn
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / MANIFEST).write_bytes(flipped)
        try:
            read = read_manifest(path)
        except et.SnapshotError:
            continue
        accepted += 1
        assert equal(read, original), (bit, bytes(flipped[bit // 8 - 20 : bit // 8 + 20]))
    assert accepted < len(whole) / 2  # white space


def test_a_folder_is_of_the_step_that_its_name_says(tmp_path: Path) -> None:
    writing = Writing(tmp_path)
    path = Path(writing.write(3).path)  # type: ignore[attr-defined]
    writing.close()
    for name in ("step-00000003-2", "step-00000003-tag", "copy", "step-3"):
        path = path.rename(tmp_path / name)
        assert read_manifest(path).step == 3
    path = path.rename(tmp_path / "step-00000004")
    with pytest.raises(et.SnapshotError, match="is named after step 4, but holds step 3"):
        read_manifest(path)
    with pytest.raises(et.ConfigurationError, match="are of the step that they contain"):
        subs.Checkpointer("ck", template="step-{epoch:08d}")


ORDER = {
    "command": {"kind": "stop", "due": 5},
    "cause_step": 3,
    "cause_seq": 1,
    "subscriber": "it",
    "issue": 0,
}
EVENT = et.StepCompleted(step=3, epoch=0, batch=3, metrics={}, seq=1).model_dump(mode="json")

IMPOSSIBLE = [
    ("loop", {"step": -1}),
    ("loop", {"step": 2}),
    ("loop", {"epoch": 5}),
    ("loop", {"epoch": -1}),
    ("loop", {"batch": 2}),
    ("loop", {"batch": -3}),
    ("loop", {"epoch_first_step": 1}),
    ("loop", {"epoch_first_step": 9}),
    ("loop", {"start_step": 4}),
    ("loop", {"start_epoch": 1}),
    ("loop", {"in_epoch": False}),
    ("loop", {"evaluated_batches": -1}),
    ("loop", {"steps": 0}),
    ("loop", {"data": {"x": 1}}),
    ("loop", {"data": {"base64": 5}}),
    ("loop", {"data": {"base64": "%"}}),
    ("loop", {"data": {"mapping": [[1, 2, 3]]}}),
    ("loop", {"data": {"mapping": [[{"list": []}, 1]]}}),
    ("loop", {"data": {"list": 3}}),
    ("loop", {"orders": [{**ORDER, "command": {"kind": "stop", "due": None}}]}),
    ("loop", {"orders": [{**ORDER, "command": {"kind": "pause", "due": 2}}]}),
    ("loop", {"orders": [{**ORDER, "command": {"kind": "explode", "due": 5}}]}),
    ("loop", {"orders": [{**ORDER, "cause_step": 4}]}),
    ("loop", {"orders": [{**ORDER, "cause_seq": 99}]}),
    ("loop", {"orders": [{**ORDER, "issue": -1}]}),
    ("stream", {"seq": -1}),
    ("stream", {"epoch_means": {"sums": {"loss": "x"}}}),
    ("shares", {"it": {"decided_on": [True]}}),
    ("shares", {"it": {"failures": -1}}),
    ("shares", {"it": {"unhandled": [{"kind": "nonsense"}], "decided_on": [False]}}),
    ("shares", {"it": {"unhandled": [{**EVENT, "step": 4}], "decided_on": [True]}}),
    ("shares", {"it": {"unhandled": [{**EVENT, "seq": 99}], "decided_on": [True]}}),
]


@pytest.mark.parametrize(("part", "changes"), IMPOSSIBLE)
def test_a_record_that_contradicts_itself_is_refused_by_name_whatever_its_checksum(
    tmp_path: Path, manifest: dict[str, Any], part: str, changes: dict[str, Any]
) -> None:
    facts = manifest["facts"]
    changed = sealed({**manifest, "facts": {**facts, part: {**facts[part], **changes}}})
    (tmp_path / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(et.SnapshotError, match=r"(?s)is damaged: its eventtrain.json is not valid"):
        read_manifest(tmp_path)


@given(json_data)
def test_what_no_iterator_had_is_a_value_error(data: Any) -> None:
    try:
        unpacked = unpack(data)
    except ValueError:
        return
    assert equal(unpack(pack(unpacked)), unpacked)
