"""Values go to devices through one module, which has no hidden collective."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from eventtrain.device.placement import move, put, put_all
from tests.support.several_processes import run_processes

PACKAGE = Path(__file__).resolve().parents[2] / "eventtrain"


def calls_of_device_put(package: Path) -> Iterator[str]:
    """Each mention of `device_put` and its relatives in code outside `device/placement.py`."""
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name == "device/placement.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            mentioned = (
                [node.attr]
                if isinstance(node, ast.Attribute)
                else [node.id]
                if isinstance(node, ast.Name)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any("device_put" in one for one in mentioned):
                yield f"{name}:{node.lineno}"  # pyright: ignore[reportAttributeAccessIssue]


def test_no_other_module_calls_device_put() -> None:
    assert [*calls_of_device_put(PACKAGE)] == []


@pytest.mark.parametrize(
    "planted",
    ["import jax\njax.device_put(1)", "from jax import device_put as d", "import jax\nf = jax.device_put"],
)
def test_a_planted_device_put_is_found(tmp_path: Path, planted: str) -> None:
    folder = tmp_path / "eventtrain"
    (folder / "device").mkdir(parents=True)
    shutil.copy(PACKAGE / "device" / "placement.py", folder / "device")
    assert [*calls_of_device_put(folder)] == []
    (folder / "planted.py").write_text(planted)
    assert [line.split(":")[0] for line in calls_of_device_put(folder)] == ["planted.py"]


def test_put_is_device_put_on_the_devices_of_one_process() -> None:
    sharding = SingleDeviceSharding(jax.devices()[0])
    weak = put(jnp.asarray(1.0), sharding)
    assert weak.weak_type
    assert weak.committed
    assert not put(np.uint32(3)).committed
    assert put(np.float64(0.1), sharding).dtype == np.float32
    key = jax.random.key(3)
    assert (jax.random.key_data(put(key, sharding)) == jax.random.key_data(key)).all()
    assert [array.tolist() for array in put_all([np.arange(2), np.float32(1)], sharding)] == [[0, 1], 1.0]
    assert put_all([np.arange(2)])[0].tolist() == [0, 1]
    array = jnp.arange(3)
    assert move(array, sharding).tolist() == [0, 1, 2]


def test_put_shards_over_the_devices_of_one_process(run_on_devices) -> None:
    def on_two_devices() -> None:
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        from eventtrain.device.placement import put, put_all

        mesh = jax.make_mesh((2,), ("data",))
        for value in (np.arange(4), jax.numpy.arange(4)):
            array = put(value, NamedSharding(mesh, PartitionSpec("data")))
            assert [shard.data.tolist() for shard in array.addressable_shards] == [[0, 1], [2, 3]]
        replicated = NamedSharding(mesh, PartitionSpec())
        assert put_all([np.arange(2)], replicated)[0].sharding == replicated

    run_on_devices(2, on_two_devices)


ONE_PROCESS_ALONE = """
import os, threading
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from eventtrain.device.placement import move, put, put_all, read
from eventtrain.device.state import checksum

jax.distributed.initialize()
mesh = jax.make_mesh((4,), ("data",))
rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
guard = getattr(jax, "thread_guard", None)
client = jax._src.distributed.global_state.client

def puts():
    value = np.arange(8.0)
    for sharding, size in ((rows, 2), (everywhere, 8)):
        for given in (value, jnp.asarray(value), put(value, sharding)):
            array = put(given, sharding)
            assert array.sharding == sharding and array.dtype == np.float32, array
            for shard in array.addressable_shards:
                assert shard.data.shape == (size,)
                assert shard.data.tolist() == value[shard.index].tolist()
    key = jax.random.split(jax.random.key(3), 4)
    for sharding, given in ((everywhere, key[0]), (everywhere, key), (rows, key)):
        array = put(given, sharding)
        assert array.dtype == key.dtype and array.shape == given.shape
        for shard in array.addressable_shards:  # its index is that of the key's data
            assert (jax.random.key_data(shard.data) == jax.random.key_data(given)[shard.index]).all()
    assert [one.shape for one in put_all([value, np.int32(3)], everywhere)] == [(8,), ()]
    for number in range(1000):
        put(np.float32(number), everywhere)

def moves():  # in another thread than the guarded one, where no computation of both processes may run
    value = np.arange(32, dtype=np.float32).reshape(8, 4)
    own = NamedSharding(jax.make_mesh((2, 2), ("host", "own")), P("own"))
    for sharding, is_whole in ((rows, False), (everywhere, True), (own, True)):
        array = put(value, sharding)
        there = move(array, sharding.with_memory_kind("pinned_host"))
        assert there.sharding.memory_kind == "pinned_host" and there.shape == array.shape
        back = move(there, sharding)
        assert back.sharding == sharding
        for shard in back.addressable_shards:
            assert (np.asarray(shard.data) == value[shard.index]).all()
        for one in (array, there):
            found = read(one)
            assert (found is not None) == is_whole
            assert found is None or (found == value).all()
        assert (checksum(array) == checksum(value)) == is_whole
    keys = put(jax.random.split(jax.random.key(3), 4), rows)
    assert move(keys, rows.with_memory_kind("pinned_host")).dtype == keys.dtype
    done.append(True)

done = []
if jax.process_index() == 0:
    if guard is None:
        puts()
        moves()
    else:
        with guard(True):
            puts()
            thread = threading.Thread(target=moves)
            thread.start()
            thread.join()
    assert done
    print("1,000 values without the other process", flush=True)
client.wait_at_barrier("first", 60_000)
if jax.process_index() == 0:
    control = threading.Thread(target=jax.device_put, args=(np.float32(1), everywhere), daemon=True)
    control.start()
    control.join(3)
    print("device_put waits for the other process:", control.is_alive(), flush=True)
client.wait_at_barrier("second", 60_000)
os._exit(0)
"""


def test_one_process_puts_moves_and_reads_arrays_on_all_devices_without_the_other() -> None:
    first, _ = run_processes(2, ONE_PROCESS_ALONE, devices=2, timeout_s=90)
    assert first.stdout.splitlines()[-2:] == [
        "1,000 values without the other process",
        "device_put waits for the other process: True",
    ]
