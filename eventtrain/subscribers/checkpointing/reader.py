"""Reading checkpoints back: only JSON and arrays, so that nothing in them is ever run. Blocking; any thread."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eventtrain.control.run_state import RunRecord
from eventtrain.errors import SnapshotError, StateError
from eventtrain.subscribers.checkpointing.directory import Committed, committed_in
from eventtrain.subscribers.checkpointing.manifest import (
    ARRAYS,
    EXTENSIONS,
    KEPT,
    KEPT_EXTENSIONS,
    STATE,
    HostArray,
    Manifest,
    SavedArray,
    checksum,
    is_array,
    is_checkpoint,
    named_leaves,
    part_of,
    read_manifest,
)
from eventtrain.subscribers.checkpointing.orbax import ocp

logger = logging.getLogger("eventtrain")


class SavedCheckpoint:
    """One checkpoint on disk."""

    def __init__(self, committed: Committed) -> None:
        self.path = committed.path
        self.manifest = committed.manifest
        self._arrays: dict[str, dict[str, HostArray]] = {}

    @property
    def step(self) -> int:
        """Updates completed."""
        return self.manifest.step

    @property
    def time(self) -> datetime:
        """When it was committed."""
        return self.manifest.time

    @property
    def facts(self) -> RunRecord | None:
        """What belongs to it besides arrays."""
        return self.manifest.facts

    def read(self) -> None:
        """Read all arrays, so that the next call for each of them need not.

        Raises:
            SnapshotError: it is not whole.
        """
        self._arrays = _read(self.path, self.manifest)

    def part(self, name: str) -> dict[str, HostArray]:
        """The arrays of one part by their path. Raises SnapshotError: it is not whole."""
        if name not in self.manifest.arrays:
            return {}
        if name not in self._arrays:
            self.read()
        return self._arrays.pop(name)  # they are asked for once, and would only fill the memory

    def state(self, like: Any) -> Any:
        """The state, placed as ``like`` is. Raises StateError where it does not fit."""
        return self._fill(STATE, like)

    def extensions(self, like: Mapping[str, Any], tag: str | None = None) -> list[Any]:
        """The leaves of the step extensions, placed as those of ``like``, in its order; StateError where not alike.

        Those of the state, or of the other snapshot ``tag``.
        """
        part = EXTENSIONS if tag is None else KEPT_EXTENSIONS + tag
        arrays = self.part(part)
        _require_same(like.keys(), arrays.keys(), "The step extensions saved", "the trainer's", self.path)
        return [self._placed(part, path, leaf, arrays[path]) for path, leaf in like.items()]

    def kept(self, like: Any) -> dict[str, tuple[int, Any]]:
        """Other snapshots that the rest of the run needs: tag -> step, and state placed as ``like``."""
        return {tag: (step, self._fill(KEPT + tag, like)) for tag, step in self.manifest.kept_steps.items()}

    def weights(self, like: Any) -> Any:
        """As ``state``, where ``like`` may also be the params, or a whole state of which only the params were saved."""
        wanted, saved = named_leaves(like).keys(), self.manifest.arrays[STATE].keys()
        params = self.manifest.params
        if wanted != saved and wanted == params.keys() and saved >= set(params.values()):
            return self._fill(STATE, like, params)
        if self.manifest.weights_only and wanted > saved:
            return self._fill(STATE, like, {path: path for path in saved})
        return self.state(like)

    def _fill(self, part: str, like: Any, places: Mapping[str, str] | None = None) -> Any:
        """``like`` with the arrays of a part; ``places``: path in ``like`` -> in the part, of those to be filled."""
        arrays, wanted = self.part(part), named_leaves(like)
        if places is None:
            _require_same(wanted.keys(), arrays.keys(), "The state saved", "`like`", self.path)
            places = {path: path for path in wanted}
        values = {
            path: self._placed(part, place, wanted[path], arrays[place]) for path, place in places.items()
        }
        filled = iter([values.get(path, leaf) for path, leaf in wanted.items()])
        return jax.tree.map(lambda leaf: next(filled) if is_array(leaf) else leaf, like)

    def _placed(self, part: str, path: str, like: Any, value: HostArray) -> Any:
        impl = self.manifest.arrays[part][path].key
        is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        if is_key and impl is not None:
            key = jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
            if key.dtype == like.dtype and key.shape == like.shape:
                return jax.device_put(key, like.sharding)
        elif not is_key and impl is None and value.shape == like.shape and value.dtype == like.dtype:
            return (
                value if isinstance(like, (np.ndarray, np.generic)) else jax.device_put(value, like.sharding)
            )
        saved = f"a key of {impl}" if impl else f"{value.dtype.name}{list(value.shape)}"
        raise StateError(f"{path} is {saved} in {self.path}, and {like.dtype}{list(like.shape)} in `like`.")


def find_checkpoint(directory: Path, which: bool | str | int | Path) -> SavedCheckpoint | None:
    """The checkpoint to resume from; None where ``which`` is True and there is none.

    Args:
        directory: where a Checkpointer wrote.
        which: True for the one committed last that is whole and holds a run; else a step, a tag, the name of a folder
            in it, or a path. Where several have that step or tag, the one committed last that holds a run.

    Raises:
        SnapshotError: there is no such checkpoint.
    """
    if which is True:
        return _newest(directory)
    found = committed_in(directory)
    if isinstance(which, int):
        matching = [one for one in found if one.manifest.step == which]
    else:
        matching = [one for one in found if str(which) in (one.manifest.tag, one.path.name)]
    if not matching and not isinstance(which, int) and is_checkpoint(path := Path(which).absolute()):
        matching = [Committed(path, read_manifest(path))]
    if not matching:
        names = ", ".join(one.path.name for one in found) or "none"
        raise SnapshotError(f"There is no checkpoint {which!r} in {directory}; those there: {names}.")
    whole = [one for one in matching if one.manifest.facts is not None]
    return SavedCheckpoint((whole or matching)[-1])


def _newest(directory: Path) -> SavedCheckpoint | None:
    for committed in reversed(committed_in(directory)):
        if committed.manifest.facts is None:
            continue
        saved = SavedCheckpoint(committed)
        try:
            saved.read()
        except SnapshotError as error:
            logger.warning("The run does not resume from its newest checkpoint: %s", error)
            continue
        return saved
    return None


def load_state(path: str | Path, like: Any = None) -> Any:
    """Read the state of a checkpoint back, bit for bit, or its params alone. Blocks; any thread.

    Args:
        path: of a committed checkpoint (``CheckpointCommitted.path``).
        like: a state of the same structure: its JAX arrays say where to put the values (device and sharding), its NumPy
            arrays stay NumPy, and what is no array is taken from it. Or the params of such a state alone. Of a
            checkpoint with weights only a whole state gets the params and keeps the rest. None: a dict from path in the
            state to NumPy array.

    Raises:
        SnapshotError: no checkpoint lies there, or a broken one. StateError: ``like`` has other leaves, shapes or
            dtypes.
    """
    path = Path(path).absolute()
    saved = SavedCheckpoint(Committed(path, read_manifest(path)))
    return saved.part(STATE) if like is None else saved.weights(like)


def _read(path: Path, manifest: Manifest) -> dict[str, dict[str, HostArray]]:
    """All arrays by part and path, each as it was written. Raises SnapshotError where one is not."""
    for name, size in manifest.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise SnapshotError(
                f"{path} is not whole: {name} is missing or has another size than when written."
            )
    tree: dict[str, Any] = {}
    try:
        # A thread of its own: on the thread of a running event loop Orbax would block or patch that loop.
        if (path / ARRAYS).exists():  # else all arrays are empty
            with ThreadPoolExecutor(1) as executor:
                tree = executor.submit(_read_arrays, path / ARRAYS).result()
    except Exception as error:
        raise SnapshotError(f"{path} is not whole: Orbax cannot read its arrays ({error}).") from error
    parts: dict[str, dict[str, HostArray]] = {}
    for part, known in manifest.arrays.items():
        arrays = part_of(tree, part)
        parts[part] = {name: _restored(arrays.get(name), saved) for name, saved in known.items()}
        wrong = next((name for name, array in parts[part].items() if not _is(array, known[name])), None)
        if wrong is not None:
            raise SnapshotError(f"{path} is not whole: {wrong} is not what was written.")
    return parts


def _restored(array: Any, saved: SavedArray) -> HostArray:
    """What Orbax has read; of an array without elements, the manifest says all."""
    if array is not None:
        return np.asarray(array)
    return np.zeros(saved.shape if 0 in saved.shape else 0, jnp.dtype(saved.dtype))


def _is(array: HostArray, saved: SavedArray) -> bool:
    return (array.shape, array.dtype, checksum(array)) == (saved.shape, jnp.dtype(saved.dtype), saved.crc32)


def _read_arrays(path: Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        return orbax.restore(path) or {}


def _require_same(wanted: Any, there: Any, what: str, other: str, path: Path) -> None:
    if wanted == there:
        return
    missing, unknown = sorted(wanted - there), sorted(there - wanted)
    raise StateError(
        f"{what} in {path} has another structure than {other}: it lacks {missing[:5] or 'nothing'} and has besides "
        f"{unknown[:5] or 'nothing'}. Pass a state built as the one that was saved."
    )
