"""Batches of one epoch, made by a thread that runs ahead.

- Only the prefetch thread runs the user's code: ``data(epoch)``, ``iter``, ``set_state`` and ``next`` may take minutes,
  and the training thread waits for them where it serves commands. Data in memory needs no thread.
- Only the consumer thread takes groups.
- It also makes the groups of a call: on the training thread that would cost what ``steps_per_call`` saves.
- The thread continues when half of what may wait was taken: two threads that wake each other at every batch cost more
  than a short step.
"""

from __future__ import annotations

import collections
import contextvars
import logging
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

from eventtrain.data.batch_group import SMALL_BYTES, BatchGroup, GroupMaker
from eventtrain.data.sources import Batch, EpochReader
from eventtrain.device.state import checksum, with_x64_of_caller

logger = logging.getLogger("eventtrain")

DEPTH, DEPTH_OF_SMALL = 4, 64
"""How many groups may wait, and how many batches that are small enough."""


class Prefetcher:
    """Runs the code of the user's data in a thread of its own, and puts batches on the device ahead of use.

    Args:
        read: opens the data, on the thread.
        maker: of the groups.
        depth: groups that may wait; that many groups of memory are used beside those of the step. Small batches may be
            more.
        most: batches to take at most.
        batch_crc32: of the batch before the first one.
        on_ready: called on the prefetch thread after each group and at the end, when `ready()` holds.

    `ready`, `take`, `put_back` and `close` belong to one consumer thread; only `close` blocks.
    """

    def __init__(
        self,
        read: Callable[[], EpochReader],
        maker: GroupMaker,
        *,
        depth: int = DEPTH,
        most: int | None = None,
        batch_crc32: int | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._read = read
        self._maker = maker
        self._depth = depth
        self._most = most
        self._batch_crc32 = batch_crc32
        self._on_ready = on_ready
        self._groups: collections.deque[BatchGroup] = collections.deque()
        self._refill_below = depth
        self._full = False
        self._room = threading.Event()
        self._closing = False
        self._ended = False  # set last: a thread that reads True finds every group, and the error
        self._error: BaseException | None = None
        self._unread: list[tuple[Batch, Any]] = []
        self._put_back: list[tuple[Batch, Any]] = []
        run = with_x64_of_caller(self._run)
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(run,), name="eventtrain-prefetch", daemon=True
        )
        self._thread.start()

    def ready(self) -> bool:
        """Whether `take` has a result: a group, the end, or an error."""
        return bool(self._groups) or self._ended

    def take(self) -> BatchGroup | None:
        """Returns the next group, or None at the end of the data.

        Raises:
            RuntimeError: nothing is ready; call `ready()` first, or wait for `on_ready`.
            BaseException: what the user's code raised, unchanged, after the batches before it.
        """
        ended = self._ended  # read first: a group may be added, but not after this was true
        if self._groups:
            group = self._groups.popleft()
            if self._full and len(self._groups) < self._refill_below:
                self._room.set()
            return group
        if not ended:
            raise RuntimeError("Prefetcher.take() was called while nothing is ready. Call ready() first.")
        if self._error is not None:
            raise self._error
        return None

    def put_back(self, group: BatchGroup, used: int) -> None:
        """Returns the batches behind the first ``used`` ones of a group, the last one taken, for ``rest``."""
        self._put_back = group.pairs()[used:]

    def close(self, timeout_s: float | None = 5.0) -> bool:
        """Stops the thread and waits for it, at most `timeout_s`; may be called again.

        Returns whether it has ended: it has not while the user's code blocks.
        """
        self._closing = True
        self._room.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def has_rest(self) -> bool:
        """Whether ``rest`` may have something. After ``close``."""
        return bool(self._put_back or self._groups or self._unread) or not self._ended

    def rest(self) -> list[tuple[Batch, Any]]:
        """Returns the batches that were not taken, each with the state after it. Blocks until the thread has ended."""
        self._thread.join()
        rest = self._put_back + [pair for group in self._groups for pair in group.pairs()] + self._unread
        self._groups.clear()
        self._put_back, self._unread = [], []
        return rest

    def _run(self) -> None:
        reader: EpochReader | None = None
        try:
            reader = self._read()
            self._compare(reader)
            self._fill(reader)
        except BaseException as error:
            self._error = error
        try:
            self._unread = reader.close() if reader is not None else []
        except BaseException as error:
            self._error = self._error or error
        self._ended = True
        self._on_ready()

    def _compare(self, reader: EpochReader) -> None:
        """Log if the data that was made again is not that which was trained on."""
        for batch in reader.last_skipped if self._batch_crc32 is not None else ():
            now = checksum(self._maker.place(batch))
            if now is not None and now != self._batch_crc32:
                logger.warning(
                    "The run does not resume exactly: batch %d of epoch %d is not the one that was trained on before "
                    "the checkpoint, so the rest of the epoch may repeat examples and leave out others. Data that "
                    "shuffles itself must do so by a seed and the epoch, as et.ArrayLoader does, or have an iterator "
                    "with get_state and set_state.",
                    reader.start - 1, reader.epoch,
                )  # fmt: skip

    def _fill(self, reader: EpochReader) -> None:
        maker, empty = self._maker, True
        try:
            for batch, position in islice(reader, self._most):
                empty = False
                self._add(maker.add(batch, position))
                if self._closing:
                    return
        finally:  # also the batches before an error
            self._add(maker.take())
        if empty and (self._most == 0 or reader.start > 0):
            self._groups.append(maker.sample(reader.sample()))

    def _add(self, groups: list[BatchGroup]) -> None:
        """Adds each group when there is room, or when the thread has to end: an iterator would lose the batches."""
        for group in groups:
            if len(self._groups) >= self._depth:
                self._wait_for_room(group)
            self._groups.append(group)
            self._on_ready()

    def _wait_for_room(self, group: BatchGroup) -> None:
        depth = self._depth
        if group.batch_bytes <= SMALL_BYTES:
            depth = max(depth, DEPTH_OF_SMALL // group.steps)
        if len(self._groups) < depth:
            return
        self._refill_below, self._full = depth // 2 + 1, True
        while len(self._groups) >= self._refill_below and not self._closing:
            self._room.wait()
            self._room.clear()
        self._full = False
