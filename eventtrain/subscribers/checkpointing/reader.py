"""``SavedCheckpoint``: reads a checkpoint; it is JSON and arrays, so nothing in it is run. Blocking; any thread."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eventtrain.control.run_state import BEFORE_END
from eventtrain.errors import SnapshotError, StateError, listed
from eventtrain.subscribers._shared.paths import local_path
from eventtrain.subscribers.checkpointing.directory import Committed, read_directory
from eventtrain.subscribers.checkpointing.manifest import (
    ARRAYS,
    EXTENSIONS,
    KEPT,
    KEPT_EXTENSIONS,
    STATE,
    HostArray,
    Manifest,
    SavedArray,
    is_checkpoint,
    is_stored_as_bytes,
    named_leaves,
    named_numbers,
    nested,
    part_of,
    path_name,
    read_manifest,
)
from eventtrain.subscribers.checkpointing.orbax import ocp
from eventtrain.validation.annotations import checked

logger = logging.getLogger("eventtrain")


class SavedCheckpoint:
    """A checkpoint on disk."""

    def __init__(self, committed: Committed) -> None:
        self.path = committed.path
        self.manifest = manifest = committed.manifest
        self.step, self.time, self.facts = manifest.step, manifest.time, manifest.facts
        self._arrays: dict[str, dict[str, HostArray]] = {}

    def read(self) -> None:
        """Reads all arrays ahead of the calls for them. Raises SnapshotError if the checkpoint is not complete."""
        self._arrays = _read(self.path, self.manifest)

    def read_state(self, paths: Collection[str]) -> None:
        """Reads these arrays of the state ahead, and no others; raises as ``read``."""
        known = self.manifest.arrays[STATE]
        self._arrays = _read(self.path, self.manifest, {STATE: {path: known[path] for path in paths}})

    def part(self, name: str) -> dict[str, HostArray]:
        """Returns the arrays of one part by their path. Raises SnapshotError if the checkpoint is not complete."""
        if name not in self.manifest.arrays:
            return {}
        if name not in self._arrays:
            self.read()
        return self._arrays.pop(name)  # requested once, and would only fill the memory

    def state(self, like: Any) -> Any:
        """Returns the state, placed as ``like`` is. Raises StateError if it does not fit."""
        return self._fill(STATE, like, other="the trainer's state")

    def extensions(self, like: Mapping[str, Any], tag: str | None = None) -> list[Any]:
        """Returns the leaves of the step extensions, placed as those of ``like``, in its order.

        They are those of the state, or of the other snapshot ``tag``. Raises StateError if they do not fit.
        """
        part = EXTENSIONS if tag is None else KEPT_EXTENSIONS + tag
        saved = self.manifest.arrays.get(part, {})
        _require_same(like.keys(), saved.keys(), "The step extensions saved", "the trainer's", self.path)
        wanted = {path: (path, leaf) for path, leaf in like.items()}
        return list(self.values(part, wanted, "the trainer's").values())

    def kept(self, like: Any, *, before_end: bool) -> dict[str, tuple[int, Any]]:
        """Returns other snapshots: tag -> step, and state placed as ``like``; see ``SavedRun``."""
        return {
            tag: (step, self._fill(KEPT + tag, like))
            for tag, step in self.manifest.kept_steps.items()
            if tag.startswith(BEFORE_END) == before_end
        }

    def weights(self, like: Any) -> Any:
        """``state``, where ``like`` may also be a part of it, or a whole state of which only the params were saved.

        A part is the params, or what dicts with fewer keys contain. Only its arrays are read.
        """
        wanted, saved = named_leaves(like).keys(), self.manifest.arrays[STATE].keys()
        numbers = named_numbers(like).keys() & saved
        params = self.manifest.params
        if wanted != saved and wanted == params.keys() and saved >= set(params.values()):
            self.read_state(params.values())
            return self._fill(STATE, like, params)
        if wanted and wanted < saved and all(_is_left_out(path, like) for path in saved - wanted - numbers):
            paths = {path: path for path in saved if path in wanted | numbers}
            self.read_state(paths)
            return self._fill(STATE, like, paths)
        if self.manifest.weights_only and wanted > saved:
            return self._fill(STATE, like, {path: path for path in saved})
        return self._fill(STATE, like)

    def _fill(
        self, part: str, like: Any, places: Mapping[str, str] | None = None, *, other: str = "`like`"
    ) -> Any:
        """Returns ``like``, called ``other``, with the arrays of a part; ``places``: path in it -> path in the part."""
        saved = self.manifest.arrays.get(part, {})
        wanted = named_leaves(like) | {
            path: leaf for path, leaf in named_numbers(like).items() if path in saved
        }
        if places is None:
            _require_same(wanted.keys(), saved.keys(), "The state saved", other, self.path)
            places = {path: path for path in wanted}
        values = self.values(part, {path: (place, wanted[path]) for path, place in places.items()}, other)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: values.get(path_name(jax.tree_util.keystr(path)), leaf), like
        )

    def values(
        self, part: str, wanted: Mapping[str, tuple[str, Any]], other: str = "`like`"
    ) -> dict[str, Any]:
        """Returns arrays of a part, placed.

        Args:
            wanted: any name -> path in the part, and the array of ``other`` to be placed like.

        Raises:
            StateError: arrays of other shapes or dtypes. SnapshotError: the checkpoint is not complete.
        """
        known = self.manifest.arrays[part] if wanted else {}
        if others := [
            f"{place} is {shown(known[place].type())}, not {shown(like)}"
            for place, like in wanted.values()
            if not fits(known[place].type(), like)
        ]:
            raise StateError(
                f"{self.path} does not fit {other}: {listed(others)}. Pass a state built as the one that was saved, or "
                "take what fits with et.take_matching."
            )
        sharded = {place: like for place, like in wanted.values() if _is_global(like)}
        if not sharded:
            arrays = self.part(part)
            return {
                name: _placed(arrays[place], known[place], like) for name, (place, like) in wanted.items()
            }
        _require_files(self.path, self.manifest)
        rest = {place: known[place] for place, _ in wanted.values() if place not in sharded}
        arrays = _read(self.path, self.manifest, {part: rest})[part] if rest else {}
        own = _read_shards(self.path, self.manifest, part, sharded)
        return {
            name: own[place] if place in own else _placed(arrays[place], known[place], like)
            for name, (place, like) in wanted.items()
        }


def fits(there: Any, like: Any) -> bool:
    """Returns whether an array, of which only shape and dtype are looked at, can take the place of one like ``like``.

    A Python number takes any number: the run has made it an array.
    """
    if isinstance(like, (bool, int, float, complex)):
        return there.shape == () and not jnp.issubdtype(there.dtype, jax.dtypes.prng_key)
    return (tuple(there.shape), str(there.dtype)) == (tuple(like.shape), str(like.dtype))


def shown(leaf: Any) -> str:
    """Returns dtype and shape for a message, such as "float32[4, 2]"."""
    if isinstance(leaf, (bool, int, float, complex)):
        return f"a Python {type(leaf).__name__}"
    return f"{leaf.dtype}{list(leaf.shape)}"


def _placed(value: HostArray, saved: SavedArray, like: Any) -> Any:
    """Returns ``value``, which fits, as an array like ``like``."""
    if isinstance(like, (np.ndarray, np.generic)):
        return value
    placed = on_devices(value, getattr(like, "sharding", None))
    return placed if saved.key is None else jax.random.wrap_key_data(placed, impl=saved.key)


def on_devices(value: HostArray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Returns the array; each process transfers its own shards. `device_put` would compare values across processes."""
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def find_checkpoint(directory: Path, which: bool | str | int | Path) -> SavedCheckpoint | None:
    """Returns the checkpoint to resume from; None if ``which`` is True and there is none.

    Args:
        directory: of a Checkpointer.
        which: True for the one committed last that is complete and that a run can resume from; else a step, a tag, the
            name of a folder in it, or a path. If several have that step or tag: the one committed last, preferably one
            that a run can resume from.

    Raises:
        SnapshotError: there is no such checkpoint; or, for True, there are some and none of them can be read.
    """
    try:
        found, unreadable = read_directory(directory)
    except OSError as error:
        raise SnapshotError(f"{directory} cannot be read: {error.strerror or error}.") from error
    if which is True:
        return _newest(directory, found, unreadable)
    if isinstance(which, int):
        matching = [one for one in found if one.manifest.step == which]
    else:
        matching = [one for one in found if str(which) in (one.manifest.tag, one.path.name)]
    if not matching and not isinstance(which, int):
        path = local_path(which, "fit(resume=...)").absolute()
        if is_checkpoint(path):
            matching = [Committed(path, read_manifest(path))]
    if not matching:
        names = ", ".join(one.path.name for one in found) or "none"
        broken = f" Cannot be read: {listed([str(error) for error in unreadable])}" if unreadable else ""
        raise SnapshotError(f"There is no checkpoint {which!r} in {directory}; found: {names}.{broken}")
    resumable = [one for one in matching if one.manifest.facts is not None]
    return SavedCheckpoint((resumable or matching)[-1])


def _newest(
    directory: Path, found: list[Committed], unreadable: list[SnapshotError]
) -> SavedCheckpoint | None:
    """Returns the checkpoint committed last that is complete and that a run can resume from; None if there is none."""
    broken = [str(error) for error in unreadable]
    for committed in reversed(found):
        saved = SavedCheckpoint(committed)
        if saved.facts is not None:
            try:
                if jax.process_count() > 1:  # each process reads its own shards, and checks those
                    _require_files(committed.path, committed.manifest)
                else:
                    saved.read()
            except SnapshotError as error:
                broken.append(str(error))
                continue
            if broken:
                logger.warning(
                    "The run resumes from %s; checkpoints that cannot be read are left out: %s",
                    saved.path, listed(broken),
                )  # fmt: skip
            return saved
    if broken:
        raise SnapshotError(
            f"None of the checkpoints in {directory} can be read, so the run neither resumes nor starts from scratch "
            f"over them. Restore one from a copy, or move them away to start from scratch. {listed(broken)}"
        )
    return None


@checked
def load_state(path: str | Path, like: Any = None) -> Any:
    """Reads the state of a checkpoint, bit for bit, or its params alone. Blocks; any thread.

    Args:
        path: of a committed checkpoint (``CheckpointCommitted.path``).
        like: a state of the same structure: its JAX arrays determine device and sharding of the values, its NumPy
            arrays stay NumPy, and leaves that are not arrays are taken from it. Abstract arrays (``jax.eval_shape``,
            ``jax.ShapeDtypeStruct`` with a sharding) do the same and take no memory. Or a part of such a state, which
            alone is read: its params, or what remains if keys of dicts are left out, as in ``{"params": params}``. If
            the checkpoint has weights only, a whole state gets the params and keeps the rest. None: returns a dict from
            path in the state to NumPy array.

    Raises:
        SnapshotError: ``path`` is not a checkpoint, or it is damaged. StateError: ``like`` has other leaves, shapes or
            dtypes.
    """
    path = local_path(path, "load_state").absolute()
    saved = SavedCheckpoint(Committed(path, read_manifest(path)))
    return saved.part(STATE) if like is None else saved.weights(like)


def _read(
    path: Path, manifest: Manifest, wanted: Mapping[str, Mapping[str, SavedArray]] | None = None
) -> dict[str, dict[str, HostArray]]:
    """Returns all arrays, or those ``wanted``, by part and path. Raises SnapshotError unless each is as written."""
    wanted, partly = wanted or manifest.arrays, wanted is not None
    _require_files(path, manifest)
    try:
        tree: dict[str, Any] = {}
        # In a thread of its own: on the thread of a running event loop Orbax would block or patch that loop.
        if (path / ARRAYS).exists():  # else all arrays are empty
            with ThreadPoolExecutor(1) as executor:
                tree = executor.submit(_read_arrays, path / ARRAYS, wanted if partly else None).result()
        parts = {part: _arrays_of(part_of(tree, part), known) for part, known in wanted.items()}
    except Exception as error:  # whatever the files make Orbax and NumPy raise
        raise SnapshotError(f"{path} is not complete: its arrays cannot be read ({error}).") from error
    for part, known in wanted.items():
        for name, saved in known.items():
            if not saved.is_whole(parts[part][name]):
                raise SnapshotError(f"{path} is not complete: {name} is not what was written.")
    return parts


def _require_files(path: Path, manifest: Manifest) -> None:
    """Raises SnapshotError unless every file is there, with its size."""
    for name, size in manifest.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise SnapshotError(
                f"{path} is not complete: {name} is missing or has another size than when written."
            )


def _is_global(like: Any) -> bool:
    """Returns whether other processes have parts of an array that is placed like this one. Not for keys."""
    if not isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return False
    sharding = like.sharding
    if sharding is None or sharding.is_fully_addressable or jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return False
    return not is_stored_as_bytes(like.dtype)


def _read_shards(
    path: Path, manifest: Manifest, part: str, wanted: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Returns arrays placed as ``wanted``, of which this process reads its own shards. Raises SnapshotError."""

    def restore() -> Any:
        args = {
            place: ocp.ArrayRestoreArgs(
                restore_type=jax.Array, sharding=like.sharding, global_shape=like.shape, dtype=like.dtype
            )
            for place, like in wanted.items()
        }
        with closing(_handler()) as orbax:
            return orbax.restore(
                path / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    nested({part: dict.fromkeys(wanted, 0)}),
                    restore_args=nested({part: args}),
                    partial_restore=True,
                ),
            )

    try:
        with ThreadPoolExecutor(1) as executor:
            arrays: dict[str, jax.Array] = part_of(executor.submit(restore).result(), part)
    except Exception as error:  # whatever the files make Orbax raise
        raise SnapshotError(f"{path} is not complete: its arrays cannot be read ({error}).") from error
    for place, array in arrays.items():
        if not manifest.arrays[part][place].is_intact(array):
            raise SnapshotError(f"{path} is not complete: {place} is not what was written.")
    return arrays


def _arrays_of(stored: Mapping[str, Any], known: Mapping[str, SavedArray]) -> dict[str, HostArray]:
    """Returns the arrays of one part; those without elements are not stored."""
    arrays: dict[str, HostArray] = {}
    for name, saved in known.items():
        array = stored.get(name)
        if array is None:
            array = np.zeros(saved.shape if 0 in saved.shape else 0, jnp.dtype(saved.dtype))
        arrays[name] = saved.read(np.asarray(array))
    return arrays


def _handler() -> Any:
    """Returns Orbax' reader, which is typed for a path class of its own. It waits for no other process."""
    return ocp.PyTreeCheckpointHandler()


def _read_arrays(path: Path, wanted: Mapping[str, Mapping[str, SavedArray]] | None) -> dict[str, Any]:
    with closing(_handler()) as orbax:
        if wanted is None:
            return orbax.restore(path) or {}
        stored = {
            part: {name: 0 for name, saved in known.items() if 0 not in saved.shape}
            for part, known in wanted.items()
        }
        tree = nested(stored)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return (
            orbax.restore(
                path, args=ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True)
            )
            if tree
            else {}
        )


def _is_left_out(path: str, like: Any) -> bool:
    """Returns whether ``path`` of a leaf leads to a key that a dict in ``like`` lacks."""
    while isinstance(like, Mapping):
        found = [key for key in like if path.startswith(f"[{key!r}]")]
        if not found:
            return True
        path, like = path.removeprefix(f"[{found[0]!r}]"), like[found[0]]
    return False


def _require_same(wanted: Set[str], there: Set[str], what: str, other: str, path: Path) -> None:
    if wanted == there:
        return
    raise StateError(
        f"{what} in {path} must have the structure of {other}: missing {_first_of(wanted - there)}, unexpected "
        f"{_first_of(there - wanted)}. Pass a state built as the one that was saved, or take what fits with "
        "et.take_matching."
    )


def _first_of(paths: Collection[str]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return f"{sorted(paths)[:5]}{more}" if paths else "nothing"
