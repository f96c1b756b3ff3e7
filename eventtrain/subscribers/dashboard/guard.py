"""``Guard``: the checks that every request to a dashboard passes before anything answers it.

A page of another site can send requests to a server on loopback through the browser of its visitor, and a name that it
controls may resolve to 127.0.0.1 (DNS rebinding). So the Host header must be in a list, an Origin must be that host, a
POST must have a content type that browsers do not send to another site without asking, and whatever concerns a run
requires a token, which only the page itself can know.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal
from urllib.parse import urlsplit

from eventtrain.errors import ConfigurationError

Role = Literal["control", "read"]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
API = "/api/"
"""Paths below it require a token; the others are the page itself, which contains nothing of a run."""
MOST_BODY_BYTES = 65_536
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
_SECURITY_HEADERS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


@dataclass(frozen=True)
class Tokens:
    """The token that permits steering, and the one that permits reading only, which is derived from it."""

    control: str = field(repr=False)

    @classmethod
    def new(cls) -> Tokens:
        """Returns one of 32 random bytes."""
        return cls(secrets.token_urlsafe(32))

    @classmethod
    def given(cls, token: Any, subject: str) -> Tokens:
        """Returns those of ``token``, which a user gave; new ones for None.

        Raises:
            ConfigurationError: it is too short, or does not fit in a URL. The message does not show it.
        """
        if token is None:
            return cls.new()
        if isinstance(token, str) and re.fullmatch(r"[A-Za-z0-9._~-]{16,1000}", token):
            return cls(token)
        raise ConfigurationError(
            f"{subject} must be at least 16 characters from A-Z, a-z, 0-9 and -_.~, or None. "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes a good one."
        )

    @property
    def read(self) -> str:
        """The token for readers. A process with the same token for control has the same one."""
        return hmac.new(self.control.encode(), b"eventtrain dashboard: read", hashlib.sha256).hexdigest()

    def role_of(self, token: bytes) -> Role | None:
        """Returns what ``token`` permits. Takes the same time for each wrong one of a length."""
        is_control = hmac.compare_digest(token, self.control.encode())
        is_read = hmac.compare_digest(token, self.read.encode())
        return "control" if is_control else "read" if is_read else None


class RateLimit:
    """Permits ``burst`` calls at once, and ``per_s`` a second in the long run. One thread at a time."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._left, self._at_s = float(burst), monotonic()

    def permits(self) -> bool:
        """Counts a call; returns whether it is within the limit."""
        now_s = monotonic()
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Guard:
    """ASGI middleware that refuses what a dashboard must not answer, and adds headers to what it answers.

    ``scope["eventtrain.role"]`` is what the token permits. Refusals are JSON with ``error``: 421 for another host, 403
    for another origin or a token that permits less, 401 for no valid token, 405, 411, 413, 415, 429 and 400.

    Args:
        app: answers the others.
        tokens: None: no token is needed, and nothing may be steered.
        hosts: names in the Host header that are answered, in lower case, without a port.
        any_address: also every IP address: no other site can have its pages under one.
    """

    def __init__(
        self, app: ASGIApp, tokens: Tokens, *, hosts: Collection[str] = LOOPBACK, any_address: bool = False
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._hosts = frozenset(host.lower() for host in hosts)
        self._any_address = any_address
        self._wrong_tokens = RateLimit(per_s=1, burst=20)
        self._posts = RateLimit(per_s=10, burst=50)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request, or hands it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if (
            scope["type"] != "http"
        ):  # a WebSocket: closed before it is accepted, which servers answer with 403
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, _bounded(receive), _with_security_headers(send))
        else:
            await _refuse(send, *refusal)

    def _refusal(self, scope: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Returns the status and the reason if the request must not be answered; else sets its role."""
        hosts = [value for name, value in headers if name == b"host"]
        host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        if not self._is_own(host):
            return 421, "this host name is not served here"
        found = dict(headers)
        origin = found.get(b"origin")
        if origin is not None and _netloc(origin) != host:
            return 403, "requests from pages of other sites are refused"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "expected GET, HEAD or POST"
        if b"upgrade" in found and b"websocket" in found[b"upgrade"].lower():
            return 400, "there are no WebSockets here"
        is_post = scope["method"] == "POST"
        if is_post and (problem := self._problem_of_post(found)) is not None:
            return problem
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not is_post and not path.startswith(API):
            return None
        scheme, _, token = found.get(b"authorization", b"").partition(b" ")
        role = self._tokens.role_of(token.strip()) if scheme.lower() == b"bearer" else None
        if role is None:
            if not self._wrong_tokens.permits():
                return 429, "too many requests without a valid token"
            return 401, "expected Authorization: Bearer and the token of the dashboard"
        if is_post and role != "control":
            return 403, "this token permits reading only"
        if is_post and not self._posts.permits():
            return 429, "too many requests"
        scope["eventtrain.role"] = role
        return None

    def _is_own(self, host: str) -> bool:
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        return name in self._hosts or (self._any_address and _is_address(name.strip("[]")))

    @staticmethod
    def _problem_of_post(headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            return 415, "expected Content-Type: application/json"
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, "expected Content-Length"
        if len(length) > 9 or int(length) > MOST_BODY_BYTES:
            return 413, f"expected at most {MOST_BODY_BYTES} bytes"
        return None


def _netloc(origin: bytes) -> str:
    try:
        return urlsplit(origin.decode("latin-1").lower()).netloc
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _bounded(receive: Any) -> Any:
    """Ends a body that is longer than its Content-Length could be, whatever the server lets through."""
    received = 0

    async def bounded() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MOST_BODY_BYTES:
            return {"type": "http.disconnect"}
        return message

    return bounded


def _with_security_headers(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            own = {name for name, _ in _SECURITY_HEADERS}
            kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in own]
            message = {**message, "headers": [*kept, *_SECURITY_HEADERS]}
        await send(message)

    return sending


async def _refuse(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *_SECURITY_HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
