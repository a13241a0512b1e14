"""The admin listener: health for whoever restarts it, readiness for whoever sends it clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import pytest
from aiohttp.test_utils import TestClient, TestServer

from proxy.telemetry import Metrics
from proxy.web.admin import application
from tests.conftest import Serve
from tests.upstream import Upstream

Open = Callable[[Mapping[str, str]], Awaitable[TestClient]]  # type: ignore[type-arg]


@pytest.fixture
async def admin() -> AsyncIterator[Open]:
    clients = []

    async def start(state: Mapping[str, str]) -> TestClient:  # type: ignore[type-arg]
        client = TestClient(TestServer(application(Metrics(), lambda: state)))
        clients.append(client)
        await client.start_server()
        return client

    yield start
    for client in clients:
        await client.close()


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ({"status": "ready"}, 200),
        ({"status": "degraded", "store": "/x: No space left on device"}, 200),
        ({"status": "draining"}, 503),
    ],
)
async def test_readiness(admin: Open, state: Mapping[str, str], status: int) -> None:
    client = await admin(state)
    response = await client.get("/readyz")
    assert (response.status, await response.json()) == (status, state)
    assert response.headers["Content-Type"] == "application/json"
    assert (await client.head("/readyz")).status == status
    # Alive it is in any case: a restart would mend none of these.
    response = await client.get("/healthz")
    assert (response.status, await response.json()) == (200, {"status": "alive"})


@pytest.mark.parametrize("path", ["/", "/metric", "/v2/", "/metrics/", "/healthz/x"])
async def test_other_paths_are_404_in_json(admin: Open, path: str) -> None:
    response = await (await admin({"status": "ready"})).get(path)
    assert (response.status, await response.json()) == (404, {"error": "Not Found"})
    assert response.headers["Content-Type"] == "application/json"


async def test_other_methods_are_405_in_json(admin: Open) -> None:
    response = await (await admin({"status": "ready"})).post("/metrics")
    assert (response.status, await response.json()) == (405, {"error": "Method Not Allowed"})
    assert set(response.headers["Allow"].split(",")) == {"GET", "HEAD"}


async def test_metrics_are_in_the_format_of_prometheus(admin: Open) -> None:
    response = await (await admin({"status": "ready"})).get("/metrics")
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    assert "# HELP entrepot_requests_total Client requests." in await response.text()


async def test_it_is_a_listener_of_its_own(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    assert site.app.admin_url is not None
    assert (await site.get("/metrics"))[0] == 404
    async with site.session.get(site.app.admin_url / "v2/") as response:
        assert response.status == 404


async def test_off(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, top={"admin": "off"})
    assert site.app.admin_url is None
    assert (await site.get("/v2/"))[0] == 200
