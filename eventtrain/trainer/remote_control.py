"""``RemoteControl``: the control socket of a run, and the files STOP and CHECKPOINT, served by threads of their own.

The threads post commands and wait for their answers, both without the event loop of the bus, so that a handler that
blocks it does not hold up a stop. They are daemons, and their number is bounded.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from eventtrain.control.control import Control
from eventtrain.control.issue import first_problem, issue
from eventtrain.errors import CommandRejectedError, ConfigurationError
from eventtrain.events.commands import AnyCommand, Command
from eventtrain.runs.control_address import LONGEST_LINE, close, listen

logger = logging.getLogger("eventtrain")

LOOK_S = 0.5
"""How often the files are looked for."""
MOST_CLIENTS = 8
IDLE_S = 60.0
"""How long a client may send nothing, or not take an answer."""
JOIN_S = 1.0
DRAIN_S = 0.1
LONGEST_TAG = 200


class GetStatus(BaseModel):
    """Asks where the run is."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["status"]


class ShowToken(BaseModel):
    """The first line on a TCP connection."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["token"]
    token: str


REQUESTS: TypeAdapter[Any] = TypeAdapter(
    Annotated[GetStatus | ShowToken | AnyCommand, Field(discriminator="kind")]
)


class RemoteControl:
    """Serves one run, from ``start`` to ``close``. It never raises into the run: a failure is logged.

    Args:
        run_dir: of the run, which holds its lock.
        control: of the run.
        status: returns where the run is, as JSON data. Called by any thread.
    """

    def __init__(self, run_dir: Path, control: Control, status: Callable[[], dict[str, Any]]) -> None:
        self._run_dir = run_dir
        self._control = control.with_source("control socket")
        self._by_file = control.with_source("file")
        self._status = status
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._server: socket.socket | None = None
        self._token: str | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Opens the socket. If that is not possible, the reason is logged, and only the files are looked for."""
        try:
            self._server, self._token = listen(self._run_dir)
            self._server.settimeout(LOOK_S)
        except OSError as error:
            logger.warning("No control socket in %s: %s. The run continues without it.", self._run_dir, error)
        self._thread = threading.Thread(target=self._serve, name="eventtrain-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends every connection, and removes the socket. Blocks for about a second at most."""
        self._closing.set()
        if self._server is not None:
            with suppress(OSError):
                close(self._run_dir)
            _shut(self._server)
        with self._lock:
            clients = dict(self._clients)
        for client in clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)  # answers on their way are still sent
        for thread in (self._thread, *clients.values()):
            if thread is not None:
                thread.join(JOIN_S)

    def _serve(self) -> None:
        server = self._server
        while not self._closing.is_set():
            self._look_for_files()
            if server is None:
                self._closing.wait(LOOK_S)
                continue
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            except OSError:
                if not self._closing.is_set():  # too many open files, for example
                    self._closing.wait(LOOK_S)
                continue
            self._admit(client)

    def _admit(self, client: socket.socket) -> None:
        with self._lock:
            is_full = len(self._clients) >= MOST_CLIENTS or self._closing.is_set()
            if not is_full:
                thread = threading.Thread(
                    target=self._attend, args=(client,), name="eventtrain-control-client", daemon=True
                )
                self._clients[client] = thread
                thread.start()
        if is_full:
            _refuse(client, f"the run has {MOST_CLIENTS} clients already")

    def _attend(self, client: socket.socket) -> None:
        """Answers one client, line by line, until it leaves or sends what is not a request."""
        try:
            client.settimeout(IDLE_S)
            is_known = self._token is None
            with client, client.makefile("rb") as lines:
                while line := lines.readline(LONGEST_LINE + 1):
                    try:
                        request = _parsed(line)
                        is_known = is_known or self._is_token(request)
                        answer = self._answer(request)
                    except ConfigurationError as error:
                        _refuse(client, str(error))
                        return
                    client.sendall(_line(answer))
        except OSError:
            pass  # it left, or sent nothing for too long
        except Exception:
            logger.exception("A client of the control socket was not answered.")
        finally:
            with self._lock:
                self._clients.pop(client, None)

    def _is_token(self, request: Any) -> bool:
        """Returns True. Raises ConfigurationError if the first line is not the token."""
        given = request.token if isinstance(request, ShowToken) else ""
        if not hmac.compare_digest(given.encode("utf-8", "replace"), (self._token or "").encode()):
            raise ConfigurationError("the first line must have the token of the run")
        return True

    def _answer(self, request: Any) -> dict[str, Any]:
        if isinstance(request, GetStatus):
            return {"status": self._status()}
        if isinstance(request, ShowToken):
            return {"welcome": True}
        return self._carry_out(request)

    def _carry_out(self, command: Command) -> dict[str, Any]:
        try:
            applied = anyio.run(issue(self._control, command).result)
        except CommandRejectedError as error:
            return {"rejected": error.reason}
        return {"applied": applied.model_dump(mode="json")}

    # --- files --------------------------------------------------------------------------------------------------

    def _look_for_files(self) -> None:
        for name, send in (("STOP", self._stop), ("CHECKPOINT", self._checkpoint)):
            path = self._run_dir / name
            try:
                if path.is_file():
                    with path.open("rb") as file:
                        text = file.read(LONGEST_TAG).decode("utf-8", "replace").strip()
                    path.unlink()
                    send(text)
            except OSError as error:
                logger.error("%s cannot be taken up: %s", path, error)

    def _stop(self, text: str) -> None:
        logger.warning("The file STOP was found in %s, and removed: the run ends.", self._run_dir)
        self._by_file.stop(text or "stopped")

    def _checkpoint(self, text: str) -> None:
        logger.warning("The file CHECKPOINT was found in %s, and removed.", self._run_dir)
        self._by_file.checkpoint(text or None)


def _parsed(line: bytes) -> Any:
    if len(line) > LONGEST_LINE:
        raise ConfigurationError(f"a request must have at most {LONGEST_LINE} bytes")
    try:
        return REQUESTS.validate_json(line)
    except ValidationError as error:
        raise ConfigurationError(f"not a request: {first_problem(error)}"[:500]) from error


def _refuse(client: socket.socket, reason: str) -> None:
    """Answers with an error, and closes the connection. Blocks for a fraction of a second at most."""
    with suppress(OSError), client:
        client.settimeout(DRAIN_S)
        client.sendall(_line({"error": reason}))
        client.shutdown(socket.SHUT_WR)
        client.recv(LONGEST_LINE)  # a connection that is closed with something unread loses the answer


def _line(answer: dict[str, Any]) -> bytes:
    return REPLY.dump_json(answer) + b"\n"


REPLY: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def _shut(server: socket.socket) -> None:
    with suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)  # wakes accept, where the system does that
    server.close()
