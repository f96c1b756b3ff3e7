"""``CommandReplay``: repeats the commands that steered another run from outside, at the same steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread

from eventtrain.control.requests import ReplayedCommand
from eventtrain.events import CommandApplied, CommandRejected, Event
from eventtrain.events.commands import Pause, Profile, Resume, Stop
from eventtrain.runs.reading import read_events
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked

logger = logging.getLogger("eventtrain")


class CommandReplayState(SavedState):
    """State of a ``CommandReplay``: how many of its commands were answered."""

    version: Literal[1] = 1
    answered: int = 0


class CommandReplay(Subscriber):
    """Repeats the commands that another run got from outside the program: by its control socket, dashboard, files.

    Args:
        run_dir: of that run, or its log, which a ``JSONLLogger`` has written.

    With the same program and data the run ends bit for bit as the other one did, if only such commands steered that
    one: a handler with ``lag=None`` decides again, and perhaps elsewhere. At one boundary the order among commands of a
    finite lag is kept. Pauses and traces are left out, because they change no value; so are stops of an attempt that
    was continued. A run that resumes continues with the commands that its checkpoint does not contain; it has no
    snapshot of the attempt before, so that a ``restore`` of one is rejected.

    Raises:
        ConfigurationError: when a run starts: there is no log.
    """

    events = (CommandApplied, CommandRejected)

    @checked
    def __init__(self, run_dir: str | Path) -> None:
        self._path = run_dir
        self._answered = 0

    async def start(self, run: RunContext) -> None:
        """Reads the log, and hands the commands to the run. Raises ConfigurationError."""
        commands = await anyio.to_thread.run_sync(recorded_commands, self._path)
        if run.restarts:
            self._answered = 0
        run.replay_commands(commands[self._answered :])
        logger.info("%d commands of %s are repeated.", len(commands) - self._answered, self._path)

    async def handle(self, event: Event) -> None:
        """Counts the answers."""
        if isinstance(event, (CommandApplied, CommandRejected)) and is_replayed(event):
            self._answered += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns how many commands were answered, as plain JSON data."""
        return CommandReplayState(answered=self._answered).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next run begin behind them. Raises StateError for another version or invalid data."""
        self._answered = CommandReplayState.parse(self.name or type(self).__name__, state).answered


def is_replayed(event: CommandApplied | CommandRejected) -> bool:
    """Returns whether a command came from outside to an earlier run: only then it has a source and a boundary."""
    return event.command.source is not None and event.command.due is not None


def recorded_commands(run_dir: str | Path) -> list[ReplayedCommand]:
    """Returns the commands from outside of the newest run in a log, each with its place. Blocks.

    Raises:
        ConfigurationError: there is no log. EventParseError: it is damaged.
    """
    applied = list(read_events(run_dir, kinds=CommandApplied))
    applied = [event for event in applied if event.run_id == applied[-1].run_id]
    found: list[ReplayedCommand] = []
    before = step = 0
    for event in applied:
        if event.step != step:
            before, step = 0, event.step
        command = event.command
        if command.source is None:
            before += 1
        elif not isinstance(command, (Pause, Resume, Profile)) and (
            not isinstance(command, Stop) or event.attempt == applied[-1].attempt
        ):
            found.append(ReplayedCommand(command.model_copy(update={"due": step}), before))
    return found
