"""The namespace `*`: any registry of a list, from the first request on, within bounds."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.admin.local_operations import LocalOperations
from proxy.namespaces import caches
from proxy.namespaces.composition import compose
from proxy.namespaces.references import FieldInvalid
from proxy.processes.server_processes import ServerProcesses
from proxy.processes.state import state_of
from proxy.telemetry import metrics
from storage.errors import NameUnknown, Unavailable, Unsupported
from storage.oci import Digest
from tests.conftest import Clock, Serve, Site, configuration
from tests.processes import Place, place
from tests.upstream import Basic, Hold, Image, Upstream

__all__ = ["place"]  # a fixture

PATH = "/v2/team/app/manifests/1"


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    """A second registry."""
    async with Upstream() as registry:
        yield registry


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("team/app", "1", (b"one", b"two"))


def host(upstream: Upstream, name: str = "127.0.0.1") -> str:
    return upstream.url.replace("127.0.0.1", name).removeprefix("http://")


def every(*hosts: str, options: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """Further namespaces of a configuration: only `*`."""
    return {"*": {"upstream": {"hosts": list(hosts), **(options or {})}, "revalidate_timeout": "1h", **keys}}


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Addresses of names, which a test adds."""
    names: dict[str, str] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **options: Any) -> Any:
        return real(names.get(host, host), *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return names


async def pull(site: Site, image: Image, before: str = "", query: str = "") -> None:
    """The image in full, as clients pull it."""
    status, _, content = await site.get(f"/v2/{before}team/app/manifests/1{query}")
    assert (status, content) == (200, image.content)
    for digest in (image.config, *image.layers):
        status, _, content = await site.get(f"/v2/{before}team/app/blobs/{digest}{query}")
        assert status == 200 and Digest.of(content) == digest
        await site.app.composition.fills.ended(Digest.parse(digest))


async def test_by_path_and_by_ns(serve: Serve, upstream: Upstream, other: Upstream, image: Image) -> None:
    second = other.image("team/app", "1", (b"three",))
    site = await serve("http://127.0.0.1:9", more=every(upstream.url, f"http://{host(other, 'localhost')}"))
    await pull(site, image, f"{host(upstream)}/")
    await pull(site, second, query=f"?ns={host(other, 'LOCALHOST')}")
    await pull(site, second, f"{host(other, 'LocalHost')}/")
    await pull(site, second, query=f"?ns={host(other, 'localhost.')}")
    assert site.app.composition.caches.keys() - {"docker.io"} == {host(upstream), host(other, "localhost")}
    for each in (upstream, other):
        each.clear()
    await pull(site, image, query=f"?ns={host(upstream)}")
    status, _, content = await site.get(f"/{host(upstream)}{PATH}")  # a mirror with a path
    assert (status, content) == (200, image.content)
    assert (upstream.log, other.log) == ([], [])
    status, _, content = await site.get("/v2/_catalog")
    names = [f"{host(upstream)}/team/app", f"{host(other, 'localhost')}/team/app"]
    assert json.loads(content)["repositories"] == sorted(names)


@pytest.mark.parametrize("text", ["127.0.0.1:9", "quay.io", "sub.localhost", "10.0.0.1", "[::1]:5000", "*"])
async def test_what_is_not_listed(serve: Serve, upstream: Upstream, text: str) -> None:
    site = await serve(upstream, more=every("*.example.test", upstream.url))
    status, _, content = await site.get(f"{PATH}?ns={text}")
    assert (status, json.loads(content)["errors"][0]["code"]) == (404, "NAME_UNKNOWN")
    assert "not a configured namespace" in json.loads(content)["errors"][0]["message"]
    assert upstream.log == []
    assert list(site.app.composition.caches) == ["docker.io"]


async def test_a_name_that_resolves_to_a_private_address(
    serve: Serve, upstream: Upstream, image: Image, resolved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = upstream.url.rpartition(":")[2]
    name = f"app.example.test:{port}"
    resolved["app.example.test"] = "127.0.0.1"
    site = await serve("http://127.0.0.1:9", more=every(f"http://*.example.test:{port}"))
    status, _, content = await site.get(f"{PATH}?ns={name}")
    assert status == 502
    assert "private address" in json.loads(content)["errors"][0]["message"]
    assert upstream.log == []
    # The same connection to an address that is not private.
    monkeypatch.setattr("proxy.upstream.transport.is_private", lambda address: False)
    site = await serve("http://127.0.0.1:9", more=every(f"http://*.example.test:{port}"))
    await pull(site, image, f"{name}/")


@pytest.mark.parametrize(
    "name",
    [
        "127.0.0.1",
        "localhost",
        "LocalHost.",
        "127.1",
        "0.0.0.0",
        "0",
        "0x7f000001",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
        "169.254.169.254",
        "user@127.0.0.1",
    ],
)
async def test_a_pattern_for_all_reaches_no_private_address(
    serve: Serve, upstream: Upstream, name: str
) -> None:
    port = upstream.url.rpartition(":")[2]
    site = await serve("http://127.0.0.1:9", more=every("*", f"http://*:{port}"))
    async with site.session.get(f"{site.url}{PATH}", params={"ns": f"{name}:{port}"}) as response:
        assert response.status in (404, 502)
    for text in (name, name.lower(), name.removesuffix(".")):
        for path in (f"/v2/{text}:{port}/team/app/manifests/1", f"/{text}:{port}{PATH}"):
            assert (await site.get(path))[0] in (400, 404, 502)
    assert upstream.requests == []


async def test_a_name_in_the_list_may_be_private(
    serve: Serve, upstream: Upstream, image: Image, resolved: dict[str, str]
) -> None:
    port = upstream.url.rpartition(":")[2]
    name = f"app.example.test:{port}"
    resolved["app.example.test"] = "127.0.0.1"
    site = await serve("http://127.0.0.1:9", more=every("http://*.example.test:5", f"http://{name}"))
    await pull(site, image, f"{name}/")


async def test_the_host_header_chooses_none(serve: Serve, upstream: Upstream, image: Image) -> None:
    """The server's own name may match the list, and is no registry behind it."""
    hub = upstream.image("library/app", "1")
    site = await serve(upstream, more=every("*.example.test", upstream.url), library=True)
    for name in ("cache.example.test", "cache.example.test:5000", host(upstream)):
        status, _, content = await site.get("/v2/app/manifests/1", Host=name)
        assert (status, content) == (200, hub.content)
    for path in (f"{PATH}?ns=cache.example.test", "/v2/cache.example.test/team/app/manifests/1"):
        status, _, content = await site.get(path, Host="Cache.example.test")
        assert status == 404 and b"NAME_UNKNOWN" in content
    assert list(site.app.composition.caches) == ["docker.io"]


@pytest.mark.parametrize(
    "text", ["quay.test.", "Quay.test.:443", "docker.io.", "index.docker.io", "shop.test"]
)
async def test_no_spelling_gets_around_the_rules_of_another(
    serve: Serve, upstream: Upstream, image: Image, text: str
) -> None:
    """It belongs to a namespace, whose rules let nobody in."""
    more = every("*", "docker.io", "http://quay.test") | {"local": {"store": {}, "hosts": ["shop.test"]}}
    top = {"access": {"rules": []}}
    site = await serve(upstream, more=more, top=top, visibility="rules", aliases=["quay.test"])
    for path in (f"/v2/{text}/team/app/manifests/1", f"{PATH}?ns={text}", f"/{text}{PATH}"):
        assert (await site.get(path))[0] in (403, 404)
    assert upstream.log == []
    assert list(site.app.composition.caches) == ["docker.io"]


async def test_a_port_may_be_behind_another_character(serve: Serve, upstream: Upstream, image: Image) -> None:
    """Clients accept no colon there.  What is listed by such a name is that host."""
    path = host(upstream).replace(":", "_")
    site = await serve("http://127.0.0.1:9", more=every("*", upstream.url))
    await pull(site, image, f"{path}/")
    assert (await site.get(f"/{path}{PATH}"))[2] == image.content
    site = await serve("http://127.0.0.1:9", more=every(upstream.url, f"http://{path}"))
    assert (await site.get(f"/v2/{path}/team/app/manifests/1"))[0] == 502
    assert path in site.app.composition.caches


@pytest.mark.parametrize("text", ["cache.test", "cache.test.", "CACHE.test:443"])
async def test_a_server_is_no_registry_behind_itself(serve: Serve, upstream: Upstream, text: str) -> None:
    site = await serve(upstream, more=every("*.test", "*"))
    for name in ("cache.test", "Cache.test.", "cache.test:443"):
        assert (await site.get(f"{PATH}?ns={text}", Host=name))[0] == 404
    assert list(site.app.composition.caches) == ["docker.io"]


async def test_a_name_that_cannot_be_read(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, more=every("*"))
    assert (await site.get(f"{PATH}?ns=xn--0.test"))[0] == 404


async def test_it_has_the_settings_of_every(
    serve: Serve, upstream: Upstream, image: Image, clock: Clock
) -> None:
    tags = [{"match": "1", "fresh_for": "1m"}]
    more = every(upstream.url, fresh_for="forever", tags=tags, visibility="public", names="any")
    upstream.image("Team/App", "1")
    site = await serve("http://127.0.0.1:9", more=more)
    await pull(site, image, f"{host(upstream)}/")
    assert (await site.get(f"/v2/{host(upstream)}/Team/App/manifests/1"))[0] == 200
    upstream.clear()
    clock.advance(59)
    await pull(site, image, f"{host(upstream)}/")
    assert upstream.log == []
    clock.advance(1)
    await pull(site, image, f"{host(upstream)}/")
    assert [each.method for each in upstream.requests] == ["HEAD"]


async def test_what_is_stored_is_served_after_a_restart_and_offline(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    site = await serve("http://127.0.0.1:9", more=every(upstream.url))
    await pull(site, image, f"{host(upstream)}/")
    await site.app.stop()
    await upstream.stop()
    site = await serve("http://127.0.0.1:9", more=every(upstream.url, offline=True))
    await pull(site, image, f"{host(upstream)}/")
    status, _, content = await site.get(f"/v2/{host(upstream)}/team/other/manifests/1")
    assert status == 404 and b"offline" in content


# Bounds


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "IDLE", 0.0)


async def test_the_longest_unasked_makes_place(
    serve: Serve, upstream: Upstream, other: Upstream, image: Image, no_rest: None
) -> None:
    second = other.image("team/app", "1")
    more = every(upstream.url, other.url, "http://127.0.0.1:9", options={"max_hosts": 2})
    site = await serve(upstream, more=more)
    await pull(site, image, f"{host(upstream)}/")
    await pull(site, second, f"{host(other)}/")
    await pull(site, image, f"{host(upstream)}/")
    assert (await site.get("/v2/127.0.0.1:9/team/app/manifests/1"))[0] == 502
    made = site.app.composition.caches.keys() - {"docker.io"}
    assert made == {host(upstream), "127.0.0.1:9"} == site.app.composition.upstreams.keys() - {"docker.io"}
    other.clear()
    await pull(site, second, f"{host(other)}/")  # it is made again, with what is stored
    assert other.log == []


async def test_those_in_use_make_no_place(
    serve: Serve, upstream: Upstream, image: Image, no_rest: None
) -> None:
    site = await serve(upstream, more=every(upstream.url, "*.test", options={"max_hosts": 1}))
    hold = Hold(asyncio.Event())
    upstream.next("GET", image.layers[0], hold)
    held = asyncio.create_task(site.get(f"/v2/{host(upstream)}/team/app/blobs/{image.layers[0]}"))
    await hold.reached.wait()
    status, headers, content = await site.get("/v2/other.test/team/app/manifests/1")
    assert status == 503
    assert "max_hosts" in json.loads(content)["errors"][0]["message"] and "Retry-After" in headers
    hold.gate.set()
    assert (await held)[0] == 200
    await site.app.composition.fills.ended(Digest.parse(image.layers[0]))
    assert (await site.get("/v2/other.test/team/app/manifests/1"))[0] == 502
    assert site.app.composition.caches.keys() == {"docker.io", "other.test"}


async def test_one_just_asked_for_makes_no_place(tmp_path: Path, clock: Clock) -> None:
    more = every("a.test", "b.*", "d.test", options={"max_hosts": 1})
    config = configuration(tmp_path, {"disk": {"path": str(tmp_path / "disk")}, "namespaces": more})
    parts = compose(config, clock)
    try:
        parts.namespaces.prepare("a.test")
        with pytest.raises(Unavailable, match=r"b\.test must wait"):
            parts.namespaces.prepare("b.test")
        with pytest.raises(NameUnknown):
            parts.namespaces.prepare("c.test")
        parts.namespaces.prepare("a.test")
        assert list(parts.caches) == ["a.test"]
        parts.namespaces.prepare("d.test")  # as the list says
        assert list(parts.caches) == ["a.test", "d.test"]
    finally:
        await parts.close()


async def test_names_that_are_made_up_keep_no_place(
    serve: Serve, upstream: Upstream, other: Upstream, image: Image
) -> None:
    second = other.image("team/app", "1")
    more = every(upstream.url, other.url, "*.test", options={"max_hosts": 2})
    site = await serve(upstream, more=more)
    await pull(site, image, f"{host(upstream)}/")
    for name in ("a.test", "b.test", "c.test"):
        assert (await site.get(f"{PATH}?ns={name}"))[0] == 502
    assert site.app.composition.caches.keys() == {"docker.io", host(upstream), "c.test"}
    await pull(site, second, f"{host(other)}/")
    assert site.app.composition.caches.keys() == {"docker.io", host(upstream), host(other)}


async def test_metrics_have_a_bound(
    serve: Serve, upstream: Upstream, other: Upstream, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.image("team/app", "1")
    monkeypatch.setattr(metrics, "NAMESPACES", 2)
    site = await serve(upstream, more=every(upstream.url, other.url))
    await pull(site, image, f"{host(upstream)}/")
    assert (await site.get(f"/v2/{host(other)}/team/app/manifests/1"))[0] == 200
    lines = (await site.metrics()).splitlines()
    assert [each for each in lines if f'namespace="{host(upstream)}"' in each]
    assert not [each for each in lines if host(other) in each]
    assert 'entrepot_requests_total{kind="manifest",namespace="*",result="miss"} 1.0' in lines


# Limits hold for all hosts together


async def test_a_limit_of_storage_and_what_is_kept(tmp_path: Path, clock: Clock) -> None:
    for offline in (False, True):
        namespaces = every("a.test", "b.test", cache_limit="25B", offline=offline)
        namespaces["own.test"] = {"upstream": "https://own.test"}
        tree = {"disk": {"path": str(tmp_path / str(offline)), "min_free": 0}, "namespaces": namespaces}
        parts = compose(configuration(tmp_path, tree), clock)
        try:
            digests = {}
            for name in ("a.test", "b.test", "own.test", "gone.test"):
                content = name.rjust(20).encode()
                digest = digests[name] = Digest.of(content)
                upload = parts.store.files.create()
                await upload.write(content)
                await upload.commit(digest)
                await parts.store.link(f"{name}/app", digest)
            assert parts.maintenance.eviction.over() == 15
            report = parts.maintenance.eviction.shrink()
            left = {name for name, digest in digests.items() if parts.store.holds(digest)}
            assert report.blobs == (0 if offline else 1)
            assert left >= {"own.test", "gone.test"}
            assert len(left) == 4 - report.blobs
        finally:
            await parts.close()


# Access


async def test_callers_see_what_the_registry_shows_them(
    serve: Serve, upstream: Upstream, other: Upstream, image: Image, no_rest: None
) -> None:
    upstream.auth = Basic("me", "secret")
    other.image("team/app", "1")
    options = {"max_hosts": 1, "username": "me", "password": "secret"}
    more = every(upstream.url, other.url, visibility="caller", options=options)
    site = await serve("http://127.0.0.1:9", more=more)
    me = {"Authorization": "Basic bWU6c2VjcmV0"}
    path = f"{PATH}?ns={host(upstream)}"
    assert (await site.get(path))[0] == 401
    assert (await site.get(f"/v2/?ns={host(upstream)}"))[0] == 401
    assert (await site.get(path, **me))[0] == 200
    assert (await site.get(f"{PATH}?ns={host(other)}"))[0] == 200  # in its place
    assert (await site.get(path))[0] == 401
    assert (await site.get(path, **me))[0] == 200


async def test_rules_apply_by_name(serve: Serve, upstream: Upstream, other: Upstream, image: Image) -> None:
    other.image("team/app", "1")
    rules = [{"who": ["anonymous"], "may": ["pull"], "where": [f"{host(upstream)}/*"]}]
    more = every(upstream.url, other.url, visibility="rules")
    site = await serve("http://127.0.0.1:9", more=more, top={"access": {"rules": rules}})
    await pull(site, image, query=f"?ns={host(upstream)}")
    assert (await site.get(f"{PATH}?ns={host(other)}"))[0] == 403
    assert other.log == []


# Operators


async def test_operators_name_such_a_registry(tmp_path: Path, upstream: Upstream, image: Image) -> None:
    tree = {
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": every(upstream.url, tags=[{"match": "1", "fresh_for": "3m"}], keep_for="9d"),
    }
    parts = compose(configuration(tmp_path, tree))
    operations = LocalOperations(parts, ServerProcesses(state_of(parts), None))
    name = f"{host(upstream)}/team/app"
    try:
        warmed = await operations.warm(f"{name}:1")
        assert (warmed.repository, warmed.digest) == (name, image.digest)
        why = await operations.why(f"{host(upstream, '127.0.0.1')}/team/app:1")
        assert (why.namespace, why.verdict, why.complete) == (host(upstream), "hit", True)
        assert (why.fresh_rule, why.fresh_for) == ("namespaces.*.tags[0]", 180)
        assert (why.keep_rule, why.keep_for) == ("namespaces.*.keep_for", 9 * 86400)
        assert [each.url for each in why.upstreams] == [upstream.url]
        listed = await operations.images(host(upstream))
        assert [(each.repository, each.tag, each.complete) for each in listed.images] == [(name, "1", True)]
        assert parts.is_cache(host(upstream)) and parts.is_cache("*") and not parts.is_cache("a.test")
        with pytest.raises(Unsupported, match="is a cache"):
            await operations.delete(f"{name}:1")
        with pytest.raises(FieldInvalid, match="not a configured cache"):
            await operations.begin_drill(9, ["a.test"])
        purged = await operations.purge(f"{name}:1")
        assert purged.manifests == 1
    finally:
        await operations.close()
        await parts.close()


def test_a_file_that_is_missing_stops_the_start(tmp_path: Path) -> None:
    from proxy.config.errors import StartError

    more = every("a.test", options={"ca_file": "/nonexistent/ca.pem"})
    tree = {"disk": {"path": str(tmp_path / "disk")}, "namespaces": more}
    with pytest.raises(StartError, match=r"namespaces\.\*\.upstream: /nonexistent/ca\.pem: No such file"):
        compose(configuration(tmp_path, tree))


# A server of several processes


@pytest.mark.clients
async def test_all_workers_and_after_a_reload(place: Place, upstream: Upstream, image: Image) -> None:
    place.tree |= {"namespaces": every("http://127.0.0.1:9"), "drain": "0s"}
    server = await place.start()
    path = f"{PATH}?ns={host(upstream)}"
    for worker in await server.workers():
        await worker.get(path, status=404)
    place.tree["namespaces"] = every(upstream.url)
    place.configure()
    old = server.pids()
    server.send(signal.SIGHUP)
    await server.heard("config.reloaded")
    await server.gone(*old)
    for worker in await server.workers():
        assert await worker.get(path) == image.content
        assert await worker.get(f"/v2/team/app/blobs/{image.layers[0]}?ns={host(upstream)}") == b"one"
    assert upstream.log.count(f"GET blob team/app@{image.layers[0]:.19}") == 1
    assert await server.metric("entrepot_requests_total", namespace=host(upstream), kind="manifest") == 2
