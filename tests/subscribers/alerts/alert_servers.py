"""Servers on loopback that take alerts, or do not."""

from __future__ import annotations

import email
import email.policy
import json
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller


class Target:
    """An HTTP server on loopback that answers what it is told to and remembers what it got."""

    def __init__(self, says: str = "because", host: str = "127.0.0.1") -> None:
        self.statuses: list[int] = []
        """What to answer next; 200 when used up."""
        self.bodies: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.came = threading.Condition()
        self.hold = threading.Event()
        """Answers wait for it."""
        self.hold.set()
        target = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with target.came:
                    target.paths.append(self.path)
                    target.headers.append(dict(self.headers))
                    target.raw.append(body)
                    target.bodies.append(json.loads(body))
                    status = target.statuses.pop(0) if target.statuses else 200
                    target.came.notify_all()
                target.hold.wait(60)
                try:
                    self.send_response(status, says)
                    if 300 <= status < 400:
                        self.send_header("Location", f"{target.url}/elsewhere?{says}")
                    self.send_header("X-Echo", says)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                except OSError:  # whoever asked did not wait
                    pass

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((host, 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://{host}:{self.port}"

    @property
    def events(self) -> list[dict[str, Any]]:
        """What came, over all requests."""
        return [event for body in self.bodies for event in body["events"]]

    def wait_for(self, count: int, timeout_s: float = 30.0) -> None:
        """Until so many requests came."""
        with self.came:
            assert self.came.wait_for(lambda: len(self.bodies) >= count, timeout_s), self.bodies


@contextmanager
def serving(target: Target) -> Generator[Target]:
    thread = threading.Thread(target=target.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield target
    finally:
        target.hold.set()
        target.server.shutdown()
        thread.join()
        target.server.server_close()


class MailServer(Controller):
    """A real SMTP server on loopback."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.answer = "250 OK"
        super().__init__(self, hostname="127.0.0.1", port=free_port())

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        found = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(found, EmailMessage)
        if self.answer.startswith("250"):
            self.mails.append(found)
        return self.answer


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def silent_server() -> Generator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield listening.getsockname()[1]
