"""``KeptSnapshot``: the state of one step, as those see it who asked for it."""

from __future__ import annotations

from typing import Any

import anyio.to_thread

from eventtrain.device.snapshot import Snapshot


class KeptSnapshot:
    """The device state of one step, kept while training goes on; released, it frees its memory."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    @property
    def step(self) -> int:
        """The number of updates the state had seen."""
        return self._snapshot.step

    @property
    def device(self) -> Snapshot:
        """The state on the device. Reading it is safe on any thread; it is never donated."""
        return self._snapshot

    async def to_host(self) -> Any:
        """The state as a pytree of NumPy arrays of the same shapes and dtypes.

        The copy runs in a worker thread; the loop goes on. Cancellation leaves the snapshot as it is.

        Raises:
            SnapshotError: it was released.
        """
        return await anyio.to_thread.run_sync(self._snapshot.host_state, abandon_on_cancel=True)

    def release(self) -> None:
        """Give the memory back. Idempotent; any thread."""
        self._snapshot.release()
