"""A webhook: signed JSON over real HTTP, to the address that was checked."""

from __future__ import annotations

import hashlib
import hmac
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import eventtrain as et
from eventtrain.subscribers.alerts.message import Message, NotDelivered
from eventtrain.subscribers.alerts.webhook import Webhook
from tests.subscribers.alerts.alert_servers import Target, free_port, serving, silent_server

TOKEN = "s3cr3t-t0ken"
MESSAGE = Message(
    (et.AlertRaised(step=3, name="loss above 1", message="loss = 2", value=float("nan"), run_id="r"),)
)


def webhook(url: str, **options: Any) -> Webhook:
    return Webhook(SecretStr(url), **{"allow_private": True, "timeout_s": 10.0, **options})


def verified(key: bytes, headers: dict[str, str], body: bytes, *, within_s: float = 300) -> bool:
    """The recipe of docs/alerts.md."""
    timestamp, given = headers["X-Eventtrain-Timestamp"], headers["X-Eventtrain-Signature"]
    expected = "sha256=" + hmac.new(key, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected, given) and abs(time.time() - int(timestamp)) <= within_s


def test_the_body_says_what_happened_and_the_signature_fits_nothing_else() -> None:
    with serving(Target()) as target:
        webhook(f"{target.url}/hook?token={TOKEN}", key=SecretStr("key")).send(MESSAGE)
    (body,) = target.bodies
    assert [et.parse_event(event) for event in body.pop("events")] == list(MESSAGE.events)
    assert body == {
        "version": 1, "id": MESSAGE.id, "run_id": "r", "severity": "warning", "title": "[warning] loss above 1",
        "text": "loss = 2\nRun r",
    }  # fmt: skip
    assert target.paths == [f"/hook?token={TOKEN}"]
    (headers,), (raw,) = target.headers, target.raw
    assert headers["Content-Type"] == "application/json"
    assert verified(b"key", headers, raw)
    assert not verified(b"another", headers, raw)
    assert not verified(b"key", headers, raw + b" ")
    assert not verified(b"key", {**headers, "X-Eventtrain-Timestamp": "1"}, raw)


def test_without_a_key_nothing_is_signed_and_userinfo_becomes_basic_authentication() -> None:
    with serving(Target()) as target:
        webhook(target.url.replace("http://", "http://me:p%40ss@")).send(MESSAGE)
    (headers,) = target.headers
    assert headers["Authorization"] == "Basic bWU6cEBzcw=="
    assert headers["Host"] == f"127.0.0.1:{target.port}"
    assert not [name for name in headers if name.startswith("X-Eventtrain")]


@pytest.mark.parametrize(
    ("status", "said", "may_pass"),
    [
        (302, "HTTP status 302; redirects are not followed", False),
        (307, "HTTP status 307; redirects are not followed", False),
        (404, "HTTP status 404", False),
        (429, "HTTP status 429", True),
        (500, "HTTP status 500", True),
    ],
)
def test_other_answers_than_200_are_told_and_redirects_not_followed(
    status: int, said: str, may_pass: bool
) -> None:
    with serving(Target()) as target:
        target.statuses = [status]
        with pytest.raises(NotDelivered) as caught:
            webhook(target.url).send(MESSAGE)
    assert (str(caught.value), caught.value.may_pass) == (said, may_pass)
    assert len(target.bodies) == 1


def test_a_dead_a_silent_and_an_unknown_host_are_told_in_words() -> None:
    with silent_server() as port:
        for url, said in (
            (f"http://127.0.0.1:{free_port()}/", "no connection"),
            (f"http://127.0.0.1:{port}/", "no answer in time"),
            (f"http://{TOKEN}.invalid/", "the name of its host is not known"),
        ):
            with pytest.raises(NotDelivered) as caught:
                webhook(url, timeout_s=0.2).send(MESSAGE)
            assert (str(caught.value), caught.value.may_pass) == (said, True)
            assert caught.value.__cause__ is None


def test_a_private_address_in_the_url_is_refused_at_once_unless_allowed() -> None:
    for host in ("127.0.0.1", "10.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "0.0.0.0"):
        with pytest.raises(et.ConfigurationError, match="allow_private=True"):
            webhook(f"http://{host}/", allow_private=False)
        webhook(f"http://{host}/")


@pytest.mark.parametrize("host", ["localhost", "2130706433", "127.1", "0x7f.0.0.1"])
def test_a_name_that_leads_into_the_own_network_is_refused_when_it_is_used(host: str) -> None:
    with serving(Target()) as target:
        hook = webhook(f"http://{host}:{target.port}/", allow_private=False)
        with pytest.raises(NotDelivered) as caught:
            hook.send(MESSAGE)
    assert "allow_private=True permits that" in str(caught.value)
    assert not caught.value.may_pass
    assert target.bodies == []


class Rebinding:
    """A name server that says something else the second time."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        return self.answers.pop(0)


def test_a_name_is_resolved_once_and_the_connection_goes_to_that_address() -> None:
    with serving(Target()) as target:
        resolve = Rebinding(["127.0.0.1"], ["127.0.0.2"])
        webhook(f"http://hooks.example:{target.port}/x", resolve=resolve).send(MESSAGE)
        assert resolve.asked == 1
        assert target.headers[0]["Host"] == f"hooks.example:{target.port}"


def test_a_name_of_other_letters_is_resolved_and_said_in_its_ascii_form() -> None:
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    with serving(Target()) as target:
        webhook(f"http://me@b\u00fccher.example:{target.port}/\u00e9", resolve=resolve).send(MESSAGE)
    assert asked == ["xn--bcher-kva.example"]
    assert target.headers[0]["Host"] == f"xn--bcher-kva.example:{target.port}"
    assert target.paths == ["/%C3%A9"]
    with pytest.raises(et.ConfigurationError, match="private"):
        webhook("http://127\u30020\u30020\u30021/", allow_private=False)


def test_a_name_that_is_rebound_to_a_private_address_is_refused() -> None:
    with serving(Target()) as target:
        resolve = Rebinding(["192.0.2.0"], ["1.1.1.1", "127.0.0.1"], ["::ffff:127.0.0.1"])
        hook = webhook(f"http://hooks.example:{target.port}/x", resolve=resolve, allow_private=False)
        for _ in range(3):
            with pytest.raises(NotDelivered, match="private"):
                hook.send(MESSAGE)
    assert target.bodies == []


def test_the_next_address_is_tried_where_the_first_is_dead() -> None:
    with serving(Target()) as target:
        hook = webhook(f"http://hooks.example:{target.port}/", resolve=Rebinding(["127.0.0.9", "127.0.0.1"]))
        hook.send(MESSAGE)
    assert len(target.bodies) == 1


def test_tls_is_for_the_name_and_the_connection_for_the_address(tmp_path: Path, monkeypatch: Any) -> None:
    certificate = self_signed(tmp_path, "hooks.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    names: list[str | None] = []
    context.sni_callback = lambda socket, name, _: names.append(name)
    target = Target()
    target.server.socket = context.wrap_socket(target.server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(target):
        place = f"https://hooks.example:{target.port}/x"
        webhook(place, resolve=Rebinding(["127.0.0.1"])).send(MESSAGE)
        with pytest.raises(NotDelivered, match="no connection"):
            webhook(place.replace("hooks", "others"), resolve=Rebinding(["127.0.0.1"])).send(MESSAGE)
    assert names == ["hooks.example", "others.example"]
    assert target.headers[0]["Host"] == f"hooks.example:{target.port}"


def self_signed(folder: Path, name: str) -> Path:
    """A certificate for ``name`` with its key, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.mark.parametrize(
    "url",
    [
        f"http://[{TOKEN}",
        f"http://h:{TOKEN}/",
        "http:///x",
        f"http://h/{TOKEN}\n",
        f"http://h:0/{TOKEN}",
        f"http://\u2603 {TOKEN}/",
    ],
)
def test_what_is_no_url_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        webhook(url)
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None
    assert TOKEN not in repr(caught.value.__context__)
