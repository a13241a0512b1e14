"""Where a request comes from, by its connection and its headers."""

from __future__ import annotations

import ipaddress

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.access.client_address import ClientAddresses, parse
from proxy.config.hosts import parse_network

TRUSTED = ClientAddresses([parse_network("10.0.0.0/24"), parse_network("::1"), parse_network("127.0.0.1")])


def of(addresses: ClientAddresses, peer: str | None, *headers: tuple[str, str]) -> str | None:
    found = addresses.of(peer, CIMultiDictProxy(CIMultiDict(headers)))
    return None if found is None else str(found)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("", None),
        (None, None),
        ("@socket", None),
    ],
)
def test_without_proxies_it_is_the_peer(peer: str | None, address: str | None) -> None:
    assert of(ClientAddresses(), peer) == address


@pytest.mark.parametrize(
    "mark", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Proto", "x-forwarded-host"]
)
def test_what_came_through_a_proxy_that_is_not_trusted_has_none(mark: str) -> None:
    assert of(ClientAddresses(), "127.0.0.1", (mark, "192.0.2.1")) is None
    assert of(TRUSTED, "192.0.2.9", (mark, "127.0.0.1")) is None


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ([("X-Forwarded-For", "192.0.2.1")], "192.0.2.1"),
        ([("X-Forwarded-For", "127.0.0.1, 192.0.2.1")], "192.0.2.1"),
        ([("X-Forwarded-For", "192.0.2.1, 10.0.0.7")], "192.0.2.1"),
        ([("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-For", "192.0.2.1")], "192.0.2.1"),
        ([("X-Forwarded-For", "192.0.2.1:4711")], "192.0.2.1"),
        ([("X-Forwarded-For", "[2001:db8::1]:4711")], "2001:db8::1"),
        ([("X-Forwarded-For", "2001:db8::1")], "2001:db8::1"),
        ([("X-Forwarded-For", "10.0.0.7, 10.0.0.8")], "10.0.0.7"),
        ([("X-Forwarded-For", "192.0.2.1, unknown")], None),
        ([("X-Forwarded-For", "")], None),
        ([("Forwarded", "for=192.0.2.1")], "192.0.2.1"),
        ([("Forwarded", 'for=127.0.0.1, for="[2001:db8::1]:4711";proto=https')], "2001:db8::1"),
        ([("Forwarded", "proto=https;For=192.0.2.1;by=10.0.0.1")], "192.0.2.1"),
        ([("Forwarded", "for=192.0.2.1, for=10.0.0.7")], "192.0.2.1"),
        ([("Forwarded", "for=_hidden")], None),
        ([("Forwarded", "for=192.0.2.1, proto=https")], None),
        ([("Forwarded", "xfor=192.0.2.1")], None),
        ([], None),
        ([("X-Real-IP", "192.0.2.1")], None),
        ([("Forwarded", "for=127.0.0.1"), ("X-Forwarded-For", "192.0.2.1")], None),
    ],
)
def test_a_trusted_proxy_tells(headers: list[tuple[str, str]], address: str | None) -> None:
    for peer in ("10.0.0.1", "::1", "::ffff:10.0.0.1"):
        assert of(TRUSTED, peer, *headers) == address


def test_what_a_client_puts_before_counts_for_nothing() -> None:
    assert (
        of(TRUSTED, "10.0.0.1", ("X-Forwarded-For", "127.0.0.1, 10.0.0.9, 192.0.2.1, 10.0.0.2"))
        == "192.0.2.1"
    )


def test_parse() -> None:
    assert parse(" 192.0.2.1 ") == ipaddress.ip_address("192.0.2.1")
    assert parse("localhost") is None
    assert parse("[::1") == ipaddress.ip_address("::1")
    assert parse("1.2.3.4.5") is None
