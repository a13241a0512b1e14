"""Errors that say where clients push and log in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.test_access import ALICE, BASIC, Door, login
from tests.test_htpasswd import line
from tests.test_store_listener import Entrance
from tests.upstream import Upstream

HOST = {"Host": "cache.example:5000"}
STORE: dict[str, Any] = {"local": {"store": {}}}


@pytest.fixture
def users(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "htpasswd"
    path.write_text(line("alice", "wonderland"))
    return {"htpasswd": str(path)}


async def message(door: Door, method: str, path: str, headers: dict[str, str] = HOST) -> tuple[int, str]:
    said = await door.ask(method, path, headers)
    (error,) = json.loads(said.body)["errors"]
    return said.status, error["message"]


@pytest.mark.parametrize(
    ("name", "status", "cause", "there"),
    [
        ("docker.io/library/app", 405, "belongs to docker.io, a cache", "library/app"),
        ("docker.io/app", 405, "belongs to docker.io, a cache", "app"),
        ("team/app", 405, "belongs to docker.io, a cache", "team/app"),
        ("app", 405, "belongs to docker.io, a cache", "app"),
        ("ghcr.example/team/app", 404, "'ghcr.example' is not a configured namespace", "team/app"),
        ("ghcr.example:8443/app", 404, "'ghcr.example:8443' is not a configured namespace", "app"),
    ],
)
@pytest.mark.parametrize(("method", "endpoint"), [("POST", "blobs/uploads/"), ("PUT", "manifests/1")])
async def test_a_push_that_nothing_takes(
    serve: Serve,
    upstream: Upstream,
    name: str,
    status: int,
    cause: str,
    there: str,
    method: str,
    endpoint: str,
) -> None:
    door = Door(await serve(upstream, more=STORE))
    found = await message(door, method, f"/v2/{name}/{endpoint}")
    assert found[0] == status
    assert cause in found[1]
    assert found[1].endswith(f": push to cache.example:5000/local/{there}")
    assert not upstream.requests


async def test_a_push_where_nothing_is_the_default(serve: Serve, upstream: Upstream) -> None:
    door = Door(await serve(upstream, more=STORE, top={"default_namespace": None}))
    status, text = await message(door, "POST", "/v2/app/blobs/uploads/")
    assert status == 404
    assert text.endswith("there is no default: push to cache.example:5000/local/app")


@pytest.mark.parametrize(
    ("stores", "where"),
    [
        ({}, "no namespace of this server takes pushes (store: {})"),
        (
            {"local": None, "edge": None},
            "push to cache.example:5000/edge/a/b or cache.example:5000/local/a/b",
        ),
        ({"local": "0.0.0.0:7011"}, "push to cache.example:7011/a/b"),
        ({"local": "127.0.0.1:7011"}, "push to 127.0.0.1:7011/a/b"),
    ],
)
async def test_what_takes_pushes(
    serve: Serve, upstream: Upstream, stores: dict[str, str | None], where: str
) -> None:
    more = {name: {"store": {}, "listen": listen} for name, listen in stores.items()}
    door = Door(await serve(upstream, more=more))
    status, text = await message(door, "POST", "/v2/a/b/blobs/uploads/")
    assert (status, text) == (405, f"a/b belongs to docker.io, a cache, which takes no pushes: {where}")


async def test_a_pull_is_told_nothing_of_pushes(serve: Serve, upstream: Upstream) -> None:
    door = Door(await serve(upstream, more=STORE))
    status, text = await message(door, "GET", "/v2/ghcr.example/app/manifests/1")
    assert status == 404
    assert "push" not in text


async def test_a_deletion_from_a_cache(serve: Serve, upstream: Upstream) -> None:
    door = Door(await serve(upstream, more=STORE))
    status, text = await message(door, "DELETE", "/v2/library/app/manifests/1")
    assert (status, text) == (
        405,
        "docker.io is a cache: an operator deletes from it, by entrepot purge",
    )


@pytest.mark.parametrize(
    ("namespaces", "how"),
    [
        ({"listen": None}, "podman login cache.example:5000; docker cannot log in there"),
        ({"listen": None, "hosts": ["cache.example"]}, "docker login cache.example:5000"),
        (
            {"listen": "127.0.0.1:7011"},
            "docker login 127.0.0.1:7011, since docker cannot log in at cache.example:5000",
        ),
    ],
)
@pytest.mark.parametrize("user", [{}, login("alice", "x")])
async def test_how_docker_logs_in(
    serve: Serve,
    upstream: Upstream,
    users: dict[str, str],
    namespaces: dict[str, Any],
    how: str,
    user: dict[str, str],
) -> None:
    more = {"local": {"store": {}, **namespaces}}
    door = Door(await serve(upstream, more=more, top={"access": users}))
    path = "/v2/app" if "hosts" in namespaces else "/v2/local/app"
    status, text = await message(door, "POST", f"{path}/blobs/uploads/", {**HOST, **user})
    assert status == 401
    assert text.endswith(f": {how}")


async def test_how_docker_logs_in_where_its_ping_is_challenged(
    serve: Serve, upstream: Upstream, users: dict[str, str]
) -> None:
    more = {"local": {"store": {}, "listen": "127.0.0.1:0"}}
    door = Entrance(await serve(upstream, more=more, top={"access": users}))
    for path, method in (("/v2/", "GET"), ("/v2/app/blobs/uploads/", "POST")):
        status, text = await message(door, method, path)
        assert status == 401
        assert text.endswith(": docker login cache.example:5000")
    assert (await door.ask("GET", "/v2/", {**HOST, **ALICE})).status == 200
    assert (await door.ask("GET", "/v2/", HOST)).challenge == BASIC
