"""Real nats-server and redis-server processes on loopback, which tests kill, stop and start again."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """One server on ``port``, whose data in ``folder`` survives its death."""

    program: str
    scheme: str

    def __init__(self, folder: Path, *options: str) -> None:
        if shutil.which(self.program) is None:
            pytest.skip(f"{self.program} is not installed")
        self.folder = folder
        self.port = free_port()
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen([*self.command(), *self.options], stdout=log, stderr=log)
        ends_s = time.monotonic() + 20
        while time.monotonic() < ends_s and self.process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError((self.folder / "server.log").read_text())

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None


class NATSServer(Server):
    """With JetStream. ``config``: more lines of its configuration file."""

    program, scheme = "nats-server", "nats"

    def __init__(self, folder: Path, config: str = "") -> None:
        super().__init__(folder)
        self.config = config

    def command(self) -> Sequence[str]:
        file = self.folder / "server.conf"
        file.write_text(
            f'listen: "127.0.0.1:{self.port}"\njetstream {{ store_dir: "{self.folder}/data" }}\n{self.config}\n'
        )
        return [self.program, "-c", str(file)]


class RedisServer(Server):
    """Writes each command to its disk before it answers."""

    program, scheme = "redis-server", "redis"

    def command(self) -> Sequence[str]:
        options = {
            "--bind": "127.0.0.1", "--port": f"{self.port}", "--dir": str(self.folder), "--save": "",
            "--appendonly": "yes", "--appendfsync": "always",
        }  # fmt: skip
        return [self.program, *(text for pair in options.items() for text in pair)]


@contextmanager
def running(server: Any) -> Iterator[Any]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


async def nats_messages(url: str, stream: str = "eventtrain", **options: Any) -> list[Any]:
    """Returns each message of a stream, in its order. On asyncio."""
    import nats

    client = await nats.connect(url, **options)
    try:
        jetstream = client.jetstream()
        last = (await jetstream.stream_info(stream)).state.last_seq
        return [await jetstream.get_msg(stream, seq) for seq in range(1, last + 1)]
    finally:
        await client.close()


def events_in(bodies: list[bytes]) -> list[dict[str, Any]]:
    return [event for body in bodies for event in json.loads(body)]
