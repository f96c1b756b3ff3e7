"""``eventtrain launch``: runs a script as several local JAX processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, BinaryIO

import anyio
import typer

from eventtrain.cli.processes import ProcessGroup, process_environment, reserved_port
from eventtrain.errors import ConfigurationError, printable

OPTIONS_END_AT_THE_SCRIPT = {"allow_interspersed_args": False, "ignore_unknown_options": True}


def launch(
    script: Annotated[Path, typer.Argument(help="Python file that calls jax.distributed.initialize().")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The arguments of the script.")] = None,
    processes: Annotated[
        int, typer.Option("--processes", "-n", min=1, help="Number of processes on this machine.")
    ] = 2,
    devices_per_process: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU devices of each process. Default: 1.")
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Give each process one GPU instead of CPU devices.")
    ] = False,
    grace_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds from SIGTERM to SIGKILL for the others when a process fails."),
    ] = 10.0,
) -> None:
    """Run a script as several JAX processes on this machine, for tests and for laptops.

    Each line of output begins with the process that wrote it. The exit code is 0, or that of the first process that
    failed. Signals are passed on to every process.
    """
    if gpu and devices_per_process is not None:
        raise typer.BadParameter("expected --gpu or --devices-per-process, not both.")
    if os.name != "posix":
        raise typer.BadParameter("eventtrain launch requires Linux or macOS.")
    if not script.is_file():
        raise typer.BadParameter(f"{script} is not a file.")
    devices = None if gpu else devices_per_process or 1
    with reserved_port() as port:
        try:
            environments = [
                process_environment(index, processes, port, devices=devices, given=os.environ)
                for index in range(processes)
            ]
        except ConfigurationError as error:
            typer.echo(printable(f"Error: {error}", lines=True), err=True)
            raise typer.Exit(2) from None
        command = [str(script), *(arguments or ())]
        group = ProcessGroup(command, environments, PrefixedOutput().write, grace_s=grace_s)
        raise typer.Exit(anyio.run(group.run))


class PrefixedOutput:
    """Writes the lines of several processes to stdout and stderr, each with the index of its process before it."""

    def __init__(self) -> None:
        self._streams: dict[int, BinaryIO] = {1: sys.stdout.buffer, 2: sys.stderr.buffer}

    def write(self, process: int, number: int, line: bytes) -> None:
        """Writes one line. Output that nothing reads any longer, as after ``| head``, is dropped."""
        if number not in self._streams:
            return
        try:
            self._streams[number].write(b"[%d] %b\n" % (process, line))
            self._streams[number].flush()
        except BrokenPipeError:
            del self._streams[number]
            with open(os.devnull, "wb") as nowhere:  # or the interpreter reports the error again at its end
                os.dup2(nowhere.fileno(), number)
