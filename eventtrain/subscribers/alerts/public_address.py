"""``checked_addresses``: resolves a host's name once, and refuses addresses that are not public."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

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
