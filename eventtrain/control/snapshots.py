"""``KeptSnapshot``: the state of one step, for handlers and services."""

from __future__ import annotations

from typing import Any

import anyio.to_thread

from eventtrain.device.snapshot import Snapshot


class KeptSnapshot:
    """The device state of one step, kept while training continues. Its memory is freed when it is released."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

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
        """Free the memory. Idempotent; any thread."""
        self._snapshot.release()
