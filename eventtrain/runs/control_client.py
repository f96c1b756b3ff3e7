"""``ControlClient``: sends commands to a run of another process, and waits for the answers. Blocking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from eventtrain.errors import CommandRejectedError, RunNotReachable
from eventtrain.events import CommandApplied
from eventtrain.events.commands import Command
from eventtrain.runs.control_address import LONGEST_LINE, connect

CONNECT_S = 5.0


class ControlClient:
    """A connection to the run in ``run_dir``, for one thread.

    Args:
        run_dir: of a run that is in progress on this machine.
        timeout_s: how long to wait for each answer.

    Raises:
        RunNotReachable: no run answers there.
    """

    def __init__(self, run_dir: Path, *, timeout_s: float = 30.0) -> None:
        self._run_dir = run_dir
        self._socket, token = connect(run_dir, CONNECT_S)
        self._socket.settimeout(timeout_s)
        self._lines = self._socket.makefile("rb")
        if token is not None:
            self._ask({"kind": "token", "token": token})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Commands that were sent stay in force."""
        self._lines.close()
        self._socket.close()

    def send(self, command: Command) -> CommandApplied:
        """Returns where ``command`` took effect.

        Raises:
            CommandRejectedError: the run rejected it, with the reason.
            RunNotReachable: the run has ended.
            TimeoutError: there is no answer yet; the command stays in force.
        """
        answer = self._ask(command.model_dump(mode="json", exclude={"cause", "due", "source"}))
        return CommandApplied.model_validate_json(json.dumps(answer["applied"]))

    def status(self) -> dict[str, Any]:
        """Returns where the run is, and its hyperparameters. Raises RunNotReachable and TimeoutError."""
        return self._ask({"kind": "status"})["status"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            line = self._lines.readline(LONGEST_LINE)
        except TimeoutError:
            raise
        except OSError as error:
            raise RunNotReachable(f"The connection to the run in {self._run_dir} broke: {error}.") from error
        if not line:
            raise RunNotReachable(f"The run in {self._run_dir} has ended before it answered.")
        answer: dict[str, Any] = json.loads(line)
        for refusal in ("rejected", "error"):
            if refusal in answer:
                raise CommandRejectedError(str(answer[refusal]), reason=str(answer[refusal]))
        return answer
