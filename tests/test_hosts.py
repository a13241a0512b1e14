"""Addresses, URLs and names of hosts in the configuration."""

from __future__ import annotations

import pytest

from proxy.config.hosts import Address
from proxy.config.upstream import UpstreamConfig
from tests.configuring import (
    fault,
    namespace,
    read,
    upstream,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:80", Address("0.0.0.0", 80)),
        ("localhost:0", Address("localhost", 0)),
        ('"[::1]:65535"', Address("::1", 65535)),
        ('"[fe80::1%eth0]:1"', Address("fe80::1%eth0", 1)),
        ('":5000"', Address("", 5000)),
    ],
)
def test_address(text: str, address: Address) -> None:
    assert read(f"listen: {text}").listen == address
    assert str(address) == text.strip('"')


@pytest.mark.parametrize(
    "text",
    ["5000", "localhost", "::1:5000", '"[::g]:1"', "h:65536", "http://h:1", "'h:'", "off", "'h:٣'", "[a]"],
)
def test_address_refused(text: str) -> None:
    assert fault(f"listen: {text}").startswith("listen: ")


@pytest.mark.parametrize("text", ["off", "'off'", "false"])
def test_admin_off(text: str) -> None:
    assert read(f"admin: {text}").admin is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://h", "https://h"),
        ("https://h.example:5000/", "https://h.example:5000"),
        ("https://h/artifactory/docker-remote/", "https://h/artifactory/docker-remote"),
        ("https://[::1]:5000", "https://[::1]:5000"),
    ],
)
def test_url(url: str, expected: str) -> None:
    assert read(upstream(f"url: '{url}'")).namespaces["x"].upstream == UpstreamConfig(url=(expected,))
    assert read(f"namespaces: {{x: {{upstream: '{url}'}}}}").namespaces["x"].upstream == UpstreamConfig(
        url=(expected,)
    )


@pytest.mark.parametrize(
    "url",
    [
        *("h", "ftp://h", "https://", "https:///p", "https://h:0", "https://h:65536", "https://h:x", "5", ""),
        *("https://h?q", "https://h#f", "https://[::g]", "https://[:::]", "https://h/v2/", "https://h//p"),
        "https://h /p",
    ],
)
def test_url_refused(url: str) -> None:
    assert fault(upstream(f"url: '{url}'")).startswith("namespaces.x.upstream.url: ")


@pytest.mark.parametrize("upstream", ["{url: [https://a, 'http://b/c/']}", "[https://a, 'http://b/c/']"])
def test_several_urls_keep_their_order(upstream: str) -> None:
    text = f"namespaces: {{x: {{upstream: {upstream}}}}}"
    assert read(text).namespaces["x"].upstream.url == ("https://a", "http://b/c")


@pytest.mark.parametrize(
    ("urls", "cause"),
    [
        ("[]", "is empty: give at least one URL"),
        ("[https://a, 'https://a/']", "holds the same URL twice"),
        ("[https://a, b]", "[1]: must begin with https:// or http://"),
        ("[https://a, [https://b]]", "[1]: expected a string, got a list"),
    ],
)
def test_several_urls_refused(urls: str, cause: str) -> None:
    assert fault(upstream(f"url: {urls}")) == f"namespaces.x.upstream.url: {cause}"


@pytest.mark.parametrize(
    "name",
    ["Docker.io", "a/b", "-a", "a:", "a b", "a:123456", "[::1", "[:::]:5000", "[1::2::3]", "[::1%e]"],
)
def test_name_refused(name: str) -> None:
    assert fault(namespace("", f"'{name}'")).startswith(f"namespaces.{name}: expected a host")
    assert fault(namespace(f"aliases: ['{name}']")).startswith("namespaces.x.aliases[0]: expected a host")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[::1]", "[::1]"),
        ("[::1]:5000", "[::1]:5000"),
        ("[0:0:0:0:0:0:0:1]:5000", "[::1]:5000"),
        ("[fd00:0:0:1:0:0:0:2]:443", "[fd00:0:0:1::2]:443"),
        ("[::ffff:10.0.0.1]:80", "[::ffff:10.0.0.1]:80"),
        ("[::ffff:a00:1]", "[::ffff:10.0.0.1]"),
    ],
)
def test_names_and_aliases_may_be_ipv6(text: str, name: str) -> None:
    assert list(read(namespace("", f"'{text}'")).namespaces) == [name]
    assert read(namespace(f"aliases: ['{text}']")).namespaces["x"].aliases == (name,)
    assert read(namespace(f"hosts: ['{text}']")).namespaces["x"].hosts == (name,)


def test_an_ipv6_address_has_one_owner() -> None:
    other = "{upstream: 'https://b', aliases: ['[0::1]:443']}"
    text = f"namespaces: {{'[::1]': {{upstream: 'https://a'}}, x: {other}}}"
    assert fault(text) == "namespaces.x.aliases: [::1]:443 already belongs to namespace [::1]"


def test_hosts_may_be_ipv6_and_are_lower_case() -> None:
    assert read(namespace("hosts: ['[::1]:5000', mirror]")).namespaces["x"].hosts == ("[::1]:5000", "mirror")
    assert fault(namespace("hosts: [Mirror]")).startswith("namespaces.x.hosts[0]: ")
