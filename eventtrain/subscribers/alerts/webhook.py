"""``Webhook``: alerts as signed JSON over HTTP, sent only to an address that was checked. Requires httpx."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
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
    parse_address,
    resolve,
)

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which another attempt may succeed."""
MOST_ADDRESSES = 4
SIGNATURE, TIMESTAMP = "X-Eventtrain-Signature", "X-Eventtrain-Timestamp"
REASONS: dict[type[Exception], str] = {
    httpx.ConnectTimeout: "no connection in time",
    httpx.ReadTimeout: "no answer in time",
    httpx.WriteTimeout: "the server did not read the request in time",
    httpx.ConnectError: "no connection",
    httpx.RemoteProtocolError: "the server closed the connection, or does not speak HTTP",
}


class Webhook:
    """A URL that is sent a JSON body for each message.

    With a key, the request has ``X-Eventtrain-Timestamp``, seconds since 1970, and ``X-Eventtrain-Signature``,
    ``sha256=`` and the HMAC-SHA256 of timestamp, a dot and the body, in hex. Redirects are not followed, and no proxy
    is used. Each attempt resolves the host's name once and checks every address, and connects to one of these
    addresses, with the name in TLS and in ``Host``.

    Args:
        url: http or https; ``user:password@`` becomes basic authentication. It is in no message, log or repr.
        key: signs the requests.
        allow_private: the host may be in a private network.
        timeout_s: for connecting, and for each wait for the answer.
        resolve: resolves names.

    Raises:
        ConfigurationError: the URL is invalid, or its host is an address that is not allowed; it is not quoted.
    """

    def __init__(
        self,
        url: SecretStr,
        *,
        key: SecretStr | None = None,
        allow_private: bool = False,
        timeout_s: float = 5.0,
        resolve: Resolve = resolve,
    ) -> None:
        host, _ = _host_and_port(_split(url.get_secret_value()))
        self._url = url  # and no part of it beside it, which would be shown in a list of attributes
        self._key, self._allow_private, self._timeout_s = key, allow_private, timeout_s
        self._resolve = resolve
        self._context: SSLContext | None = None
        if not allow_private and parse_address(host) is not None and not is_public(host):
            raise ConfigurationError(
                "Alerts(url=...): its host is a private, loopback or link-local address. Pass allow_private=True if "
                "that is intended."
            )

    def send(self, message: Message) -> None:
        """Posts ``message``. Blocks; one thread at a time. Raises NotDelivered."""
        body = json.dumps(message.to_json()).encode()
        host, port = _host_and_port(_split(self._url.get_secret_value()))
        try:
            addresses = checked_addresses(
                host, port, allow_private=self._allow_private, resolve=self._resolve
            )
        except AddressRefused as error:
            raise NotDelivered(str(error), may_pass=False) from None
        except (OSError, UnicodeError):
            raise NotDelivered("the name of its host is not known", may_pass=True) from None
        with quiet_libraries():
            status = self._post_to_first(addresses[:MOST_ADDRESSES], body)
        if not 200 <= status < 300:
            hint = "; redirects are not followed" if 300 <= status < 400 else ""
            raise NotDelivered(f"HTTP status {status}{hint}", may_pass=status in RETRYABLE)

    def _post_to_first(self, addresses: list[str], body: bytes) -> int:
        """Posts to the first address that can be connected to; returns the status of the answer."""
        reason = ""
        for address in addresses:
            try:
                return self._post(address, body)
            except httpx.HTTPError as error:
                reason = REASONS.get(type(error), type(error).__name__)
                if not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
                    break
        raise NotDelivered(reason, may_pass=True)

    def _post(self, address: str, body: bytes) -> int:
        """Returns the status of the answer, whose body is not read."""
        parts = _split(self._url.get_secret_value())
        userinfo, _, netloc = parts.netloc.rpartition("@")
        host, port = _host_and_port(parts)
        if not netloc.isascii():
            netloc = f"{host}:{parts.port}" if parts.port else host
        headers = {
            "Host": netloc,
            "Content-Type": "application/json",
            "User-Agent": "eventtrain",
            "Connection": "close",
        }
        if userinfo:
            headers["Authorization"] = "Basic " + base64.b64encode(unquote(userinfo).encode()).decode()
        if self._key is not None:
            now = str(int(time.time()))
            headers |= {TIMESTAMP: now, SIGNATURE: _signature(self._key, now, body)}
        request = httpx.Request(
            "POST",
            httpx.URL(parts._replace(netloc=netloc, fragment="").geturl()).copy_with(host=address, port=port),
            headers=headers,
            content=body,
            extensions={"timeout": httpx.Timeout(self._timeout_s).as_dict()}
            | ({"sni_hostname": host} if parse_address(host) is None else {}),
        )
        if self._context is None:
            self._context = httpx.create_ssl_context()
        # The transport and not a client: a client logs the URL, and would use a proxy that resolves the name again.
        with httpx.HTTPTransport(verify=self._context, retries=0) as transport:
            response = transport.handle_request(request)
            response.close()
            return response.status_code


def _signature(key: SecretStr, timestamp: str, body: bytes) -> str:
    digest = hmac.new(key.get_secret_value().encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return f"sha256={digest.hexdigest()}"


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
        if valid:
            httpx.URL(url)
            _host_and_port(parts)
            return parts
    except (ValueError, httpx.InvalidURL):
        pass
    raise ConfigurationError(
        "Alerts(url=...): must be a URL such as https://host/path. The one given is not shown: it may hold secrets."
    )


def _host_and_port(parts: SplitResult) -> tuple[str, int]:
    """Returns the host, in the ASCII form of an internationalised name, and the port."""
    host = parts.hostname or ""
    if not host.isascii():
        host = httpx.URL(f"http://{host}").raw_host.decode("ascii")
    return host, parts.port or {"http": 80, "https": 443}[parts.scheme]
