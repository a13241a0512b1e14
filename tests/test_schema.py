"""The sections of the configuration, and that the example and the manual have them all."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from proxy.config.directories import default_cache_directory
from proxy.config.loader import load
from proxy.config.quantities import Reserve
from proxy.config.schema import (
    TLS,
    WarmRule,
)
from proxy.config.upstream import Login, UpstreamConfig
from proxy.config.values import Secret
from tests.configuring import (
    HOOK,
    SECTIONS,
    TOKEN,
    TOKENS,
    access,
    at,
    fault,
    namespace,
    read,
    upstream,
    webhook,
)

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "config.example.yml"
MANUAL = ROOT / "docs" / "configuration.md"


@pytest.mark.parametrize(("given", "every"), [("off", None), ("6h", 21600.0), ("", 86400.0)])
def test_how_often_is_collected(given: str, every: float | None) -> None:
    assert read(f"disk: {{collect_every: {given}}}").disk.collect_every == every


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


def test_fresh_for_tag_takes_the_first_match() -> None:
    rules = r"""fresh_for: 1m, tags: [
        {match: "re:v?\\d+", fresh_for: 7d}, {match: "v*", fresh_for: 1h},
        {match: "*-[a-c]", fresh_for: forever}]"""
    found = read(namespace(rules)).namespaces["x"]
    tags = ["v1", "1", "1x", "v1x", "V1", "x-b", "x-d", "x-b\n"]
    assert [found.fresh_for_tag(tag) for tag in tags] == [604800, 604800, 60, 3600, 60, math.inf, 60, 60]


def test_an_http_url_implies_plain_http_for_itself_alone() -> None:
    found = read(upstream("url: [http://h, https://h]")).namespaces["x"].upstream
    assert found.allows_http("http://h")
    assert not found.allows_http("https://h")
    assert read(at("plain_http: true")).namespaces["x"].upstream.allows_http("https://x.example")


def test_several_credentials() -> None:
    logins = "{username: a, password: p}, {docker_config: /d}, {credential_helper: h}"
    found = read(at(f"credentials: [{logins}]")).namespaces["x"].upstream
    expected = (
        Login(username="a", password=Secret("p")),
        Login(docker_config=Path("/d")),
        Login(credential_helper="h"),
    )
    assert found.credentials == found.logins() == expected


def test_the_single_form_of_credentials_is_one_login() -> None:
    (login,) = read(at("username: u, password: p")).namespaces["x"].upstream.logins()
    assert (login.username, login.password) == ("u", "p")


def test_every_key_of_an_upstream_is_read() -> None:
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


def test_a_webhook_needs_a_name_and_a_url() -> None:
    (found,) = read(webhook()).webhooks
    assert (found.name, found.url) == ("a", "https://h.example/hook?token=hunter2")
    assert (found.format, found.actions) == ("registry", ("push", "delete", "mount", "move", "hold"))
    assert (found.timeout, found.backoff, found.backoff_limit, found.keep) == (5, 1, 60, 7 * 86400)
    assert read("").webhooks == ()


def test_every_key_of_a_webhook_is_read() -> None:
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


def test_tls() -> None:
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
def test_the_administrator_connects_by_tls_from_elsewhere(admin: str, encrypted: bool) -> None:
    config = read(f"admin: {admin}\ntls: {{certificate: /c}}")
    assert config.admin_tls() == (config.tls if encrypted else None)
    assert read(f"admin: {admin}").admin_tls() is None


def test_what_is_warmed() -> None:
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
        ("images: [a]", "warm[0]: needs every, such as 6h, or at, such as '03:30'"),
        ("images: [a], every: 1h, at: '03:30'", "warm[0]: has both every and at: keep one"),
        ("images: [a b], every: 1h", "warm[0].images[0]: expected a reference such as alpine:3"),
        ("images: a, every: 1h", "warm[0].images: expected a list"),
        ("images: [a], every: 0", "warm[0].every: must be more than 0"),
        # YAML 1.1 reads 03:30 without quotes as a number.
        ("images: [a], at: 3:30", "warm[0].at: expected a time of day in quotes"),
        ("images: [a], at: '24:00'", "warm[0].at: expected a time of day"),
        ("images: [a], at: '3:30'", "warm[0].at: expected a time of day"),
        ("images: [a], every: 1h, platforms: [amd64]", "warm[0].platforms[0]: expected os/architecture"),
        ("images: [a], every: 1h, files: [a]", "warm[0].files: unknown key"),
    ],
)
def test_what_cannot_be_warmed(rule: str, says: str) -> None:
    assert fault(f"warm: [{{{rule}}}]").startswith(says)


def test_access() -> None:
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


def test_no_rules_are_not_the_built_in_ones() -> None:
    assert read(access("rules: []")).access.rules == ()
    assert read(access("")).access.rules is None


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ("rules: [{may: [pull]}]", "access.rules[0].who: is required"),
        ("rules: [{who: [anonymous]}]", "access.rules[0].may: is required"),
        (
            "rules: [{who: [], may: [pull]}]",
            "access.rules[0]: who is empty, so the rule grants nothing: fill it or remove the rule",
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
            "access.rules[0].from[0]: expected an address or a range such as 10.0.0.0/8 or fd00::/8, in",
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
        ("realm: 'a\"b'", "access.realm: expected printable ASCII without quotes"),
        ("token: {service: s, issuer: i, keys: [/k]}", "access.token.realm: is required"),
        (
            "token: {realm: 'https://a.example/\"', service: s, issuer: i, keys: [/k]}",
            "access.token.realm: expected the URL of a token server, such as https://auth.example/token",
        ),
        (
            "token: {realm: 'https://a.example/', service: s, issuer: i, keys: []}",
            "access.token: keys is empty: give a file with the token server's public key or certificate",
        ),
        ("remember: 0", "access.remember: must be more than 0"),
    ],
)
def test_access_that_is_wrong(members: str, cause: str) -> None:
    assert fault(access(members)).startswith(cause)


def uncommented() -> str:
    """The example with every "#key: value" taken for a setting."""
    return re.sub(r"""(?m)^( *)#(?=[a-z0-9"-])""", r"\1", EXAMPLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://entrepot:hunter2@h/x", "expected postgresql://user:password@host:port/database"),
        ("host=h password=hunter2", "expected postgresql://"),
    ],
)
def test_what_is_no_database_is_refused_and_not_shown(url: str, says: str) -> None:
    found = fault(f"shared: {{records: {json.dumps(url)}}}")
    assert "shared.records" in found
    assert says in found
    assert "hunter2" not in found


@pytest.mark.parametrize("url", ["postgresql://a:hunter2@h:5433,i/x?sslmode=verify-full", "postgres:///x"])
def test_a_database_is_a_secret(url: str) -> None:
    shared = read(f"shared: {{records: '{url}', connections: 2}}").shared
    assert (shared.records, shared.connections) == (url, 2)
    assert "hunter2" not in repr(shared)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (
            "bucket: images",
            "shared.bucket: expected s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
        ),
        ("bucket: 'file:///etc'", "shared.bucket: expected s3://"),
        ("bucket: 's3://'", "shared.bucket: expected s3://"),
        ("bucket: 's3://a:b@c'", "shared.bucket: expected s3://"),
        ("bucket: 's3://a/b?c'", "shared.bucket: expected a bucket and a prefix, without"),
        ("bucket: 's3://a/../b'", "shared.bucket: expected a bucket and a prefix, without"),
        ("bucket: 's3://a/b//c'", "shared.bucket: has an empty part"),
        ("caches: {}", "shared: caches needs records, a database, as well"),
        ("{caches: {}, bucket: 's3://a'}", "shared: caches needs records, a database, as well"),
        ("{caches: {}, records: 'postgresql://a/b'}", "shared: caches needs bucket as well"),
        ("{caches: {keep_for: soon}}", "shared.caches.keep_for: "),
        ("region: x", "shared: region is for a bucket: set bucket"),
        ("{bucket: 'gs://a', region: x}", "shared: region is for s3://, and bucket is gs://"),
        ("{bucket: 's3://a', access_key: x}", "shared: access_key needs secret_key"),
        ("{bucket: 's3://a', secret_key: hunter2}", "shared: secret_key needs access_key"),
        ("{bucket: 's3://a', session_token: hunter2}", "shared: session_token needs access_key"),
        ("{bucket: 's3://a', encryption_key: x}", "shared: encryption_key needs encryption: aws:kms"),
        ("{bucket: 's3://a', encryption: rot13}", "shared.encryption: "),
        ("{bucket: 's3://a', endpoint: s3.example}", "shared.endpoint: must begin with https:// or http://"),
    ],
)
def test_a_bucket_that_is_wrong(members: str, says: str) -> None:
    found = fault(f"shared: {members}" if members.startswith("{") else f"shared: {{{members}}}")
    assert found.startswith(says)
    assert "hunter2" not in found


@pytest.mark.parametrize(
    "members",
    [
        "{bucket: 's3://images/a/b/', access_key: a, secret_key: hunter2, session_token: hunter2}",
        "{bucket: 'gs://images', secret_key: hunter2}",
        "{bucket: 'az://box/x', access_key: account}",
        "{bucket: 's3://images', encryption: 'aws:kms:dsse', encryption_key: k, proxy: 'http://a:hunter2@p:1'}",
    ],
)
def test_a_bucket_is_read(members: str) -> None:
    shared = read(f"shared: {members}").shared
    assert shared.bucket is not None
    assert "hunter2" not in repr(shared)


PEERS = "urls: ['http://a:5000', 'http://b:5000']"
FLEET_SECRET = "hunter2-hunter2-hunter2"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (PEERS, "peers.secret: is required"),
        (f"{PEERS}, secret: hunter2", "peers.secret: needs 16 characters or more"),
        (f"{PEERS}, secret: 'hunter2 hunter2 hunter2'", "peers.secret: needs 16 characters or more"),
        (f"secret: {FLEET_SECRET}", "peers: needs either dns"),
        (f"{PEERS}, dns: 'a:1', secret: {FLEET_SECRET}", "peers: needs either dns"),
        (f"dns: a, secret: {FLEET_SECRET}", "peers.dns: expected NAME:PORT"),
        (f"dns: 'a:0', secret: {FLEET_SECRET}", "peers.dns: expected NAME:PORT"),
        (f"dns: 'http://a:1', secret: {FLEET_SECRET}", "peers.dns: expected NAME:PORT"),
        (f"urls: ['http://a', 'a'], secret: {FLEET_SECRET}", "peers.urls: [1]: must begin with"),
        (f"{PEERS}, self: 'http://c:5000', secret: {FLEET_SECRET}", "peers: self is http://c:5000"),
    ],
)
def test_peers_that_are_wrong(members: str, says: str) -> None:
    found = fault(f"peers: {{{members}}}")
    assert found.startswith(says)
    assert "hunter2" not in found


def test_peers_are_read() -> None:
    peers = read(f"peers: {{{PEERS}, self: 'http://b:5000', secret: '${{S}}'}}", S=FLEET_SECRET).peers
    assert peers is not None
    assert (peers.urls, peers.own) == (("http://a:5000", "http://b:5000"), "http://b:5000")
    assert "hunter2" not in repr(peers)
    peers = read(f"peers: {{dns: 'peers.svc:5000', secret: {FLEET_SECRET}}}").peers
    assert peers is not None
    assert (peers.dns, peers.urls, peers.own) == (("peers.svc", 5000), (), None)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("namespaces: {peers: {upstream: 'http://a'}}", "namespaces.peers: is what metrics call"),
        (
            "tls: {certificate: /a, client_ca: /b, client_certificate: required}",
            "peers: other replicas show no certificate",
        ),
    ],
)
def test_peers_that_do_not_fit_the_rest(more: str, says: str) -> None:
    assert fault(f"peers: {{{PEERS}, secret: {FLEET_SECRET}}}\n{more}").startswith(says)


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
    """But for `peers.urls`, which excludes `peers.dns` and is in the comment on that."""
    assert "; or urls, a list: [http://" in EXAMPLE.read_text(encoding="utf-8")
    assert {*keys(yaml.safe_load(uncommented())), "urls"} >= {name for _, name in FIELDS}


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
