"""``RunFiles``: runs that are shown from their logs, finished ones and ones that other processes write.

A run in progress is steered through its control socket, if it has one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eventtrain.control.issue import require_unset
from eventtrain.errors import CommandRejectedError, EventTrainError, RunNotReachable
from eventtrain.events import Event
from eventtrain.runs.control_address import SOCKET, TOKEN
from eventtrain.runs.control_client import ControlClient
from eventtrain.runs.owner import is_held
from eventtrain.runs.reading import EventReader, read_events
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.dashboard.frames import ShownRun
from eventtrain.subscribers.dashboard.observed_run import ENDED, ObservedRun

logger = logging.getLogger("eventtrain")

LOOK_S = 2.0
"""How often is looked whether the process of a run still lives."""
ANSWER_S = 9.0
"""How long a run may take to answer a command; less than the page waits."""
SOURCE = "dashboard"
"""Begins the reason of each command: for the run its source is the control socket."""
GONE = "its process is gone"
"""Reason of a run that was killed."""


class RunFiles:
    """Reads the logs of some runs, each in a thread, as they grow, until ``close``.

    Args:
        run_dirs: folders of runs, or paths of logs, as for ``read_events``.

    Raises:
        ConfigurationError: one of them has no log that can be read.
    """

    def __init__(self, run_dirs: Sequence[Path]) -> None:
        titles = _titles(run_dirs)
        self._runs = [
            _FollowedRun(path, title, f"{index}:{title}")
            for index, (path, title) in enumerate(zip(run_dirs, titles, strict=True))
        ]
        self._closed = threading.Event()
        for run in self._runs:
            run.start()
        threading.Thread(target=self._look, name="eventtrain watch of runs", daemon=True).start()

    def shown(self) -> list[ShownRun]:
        """Returns the runs, for ``Frames``."""
        return [run.shown for run in self._runs]

    # --- steering: the page's commands go to the control sockets of the runs ---------------------------------------

    actions: Mapping[str, str] = MappingProxyType({})
    """Buttons of a dashboard's own; runs from files have none."""

    async def send(self, run: str, command: Any) -> int:
        """Sends a command to a run; returns the step at which it took effect.

        Raises:
            CommandRejectedError: the run rejected it, or does not answer.
            TimeoutError: there is no answer yet; the command stays in force.
        """
        for one in self._runs:
            if one.shown.observed.run_id == run and one.shown.can_control:
                return await in_own_thread(partial(one.send, command))
        raise CommandRejectedError("No such run answers.", reason="the run does not answer")

    def request(self, run: str, action: str) -> None:
        """Raises CommandRejectedError: there are no actions."""
        raise CommandRejectedError("There is no such action.", reason="there is no such action")

    def close(self) -> None:
        """Ends the threads."""
        self._closed.set()
        for run in self._runs:
            run.reader.close()

    def _look(self) -> None:
        while True:
            for run in self._runs:
                run.look()
            if self._closed.wait(LOOK_S):
                return


class _FollowedRun(threading.Thread):
    def __init__(self, path: Path, title: str, key: str) -> None:
        super().__init__(name=f"eventtrain reader of {title}", daemon=True)
        self.reader: EventReader[Event] = read_events(path, follow=True)
        self.shown = ShownRun(title, ObservedRun(run_id=key))
        self._folder = path if path.is_dir() else path.parent
        self._is_read = False

    def run(self) -> None:
        """Hands over the events of the log, until the run has ended."""
        try:
            for event in self.reader:
                self.shown.put(event)
            self._is_read = True
        except (EventTrainError, OSError) as error:
            logger.error("%s can no longer be read: %s", self.shown.title, error)
            with self.shown.up_to_date() as observed:
                observed.set_state("failed", f"its log cannot be read: {error}"[:500])

    def send(self, command: Any) -> int:
        """Sends a command through the control socket. Blocks."""
        require_unset(command)
        reason = f"{SOURCE}: {command.reason}" if command.reason else SOURCE
        try:
            with ControlClient(self._folder, timeout_s=ANSWER_S) as client:
                return client.send(command.model_copy(update={"reason": reason})).step
        except RunNotReachable as error:
            raise CommandRejectedError(str(error), reason=str(error)) from error

    def look(self) -> None:
        """Notes whether the process of the run still lives, which its log does not tell."""
        held = is_held(self._folder)
        self.shown.can_control = held and any((self._folder / name).exists() for name in (SOCKET, TOKEN))
        with self.shown.up_to_date() as observed:
            status = observed.status
            if status.state in ENDED and status.reason != GONE:
                return
            if held:
                if status.state in ENDED:
                    observed.set_state("running")
            elif self._is_read:  # of a table, which has no event of the end
                observed.set_state("completed")
            else:
                observed.set_state("interrupted", GONE)


def _titles(paths: Sequence[Path]) -> list[str]:
    """Returns the names of the folders, with those above them where names occur twice."""
    resolved = [path.resolve() for path in paths]
    titles = [path.name for path in resolved]
    return [
        name if titles.count(name) == 1 else f"{path.parent.name}/{name}"
        for path, name in zip(resolved, titles, strict=True)
    ]
