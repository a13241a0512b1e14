"""Servers with extensions: what these do for them, and what is answered while they fail."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest
from structlog.testing import LogCapture

from proxy.config.effective import differences, effective
from proxy.config.errors import ConfigError, StartError
from proxy.config.extensions import ExtensionConfig
from proxy.config.loader import load
from proxy.extensions.extension import ExtensionFailed, Extensions
from proxy.extensions.kinds import GROUPS
from proxy.extensions.protocols import (
    ClientRequest,
    ConditionResult,
    HostLogin,
    JudgedManifest,
    OfferedBlob,
    OfferedManifest,
    RequestRefusal,
    ResponseHeaders,
)
from proxy.telemetry.metrics import Metrics
from proxy.upstream.extended import ExtendedUpstream
from proxy.web.hits import Hits
from storage.oci import OCI_MANIFEST, Digest
from tests.conftest import Clock, Serve, Site, configuration
from tests.events import Ear
from tests.extensions import (
    MISBEHAVIOURS,
    RELEASE,
    Misbehaving,
    Package,
    package,  # noqa: F401
    released,  # noqa: F401
)
from tests.test_push import Client, image
from tests.upstream import Basic, Status, Upstream
from tests.wire import connect

HERE = "tests.test_extended"
# Those of each sort: the others differ only in words.
WAYS = ["raise", "exit", "cancel itself", "hang", "block its thread", "return something else"]


def extension(kind: str, how: str = "well", times: int = 1_000_000, **keys: Any) -> dict[str, Any]:
    late = MISBEHAVIOURS.get(how, (None, ""))[1].startswith("did not")
    timeout = {"timeout": "100ms"} if late else {}
    return {"kind": kind, "use": "one", "settings": {"how": how, "times": times}, **timeout, **keys}


async def ready(site: Site) -> dict[str, str]:
    async with site.session.get(site.app.admin_url / "readyz") as response:  # type: ignore[operator]
        assert response.status == 200
        found: dict[str, str] = json.loads(await response.read())
        return found


async def listed(site: Site) -> list[dict[str, Any]]:
    async with site.session.get(site.app.admin_url / "api/v1/extensions") as response:  # type: ignore[operator]
        found: list[dict[str, Any]] = json.loads(await response.read())
        return [each for each in found if each["package"] in ("others-package", "not installed")]


# The configuration


SINK, HOOK, LOGIN = {"kind": "event_sink"}, {"name": "w", "extension": "a"}, {"password": "p"}


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"extensions": {"a": {}}}, "extensions.a.kind: is required"),
        ({"extensions": {"a": {"kind": "sink"}}}, "extensions.a.kind: expected one of credential_provider"),
        ({"extensions": {"a": {"kind": "event_sink", "settings": 3}}}, "settings: expected a mapping"),
        ({"extensions": {"a": {"kind": "event_sink", "use": "X Y"}}}, "a.use: expected a lower-case word"),
        ({"extensions": {"A": SINK}}, "extensions.A: expected a lower-case word"),
        ({"extensions": {"a": SINK}}, "a: is used nowhere: name it in webhooks[]"),
        ({"webhooks": [HOOK]}, "extension: extensions has no a: add it"),
        ({"webhooks": [{"name": "w"}]}, "webhooks[0]: needs one of url, such as"),
        (
            {"webhooks": [{"name": "w", "extension": "ab"}], "extensions": {"abc": SINK}},
            "webhooks[0].extension: extensions has no ab; did you mean abc?",
        ),
        (
            {"webhooks": [HOOK], "extensions": {"a": {"kind": "credential_provider"}}},
            "webhooks[0].extension: extensions.a is a credential_provider, not a event_sink",
        ),
        (
            {"webhooks": [{"name": "w", "extension": "a", "secret": "s"}], "extensions": {"a": SINK}},
            "webhooks[0]: secret is for a url, and this webhook has an extension",
        ),
        (
            {"webhooks": [{"name": "w", "extension": "a", "headers": {"b": "c"}}]},
            "webhooks[0]: headers is for a url, and this webhook has an extension",
        ),
        (
            {"namespaces": {"x": {"upstream": {"url": "http://127.0.0.1:1", "credential_provider": "v"}}}},
            "namespaces.x.upstream.credential_provider: extensions has no v: add it",
        ),
        (
            {
                "namespaces": {
                    "x": {
                        "upstream": {
                            "url": "http://127.0.0.1:1",
                            "credentials": [{"username": "u", "password": "p"}, {"credential_provider": "v"}],
                        }
                    }
                }
            },
            "namespaces.x.upstream.credentials[1].credential_provider: extensions has no v",
        ),
        (
            {"namespaces": {"x": {"upstream": {"url": "http://a", "credential_provider": "v", **LOGIN}}}},
            "namespaces.x.upstream: password and credential_provider exclude each other",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_configuration(tmp_path: Path, tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configuration(tmp_path, tree)
    assert says in str(refused.value)


def test_settings_are_any_keys_and_shown_nowhere(tmp_path: Path) -> None:
    settings = {"password": "hunter2", "list": [1, {"a": "hunter2"}]}
    tree = {
        "extensions": {"a": {"kind": "event_sink", "settings": settings}},
        "webhooks": [{"name": "w", "extension": "a"}],
    }
    config = configuration(tmp_path, tree)
    assert config.extensions["a"].settings == settings
    assert "hunter2" not in repr(config)


def top_of(kind: str, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys at the top, and of the upstream, with which the extension `mine` is used."""
    top: dict[str, Any] = {"extensions": {"mine": extension(kind, **settings)}}
    if kind == "event_sink":
        top["webhooks"] = [{"name": "told", "extension": "mine", "actions": ["push"], "backoff": "1ms"}]
    if kind == "policy_condition":
        rule = {"name": "labelled", "action": "allow", "conditions": ["mine"]}
        top["policy"] = {"rules": [rule]}
    if kind == "storage":
        top["shared"] = {"bucket": "extension://mine"}
        top["namespaces"] = {"local": {"store": {}}}
    if kind == "upstream":
        top["namespaces"] = {"docker.io": {"upstream": {"extension": "mine"}, "revalidate_timeout": "1h"}}
    return top, {"credential_provider": "mine"} if kind == "credential_provider" else {}


def test_the_configuration_is_shown_without_settings(tmp_path: Path) -> None:
    path = tmp_path / "entrepot.yml"
    path.write_text("extensions: {a: {kind: middleware, settings: {password: hunter2, list: [hunter2]}}}")
    shown = {each.key: each.value for each in effective(path, {}) if each.key.startswith("extensions")}
    assert shown["extensions.a.settings"] == "***"
    assert shown["extensions.a.kind"] == "middleware"
    other = tmp_path / "other.yml"
    other.write_text("extensions: {a: {kind: middleware, settings: {password: other, list: [hunter2]}}}")
    (found,) = differences(path, other)
    assert (found.key, found.old, found.new) == ("extensions.a.settings", "***", "***")
    given = {"ENTREPOT_EXTENSIONS__A__SETTINGS__PASSWORD": "set"}
    assert load(path, given).extensions["a"].settings == {"password": "set", "list": ["hunter2"]}


@pytest.mark.parametrize("kind", GROUPS)
async def test_a_broken_one_keeps_the_server_from_starting(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
    kind: str,
) -> None:
    package.offer(kind, "one", "nowhere:Class")
    top, options = top_of(kind)
    says = r"extensions\.mine: one of others-package 1\.2: raised ModuleNotFoundError: No module"
    with pytest.raises(StartError, match=says):
        await serve(upstream, top=top, options=options)


# Credential providers


class Logins(Misbehaving):
    async def get(self, host: str, repository: str) -> Any:
        return await self.act(HostLogin("user", "secret"), host, repository)


@pytest.fixture
async def private() -> Any:
    async with Upstream(auth=Basic("user", "secret")) as registry:
        yield registry


async def test_a_provided_login_is_used_and_kept(
    serve: Serve,
    private: Upstream,
    package: Package,  # noqa: F811
) -> None:
    package.offer("credential_provider", "one", f"{HERE}:Logins")
    contents = [b"first", b"second"]
    digests = [private.blob("library/app", each) for each in contents]
    top = {"extensions": {"mine": extension("credential_provider")}}
    site = await serve(private, top=top, options={"credential_provider": "mine"})
    for digest, content in zip(digests, contents, strict=True):
        status, _, body = await site.get(f"/v2/library/app/blobs/{digest}")
        assert (status, body) == (200, content)
    assert Logins.made[-1].calls == [(private.url.removeprefix("http://"), "library/app")]
    (row,) = await listed(site)
    assert row["used_by"] == ["namespaces.docker.io.upstream.credential_provider"]
    assert (row["name"], row["entry_point"], row["version"]) == ("mine", "one", "1.2")
    assert (row["state"], row["calls"], row["failures"]) == ("in use", 1, 0)
    assert await ready(site) == {"status": "ready"}


@pytest.mark.errors("extension.failed")
@pytest.mark.parametrize("how", WAYS)
async def test_a_provider_that_fails(
    serve: Serve,
    private: Upstream,
    package: Package,  # noqa: F811
    events: LogCapture,
    clock: Clock,
    how: str,
) -> None:
    package.offer("credential_provider", "one", f"{HERE}:Logins")
    digest = private.blob("library/app", b"content")
    top = {"extensions": {"mine": extension("credential_provider", how)}}
    site = await serve(private, top=top, options={"credential_provider": "mine"})
    for _ in range(2):
        status, headers, body = await site.get(f"/v2/library/app/blobs/{digest}")
        assert status == 503
        assert int(headers["Retry-After"]) > 0
        assert "the extension mine of this server failed" in body.decode()
        assert "RuntimeError" not in body.decode()
    found = await ready(site)
    assert found["status"] == "degraded"
    words = MISBEHAVIOURS[how][1] if how in MISBEHAVIOURS else "returned object, not HostLogin or None"
    if how in ("hang", "block its thread"):
        words = f"{words} 0.1 s"
    assert found["extensions"] == f"mine {words.partition(': ')[0]}"  # what it says may be a secret
    assert "entrepot_degraded 1.0" in await site.metrics()
    (row,) = await listed(site)
    assert (row["state"], row["failures"]) == ("failing", 1)  # it is given a rest
    assert words in row["error"]
    (event,) = [each for each in events.entries if each["event"] == "extension.failed"]
    assert (event["extension"], event["kind"]) == ("mine", "credential_provider")
    assert (await site.get("/v2/"))[0] == 200
    RELEASE.set()


@pytest.mark.errors("extension.failed")
async def test_while_it_fails_the_last_login_is_used(
    serve: Serve,
    private: Upstream,
    package: Package,  # noqa: F811
) -> None:
    package.offer("credential_provider", "one", f"{HERE}:Brief")
    top = {"extensions": {"mine": extension("credential_provider")}}
    site = await serve(private, top=top, options={"credential_provider": "mine"})
    first, second = (private.blob("library/app", each) for each in (b"first", b"second"))
    assert (await site.get(f"/v2/library/app/blobs/{first}"))[0] == 200
    Brief.made[-1].behaviour.how = "raise"
    assert (await site.get(f"/v2/library/app/blobs/{second}"))[0] == 200
    assert (await ready(site))["status"] in ("ready", "degraded")


class Brief(Misbehaving):
    async def get(self, host: str, repository: str) -> Any:
        return await self.act(HostLogin("user", "secret", valid_for=0.0), host, repository)


# Event sinks


class Sink(Misbehaving):
    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.events: list[Any] = []
        self.all = threading.Semaphore(0)  # when two have come

    async def send(self, event: Any) -> Any:
        found = await self.act(None, event)
        self.events.append(event)
        if len(self.events) == 2:
            self.all.release()
        return found


@pytest.mark.housekeeping
async def test_a_sink_is_told_of_what_its_webhook_wants(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
) -> None:
    package.offer("event_sink", "one", f"{HERE}:Sink")
    top = {
        "extensions": {"mine": extension("event_sink")},
        "webhooks": [
            {"name": "told", "extension": "mine", "actions": ["push", "delete"], "match": ["local/team/*"]}
        ],
    }
    client = Client(await serve(upstream, more={"local": {"store": {}}}, top=top))
    config = await client.blob(b"{}")
    assert (await client.manifest("v1", image())).status == 201
    mine = Sink.made[-1]
    assert await asyncio.to_thread(mine.all.acquire, timeout=20)  # type: ignore[attr-defined]
    blob, manifest = mine.events  # type: ignore[attr-defined]
    async with client.site.session.get(client.site.app.admin_url / "api/v1/webhooks") as response:  # type: ignore[operator]
        (row,) = json.loads(await response.read())
    assert (row["url"], row["format"], row["error"]) == ("extension mine", "cloudevents", None)
    assert (blob["type"], manifest["type"]) == ("entrepot.blob.pushed", "entrepot.manifest.pushed")
    assert blob["data"]["digest"] == config
    assert manifest["data"]["digest"] == Digest.of(image())
    assert manifest["subject"] == "local/team/app:v1"


@pytest.mark.housekeeping
@pytest.mark.errors("extension.failed")
@pytest.mark.parametrize("how", WAYS)
async def test_a_sink_that_fails_gets_the_event_again(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
    how: str,
) -> None:
    package.offer("event_sink", "one", f"{HERE}:Sink")
    ear = Ear()
    top = {
        "extensions": {"mine": extension("event_sink", how, times=2)},
        "webhooks": [{"name": "told", "extension": "mine", "actions": ["push"], "backoff": "1ms"}],
    }
    site = await serve(upstream, more={"local": {"store": {}}}, top=top)
    client = Client(site)
    await client.blob(b"{}")
    failing = await ear.heard("webhook.failing", webhook="told")
    assert failing["error"].startswith("extension mine")
    assert (await site.get("/v2/"))[0] == 200
    RELEASE.set()
    await ear.heard("webhook.recovered", webhook="told")
    mine = Sink.made[-1]
    await site.app.stop()
    assert len({event["id"] for (event,) in mine.calls}) == 1
    assert len(mine.calls) >= 3 if how != "block its thread" else mine.calls


# Policy conditions


class Condition(Misbehaving):
    """What is met has a config that says so."""

    async def judge(self, manifest: JudgedManifest) -> Any:
        config = json.loads(manifest.content)["config"]["digest"]
        met = self.behaviour.how == "well" and await manifest.blob(config) == b'{"good":1}'
        return await self.act(ConditionResult(met, "is good" if met else "is not good"), manifest.digest)


def images(upstream: Upstream) -> None:
    for tag in ("good", "bad"):
        config = b'{"%s":1}' % tag.encode()
        content = manifest_of(upstream.blob("library/app", config), len(config))
        upstream.manifest("library/app", content, OCI_MANIFEST, tag)


def manifest_of(config: str, size: int) -> bytes:
    described = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": size}
    return json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described, "layers": []}
    ).encode()


async def test_a_condition_decides_what_is_served(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
) -> None:
    package.offer("policy_condition", "one", f"{HERE}:Condition")
    images(upstream)
    top, _ = top_of("policy_condition")
    site = await serve(upstream, top=top)
    for _ in range(2):
        assert (await site.get("/v2/library/app/manifests/good"))[0] == 200
    status, _, body = await site.get("/v2/library/app/manifests/bad")
    assert status == 403
    assert "it is not good" in body.decode()
    assert len(Condition.made[-1].calls) == 2
    assert await ready(site) == {"status": "ready"}


async def test_what_a_condition_cannot_fetch_is_no_failure_of_it(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
) -> None:
    package.offer("policy_condition", "one", f"{HERE}:Condition")
    images(upstream)
    top, _ = top_of("policy_condition")
    site = await serve(upstream, top=top)
    upstream.next("GET", "blob", Status(503), times=10)
    status, _, body = await site.get("/v2/library/app/manifests/good")
    assert status in (502, 503)
    assert "extension" not in body.decode()
    assert await ready(site) == {"status": "ready"}


@pytest.mark.errors("extension.failed")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("mode", ["enforce", "warn"])
async def test_a_condition_that_fails(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
    how: str,
    mode: str,
) -> None:
    package.offer("policy_condition", "one", f"{HERE}:Condition")
    images(upstream)
    top, _ = top_of("policy_condition", how=how)
    top["policy"]["mode"] = mode
    site = await serve(upstream, top=top)
    status, headers, body = await site.get("/v2/library/app/manifests/good")
    if mode == "enforce":
        assert status == 503
        assert int(headers["Retry-After"]) > 0
        assert "the extension mine of this server failed" in body.decode()
    else:
        assert status == 200
        assert "cannot be verified now: the extension mine of this server failed" in headers["Warning"]
    assert (await ready(site))["status"] == "degraded"
    assert (await site.get("/v2/"))[0] == 200
    RELEASE.set()


def test_a_rule_that_denies_has_no_conditions(tmp_path: Path) -> None:
    rule = {"name": "r", "action": "deny", "reason": "x", "conditions": ["mine"]}
    with pytest.raises(ConfigError, match="rule r denies, and conditions are what it must meet"):
        configuration(tmp_path, {"policy": {"rules": [rule]}})


# Middleware


class Gate(Misbehaving):
    """Answers what the path says: the last part of the name of the repository."""

    answers: ClassVar[dict[str, Any]] = {
        "refused": RequestRefusal("not you"),
        "later": RequestRefusal("not now", retry_after=7),
        "marked": ResponseHeaders({"X-Site": "berlin"}),
    }

    async def handle(self, request: ClientRequest) -> Any:
        found = next((each for name, each in self.answers.items() if f"/{name}/" in request.path), None)
        return await self.act(found, request)


async def test_middleware_sees_each_request(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
) -> None:
    package.offer("middleware", "one", f"{HERE}:Gate")
    digest = upstream.blob("library/marked", b"content")
    upstream.blob("library/refused", b"content")
    site = await serve(upstream, top=top_of("middleware")[0])
    for _ in range(3):  # the later ones would be answered by their bytes alone
        status, headers, body = await site.get(f"/v2/library/marked/blobs/{digest}?ns=docker.io", X_Team="a")
        assert (status, body, headers["X-Site"]) == (200, b"content", "berlin")
    calls = [request for (request,) in Gate.made[-1].calls]
    assert len(calls) == 3
    assert (calls[0].method, calls[0].client) == ("GET", "127.0.0.1")
    assert (calls[0].path, calls[0].query) == (f"/v2/library/marked/blobs/{digest}", "ns=docker.io")
    assert calls[0].headers["x-team"] == "a"
    status, headers, _ = await site.get("/v2/library/marked/manifests/nothing")
    assert (status, headers["X-Site"]) == (404, "berlin")
    status, _, body = await site.get(f"/v2/library/refused/blobs/{digest}")
    assert (status, json.loads(body)["errors"][0]["code"]) == (403, "DENIED")
    assert json.loads(body)["errors"][0]["message"] == "not you"
    status, headers, body = await site.get(f"/v2/library/later/blobs/{digest}")
    assert (status, headers["Retry-After"]) == (429, "7")
    assert len(Gate.made[-1].calls) == 6


@pytest.mark.errors("extension.failed")
@pytest.mark.parametrize("how", WAYS)
async def test_middleware_that_fails_lets_nothing_through(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
    how: str,
) -> None:
    package.offer("middleware", "one", f"{HERE}:Gate")
    digest = upstream.blob("library/app", b"content")
    site = await serve(upstream, top=top_of("middleware", how=how, times=2)[0])
    for _ in range(2):
        status, headers, body = await site.get(f"/v2/library/app/blobs/{digest}")
        assert status == 503
        assert int(headers["Retry-After"]) > 0
        assert b"the extension mine of this server failed" in body
        assert (await ready(site))["status"] == "degraded"
    RELEASE.set()
    while True:  # until the thread of the extension is free
        status, _, body = await site.get(f"/v2/library/app/blobs/{digest}")
        if status == 200:
            break
        assert how in ("block its thread", "hang")
    assert body == b"content"
    assert await ready(site) == {"status": "ready"}


async def test_only_middleware_keeps_requests_from_the_short_way(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    short: list[bool] = []
    answer = Hits.answer

    def counting(self: Hits, *arguments: Any) -> bool:
        short.append(answer(self, *arguments))
        return short[-1]

    monkeypatch.setattr(Hits, "answer", counting)
    package.offer("middleware", "one", f"{HERE}:Gate")
    package.offer("event_sink", "one", f"{HERE}:Sink")
    content = manifest_of(str(Digest.of(b"{}")), 2)
    path = f"/v2/library/app/manifests/{upstream.manifest('library/app', content, OCI_MANIFEST)}"
    head = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    for kind in ("", "event_sink", "middleware"):
        top = top_of(kind)[0] if kind else {}
        site = await serve(upstream, top=top, directory=tmp_path / f"disk {kind}")
        assert (await site.get(path))[0] == 200  # a miss
        short.clear()
        async with connect(site.url) as wire:
            for _ in range(6):
                await wire.send(head)
                assert (await wire.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
                assert await wire.read(len(content)) == content
        assert (any(short), bool(short)) == ((False, False) if kind == "middleware" else (True, True)), kind


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "5"},
        {"content-type": "a"},
        {"Transfer-Encoding": "chunked"},
        {"Docker-Content-Digest": "sha256:a"},
        {"ETag": "a"},
        {"Set-Cookie": "a=b"},
        {"X-Request-Id": "1"},
        {"X Y": "a"},
        {"X-A:": "a"},
        {"": "a"},
        {"X-A": "a\r\nX-B: c"},
        {"X-A": ""},
        {"X-A": "é"},
    ],
    ids=lambda headers: repr(headers),
)
def test_headers_that_no_extension_adds(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"header|printable"):
        ResponseHeaders(headers)


# Upstreams

CONTENT = b"0123456789" * 100_000
IMAGE = manifest_of(str(Digest.of(b"{}")), 2)


class Source(Misbehaving):
    """Has a blob and a manifest; `sent` is what it sends of the blob."""

    sent: ClassVar[bytes] = CONTENT

    async def manifest(self, repository: str, reference: str) -> Any:
        known = repository == "library/app" and reference in ("latest", str(Digest.of(IMAGE)))
        return await self.act(OfferedManifest(OCI_MANIFEST, IMAGE) if known else None, reference)

    async def blob(self, repository: str, digest: str, start: int) -> Any:
        known = (repository, digest) == ("library/app", str(Digest.of(CONTENT)))
        found = OfferedBlob(len(CONTENT), self.read(start)) if known else None
        return await self.act(found, digest, start)

    async def read(self, start: int) -> Any:
        for position in range(start, len(self.sent), 65536):
            yield self.sent[position : position + 65536]

    async def tags(self, repository: str) -> Any:
        return await self.act(["latest", "1.0"] if repository == "library/app" else None)


class Short(Source):
    sent = CONTENT[:-1]


class Long(Source):
    sent = CONTENT + b"x"


class Wrong(Source):
    sent = CONTENT[:-1] + b"x"


class Breaking(Source):
    async def read(self, start: int) -> Any:
        if start == 0:  # else each attempt would bring some more
            yield CONTENT[:10]
        raise SystemExit(9)


class Another(Source):
    async def manifest(self, repository: str, reference: str) -> Any:
        return OfferedManifest(OCI_MANIFEST, b"{}")


BLOB = f"/v2/library/app/blobs/{Digest.of(CONTENT)}"


async def sourced(serve: Serve, package: Package, made: str = "Source", **settings: Any) -> Site:  # noqa: F811
    package.offer("upstream", "one", f"{HERE}:{made}")
    return await serve("http://127.0.0.1:1", top=top_of("upstream", **settings)[0])


async def test_an_upstream_fills_a_cache(serve: Serve, package: Package) -> None:  # noqa: F811
    site = await sourced(serve, package)
    for _ in range(2):
        for reference in ("latest", Digest.of(IMAGE)):
            status, headers, body = await site.get(f"/v2/library/app/manifests/{reference}")
            assert (status, headers["Content-Type"], body) == (200, OCI_MANIFEST, IMAGE)
        status, _, body = await site.get(BLOB)
        assert (status, body) == (200, CONTENT)
    assert [each for each in Source.made[-1].calls if len(each) == 2] == [(str(Digest.of(CONTENT)), 0)]
    status, _, body = await site.get("/v2/library/app/tags/list")
    assert json.loads(body)["tags"] == ["1.0", "latest"]
    assert (await site.get("/v2/library/app/manifests/nothing"))[0] == 404
    assert (await site.get(f"/v2/library/app/blobs/{Digest.of(b'nothing')}"))[0] == 404
    assert (await site.get("/v2/library/other/tags/list"))[0] == 404
    assert await ready(site) == {"status": "ready"}


async def test_an_upstream_is_asked_for_a_part(serve: Serve, package: Package) -> None:  # noqa: F811
    site = await sourced(serve, package)
    status, headers, body = await site.get(BLOB, Range="bytes=500000-500009")
    assert (status, body) == (206, b"0123456789")
    assert headers["Content-Range"] == f"bytes 500000-500009/{len(CONTENT)}"
    assert (await site.get(BLOB))[2] == CONTENT


@pytest.mark.errors("extension.failed")
@pytest.mark.parametrize("how", WAYS)
async def test_an_upstream_that_fails(serve: Serve, package: Package, how: str) -> None:  # noqa: F811
    site = await sourced(serve, package, how=how, times=1)
    status, _, body = await site.get(BLOB)
    assert status == 503
    assert b"the extension mine of this server failed" in body
    assert (await ready(site))["status"] == "degraded"
    RELEASE.set()
    while status != 200:  # until its thread is free, and it has failed for the last time
        status, _, body = await site.get(BLOB)
        assert status in (200, 503)
    assert body == CONTENT
    assert await ready(site) == {"status": "ready"}


@pytest.mark.errors("extension.failed")
@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("Short", f"ended {Digest.of(CONTENT)} at byte 999999 of 1000000"),
        ("Long", f"sent more of {Digest.of(CONTENT)} than its 1000000 bytes"),
        ("Breaking", "raised SystemExit: 9"),
    ],
)
async def test_a_blob_that_does_not_come_whole(package: Package, made: str, says: str) -> None:  # noqa: F811
    package.offer("upstream", "one", f"{HERE}:{made}")
    extensions = Extensions({"mine": ExtensionConfig(kind="upstream", use="one", timeout=20.0)})
    upstream = ExtendedUpstream("x", extensions.make("mine"), Metrics())
    blob = await upstream.get_blob("library/app", Digest.of(CONTENT))
    with pytest.raises(ExtensionFailed, match=says):
        _ = [chunk async for chunk in blob.chunks()]
    await blob.close()
    await extensions.close()


@pytest.mark.errors("upstream.wrong_digest", "fill.failed")
async def test_a_blob_of_other_bytes_is_not_kept(serve: Serve, package: Package) -> None:  # noqa: F811
    site = await sourced(serve, package, "Wrong")
    body = b""
    with suppress(aiohttp.ClientError):
        _, _, body = await site.get(BLOB)
    assert body != CONTENT
    assert site.app.composition.store.linked("docker.io/library/app", Digest.of(CONTENT)) is None


@pytest.mark.errors("extension.failed")
async def test_a_manifest_that_is_another(serve: Serve, package: Package) -> None:  # noqa: F811
    site = await sourced(serve, package, "Another")
    status, _, _ = await site.get(f"/v2/library/app/manifests/{Digest.of(IMAGE)}")
    assert status == 503
    assert "returned sha256:" in (await ready(site))["extensions"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"url": "https://a.example"}, "url is for a registry at a url, and this upstream is an extension"),
        ({"username": "u", "password": "p"}, "username is for a registry at a url"),
        ({"bandwidth": "1MiB"}, "bandwidth is for a registry at a url"),
    ],
)
def test_an_upstream_of_an_extension_has_no_connection(tmp_path: Path, keys: Any, says: str) -> None:
    upstream = {"extension": "mine", **keys}
    with pytest.raises(ConfigError, match=re.escape(says)):
        configuration(tmp_path, {"namespaces": {"x": {"upstream": upstream}}})
