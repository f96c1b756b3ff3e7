"""Orbax, imported without a handler on the program's root logger, which absl, its logging package, adds on import."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

_before = tuple(logging.root.handlers)

import orbax.checkpoint as ocp  # noqa: E402

# With a handler there, logging.basicConfig() of the program would silently do nothing. What Orbax logs later, while
# it writes, may still add one if the program has none by then.
for _handler in set(logging.root.handlers).difference(_before):
    logging.root.removeHandler(_handler)

Put = Callable[[jax.Array], jax.Array | None]

__all__ = ["ArrayFiles", "Put", "ocp"]


class _DeviceArrays(ocp.type_handlers.ArrayHandler):
    """Writes JAX arrays as those that Orbax reads as NumPy arrays, on any device and by itself.

    It writes one replica of a replicated array, whole: to cut it into parts would be a computation on the device, in
    another thread than the training thread.
    """

    def __init__(self, put: Put | None) -> None:
        super().__init__(use_replica_parallel=False, enable_write_sharding_file=False)
        self._put = put

    def typestr(self) -> str:
        return ocp.type_handlers.NumpyHandler().typestr()

    async def serialize(
        self,
        values: Sequence[jax.Array],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        """Writes ``values``: all at once, or as many at a time as there is room for on the host."""
        if self._put is None:
            return await super().serialize(values, infos, args)
        batch: list[tuple[jax.Array, ocp.type_handlers.ParamInfo, ocp.SaveArgs]] = []
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            copy = self._put(value)
            if copy is None and batch:
                await self._write(batch)
                batch = []
                copy = self._put(value)
            batch.append((value if copy is None else copy, info, arg))
            del copy
        await self._write(batch)
        return []

    async def _write(self, batch: list[tuple[jax.Array, ocp.type_handlers.ParamInfo, ocp.SaveArgs]]) -> None:
        values, infos, args = zip(*batch, strict=True)
        for written in await super().serialize(values, infos, args):
            written.result()


class ArrayFiles:
    """Writes trees of dicts with JAX and NumPy arrays by Orbax. For one thread only.

    It uses Orbax' handler and not its Checkpointer, which would wait for the other processes of a run, without a
    deadline. Each process writes the shards that it has; what process 0 finalizes then is one checkpoint.

    Orbax writes a JAX array from its buffer in host memory, and copies a NumPy array first: 0.54 GB took 1.1 s and
    2.6 s on 2 cores. Nothing is compressed: of random float32 it took five times the CPU time, which training lacks on
    a host without spare cores, to save 8% of the size.

    Args:
        put: copies an array from an accelerator to the host; returns None if there is no room until those before it
            are written. None: all arrays are on the host.
    """

    def __init__(self, put: Put | None = None) -> None:
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, _DeviceArrays(put)), (np.ndarray, ocp.type_handlers.NumpyHandler())
        )
        self._handler: Any = ocp.PyTreeCheckpointHandler(  # typed for a path class of its own
            type_handler_registry=registry, use_compression=False, enable_pinned_host_transfer=False
        )

    def save(self, folder: Path, tree: Any) -> None:
        """Writes ``tree`` to ``folder``, which is created if it is missing. Blocks."""
        folder.mkdir(exist_ok=True)
        self._handler.save(folder, args=ocp.args.PyTreeSave(tree))

    def finalize(self, folder: Path) -> None:
        """Completes ``folder``, once every process has written its part. On process 0. Blocks."""
        self._handler.finalize(folder)

    def close(self) -> None:
        """Ends Orbax' own threads. Raises what failed in them."""
        self._handler.close()
