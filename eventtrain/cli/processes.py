"""Several processes of one JAX program on this machine, which start and end together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
from anyio.abc import Process

from eventtrain.errors import ConfigurationError

PROGRAM = Path(__file__).with_name("script_process.py")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (*STOPS, signal.SIGUSR1, signal.SIGUSR2)
LONGEST_LINE = 1 << 16
"""Bytes after which a line without an end is written in pieces."""
LAST_OUTPUT_S = 2.0
"""Time for the output that is still in the pipes of a process that has ended."""
HOST_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+\s*")

Write = Callable[[int, int, bytes], None]
"""Takes process index, file descriptor (1 or 2), and one line without its end."""


class ProcessGroup:
    """Local processes of one Python script that end together.

    The first process that fails ends the others: they get SIGTERM, and SIGKILL ``grace_s`` later. Signals that this
    process receives are passed on to all of them. If this process dies, Linux kills them at once. Each one has a
    process group of its own, so that Ctrl-C in a terminal reaches it once, through this process, and so that the
    processes it started itself end with it.
    """

    def __init__(
        self,
        script: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        write: Write,
        *,
        grace_s: float,
        cwd: Path | None = None,
        python_options: Sequence[str] = (),
    ) -> None:
        self.exit_codes: dict[int, int] = {}
        """Process index -> exit code, in the order in which they failed or ended; 128 + n for signal n."""
        self._script = script
        self._environments = environments
        self._write = write
        self._grace_s = grace_s
        self._cwd = cwd
        self._python = [sys.executable, *python_options]
        self._running: dict[int, Process] = {}
        self._stopping = False
        """Whether all processes have been told to end. A second signal would abort what the first one began."""
        self._failed = anyio.Event()

    @property
    def exit_code(self) -> int:
        """0 if every process ended with 0, else the exit code of the first that failed."""
        return next((code for code in self.exit_codes.values() if code), 0)

    async def run(self) -> int:
        """Starts all processes, waits for them, and returns the exit code of the group.

        Must be called on the main thread, where signals arrive. No process outlives the call, also if it is cancelled.
        """
        passed_on = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
        try:
            with anyio.open_signal_receiver(*passed_on) as received:
                async with anyio.create_task_group() as watching:
                    watching.start_soon(self._pass_on, received)
                    watching.start_soon(self._end_after_a_failure)
                    async with anyio.create_task_group() as group:
                        for index in range(len(self._environments)):
                            if self._stopping:
                                break
                            read_ends = await self._start(index)
                            group.start_soon(self._follow, index, read_ends)
                    watching.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                self._signal_all(signal.SIGKILL)
                for process in self._running.values():
                    await process.wait()
        return self.exit_code

    async def _start(self, index: int) -> list[int]:
        """Starts one process, and returns the read ends of its stdout, its stderr and its report of a failure.

        They are pipes of our own, because the end of a process must be seen although a grandchild holds its stdout.
        """
        pipes = [os.pipe(), os.pipe(), os.pipe()]
        read_ends, (stdout, stderr, report) = map(list, zip(*pipes, strict=True))
        try:
            self._running[index] = await anyio.open_process(
                [*self._python, str(PROGRAM), str(os.getpid()), str(report), *self._script],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[report],
                cwd=self._cwd,
                env=self._environments[index],
                start_new_session=True,
            )
        finally:
            for write_end in (stdout, stderr, report):
                os.close(write_end)
        for read_end in read_ends:
            os.set_blocking(read_end, False)
        return read_ends

    async def _follow(self, index: int, read_ends: Sequence[int]) -> None:
        """Copies the output of one process until it ends, and records its exit code."""
        stdout, stderr, report = read_ends
        async with anyio.create_task_group() as reading:
            reading.start_soon(self._copy, index, 1, stdout)
            reading.start_soon(self._copy, index, 2, stderr)
            reading.start_soon(self._read_report, index, report)
            code = await self._running[index].wait()
            self._signal(index, signal.SIGKILL)  # what it started itself and left behind
            del self._running[index]
            self._ended(index, code if code >= 0 else 128 - code)
            reading.cancel_scope.deadline = anyio.current_time() + LAST_OUTPUT_S

    async def _copy(self, index: int, number: int, read_end: int) -> None:
        rest = b""
        try:
            async for chunk in _chunks(read_end):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) >= LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._write(index, number, line)
        finally:
            if rest:
                self._write(index, number, rest)

    async def _read_report(self, index: int, read_end: int) -> None:
        async for chunk in _chunks(read_end):
            self._ended(index, int(chunk))

    def _ended(self, index: int, code: int) -> None:
        self.exit_codes.setdefault(index, code)
        if code != 0:
            self._failed.set()

    async def _pass_on(self, received: AsyncIterator[signal.Signals]) -> None:
        async for number in received:
            self._stopping |= number in STOPS
            self._signal_all(number)

    async def _end_after_a_failure(self) -> None:
        await self._failed.wait()
        if not self._stopping:
            self._stopping = True
            self._signal_all(signal.SIGTERM)
        await anyio.sleep(self._grace_s)
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        """Signals every process that has not failed. SIGKILL is for all: a failed one may wait for the others."""
        for index in self._running:
            if number == signal.SIGKILL or index not in self.exit_codes:
                self._signal(index, number)

    def _signal(self, index: int, number: signal.Signals) -> None:
        """Sends a signal to one process; SIGKILL to its whole group."""
        try:
            send = os.killpg if number == signal.SIGKILL else os.kill
            send(self._running[index].pid, number)
        except ProcessLookupError:
            pass  # it has just ended


async def _chunks(read_end: int) -> AsyncIterator[bytes]:
    """Yields what arrives in a pipe until its other end is closed, and closes this end."""
    try:
        while True:
            await anyio.wait_readable(read_end)
            if not (chunk := os.read(read_end, LONGEST_LINE)):
                break
            yield chunk
    finally:
        os.close(read_end)


@contextmanager
def reserved_port() -> Generator[int]:
    """Yields a free port on loopback that the operating system gives to no other program in the meantime.

    The socket only holds the number. The coordinator of JAX can listen there, because gRPC sets SO_REUSEPORT too.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def process_environment(
    index: int, count: int, port: int, *, devices: int | None, given: Mapping[str, str]
) -> dict[str, str]:
    """Returns the environment of one process, with which ``jax.distributed.initialize()`` needs no arguments.

    JAX takes the address of the coordinator from a variable of its own, but count and index of the processes only from
    a cluster that it detects. The first one that it looks for is Open MPI, hence its variables.

    Args:
        index: The process, from 0 to ``count - 1``.
        count: The number of processes.
        port: The port of the coordinator on loopback.
        devices: The number of CPU devices of the process; None for one GPU.
        given: The environment to extend.

    Raises:
        ConfigurationError: CUDA_VISIBLE_DEVICES lists fewer GPUs than there are processes.
    """
    address = f"127.0.0.1:{port}"
    env = dict(given) | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # JAX would listen on every interface
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "OMPI_MCA_orte_hnp_uri": f"0.0;tcp://{address}",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        "PYTHONUNBUFFERED": "1",  # lines appear when they are printed
    }
    if any(
        "_proxy" in name.lower() for name in given
    ):  # gRPC would look for loopback behind it, and JAX warns of that
        env |= {"no_grpc_proxy": "127.0.0.1", "JAX_CHECK_PROXY_ENVS": "false"}
    if devices is None:
        return env | _one_gpu(index, count, given)
    flags = (
        f"{HOST_DEVICES.sub('', given.get('XLA_FLAGS', ''))} --xla_force_host_platform_device_count={devices}"
    )
    return env | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": flags.strip(),
    }


def _one_gpu(index: int, count: int, given: Mapping[str, str]) -> dict[str, str]:
    visible = given.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(gpu) for gpu in range(count)] if visible is None else [*filter(None, visible.split(","))]
    if len(gpus) < count:
        raise ConfigurationError(
            f"{count} processes need one GPU each, but CUDA_VISIBLE_DEVICES={visible} lists {len(gpus)}. "
            "Start fewer processes, or make more GPUs visible."
        )
    return {"CUDA_VISIBLE_DEVICES": gpus[index], "JAX_LOCAL_DEVICE_IDS": "0"}
