"""How a checkpoint lies on disk, how it gets there in one piece, and how it is read back. Blocking; no event loop.

Layout of ``<directory>/step-00000100``::

    arrays/           the state's arrays, as Orbax writes {"state": {path in the state: array}}
    eventtrain.json   step, epoch, tag, run_id, and what Orbax cannot hold: implementations of typed PRNG keys,
                      empty arrays

Both are written to a folder whose name starts with ``.tmp-`` and get their name by one rename when they are on disk.
Only JSON and arrays are read back, so reading a checkpoint runs none of its content.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from eventtrain.errors import SnapshotError, StateError

FORMAT = "eventtrain-checkpoint"
SCHEMA_VERSION = 1
METADATA = "eventtrain.json"
ARRAYS = "arrays"
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Committed:
    """A checkpoint on disk under its final name."""

    path: Path
    size_bytes: int


class Store:
    """Writes checkpoints into one directory. All methods on one and the same thread: it owns Orbax."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{TEMPORARY}*"):
            if not _is_running(left.name.removeprefix(TEMPORARY).split("-")[0]):
                shutil.rmtree(left, ignore_errors=True)

    def free_path(self, name: str) -> Path:
        """Where a checkpoint called ``name`` can lie without touching one that is there."""
        names = (name if n == 1 else f"{name}-{n}" for n in count(1))
        return next(path for path in (self.directory / each for each in names) if not path.exists())

    def write(self, path: Path, host_state: Any, metadata: Mapping[str, Any]) -> Committed:
        """Make ``host_state`` (NumPy arrays, and keys with ``data`` and ``impl``) durable under ``path``.

        Raises:
            Exception: whatever went wrong; nothing lies under ``path`` then.
        """
        staging = self.directory / f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
        try:
            staging.mkdir()
            arrays, extra = _encode(host_state)
            self._orbax.save(staging / ARRAYS, {"state": arrays})
            facts = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **metadata, **extra}
            (staging / METADATA).write_text(json.dumps(facts, indent=1) + "\n")
            size_bytes = _sync(staging)
            os.rename(staging, path)
            _sync_one(self.directory)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return Committed(path, size_bytes)

    def committed_by(self, run_id: str) -> list[Path]:
        """The checkpoints of one run in this directory, the oldest step first."""
        found: list[tuple[int, str, Path]] = []
        for path in self.directory.iterdir():
            if path.name.startswith(TEMPORARY) or not (path / METADATA).is_file():
                continue
            try:
                metadata = read_metadata(path)
            except SnapshotError:
                continue
            if metadata.get("run_id") == run_id:
                found.append((metadata["step"], path.name, path))
        return [path for _, _, path in sorted(found)]

    def delete(self, path: Path) -> None:
        """Remove a checkpoint; it loses its name first, so that half a one never looks whole."""
        doomed = self.directory / f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
        os.rename(path, doomed)
        shutil.rmtree(doomed)

    def close(self) -> None:
        """End Orbax' own threads. Raises what failed in them."""
        self._orbax.close()


def read_metadata(path: Path) -> dict[str, Any]:
    """The facts beside the arrays.

    Raises:
        SnapshotError: no checkpoint lies there, or one of a newer version.
    """
    try:
        metadata = json.loads((path / METADATA).read_text())
    except (OSError, ValueError) as error:
        raise SnapshotError(
            f"{path} is no checkpoint of eventtrain: {METADATA} cannot be read ({error})."
        ) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise SnapshotError(f"{path} is no checkpoint of eventtrain: its {METADATA} does not say so.")
    if metadata["schema_version"] > SCHEMA_VERSION:
        raise SnapshotError(
            f"{path} has schema_version {metadata['schema_version']}, and this program knows up to {SCHEMA_VERSION}. "
            "Read it with the newer version of eventtrain that wrote it."
        )
    return metadata


def restore_state(path: str | Path, like: Any = None) -> Any:
    """Read the state of a checkpoint back, bit for bit. Blocks; any thread.

    Args:
        path: of a committed checkpoint (``CheckpointCommitted.path``).
        like: a state of the same structure: its JAX arrays say where to put the values (device and sharding), its NumPy
            arrays stay NumPy, and what is no array is taken from it. None: a dict from path in the state to NumPy
            array.

    Raises:
        SnapshotError: no checkpoint lies there. StateError: ``like`` has other leaves, shapes or dtypes.
    """
    path = Path(path).absolute()
    metadata = read_metadata(path)
    # A thread of its own: on the thread of a running event loop Orbax would block or patch that loop.
    with ThreadPoolExecutor(1) as executor:
        arrays: dict[str, Any] = executor.submit(_read_arrays, path / ARRAYS).result()
    arrays |= {
        name: np.zeros(a["shape"], jnp.dtype(a["dtype"])) for name, a in metadata["empty_arrays"].items()
    }
    if like is None:
        return arrays
    return _fill(like, arrays, metadata["prng_keys"], path)


def _read_arrays(path: Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        restored = orbax.restore(path)
    return {name: np.asarray(value) for name, value in (restored["state"] or {}).items()}


def _encode(host_state: Any) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The arrays Orbax can hold, and as JSON what it cannot."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    empty: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for name, leaf in _named_leaves(host_state):
        value = leaf
        if _is_host_key(leaf):
            keys[name] = leaf.impl
            value = leaf.data
        value = np.asarray(value)
        if value.size:
            arrays[name] = value
        else:
            empty[name] = {"shape": list(value.shape), "dtype": value.dtype.name}
    return arrays, {"prng_keys": keys, "empty_arrays": empty}


def _fill(like: Any, arrays: Mapping[str, Any], keys: Mapping[str, str], path: Path) -> Any:
    wanted = dict(_named_leaves(like))
    if wanted.keys() != arrays.keys():
        missing, unknown = sorted(wanted.keys() - arrays.keys()), sorted(arrays.keys() - wanted.keys())
        raise StateError(
            f"The state in {path} has another structure than `like`: it lacks {missing[:5] or 'nothing'} and has "
            f"besides {unknown[:5] or 'nothing'}. Pass a state built as the one that was saved."
        )
    values = {name: _placed(name, leaf, arrays[name], keys.get(name), path) for name, leaf in wanted.items()}
    names = iter(wanted)
    return jax.tree.map(lambda leaf: values[next(names)] if _is_array(leaf) else leaf, like)


def _placed(name: str, like: Any, value: np.ndarray[Any, Any], impl: str | None, path: Path) -> Any:
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    if is_key and impl == str(jax.random.key_impl(like)):
        key = jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
        if key.shape == like.shape:
            return jax.device_put(key, like.sharding)
    elif not is_key and impl is None and value.shape == like.shape and value.dtype == like.dtype:
        return jax.device_put(value, like.sharding) if isinstance(like, jax.Array) else value
    saved = f"a key of {impl}" if impl else f"{value.dtype.name}{list(value.shape)}"
    raise StateError(f"{name} is {saved} in {path}, and {like.dtype}{list(like.shape)} in `like`.")


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The array leaves and keys of a state by their path, in order; other leaves are not stored."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if _is_array(leaf):
            yield jax.tree_util.keystr(path) or ".", leaf


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array) or _is_host_key(leaf):
        return True
    return isinstance(leaf, (np.ndarray, np.generic)) and (
        leaf.dtype == np.bool_ or jnp.issubdtype(leaf.dtype, np.number)
    )


def _is_host_key(leaf: Any) -> bool:
    """Whether it is a typed PRNG key on the host (``eventtrain.device.snapshot.HostKey``)."""
    return hasattr(leaf, "impl") and isinstance(getattr(leaf, "data", None), np.ndarray)


def _sync(folder: Path) -> int:
    """Have the disk hold everything in ``folder``; returns its size in bytes."""
    size_bytes = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            size_bytes += os.path.getsize(_sync_one(Path(parent) / name))
        _sync_one(Path(parent))
    return size_bytes


def _sync_one(path: Path) -> Path:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
