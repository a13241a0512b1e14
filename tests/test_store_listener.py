"""A private registry with a listener of its own: names without a prefix, a true login, nothing else there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.access import throttle
from tests.conftest import OPEN, Clock, Serve, Site
from tests.test_access import ALICE, BASIC, BLOB, Door, granting, login, token
from tests.test_bearer import PRIVATE, Server, pem
from tests.test_htpasswd import line
from tests.upstream import Image, Upstream


class Entrance(Door):
    """A door to the listener of the store."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.url = str(site.app.store_urls["local"].origin())

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Any:
        door = self.site

        class There:
            def request(self, method: str, path: str, **options: Any) -> Any:
                return door.session.request(method, url + path, allow_redirects=False, **options)

        url, self.site = self.url, There()  # type: ignore[assignment]
        try:
            return await super().ask(method, path, headers, body)
        finally:
            self.site = door


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "htpasswd"
    path.write_text(line("alice", "wonderland"))
    return path


@pytest.fixture
def server(clock: Clock) -> Server:
    return Server(clock)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "token.pem"
    path.write_bytes(pem(PRIVATE["EC"]))
    return path


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "latest", layers=(BLOB,))


async def entrance(serve: Serve, upstream: Upstream, access: dict[str, Any], **local: Any) -> Entrance:
    more = {"local": {"store": {}, "listen": "127.0.0.1:0", **local}, "edge": {"store": {}}}
    return Entrance(await serve(upstream, more=more, top={"access": access}))


async def test_login_is_true(
    serve: Serve, upstream: Upstream, users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "FREE", 1 << 30)  # the wait after many failed logins is tested elsewhere
    door = await entrance(serve, upstream, {"htpasswd": str(users)})
    for headers, status in (({}, 401), (ALICE, 200), (login("alice", "x"), 401), (login("x", "y"), 401)):
        for path in ("/v2/", "/v2", "/v2/?ns=docker.io", "/docker.io/v2/"):
            said = await door.ask("GET", path, headers)
            assert (said.status, said.challenge) == (status, None if status == 200 else BASIC)
    # Its other listener is a mirror.
    assert (await Door(door.site).ask("GET", "/v2/")).status == 200


@pytest.mark.parametrize("name", ["app", "team/app", "ghcr.io/team/app", "edge/app", "docker.io/library/x"])
async def test_names_are_those_of_the_store(serve: Serve, upstream: Upstream, users: Path, name: str) -> None:
    door = await entrance(serve, upstream, {"htpasswd": str(users)})
    assert (await door.push(ALICE, f"/v2/{name}")).status == 201
    elsewhere = Door(door.site)
    for there, path in ((door, f"/v2/{name}"), (elsewhere, f"/v2/local/{name}"), (door, f"/v2/local/{name}")):
        said = await there.ask("GET", f"{path}/manifests/1", ALICE)
        assert said.status == 200, path
    said = await door.ask("GET", f"/v2/{name}/tags/list", ALICE)
    assert json.loads(said.body) == {"name": name, "tags": ["1"]}
    for namespace in ("edge", "docker.io"):
        said = await elsewhere.ask("GET", f"/v2/{namespace}/{name}/manifests/1", ALICE)
        assert said.status == 404


@pytest.mark.parametrize(
    "path", ["/v2/docker.io/library/alpine", "/v2/library/alpine", "/docker.io/v2/library/alpine"]
)
async def test_caches_are_not_there(serve: Serve, upstream: Upstream, image: Image, path: str) -> None:
    door = await entrance(serve, upstream, OPEN)
    for more in ("", "?ns=docker.io"):
        said = await door.ask("GET", f"{path}/manifests/latest{more}")
        assert said.status == 404
    assert not upstream.requests
    assert (await Door(door.site).ask("GET", "/v2/library/alpine/manifests/latest")).status == 200


@pytest.mark.parametrize(
    ("scope", "right"), [("local/edge/app", True), ("edge/app", False), ("local/app", False)]
)
async def test_a_token_for_another_namespace_is_none_for_what_has_its_name_there(
    serve: Serve, upstream: Upstream, keys: Path, server: Server, scope: str, right: bool
) -> None:
    door = await entrance(serve, upstream, token(keys))
    said = await door.push_blob(granting(server, scope, "push"), "/v2/edge/app")
    assert said.status == (201 if right else 401)


async def test_the_catalog_lists_names_as_they_are_used_there(
    serve: Serve, upstream: Upstream, users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.access.catalog.PAGE", 1)
    door = await entrance(serve, upstream, {"htpasswd": str(users)})
    for name in ("team/a", "team/b", "zoo"):
        assert (await door.push(ALICE, f"/v2/{name}")).status == 201
    assert (await Door(door.site).push(ALICE, "/v2/edge/other")).status == 201
    found, path = [], "/v2/_catalog?n=1"
    while path:
        said = await door.ask("GET", path, ALICE)
        found.append(json.loads(said.body)["repositories"])
        path = said.headers.get("Link", "").partition("<")[2].partition(">")[0]
    assert found == [["team/a"], ["team/b"], ["zoo"]]
    assert (await door.ask("GET", "/v2/_catalog", login("alice", "x"))).status == 401


async def test_the_way_of_an_upload_leads_back(serve: Serve, upstream: Upstream, users: Path) -> None:
    door = await entrance(serve, upstream, {"htpasswd": str(users)})
    begun = await door.ask("POST", "/v2/team/app/blobs/uploads/", ALICE)
    assert begun.status == 202
    assert begun.headers["Location"].startswith("/v2/team/app/blobs/uploads/")
    assert (await door.ask("DELETE", begun.headers["Location"], ALICE)).status == 204


async def test_a_host_of_another_namespace_changes_nothing(serve: Serve, upstream: Upstream) -> None:
    door = await entrance(serve, upstream, OPEN, hosts=["local.example"])
    for host in ("docker.io", "edge", "local.example"):
        assert (await door.push({"Host": host}, "/v2/local/team/app")).status == 201
        said = await Door(door.site).ask("GET", "/v2/local/team/app/manifests/1")
        assert said.status == 200


async def test_it_has_the_certificate_of_the_main_listener(
    serve: Serve, upstream: Upstream, identity: dict[str, str]
) -> None:
    more = {"local": {"store": {}, "listen": "127.0.0.1:0"}}
    site = await serve(upstream, more=more, top={"tls": identity})
    door = Entrance(site)
    assert door.url.startswith("https://")
    assert (await door.push({}, "/v2/app")).status == 201
    door.url = door.url.replace("https:", "http:")
    assert (await door.ask("GET", "/v2/")).status == 400
