"""Promises of process 0 to the others, over TCP: a shortcut past the key-value service, never the only way.

Process 0 promises some steps ahead every 10 ms. A record in the key-value service takes 2 ms of CPU time over the two
processes, a line over TCP 0.3 ms (measured with 2 processes on 2 busy cores, jax 0.10.2). So what has no orders goes
this way where all other processes can connect. What is lost here is repeated in the log; where they cannot connect,
everything is in the log.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from eventtrain.loop.agreement.channel import Channel
from eventtrain.loop.agreement.log import Moment, Promise

logger = logging.getLogger("eventtrain")

KEY = "promises"
"""Its value is ``port secret``; empty if process 0 does not listen."""
CONNECT_S = 2.0
MOST_UNKNOWN = 8
"""Connections that have not sent the secret yet. More are closed."""


class PromiseSender:
    """Process 0's end. ``accept`` and ``send`` may be called on two threads; neither blocks.

    Args:
        channel: of the run. The port, and a secret that the other processes have to send first, are written there.
        others: how many other processes there are.
        host: the address of this process at which the others reach the coordination service; None if it is unknown.
    """

    def __init__(self, channel: Channel, others: int, host: str | None) -> None:
        self._others = others
        self._secret = secrets.token_hex(32).encode()
        self._unknown: list[tuple[socket.socket, bytes]] = []
        self._connected: list[socket.socket] = []
        self._server = None if host is None else _listening(host)
        port = "" if self._server is None else f"{self._server.getsockname()[1]} {self._secret.decode()}"
        channel.set(KEY, port)

    def accept(self) -> None:
        """Takes the connections that other processes have made. Call it now and then until all have."""
        if self._server is None:
            return
        with suppress(BlockingIOError):
            while True:
                connection, _ = self._server.accept()
                connection.setblocking(False)
                self._unknown.append((connection, b""))
        unknown, self._unknown = self._unknown, []
        for connection, begun in unknown:
            try:
                received = connection.recv(len(self._secret) - len(begun))
            except BlockingIOError:
                self._unknown.append((connection, begun))
                continue
            except OSError:
                received = b""
            sent = begun + received
            if received and len(sent) < len(self._secret):
                self._unknown.append((connection, sent))
            elif hmac.compare_digest(sent, self._secret) and len(self._connected) < self._others:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connected.append(connection)
            else:
                connection.close()
        while len(self._unknown) > self._others + MOST_UNKNOWN:
            self._unknown.pop(0)[0].close()
        if len(self._connected) == self._others:
            self._stop_listening()

    def send(self, promise: Promise) -> bool:
        """Sends ``promise`` to every other process. Returns False if it cannot: then it must go into the log."""
        if len(self._connected) < self._others:
            return False
        line = b"%d %d %d %d\n" % (promise.after, *promise.moment, promise.phase_step)
        for connection in self._connected:
            try:
                sent = connection.send(line)
            except OSError:  # closed, or its buffer is full since the process was stopped
                sent = 0
            if sent != len(line):
                self.close()
                return False
        return True

    def close(self) -> None:
        """Closes all connections. Everything goes into the log from now on. Idempotent."""
        self._stop_listening()
        connected, self._connected = self._connected, []
        for connection in connected:
            connection.close()

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        while self._unknown:
            self._unknown.pop()[0].close()


def _listening(host: str) -> socket.socket | None:
    """Returns a socket that listens at ``host`` and does not block; None if this machine does not have that address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        server = socket.create_server(address, family=family)
    except OSError as error:
        logger.info(
            "Promises go through the coordination service: %s cannot be listened at (%s).", host, error
        )
        return None
    server.setblocking(False)
    return server


class PromiseReceiver:
    """The end of another process, which has a thread of its own.

    Args:
        channel: of the run.
        host: as for ``PromiseSender``.
        take: gets each promise, in order, on that thread.
        wait_s: how long one request for the port waits on the server.
    """

    def __init__(
        self, channel: Channel, host: str | None, take: Callable[[Promise], None], wait_s: float
    ) -> None:
        self._channel = channel
        self._host = host
        self._take = take
        self._wait_s = wait_s
        self._closed = threading.Event()
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="eventtrain-promises", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        self._closed.set()
        if self._connection is not None:
            with suppress(OSError):  # it is closed already
                self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(CONNECT_S + self._wait_s)

    def _run(self) -> None:
        found = None
        try:
            while not found and not self._closed.is_set():
                found = self._channel.wait_for(KEY, self._wait_s)
                if found == "":
                    return
            if found and self._host is not None:
                port, secret = found.split()
                self._read(self._host, int(port), secret)
        except Exception as error:  # also of the service, when process 0 is gone
            if not self._closed.is_set():
                logger.info("Promises come through the coordination service from here on: %s", error)

    def _read(self, host: str, port: int, secret: str) -> None:
        with socket.create_connection((host, port), CONNECT_S) as self._connection:
            self._connection.sendall(secret.encode())
            self._connection.settimeout(None)
            if self._closed.is_set():
                return
            with self._connection.makefile("rb") as lines:
                for line in lines:
                    if self._closed.is_set() or not line.endswith(b"\n"):
                        return
                    after, phase, count, phase_step = map(int, line.split())
                    self._take(Promise(after, Moment(phase, count), phase_step))
