"""Format of a checkpoint on disk, for writing and reading. Pure.

Layout of ``<directory>/step-00000100``::

    arrays/           {"state": {path: array}, "extensions": {...}, "kept": {tag: {path: array}},
                      "kept_extensions": {...}}, as Orbax writes it
    eventtrain.json   the Manifest: step, epoch, tag, run_id, dtype, shape and CRC-32 of each array, the run's facts,
                      and `checksum`, the SHA-256 of all that as JSON with sorted keys and without spaces

``path`` is that in the state, as ``jax.tree_util.keystr`` writes it, or ``.`` if the state is one array. Parts without
arrays are left out, and so are arrays without elements, which the manifest describes completely. A typed PRNG key is
stored as its ``jax.random.key_data``. Both are written to a folder whose name begins with ``.tmp-``, which gets its
final name by one rename.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from eventtrain.control.run_state import RunRecord
from eventtrain.errors import SnapshotError
from eventtrain.subscribers.checkpointing.naming import step_in

FORMAT = "eventtrain-checkpoint"
SCHEMA_VERSION = 2
MANIFEST = "eventtrain.json"
CHECKSUM = "checksum"
ARRAYS = "arrays"
TEMPORARY = ".tmp-"
STATE = "state"
EXTENSIONS = "extensions"
KEPT = "kept/"
KEPT_EXTENSIONS = "kept_extensions/"
"""These two are followed by a tag in the name of a part."""

HostArray = np.ndarray[Any, Any]
Read = Callable[[Any], HostArray]


class SavedShard(BaseModel):
    """The part of an array that one device had.

    Attributes:
        index: first index, and the index after the last, in each dimension.
        crc32: of its bytes in C order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...]
    crc32: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index, to read the shard from the whole array."""
        return tuple(slice(*bounds) for bounds in self.index)


class SavedArray(BaseModel):
    """Description of one array.

    Attributes:
        crc32: of its bytes in C order; None if there are ``shards``.
        key: name of the implementation if it is a typed PRNG key.
        shards: of an array that is sharded over several processes. Each process describes those that it writes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    crc32: int | None
    key: str | None = None
    shards: tuple[SavedShard, ...] = ()

    @model_serializer(mode="wrap")
    def _without_no_shards(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data = serialize(self)
        if not self.shards:
            del data["shards"]
        return data

    @model_validator(mode="after")
    def _has_checksums(self) -> Self:
        if self.crc32 is None and not self.shards and math.prod(self.shape):
            raise ValueError("an array has neither a checksum nor shards")
        return self

    @field_validator("dtype")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            known = jnp.dtype(name)
        except TypeError as error:
            raise ValueError(f"{name!r} is not a dtype") from error
        if known.kind in "OSUMm":
            raise ValueError(f"arrays of dtype {name!r} cannot be part of a state")
        return name

    @classmethod
    def of(cls, leaf: Any, read: Read = np.asarray) -> SavedArray:
        """Returns the description of an array or a key on the host. Reads all of it, with ``read``."""
        key = str(leaf.impl) if is_host_key(leaf) else None
        array = array_of(leaf)
        if is_sharded(array):
            shards = tuple(
                SavedShard(index=bounds(shard.index, array.shape), crc32=checksum(read(shard.data)))
                for shard in array.addressable_shards
                if shard.replica_id == 0
            )
            return cls(dtype=array.dtype.name, shape=array.shape, crc32=None, shards=shards)
        array = read(local(array))
        return cls(dtype=array.dtype.name, shape=array.shape, crc32=checksum(array), key=key)

    def type(self) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype; of a typed PRNG key those of the key."""
        if self.key is not None:
            with suppress(ValueError, TypeError):  # data of another implementation than the manifest names
                data = jax.ShapeDtypeStruct(self.shape, self.dtype)
                return jax.eval_shape(partial(jax.random.wrap_key_data, impl=self.key), data)
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))

    def with_shards(self, other: SavedArray) -> SavedArray:
        """Returns the description with the shards that another process has written."""
        return self.model_copy(update={"shards": (*self.shards, *other.shards)})

    def is_whole(self, array: HostArray) -> bool:
        """Returns whether the array, as it was read, is as it was written."""
        if (array.shape, array.dtype) != (self.shape, jnp.dtype(self.dtype)):
            return False
        if self.crc32 is not None:
            return checksum(array) == self.crc32
        return all(checksum(array[shard.slices]) == shard.crc32 for shard in self.shards)

    def is_intact(self, array: jax.Array) -> bool:
        """Returns whether the shards of this process, as they were read, are as they were written.

        A shard that was cut otherwise when it was written cannot be checked.
        """
        if self.crc32 is not None and array.is_fully_replicated:
            return self.is_whole(np.asarray(local(array)))
        written = {shard.index: shard.crc32 for shard in self.shards}
        return all(
            checksum(np.asarray(shard.data)) == written[index]
            for shard in array.addressable_shards
            if (index := bounds(shard.index, array.shape)) in written
        )

    def read(self, array: HostArray) -> HostArray:
        """Returns the array of which ``stored`` returned this. Float8 of older checkpoints is not stored as bytes."""
        dtype = jnp.dtype(self.dtype)
        return array.view(dtype) if is_stored_as_bytes(dtype) and array.dtype == np.uint8 else array


class Manifest(BaseModel):
    """Everything of a checkpoint that is not an array.

    Attributes:
        step, epoch: completed.
        number: position in the order in which the checkpoints of its directory were committed.
        metrics: measured at exactly this step.
        arrays: part -> path -> description. Parts are "state", "extensions", "kept/<tag>" and
            "kept_extensions/<tag>".
        kept_steps: tag -> step, of the other snapshots that the rest of the run needs.
        params: path in the params -> path in the state.
        weights_only: the arrays are those of the params only.
        facts: what a run needs to resume from it; None if it cannot.
        files: path below the folder -> size in bytes, of all files but the manifest.
    """

    # Not as text, so that a float is read back as a float.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format: Literal["eventtrain-checkpoint"] = FORMAT
    schema_version: Literal[2] = SCHEMA_VERSION
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    tag: str
    run_id: str
    owner: str
    number: int = 0
    time: datetime
    metrics: dict[str, float] = Field(default_factory=dict)
    weights_only: bool = False
    kept_steps: dict[str, int] = Field(default_factory=dict)
    params: dict[str, str] = Field(default_factory=dict)
    arrays: dict[str, dict[str, SavedArray]] = Field(default_factory=dict)
    files: dict[str, int] = Field(default_factory=dict)
    facts: RunRecord | None = None

    def to_text(self) -> str:
        """Returns it as JSON, with NaN and infinities as Python writes them.

        Raises:
            PydanticSerializationError: a subscriber's state is not plain JSON data.
        """
        return json.dumps(sealed(self.model_dump(mode="json")), indent=1) + "\n"

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        facts, parts = self.facts, self.arrays
        if (facts is None) != self.weights_only:
            raise ValueError("weights_only and facts contradict each other")
        if facts is not None and (facts.loop.step, facts.loop.epoch) != (self.step, self.epoch):
            raise ValueError("step and epoch differ from those in facts")
        if any(not 0 <= step <= self.step for step in self.kept_steps.values()):
            raise ValueError("kept_steps contains a step that is not before this one")
        if parts:
            if {KEPT + tag for tag in self.kept_steps} != {part for part in parts if part.startswith(KEPT)}:
                raise ValueError("kept_steps and arrays name different snapshots")
            if not parts.get(STATE, {}).keys() >= set(self.params.values()):
                raise ValueError("params names arrays that are not in the state")
        return self


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a manifest with its ``checksum``."""
    content = {key: value for key, value in data.items() if key != CHECKSUM}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(path: Path) -> Manifest:
    """Returns the manifest of the checkpoint ``path``.

    Raises:
        SnapshotError: it is not a checkpoint, or it is damaged or of another version.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SnapshotError(
            f"{path} is not a checkpoint of eventtrain: {MANIFEST} cannot be read ({error})."
        ) from error
    manifest = parse_manifest(path, text)
    if (named := step_in(path.name)) not in (None, manifest.step):
        raise SnapshotError(
            f"{path} is named after step {named}, but holds step {manifest.step}: it was mixed up."
        )
    return manifest


def parse_manifest(path: Path, text: str) -> Manifest:
    """Returns the manifest that ``Manifest.to_text`` wrote; raises as ``read_manifest``."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(
            f"{path} is not a checkpoint of eventtrain: {MANIFEST} cannot be read ({error})."
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType]
        raise SnapshotError(f"{path} is not a checkpoint of eventtrain: its {MANIFEST} has another format.")
    version: Any = data.get("schema_version")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if version != SCHEMA_VERSION:
        raise SnapshotError(
            f"{path} has schema_version {version}; this version of eventtrain reads {SCHEMA_VERSION}. Read it with the "
            "version of eventtrain that wrote it."
        )
    given: Any = data.pop(CHECKSUM, None)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if given != sealed(data)[CHECKSUM]:  # pyright: ignore[reportUnknownArgumentType]
        raise SnapshotError(
            f"{path} is damaged: its {MANIFEST} is not what was written (its checksum differs)."
        )
    try:
        return Manifest.model_validate(data)
    except (ValidationError, RecursionError) as error:
        raise SnapshotError(f"{path} is damaged: its {MANIFEST} is not valid: {error}") from error


def is_checkpoint(path: Path) -> bool:
    """Returns whether a folder is a committed checkpoint, or what is left of one."""
    return (
        not path.name.startswith(TEMPORARY)
        and path.is_dir()
        and ((path / MANIFEST).exists() or (path / ARRAYS).exists() or step_in(path.name) is not None)
    )


def nested(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the tree for Orbax; parts without arrays are left out."""
    tree: dict[str, Any] = {}
    for part, arrays in parts.items():
        if arrays:
            node = tree
            for key in part.split("/", 1):
                node = node.setdefault(key, {})
            node.update(arrays)
    return tree


def part_of(tree: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns one part of a tree that ``nested`` built."""
    node: Any = tree
    for key in part.split("/", 1):
        node = (node or {}).get(key) or {}
    return node


def checksum(array: HostArray) -> int:
    """Returns the CRC-32 of the bytes in C order."""
    if not array.size:
        return 0
    octets: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # a buffer, but only typed so later
    return zlib.crc32(octets)


def is_sharded(array: Any) -> bool:
    """Returns whether other processes have parts of the array that this one lacks."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated


def local(array: Any) -> Any:
    """Returns the array, of which this process has all, as one that is on its devices alone."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array.addressable_data(0)
    return array


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns the index of a shard as numbers."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def array_of(leaf: Any) -> Any:
    """Returns the array of an array or a key on the host."""
    return leaf.data if is_host_key(leaf) else leaf


def stored(leaf: Any, read: Read = np.asarray) -> Any:
    """Returns the array for Orbax: dtypes of one byte that NumPy lacks, such as int4, are stored as bytes."""
    array = array_of(leaf)
    if not is_stored_as_bytes(array.dtype):
        return array
    if is_sharded(array):
        parts = {bounds(shard.index, array.shape): shard.data for shard in array.addressable_shards}
        return jax.make_array_from_callback(
            array.shape,
            array.sharding,
            lambda index: np.ascontiguousarray(read(parts[bounds(index or (), array.shape)])).view(np.uint8),
        )
    array = local(array)
    return np.ascontiguousarray(read(array)).view(np.uint8).reshape(array.shape)


def is_stored_as_bytes(dtype: Any) -> bool:
    """Returns whether arrays of a dtype are stored as bytes: it has one byte, and NumPy lacks it."""
    return dtype.itemsize == 1 and dtype.isbuiltin != 1


def path_name(path: str) -> str:
    """Returns the path of a leaf as it is stored; that of a state which is one array would be empty."""
    return path or "."


def named(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``leaves`` by the stored names of their paths."""
    return {path_name(path): leaf for path, leaf in leaves.items()}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the array leaves of a pytree by the stored names of their paths, in order; others are not stored.

    Abstract arrays, as ``jax.eval_shape`` returns them, stand for arrays.
    """
    with_paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in with_paths}
    return named(
        {p: leaf for p, leaf in arrays.items() if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)}
    )


def named_numbers(tree: Any) -> dict[str, Any]:
    """Returns the Python numbers of a pytree by the stored names of their paths."""
    with_paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    numbers = {jax.tree_util.keystr(path): leaf for path, leaf in with_paths}
    return named({p: leaf for p, leaf in numbers.items() if isinstance(leaf, (bool, int, float, complex))})


def is_array(leaf: Any) -> bool:
    """Returns whether a leaf is stored: a JAX array, a NumPy array or number, a key on the host."""
    if isinstance(leaf, jax.Array) or is_host_key(leaf):
        return True
    return isinstance(leaf, (np.ndarray, np.generic)) and (
        leaf.dtype == np.bool_ or jnp.issubdtype(leaf.dtype, np.number)
    )


def is_host_key(leaf: Any) -> bool:
    """Returns whether it is a typed PRNG key on the host (``eventtrain.device.snapshot.HostKey``)."""
    return hasattr(leaf, "impl") and isinstance(getattr(leaf, "data", None), np.ndarray)
