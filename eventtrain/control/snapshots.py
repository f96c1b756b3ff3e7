"""``KeptSnapshot``: the state of one step, for handlers and services."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio.to_thread

from eventtrain.device.snapshot import Snapshot


class KeptSnapshot:
    """The device state of one step, kept while training continues. Its memory is freed when it is released.

    Args:
        snapshot: on the device.
        release: releases it; by default ``snapshot.release``.
    """

    def __init__(self, snapshot: Snapshot, release: Callable[[], None] | None = None) -> None:
        self._snapshot = snapshot
        self._release = snapshot.release if release is None else release

    @property
    def step(self) -> int:
        """Updates completed when it was taken."""
        return self._snapshot.step

    @property
    def device(self) -> Snapshot:
        """The state on the device. Safe to read on any thread: it is never donated."""
        return self._snapshot

    async def to_host(self) -> Any:
        """Returns the state as a pytree of NumPy arrays of the same shapes and dtypes.

        The copy runs in a worker thread while the loop continues. Cancellation leaves the snapshot as it is.

        Raises:
            SnapshotError: it was released.
        """
        return await anyio.to_thread.run_sync(self._snapshot.host_state, abandon_on_cancel=True)

    def release(self) -> None:
        """Free the memory. Idempotent; any thread.

        In a run of several processes it is freed on all of them, also if one of them calls this.
        """
        self._release()
