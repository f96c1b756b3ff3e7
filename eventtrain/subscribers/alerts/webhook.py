"""``Webhook``: alerts as signed JSON over HTTP, sent only to an address that was checked. Requires httpx."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from ssl import SSLContext
from urllib.parse import urlsplit

import httpcore  # noqa: F401  # pyright: ignore[reportUnusedImport]  # httpx does when it first sends; see quiet_libraries
import httpx
from pydantic import SecretStr

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.log_filter import quiet_libraries
from eventtrain.subscribers.alerts.message import Message, NotDelivered

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


Resolve = Callable[[str, int], Sequence[str]]
"""A host's name and a port -> its addresses. Raises OSError."""
Address = IPv4Address | IPv6Address

NAT64 = IPv6Network("64:ff9b::/96")


class AddressRefused(Exception):
    """A name resolves to an address that is not public. The text quotes neither."""


def resolve(host: str, port: int) -> Sequence[str]:
    """Resolves ``host`` with the system's resolver. Blocks."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(place[0]) for _, _, _, _, place in found]


def parse_address(text: str) -> Address | None:
    """Returns the address that ``text`` is, without its scope; None if it is a name."""
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None


def is_public(address: str) -> bool:
    """Returns whether ``address`` is reachable over the internet: not loopback, private, link-local, multicast or
    reserved, nor an IPv6 form of such an IPv4 address.
    """
    parsed = parse_address(address)
    if parsed is None:
        return False
    found = _embedded_ipv4(parsed)
    site_local = isinstance(found, IPv6Address) and found.is_site_local
    return found.is_global and not (found.is_multicast or found.is_reserved or site_local)


def checked_addresses(host: str, port: int, *, allow_private: bool, resolve: Resolve = resolve) -> list[str]:
    """Returns the addresses of ``host``, each once, in the order given. Connect to these; do not resolve again.

    Raises:
        AddressRefused: there is no address, or one of them is not public and ``allow_private`` is False.
        OSError: the name is not known.
    """
    found = list(dict.fromkeys(resolve(host, port)))
    if not found:
        raise AddressRefused("its host has no address")
    if not allow_private and not all(map(is_public, found)):
        raise AddressRefused(
            "its host resolves to a private, loopback or link-local address; allow_private=True permits that"
        )
    return found


def _embedded_ipv4(address: Address) -> Address:
    """Returns the IPv4 address that an IPv6 address stands for, or ``address`` itself."""
    if isinstance(address, IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


class Webhook:
    """A URL that is sent a JSON body for each message.

    With a key, the request has ``X-Eventtrain-Timestamp``, seconds since 1970, and ``X-Eventtrain-Signature``,
    ``sha256=`` and the HMAC-SHA256 of timestamp, a dot and the body, in hex. Redirects are not followed, and no proxy
    is used. Each attempt resolves the host's name once and checks every address, and connects to one of these
    addresses, with the name in TLS and in ``Host``.

    ``user:password@`` becomes basic authentication. The URL is in no message, log or repr, also not in that of the
    ConfigurationError for an invalid URL, or an address that is not allowed as its host.
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
        host, _ = _host_and_port(_parse(url.get_secret_value()))
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
        host, port = _host_and_port(_parse(self._url.get_secret_value()))
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
        url = _parse(self._url.get_secret_value())
        host, port = _host_and_port(url)
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "User-Agent": "eventtrain",
            "Connection": "close",
        }
        if url.userinfo:
            userinfo = f"{url.username}:{url.password}".encode()
            headers["Authorization"] = "Basic " + base64.b64encode(userinfo).decode()
        if self._key is not None:
            now = str(int(time.time()))
            headers |= {TIMESTAMP: now, SIGNATURE: _signature(self._key, now, body)}
        request = httpx.Request(
            "POST",
            url.copy_with(host=address, port=port),
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


def _parse(url: str) -> httpx.URL:
    try:
        urlsplit(url)  # refuses brackets that are not closed
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host and parsed.port != 0 and url.isprintable():
            return parsed
    except (ValueError, httpx.InvalidURL):
        pass
    raise ConfigurationError(
        "Alerts(url=...): must be a URL such as https://host/path. The one given is not shown: it may hold secrets."
    )


def _host_and_port(url: httpx.URL) -> tuple[str, int]:
    """Returns the host, in the ASCII form of an internationalised name, and the port."""
    return url.raw_host.decode("ascii"), url.port or {"http": 80, "https": 443}[url.scheme]
