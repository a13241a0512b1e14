"""Which hosts a list of registries stands for, however a client writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.registry_hosts import HostPattern, find_pattern, parse_pattern_of_hosts, registry_host
from proxy.config.schema import Config

HOSTS = [
    "ghcr.io",
    "*.example.com",
    "*.lan:5000",
    "*-docker.pkg.dev",
    "10.1.2.3:5000",
    "10.*",
    "93.184.216.*",
    "[fd00:0::7]:5000",
    "localhost:5000",
    "http://plain.test",
    "docker.io",
]


def config(
    tmp_path: Path, listed: list[str] = HOSTS, *, more: Mapping[str, Any] | None = None, **keys: Any
) -> Config:
    upstream = {"hosts": listed, **keys.pop("upstream", {})}
    path = tmp_path / "entrepot.yml"
    path.write_text(yaml.safe_dump({"namespaces": {"*": {"upstream": upstream, **keys}, **(more or {})}}))
    return load(path, {})


@pytest.mark.parametrize(
    ("written", "name", "url"),
    [
        ("ghcr.io", "ghcr.io", "https://ghcr.io"),
        ("GHCR.io", "ghcr.io", "https://ghcr.io"),
        ("ghcr.io.", "ghcr.io", "https://ghcr.io"),
        ("ghcr.io:443", "ghcr.io", "https://ghcr.io"),
        ("Ghcr.io.:443", "ghcr.io", "https://ghcr.io"),
        ("a.example.com", "a.example.com", "https://a.example.com"),
        ("a.b.example.com", "a.b.example.com", "https://a.b.example.com"),
        ("x.lan:5000", "x.lan:5000", "https://x.lan:5000"),
        ("europe-docker.pkg.dev", "europe-docker.pkg.dev", "https://europe-docker.pkg.dev"),
        ("10.1.2.3:5000", "10.1.2.3:5000", "https://10.1.2.3:5000"),
        ("93.184.216.34", "93.184.216.34", "https://93.184.216.34"),
        ("[fd00::7]:5000", "[fd00::7]:5000", "https://[fd00::7]:5000"),
        ("[FD00:0:0::7]:5000", "[fd00::7]:5000", "https://[fd00::7]:5000"),
        ("localhost:5000", "localhost:5000", "https://localhost:5000"),
        ("plain.test", "plain.test", "http://plain.test"),
        ("docker.io", "docker.io", "https://registry-1.docker.io"),
        ("index.docker.io", "docker.io", "https://registry-1.docker.io"),
        ("Registry-1.docker.io:443", "docker.io", "https://registry-1.docker.io"),
    ],
)
def test_a_host_of_the_list_is_a_namespace(tmp_path: Path, written: str, name: str, url: str) -> None:
    assert registry_host(written) == name
    made = config(tmp_path)
    assert made.key_of(name) == "*"
    found = made.namespace(name)
    assert found is not None and found.upstream is not None and found.upstream.url == (url,)
    assert found.library == (name == "docker.io")


@pytest.mark.parametrize(
    "written",
    [
        "quay.io",
        "example.com",
        "aexample.com",
        "a.example.com.evil.test",
        "a.example.com:5000",
        "x.lan",
        "x.lan:5001",
        "x.lan:05000",
        "x.lan:99999",
        "ghcr.io..",
        ".ghcr.io",
        "..example.com",
        "a..example.com",
        "-.example.com",
        f"{'a' * 64}.example.com",
        f"{'a.' * 130}example.com",
        "10.0.0.1",
        "10.1.2.3",
        "10.1",
        "10.0x1",
        "93.184.216.034",
        "93.184.216.999",
        "[fd00::8]:5000",
        "[fd00::7]",
        "[::ffff:10.1.2.3]:5000",
        "localhost",
        "*",
        "*.example.com",
        "a_example.com@b.example.com",
        "a.example.com/x",
        "a.example.com#",
        "ghcr.io\n",
        "",
        "alpine",
    ],
)
def test_any_other_is_not(tmp_path: Path, written: str) -> None:
    name = registry_host(written)
    assert name is None or config(tmp_path).key_of(name) == name


@given(st.text(st.sampled_from("a1.-_:x[]*%@/\u00e4n"), max_size=30))
def test_whatever_matches_is_the_host_of_a_url(text: str) -> None:
    host = registry_host(text)
    if host is not None and find_pattern((HostPattern("*"), HostPattern("*:1")), host):
        url = URL(HostPattern("*").url(host))
        assert f"{url.host}" == host.partition(":")[0]
        assert registry_host(host) == host
        assert re.fullmatch(r"[a-z0-9._-]+(:[0-9]+)?", host)


def test_a_full_name_comes_before_a_pattern() -> None:
    patterns = tuple(map(parse_pattern_of_hosts, ["*", "http://plain.lan:5000", "*:5000"]))
    found = find_pattern(patterns, "plain.lan:5000")
    assert found is not None and (found.literal, found.plain_http) == (True, True)
    found = find_pattern(patterns, "other.lan:5000")
    assert found is not None and not found.literal and found.url("other.lan:5000") == "https://other.lan:5000"


def test_what_may_be_private(tmp_path: Path) -> None:
    upstream = config(tmp_path).others
    assert upstream is not None
    assert [upstream.lists(each) for each in ("10.1.2.3:5000", "a.example.com")] == [True, False]
    assert not upstream.lists("quay.io")


@pytest.mark.parametrize(
    "given", ["*.Example.com", "alpine", "*.example.com/x", "a b.c", "x.test:0", "ftp://x.y", 7]
)
def test_a_pattern_that_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_pattern_of_hosts(given)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"aliases": ["x"]}, "namespaces.*.aliases: is for a namespace with a name of its own"),
        ({"hosts": ["x.test"]}, "namespaces.*.hosts: is for a namespace with a name of its own"),
        ({"upstream": {"url": "https://x.test"}}, "namespaces.*.upstream: has both url and hosts: keep one"),
        (
            {"upstream": {"username": "u", "password": "p"}},
            "namespaces.*.upstream: would send its password to every host that matches *.example.com",
        ),
        (
            {"upstream": {"credentials": [{"username": "u", "password": "p"}]}},
            "namespaces.*.upstream: would send its password to every host that matches *.example.com",
        ),
        (
            {"more": {"a.test": {"upstream": {"hosts": ["x.test"]}}}},
            "namespaces.a.test.upstream.hosts: is for the namespace '*' only: give a url",
        ),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fault)):
        config(tmp_path, **keys)


@pytest.mark.parametrize("namespace", [{"upstream": "https://x.test"}, {"store": {}}])
def test_it_needs_hosts(tmp_path: Path, namespace: dict[str, Any]) -> None:
    path = tmp_path / "entrepot.yml"
    path.write_text(yaml.safe_dump({"namespaces": {"*": namespace}}))
    with pytest.raises(ConfigError, match=r"namespaces\.\*: needs upstream\.hosts"):
        load(path, {})


def test_it_is_not_the_default(tmp_path: Path) -> None:
    path = tmp_path / "entrepot.yml"
    every = {"upstream": {"hosts": HOSTS}}
    path.write_text(yaml.safe_dump({"default_namespace": "*", "namespaces": {"*": every}}))
    with pytest.raises(ConfigError, match="default_namespace: no namespace has that name"):
        load(path, {})


def test_well_known_hosts_have_what_they_need(tmp_path: Path) -> None:
    made = config(tmp_path, ["*"])
    found = {each: made.namespace(each) for each in ("docker.io", "hf.co", "registry.ollama.ai", "ghcr.io")}
    assert {name: (each.library, each.names) for name, each in found.items() if each} == {
        "docker.io": (True, "specification"),
        "hf.co": (False, "any"),
        "registry.ollama.ai": (True, "any"),
        "ghcr.io": (False, "specification"),
    }


def test_a_password_for_full_names_alone(tmp_path: Path) -> None:
    login = {"username": "u", "password": "p"}
    made = config(tmp_path, ["a.test", "b.test"], upstream=login)
    found = made.namespace("b.test")
    assert found is not None and found.upstream is not None
    assert (found.upstream.username, found.upstream.url) == ("u", ("https://b.test",))


def test_a_namespace_of_its_own_comes_first(tmp_path: Path) -> None:
    made = config(tmp_path, more={"ghcr.io": {"upstream": "https://mirror.test"}})
    assert made.key_of("ghcr.io") == "ghcr.io"
    found = made.namespace("ghcr.io")
    assert found is not None and found.upstream is not None and found.upstream.url == ("https://mirror.test",)


@pytest.mark.parametrize("name", ["local", "*", "GHCR.io", "ghcr.io.", "index.docker.io", "a..b", ""])
def test_every_host_is_not_every_name(tmp_path: Path, name: str) -> None:
    """Such as the name of a private registry that was removed, or a host as no namespace is called."""
    made = config(tmp_path, ["*"])
    assert made.key_of(name) == name
    assert made.namespace(name) is (made.namespaces["*"] if name == "*" else None)
    assert made.key_of("ghcr.io") == "*"


def test_how_long_content_is_kept_is_as_for_all_of_them(tmp_path: Path) -> None:
    rules = [{"match": "ci/*", "keep_for": "1h"}]
    made = config(tmp_path, keep_for="2d", repositories=rules)
    kept = [made.keep_for(each) for each in ("ghcr.io/ci/app", "a.example.com/app", "quay.io/app")]
    assert kept == [3600.0, 2 * 86400.0, made.disk.keep_for]


@pytest.mark.parametrize("name", ["localhost", "localhost:5000", "a.localhost", "a.localhost:5000"])
def test_localhost_by_its_full_name_alone(tmp_path: Path, name: str) -> None:
    assert config(tmp_path, ["*", "*:5000", "*.localhost", "*.localhost:5000"]).key_of(name) == name
    assert config(tmp_path, ["*", f"http://{name}"]).key_of(name) == "*"


@pytest.mark.parametrize("name", ["xn--0.test", "a.xn--a-.test", "xn--zzzzzz.test:5000", "xn--.test"])
def test_an_international_name_that_nobody_can_read(tmp_path: Path, name: str) -> None:
    assert registry_host(name) is None
    assert registry_host("xn--80ak6aa92e.test:5000") == "xn--80ak6aa92e.test:5000"


OWNED: dict[str, Any] = {
    "hub": {"upstream": "https://hub.test", "aliases": ["docker.io", "quay.test", "[::1]:5000"]},
    "ghcr.io:443": {"upstream": "https://ghcr.io"},
    "local": {"store": {}, "hosts": ["registry.test", "other.test:5000"]},
}


@pytest.mark.parametrize(
    "name", ["docker.io", "quay.test", "[::1]:5000", "ghcr.io", "registry.test", "other.test:5000"]
)
def test_what_belongs_to_another_namespace(tmp_path: Path, name: str) -> None:
    made = config(tmp_path, ["*", "*:5000", name], more=OWNED)
    assert made.key_of(name) == name
    assert made.namespace(name) is None
    assert made.key_of("gcr.io") == "*"
