"""Who may do what, over HTTP: principal x action x namespace kind, pings, mounts, the catalog."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.access import throttle
from proxy.access.authentication import Authenticator
from proxy.config.errors import StartError
from proxy.server.access import needed
from storage.errors import Throttled
from storage.oci import OCI_MANIFEST, Digest
from tests.conftest import Clock, Serve, Site
from tests.receiver import Receiver, receiver  # noqa: F401  a fixture
from tests.test_bearer import OTHER, PRIVATE, Server, pem
from tests.test_htpasswd import line
from tests.upstream import Basic, Image, Upstream

BLOB = b"a layer" * 1000
BASIC = 'Basic realm="entrepot"'
BEARER = 'Bearer realm="https://auth.example/token",service="registry.example"'
EMPTY = "Basic Og=="  # podman's nobody
STRANGER = {"X-Forwarded-For": "192.0.2.1"}  # through a proxy that is not trusted
LOCAL = "/v2/local/team/app"
HUB = "/v2/library/alpine"


def login(user: str, password: str) -> dict[str, str]:
    return {"Authorization": Basic(user, password).header}


ALICE = login("alice", "wonderland")
BOB = login("bob", "builder")


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "latest", layers=(BLOB,))


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "htpasswd"
    path.write_text(line("alice", "wonderland") + line("bob", "builder"))
    return path


@pytest.fixture
def server(clock: Clock) -> Server:
    return Server(clock)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "token.pem"
    path.write_bytes(pem(PRIVATE["EC"]))
    return path


@dataclass
class Said:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def challenge(self) -> str | None:
        return self.headers.get("WWW-Authenticate")

    @property
    def code(self) -> str:
        (error,) = json.loads(self.body)["errors"]
        assert error["message"]
        return str(error["code"])


class Door:
    """A server, and what is asked of it by whom."""

    def __init__(self, site: Site) -> None:
        self.site = site

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Said:
        async with self.site.request(method, path, headers=headers, data=body) as response:
            assert len(response.headers.getall("WWW-Authenticate", [])) <= 1
            return Said(response.status, response.headers, await response.read())

    async def push_blob(self, headers: Mapping[str, str], path: str = LOCAL, blob: bytes = BLOB) -> Said:
        return await self.ask("POST", f"{path}/blobs/uploads/?digest={Digest.of(blob)}", headers, blob)

    async def push(self, headers: Mapping[str, str], path: str = LOCAL) -> Said:
        said = await self.push_blob(headers, path)
        if said.status != 201:
            return said
        body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described(BLOB), "layers": []}
        given = {**headers, "Content-Type": OCI_MANIFEST}
        return await self.ask("PUT", f"{path}/manifests/1", given, json.dumps(body).encode())

    async def act(self, action: str, headers: Mapping[str, str], path: str = LOCAL) -> Said:
        if action == "push":
            return await self.push(headers, path)
        method = {"pull": "GET", "delete": "DELETE"}[action]
        return await self.ask(method, f"{path}/manifests/1", headers)


def described(blob: bytes) -> dict[str, Any]:
    return {"mediaType": "application/octet-stream", "digest": Digest.of(blob), "size": len(blob)}


Open = Callable[..., Any]


@pytest.fixture
def opened(serve: Serve, upstream: Upstream) -> Open:
    """A server with a cache, docker.io, and a store, local; `access` as in the configuration."""

    async def open(
        access: dict[str, Any] | None, hosts: Any = (), top: Any = None, local: Any = None, **hub: Any
    ) -> Door:
        local = local or {"store": {}, "hosts": list(hosts)}
        mirror = {"upstream": upstream.url, "hosts": ["hub.mirror.example"]}
        more = {"local": local, "mirror.example": mirror}
        return Door(await serve(upstream, more=more, top={"access": access, **(top or {})}, **hub))

    return open


# The matrix, without rules


@pytest.mark.parametrize(
    ("headers", "pull", "push", "delete"),
    [
        ({}, 200, 401, 401),
        ({"Authorization": EMPTY}, 200, 401, 401),
        (STRANGER, 401, 401, 401),
        (ALICE, 200, 201, 202),
        ({**ALICE, **STRANGER}, 200, 201, 202),
        (login("alice", "wrong"), 401, 401, 401),
        (login("carol", "wonderland"), 401, 401, 401),
        ({"Authorization": "Basic not base64"}, 401, 401, 401),
        ({"Authorization": "Bearer some-token"}, 401, 401, 401),
        ({"Authorization": "Negotiate abc"}, 401, 401, 401),
    ],
)
async def test_a_store_without_rules(
    opened: Open, users: Path, headers: dict[str, str], pull: int, push: int, delete: int
) -> None:
    door = await opened({"htpasswd": str(users)})
    assert (await door.push(ALICE)).status == 201
    for action, status in (("pull", pull), ("push", push), ("delete", delete)):
        said = await door.act(action, headers)
        assert said.status == status, action
        assert said.challenge == (BASIC if status == 401 else None)
        if status == 401:
            assert said.code == "UNAUTHORIZED"


EVERYWHERE = {"listen": "0.0.0.0:0"}


@pytest.mark.parametrize(
    ("access", "top", "local"),
    [
        ({"realm": "mine"}, None, None),
        (None, EVERYWHERE, None),
        (None, None, {"store": {}, **EVERYWHERE}),
    ],
)
async def test_a_store_that_nobody_can_log_in_to(
    opened: Open, access: dict[str, Any] | None, top: dict[str, Any] | None, local: dict[str, Any] | None
) -> None:
    door = await opened(access, top=top, local=local)
    assert (await door.act("pull", {})).status == 404  # it is allowed, and there is none
    for headers in ({}, ALICE, {"Authorization": "Bearer x"}):
        said = await door.push(headers)
        assert (said.status, said.code, said.challenge) == (403, "DENIED", None)
    assert (await door.act("pull", STRANGER)).status == 403


async def test_this_machine_may_push_where_nobody_else_can_connect(opened: Open) -> None:
    door = await opened(None)
    port = door.site.app.url.port
    for headers in ({}, ALICE, {"Authorization": "Bearer x"}, {"Host": f"localhost:{port}"}):
        assert (await door.push(headers)).status == 201
        assert (await door.act("pull", headers)).status == 200
        assert (await door.act("delete", headers)).status == 202


@pytest.mark.parametrize(
    "headers",
    [
        STRANGER,
        {"Forwarded": "for=127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"X-Forwarded-Proto": "https"},
        {"Host": "registry.example"},
        {"Host": "127.0.0.1.example"},
        {"Host": "localhost.example:5000"},
        {"Host": "192.0.2.1:5000"},
        {"Origin": "https://page.example"},
        {"Origin": "null"},
    ],
)
async def test_what_comes_through_a_proxy_or_from_a_page_may_not_push(
    opened: Open, headers: dict[str, str]
) -> None:
    door = await opened(None)
    said = await door.push(headers)
    assert (said.status, said.code) == (403, "DENIED")
    assert (await door.act("delete", headers)).status == 403


@pytest.mark.parametrize(("version", "status"), [("1.1", 202), ("1.0", 403)])
async def test_a_proxy_that_speaks_as_nginx_does_may_not_push(
    opened: Open, version: str, status: int
) -> None:
    door = await opened(None)
    url = door.site.app.url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = (
        f"POST {LOCAL}/blobs/uploads/ HTTP/{version}\r\nHost: {url.host}:{url.port}\r\nConnection: close\r\n"
    )
    writer.write(f"{head}Content-Length: 0\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert answer.split()[1] == str(status).encode()
    if status == 202:
        location = re.search(r"Location: (\S+)", answer.decode())
        assert location
        assert (await door.ask("DELETE", location[1])).status == 204


@pytest.mark.parametrize("access", [None, "htpasswd"])
@pytest.mark.parametrize(
    "headers",
    [{}, STRANGER, ALICE, login("alice", "wrong"), {"Authorization": "Bearer x"}, {"Authorization": "junk"}],
)
async def test_a_public_cache_is_for_everybody(
    opened: Open, upstream: Upstream, image: Image, users: Path, access: str | None, headers: dict[str, str]
) -> None:
    door = await opened({"htpasswd": str(users), "rules": []} if access else None)
    paths = ("manifests/latest", f"manifests/{image.digest}", f"blobs/{image.layers[0]}", "tags/list")
    for path in paths:
        for method in ("GET", "HEAD"):
            said = await door.ask(method, f"{HUB}/{path}", headers)
            assert (said.status, said.challenge) == (200, None)
            assert not said.headers["Cache-Control"].startswith("private")
    said = await door.push_blob(headers, HUB)
    assert (said.status, said.challenge) == (405, None)
    assert all("Authorization" not in request.headers for request in upstream.requests)


# By rules

RULES = [
    {"who": ["anonymous"], "from": ["10.0.0.0/8"], "may": ["pull"], "where": ["local/public/*"]},
    {"who": ["group:ops"], "may": ["pull", "push", "delete"], "where": ["local/*"]},
    {"who": ["user:bob"], "may": ["pull"], "where": ["local/team/*", "docker.io/library/*"]},
    {"who": ["claim:project=team/*"], "may": ["pull", "push"], "where": ["local/team/*"]},
]


@pytest.mark.parametrize(
    ("headers", "path", "pull", "push", "delete"),
    [
        ({}, LOCAL, 401, 401, 401),
        (ALICE, LOCAL, 200, 201, 202),
        (BOB, LOCAL, 200, 403, 403),
        (BOB, "/v2/local/public/app", 403, 403, 403),
        ({"X-Forwarded-For": "10.1.2.3"}, "/v2/local/public/app", 200, 401, 401),
        ({"X-Forwarded-For": "11.1.2.3"}, "/v2/local/public/app", 401, 401, 401),
        ({"X-Forwarded-For": "10.1.2.3, 11.1.2.3"}, "/v2/local/public/app", 401, 401, 401),
        ({}, "/v2/local/public/app", 401, 401, 401),
    ],
)
async def test_a_store_by_rules(
    opened: Open, users: Path, headers: dict[str, str], path: str, pull: int, push: int, delete: int
) -> None:
    door = await opened(
        {
            "htpasswd": str(users),
            "rules": RULES,
            "groups": {"ops": ["alice"]},
            "trusted_proxies": ["127.0.0.1"],
        }
    )
    assert (await door.push(ALICE, path)).status == 201
    for action, status in (("pull", pull), ("push", push), ("delete", delete)):
        said = await door.act(action, headers, path)
        assert said.status == status, action
        assert said.challenge == (BASIC if status == 401 else None)
        if status == 403:
            assert said.code == "DENIED"


async def test_given_rules_take_the_place_of_the_built_in_ones(opened: Open, users: Path) -> None:
    door = await opened({"htpasswd": str(users), "rules": []})
    assert (await door.act("pull", {})).status == 401
    assert (await door.push(ALICE)).status == 403


async def test_a_cache_by_rules(opened: Open, users: Path, image: Image) -> None:
    access = {"htpasswd": str(users), "rules": RULES}
    door = await opened(access, visibility="rules")
    for path in ("manifests/latest", f"manifests/{image.digest}", f"blobs/{image.layers[0]}"):
        for headers, status in (({}, 401), (BOB, 200), ({}, 401), (ALICE, 403), (login("bob", "x"), 401)):
            said = await door.ask("GET", f"{HUB}/{path}", headers)
            assert said.status == status
            if status == 200:
                assert said.headers["Cache-Control"].startswith("private, max-age=")
    for headers in ({}, BOB):  # what it does for nobody needs no right
        assert (await door.push_blob(headers, HUB)).status == 405


async def test_answers_of_a_store_are_for_one_client_alone(opened: Open, users: Path) -> None:
    door = await opened({"htpasswd": str(users)})
    assert (await door.push(ALICE)).status == 201
    for path in ("manifests/1", f"blobs/{Digest.of(BLOB)}", "tags/list"):
        said = await door.ask("GET", f"{LOCAL}/{path}", ALICE)
        assert said.status == 200
        assert not said.headers["Cache-Control"].startswith("public")


async def test_every_endpoint_of_a_store_is_guarded(opened: Open, users: Path) -> None:
    door = await opened({"htpasswd": str(users), "rules": []})
    digest = Digest.of(BLOB)
    asked = [
        *((method, f"{LOCAL}/{path}") for method in ("GET", "HEAD") for path in (
            "manifests/1", f"manifests/{digest}", f"blobs/{digest}", "tags/list", f"referrers/{digest}",
            "blobs/uploads/some-id",
        )),
        ("PUT", f"{LOCAL}/manifests/1"),
        ("DELETE", f"{LOCAL}/manifests/1"),
        ("DELETE", f"{LOCAL}/blobs/{digest}"),
        ("POST", f"{LOCAL}/blobs/uploads/"),
        ("POST", f"{LOCAL}/blobs/uploads/?mount={digest}"),
        *((method, f"{LOCAL}/blobs/uploads/some-id") for method in ("PATCH", "PUT", "DELETE")),
    ]  # fmt: skip
    for prefix in ("", "?ns=local"):
        for method, path in asked:
            path = path.replace("/local", "", 1) + prefix if prefix and "?" not in path else path
            assert (await door.ask(method, path)).status == 401, (method, path)
            assert (await door.ask(method, path, ALICE)).status == 403, (method, path)


async def test_a_refusal_does_not_tell_whether_it_is_there(opened: Open, users: Path) -> None:
    door = await opened({"htpasswd": str(users)})
    assert (await door.push(ALICE)).status == 201
    there = await door.act("pull", STRANGER)
    absent = await door.act("pull", STRANGER, "/v2/local/team/xxx")
    assert there.status == absent.status == 401
    assert there.body.replace(b"app", b"xxx") == absent.body


# Mounts


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        (ALICE, "&from=local/team/app", 201),
        (ALICE, "", 201),
        (BOB, "&from=local/team/app", 202),
        (BOB, "", 202),
        (BOB, "&from=local/team/absent", 202),
    ],
)
async def test_a_mount_takes_the_right_to_pull_from_there(
    opened: Open, users: Path, headers: dict[str, str], query: str, status: int
) -> None:
    rules = [
        {"who": ["user:alice"], "may": ["pull", "push", "delete"]},
        {"who": ["user:bob"], "may": ["pull", "push"], "where": ["local/bob/*"]},
    ]
    door = await opened({"htpasswd": str(users), "rules": rules})
    assert (await door.push(ALICE)).status == 201
    path = f"/v2/local/bob/app/blobs/uploads/?mount={Digest.of(BLOB)}{query}"
    said = await door.ask("POST", path, headers)
    assert said.status == status
    if status == 202:
        assert (await door.ask("DELETE", said.headers["Location"], headers)).status == 204


@pytest.mark.parametrize(
    ("visibility", "headers", "status"),
    [
        ("public", ALICE, 201),
        ("public", BOB, 201),
        ("rules", ALICE, 201),
        ("rules", BOB, 202),
        ("caller", ALICE, 202),
        ("caller", BOB, 202),
    ],
)
async def test_a_mount_from_a_cache_takes_the_right_to_pull_from_it(
    opened: Open, users: Path, upstream: Upstream, visibility: str, headers: dict[str, str], status: int
) -> None:
    digest = upstream.blob("library/alpine", BLOB)
    rules = [
        {"who": ["user:alice"], "may": ["pull", "push"]},
        {"who": ["user:bob"], "may": ["pull", "push"], "where": ["local/*"]},
    ]
    door = await opened({"htpasswd": str(users), "rules": rules}, visibility=visibility)
    path = f"/v2/local/app/blobs/uploads/?mount={digest}&from=docker.io/library/alpine"
    said = await door.ask("POST", path, headers)
    assert said.status == status
    assert (await door.ask("HEAD", f"/v2/local/app/blobs/{digest}", headers)).status == (
        200 if status == 201 else 404
    )
    if status == 202:
        assert upstream.log == []
        assert (await door.ask("DELETE", said.headers["Location"], headers)).status == 204


# The catalog


async def catalog(door: Door, headers: Mapping[str, str], query: str = "") -> tuple[list[str], str]:
    said = await door.ask("GET", f"/v2/_catalog{query}", headers)
    assert said.status == 200
    return json.loads(said.body)["repositories"], said.headers.get("Link", "")


async def test_the_catalog_shows_what_may_be_pulled(opened: Open, users: Path, image: Image) -> None:
    rules = [
        {"who": ["user:alice"], "may": ["pull", "push", "delete"]},
        {"who": ["user:bob"], "may": ["pull"], "where": ["re:local/team/.*[02468]"]},
    ]
    door = await opened({"htpasswd": str(users), "rules": rules})
    empty = await door.ask("GET", "/v2/_catalog")
    assert (empty.status, empty.challenge) == (401, BASIC)
    for number in range(6):
        assert (await door.push(ALICE, f"/v2/local/team/app{number}")).status == 201
    refused = await door.ask("GET", "/v2/_catalog")
    assert (refused.status, refused.challenge, refused.body) == (401, BASIC, empty.body)
    assert (await door.ask("GET", "/v2/_catalog", login("bob", "x"))).status == 401
    await door.ask("GET", f"{HUB}/manifests/latest")
    hub = "docker.io/library/alpine"
    assert (await catalog(door, {}))[0] == [hub]
    assert (await catalog(door, ALICE))[0] == [hub, *(f"local/team/app{number}" for number in range(6))]
    assert (await catalog(door, BOB))[0] == [hub, "local/team/app0", "local/team/app2", "local/team/app4"]


@pytest.mark.parametrize("where", [[], ["local/public/*"], ["local/*"]])
@pytest.mark.parametrize("user", [{}, BOB], ids=["anonymous", "bob"])
async def test_the_catalog_is_the_same_with_hidden_names(
    opened: Open, users: Path, where: list[str], user: Mapping[str, str]
) -> None:
    rules: list[dict[str, Any]] = [{"who": ["user:alice"], "may": ["pull", "push", "delete"]}]
    if where:
        rules.append({"who": ["anonymous", "user:bob"], "may": ["pull"], "where": where})
    door = await opened({"htpasswd": str(users), "rules": rules})
    queries = [
        f"?{query}"
        for last in (
            "",
            "local/",
            "local/a",
            "local/m",
            "local/public/a",
            "local/secret",
            "z",
            "\x7f",
            "not a name",
        )
        for query in (f"n=1&last={last}", f"n=0&last={last}", f"n=2000&last={last}", f"last={last}")
    ]

    async def shown() -> list[Any]:
        answers = [await door.ask("GET", f"/v2/_catalog{query}", user) for query in queries]
        answers += [
            await door.ask("GET", f"/v2/local/{name}/tags/list", user) for name in ("secret/app", "merger")
        ]
        kept = ("WWW-Authenticate", "Link", "Content-Type", "Cache-Control")
        return [(each.status, each.body, [each.headers.get(name) for name in kept]) for each in answers]

    assert (await door.push(ALICE, "/v2/local/public/app")).status == 201
    before = await shown()
    for name in ("secret/app", "merger"):
        assert (await door.push(ALICE, f"/v2/local/{name}")).status == 201
    assert (await shown() == before) == (where != ["local/*"])


async def test_the_catalog_page_by_page(opened: Open, users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.access.catalog.PAGE", 2)
    rules = [
        {"who": ["user:alice"], "may": ["push"]},
        {"who": ["user:bob"], "may": ["pull"], "where": ["re:local/team/app(0|5|6|9)"]},
    ]
    door = await opened({"htpasswd": str(users), "rules": rules})
    for number in range(10):
        assert (await door.push(ALICE, f"/v2/local/team/app{number}")).status == 201
    pages, query = [], "?n=1"
    while query:
        names, link = await catalog(door, BOB, query)
        pages.append([name.removeprefix("local/team/app") for name in names])
        query = link.partition("_catalog")[2].partition(">")[0]
    assert pages == [["0"], ["5"], ["6"], ["9"]]


# Pings


@pytest.mark.parametrize(
    ("ping", "host", "headers", "status", "challenge"),
    [
        # The default namespace is a public cache.
        ("auto", "", {}, 200, BASIC),
        ("auto", "", {"Authorization": EMPTY}, 200, BASIC),
        ("auto", "", ALICE, 200, None),
        ("auto", "", login("alice", "x"), 401, BASIC),
        ("auto", "hub.mirror.example", {}, 200, None),
        ("auto", "hub.mirror.example", login("alice", "x"), 200, None),
        ("auto", "local.example", {}, 401, BASIC),
        ("auto", "local.example", ALICE, 200, None),
        ("auto", "local.example", login("alice", "x"), 401, BASIC),
        ("challenge", "", {}, 401, BASIC),
        ("challenge", "", ALICE, 200, None),
        ("challenge", "hub.mirror.example", {}, 200, None),
        ("challenge", "local.example", {}, 401, BASIC),
        ("open", "", {}, 200, None),
        ("open", "local.example", {}, 200, None),
        ("open", "local.example", login("alice", "x"), 401, BASIC),
    ],
)
async def test_ping(
    opened: Open, users: Path, ping: str, host: str, headers: dict[str, str], status: int, challenge: str
) -> None:
    door = await opened({"htpasswd": str(users), "ping": ping}, hosts=["local.example"])
    for path in ("/v2/", "/v2"):
        for method in ("GET", "HEAD"):
            said = await door.ask(method, path, {**headers, **({"Host": host} if host else {})})
            assert (said.status, said.challenge) == (status, challenge)


@pytest.mark.parametrize(
    ("path", "status", "challenge"),
    [
        ("/v2/?ns=local", 401, BASIC),
        ("/local/v2/", 401, BASIC),
        ("/v2/local/", 401, BASIC),
        ("/v2/?ns=mirror.example", 200, None),
        ("/mirror.example/v2/", 200, None),
        ("/v2/?ns=nobody.example", 200, BASIC),
    ],
)
async def test_a_ping_that_says_what_it_is_about(
    opened: Open, users: Path, path: str, status: int, challenge: str | None
) -> None:
    door = await opened({"htpasswd": str(users)})
    said = await door.ask("GET", path)
    assert (said.status, said.challenge) == (status, challenge)


@pytest.mark.parametrize(
    ("rules", "headers", "status"),
    [
        (None, {}, 401),
        (None, ALICE, 200),
        (None, login("alice", "x"), 401),
        ([{"who": ["anonymous"], "may": ["pull"]}], {}, 200),
        ([{"who": ["anonymous"], "may": ["pull"], "where": ["local/*"]}], {}, 401),
    ],
)
async def test_a_ping_of_a_server_that_has_no_cache(
    serve: Serve, users: Path, rules: list[Any] | None, headers: dict[str, str], status: int
) -> None:
    access = {"htpasswd": str(users), "rules": rules}
    namespaces = {"local": {"store": {}}, "edge": {"store": {}}}
    door = Door(await serve("http://127.0.0.1:9", top={"access": access, "namespaces": namespaces}))
    said = await door.ask("GET", "/v2/", headers)
    assert (said.status, said.challenge) == (status, None if headers == ALICE else BASIC)


@pytest.mark.parametrize("default", ["docker.io", "local", None])
@pytest.mark.parametrize("listen", ["127.0.0.1:0", None])
async def test_a_mirror_never_asks_for_the_passwords_of_what_it_mirrors(
    opened: Open, users: Path, default: str | None, listen: str | None
) -> None:
    local = {"store": {}, "hosts": ["local.example"], "listen": listen}
    door = await opened({"htpasswd": str(users)}, top={"default_namespace": default}, local=local)
    pings = ["/mirror.example/v2/", "/v2/mirror.example/", "/v2/?ns=mirror.example", "/docker.io/v2/"]
    if default != "local":
        pings.append("/v2/")
    for path in pings:
        for headers in ({}, ALICE, login("hub-user", "its-password")):
            if path != "/v2/" or headers in ({}, ALICE):
                assert (await door.ask("GET", path, headers)).status == 200


async def test_a_ping_where_a_store_is_the_default(opened: Open, users: Path) -> None:
    door = await opened({"htpasswd": str(users)}, top={"default_namespace": "local"})
    assert (await door.ask("GET", "/v2/")).status == 401
    welcome = await door.ask("GET", "/v2/", ALICE)
    assert (welcome.status, welcome.headers["Cache-Control"]) == (200, "no-store")


@pytest.mark.parametrize(
    ("rule", "status"),
    [
        ({}, 200),
        ({"where": ["local/*"]}, 200),
        ({"where": ["local/public/*"]}, 401),
        ({"from": ["127.0.0.1"]}, 401),
        ({"may": ["push"]}, 401),
        ({"who": ["authenticated"]}, 401),
    ],
)
async def test_a_ping_where_everybody_may_pull_everything(
    opened: Open, users: Path, rule: dict[str, Any], status: int
) -> None:
    rules = [{"who": ["anonymous"], "may": ["pull"], **rule}]
    door = await opened({"htpasswd": str(users), "rules": rules}, top={"default_namespace": "local"})
    said = await door.ask("GET", "/v2/")
    assert (said.status, said.challenge) == (status, BASIC)


async def test_nobody_is_challenged_who_cannot_meet_it(opened: Open) -> None:
    door = await opened({"ping": "challenge"}, top={"default_namespace": "local"})
    for headers in ({}, ALICE):
        said = await door.ask("GET", "/v2/", headers)
        assert (said.status, said.challenge) == (200, None)


async def test_a_ping_for_tokens(opened: Open, keys: Path, server: Server) -> None:
    door = await opened(token(keys), hosts=["local.example"])
    # podman would fetch a token for every pull from the caches.
    said = await door.ask("GET", "/v2/")
    assert (said.status, said.challenge) == (200, None)
    said = await door.ask("GET", "/v2/", {"Host": "local.example"})
    assert (said.status, said.challenge) == (401, BEARER)
    given = bearer(server.issue())
    assert (await door.ask("GET", "/v2/", {"Host": "local.example", **given})).status == 200


# Tokens


def token(keys: Path, **more: Any) -> dict[str, Any]:
    service = {"realm": "https://auth.example/token", "service": "registry.example", "issuer": "auth.example"}
    return {"token": {**service, "keys": [str(keys)]}, **more}


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def granting(server: Server, name: str, *actions: str) -> dict[str, str]:
    return bearer(server.issue(access=[{"type": "repository", "name": name, "actions": list(actions)}]))


async def test_tokens(opened: Open, keys: Path, server: Server) -> None:
    door = await opened(token(keys))
    said = await door.push({})
    assert (said.status, said.challenge) == (401, f'{BEARER},scope="repository:local/team/app:pull,push"')
    everything = granting(server, "local/team/app", "*")
    assert (await door.push(everything)).status == 201
    pulling = granting(server, "local/team/app", "pull")
    assert (await door.act("pull", pulling)).status == 200
    for action, scope in (("push", "pull,push"), ("delete", "delete")):
        said = await door.act(action, pulling)
        scoped = f'{BEARER},scope="repository:local/team/app:{scope}"'
        assert (said.status, said.code) == (401, "UNAUTHORIZED")
        assert said.challenge == f'{scoped},error="insufficient_scope"'
    said = await door.act("pull", bearer(server.issue(OTHER)))
    assert said.challenge == f'{BEARER},scope="repository:local/team/app:pull",error="invalid_token"'
    for other in ("local/team/other", "team/app", "local/team"):
        assert (await door.push(granting(server, other, "*"))).status == 401


async def test_a_token_is_not_its_user(opened: Open, keys: Path, server: Server, users: Path) -> None:
    door = await opened(token(keys, htpasswd=str(users)))
    assert (await door.push(ALICE)).status == 201
    assert (await door.push(bearer(server.issue(sub="alice")))).status == 401


async def test_a_token_by_its_claims(opened: Open, keys: Path, server: Server) -> None:
    door = await opened(token(keys, rules=RULES))
    assert (await door.push(bearer(server.issue(project="team/app")))).status == 201
    assert (await door.act("delete", bearer(server.issue(project="team/app")))).status == 401
    assert (await door.push(bearer(server.issue(project="other/app")))).status == 401


@pytest.mark.parametrize(
    ("path", "host", "name", "right"),
    [
        ("/v2/team/app", "", "team/app", True),
        ("/v2/team/app", "", "local/team/app", True),
        ("/v2/team/app", "local.example", "team/app", True),
        ("/v2/local/team/app", "", "local/team/app", True),
        ("/v2/local/team/app", "", "team/app", False),
        ("/local/v2/team/app", "", "team/app", False),
        ("/local/v2/team/app", "", "local/team/app", True),
        ("/v2/team/app", "other", "team/app", False),
        ("/v2/team/app", "other", "other/team/app", True),
        ("/v2/other/team/app", "", "team/app", False),
        # It is the full name of a repository in another namespace, by any host.
        ("/v2/other/app", "local.example", "other/app", True),
        ("/v2/other/app", "local.example", "local/other/app", False),
    ],
)
async def test_a_scope_names_no_namespace(
    serve: Serve, upstream: Upstream, keys: Path, server: Server, path: str, host: str, name: str, right: bool
) -> None:
    more: dict[str, Any] = {"local": {"store": {}, "hosts": ["local.example"]}, "other": {"store": {}}}
    door = Door(await serve(upstream, more=more, top={"access": token(keys), "default_namespace": "local"}))
    given = {**granting(server, name, "push"), **({"Host": host} if host else {})}
    said = await door.push_blob(given, path)
    assert said.status == (201 if right else 401)
    if not right:
        # A client that does as it is told gets in.
        _, _, scope = (said.challenge or "").partition('scope="repository:')
        wanted = scope.partition(":")[0]
        assert (await door.push_blob({**given, **granting(server, wanted, "push")}, path)).status == 201


async def test_one_challenge_where_there_are_two_ways(opened: Open, keys: Path, users: Path) -> None:
    door = await opened(token(keys, htpasswd=str(users)))
    said = await door.push({})
    assert said.challenge is not None and said.challenge.startswith("Bearer ")
    assert (await door.push(ALICE)).status == 201


async def test_a_token_for_the_catalog(opened: Open, keys: Path, server: Server) -> None:
    door = await opened(token(keys, rules=[]))
    assert (await door.push(granting(server, "local/team/app", "*"))).status == 201
    said = await door.ask("GET", "/v2/_catalog", STRANGER)
    assert said.challenge == f'{BEARER},scope="registry:catalog:*"'
    allowed = bearer(server.issue(access=[{"type": "registry", "name": "catalog", "actions": ["*"]}]))
    assert (await catalog(door, allowed))[0] == ["local/team/app"]
    assert (await catalog(door, granting(server, "local/team/app", "pull")))[0] == ["local/team/app"]
    assert (await catalog(door, bearer(server.issue())))[0] == []


# Wrong passwords


async def test_who_tries_too_often_has_to_wait(
    opened: Open, users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "FREE", 1)
    monkeypatch.setattr(throttle, "FIRST", 1000.0)
    door = await opened({"htpasswd": str(users)})
    assert (await door.push(ALICE)).status == 201
    for status in (401, 401, 429, 429):
        said = await door.act("pull", login("bob", "guess"))
        assert said.status == status
    assert said.code == "TOOMANYREQUESTS"
    assert int(said.headers["Retry-After"]) > 900
    assert (await door.act("pull", BOB)).status == 429
    assert (await door.act("pull", ALICE)).status == 200  # who is known is not kept waiting
    assert (await door.act("pull", {})).status == 200
    # Other workers know it as well.
    elsewhere = throttle.LoginThrottle(table=door.site.app.composition.shared.logins)
    with pytest.raises(Throttled):
        elsewhere.turn(ipaddress.ip_address("127.0.0.1"), "bob")


# Certificates


class Certified(dict[str, Any]):
    """A request over TLS, as far as it is looked at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    remote = "192.0.2.1"

    def __init__(self, *subject: tuple[str, str]) -> None:
        self.subject = subject

    def get_extra_info(self, name: str) -> Any:
        return {"subject": tuple((each,) for each in self.subject)} if name == "peercert" else None


async def test_a_certificate_names_a_user_and_groups() -> None:
    proofs = Authenticator(groups={"alice": frozenset({"ops"})})
    names = [("commonName", "alice"), ("organizationalUnitName", "dev"), ("organizationalUnitName", "ci")]
    principal = await proofs.identify(Certified(*names))  # type: ignore[arg-type]
    assert (principal.user, principal.scheme) == ("alice", "certificate")
    assert principal.groups == {"ops", "dev", "ci"}
    assert str(principal.address) == "192.0.2.1"
    nobody = await proofs.identify(Certified(("organizationalUnitName", "ops")))  # type: ignore[arg-type]
    assert nobody.anonymous
    assert not nobody.groups


# Files that are none


@pytest.mark.parametrize(
    ("access", "cause"),
    [
        ({"htpasswd": "{}/absent"}, "{}/absent (access.htpasswd) does not exist: entrepot user add NAME"),
        ({"htpasswd": "{}/bad"}, "{}/bad (access.htpasswd): line 1 holds no bcrypt hash: use htpasswd -B"),
        ({"keys": "{}/absent"}, "{}/absent (access.token.keys): No such file or directory"),
        ({"keys": "{}/bad"}, "{}/bad: it holds no key: expected PEM, a JWK or a JWKS (access.token.keys)"),
    ],
)
async def test_it_does_not_start(opened: Open, tmp_path: Path, access: dict[str, str], cause: str) -> None:
    (tmp_path / "bad").write_text("alice:password\n")
    given: dict[str, Any] = {key: each.format(tmp_path) for key, each in access.items()}
    if keys := given.pop("keys", None):
        given = token(Path(keys))
    with pytest.raises(StartError) as raised:
        await opened(given)
    assert str(raised.value) == cause.format(tmp_path)


# What is written down


async def test_the_log_has_the_user_and_no_secret(
    opened: Open, users: Path, keys: Path, server: Server, events: LogCapture
) -> None:
    door = await opened(token(keys, htpasswd=str(users)))
    assert (await door.push(ALICE)).status == 201
    given = granting(server, "local/team/app", "pull")
    assert (await door.act("pull", given)).status == 200
    assert (await door.act("delete", given)).status == 401
    assert (await door.act("pull", login("s3cret-as-user", "s3cret"))).status == 401
    assert (await door.act("pull", STRANGER)).status == 401
    served = [each["user"] for each in events.entries if each["event"] == "request.served"]
    assert served == ["alice", "alice", "alice", "alice", "", ""]
    refused = [each for each in events.entries if each["event"] == "access.refused"]
    assert [(each["user"], each["action"], each["log_level"]) for each in refused] == [
        ("alice", "delete", "info"),
        ("", "pull", "info"),
        ("", "pull", "debug"),
    ]
    text = repr(events.entries)
    for secret in (
        "s3cret",
        "wonderland",
        given["Authorization"][7:30],
        base64.b64encode(b"alice:").decode()[:6],
    ):
        assert secret not in text


@pytest.mark.housekeeping
async def test_webhooks_hear_who_it_was(
    opened: Open,
    users: Path,
    receiver: Receiver,  # noqa: F811
) -> None:
    hook = {"name": "a", "url": receiver.url, "actions": ["push"]}
    door = await opened({"htpasswd": str(users)}, top={"webhooks": [hook]})
    assert (await door.push_blob(ALICE)).status == 201
    (event,) = await receiver.took(1)
    assert event["actor"] == {"name": "alice"}


# Without anything to decide


async def test_nothing_stands_before_public_caches(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    assert not needed(site.app.composition.config)
    async with site.request("GET", "/v2/", headers=login("alice", "x")) as response:
        assert response.status == 200
        assert "WWW-Authenticate" not in response.headers
