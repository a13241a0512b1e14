"""The admin listener: health for whoever restarts it, readiness for whoever sends it clients, and the API.

Every answer of the API that a test here gets is held against openapi.yaml.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp_cache.backends
import jsonschema
import pytest
import yaml
from aiohttp.test_utils import TestClient, TestServer

from proxy.admin import (
    activity_reports,
    extension_reports,
    key_reports,
    models,
    policy_reports,
    reports,
    tag_reports,
)
from proxy.admin.api.app import OPEN, SUMMARIES, application
from proxy.admin.api.routes import SUMMARY
from proxy.namespaces.composition import compose
from proxy.processes import rows
from proxy.telemetry.metrics import Metrics
from proxy.transfer import results
from storage.errors import StorageFailed, Unavailable
from tests.conftest import Clock, Serve, configuration
from tests.test_operations import ALPINE, OTHER, Everybody, LocalOperations, Site
from tests.upstream import Upstream

Open = Callable[..., Awaitable["Admin"]]
# By the parser in C, if there is one: the other takes 200 ms.
SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DOCUMENT = yaml.load(files("proxy.admin.api").joinpath("openapi.yaml").read_text(), SAFE_LOADER)


class Admin:
    """A client of the listener."""

    def __init__(self, client: TestClient, site: Site) -> None:  # type: ignore[type-arg]
        self.client = client
        self.site = site

    async def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON and headers; names in `headers` have _ for -."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        async with self.client.request(method, path, data=data, headers=given) as response:
            assert response.headers["Content-Type"] == "application/json"
            found = await response.json()
            if path.startswith("/api/"):
                conforms(method, path, response.status, found)
            return response.status, found, response.headers

    async def get(self, path: str, **headers: str) -> Any:
        status, found, _ = await self.ask("GET", path, **headers)
        assert status == 200, found
        return found

    async def post(self, path: str, **fields: object) -> Any:
        status, found, _ = await self.ask("POST", path, fields)
        assert status in (200, 202), found
        return found


def conforms(method: str, path: str, status: int, found: object) -> None:
    """To the schema of the answer of that status."""
    validator(method, path.partition("?")[0], status).validate(found)


@cache
def validator(method: str, path: str, status: int) -> jsonschema.Draft202012Validator:
    operation = DOCUMENT["paths"].get(path, {}).get(method.lower(), {})
    responses = operation.get("responses", {"default": {"$ref": "#/components/responses/Error"}})
    response = responses.get(str(status), responses["default"])
    if "$ref" in response:
        assert status >= 400, f"{status} of {method} {path} is not in openapi.yaml"
        response = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    schema = response["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]})


@pytest.fixture
async def admin(tmp_path: Path, clock: Clock) -> AsyncIterator[Open]:
    clients = []
    tree = {
        "disk": {"path": str(tmp_path / "disk"), "min_free": 0},
        "namespaces": {"docker.io": {"upstream": "http://127.0.0.1:9", "library": True}},
    }
    composition = compose(configuration(tmp_path, tree), clock)

    async def start(
        state: Mapping[str, str] | None = None, token: str | None = None, loopback: bool = True
    ) -> Admin:
        async def told() -> Mapping[str, str]:
            return state or {"status": "ready"}

        everyone = Everybody()
        operations = LocalOperations(composition, everyone)
        server = TestServer(application(Metrics(), told, operations, token=token, loopback=loopback))
        client = TestClient(server)
        clients.append(client)
        await client.start_server()
        return Admin(client, Site(composition, everyone, operations))

    yield start
    for client in clients:
        await client.close()
    await composition.close()


# Health and metrics


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ({"status": "ready"}, 200),
        ({"status": "degraded", "store": "/x: No space left on device"}, 200),
        ({"status": "draining"}, 503),
    ],
)
async def test_readiness(admin: Open, state: Mapping[str, str], status: int) -> None:
    site = await admin(state)
    assert (await site.ask("GET", "/readyz"))[:2] == (status, state)
    assert (await site.client.head("/readyz")).status == status
    # Alive it is in any case: a restart would mend none of these.
    assert (await site.ask("GET", "/healthz"))[:2] == (200, {"status": "alive"})


@pytest.mark.parametrize("path", ["/", "/metric", "/v2/", "/metrics/", "/healthz/x", "/api/", "/api/v1/x"])
async def test_other_paths_are_404_in_json(admin: Open, path: str) -> None:
    found = await (await admin()).ask("GET", path)
    assert found[:2] == (404, {"error": "Not Found", "code": "PATH_UNKNOWN"})


@pytest.mark.parametrize(
    ("path", "allowed"), [("/metrics", {"GET", "HEAD"}), ("/api/v1/pins", {"DELETE", "GET", "HEAD", "POST"})]
)
async def test_other_methods_are_405_in_json(admin: Open, path: str, allowed: set[str]) -> None:
    status, found, headers = await (await admin()).ask("PUT", path, {})
    assert (status, found) == (405, {"error": "Method Not Allowed", "code": "UNSUPPORTED"})
    assert set(headers["Allow"].split(",")) == allowed


async def test_metrics_are_in_the_format_of_prometheus(admin: Open) -> None:
    response = await (await admin()).client.get("/metrics")
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    assert "# HELP entrepot_requests_total Client requests." in await response.text()


async def test_it_is_a_listener_of_its_own(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    assert site.app.admin_url is not None
    assert (await site.get("/metrics"))[0] == 404
    assert (await site.get("/api/v1/fills"))[0] == 404
    async with site.session.get(site.app.admin_url / "v2/") as response:
        assert response.status == 404


async def test_off(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, top={"admin": "off"})
    assert site.app.admin_url is None
    assert (await site.get("/v2/"))[0] == 200


# The document


async def test_every_route_is_in_the_document_and_the_reverse(admin: Open) -> None:
    router = (await admin()).client.server.app.router  # type: ignore[union-attr]
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in router.routes()
        if route.resource is not None and route.resource.canonical not in OPEN and route.method != "HEAD"
    }
    documented = {(method, path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert routes == documented


async def test_the_document_is_served(admin: Open) -> None:
    found = await (await admin()).get("/api/v1/openapi.json")
    assert found == DOCUMENT
    assert found["openapi"].startswith("3.1.")


def test_every_schema_is_that_of_its_struct() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    kinds = [
        each
        for module in (
            models,
            policy_reports,
            reports,
            activity_reports,
            tag_reports,
            key_reports,
            extension_reports,
            rows,
        )
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__
    ]
    structs = {each.__name__: each for each in kinds if each not in (rows.Model, rows.ReplicaModel)}
    told = (
        results.BundleImported,
        results.BoundRow,
        results.Exported,
        results.CarriedRow,
        results.IncompleteRow,
    )
    structs |= {each.__name__: each for each in told}
    assert set(schemas) - {"Error", "Platforms", "Replica"} == set(structs)
    for name, struct in structs.items():
        assert list(schemas[name]["properties"]) == list(struct.__struct_fields__), name
        assert schemas[name]["required"] == list(struct.__struct_fields__), name
        assert schemas[name]["additionalProperties"] is False, name


def test_every_reference_in_the_document_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for kind, name in re.findall(r"#/components/(\w+)/(\w+)", text):
        assert name in DOCUMENT["components"][kind], name
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", list(DOCUMENT["paths"]))
async def test_fields_of_a_query_are_those_of_the_document(admin: Open, path: str) -> None:
    """Each one that is documented is read, and no other."""
    site = await admin()
    for method, operation in DOCUMENT["paths"][path].items():
        body: object = None if method == "get" else {}
        if path.endswith(".json"):
            continue
        status, found, _ = await site.ask(method.upper(), f"{path}?nonsense=1", body)
        assert (status, found["field"], found["code"]) == (400, "nonsense", "FIELD_INVALID")
        for each in operation.get("parameters", []):
            if "$ref" in each:
                each = DOCUMENT["components"]["parameters"][each["$ref"].rpartition("/")[2]]
            twice = f"{path}?{each['name']}=a%20b&{each['name']}=2"
            status, found, _ = await site.ask(method.upper(), twice, body)
            assert (status, found["field"]) == (400, each["name"])
            assert found["error"] == f"{each['name']}: is given twice"
            if each.get("required"):
                status, found, _ = await site.ask(method.upper(), path)
                assert (status, found["field"]) == (400, each["name"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        (method, path)
        for path, item in DOCUMENT["paths"].items()
        for method, operation in item.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ],
)
async def test_fields_of_a_body_are_those_of_the_document(admin: Open, method: str, path: str) -> None:
    site = await admin()
    schema = DOCUMENT["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False
    fields = schema.get("properties", {})
    # A misspelt dry_run must not do it.
    some = {"string": "x", "number": 1, "array": ["x"]}
    good = {name: some[fields[name]["type"]] for name in schema.get("required", [])}
    status, found, _ = await site.ask(method.upper(), path, {**good, "dryrun": True})
    assert (status, found["field"]) == (400, "dryrun")
    for name in schema.get("required", []):
        others = {each: value for each, value in good.items() if each != name}
        status, found, _ = await site.ask(method.upper(), path, others)
        assert (status, found["field"]) == (400, name)
    for name in fields:
        status, found, _ = await site.ask(method.upper(), path, {**good, name: {"no": "such"}})
        assert (status, found["field"]) == (400, name)
    for body in (b"{", b"[]", b"\xff", b"[" * 5000):
        status, found, _ = await site.ask(method.upper(), path, body)
        assert (status, found["field"]) == (400, "body")


# What it answers


async def test_a_tour(admin: Open) -> None:
    site = await admin()
    made = await site.site.image(ALPINE, "3", b"layer")
    await site.site.image(OTHER, "1", b"layer", b"more")
    assert [each["repository"] for each in (await site.get("/api/v1/repositories"))["repositories"]] == [
        ALPINE,
        OTHER,
    ]
    assert len((await site.get("/api/v1/repositories?match=alpine"))["repositories"]) == 1
    page = await site.get("/api/v1/images?limit=1")
    assert (page["images"][0]["digest"], page["next"]) == (made["digest"], f"{ALPINE}:3")
    page = await site.get(f"/api/v1/images?limit=1&last={page['next']}")
    assert (page["images"][0]["repository"], page["next"]) == (OTHER, None)
    assert (await site.get("/api/v1/image?ref=alpine:3"))["node"]["children"][0]["role"] == "config"
    assert (await site.get("/api/v1/stats?period=1h"))["total"]["requests"] == 0
    assert await site.get("/api/v1/fills") == []
    assert await site.get("/api/v1/webhooks") == []
    assert (await site.get("/api/v1/why?ref=alpine:3"))["verdict"] == "hit"
    assert (await site.post("/api/v1/pins", pattern="alpine:3", platforms=["linux/amd64"]))[0][
        "references"
    ] == 1
    assert [each["pattern"] for each in await site.get("/api/v1/pins")] == [f"{ALPINE}:3"]
    status, _, _ = await site.ask("DELETE", "/api/v1/pins", {"pattern": "alpine:3"})
    assert status == 200
    assert (await site.post("/api/v1/purge", pattern="docker.io/*", dry_run=True))["blobs"] == 4
    assert (await site.post("/api/v1/evict", to=0))["blobs"] == 4
    assert (await site.post("/api/v1/evict"))["short"] == 0
    assert (await site.get("/api/v1/scrub"))["asked"]["running"] is False
    assert (await site.ask("POST", "/api/v1/scrub", {}))[0] == 202
    assert (await site.post("/api/v1/purge", pattern="docker.io/*", force=True))["kept"] == []
    (row,) = await site.post("/api/v1/ready", references=["alpine:3"])
    assert (row["state"], row["repository"]) == ("absent", ALPINE)
    row = await site.post("/api/v1/warm", reference="local")
    assert (row["here"], row["code"]) == (False, "UNAVAILABLE")  # nobody listens there


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "field"),
    [
        ("GET", "/api/v1/image?ref=alpine:9", None, 404, "MANIFEST_UNKNOWN", None),
        ("GET", "/api/v1/image?ref=Alpine", None, 400, "FIELD_INVALID", "ref"),
        ("GET", "/api/v1/image?ref=", None, 400, "FIELD_INVALID", "ref"),
        ("GET", "/api/v1/images?limit=0", None, 400, "FIELD_INVALID", "limit"),
        ("GET", "/api/v1/images?limit=1001", None, 400, "FIELD_INVALID", "limit"),
        ("GET", "/api/v1/images?limit=%C2%B2", None, 400, "FIELD_INVALID", "limit"),
        ("GET", "/api/v1/images?last=a%20b", None, 400, "FIELD_INVALID", "last"),
        ("GET", "/api/v1/repositories?match=a%20b", None, 400, "FIELD_INVALID", "match"),
        ("GET", "/api/v1/stats?period=yesterday", None, 400, "FIELD_INVALID", "period"),
        ("GET", "/api/v1/stats?period=99999w", None, 200, None, None),
        ("POST", "/api/v1/purge", {"pattern": ""}, 400, "FIELD_INVALID", "pattern"),
        ("POST", "/api/v1/pins", {"pattern": "alpine", "keep_fresh": 0}, 400, "FIELD_INVALID", "keep_fresh"),
        (
            "POST",
            "/api/v1/pins",
            {"pattern": "alpine", "platforms": ["x"]},
            400,
            "FIELD_INVALID",
            "platforms",
        ),
        ("DELETE", "/api/v1/pins", {"pattern": "alpine"}, 404, "NAME_UNKNOWN", None),
        ("POST", "/api/v1/evict", {"to": -1}, 400, "FIELD_INVALID", "to"),
        ("POST", "/api/v1/refresh", {"reference": "x y"}, 400, "FIELD_INVALID", "reference"),
        ("POST", "/api/v1/warm", {"reference": "a", "platforms": ["x"]}, 400, "FIELD_INVALID", "platforms"),
        ("POST", "/api/v1/ready", {"references": ["a"] * 1001}, 400, "FIELD_INVALID", "references"),
        ("POST", "/api/v1/drill", {"seconds": 0}, 400, "FIELD_INVALID", "seconds"),
        ("POST", "/api/v1/drill", {"seconds": 1, "namespaces": ["x"]}, 400, "FIELD_INVALID", "namespaces"),
        ("POST", "/api/v1/drill", {"seconds": 1}, 405, "UNSUPPORTED", None),  # none is running here
        ("POST", "/api/v1/purge", b"x" * (2 << 20), 413, "TOO_LARGE", None),
    ],
)
async def test_errors(
    admin: Open, method: str, path: str, body: object, status: int, code: str | None, field: str | None
) -> None:
    found = await (await admin()).ask(method, path, body)
    assert (found[0], found[1].get("code"), found[1].get("field")) == (status, code, field)


async def test_what_is_pinned_is_a_conflict(admin: Open) -> None:
    site = await admin()
    await site.site.image(ALPINE, "3", b"layer")
    await site.post("/api/v1/pins", pattern="alpine")
    status, found, _ = await site.ask("POST", "/api/v1/purge", {"pattern": "docker.io/*"})
    assert (status, found["code"]) == (409, "PINNED")
    assert "by force" in found["error"]


async def test_failures(admin: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await admin()

    async def refresh(*arguments: object, **options: object) -> None:
        raise Unavailable("not now", retry_after=1.2)

    async def pins() -> None:
        raise StorageFailed("/x: Input/output error")

    monkeypatch.setattr(site.site.operations, "refresh", refresh)
    monkeypatch.setattr(site.site.operations, "pins", pins)
    status, found, headers = await site.ask("POST", "/api/v1/refresh", {"reference": "alpine"})
    assert (status, found) == (503, {"error": "not now", "code": "UNAVAILABLE"})
    assert headers["Retry-After"] == "2"
    assert (await site.ask("GET", "/api/v1/pins"))[:2] == (
        500,
        {"error": "/x: Input/output error", "code": "UNKNOWN"},
    )


@pytest.mark.errors("admin.failed")
async def test_a_bug_is_a_500_that_tells_nothing(admin: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await admin()

    async def pins() -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(site.site.operations, "pins", pins)
    status, found, _ = await site.ask("GET", "/api/v1/pins")
    assert (status, "inside" in found["error"]) == (500, False)


# Who may ask

ASKING = ("GET", "/api/v1/repositories", None), ("POST", "/api/v1/purge", {"pattern": "x", "dry_run": True})


@pytest.mark.parametrize(("method", "path", "body"), ASKING)
@pytest.mark.parametrize("loopback", [True, False])
async def test_a_token(admin: Open, method: str, path: str, body: object, loopback: bool) -> None:
    site = await admin(token="s3cret", loopback=loopback)
    for given in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer s3cre"},
        {"Authorization": "s3cret"},
    ):
        status, found, headers = await site.ask(method, path, body, **given)
        assert (status, found["code"], headers["WWW-Authenticate"]) == (
            401,
            "UNAUTHORIZED",
            'Bearer realm="entrepot"',
        )
        assert "s3cret" not in found["error"]
    for odd in ("Basic czNjcmV0", "Bearer s3cret x", "Bearer sécret", "Bearer s3cret,"):
        assert (await site.ask(method, path, body, Authorization=odd))[0] == 401
    assert (await site.ask(method, path, body, Authorization="Bearer s3cret"))[0] == 200
    # What the cache holds is for nobody else.
    assert (await site.ask(method, path, body))[0] == 401
    # Who has the token may be anywhere.
    found = await site.ask(
        method, path, body, Authorization="bearer s3cret", Host="cache.example", Origin="http://x"
    )
    assert found[0] == 200


@pytest.mark.parametrize(("method", "path", "body"), ASKING)
async def test_without_a_token_other_machines_may_not(
    admin: Open, method: str, path: str, body: object
) -> None:
    site = await admin(loopback=False)
    status, found, _ = await site.ask(method, path, body, Authorization="Bearer x")
    assert (status, found["code"]) == (403, "DENIED")
    assert "set admin_token" in found["error"]


@pytest.mark.parametrize("options", [{"token": "x"}, {"loopback": False}])
async def test_metrics_and_health_are_open(admin: Open, options: dict[str, Any]) -> None:
    site = await admin(**options)
    for path in OPEN:
        async with site.client.get(path, headers={"Host": "cache.example"}) as response:
            assert response.status == 200
    for path in ("/api/v1/fills", "/api/", "/%61pi/v1/fills", "/metrics/../api/v1/fills"):
        async with site.client.get(path) as response:
            assert response.status in (401, 403)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:5001", 200),
        ("localhost", 200),
        ("LOCALHOST:5001", 200),
        ("[::1]:5001", 200),
        ("10.0.0.1", 200),
        ("evil.example", 403),
        ("evil.example:5001", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example@127.0.0.1", 403),
        ("[::1].evil.example", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize(("method", "path", "body"), ASKING)
async def test_names_that_others_can_give_to_this_machine(
    admin: Open, method: str, path: str, body: object, host: str, status: int
) -> None:
    assert (await (await admin()).ask(method, path, body, Host=host))[0] == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:5001", 200),
        ("http://127.0.0.1:5002", 403),
        ("https://127.0.0.1:5001", 403),
        ("http://evil.example", 403),
        ("http://127.0.0.1:5001.evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize(("method", "path", "body"), ASKING)
async def test_pages_of_others(
    admin: Open, method: str, path: str, body: object, origin: str, status: int
) -> None:
    found = await (await admin()).ask(method, path, body, Host="127.0.0.1:5001", Origin=origin)
    assert found[0] == status


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
@pytest.mark.parametrize("token", [None, "x"])
async def test_what_a_form_can_send_is_refused(admin: Open, kind: str, token: str | None) -> None:
    site = await admin(token=token)
    await site.site.image(ALPINE, "3", b"layer")
    body = json.dumps({"pattern": "alpine"}).encode()
    given = {"Content-Type": kind, "Authorization": "Bearer x"}
    status, found, _ = await site.ask("POST", "/api/v1/purge", body, **given)
    assert (status, found["code"]) == (415, "UNSUPPORTED")
    assert site.site.holds(b"layer")
    assert (
        await site.ask(
            "POST",
            "/api/v1/purge",
            body,
            Content_Type="application/json; charset=utf-8",
            Authorization="Bearer x",
        )
    )[0] == 200


# Summaries


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that aiohttp-cache sees."""
    clock = Clock()

    class Time:
        time = staticmethod(clock)

    monkeypatch.setattr(aiohttp_cache.backends, "time", Time)
    return clock


@pytest.mark.parametrize("path", ["repositories", "images", "stats"])
async def test_costly_summaries_are_kept_for_seconds(
    admin: Open, seconds: Clock, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    site = await admin()
    real, calls = getattr(site.site.operations, path), []

    async def counted(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return await real(*arguments, **options)

    monkeypatch.setattr(site.site.operations, path, counted)
    first = await site.get(f"/api/v1/{path}")
    await site.site.image(ALPINE, "3", b"layer")
    assert await site.get(f"/api/v1/{path}") == first
    assert len(calls) == 1
    async with site.client.head(f"/api/v1/{path}") as response:
        assert (response.status, await response.read()) == (200, b"")
    seconds.advance(SUMMARY + 1)
    assert await site.get(f"/api/v1/{path}") != first


async def test_what_failed_is_asked_anew(admin: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await admin()

    async def repositories(*arguments: object, **options: object) -> None:
        raise StorageFailed("/x: Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(site.site.operations, "repositories", repositories)
        assert (await site.ask("GET", "/api/v1/repositories"))[0] == 500
    assert await site.get("/api/v1/repositories")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/v1/purge", {"pattern": "other"}),
        ("POST", "/api/v1/pins", {"pattern": "other"}),
        ("DELETE", "/api/v1/pins", {"pattern": "nothing"}),
        ("POST", "/api/v1/evict", {"to": 0}),
        ("POST", "/api/v1/refresh", {"reference": "x y"}),
    ],
)
async def test_who_changes_something_sees_it(admin: Open, method: str, path: str, body: object) -> None:
    site = await admin()
    assert (await site.get("/api/v1/repositories"))["repositories"] == []
    await site.site.image(ALPINE, "3", b"layer")
    await site.ask(method, path, body)
    assert len((await site.get("/api/v1/repositories"))["repositories"]) == 1


async def test_a_summary_begun_before_a_purge_is_not_kept(
    admin: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await admin()
    await site.site.image(ALPINE, "3", b"layer")
    real = site.site.operations.repositories

    async def slow(*arguments: Any, **options: Any) -> Any:
        found = await real(*arguments, **options)
        monkeypatch.setattr(site.site.operations, "repositories", real)
        await site.post("/api/v1/purge", pattern="alpine")  # while it is being answered
        return found

    monkeypatch.setattr(site.site.operations, "repositories", slow)
    assert len((await site.get("/api/v1/repositories"))["repositories"]) == 1
    assert (await site.get("/api/v1/repositories"))["repositories"] == []


@pytest.mark.clients
async def test_summaries_do_not_pile_up(admin: Open) -> None:
    site = await admin()
    held = site.client.server.app["cache"]._cache  # type: ignore[union-attr]
    for number in range(SUMMARIES + 20):
        await site.get(f"/api/v1/repositories?match=x{number}")
    assert 0 < len(held) <= SUMMARIES
