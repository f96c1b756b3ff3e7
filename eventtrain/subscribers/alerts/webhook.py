"""``Webhook``: alerts as signed JSON over HTTP, sent to the address that was checked and nowhere else. Needs httpx."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from ipaddress import ip_address
from ssl import SSLContext
from urllib.parse import SplitResult, unquote, urlsplit

import httpcore  # noqa: F401  # pyright: ignore[reportUnusedImport]  # httpx does when it first sends; see quiet_libraries
import httpx
from pydantic import SecretStr

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.log_filter import quiet_libraries
from eventtrain.subscribers.alerts.message import Message, NotDelivered
from eventtrain.subscribers.alerts.public_address import (
    AddressRefused,
    Resolve,
    checked_addresses,
    is_public,
    resolve,
)

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be different the next time."""
MOST_ADDRESSES = 4
SIGNATURE, TIMESTAMP = "X-Eventtrain-Signature", "X-Eventtrain-Timestamp"
WORDS: dict[type[Exception], str] = {
    httpx.ConnectTimeout: "no connection in time",
    httpx.ReadTimeout: "no answer in time",
    httpx.WriteTimeout: "it did not read in time",
    httpx.ConnectError: "no connection",
    httpx.RemoteProtocolError: "it does not speak HTTP, or hung up",
}


class Webhook:
    """One URL that is sent a JSON body for each message.

    With a key the request says ``X-Eventtrain-Timestamp``, seconds since 1970, and ``X-Eventtrain-Signature``,
    ``sha256=`` and the HMAC-SHA256 of timestamp, a dot and the body, in hex. Redirects are not followed, and no proxy
    is used. The name of the host is resolved once for each try, every address is checked, and the connection goes to
    one of those, with the name in TLS and in ``Host``.

    Args:
        url: http or https; ``user:password@`` becomes basic authentication. It is in no message, log or repr.
        key: to sign with.
        allow_private: the target may be in the own network.
        timeout_s: for connecting, and for each wait for the answer.
        ask: what resolves names.

    Raises:
        ConfigurationError: the URL is none, or its host is an address that is not allowed; it is not quoted.
    """

    def __init__(
        self,
        url: SecretStr,
        *,
        key: SecretStr | None = None,
        allow_private: bool = False,
        timeout_s: float = 5.0,
        ask: Resolve = resolve,
    ) -> None:
        parts = _split(url.get_secret_value())
        host, _ = _place(parts)
        self._url = url  # and no part of it beside it, which would be shown in a list of attributes
        self._key, self._allow_private, self._timeout_s, self._ask = key, allow_private, timeout_s, ask
        self._context: SSLContext | None = None
        if not allow_private and _is_address(host) and not is_public(host):
            raise ConfigurationError(
                "Alerts(url=...): its host is a private, loopback or link-local address. Pass allow_private=True if "
                "that is meant."
            )

    def send(self, message: Message) -> None:
        """POST it. Blocks; one thread at a time. Raises NotDelivered."""
        body = json.dumps(message.to_json()).encode()
        host, port = _place(_split(self._url.get_secret_value()))
        try:
            addresses = checked_addresses(host, port, allow_private=self._allow_private, ask=self._ask)
        except AddressRefused as error:
            raise NotDelivered(str(error), may_pass=False) from None
        except (OSError, UnicodeError):
            raise NotDelivered("the name of its host is not known", may_pass=True) from None
        reason = "no connection"
        with quiet_libraries():
            for address in addresses[:MOST_ADDRESSES]:
                try:
                    status = self._post(address, body)
                except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                    reason = WORDS[type(error)]
                except httpx.HTTPError as error:
                    raise NotDelivered(WORDS.get(type(error), type(error).__name__), may_pass=True) from None
                else:
                    break
            else:
                raise NotDelivered(reason, may_pass=True) from None
        if not 200 <= status < 300:
            hint = "; redirects are not followed" if 300 <= status < 400 else ""
            raise NotDelivered(f"HTTP status {status}{hint}", may_pass=status in RETRYABLE)

    def _post(self, address: str, body: bytes) -> int:
        """The status of the answer, whose body is not read."""
        parts = _split(self._url.get_secret_value())
        userinfo, _, place = parts.netloc.rpartition("@")
        host, port = _place(parts)
        if not place.isascii():
            place = f"{host}:{parts.port}" if parts.port else host
        headers = {
            "Host": place,
            "Content-Type": "application/json",
            "User-Agent": "eventtrain",
            "Connection": "close",
        }
        if userinfo:
            headers["Authorization"] = "Basic " + base64.b64encode(unquote(userinfo).encode()).decode()
        if self._key is not None:
            now = str(int(time.time()))
            headers |= {TIMESTAMP: now, SIGNATURE: signature(self._key, now, body)}
        wait_s = self._timeout_s
        request = httpx.Request(
            "POST",
            httpx.URL(parts._replace(netloc=place, fragment="").geturl()).copy_with(host=address, port=port),
            headers=headers,
            content=body,
            extensions={"timeout": {"connect": wait_s, "read": wait_s, "write": wait_s, "pool": wait_s}}
            | ({} if _is_address(host) else {"sni_hostname": host}),
        )
        if self._context is None:
            self._context = httpx.create_ssl_context()
        # The transport and not a client: a client logs the URL, and would use a proxy that resolves the name again.
        with httpx.HTTPTransport(verify=self._context, retries=0) as transport:
            response = transport.handle_request(request)
            response.close()
            return response.status_code


def signature(key: SecretStr, timestamp: str, body: bytes) -> str:
    """What ``X-Eventtrain-Signature`` says."""
    digest = hmac.new(key.get_secret_value().encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return f"sha256={digest.hexdigest()}"


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        good = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and url.isprintable()
        )
        if good:
            httpx.URL(url)
            _place(parts)
            return parts
    except (ValueError, httpx.InvalidURL):
        pass
    raise ConfigurationError(
        "Alerts(url=...): needs a URL such as https://host/path. The one given is not shown: it may hold secrets."
    )


def _place(parts: SplitResult) -> tuple[str, int]:
    """Host, in the ASCII form of a name of other letters, and port."""
    host = parts.hostname or ""
    if not host.isascii():
        host = httpx.URL(f"http://{host}").raw_host.decode("ascii")
    return host, parts.port or {"http": 80, "https": 443}[parts.scheme]


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
