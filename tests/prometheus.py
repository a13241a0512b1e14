"""Prometheus, and what its format says: for tests of metrics, rules and dashboards."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from tests.clients.processes import Process, require
from tests.fleet import free_ports

SCRAPED = "Scraped"  # fires once all targets have been scraped
Samples = dict[str, float]


def samples(text: str) -> Samples:
    """Each sample of an exposition, by its name and its labels as PromQL writes them, in order."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def promtool(*arguments: str, standard_input: str = "") -> str:
    """What promtool says; empty if it finds nothing wrong."""
    require("promtool", root=False)
    done = subprocess.run(
        ["promtool", *arguments], input=standard_input, capture_output=True, text=True, timeout=60
    )
    return "" if done.returncode == 0 and not done.stderr else done.stdout + done.stderr


Alerts = dict[str, list[dict[str, str]]]  # the labels of each alert that has fired, by its name


class PrometheusServer:
    """A Prometheus that scrapes `targets` and evaluates `rules`, and sends alerts here.

    Rules fire at once: for how long their condition has to last is left out.  `conditions` are further rules:
    expressions by the name of an alert.
    """

    def __init__(
        self,
        directory: Path,
        targets: Sequence[str],
        rules: Sequence[Path],
        conditions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        scraped = f"sum(max_over_time(up[1m])) >= {len(targets)}"
        self._conditions = {SCRAPED: scraped, **conditions}
        self.fired: Alerts = {}
        self._directory = directory
        self._targets = targets
        self._rules = rules
        self._news = asyncio.Event()
        self.url = ""

    async def __aenter__(self) -> PrometheusServer:
        require("prometheus", root=False)
        port, receiver = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        application = web.Application()
        application.router.add_post("/api/v2/alerts", self._receive)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", receiver).start()
        self._process = await asyncio.create_subprocess_exec(
            *("prometheus", f"--config.file={self._configure(receiver)}", "--log.level=error"),
            *(f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={self._directory / 'data'}"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "GOMAXPROCS": "1"},
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self._process.kill()
        await self._process.wait()
        await self._runner.cleanup()
        await asyncio.sleep(0)

    def _configure(self, receiver: int) -> Path:
        files = []
        for path in self._rules:
            tree = yaml.safe_load(path.read_text())
            for group in tree["groups"]:
                for rule in group["rules"]:
                    rule.pop("for", None)
            files.append(self._directory / path.name)
            files[-1].write_text(yaml.safe_dump(tree))
        own = [{"alert": name, "expr": text} for name, text in self._conditions.items()]
        files.append(self._directory / "conditions.yml")
        files[-1].write_text(yaml.safe_dump({"groups": [{"name": "conditions", "rules": own}]}))
        tree = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "500ms"},
            "rule_files": [str(each) for each in files],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{receiver}"]}]}]},
            "scrape_configs": [
                {"job_name": "entrepot", "static_configs": [{"targets": list(self._targets)}]}
            ],
        }
        path = self._directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(tree))
        return path

    async def _receive(self, request: web.Request) -> web.Response:
        for alert in await request.json():
            self.fired.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        self._news.set()
        self._news = asyncio.Event()
        return web.Response()

    async def wait_for(self, *alerts: str, seconds: float = 60.0) -> set[str]:
        """Wait until all of these have fired; those that have not in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while set(alerts) - set(self.fired):
                    await self._news.wait()
        return set(alerts) - set(self.fired)

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of a query, when all targets had last answered.  Fails if Prometheus refuses it."""
        async with aiohttp.ClientSession() as session:
            up = f"sum(up) == {len(self._targets)}"
            [now] = await self._ask(session, f"timestamp({up})") or await self._ask(
                session, f"max_over_time(timestamp({up})[1m:500ms])"
            )
            return await self._ask(session, expression, time=now["value"][1])

    async def _ask(self, session: aiohttp.ClientSession, expression: str, **more: str) -> list[Any]:
        return await ask(session, f"{self.url}/api/v1/query", query=expression, **more)


@contextmanager
def recorded(samples: Path, directory: Path) -> Iterator[str]:
    """The URL of a Prometheus that has these samples, in the format of OpenMetrics, and scrapes nothing."""
    require("prometheus", root=False)
    data, configuration = directory / "data", directory / "prometheus.yml"
    said = promtool("tsdb", "create-blocks-from", "openmetrics", str(samples), str(data))
    assert any(data.glob("*/index")), said
    configuration.write_text("{}")
    (port,) = free_ports(1)
    process = Process(
        [
            *("prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={data}"),
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        {"PATH": os.environ["PATH"], "GOMAXPROCS": "1"},
        ready="ready to receive web requests",
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stop()


async def ask(session: aiohttp.ClientSession, url: str, **parameters: str) -> list[Any]:
    """The result of a query.  Fails if Prometheus refuses it."""
    async with session.get(url, params=parameters) as response:
        answer = await response.json()
    assert answer["status"] == "success", f"{parameters['query']}: {answer.get('error')}"
    return list(answer["data"]["result"])
