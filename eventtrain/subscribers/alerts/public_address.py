"""``checked_addresses``: where a host's name leads, looked up once, and refused where that is in the own network."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

Resolve = Callable[[str, int], Sequence[str]]
"""A host's name and a port -> its addresses. Raises OSError."""
Address = IPv4Address | IPv6Address

NAT64 = IPv6Network("64:ff9b::/96")


class AddressRefused(Exception):
    """A name leads to an address that is not public. The text quotes neither."""


def resolve(host: str, port: int) -> Sequence[str]:
    """Ask the system. Blocks."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(place[0]) for _, _, _, _, place in found]


def is_public(address: str) -> bool:
    """Whether an address can be reached over the internet, by the address itself: no loopback, private, link-local,
    multicast or reserved one, nor an IPv6 form of such an IPv4 address.
    """
    try:
        found = _plain(ip_address(address.partition("%")[0]))
    except ValueError:
        return False
    return found.is_global and not (found.is_multicast or found.is_reserved or _site_local(found))


def checked_addresses(host: str, port: int, *, allow_private: bool, ask: Resolve = resolve) -> list[str]:
    """The addresses of ``host``, each once, in the order given. Whoever connects has to use these and not ask again.

    Raises:
        AddressRefused: one of them is not public, and that was not allowed; or there is none.
        OSError: the name is not known.
    """
    found = list(dict.fromkeys(ask(host, port)))
    if not found:
        raise AddressRefused("its host has no address")
    if not allow_private and not all(map(is_public, found)):
        raise AddressRefused(
            "its host leads to a private, loopback or link-local address; allow_private=True permits that"
        )
    return found


def _plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for."""
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


def _site_local(address: Address) -> bool:
    return isinstance(address, IPv6Address) and address.is_site_local
