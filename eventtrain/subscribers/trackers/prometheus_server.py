"""``Exposition``: a registry of prometheus_client's, and the ways to it: an ASGI app, and a small HTTP server."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from socket import AF_INET, AF_INET6
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_asgi_app, make_wsgi_app
from prometheus_client.core import Metric

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

CLIENT_TIMEOUT_S = 10.0
"""A client that says nothing for so long is left."""
POLL_INTERVAL_S = 0.1
"""How long ``close`` may wait for the thread."""


class Exposition:
    """A registry that holds nothing but what ``collect`` gives.

    Args:
        collect: called for each scrape, on the thread of that scrape; must not block.
    """

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self.collect = collect
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def asgi_app(self) -> ASGIApp:
        """Answers with the metrics whatever the path is."""
        return _App(make_asgi_app(self.registry))

    def listen(self, host: str, port: int) -> MetricsServer:
        """Blocks. Raises OSError."""
        return MetricsServer(self.registry, host, port)


class _App:
    """An object and no function, which Starlette's ``Route`` would take for a handler of requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


class MetricsServer:
    """Answers every path with the metrics of ``registry``, from when it is made until ``close``.

    Args:
        registry: collected anew for each request, on the thread of that request.
        host: a name or an address of this machine.
        port: 0 takes a free one.

    Raises:
        OSError: nothing can listen there.

    Making and closing it block; any thread.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        kind = _ServerV6 if ":" in host else _Server
        self._server = kind((host, port), _Handler)
        self._server.set_app(make_wsgi_app(registry))
        self.port = self._server.server_port
        """The one it listens on."""
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            args=(POLL_INTERVAL_S,),
            name="eventtrain metrics server",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Free the port. Requests that are being answered are not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request, so that a client that hangs holds up no other."""

    daemon_threads = True
    address_family = AF_INET

    def server_bind(self) -> None:
        """Without the look-up of the machine's name, which may take seconds where there is no network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _ServerV6(_Server):
    address_family = AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line on stderr for each scrape would stand in the middle of the program's output."""

    def address_string(self) -> str:
        """Without a look-up."""
        return str(self.client_address[0])
