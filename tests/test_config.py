from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.config.access import AccessConfig, AccessRule, TokenService
from proxy.config.errors import ConfigError
from proxy.config.hosts import Address
from proxy.config.loader import load
from proxy.config.quantities import Reserve, parse_duration
from proxy.config.schema import (
    TLS,
    Config,
    DiskConfig,
    Log,
    NamespaceConfig,
    TagRule,
    WarmRule,
    default_cache_directory,
)
from proxy.config.upstream import Login, UpstreamConfig
from proxy.config.values import Secret
from proxy.config.webhooks import WebhookConfig
from proxy.config.wellknown import WELL_KNOWN

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "config.example.yml"
MANUAL = ROOT / "docs" / "configuration.md"
TOKENS = dict.fromkeys(("HUB_TOKEN", "ADMIN_TOKEN", "DEPLOY_TOKEN", "DEPLOY_SECRET", "AUDIT_TOKEN"), "t")
SECTIONS = (
    AccessConfig,
    AccessRule,
    TokenService,
    Config,
    WarmRule,
    DiskConfig,
    Log,
    Login,
    NamespaceConfig,
    TagRule,
    TLS,
    UpstreamConfig,
    WebhookConfig,
)


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(text: str, **environ: str) -> Config:
        path = tmp_path / "entrepot.yml"
        path.write_text(text, encoding="utf-8")
        return load(path, environ)

    return read


@pytest.fixture
def fault(read: Any, tmp_path: Path) -> Any:
    """The one line that `text` is refused with, without the file's name before it."""

    def fault(text: str, **environ: str) -> str:
        with pytest.raises(ConfigError) as caught:
            read(text, **environ)
        line = str(caught.value)
        assert len(line.splitlines()) == 1
        hidden = caught.value.__suppress_context__ or caught.value.__context__ is None
        assert hidden, "a traceback would show values"
        prefix = str(tmp_path / "entrepot.yml")
        assert line.startswith(prefix)
        return line.removeprefix(prefix).removeprefix(": ")

    return fault


def namespace(members: str, name: str = "x") -> str:
    return f"namespaces: {{{name}: {{upstream: https://x.example, {members}}}}}"


def upstream(members: str) -> str:
    return f"namespaces: {{x: {{upstream: {{{members}}}}}}}"


def at(members: str) -> str:
    return upstream(f"url: https://x.example, {members}")


# Defaults


def test_without_a_file_the_well_known_registries_are_cached() -> None:
    config = load(None, {})
    assert config.listen == Address("127.0.0.1", 5000)
    assert config.admin == Address("127.0.0.1", 5001)
    assert config.default_namespace == "docker.io"
    assert {name: each.upstream.url for name, each in config.namespaces.items()} == {
        name: (url,) for name, url in WELL_KNOWN.items()
    }
    hub = config.namespaces["docker.io"]
    assert hub.library
    assert hub.aliases == ("index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
    assert not config.namespaces["ghcr.io"].library


@pytest.mark.parametrize(("given", "every"), [("off", None), ("6h", 21600.0), ("", 86400.0)])
def test_how_often_is_collected(read: Any, given: str, every: float | None) -> None:
    assert read(f"disk: {{collect_every: {given}}}").disk.collect_every == every


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "disk:\nlog:\nnamespaces:\nlisten:\n"])
def test_what_is_left_out_or_without_a_value_has_its_default(read: Any, text: str) -> None:
    assert read(text) == load(None, {})


def test_given_namespaces_replace_the_well_known(read: Any) -> None:
    config = read(namespace(""))
    assert list(config.namespaces) == ["x"]
    assert config.default_namespace is None


def test_docker_hub_keeps_its_built_in_aliases_beside_given_ones(read: Any) -> None:
    hub = read(namespace("aliases: [hub, index.docker.io]", "docker.io")).namespaces["docker.io"]
    assert hub.aliases == ("hub", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
    assert hub.library
    assert not read(namespace("library: false", "docker.io")).namespaces["docker.io"].library


def test_default_namespace(read: Any, fault: Any) -> None:
    assert read("default_namespace: null").default_namespace is None
    assert read("default_namespace: ghcr.io").default_namespace == "ghcr.io"
    assert fault("default_namespace: dokcer.io").endswith("did you mean docker.io?")


def test_default_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_directory() == Path("/xdg/entrepot")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored: XDG Base Directory, "Basics"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_directory() == tmp_path / ".cache" / "entrepot"
    monkeypatch.delenv("XDG_CACHE_HOME")
    for absent in ("/", str(tmp_path / "nonexistent")):
        monkeypatch.setenv("HOME", absent)
        assert default_cache_directory() == Path("/var/cache/entrepot")


# Values


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
def test_address(read: Any, text: str, address: Address) -> None:
    assert read(f"listen: {text}").listen == address
    assert str(address) == text.strip('"')


@pytest.mark.parametrize(
    "text",
    ["5000", "localhost", "::1:5000", '"[::g]:1"', "h:65536", "http://h:1", "'h:'", "off", "'h:٣'", "[a]"],
)
def test_address_refused(fault: Any, text: str) -> None:
    assert fault(f"listen: {text}").startswith("listen: ")


@pytest.mark.parametrize("text", ["off", "'off'", "false"])
def test_admin_off(read: Any, text: str) -> None:
    assert read(f"admin: {text}").admin is None


PARTS = {"w": 604800_000, "d": 86400_000, "h": 3600_000, "m": 60_000, "s": 1000, "ms": 1}


@given(st.fixed_dictionaries({}, optional={unit: st.integers(0, 10**6) for unit in PARTS}))
def test_durations_round_trip(numbers: dict[str, int]) -> None:
    text = "".join(f"{numbers[unit]}{unit}" for unit in PARTS if unit in numbers)
    milliseconds = sum(number * PARTS[unit] for unit, number in numbers.items())
    if text:
        assert parse_duration(text) == pytest.approx(milliseconds / 1000, rel=1e-12)
    else:
        with pytest.raises(ValueError, match="unit"):
            parse_duration(text)


@pytest.mark.parametrize(
    "text", ["10", "1.5", "-1s", "1m1h", "1s1s", "10 m", "'10'", "true", "false", "1y", "s", "[]"]
)
def test_duration_refused(fault: Any, text: str) -> None:
    line = fault(f"drain: {text}")
    assert line.startswith("drain: ")
    assert "ms, s, m, h, d, w" in line


def test_zero_is_a_duration_but_no_timeout(read: Any, fault: Any) -> None:
    assert read("drain: 0").drain == 0
    assert read("drain: 0s").drain == 0
    assert fault(at("header_timeout: 0")) == "namespaces.x.upstream.header_timeout: must be more than 0"


def test_fresh_for_tag_takes_the_first_match(read: Any) -> None:
    rules = r"""fresh_for: 1m, tags: [
        {match: "re:v?\\d+", fresh_for: 7d}, {match: "v*", fresh_for: 1h},
        {match: "*-[a-c]", fresh_for: forever}]"""
    found = read(namespace(rules)).namespaces["x"]
    tags = ["v1", "1", "1x", "v1x", "V1", "x-b", "x-d", "x-b\n"]
    assert [found.fresh_for_tag(tag) for tag in tags] == [604800, 604800, 60, 3600, 60, math.inf, 60, 60]


@pytest.mark.parametrize("pattern", ["re:(", "re:a{99999999999999999999}", "re:*"])
def test_a_bad_pattern_is_named(fault: Any, pattern: str) -> None:
    line = fault(namespace(f"tags: [{{match: '*', fresh_for: 1s}}, {{match: '{pattern}', fresh_for: 1s}}]"))
    assert line.startswith("namespaces.x.tags[1].match: not a regular expression")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://h", "https://h"),
        ("https://h.example:5000/", "https://h.example:5000"),
        ("https://h/artifactory/docker-remote/", "https://h/artifactory/docker-remote"),
        ("https://[::1]:5000", "https://[::1]:5000"),
    ],
)
def test_url(read: Any, url: str, expected: str) -> None:
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
def test_url_refused(fault: Any, url: str) -> None:
    assert fault(upstream(f"url: '{url}'")).startswith("namespaces.x.upstream.url: ")


def test_an_http_url_implies_plain_http_for_itself_alone(read: Any) -> None:
    found = read(upstream("url: [http://h, https://h]")).namespaces["x"].upstream
    assert found.allows_http("http://h")
    assert not found.allows_http("https://h")
    assert read(at("plain_http: true")).namespaces["x"].upstream.allows_http("https://x.example")


@pytest.mark.parametrize("upstream", ["{url: [https://a, 'http://b/c/']}", "[https://a, 'http://b/c/']"])
def test_several_urls_keep_their_order(read: Any, upstream: str) -> None:
    text = f"namespaces: {{x: {{upstream: {upstream}}}}}"
    assert read(text).namespaces["x"].upstream.url == ("https://a", "http://b/c")


@pytest.mark.parametrize(
    ("urls", "cause"),
    [
        ("[]", "names none"),
        ("[https://a, 'https://a/']", "names one twice"),
        ("[https://a, b]", "[1]: must begin with https:// or http://"),
        ("[https://a, [https://b]]", "[1]: expected a string, got a list"),
    ],
)
def test_several_urls_refused(fault: Any, urls: str, cause: str) -> None:
    assert fault(upstream(f"url: {urls}")) == f"namespaces.x.upstream.url: {cause}"


@pytest.mark.parametrize(
    ("text", "reserve"),
    [
        ("10%", Reserve(percent=10)),
        ("0%", Reserve()),
        ("100%", Reserve(percent=100)),
        ("0", Reserve()),
        ("25", Reserve(requests=25)),
        ("'25'", Reserve(requests=25)),
    ],
)
def test_reserve(read: Any, text: str, reserve: Reserve) -> None:
    assert read(at(f"reserve: {text}")).namespaces["x"].upstream.reserve == reserve


def test_what_a_reserve_keeps_of_a_limit() -> None:
    assert Reserve(percent=10).of(200) == 20
    assert Reserve(requests=7).of(200) == 7
    assert Reserve().of(200) == 0


@pytest.mark.parametrize("text", ["-1", "101%", "true", "1.5", "ten", "[1]", "'10 %'", "'1٤%'"])
def test_reserve_refused(fault: Any, text: str) -> None:
    line = fault(at(f"reserve: {text}"))
    assert line.startswith("namespaces.x.upstream.reserve: expected a number of requests, or a percentage")


def test_several_credentials(read: Any) -> None:
    logins = "{username: a, password: p}, {docker_config: /d}, {credential_helper: h}"
    found = read(at(f"credentials: [{logins}]")).namespaces["x"].upstream
    expected = (
        Login(username="a", password=Secret("p")),
        Login(docker_config=Path("/d")),
        Login(credential_helper="h"),
    )
    assert found.credentials == found.logins() == expected


def test_the_single_form_of_credentials_is_one_login(read: Any) -> None:
    (login,) = read(at("username: u, password: p")).namespaces["x"].upstream.logins()
    assert (login.username, login.password) == ("u", "p")


def test_every_key_of_an_upstream_is_read(read: Any) -> None:
    found = read(
        at(
            "username: u, password_file: /p, token_realms: ['auth.example:1'], ca_file: /ca, client_key: /k,"
            "client_certificate: /c, proxy: 'http://u:p@proxy:3128', insecure_skip_verify: true,"
            "plain_http: true, private_redirects: true, reserve: 5,"
            "connect_timeout: 1s, header_timeout: 2s, progress_timeout: 3s"
        )
    )
    assert found.namespaces["x"].upstream == UpstreamConfig(
        url=("https://x.example",),
        username="u",
        password_file=Path("/p"),
        token_realms=("auth.example:1",),
        ca_file=Path("/ca"),
        client_key=Path("/k"),
        client_certificate=Path("/c"),
        proxy=Secret("http://u:p@proxy:3128"),
        insecure_skip_verify=True,
        plain_http=True,
        private_redirects=True,
        reserve=Reserve(requests=5),
        connect_timeout=1.0,
        header_timeout=2.0,
        progress_timeout=3.0,
    )


HOOK = "name: a, url: 'https://h.example/hook?token=hunter2'"


def webhook(members: str = HOOK) -> str:
    return f"webhooks: [{{{members}}}]"


def test_a_webhook_needs_a_name_and_a_url(read: Any) -> None:
    (found,) = read(webhook()).webhooks
    assert (found.name, found.url) == ("a", "https://h.example/hook?token=hunter2")
    assert (found.format, found.actions) == ("registry", ("push", "delete", "mount", "move"))
    assert (found.timeout, found.backoff, found.backoff_limit, found.keep) == (5, 1, 60, 7 * 86400)
    assert read("").webhooks == ()


def test_every_key_of_a_webhook_is_read(read: Any) -> None:
    (found,) = read(
        webhook(
            f"{HOOK}, format: cloudevents, actions: [pull], match: ['local/*'], media_types: ['re:.*json'],"
            "headers: {Authorization: Bearer hunter2}, secret: hunter2, ca_file: /ca, timeout: 1s,"
            "backoff: 2s, backoff_limit: 3s, keep: never"
        )
    ).webhooks
    assert (found.format, found.actions) == ("cloudevents", ("pull",))
    assert found.headers == {"Authorization": "Bearer hunter2"}
    assert (found.secret, found.ca_file) == ("hunter2", Path("/ca"))
    assert (found.timeout, found.backoff, found.backoff_limit, found.keep) == (1, 2, 3, math.inf)
    assert found.wants("pull", "local/team/app", "application/json")
    assert not found.wants("push", "local/team/app", "application/json")
    assert not found.wants("pull", "docker.io/library/alpine", "application/json")
    assert not found.wants("pull", "local/team/app", "application/octet-stream")
    assert found.wants("pull", "local/team/app", "")
    assert "hunter2" not in repr(found)


def test_tls(read: Any, fault: Any) -> None:
    assert read("").tls is None
    assert read("tls: {certificate: /c, key: /k}").tls == TLS(certificate=Path("/c"), key=Path("/k"))
    given = "certificate: /c, minimum: 1.3, client_ca: /a, client_certificate: required"
    assert read(f"tls: {{{given}}}").tls == TLS(
        certificate=Path("/c"), minimum="1.3", client_ca=Path("/a"), client_certificate="required"
    )
    assert fault("tls: {key: /k}") == "tls.certificate: is required"
    assert fault("tls: {certificate: /c, minimum: 1.1}") == 'tls.minimum: expected "1.2" or "1.3"'
    asks = "tls: {certificate: /c, client_certificate: required}"
    assert fault(asks) == "tls: client_certificate needs client_ca"


@pytest.mark.parametrize(
    ("admin", "encrypted"),
    [("127.0.0.1:1", False), ("'[::1]:1'", False), ("10.0.0.1:1", True), ("':1'", True), ("off", False)],
)
def test_the_administrator_connects_by_tls_from_elsewhere(read: Any, admin: str, encrypted: bool) -> None:
    config = read(f"admin: {admin}\ntls: {{certificate: /c}}")
    assert config.admin_tls() == (config.tls if encrypted else None)
    assert read(f"admin: {admin}").admin_tls() is None


# Faults name the key


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lisen: 1", "lisen: unknown key; did you mean listen?"),
        ("lisen:", "lisen: unknown key; did you mean listen?"),
        ("log: {qqq: 1}", "log.qqq: unknown key; known are format, level"),
        (at("usrname: u"), "namespaces.x.upstream.usrname: unknown key; did you mean username?"),
        (upstream("username: u"), "namespaces.x.upstream.url: is required"),
        (
            "namespaces: {docker.io: {}}",
            "namespaces.docker.io: needs either upstream, to be a cache of it, or store: {}, to be pushed to",
        ),
        (
            "namespaces: {x: {upstream: 'https://x.example', store: {}}}",
            "namespaces.x: needs either upstream, to be a cache of it, or store: {}, to be pushed to",
        ),
        (
            "namespaces: {x: {store: {}, fresh_for: 1m}}",
            "namespaces.x: fresh_for is for a cache, and this is a store",
        ),
        (
            "namespaces: {x: {store: {keep_tags: [{match: 'ci-*'}]}}}",
            "namespaces.x.store.keep_tags[0].last: is required",
        ),
        (
            "namespaces: {docker.io: }",
            "namespaces.docker.io: expected a mapping of keys to values, got nothing",
        ),
        ("namespaces: {}", "namespaces: names none; leave the key out for the well-known registries"),
        ("namespaces: [a]", "namespaces: expected a mapping of keys to values, got a list"),
        ("log: info", "log: expected a mapping of keys to values, got a string"),
        ("log: {level: trace}", "log.level: expected one of debug, info, warning, error"),
        ("fallback: [allow]", "fallback: expected one of allow, deny"),
        ("offline: 'yes'", "offline: expected true or false, got a string"),
        ("offline: 0", "offline: expected true or false, got a number"),
        ("disk: {path: 5}", "disk.path: expected a string, got a number: put it in quotes"),
        ("disk: {path: 2025-01-01}", "disk.path: expected a string, got a date: put it in quotes"),
        ("disk: {path: ''}", "disk.path: is empty: give it a value or leave the key out"),
        ("disk: {path: ~/cache}", "disk.path: ~ is not expanded: write ${HOME}"),
        (
            "disk: {collect_grace: 59m}",
            "disk.collect_grace: must be 1h or more, so that no push in progress is collected",
        ),
        ("disk: {collect_every: 0s}", "disk.collect_every: must be more than 0"),
        (
            "namespaces: {x: {store: {keep_tags: [{match: 'ci-*', last: 0}]}}}",
            "namespaces.x.store.keep_tags[0].last: expected a number from 1 to 1000000",
        ),
        ("off: 1", "expected strings as keys, got true or false: put it in quotes"),
        (namespace("aliases: a"), "namespaces.x.aliases: expected a list, got a string"),
        (
            namespace("aliases: [a, 5]"),
            "namespaces.x.aliases[1]: expected a string, got a number: put it in quotes",
        ),
        (namespace("aliases: [a, null]"), "namespaces.x.aliases[1]: expected a string, got nothing"),
        (namespace("tags: [{match: a}]"), "namespaces.x.tags[0].fresh_for: is required"),
        (at("username: u"), "namespaces.x.upstream: username needs password or password_file"),
        (at("password: p"), "namespaces.x.upstream: password needs username"),
        (at("password_file: p"), "namespaces.x.upstream: password_file needs username"),
        (
            at("username: u, docker_config: p"),
            "namespaces.x.upstream: username needs password or password_file",
        ),
        (at("credentials: [{}]"), "namespaces.x.upstream: credentials[0] gives none"),
        (
            at("credentials: [{username: u}]"),
            "namespaces.x.upstream.credentials[0]: username needs password or password_file",
        ),
        (
            at("credentials: [{docker_config: d, password: p}]"),
            "namespaces.x.upstream.credentials[0]: password and docker_config each say where the password"
            " comes from: keep one of them",
        ),
        (
            at("docker_config: d, credentials: [{docker_config: d}]"),
            "namespaces.x.upstream: docker_config and credentials each say who we are: keep one of them",
        ),
        ("webhooks: [{url: 'https://h'}]", "webhooks[0].name: is required"),
        ("webhooks: [{name: a}]", "webhooks[0].url: is required"),
        (
            f"webhooks: [{{{HOOK}}}, {{{HOOK}}}]",
            "webhooks[1].name: there is another webhook a",
        ),
        (
            webhook("name: A b, url: 'https://h'"),
            "webhooks[0].name: expected a word in lower case, of letters, digits, '.', '_' and '-'",
        ),
        (webhook("name: a, url: 'ftp://h'"), "webhooks[0].url: must begin with https:// or http://"),
        (
            webhook(f"{HOOK}, actions: [pushed]"),
            "webhooks[0].actions[0]: expected one of push, pull, delete, mount, move",
        ),
        (
            webhook(f"{HOOK}, headers: [a]"),
            "webhooks[0].headers: expected a mapping of header names to values, got a list",
        ),
        (
            webhook(f"{HOOK}, headers: {{X-A: 5}}"),
            "webhooks[0].headers: X-A expected a string, got a number: put it in quotes",
        ),
        (webhook(f"{HOOK}, headers: {{Host: h}}"), "webhooks[0].headers: Host is not yours to set"),
        (webhook(f"{HOOK}, headers: {{A: h, a: h}}"), "webhooks[0].headers: names one twice"),
        (at("client_key: k"), "namespaces.x.upstream: client_key needs client_certificate"),
        (
            at("username: 'a:b', password: p"),
            "namespaces.x.upstream.username: a user name cannot hold a colon",
        ),
        (
            at("username: u, password: 5"),
            "namespaces.x.upstream.password: expected a string, got a number: put it in quotes",
        ),
    ],
)
def test_fault(fault: Any, text: str, line: str) -> None:
    assert fault(text) == line


def test_two_sources_of_a_password(fault: Any) -> None:
    line = fault(at("credential_helper: ecr-login, docker_config: /d"))
    assert line.startswith("namespaces.x.upstream: docker_config and credential_helper each say")


@pytest.mark.parametrize("name", ["Docker.io", "a/b", "-a", "a:", "a b", "a:123456", "[::1]"])
def test_name_refused(fault: Any, name: str) -> None:
    assert fault(namespace("", f"'{name}'")).startswith(f"namespaces.{name}: expected a host")
    assert fault(namespace(f"aliases: ['{name}']")).startswith("namespaces.x.aliases[0]: expected a host")


def test_hosts_may_be_ipv6_and_are_lower_case(read: Any, fault: Any) -> None:
    assert read(namespace("hosts: ['[::1]:5000', mirror]")).namespaces["x"].hosts == ("[::1]:5000", "mirror")
    assert fault(namespace("hosts: [Mirror]")).startswith("namespaces.x.hosts[0]: ")


@pytest.mark.parametrize("helper", ["../sh", "a b", "a/b"])
def test_credential_helper_refused(fault: Any, helper: str) -> None:
    assert fault(at(f"credential_helper: '{helper}'")).startswith("namespaces.x.upstream.credential_helper: ")


@pytest.mark.parametrize(
    ("first", "second", "key", "shared"),
    [
        ("aliases: [b]", "", "a.aliases", "b"),
        ("hosts: [b]", "", "a.hosts", "b"),
        ("aliases: [c]", "aliases: [c]", "b.aliases", "c"),
        ("aliases: [c]", "hosts: [c]", "b.hosts", "c"),
    ],
)
def test_a_name_belongs_to_one_namespace(fault: Any, first: str, second: str, key: str, shared: str) -> None:
    text = f"namespaces: {{a: {{upstream: http://a, {first}}}, b: {{upstream: http://b, {second}}}}}"
    other = "b" if key.startswith("a") else "a"
    assert fault(text) == f"namespaces.{key}: {shared} belongs to namespace {other} already"


def test_a_built_in_alias_may_not_be_another_namespace(fault: Any) -> None:
    text = "namespaces: {docker.io: {upstream: http://a}, index.docker.io: {upstream: http://b}}"
    assert "index.docker.io belongs to namespace index.docker.io already" in fault(text)


def test_a_namespace_may_have_its_own_name_as_host(read: Any) -> None:
    assert read(namespace("hosts: [x], aliases: [x]")).namespaces["x"].hosts == ("x",)


# The file


@pytest.mark.parametrize(
    ("text", "place", "cause"),
    [
        ("drain: 1s\ndrain: 2s", ":2:1", "duplicate key 'drain'"),
        ("log: {level: info, level: info}", ":1:20", "duplicate key 'level'"),
        ("a: [\n", ":2:1", ""),
        ("log:\n\tlevel: info", ":2:1", ""),
        ("a: b: c", ":1:5", ""),
        ("a: 1\n---\nb: 2", ":2:1", ""),
        ("disk: {path: 2025-02-30}", ":1:14", "looks like a YAML timestamp and is none: put it in quotes"),
        ("a: \a", ":1:4", "this character is not allowed in YAML"),
        ("drain: 1s\na: b\x07", ":2:5", "this character is not allowed in YAML"),
        ("[a, b]", "", "expected a mapping of keys to values, got a list"),
        ("false", "", "expected a mapping of keys to values, got true or false"),
        ("x: &x [*x]", "", "nested too deeply"),
        ("[" * 5000, "", "nested too deeply"),
        (r'a: "\U00110000"', "", "not YAML"),
        ('drain: "\\n"', "", "drain: there is a line break or another control character in it"),
        ('"a\\nb": 1', "", "there is a control character in a key"),
    ],
)
def test_what_is_not_yaml(fault: Any, text: str, place: str, cause: str) -> None:
    line = fault(text)
    assert re.match(r"(:\d+:\d+)?", line).group() == place  # type: ignore[union-attr]
    assert cause in line


def test_a_merged_mapping_may_be_overridden(read: Any) -> None:
    config = read(
        """namespaces:
          a: &a {upstream: https://a, fresh_for: 1h}
          b: &b {<<: *a, fresh_for: 2h}
          c: {<<: *b, upstream: https://c}"""
    )
    assert [each.fresh_for for each in config.namespaces.values()] == [3600, 7200, 7200]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yml: cannot be read: No such file"):
        load(tmp_path / "absent.yml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="latin: not UTF-8 at byte 3"):
        load(tmp_path / "latin")


# Variables and secrets


def test_variables_are_put_into_values_as_text(read: Any) -> None:
    config = read(at("username: 'a$$${U}$b', password: '${P}${P}', ca_file: '$$$'"), U="- [x", P="*a #")
    found = config.namespaces["x"].upstream
    assert found.username == "a$- [x$b"
    assert found.password == "*a #*a #"
    assert found.ca_file == Path("$$")


def test_what_a_variable_holds_is_not_interpolated_again(read: Any) -> None:
    assert read(at("ca_file: '${A}'"), A="${B}$$").namespaces["x"].upstream.ca_file == Path("${B}$$")


def test_typed_values_may_come_from_variables(read: Any) -> None:
    assert read("drain: ${D}", D="1m").drain == 60


def test_a_missing_variable_is_named(fault: Any) -> None:
    text = at("username: u, password: 'x${HUB_TOKEN}'")
    assert fault(text) == "namespaces.x.upstream.password: the environment variable HUB_TOKEN is not set"
    text = namespace("tags: [{match: '${T}', fresh_for: 1s}]")
    assert fault(text) == "namespaces.x.tags[0].match: the environment variable T is not set"


@pytest.mark.parametrize("text", ["${", "${}", "${a-b}", "${1}", "${A:-b}"])
def test_a_malformed_variable(fault: Any, text: str) -> None:
    assert fault(f"drain: '{text}'", A="1s").startswith("drain: ${ must be followed by a variable's name")


@pytest.mark.parametrize("value", ["a\n", "a\r\nX: y", "\0", "\udcff"])
def test_a_variable_must_not_hold_control_characters(fault: Any, value: str) -> None:
    line = fault(at("username: u, password: '${P}'"), P=value)
    assert line.startswith("namespaces.x.upstream.password: there is a line break")


def test_secrets_do_not_show(read: Any) -> None:
    config = read(at("username: u, password: hunter2, proxy: 'http://u:hunter2@proxy:1'"))
    assert config.namespaces["x"].upstream.password == "hunter2"
    assert "hunter2" not in repr(config) + str(config) + f"{config}"
    assert "'***'" in repr(config)


@pytest.mark.parametrize(
    "text",
    [
        upstream("url: 'https://u:hunter2@h'"),
        upstream("url: 'https://h?hunter2'"),
        upstream("url: https://h, username: u, password:hunter2"),
        upstream("url: https://h, username: u, password: *hunter2"),
        upstream("url: https://h, username: u, password: !hunter2"),
        upstream("url: https://h, username: u, password: !hunter2'x y"),
        upstream("url: https://h, username: u, password: !h!hunter2 y"),
        webhook("name: a, url: 'https://u:hunter2@h'"),
        webhook("name: a, url: 'hunter2'"),
        webhook("name: a, url: 'https://h/#hunter2'"),
        webhook("name: a, url: 'https://h/ hunter2'"),
        webhook(f"{HOOK}, headers: {{'Authorization:hunter2': a}}"),
        webhook(f"{HOOK}, headers: {{Authorization: [hunter2]}}"),
        webhook(f"{HOOK}, secret: [hunter2]"),
        at("password: hunter2"),
        at("credentials: [{password: hunter2}]"),
        at("credentials: [{username: u, password: hunter2, docker_config: /d}]"),
        upstream("url: [https://h, 'https://u:hunter2@h']"),
        at("username: u, password: [hunter2]"),
        at("username: u, password: {hunter2: 1}"),
        at("username: u, password: hunter2, docker_config: /d"),
        at("username: u, password: 'hunter2${'"),
        at("username: u, password: 'hunter2${X}'"),
        at('username: u, password: "hunter2\\n"'),
        at("proxy: 'http://u:hunter2@proxy:99999'"),
        at("proxy: 'https://u:hunter2@proxy:1'"),
    ],
)
def test_faults_do_not_show_passwords(fault: Any, text: str) -> None:
    assert "hunter2" not in fault(text)


# Whatever the text

KEYS = sorted(
    {field.name for section in SECTIONS for field in msgspec.structs.fields(section)} | {"docker.io", "x"}
)
SCALARS = [
    "10m",
    "0",
    "https://h",
    "off",
    "null",
    "!!int x",
    "!!timestamp x",
    "!!binary é",
    "${X}",
    "re:(",
    "*a",
]
MARKS = [*":-,{}[]?!&*%|>'\"#\t\n ", "&a", "<<", "=", "---", "...", "\n  ", ": "]
TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text()
    | st.sampled_from(SCALARS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)
TEXTS = (
    st.text()
    | st.lists(st.sampled_from([*KEYS, *SCALARS, *MARKS])).map(" ".join)
    | st.lists(st.sampled_from([*KEYS, *SCALARS, *MARKS])).map("".join)
    | TREES.map(lambda tree: yaml.dump(tree, allow_unicode=True))
    | st.dictionaries(st.sampled_from(KEYS), TREES).map(yaml.dump)
    | TREES.map(lambda tree: yaml.dump({"namespaces": {"x": {"upstream": "https://h", "tags": tree}}}))
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
def test_any_text_loads_or_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.yml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load(path, {})
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith(str(path))
    else:
        assert isinstance(config, Config)


# What is warmed


def test_what_is_warmed(read: Any) -> None:
    text = """
warm:
- {images: [alpine:3, ghcr.io/x/y], every: 6h, platforms: [linux/amd64], referrers: false}
- {list: /etc/images.txt, at: "03:30"}
"""
    first, second = read(text).warm
    assert first == WarmRule(
        images=("alpine:3", "ghcr.io/x/y"), every=21600.0, platforms=("linux/amd64",), referrers=False
    )
    assert second == WarmRule(list=Path("/etc/images.txt"), at=(3, 30))
    assert read("").warm == ()


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("every: 6h", "warm[0]: needs images or list"),
        ("images: [a]", "warm[0]: needs either every, such as 6h, or at, such as '03:30'"),
        ("images: [a], every: 1h, at: '03:30'", "warm[0]: needs either every"),
        ("images: [a b], every: 1h", "warm[0].images[0]: expected a reference such as alpine:3"),
        ("images: a, every: 1h", "warm[0].images: expected a list"),
        ("images: [a], every: 0", "warm[0].every: must be more than 0"),
        # YAML 1.1 reads 03:30 without quotes as a number.
        ("images: [a], at: 3:30", "warm[0].at: expected a time of the day in quotes"),
        ("images: [a], at: '24:00'", "warm[0].at: expected a time of the day"),
        ("images: [a], at: '3:30'", "warm[0].at: expected a time of the day"),
        ("images: [a], every: 1h, platforms: [amd64]", "warm[0].platforms[0]: expected os/architecture"),
        ("images: [a], every: 1h, files: [a]", "warm[0].files: unknown key"),
    ],
)
def test_what_cannot_be_warmed(fault: Any, rule: str, says: str) -> None:
    assert fault(f"warm: [{{{rule}}}]").startswith(says)


# Access


def access(members: str, namespaces: str = "local: {store: {}}") -> str:
    return f"namespaces: {{{namespaces}}}\naccess: {{{members}}}"


TOKEN = "token: {realm: 'https://auth.example/token', service: s, issuer: i, keys: [/k.pem]}"


def test_access(read: Any) -> None:
    config = read(
        access(
            f"htpasswd: /etc/htpasswd, groups: {{ops: [alice, bob]}}, {TOKEN}, trusted_proxies: [127.0.0.1],"
            " rules: [{who: [anonymous, 'claim:project=team/*'], from: [10.0.0.0/8, '::1'], may: [pull],"
            " where: [local/team/*]}], ping: challenge, remember: 1m"
        )
    ).access
    assert config.htpasswd == Path("/etc/htpasswd")
    assert config.groups == {"ops": ("alice", "bob")}
    assert config.token is not None
    assert config.token.keys == (Path("/k.pem"),)
    (rule,) = config.rules
    assert [(who.kind, who.name) for who in rule.who] == [("anonymous", ""), ("claim", "project")]
    assert rule.who[1].glob.fullmatch("team/app")
    assert [str(each) for each in rule.sources] == ["10.0.0.0/8", "::1/128"]
    assert rule.where[0].fullmatch("local/team/a/b")
    assert (rule.may, config.ping, config.remember) == (("pull",), "challenge", 60)


def test_no_rules_are_not_the_built_in_ones(read: Any) -> None:
    assert read(access("rules: []")).access.rules == ()
    assert read(access("")).access.rules is None


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ("rules: [{may: [pull]}]", "access.rules[0].who: is required"),
        ("rules: [{who: [anonymous]}]", "access.rules[0].may: is required"),
        (
            "rules: [{who: [], may: [pull]}]",
            "access.rules[0]: who names none, so the rule grants nothing: remove it",
        ),
        ("rules: [{who: anonymous, may: [pull]}]", "access.rules[0].who: expected a list, got a string"),
        (
            "rules: [{who: [anonymous], may: [write]}]",
            "access.rules[0].may[0]: expected one of pull, push, delete",
        ),
        (
            "rules: [{who: [everybody], may: [pull]}]",
            "access.rules[0].who[0]: expected anonymous, authenticated,",
        ),
        (
            "rules: [{who: ['user:'], may: [pull]}]",
            "access.rules[0].who[0]: expected anonymous, authenticated,",
        ),
        (
            "rules: [{who: ['claim:x'], may: [pull]}]",
            "access.rules[0].who[0]: expected anonymous, authenticated,",
        ),
        (
            "rules: [{who: [anonymous], may: [pull], where: [local]}]",
            "access.rules[0].where[0]: expected a glob over namespace/repository, such as local/team/*",
        ),
        (
            "rules: [{who: [anonymous], may: [pull], from: [10.0.0.1/8]}]",
            "access.rules[0].from[0]: expected an address or a range such as 10.0.0.0/8 or fd00::/8: its",
        ),
        (
            "trusted_proxies: [proxy.example]",
            "access.trusted_proxies[0]: expected an address or a range such as 10.0.0.0/8 or fd00::/8",
        ),
        (
            "rules: [{who: [anonymous], may: [pull], form: []}]",
            "access.rules[0].form: unknown key; did you mean from?",
        ),
        ("groups: [alice]", "access.groups: expected a mapping of keys to values, got a list"),
        ("groups: {ops: alice}", "access.groups.ops: expected a list, got a string"),
        ("realm: 'a\"b'", "access.realm: expected ASCII letters, digits and signs, without quotes"),
        ("token: {service: s, issuer: i, keys: [/k]}", "access.token.realm: is required"),
        (
            "token: {realm: 'https://a.example/\"', service: s, issuer: i, keys: [/k]}",
            "access.token.realm: expected the URL of a token server, such as https://auth.example/token",
        ),
        (
            "token: {realm: 'https://a.example/', service: s, issuer: i, keys: []}",
            "access.token: keys names none: give the file with the token server's public key or certificate",
        ),
        ("remember: 0", "access.remember: must be more than 0"),
    ],
)
def test_access_that_is_wrong(fault: Any, members: str, cause: str) -> None:
    assert fault(access(members)).startswith(cause)


def test_a_cache_that_nobody_could_pull_from(read: Any, fault: Any) -> None:
    private = "x: {upstream: 'https://x.example', visibility: rules}"
    cause = "namespaces.x.visibility: no rule lets anybody in: write access.rules"
    assert fault(access("htpasswd: /h", private)) == cause
    assert read(access("rules: [{who: [authenticated], may: [pull]}]", private))
    assert read(access(TOKEN, private))
    assert "visibility is for a cache" in fault("namespaces: {x: {store: {}, visibility: caller}}")


@pytest.mark.parametrize(
    ("namespaces", "fine"),
    [
        ("a: {store: {}}, b: {store: {}}", True),
        ("a: {store: {}, hosts: [a.example]}, b: {store: {}}", True),
        ("a: {store: {}, hosts: [a.example]}, docker.io: {upstream: 'https://x.example'}", True),
        ("a: {store: {}, hosts: [a.example]}, b: {store: {}, hosts: [b.example]}", False),
        (
            "a: {store: {}, hosts: [a.example]},"
            " docker.io: {upstream: 'https://x.example', visibility: rules}",
            False,
        ),
    ],
)
def test_a_token_must_tell_namespaces_apart(read: Any, fault: Any, namespaces: str, fine: bool) -> None:
    assert read(access("rules: []", namespaces))
    if fine:
        assert read(access(TOKEN, namespaces))
    else:
        assert fault(access(TOKEN, namespaces)).startswith("access.token: the namespaces a and ")


# What is written about it


def uncommented() -> str:
    """The example with every "#key: value" taken for a setting."""
    return re.sub(r"(?m)^( *)#(?=[a-z0-9-])", r"\1", EXAMPLE.read_text(encoding="utf-8"))


def keys(tree: Any) -> set[str]:
    if isinstance(tree, dict):
        return set(tree).union(*map(keys, tree.values()))
    return set().union(*map(keys, tree)) if isinstance(tree, list) else set()


FIELDS = [(section, field.encode_name) for section in SECTIONS for field in msgspec.structs.fields(section)]


def test_the_example_is_the_defaults() -> None:
    assert load(EXAMPLE, {}) == load(None, {})


def test_the_example_without_its_comment_signs_loads(tmp_path: Path) -> None:
    (tmp_path / "all.yml").write_text(uncommented(), encoding="utf-8")
    config = load(tmp_path / "all.yml", TOKENS)
    private = config.namespaces["registry.example:5000"].upstream
    for field in msgspec.structs.fields(UpstreamConfig):
        if not field.required and field.default not in (None, ()):
            assert getattr(private, field.name) == field.default, field.name


def test_the_example_has_every_key() -> None:
    assert keys(yaml.safe_load(uncommented())) >= {name for _, name in FIELDS}


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_the_manual_has_every_key_in_a_table(section: type, name: str) -> None:
    assert f"\n| `{name}` | " in MANUAL.read_text(encoding="utf-8"), section


def test_the_recipes_of_the_manual_load(tmp_path: Path) -> None:
    for manual in (MANUAL, MANUAL.with_name("events.md")):
        recipes = re.findall(r"(?s)```yaml\n(.*?)```", manual.read_text(encoding="utf-8"))
        assert recipes
        for recipe in recipes:
            (tmp_path / "recipe.yml").write_text(recipe, encoding="utf-8")
            assert load(tmp_path / "recipe.yml", TOKENS).namespaces
