"""``Peers``: the other processes of one run. Carries messages to and from them, and notices who is gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Literal, TypeAlias

from eventtrain.control.run_context import EXCHANGE_POLL_S
from eventtrain.errors import PeerLost
from eventtrain.loop.agreement.channel import Channel

logger = logging.getLogger("eventtrain")

BEAT_S = 0.5
"""Interval of the signs of life."""
LOST_AFTER_S = 10.0
"""A process without a sign of life for so long is reported as lost: it is gone, or was stopped, or a function in it has
kept the GIL. JAX itself takes 100 s."""
FLUSH_S = 2.0
"""How long process 0 waits at the end of a run for the last messages of the others."""
FLUSH_POLL_S = 0.01
MOST_UNREAD = 10_000
"""Messages of process 0 that another process has not read. More are held back, and then sent as one."""
READ_S = EXCHANGE_POLL_S
"""How long one request for the next message waits on the server."""

Loss: TypeAlias = Literal["failed", "silent", "cut_off"]
"""How the loss of another process is noticed: it has said that it failed; it gives no sign of life; or the coordination
service is gone with process 0, and JAX is about to end this process."""


class Peers:
    """Signs of life, failures and numbered messages of one run, by threads of its own.

    Args:
        channel: of the run.
        index, count: of this process, and of all.
        next_message: returns the next message to write; None if there is none. Called on the writing thread.
        take: gets each message that was read, in order. Called on the reading thread.
        on_lost: called once for each process that is lost, with the error and how it was noticed, on one of the
            threads.
        is_last: returns whether no further message will come.
        on_beat: called every ``BEAT_S``, on one of the threads.
        next_bulk: of another process than process 0: as ``next_message``, for messages that can wait. One of them is on
            its way at a time, so that the memory of the service is bounded.

    Process 0 writes the log, which every other process reads. These write requests, which process 0 reads. Messages
    are deleted when they were read.

    Attributes:
        lost: the first process that failed or was lost, as an error; None while all are there.
    """

    def __init__(
        self,
        channel: Channel,
        index: int,
        count: int,
        *,
        next_message: Callable[[], str | None],
        take: Callable[[str], None],
        on_lost: Callable[[PeerLost, Loss], None],
        is_last: Callable[[], bool] = lambda: False,
        on_beat: Callable[[], None] = lambda: None,
        next_bulk: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.lost: PeerLost | None = None
        self._index = index
        self._others = [process for process in range(count) if process != index]
        self._beats, self._left = channel.below("beats"), channel.below("left")
        self._flushed = channel.below("flushed")
        log, asks = channel.below("log"), channel.below("asks")
        self._leads = index == 0
        self._writes, self._reads = (log, asks) if self._leads else (asks, log)
        self._next_message = next_message
        self._take = take
        self._on_lost = on_lost
        self._is_last = is_last
        self._on_beat = on_beat
        self._next_bulk = next_bulk
        # Numbers of the last message that could wait, and of the last message that process 0 has read.
        self._bulk = self._read_by_0 = 0
        self._leaving = self._has_flushed = False
        self._written = self._read = self._deleted = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._reported: set[int] = set()
        self._wakeup = threading.Event()
        self._idle = threading.Event()
        self._closed = threading.Event()
        self._has_lost = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"eventtrain-{name}", daemon=True)
            for name, work in (
                ("peer-beats", self._beat),
                ("peer-writer", self._write),
                ("peer-reader", self._listen),
            )
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Has the writing thread ask for messages. Any thread; never blocks."""
        self._idle.clear()
        self._wakeup.set()

    def wait_for_failure(self, timeout_s: float | None = None) -> None:
        """Waits until another process is lost; by default for as long as it may take to notice that one is gone."""
        self._has_lost.wait(LOST_AFTER_S + 4 * BEAT_S if timeout_s is None else timeout_s)

    def flush(self) -> None:
        """Sends all messages at once from now on, as the run ends, and lets process 0 know. Never blocks."""
        self._leaving = True
        self.wake()

    def wait_for_flush(self, timeout_s: float = FLUSH_S) -> None:
        """Waits until this process, which is process 0, has read what the others sent before ``flush``. Blocks.

        For ``timeout_s`` seconds at most, and not for a process that is lost.
        """
        end_s = monotonic() + timeout_s
        while self.lost is None and not self._closed.is_set() and monotonic() < end_s:
            numbers = self._flushed.all()
            if len(numbers) == len(self._others) and self._read >= max(map(int, numbers.values())):
                return
            self._has_lost.wait(FLUSH_POLL_S)

    def leave(self, error: str = "", timeout_s: float = 5.0) -> None:
        """Writes what is left, reports that this process leaves the run and why, and ends the threads. Blocks.

        Args:
            error: what failed here, which ends the run everywhere; empty at the end of the run.
            timeout_s: how long to wait for the messages that are not written yet.
        """
        if self._closed.is_set():
            return
        self._leaving = True
        self.wake()
        if not error:
            self._idle.wait(timeout_s)
        try:
            self._left.set(str(self._index), error, overwrite=True)
        except Exception as failure:  # the service is gone, with process 0
            logger.warning("The other processes cannot be told that this one leaves the run: %s", failure)
        self._closed.set()
        self._wakeup.set()
        # They must have left JAX's client when the interpreter ends, which aborts the process otherwise.
        if self._leads:
            self._end_reader()
        for thread in self._threads:
            thread.join(timeout_s)

    def _end_reader(self) -> None:
        """Has the reading thread of process 0 stop waiting for a request."""
        with suppress(Exception):  # the service is gone
            self._reads.set(str(self._reads.increment("count")), "")

    # --- the threads ------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not self._closed.is_set():
                first_line = str(error).partition("\n")[0]
                self._lose(0, f"its coordination service cannot be reached ({first_line})", "cut_off")

    def _beat(self) -> None:
        number = 0
        while not self._closed.is_set():
            number += 1
            self._beats.set(str(self._index), f"{number} {self._read}", overwrite=True)
            self._look(self._beats.all(), self._left.all())
            self._on_beat()
            self._closed.wait(BEAT_S)

    def _look(self, beats: dict[str, str], left: dict[str, str]) -> None:
        now_s = monotonic()
        if not self._leads and (beat := beats.get("0")) is not None:
            was_waiting, self._read_by_0 = self._read_by_0 < self._bulk, int(beat.split()[1])
            if was_waiting and self._read_by_0 >= self._bulk:
                self.wake()
        for process in self._others:
            why = left.get(str(process))
            if why == "":
                self._seen.pop(process, None)
                continue
            if why:
                self._lose(process, why, "failed")
                continue
            beat = beats.get(str(process))
            if beat is None:
                continue  # it has not begun the run
            seen = self._seen.get(process)
            if seen is None or seen[0] != beat:
                self._seen[process] = (beat, now_s)
            elif now_s - seen[1] > LOST_AFTER_S:
                self._lose(process, f"it has given no sign of life for {now_s - seen[1]:.0f} s", "silent")
        if self._leads and all(str(process) in beats for process in self._others):
            self._delete(min((int(beats[str(process)].split()[1]) for process in self._others), default=0))

    def _delete(self, read: int) -> None:
        """Deletes the messages of process 0 that every other process has read."""
        while self._deleted < read:
            self._deleted += 1
            self._writes.delete(str(self._deleted))

    def _lose(self, process: int, error: str, how: Loss) -> None:
        if process in self._reported:
            return
        self._reported.add(process)
        lost = PeerLost(f"Process {process} of the run is lost: {error}", process)
        logger.error("%s", lost)
        self.lost = self.lost or lost
        self._has_lost.set()
        self._on_lost(lost, how)

    def _write(self) -> None:
        while not self._closed.is_set():
            self._wakeup.wait()
            self._wakeup.clear()
            while self._has_room() and (text := self._next_message()) is not None:
                self._send(text)
            while (self._leaving or self._read_by_0 >= self._bulk) and (
                text := self._next_bulk()
            ) is not None:
                self._bulk = self._send(text)
            if self._leaving and not self._leads and not self._has_flushed:
                self._has_flushed = True
                self._flushed.set(str(self._index), str(self._bulk))
            if not self._wakeup.is_set():
                self._idle.set()

    def _send(self, text: str) -> int:
        """Writes a message. Returns its number."""
        if self._leads:
            self._written = number = self._written + 1
        else:  # several processes write requests
            number = self._writes.increment("count")
        self._writes.set(str(number), text)
        return number

    def _has_room(self) -> bool:
        """Waits until another message may be written. Returns False if this process leaves the run meanwhile."""
        while self._written - self._deleted >= MOST_UNREAD:
            if self._closed.wait(0.01):
                return False
        return True

    def _listen(self) -> None:
        while not (self._closed.is_set() or self._is_last()):
            text = self._reads.wait_for(str(self._read + 1), READ_S)
            if text is None:
                continue
            if text:
                self._take(text)
            self._read += 1
            if self._leads:
                self._reads.delete(str(self._read))
