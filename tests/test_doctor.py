"""A server's own machine looked over: what is well, what is not, and what is asked for that."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
import trustme
import yaml
from click.testing import CliRunner, Result

from proxy.cli.main import main
from proxy.config.loader import load
from proxy.config.schema import TLS, Config
from proxy.doctor import database, running, upstreams
from proxy.doctor.checks import Check, Diagnosis
from storage.postgres.records import PostgresRecords
from storage.postgres.schema import VERSION
from tests.clients.processes import free_port
from tests.conftest import Serve, Site, configuration
from tests.postgres import PASSWORD, PostgresServer
from tests.relay import Relay
from tests.upstream import Basic, Bearer, Status, Upstream

Examine = Callable[..., Awaitable["Found"]]


class Found:
    """What was found: the exit status, and the checks by name."""

    def __init__(self, result: Result) -> None:
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        self.status = result.exit_code
        self.diagnosis = msgspec.json.decode(result.stdout, type=Diagnosis)

    def all(self, name: str) -> list[Check]:
        return [each for each in self.diagnosis.checks if each.name == name]

    def one(self, name: str) -> Check:
        (check,) = self.all(name)
        return check

    @property
    def failed(self) -> list[str]:
        return [each.name for each in self.diagnosis.checks if each.state == "failed"]

    @property
    def warnings(self) -> list[str]:
        # What the directory of the tests lies on is none of theirs.
        names = (each.name for each in self.diagnosis.checks if each.state == "warning")
        return [each for each in names if each not in ("file system", "room", "inodes")]


async def invoke(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, main, ["doctor", *words])


@pytest.fixture
def examine(tmp_path: Path) -> Examine:
    """Look over what a configuration says; `keys` are those of docker.io's upstream, `top` all others."""

    async def look(url: str, top: dict[str, Any] | None = None, **keys: Any) -> Found:
        port = free_port()
        tree = {
            "listen": f"127.0.0.1:{port}",
            "admin": "off",
            "disk": {"path": str(tmp_path)},
            "namespaces": {"docker.io": {"upstream": {"url": url, **keys}}},
            **(top or {}),
        }
        path = tmp_path / "doctor.yml"
        path.write_text(yaml.safe_dump(tree))
        return Found(await invoke("--config", str(path), "--json"))

    return look


@pytest.fixture
async def site(serve: Serve, upstream: Upstream) -> Site:
    listen, admin = free_port(), free_port()
    return await serve(upstream, top={"listen": f"127.0.0.1:{listen}", "admin": f"127.0.0.1:{admin}"})


def told(upstream: Upstream, ahead: float = 0.0) -> None:
    """Its next answer has a date."""
    date = formatdate(time.time() + ahead, usegmt=True)
    upstream.next("GET", "base", Status(200, headers={"Date": date}, body=b"{}"))


# All


async def test_all_is_well(site: Site, upstream: Upstream, tmp_path: Path) -> None:
    told(upstream)
    found = Found(await invoke("--config", str(tmp_path / "entrepot.yml"), "--json"))
    assert (found.failed, found.warnings, found.status) == ([], [], 0)
    names = [each.name for each in found.diagnosis.checks]
    assert names == [
        *("configuration", "disk", "locks", "links", "file system", "room", "inodes"),
        *("workers", "descriptors", "server", "breaker", "listen", "dns", "reach", "clock"),
    ]
    assert upstream.log == ["GET base"]


async def test_the_shape_of_json(site: Site, tmp_path: Path) -> None:
    result = await invoke("--config", str(tmp_path / "entrepot.yml"), "--json")
    tree = json.loads(result.stdout)
    assert set(tree) == {"checks", "ok", "warnings", "failed"}
    assert {frozenset(each) for each in tree["checks"]} == {
        frozenset(("name", "subject", "state", "message", "advice"))
    }
    states = Counter(each["state"] for each in tree["checks"])
    assert (states["ok"], states["warning"], states["failed"]) == (
        tree["ok"],
        tree["warnings"],
        tree["failed"],
    )
    assert all(bool(each["advice"]) == (each["state"] != "ok") for each in tree["checks"])


async def test_people_get_a_table(site: Site, tmp_path: Path) -> None:
    result = await invoke("--config", str(tmp_path / "entrepot.yml"))
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["CHECK", "SUBJECT", "STATE", "FINDING"]
    assert lines[-1].endswith("0 failed")


async def test_a_configuration_that_is_wrong_tells_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "entrepot.yml"
    path.write_text("lisen: x")
    found = Found(await invoke("--config", str(path), "--json"))
    (check,) = found.diagnosis.checks
    assert (check.name, check.state, found.status) == ("configuration", "failed", 1)
    assert "did you mean listen?" in check.message


@pytest.mark.parametrize(
    "words", [("--no-bypass",), ("--pull", "alpine"), ("--namespace", "x.example"), ("--server", "http://")]
)
async def test_what_was_asked_wrongly_is_status_2(words: tuple[str, ...]) -> None:
    assert (await invoke(*words)).exit_code == 2


# The server


async def test_a_server_that_does_not_run(examine: Examine, upstream: Upstream) -> None:
    admin = free_port()
    found = await examine(upstream.url, {"admin": f"127.0.0.1:{admin}"})
    assert found.one("server").state == "warning"
    assert "(connection refused)" in found.one("server").message
    assert "entrepot serve" in found.one("server").advice
    assert found.one("listen").state == "ok"


async def test_an_address_that_is_none_of_ours(examine: Examine, upstream: Upstream) -> None:
    found = await examine(upstream.url, {"listen": "192.0.2.1:5000"})
    assert found.failed == ["listen"]
    assert found.status == 1


async def test_something_else_listens(examine: Examine, upstream: Upstream) -> None:
    address = upstream.url.removeprefix("http://")
    found = await examine(upstream.url, {"admin": address})
    assert "not that of entrepot" in found.one("server").message
    found = await examine(upstream.url, {"listen": address})
    assert found.failed == ["listen"]
    assert "another program answers" in found.one("listen").message


async def test_the_listener_of_a_store_is_checked_too(examine: Examine, upstream: Upstream) -> None:
    for address, state in ((upstream.url.removeprefix("http://"), "failed"), ("127.0.0.1:0", "warning")):
        store = {"namespaces": {"local": {"store": {}, "listen": address}}}
        main, own = (await examine(upstream.url, store)).all("listen")
        assert (main.state, own.state, own.subject) == ("ok", state, address)


async def test_where_docker_cannot_log_in(examine: Examine, upstream: Upstream, tmp_path: Path) -> None:
    namespaces = {"docker.io": {"upstream": upstream.url}, "local": {"store": {}}}
    found = await examine(upstream.url, {"namespaces": namespaces, "access": {"htpasswd": "/etc/htpasswd"}})
    _, login = found.all("configuration")
    assert (login.state, login.subject) == ("warning", "namespaces.local")
    assert "docker cannot log in" in login.message
    assert "a listener of its own" in login.advice


async def test_something_mute_listens(
    examine: Examine, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        found = await examine(upstream.url, {"listen": f"127.0.0.1:{mute.getsockname()[1]}"})
    assert "no answer in time" in found.one("listen").message


async def test_the_server_is_named(site: Site, examine: Examine, upstream: Upstream, tmp_path: Path) -> None:
    """It may have its admin listener elsewhere than this configuration says."""
    result = await invoke("--config", str(tmp_path / "entrepot.yml"), "--server", str(site.app.admin_url))
    assert "is ready" in result.stdout


async def test_a_breaker_that_is_open(site: Site, upstream: Upstream, tmp_path: Path) -> None:
    await upstream.stop()
    status, _, _ = await site.get("/v2/library/alpine/manifests/3")
    assert status == 502
    await upstream.start()
    found = Found(await invoke("--config", str(tmp_path / "entrepot.yml"), "--json"))
    breaker = found.one("breaker")
    assert (breaker.state, breaker.subject) == ("warning", "docker.io")
    assert upstream.url.removeprefix("http://") in breaker.message


def test_processes_that_are_too_many(tmp_path: Path) -> None:
    config = msgspec.structs.replace(load(None, {}), workers=256)
    (workers, _) = running.check_limits(config)
    assert workers.state == "warning"


def test_descriptors_that_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.resource, "getrlimit", lambda which: (100, 1024))
    (_, descriptors) = running.check_limits(load(None, {}))
    assert descriptors.state == "warning"
    assert "1024" in descriptors.message


# Upstreams


async def test_what_is_offline_is_not_asked(examine: Examine, upstream: Upstream) -> None:
    for top in ({"offline": True}, {"namespaces": {"a.io": {"upstream": upstream.url, "offline": True}}}):
        found = await examine(upstream.url, top)
        assert "never asked" in found.one("upstream").message
        assert not found.all("reach") and not found.all("clock")
    assert upstream.log == []


async def test_a_store_has_no_upstream(examine: Examine, upstream: Upstream) -> None:
    found = await examine(upstream.url, {"namespaces": {"local": {"store": {}}}})
    assert (found.failed, found.all("reach")) == ([], [])


async def test_of_a_list_the_full_names_are_looked_at(examine: Examine, upstream: Upstream) -> None:
    hosts = [upstream.url, "*.example.com"]
    found = await examine(upstream.url, {"namespaces": {"*": {"upstream": {"hosts": hosts}}}})
    assert [each.subject for each in found.all("reach")] == [upstream.url.removeprefix("http://")]
    assert (found.failed, found.status) == ([], 0)


async def test_a_name_that_does_not_resolve(examine: Examine) -> None:
    found = await examine("https://no-such-host.invalid")
    assert found.failed == ["dns"]
    assert "no-such-host.invalid, has no address" in found.one("dns").message


async def test_an_upstream_that_is_down(examine: Examine) -> None:
    port = free_port()
    found = await examine(f"http://127.0.0.1:{port}")
    assert found.failed == ["reach"]
    assert "cannot be reached" in found.one("reach").message
    assert found.status == 1


async def test_each_url_is_looked_at(examine: Examine, upstream: Upstream) -> None:
    port = free_port()
    urls = [f"http://127.0.0.1:{port}", upstream.url]
    found = await examine(upstream.url, {"namespaces": {"docker.io": {"upstream": {"url": urls}}}})
    assert [each.state for each in found.all("reach")] == ["failed", "ok"]
    assert [each.subject for each in found.all("reach")] == [f"docker.io ({each})" for each in urls]


async def test_what_is_no_registry(examine: Examine, upstream: Upstream) -> None:
    upstream.next("GET", "base", Status(404))
    found = await examine(upstream.url)
    assert found.one("reach").state == "warning"
    assert "answers 404" in found.one("reach").message


async def test_a_proxy_is_resolved_and_gone_through(examine: Examine, upstream: Upstream) -> None:
    async with Relay(int(upstream.url.rpartition(":")[2])) as relay:
        found = await examine(upstream.url, proxy=f"http://127.0.0.1:{relay.port}")
    assert "its proxy" in found.one("dns").message
    assert (found.failed, relay.seen) == ([], [f"GET {upstream.url}/v2/ HTTP/1.1"])


# Their clocks


@pytest.mark.parametrize(("ahead", "state"), [(5, "ok"), (-90, "warning"), (90, "warning"), (-900, "failed")])
async def test_a_clock_that_goes_wrong(
    examine: Examine, upstream: Upstream, ahead: float, state: str
) -> None:
    told(upstream, ahead)
    assert (await examine(upstream.url)).one("clock").state == state


async def test_a_clock_that_nobody_tells_of(examine: Examine, upstream: Upstream) -> None:
    assert "no upstream has sent" in (await examine(upstream.url)).one("clock").message


def test_one_wrong_clock_among_many_is_not_ours() -> None:
    assert upstreams.check_clock([0.1, 5000.0, -0.4]).state == "ok"
    assert "behind" in upstreams.check_clock([100.0]).message
    assert "ahead of" in upstreams.check_clock([-100.0]).message


# Credentials

LOGIN = {"username": "ci", "password": "right"}


@pytest.mark.parametrize("auth", [Basic("ci", "right"), Bearer(Basic("ci", "right"), anonymous=False)])
async def test_credentials(examine: Examine, upstream: Upstream, auth: Basic | Bearer) -> None:
    upstream.auth = auth
    found = await examine(upstream.url, **LOGIN)
    assert (found.one("credentials").state, found.failed) == ("ok", [])
    found = await examine(upstream.url, **(LOGIN | {"password": "hunter2"}))
    assert found.failed == ["credentials"]
    assert "hunter2" not in str(found.diagnosis)
    assert "password of namespaces.docker.io.upstream" in found.one("credentials").advice
    assert {each.kind for each in upstream.requests} <= {"base", "token"}


async def test_without_credentials_none_are_tried(examine: Examine, upstream: Upstream) -> None:
    upstream.auth = Bearer()
    found = await examine(upstream.url)
    assert (found.all("credentials"), found.failed) == ([], [])
    assert upstream.log == ["GET base"]


@pytest.mark.errors("credentials.failed")
async def test_each_of_several_credentials_is_tried(
    examine: Examine, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.auth = Basic("ci", "right")
    found = await examine(
        upstream.url,
        credentials=[LOGIN, {"username": "ci", "password_file": str(tmp_path / "absent")}],
    )
    assert [each.state for each in found.all("credentials")] == ["ok", "failed"]
    assert found.all("credentials")[1].subject == "docker.io, credentials[1]"


async def test_a_realm_that_fails_is_no_fault_of_the_credentials(
    examine: Examine, upstream: Upstream
) -> None:
    upstream.auth = Bearer(Basic("ci", "right"), anonymous=False)
    upstream.next("GET", "token", Status(500), times=9)
    found = await examine(upstream.url, **LOGIN)
    assert found.one("credentials").state == "warning"
    assert found.failed == []


# The rate limit


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, upstream: Upstream) -> Upstream:
    """Docker Hub, with its image for that."""
    monkeypatch.setattr(upstreams, "HUB", frozenset(("127.0.0.1",)))
    upstream.image("ratelimitpreview/test", "latest")
    upstream.auth = Bearer()
    return upstream


@pytest.mark.parametrize(
    ("remaining", "state"), [(100, "ok"), (11, "ok"), (9, "warning"), (0, "failed"), (None, "ok")]
)
async def test_the_rate_limit_is_told_and_not_spent(
    examine: Examine, hub: Upstream, remaining: int | None, state: str
) -> None:
    hub.ratelimit = None if remaining is None else (100, 21600, remaining)
    found = await examine(hub.url)
    assert found.one("rate limit").state == state
    if remaining is not None:
        assert f"{remaining} of 100" in found.one("rate limit").message
        assert hub.ratelimit == (100, 21600, remaining)
    assert [each.method for each in hub.requests if each.kind == "manifest"] == ["HEAD", "HEAD"]


async def test_a_rate_limit_that_is_used_up(examine: Examine, hub: Upstream) -> None:
    hub.next("HEAD", "manifest", Status(429))
    found = await examine(hub.url)
    assert found.failed == ["rate limit"]


async def test_others_are_not_asked_for_docker_hubs(examine: Examine, upstream: Upstream) -> None:
    found = await examine(upstream.url)
    assert found.all("rate limit") == []
    assert upstream.log == ["GET base"]


# Certificates


class Issuer:
    """An authority of our own, and what it has issued."""

    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        self.ca = directory / "ca.pem"
        self.pair = directory / "pair.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, days: float | None = None) -> ssl.SSLContext:
        """Valid for so many days from now, the past included."""
        more = {}
        if days is not None:
            now = datetime.now(UTC)
            more = {"not_before": now - timedelta(days=30), "not_after": now + timedelta(days=days, hours=1)}
        certificate = self.authority.issue_cert("localhost", "127.0.0.1", **more)
        certificate.private_key_and_cert_chain_pem.write_to_path(str(self.pair))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        return context


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path)


@asynccontextmanager
async def behind(upstream: Upstream, context: ssl.SSLContext) -> AsyncIterator[str]:
    """The upstream's URL behind TLS."""
    async with Relay(int(upstream.url.rpartition(":")[2]), context) as relay:
        yield f"https://localhost:{relay.port}"


@pytest.mark.parametrize(("days", "state"), [(90, "ok"), (3, "warning")])
async def test_a_certificate_that_holds(
    examine: Examine, upstream: Upstream, issuer: Issuer, days: int, state: str
) -> None:
    async with behind(upstream, issuer.issue(days)) as url:
        found = await examine(url, ca_file=str(issuer.ca))
    assert (found.one("tls").state, found.one("reach").state) == (state, "ok")
    assert f"{days} days" in found.one("tls").message


async def test_a_certificate_that_has_expired(examine: Examine, upstream: Upstream, issuer: Issuer) -> None:
    async with behind(upstream, issuer.issue(-1)) as url:
        found = await examine(url, ca_file=str(issuer.ca))
    assert found.failed == ["tls"]
    assert "its certificate expired on " in found.one("tls").message
    assert upstream.log == []


async def test_an_authority_that_nobody_knows(examine: Examine, upstream: Upstream, issuer: Issuer) -> None:
    async with behind(upstream, issuer.issue()) as url:
        found = await examine(url)
        assert found.failed == ["tls"]
        assert "ca_file" in found.one("tls").advice
        found = await examine(url, insecure_skip_verify=True)
        assert (found.failed, found.one("tls").state) == ([], "warning")


async def test_http_where_https_is_asked(examine: Examine, site: Site) -> None:
    found = await examine(site.url.replace("http://", "https://"))
    assert found.failed == ["tls"]
    assert "it does not speak TLS" in found.one("tls").message


async def test_an_authority_that_is_not_there(examine: Examine, upstream: Upstream) -> None:
    found = await examine(upstream.url, ca_file="/no/such.pem")
    assert found.failed == ["tls"]
    assert "No such file" in found.one("tls").message


@pytest.mark.parametrize("asks", [False, True])
async def test_a_server_with_tls(
    serve: Serve, upstream: Upstream, issuer: Issuer, tmp_path: Path, asks: bool
) -> None:
    listen, admin = free_port(), free_port()
    issuer.issue(90)
    tls = {"certificate": str(issuer.pair)}
    if asks:
        tls |= {"client_ca": str(issuer.ca), "client_certificate": "required"}
    top = {"listen": f"127.0.0.1:{listen}", "admin": f"0.0.0.0:{admin}", "admin_token": "t", "tls": tls}
    await serve(upstream, top=top)
    told(upstream)
    found = Found(await invoke("--config", str(tmp_path / "entrepot.yml"), "--json"))
    assert (found.failed, found.warnings, found.status) == ([], [], 0)
    assert ("certificates" in found.one("listen").message) == asks
    assert "90 days" in found.one("tls").message


def listening(certificate: Path, key: Path | None = None) -> Config:
    return Config(tls=TLS(certificate=certificate, key=key))


@pytest.mark.parametrize(("days", "state"), [(90, "ok"), (3, "warning"), (-1, "failed")])
def test_a_certificate_of_our_own(issuer: Issuer, days: int, state: str) -> None:
    issuer.issue(days)
    (check,) = running.check_certificate(listening(issuer.pair))
    assert check.state == state


def test_a_key_of_another_certificate(issuer: Issuer, tmp_path: Path) -> None:
    issuer.issue()
    other = tmp_path / "other.key"
    other.write_bytes(issuer.authority.issue_cert("elsewhere.example").private_key_pem.bytes())
    (check,) = running.check_certificate(listening(issuer.pair, other))
    assert check.state == "failed"
    (check,) = running.check_certificate(listening(tmp_path / "absent.pem"))
    assert "No such file" in check.message
    assert running.check_certificate(load(None, {})) == []


def test_an_intermediate_authority_of_our_own(issuer: Issuer, tmp_path: Path) -> None:
    """The chain is in the file; the end that counts is the first one's."""
    soon = datetime.now(UTC) + timedelta(days=40, hours=1)
    child = issuer.authority.create_child_ca().issue_cert("localhost", not_after=soon)
    pair = tmp_path / "chain.pem"
    child.private_key_and_cert_chain_pem.write_to_path(str(pair))
    (check,) = running.check_certificate(listening(pair))
    assert "40 days" in check.message


# Checks that fail themselves


@pytest.mark.parametrize(
    "part", ["disk.check", "running.check_certificate", "running.check_limits", "upstreams.check"]
)
async def test_a_check_that_fails_itself_is_a_failed_check(
    examine: Examine, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(*_: object) -> None:
        raise UnicodeError("label too long")

    monkeypatch.setattr(f"proxy.doctor.{part}", fail)
    result = await examine(upstream.url)
    found = [each for each in result.diagnosis.checks if "could not be checked" in each.message]
    assert [(each.message, each.state) for each in found] == [
        ("could not be checked: label too long", "failed")
    ]
    assert result.status == 1


async def test_a_host_that_is_no_name(examine: Examine) -> None:
    result = await examine(f"https://{'a' * 64}.example")
    assert result.status == 1
    assert "failed" in [each.state for each in result.diagnosis.checks if each.subject == "docker.io"]


async def test_clients_that_cannot_be_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no sense")

    monkeypatch.setattr("proxy.doctor.client.CLIENTS", {"docker": fail})
    result = await invoke("--client", "http://127.0.0.1:1", "--root", str(tmp_path), "--json")
    (found,) = [each for each in json.loads(result.stdout)["checks"] if each["subject"] == "docker"]
    assert found["message"] == "could not be checked: no sense"


# The database


@pytest.mark.clients
async def test_a_database_that_is_well(
    examine: Examine, upstream: Upstream, postgres_server: PostgresServer
) -> None:
    url = postgres_server.database()
    shared = {"shared": {"records": url}, "workers": 2}
    check = (await examine(upstream.url, shared)).one("database")
    assert check.state == "ok"
    assert re.fullmatch(r"PostgreSQL \d+\.\d+.*, no tables yet", check.message)
    PostgresRecords(url).close()
    check = (await examine(upstream.url, shared)).one("database")
    assert (check.state, check.message.rpartition(", ")[2]) == ("ok", f"schema {VERSION}")
    assert PASSWORD not in check.subject


@pytest.mark.clients
def test_a_database_that_caches_share(postgres_server: PostgresServer, tmp_path: Path) -> None:
    url = postgres_server.database()
    PostgresRecords(url).close()
    shared = {"records": url, "bucket": "s3://none", "caches": {}, "connections": 20}
    own, caches, _, connections = database.check(configuration(tmp_path, {"shared": shared, "workers": 2}))
    assert (own.state, own.message.rpartition(", ")[2]) == ("ok", f"schema {VERSION}")
    assert (caches.subject, caches.state) == (f"{own.subject} (caches)", "ok")
    assert caches.message.endswith(", no tables yet")
    assert connections.message == "takes 60 connections, and this server has up to 120"


@pytest.mark.clients
async def test_a_database_that_is_not_well(
    examine: Examine, upstream: Upstream, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres_server.database()
    PostgresRecords(url).close()
    monkeypatch.setattr(database, "MAX_SKEW", -1.0)
    found = await examine(upstream.url, {"shared": {"records": url, "connections": 50}, "workers": 2})
    # Servers of tests do not wait for the disk.
    assert found.one("durability").advice == "set fsync and full_page_writes to on"
    assert found.one("connections").message == "takes 60 connections, and this server has up to 150"
    assert [each.subject for each in found.all("clock")][:1] == [found.one("database").subject]
    with psycopg.connect(url) as other:
        other.execute("UPDATE entrepot_schema SET version = 9")
    check = (await examine(upstream.url, {"shared": {"records": url}})).one("database")
    assert (check.state, check.message) == (
        "failed",
        f"has schema 9, and this version knows schema {VERSION}",
    )


@pytest.mark.parametrize(
    ("url", "says"),
    [("postgresql://a:hunter2@127.0.0.1:1/x", "refused"), ("postgresql://a:hunter 2@h/x", "no valid URL")],
)
async def test_a_database_that_is_not_there(
    examine: Examine, upstream: Upstream, url: str, says: str
) -> None:
    check = (await examine(upstream.url, {"shared": {"records": url}})).one("database")
    assert check.state == "failed"
    assert says in check.message
    assert "hunter" not in f"{check}"
