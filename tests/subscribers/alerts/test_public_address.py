"""Which addresses a webhook may be sent to."""

from __future__ import annotations

import pytest

from eventtrain.subscribers.alerts.webhook import AddressRefused, checked_addresses, is_public

PRIVATE = [
    "127.0.0.1", "127.255.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "no address",
    "2001:0:4136:e378:8000:63bf:f5ff:fffe",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_leads_into_the_own_network_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_lies_on_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", PRIVATE[:-1])
def test_one_private_address_among_public_ones_refuses_the_name(address: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        return ["1.1.1.1", address, "1.1.1.1"]

    with pytest.raises(AddressRefused) as caught:
        checked_addresses("secret.example", 443, allow_private=False, resolve=resolve)
    assert "secret" not in str(caught.value)
    assert checked_addresses("secret.example", 443, allow_private=True, resolve=resolve) == [
        "1.1.1.1",
        address,
    ]


def test_a_name_without_an_address_is_refused() -> None:
    with pytest.raises(AddressRefused, match="no address"):
        checked_addresses("host", 80, allow_private=True, resolve=lambda host, port: [])
