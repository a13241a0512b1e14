"""The dashboards of deploy/grafana, drawn from what Prometheus answers of what a real server did."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import trustme
from prometheus_client.parser import text_string_to_metric_families

from storage.oci import Digest
from tests import fleet
from tests.authority import Authority
from tests.browser.conftest import Open
from tests.browser.panels import Series, is_empty, page
from tests.conftest import OPEN
from tests.processes import Place, Server, place
from tests.prometheus import ask, recorded
from tests.relay import Relay
from tests.test_dashboards import DASHBOARDS, dashboard, panels
from tests.upstream import Basic, Bearer, Hold, Status, Upstream

__all__ = ["place"]  # a fixture

ROUNDS = 24
INTERVAL = 30  # seconds that a round counts as; the server does it in less
WINDOW = 4 * INTERVAL  # of a rate, as Grafana chooses it
SAMPLES = "samples.txt"
INSTANCE = "cache.example:5001"

# Panels that may be empty after what the test does, and why.
EMPTY = {
    "Requests of other replicas": "there is no fleet",
    "Bytes that came twice by namespace": "none did",
    "Time of a run": "a task runs once in a minute or less often, so that its count does not change",
}


def asked_of(text: str) -> str:
    """What Grafana asks where everything is chosen."""
    for name, value in (
        ("__rate_interval", f"{WINDOW}s"),
        ("__range", f"{ROUNDS * INTERVAL}s"),
        ("instance", ".*"),
        ("namespace", ".*"),
    ):
        text = text.replace(f"${name}", value)
    return text


class Traffic:
    """Does with a server what panels show."""

    def __init__(self, server: Server, upstream: Upstream, strange: Upstream) -> None:
        self.server = server
        self.upstream = upstream
        self.strange = strange
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False))
        self._lines: list[str] = []

    async def get(self, path: str) -> int:
        async with self.session.get(f"{self.server.url}/v2/{path}") as response:
            await response.read()
            return response.status

    async def act(self, operation: str, **arguments: Any) -> None:
        url = f"{self.server.admin_url}/api/v1/{operation}"
        async with self.session.post(url, json=arguments) as response:
            assert response.status < 300, await response.text()

    async def pull(self, number: int, times: int) -> None:
        """An image that was not asked for before, and hits."""
        image = self.upstream.image("library/app", str(number), [b"layer %d" % number * 9999])
        for _ in range(times):
            assert await self.get(f"library/app/manifests/{number}") == 200
            assert await self.get(f"library/app/blobs/{image.layers[0]}") == 200

    async def once(self, number: int) -> None:
        """More by day than by night."""
        self.upstream.ratelimit = (100, 21600, 90 - number)
        await self.pull(number, 2 + number % 8)
        assert await self.get("library/app/manifests/absent") == 404
        if 6 <= number % 12 < 9:
            self.strange.next("GET", f"{number}", Status(500), times=3)
            assert await self.get(f"library/app/manifests/{number}?ns=strange.example") >= 500
            assert await self.get("library/app/manifests/1?ns=closed.example") >= 400
            assert await self.get("library/app/manifests/1?ns=down.example") >= 500
        self.strange.image("team/app", "1", [b"build %d" % number])
        assert await self.get("team/app/manifests/1?ns=strange.example") == 200
        content = b"pushed %d" % number
        path = f"{self.server.url}/v2/local/app/blobs/uploads/?digest={Digest.of(content)}"
        async with self.session.post(path, data=content) as response:
            assert response.status == 201
        if number % 8 == 5:
            for operation, arguments in (("evict", {"to": 100_000}), ("scrub", {}), ("collect", {})):
                await self.act(operation, **arguments)

    @asynccontextmanager
    async def transfer(self, number: int) -> AsyncIterator[None]:
        """Inside, a blob that several clients want has come in part."""
        image = self.upstream.image("library/large", str(number), [b"large %d" % number * 50_000])
        hold = Hold(asyncio.Event(), after=100_000)
        self.upstream.next("GET", image.layers[0], hold)
        path = f"library/large/blobs/{image.layers[0]}"
        pulls = [asyncio.create_task(self.get(path)) for _ in range(1 + number % 4)]
        await hold.reached.wait()
        yield
        hold.gate.set()
        assert set(await asyncio.gather(*pulls)) == {200}

    async def note(self, when: float) -> None:
        """Read the metrics, as Prometheus would at this time."""
        async with self.session.get(f"{self.server.admin_url}/metrics") as response:
            text = await response.text()
        labels = {"instance": INSTANCE, "job": "entrepot"}
        found = [
            (sample.name, {**sample.labels, **labels}, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
        for name, values, value in [*found, ("up", labels, 1.0)]:
            written = ",".join(f'{key}="{text}"' for key, text in values.items())
            self._lines.append(f"{name}{{{written}}} {value} {when}\n")

    def write(self, path: Path) -> None:
        path.write_text("".join(self._lines) + "# EOF\n")


def configure(place: Place, directory: Path, strange: Upstream, closed: Upstream, relay: Relay) -> None:
    [dead] = fleet.free_ports(1)
    place.namespace["upstream"] = {
        "url": f"https://localhost:{relay.port}",
        "ca_file": str(directory / "theirs.pem"),
    }
    expires = datetime(2040, 1, 1, tzinfo=UTC).timestamp()
    odd = {"name": "odd", "action": "deny", "repositories": ["docker.io/*"], "mode": "audit", "reason": "odd"}
    place.tree |= {
        "workers": 1,
        "access": OPEN,
        "tls": Authority(directory).issue("server", expires=expires),
        "webhooks": [{"name": "hook", "url": f"http://127.0.0.1:{dead}"}],
        "policy": {
            "rules": [odd],
            "moves": [
                {"name": "releases", "repositories": ["strange.example/*"], "tags": ["*"], "approval": True}
            ],
        },
    }
    place.tree["disk"]["cache_limit"] = "1GB"
    place.tree["namespaces"] |= {
        "strange.example": {"upstream": {"url": strange.url}, "fresh_for": "0s"},
        "closed.example": {"upstream": {"url": closed.url, "username": "robot", "password": "wrong"}},
        "down.example": {"upstream": {"url": f"http://127.0.0.1:{dead}"}},
        "local": {"store": {}},
    }


async def answers(url: str, name: str, start: float) -> dict[str, list[Sequence[Series]]]:
    """What Prometheus says to each target of each panel."""
    found: dict[str, list[Sequence[Series]]] = {}
    stop = start + (ROUNDS - 1) * INTERVAL
    async with aiohttp.ClientSession() as session:
        for panel in panels(name):
            for target in panel["targets"]:
                result = await ask(
                    session,
                    f"{url}/api/v1/query_range",
                    query=asked_of(target["expr"]),
                    start=str(stop if target.get("instant") else start + WINDOW),
                    end=str(stop),
                    step=str(INTERVAL),
                )
                series = [
                    Series(each["metric"], [(when, float(value)) for when, value in each["values"]])
                    for each in result
                ]
                found.setdefault(panel["title"], []).append(series)
    return found


async def measured(place: Place, upstream: Upstream, directory: Path) -> float:
    """Have a server do all that panels show, and write what its metrics were; returns the first time."""
    theirs, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.cert_pem.write_to_path(str(directory / "theirs.pem"))
    theirs.issue_cert("localhost").configure_cert(context)
    async with (
        Upstream() as strange,
        Upstream(auth=Bearer(credentials=Basic("robot", "right"), anonymous=False)) as closed,
        Relay(int(upstream.url.rpartition(":")[2]), context) as relay,
    ):
        configure(place, directory, strange, closed, relay)
        server = await place.start()
        before = Traffic(server, upstream, strange)
        await before.pull(ROUNDS, 1)
        await before.session.close()
        await server.stop()
        server = await place.start()  # what namespaces hold is counted at the start, and seldom later
        traffic = Traffic(server, upstream, strange)
        start = time.time() // INTERVAL * INTERVAL
        for number in range(ROUNDS):
            await traffic.once(number)
            async with traffic.transfer(number) if number % 3 == 1 else nullcontext():
                await traffic.note(start + number * INTERVAL)
        await traffic.session.close()
        await server.stop()
    traffic.write(directory / SAMPLES)
    return start


async def test_every_panel_shows_something(
    place: Place, upstream: Upstream, tmp_path: Path, window: Open
) -> None:
    start = await measured(place, upstream, tmp_path)
    with recorded(tmp_path / SAMPLES, tmp_path) as url:
        found = {name: await answers(url, name, start) for name in DASHBOARDS}
    empty = {title for each in found.values() for title, answer in each.items() if is_empty(answer)}
    assert empty <= EMPTY.keys(), "they show nothing"
    file = tmp_path / "dashboards.html"
    file.write_text(page({name: dashboard(name) for name in DASHBOARDS}, found))
    tab = await window(file.as_uri())
    await tab.show(file.as_uri())
    for name in DASHBOARDS:
        drawn = [each for each in panels(name) if not is_empty(found[name][each["title"]])]
        charts = [each for each in drawn if each["type"] not in ("stat", "table")]
        assert await tab.count(f"#{name} section:not(.row)") == len(panels(name))
        assert await tab.count(f"#{name} .main-svg:first-child") == len(charts)
        await tab.picture(f"grafana-{name}", f"#{name}")
