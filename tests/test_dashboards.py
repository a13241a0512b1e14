"""The dashboards of deploy/grafana: Grafana imports them, and every panel shows something real."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from storage.oci import Digest
from tests import fleet
from tests.authority import Authority
from tests.conftest import OPEN
from tests.processes import Place, Server, place
from tests.prometheus import PrometheusServer
from tests.relay import Relay
from tests.upstream import Basic, Bearer, Status, Upstream

__all__ = ["place"]  # a fixture

ROOT = Path(__file__).parent.parent
DASHBOARDS = ("overview", "upstreams", "storage", "fills")
KINDS = {"row", "stat", "timeseries", "table", "bargauge", "heatmap"}
UNITS = {"short", "percentunit", "bytes", "Bps", "s", "reqps", "cps", "ops", "dateTimeAsIso"}
WIDTH = 24  # of Grafana's grid

# Panels that may be empty after what the test does, and why.
EMPTY = {
    "Requests of other replicas": "there is no fleet",
    "Moves of tags that the policy holds": "no rule holds tags",
    "By namespace": "what is stored is counted every five minutes, and was when there was nothing yet",
    "Bytes that came twice by namespace": "none did",
    "Time of a run": "a task runs once in a minute or less often, so that its count does not change",
}


def dashboard(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / f"{name}.json").read_text())
    return found


def panels(name: str) -> list[dict[str, Any]]:
    return [each for each in dashboard(name)["panels"] if each["type"] != "row"]


def expressions(name: str) -> Iterator[tuple[str, str]]:
    """Of each target, the title of its panel and what it asks."""
    for panel in panels(name):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_one_that_grafana_imports(name: str) -> None:
    found = dashboard(name)
    assert found["uid"] == f"entrepot-{name}" and found["schemaVersion"] >= 36 and found["title"]
    ids = [each["id"] for each in found["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {each["name"] for each in found["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        assert panel["type"] in KINDS
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= WIDTH
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
    for panel in panels(name):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert [each["refId"] for each in panel["targets"]] == list("ABCDE")[: len(panel["targets"])]
    for title, asked in expressions(name):
        used = set(re.findall(r"\$(\w+)", asked)) - {"__rate_interval", "__range"}
        assert used <= variables, title
        assert "$instance" in asked, f"{title}: shows servers that were not chosen"


def test_titles_are_not_used_twice_in_a_dashboard() -> None:
    for name in DASHBOARDS:
        titles = [each["title"] for each in dashboard(name)["panels"]]
        assert len(set(titles)) == len(titles)


def test_dashboards_show_every_metric() -> None:
    made = set(re.findall(r"entrepot_[a-z_]+", (ROOT / "proxy/telemetry/metrics.py").read_text()))
    asked = " ".join(text for name in DASHBOARDS for _, text in expressions(name))
    used = {re.sub("_(bucket|sum|count)$", "", each) for each in re.findall(r"entrepot_[a-z_]+", asked)}
    assert used <= made
    assert made - used <= UNSEEN.keys()


# Metrics that no panel shows, and why.
UNSEEN = {
    "entrepot_peer_sent_bytes_total": "the requests of replicas are shown",
    "entrepot_peers": "the alert for a replica is about one that is known",
    "entrepot_collection_duration_seconds": "collections are rare",
    "entrepot_scrub_checked_total": "their bytes are shown",
    "entrepot_issued_tokens_total": "the requests for them are among all requests",
}


def asked_of(text: str) -> str:
    """What Grafana asks where everything is chosen."""
    for name, value in (
        ("__rate_interval", "1m"),
        ("__range", "1m"),
        ("instance", ".*"),
        ("namespace", ".*"),
    ):
        text = text.replace(f"${name}", value)
    return text


# A real server


class Traffic:
    """Does with a server what panels show."""

    def __init__(self, server: Server, strange: Upstream) -> None:
        self.server = server
        self.strange = strange
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False))

    async def get(self, path: str) -> int:
        async with self.session.get(f"{self.server.url}/v2/{path}") as response:
            await response.read()
            return response.status

    async def act(self, operation: str, **arguments: Any) -> None:
        url = f"{self.server.admin_url}/api/v1/{operation}"
        async with self.session.post(url, json=arguments) as response:
            assert response.status < 300, await response.text()

    async def once(self, image: Any, number: int) -> None:
        """Hits, misses and errors, with an image and a tag that were not asked for before."""
        for _ in range(2):
            assert await self.get(f"library/app/manifests/{number}") == 200
            assert await self.get(f"library/app/blobs/{image.layers[0]}") == 200
        assert await self.get("library/app/manifests/absent") == 404
        self.strange.next("GET", f"{number}", Status(503), times=3)
        assert await self.get(f"library/app/manifests/{number}?ns=strange.example") >= 500
        assert await self.get("library/app/manifests/1?ns=closed.example") >= 400
        assert await self.get("library/app/manifests/1?ns=down.example") >= 500
        content = b"pushed %d" % number
        path = f"{self.server.url}/v2/local/app/blobs/uploads/?digest={Digest.of(content)}"
        async with self.session.post(path, data=content) as response:
            assert response.status == 201
        for operation, arguments in (("evict", {"to": 0}), ("scrub", {}), ("collect", {})):
            await self.act(operation, **arguments)


@pytest.mark.clients
async def test_every_panel_shows_something(place: Place, upstream: Upstream, tmp_path: Path) -> None:
    authority, theirs = Authority(tmp_path), trustme.CA()
    theirs.cert_pem.write_to_path(str(tmp_path / "theirs.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.issue_cert("localhost").configure_cert(context)
    images = [upstream.image("library/app", str(each), [b"layer %d" % each * 999]) for each in range(2)]
    upstream.ratelimit = (100, 21600, 90)
    [dead] = fleet.free_ports(1)
    async with (
        Upstream() as strange,
        Upstream(auth=Bearer(credentials=Basic("robot", "right"), anonymous=False)) as closed,
        Relay(int(upstream.url.rpartition(":")[2]), context) as relay,
    ):
        place.namespace["upstream"] = {
            "url": f"https://localhost:{relay.port}",
            "ca_file": str(tmp_path / "theirs.pem"),
        }
        expires = datetime(2040, 1, 1, tzinfo=UTC).timestamp()
        place.tree |= {
            "workers": 1,
            "access": OPEN,
            "tls": authority.issue("server", expires=expires),
            "webhooks": [{"name": "hook", "url": f"http://127.0.0.1:{dead}"}],
            "policy": {
                "rules": [
                    {
                        "name": "odd",
                        "action": "deny",
                        "repositories": ["docker.io/*"],
                        "mode": "audit",
                        "reason": "odd",
                    }
                ]
            },
        }
        place.tree["disk"]["cache_limit"] = "1GB"
        place.tree["namespaces"] |= {
            "strange.example": {"upstream": {"url": strange.url}},
            "closed.example": {"upstream": {"url": closed.url, "username": "robot", "password": "wrong"}},
            "down.example": {"upstream": {"url": f"http://127.0.0.1:{dead}"}},
            "local": {"store": {}},
        }
        server = await place.start()
        traffic = Traffic(server, strange)
        conditions = {  # a collection is the last that is done
            name: f'entrepot_collections_total{{result="done"}} >= {count}'
            for name, count in (("Once", 1), ("Twice", 2))
        }
        target = server.admin_url.removeprefix("http://")
        async with PrometheusServer(tmp_path, [target], [], conditions) as prometheus:
            for image, condition in zip(images, conditions, strict=True):
                await traffic.once(image, images.index(image))
                assert await prometheus.wait_for(condition) == set()
            empty = set()
            for name in DASHBOARDS:
                for title, text in expressions(name):
                    found = await prometheus.query(asked_of(text))
                    if not [each for each in found if each["value"][1] != "NaN"]:
                        empty.add(title)
        await traffic.session.close()
        await server.stop()
    assert empty - EMPTY.keys() == set(), "they show nothing"
