"""An S3 server on loopback (moto's), behind a door that can be slow, failing, lying or shut."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ECHO = "s3cr3t-answer"
"""Stands in the body of every answer that the door makes up, as a server may quote what it was sent."""


@dataclass
class Door:
    """Passes requests on to a server, and remembers them.

    Attributes:
        refuse: (method, path) -> an HTTP status to answer with, or None to pass it on.
        change: (method, path, body) -> the body to pass on.
        held: requests whose (method, path) it is true for wait until ``hold`` is set.
    """

    port: int
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    change: Callable[[str, str, bytes], bytes] = lambda method, path, body: body
    held: Callable[[str, str], bool] = lambda method, path: True
    hold: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path without the bucket) of what was asked for, in the order of arrival."""
    waiting: int = 0
    most_at_once: int = 0
    url: str = ""
    bucket: str = ""

    def __post_init__(self) -> None:
        self.hold.set()
        self._lock = threading.Condition()
        self._inside = 0

    def wait_for(self, count: int, timeout_s: float = 20) -> None:
        """Until so many requests are held."""
        with self._lock:
            assert self._lock.wait_for(lambda: self.waiting >= count, timeout_s)

    def put(self) -> list[str]:
        """Paths of objects that were sent, in the order of arrival."""
        return [path for method, path in self.requests if method == "PUT"]

    def options(self, **more: Any) -> dict[str, Any]:
        return {
            "endpoint": self.url,
            "access_key_id": "someone",
            "secret_access_key": "s3cr3t-key",
            "allow_http": True,
            **more,
        }

    @contextmanager
    def passing(self, method: str, path: str) -> Iterator[None]:
        with self._lock:
            self.requests.append((method, path))
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
            held = not self.hold.is_set() and self.held(method, path)
            self.waiting += held
            self._lock.notify_all()
        try:
            if held:
                self.hold.wait(120)
            yield
        finally:
            with self._lock:
                self.waiting -= held
                self._inside -= 1


def handler(door: Door) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]
            with door.passing(self.command, path):
                status = door.refuse(self.command, path)
                if status is None:
                    reply = self.passed_on(path, body)
                else:
                    error = f"<Error><Message>{ECHO}</Message></Error>".encode()
                    reply = status, {"Location": "/elsewhere"}, error
            self.answer(*reply)  # outside: whoever got it may ask for the next thing at once

        def passed_on(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
            server = http.client.HTTPConnection("127.0.0.1", door.port, timeout=30)
            sent = door.change(self.command, path, body)
            headers = {
                name: value for name, value in self.headers.items() if name.lower() != "content-length"
            }
            server.request(self.command, self.path, sent, {**headers, "Content-Length": str(len(sent))})
            answer = server.getresponse()
            data = answer.read()
            server.close()
            return answer.status, dict(answer.getheaders()), data

        def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in (
                        "content-length",
                        "connection",
                        "transfer-encoding",
                        "date",
                        "server",
                    ):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
            except OSError:  # whoever asked has gone
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def opened(port: int) -> Iterator[Door]:
    door = Door(port)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(door))
    server.daemon_threads = True
    door.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield door
    finally:
        door.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def moto_server() -> Iterator[int]:
    """The port of an S3 server in this process."""
    server_module = pytest.importorskip(
        "moto.server", reason="moto[server] is not installed: no S3 server to test with"
    )
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


def make_bucket(port: int, name: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("PUT", f"/{name}", headers={"Host": "s3.amazonaws.com", "Authorization": "AWS x:y"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()
