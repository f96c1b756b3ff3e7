"""What the processes of a run tell each other about a checkpoint, and the checksums of shards."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from eventtrain.errors import SnapshotError
from eventtrain.loop.agreement.channel import Channel
from eventtrain.subscribers.checkpointing.manifest import SavedArray, SavedShard, checksum
from eventtrain.subscribers.checkpointing.processes import (
    Attempt,
    CheckpointPeers,
    CommittedByAll,
    GivenUp,
    process_of,
)
from tests.support.key_values import KeyValues

ARRAY = np.arange(24, dtype=np.float32).reshape(4, 6)
HALVES = (((0, 2), (0, 6)), ((2, 4), (0, 6)))


def described(*halves: int) -> SavedArray:
    shards = tuple(
        SavedShard(index=HALVES[half], crc32=checksum(ARRAY[slice(*HALVES[half][0])])) for half in halves
    )
    return SavedArray(dtype="float32", shape=(4, 6), crc32=None, shards=shards)


def test_the_shards_of_all_processes_describe_the_whole_array() -> None:
    whole = described(0).with_shards(described(1))
    assert whole.is_whole(ARRAY)
    assert SavedArray.model_validate_json(whole.model_dump_json()) == whole


def test_a_bit_that_flipped_in_a_shard_is_found() -> None:
    whole = described(0, 1)
    for row in range(4):
        broken = ARRAY.copy()
        broken.view(np.uint32)[row, 3] ^= 1
        assert not whole.is_whole(broken)
    assert not whole.is_whole(ARRAY.astype(np.float64))


def test_an_array_of_one_process_is_described_as_ever() -> None:
    saved = SavedArray.of(ARRAY)
    assert saved.model_dump() == {
        "dtype": "float32", "shape": (4, 6), "crc32": checksum(ARRAY), "key": None,
    }  # fmt: skip
    with pytest.raises(ValidationError, match="neither a checksum nor shards"):
        SavedArray(dtype="float32", shape=(4, 6), crc32=None)


class Exchange(Channel):
    """The keys of one run."""

    def __init__(self, store: KeyValues) -> None:
        super().__init__(store, "exchange/")


def peers(
    store: KeyValues,
    index: int,
    give_up: threading.Event | None = None,
    *,
    number: int = 1,
    earlier: list[str] | None = None,
) -> CheckpointPeers:
    def check() -> None:
        if give_up is not None and give_up.is_set():
            raise SnapshotError("the run ended")

    key = f"Checkpointer/{number}"
    return CheckpointPeers(Exchange(store), key, index, 3, check, [] if earlier is None else earlier)


def test_every_process_writes_into_the_folder_that_process_0_has_made(tmp_path: Path) -> None:
    store = KeyValues()
    first, second, third = (peers(store, index) for index in range(3))
    first.begin(tmp_path / ".tmp-step-5")
    for other in (second, third):
        assert other.next_message() == Attempt(name=".tmp-step-5")
        other.report()
    first.wait_for_parts()
    first.conclude(CommittedByAll(name="step-5", size_bytes=7))
    for other in (second, third):
        assert other.next_message() == CommittedByAll(name="step-5", size_bytes=7)


def test_a_part_that_cannot_be_written_fails_the_attempt_everywhere(tmp_path: Path) -> None:
    store = KeyValues()
    first, second, third = (peers(store, index) for index in range(3))
    for attempt in ("one", "two"):
        first.begin(tmp_path / attempt)
        for other in (second, third):
            assert other.next_message() == Attempt(name=attempt)
        second.report("OSError: No space left on device" if attempt == "one" else "")
        third.report()
        if attempt == "one":
            with pytest.raises(SnapshotError, match="process 1: OSError: No space left"):
                first.wait_for_parts()
        else:
            first.wait_for_parts()
    first.conclude(GivenUp(error="no further attempt"))
    assert [other.next_message() for other in (second, third)] == [GivenUp(error="no further attempt")] * 2


@pytest.mark.parametrize("index", [0, 1])
def test_a_wait_ends_when_this_process_gives_up(tmp_path: Path, index: int) -> None:
    give_up = threading.Event()
    one = peers(KeyValues(), index, give_up)
    if index == 0:
        one.begin(tmp_path / "attempt")
    threading.Timer(0.1, give_up.set).start()
    with pytest.raises(SnapshotError, match="the run ended"):
        one.wait_for_parts() if index == 0 else one.next_message()


def test_the_keys_of_a_checkpoint_are_deleted_when_all_are_at_the_next_one(tmp_path: Path) -> None:
    store, earlier = KeyValues(), list[str]()
    most = 0
    for number in range(1, 101):
        first, *others = (peers(store, index, number=number, earlier=earlier) for index in range(3))
        for attempt in ("one", "two"):
            first.begin(tmp_path / attempt)
            for other in others:
                assert other.next_message() == Attempt(name=attempt)
                other.report("OSError: No space left on device" if attempt == "one" else "")
            if attempt == "one":
                with pytest.raises(SnapshotError, match="process 1"):
                    first.wait_for_parts()
            else:
                first.wait_for_parts()
        first.conclude(CommittedByAll(name="step", size_bytes=7))
        most = max(most, len(store.values))
        for other in others:
            assert isinstance(other.next_message(), CommittedByAll)
    assert most <= 2 * 7  # three messages and four answers of the newest two


@pytest.mark.parametrize(
    ("path", "process"),
    [
        ("eventtrain.json", 0),
        ("arrays/manifest.ocdbt", 0),
        ("arrays/d/1f", 0),
        ("arrays/ocdbt.process_0/d/1f", 0),
        ("arrays/ocdbt.process_1/manifest.ocdbt", 1),
        ("arrays/ocdbt.process_5/d/1f", 2),  # of a checkpoint that six have written
        ("arrays/ocdbt.process_12", 0),
    ],
)
def test_each_file_of_a_checkpoint_belongs_to_one_process(path: str, process: int) -> None:
    assert process_of(path, 3) == process
