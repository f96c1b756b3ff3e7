"""``serve``: a dashboard on uvicorn, in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from eventtrain.errors import EventTrainError
from eventtrain.subscribers.dashboard.app import Steering, make_app
from eventtrain.subscribers.dashboard.frames import Frames
from eventtrain.subscribers.dashboard.guard import LOOPBACK, Guard, Tokens

START_S = 10.0
END_S = 2.0
MOST_CONNECTIONS = 512
"""Further requests are answered with 503."""
MOST_HEADER_BYTES = 16_384
SEND_BUFFER_BYTES = 65_536
"""As much as the kernel keeps for a reader that does not read."""


ANY_ADDRESS = ("", "0.0.0.0", "::")


def serve(
    frames: Frames,
    steering: Steering | None,
    tokens: Tokens,
    host: str,
    port: int,
    is_closed: Callable[[], bool],
) -> ServerThread:
    """Serves the page of ``frames``. Blocks until it can be opened.

    Raises:
        OSError: the address cannot be listened on.
    """
    app = Guard(
        make_app(frames, steering, is_closed),
        tokens,
        hosts={*LOOPBACK, _written(host)},
        any_address=host in ANY_ADDRESS,
    )
    return ServerThread(app, host, port)


class ServerThread:
    """Serves ``app`` until ``close``, or the end of the process. Creating and closing it block.

    The thread is a daemon, takes no signals, and reads no environment. Only HTTP/1.1 without WebSockets is spoken, by
    h11, so that the limits of headers are known.

    Args:
        app: has no lifespan.
        host: an address, or a name for one.
        port: 0: a free one.

    Attributes:
        port: on which it listens.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._host = "localhost" if host in ANY_ADDRESS else _written(host)
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=128)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # of each connection
        self.port: int = listening.getsockname()[1]
        config = uvicorn.Config(
            app,
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listening],), name="eventtrain-dashboard", daemon=True
        )
        self._thread.start()
        if not self._server.is_up.wait(START_S):
            listening.close()
            raise EventTrainError(f"The server did not start within {START_S:g} s.")

    @property
    def is_alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def url(self, token: str) -> str:
        """Returns the address of the page."""
        return f"http://{self._host}:{self.port}/#token={token}"

    def close(self) -> None:
        """Ends all connections and frees the port. Waits at most two seconds."""
        self._server.should_exit = True
        self._thread.join(END_S)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A reader that does not read would keep its connection, and with it the thread.
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)


def _written(host: str) -> str:
    """Returns ``host`` as it is written in a URL."""
    return f"[{host}]" if ":" in host else host
