"""Guard: what is refused before anything of a dashboard answers, and what is sent with what is answered."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from eventtrain.subscribers.dashboard import guard as guard_module
from eventtrain.subscribers.dashboard.guard import MOST_BODY_BYTES, Guard, RateLimit, Tokens

TOKENS = Tokens("a-token-for-tests-only")
GOOD = {
    "host": "127.0.0.1:8000",
    "authorization": f"Bearer {TOKENS.control}",
    "content-type": "application/json",
    "content-length": "2",
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    role = scope.get("eventtrain.role", "none")
    body = f"{role} {message['type']}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"ALLOW")]})
    await send({"type": "http.response.body", "body": body})


def ask(
    guard: Guard, method: str, path: str, headers: dict[str, str], body: bytes = b"{}"
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Returns status, headers and body of the answer to one request."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    anyio.run(guard, scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.mark.parametrize(
    ("method", "path", "change", "status"),
    [
        ("POST", "/api/commands", {}, 200),
        ("POST", "/api/commands", {"origin": "http://127.0.0.1:8000"}, 200),
        ("POST", "/api/commands", {"content-type": "Application/JSON; charset=utf-8"}, 200),
        ("POST", "/api/commands", {"host": "localhost:9000"}, 200),  # ssh -L 9000:localhost:8000
        ("POST", "/api/commands", {"host": "[::1]:8000"}, 200),
        ("POST", "/api/commands", {"host": "evil.example"}, 421),
        ("POST", "/api/commands", {"host": "127.0.0.1.evil.example:8000"}, 421),
        ("POST", "/api/commands", {"host": "192.0.2.7:8000"}, 421),
        ("POST", "/api/commands", {"host": "localhost@evil.example"}, 421),
        ("POST", "/api/commands", {"host": ""}, 421),
        ("POST", "/api/commands", {"host": None}, 421),
        ("POST", "/api/commands", {"origin": "http://evil.example"}, 403),
        ("POST", "/api/commands", {"origin": "http://127.0.0.1:8001"}, 403),
        ("POST", "/api/commands", {"origin": "null"}, 403),
        ("POST", "/api/commands", {"origin": ""}, 403),
        ("POST", "/api/commands", {"origin": "http://["}, 403),
        ("POST", "/api/commands", {"content-type": "text/plain"}, 415),
        ("POST", "/api/commands", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/api/commands", {"content-type": None}, 415),
        ("POST", "/api/commands", {"content-length": None}, 411),
        ("POST", "/api/commands", {"content-length": "-1"}, 411),
        ("POST", "/api/commands", {"content-length": str(MOST_BODY_BYTES + 1)}, 413),
        ("POST", "/api/commands", {"content-length": "9" * 5000}, 413),
        ("POST", "/api/commands", {"authorization": None}, 401),
        ("POST", "/api/commands", {"authorization": "Bearer "}, 401),
        ("POST", "/api/commands", {"authorization": "Bearer \xff\xfe"}, 401),
        ("POST", "/api/commands", {"authorization": f"Basic {TOKENS.control}"}, 401),
        ("POST", "/api/commands", {"authorization": f"Bearer {TOKENS.control}x"}, 401),
        ("POST", "/api/commands", {"authorization": f"Bearer {TOKENS.read}"}, 403),
        ("POST", "/", {"authorization": None}, 401),
        ("PUT", "/api/commands", {}, 405),
        ("DELETE", "/", {}, 405),
        ("OPTIONS", "/api/commands", {}, 405),
        ("CONNECT", "/", {}, 405),
        ("GET", "/api/stream", {"upgrade": "websocket"}, 400),
        ("GET", "/api/stream", {"authorization": None}, 401),
        ("GET", "/api/stream", {"authorization": f"Bearer {TOKENS.read}"}, 200),
        ("GET", "/", {"authorization": None}, 200),
        ("GET", "/", {"authorization": None, "host": "rebound.example:8000"}, 421),
    ],
)
def test_a_request_is_answered_only_if_host_origin_kind_and_token_are_right(
    method: str, path: str, change: dict[str, str | None], status: int
) -> None:
    headers = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    found, sent, body = ask(Guard(app, TOKENS), method, path, headers)
    assert found == status, body
    assert sent[b"x-frame-options"] == b"DENY"
    assert b"frame-ancestors 'none'" in sent[b"content-security-policy"]
    assert b"default-src 'self'" in sent[b"content-security-policy"]
    assert sent[b"referrer-policy"] == b"no-referrer"
    if status != 200:
        assert json.loads(body)["error"]
        assert TOKENS.control.encode() not in body


def test_two_host_headers_are_refused() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    hosts = [(b"host", b"localhost"), (b"host", b"evil.example")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": hosts}
    anyio.run(Guard(app, TOKENS), scope, None, send)
    assert sent[0]["status"] == 421


def test_the_role_is_that_of_the_token() -> None:
    guard = Guard(app, TOKENS)
    assert ask(guard, "GET", "/api/stream", GOOD)[2].startswith(b"control")
    reading = {**GOOD, "authorization": f"Bearer {TOKENS.read}"}
    assert ask(guard, "GET", "/api/stream", reading)[2].startswith(b"read")


def test_an_address_in_the_host_header_is_answered_only_where_it_is_asked_for() -> None:
    guard = Guard(app, TOKENS, any_address=True)
    assert ask(guard, "GET", "/", {"host": "192.0.2.7:8000"})[0] == 200
    assert ask(guard, "GET", "/", {"host": "[2001:db8::1]"})[0] == 200
    assert ask(guard, "GET", "/", {"host": "rebound.example"})[0] == 421


def test_a_body_longer_than_the_limit_ends() -> None:
    long = b"x" * (MOST_BODY_BYTES + 1)  # a server that lets more through than Content-Length says
    assert ask(Guard(app, TOKENS), "POST", "/api/commands", GOOD, long)[2] == b"control http.disconnect"


def test_a_web_socket_is_closed_before_it_is_accepted() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    anyio.run(Guard(app, TOKENS), {"type": "websocket", "path": "/api/stream", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_wrong_tokens_are_limited_and_the_right_one_still_works() -> None:
    guard = Guard(app, TOKENS)
    wrong = {**GOOD, "authorization": "Bearer wrong"}
    found = [ask(guard, "GET", "/api/stream", wrong)[0] for _ in range(40)]
    assert found[:20] == [401] * 20
    assert found[-1] == 429
    assert ask(guard, "GET", "/api/stream", GOOD)[0] == 200


def test_a_rate_is_limited_and_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(guard_module, "monotonic", lambda: now_s)
    limit = RateLimit(per_s=2, burst=3)
    assert [limit.permits() for _ in range(5)] == [True, True, True, False, False]
    now_s += 1.0
    assert [limit.permits() for _ in range(3)] == [True, True, False]


def test_tokens_are_long_different_and_not_shown() -> None:
    one, other = Tokens.new(), Tokens.new()
    assert one.control != other.control
    assert len(one.control) >= 43  # 32 bytes in base64
    assert one.control not in repr(one)
    assert one.read != one.control
    assert Tokens(one.control).read == one.read
    assert one.role_of(one.control.encode()) == "control"
    assert one.role_of(one.read.encode()) == "read"
    assert one.role_of(b"") is None
