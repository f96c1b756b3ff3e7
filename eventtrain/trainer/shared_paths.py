"""Checks, before a run of several processes begins, which directories they share and which files two of them write.

Process 0 marks the directories that have to be shared. Each other process looks for the marks and reports what it found
and which files it will write. Process 0 judges, and every process raises the same error. Blocks the thread that trains;
a stop that arrives meanwhile ends the check.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

import jax

from eventtrain.control.command_queue import POLL_S, CommandQueue
from eventtrain.control.run_context import Exchange
from eventtrain.errors import ConfigurationError
from eventtrain.events.models import Frozen
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.subscribers._shared.paths import require_writable_folder
from eventtrain.subscribers.base import Subscriber, name_of

MARK = ".eventtrain.shared-"
LOOK_S = 5.0
"""How long a process looks for a mark: a network file system may show it some seconds after it was made."""


class Arrival(Frozen):
    """Report of a process that has joined the run.

    Attributes:
        host: its machine.
        outputs: file or folder that it writes -> name of the subscriber.
        not_shared: directory without the mark of process 0 -> name of the subscriber.
    """

    host: str
    outputs: Mapping[str, str]
    not_shared: Mapping[str, str] = {}


@contextmanager
def marked(run_dir: Path, subscribers: Sequence[Subscriber], mark: str) -> Generator[None]:
    """Puts a file named ``mark`` into every directory that has to be shared, for the length of the block. Process 0.

    Removes the marks that killed runs left there.

    Raises:
        ConfigurationError: such a directory cannot be written.
    """
    folders = _shared_directories(run_dir, subscribers)
    for folder, owner in folders.items():
        require_writable_folder(Path(folder), owner)
        for left in Path(folder).glob(f"{MARK}*"):
            left.unlink(missing_ok=True)
        (Path(folder) / mark).touch()
    try:
        yield
    finally:
        for folder in folders:
            with suppress(OSError):
                (Path(folder) / mark).unlink(missing_ok=True)


def check_paths(
    agreement: Agreement, queue: CommandQueue, run_dir: Path, subscribers: Sequence[Subscriber], mark: str
) -> None:
    """Checks the paths of the ``subscribers`` of this process together with the other processes.

    Args:
        agreement: which has begun.
        queue: gets the stops that end the check.
        run_dir: of the run, in this process.
        subscribers: that run in this process.
        mark: name of the marks of process 0.

    Raises:
        ConfigurationError: a directory is not shared, or two processes write to one path. The same in each process.
        PeerLost: another process has failed or is gone.
    """
    exchange = agreement.exchange
    if exchange is None:
        return
    arrival = Arrival(host=platform.node(), outputs=_outputs(run_dir, subscribers))
    if agreement.decides:
        arrivals = _arrivals(exchange, queue)
        verdict = "" if arrivals is None else _verdict([arrival, *arrivals])
        exchange.set("paths/verdict", verdict)
    else:
        folders = _shared_directories(run_dir, subscribers)
        not_shared = {folder: owner for folder, owner in folders.items() if not _is_marked(folder, mark)}
        arrival = arrival.model_copy(update={"not_shared": not_shared})
        exchange.set(f"paths/{jax.process_index()}", arrival.model_dump_json())
        while (verdict := exchange.wait_for("paths/verdict", POLL_S)) is None:
            agreement.ask()
    if verdict:
        raise ConfigurationError(verdict)


def _arrivals(exchange: Exchange, queue: CommandQueue) -> list[Arrival] | None:
    """Returns the reports of the other processes; None if a stop arrives first."""
    found: list[Arrival] = []
    for index in range(1, jax.process_count()):
        while (text := exchange.wait_for(f"paths/{index}", POLL_S)) is None:
            if any(pending.command.kind == "stop" for pending in queue.arrived):
                return None
        found.append(Arrival.model_validate_json(text))
    return found


def _verdict(arrivals: Sequence[Arrival]) -> str:
    """Returns what is wrong; empty if nothing is."""
    writers: dict[str, int] = {}
    for index, arrival in enumerate(arrivals):
        for folder, owner in arrival.not_shared.items():
            return (
                f"{owner} writes to {folder}, and process {index} (on {arrival.host}) does not find there what process "
                f"0 (on {arrivals[0].host}) has just written. The processes write each checkpoint together, so give "
                "all of them the same directory, on a file system that they share: Trainer(run_dir=...)."
            )
        for path, owner in arrival.outputs.items():
            other = writers.setdefault(path, index)
            if other != index:
                return (
                    f"{owner} writes to {path} in process {other} and in process {index}, which would overwrite each "
                    "other's output. Give it another path in each process, for example with jax.process_index() in "
                    "its name."
                )
    return ""


def _shared_directories(run_dir: Path, subscribers: Sequence[Subscriber]) -> dict[str, str]:
    """Returns directory -> name of the subscriber."""
    return {str(run_dir / path): name_of(one) for one in subscribers for path in one.shared_directories}


def _outputs(run_dir: Path, subscribers: Sequence[Subscriber]) -> dict[str, str]:
    """Returns file or folder -> name of the subscriber."""
    return {
        os.path.realpath(run_dir / path): name_of(one) for one in subscribers for path in one.output_paths
    }


def _is_marked(folder: str, mark: str) -> bool:
    end_s = monotonic() + LOOK_S
    while not (found := mark in _listed(Path(folder))) and monotonic() < end_s:
        sleep(0.1)
    return found


def _listed(folder: Path) -> list[str]:
    """Returns the names in a folder; none if it is missing, after which a network file system looks for it again."""
    with suppress(OSError):
        return os.listdir(folder)
    with suppress(OSError):
        os.listdir(next(parent for parent in folder.parents if parent.exists()))
    return []
