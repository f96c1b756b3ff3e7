"""Runs jobs of several processes, waits for their ends one by one, and compares their results."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.killing.fork_server import ForkServer
from benchmarks.killing.hosts_job import LOG, RESULT, Launch
from benchmarks.killing.jobs import Undisturbed, require, rows

START_S = 120.0
"""How long a job may take to reach a mark, or its end, on a busy machine."""
CRASHES = ("FATAL: exception not rethrown", "terminate called", "Fatal Python error", "Check failed")
"""Text that a process writes when a thread ends it."""


class End(NamedTuple):
    """How one process ended: its exit status, negative after a signal, and when, after the call to ``wait``."""

    status: int
    took_s: float


@dataclass
class Job:
    """The processes of one launch."""

    folder: Path
    processes: list[int]
    _server: Server

    def reach(self, name: str, index: int | None = None) -> None:
        """Waits until a process, or each of them, has reached a mark."""
        indices = range(len(self.processes)) if index is None else [index]
        marks = [self.folder / f"reached-{name}-{i}" for i in indices]
        self.until(lambda: all(mark.exists() for mark in marks), f"reached {name}")

    def until(self, ready: Callable[[], object], what: str) -> None:
        """Waits until ``ready()``."""
        deadline_s = time.monotonic() + START_S
        while not ready():
            require(time.monotonic() < deadline_s, f"the job never {what}: {self.output()}")
            time.sleep(0.0005)

    def wait_s(self, seconds: float) -> None:
        """Waits for some time, or until a process has ended."""
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s and not self.has_ended():
            time.sleep(0.005)

    def has_ended(self) -> bool:
        """Returns whether a process has written its result."""
        return any(self.folder.glob(RESULT.format("*")))

    def send(self, number: signal.Signals, *indices: int) -> None:
        """Sends a signal to processes, or to all."""
        for index in indices or range(len(self.processes)):
            with suppress(ProcessLookupError):
                os.kill(self.processes[index], number)

    def wait(self, timeout_s: float) -> list[End]:
        """Waits until all have ended, and returns how. Kills those that have not after ``timeout_s`` seconds."""
        began_s = time.monotonic()
        took_s = [0.0] * len(self.processes)
        late: list[int] = []
        opened = [os.pidfd_open(process) for process in self.processes]
        waiting = dict(zip(opened, range(len(opened)), strict=True))
        while waiting:
            left_s = max(0.0, began_s + timeout_s - time.monotonic())
            for descriptor in select.select(list(waiting), [], [], left_s)[0]:
                took_s[waiting.pop(descriptor)] = time.monotonic() - began_s
            if left_s == 0.0:
                late = list(waiting.values())
                self.send(signal.SIGUSR1, *late)  # they show where they are
                time.sleep(0.5)
                for index in late:
                    os.kill(self.processes[index], signal.SIGKILL)
                break
        for descriptor in opened:
            os.close(descriptor)
        statuses = self._server.statuses()
        require(not late, f"processes {late} had not ended after {timeout_s} s: {self.output()}")
        return [End(*pair) for pair in zip(statuses, took_s, strict=True)]

    def output(self) -> str:
        """Returns what the processes wrote."""
        found = sorted(self.folder.glob("output-*"))
        return "\n".join(f"[{path.name}] {path.read_text(errors='replace')[-12000:]}" for path in found)


class Server(ForkServer):
    """The process that forks the processes of jobs (``benchmarks.killing.hosts_job``). One job at a time."""

    def __init__(self) -> None:
        super().__init__("benchmarks.killing.hosts_job", {"PYTHONUNBUFFERED": "1", "XLA_FLAGS": ""})
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._port.bind(("127.0.0.1", 0))  # no other program gets it; gRPC sets SO_REUSEPORT too

    def close(self) -> None:
        """Ends the process."""
        super().close()
        self._port.close()

    def start(
        self, folder: Path, *, count: int = 2, faults: Mapping[int, str] | None = None, **options: Any
    ) -> Job:
        """Starts a job of ``count`` processes."""
        for pattern in ("reached-*", RESULT.format("*"), "output-*"):
            for path in folder.glob(pattern):
                path.unlink()
        named = {str(index): fault for index, fault in (faults or {}).items()}
        launch = Launch(str(folder), self._port.getsockname()[1], count, named, options)
        return Job(folder, self.ask(json.dumps(asdict(launch))), self)

    def statuses(self) -> list[int]:
        """Returns the exit statuses of the last job, whose processes have ended."""
        return self.ask("wait")


@functools.cache
def server() -> Server:
    """Returns the one process for all trials."""
    made = Server()
    atexit.register(made.close)
    return made


@functools.cache
def undisturbed(count: int = 2) -> Undisturbed:
    """Returns the run of ``count`` processes to which nothing happens."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    folder, began_s = Path(made.name), time.monotonic()
    job = server().start(folder, count=count)
    ends = job.wait(START_S)
    require(not any(end.status for end in ends), f"the undisturbed run failed: {ends} {job.output()}")
    results = [json.loads((folder / RESULT.format(index)).read_text()) for index in range(count)]
    require(
        all(result == results[0] for result in results),
        "the processes of the undisturbed run ended with different results",
    )
    return Undisturbed(results[0], rows(folder / LOG), time.monotonic() - began_s, folder)


def compare(folder: Path, count: int = 2) -> None:
    """Lets the job of ``count`` processes in ``folder`` run to its end, and compares it with the undisturbed one.

    Raises:
        AssertionError: it did not end, or it ended differently.
    """
    expected = undisturbed(count)
    job = server().start(folder, count=count)
    ends = job.wait(START_S)
    require(not any(end.status for end in ends), f"the resumed run failed: {ends} {job.output()}")
    found = rows(folder / LOG)
    for index in range(count):
        expected.require_same(json.loads((folder / RESULT.format(index)).read_text()), found)


def require_no_crash(job: Job) -> None:
    """Raises AssertionError if a thread has ended a process."""
    output = job.output()
    found = [text for text in CRASHES if text in output]
    require(not found, f"a process crashed ({', '.join(found)}): {output}")
