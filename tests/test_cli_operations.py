"""The commands, each against a running server and on a directory."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from proxy.admin import activity_reports, fill_feed, models, reports, rows
from proxy.cli import content, fills, maintenance, pins, removal, savings, status
from proxy.cli.main import main
from proxy.cli.target import reach
from proxy.config.loader import load
from proxy.config.quantities import format_size
from storage.maintenance.usage import Counters
from tests.authority import Authority
from tests.conftest import Clock, Serve, Site
from tests.events import Ear
from tests.upstream import Hold, Image, Manifest, Upstream

LAYER = b"a layer" * 1000
NAME = "docker.io/library/alpine"


@dataclass
class Shop:
    """A cache with `index` (tag 3), of which `image` was pulled, and how to run commands on it."""

    site: Site
    upstream: Upstream
    config: Path
    image: Image
    other: Image
    index: Manifest
    running: bool

    async def run(self, *words: str, server: bool = True, **options: Any) -> Result:
        given = ["--config", str(self.config)]
        if self.running and server:
            given += ["--server", str(self.site.app.admin_url)]
        # The program has a loop of its own.
        return await asyncio.to_thread(CliRunner().invoke, main, [*words, *given], **options)

    async def told(self, *words: str) -> Any:
        result = await self.run(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    async def lines(self, *words: str) -> list[str]:
        result = await self.run(*words)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    async def fails(self, *words: str, status: int = 1, **options: Any) -> str:
        result = await self.run(*words, **options)
        assert result.exit_code == status, result.output
        return result.stderr

    def asked(self) -> list[str]:
        return [str(each) for each in self.upstream.requests]


@pytest.fixture(params=["server", "directory"])
async def shop(request: pytest.FixtureRequest, serve: Serve, upstream: Upstream, tmp_path: Path) -> Shop:
    return await stocked(serve, upstream, tmp_path, running=request.param == "server")


@pytest.fixture
async def served(serve: Serve, upstream: Upstream, tmp_path: Path) -> Shop:
    return await stocked(serve, upstream, tmp_path, running=True)


async def stocked(serve: Serve, upstream: Upstream, tmp_path: Path, running: bool, **top: Any) -> Shop:
    image = upstream.image("library/alpine", None, [LAYER, b"small"], platform="linux/amd64")
    other = upstream.image("library/alpine", None, [b"for arm" * 100], platform="linux/arm64")
    index = upstream.index("library/alpine", "3", [image, other])
    site = await serve(upstream, top=top)
    for path in (
        "manifests/3",
        f"manifests/{image.digest}",
        *(f"blobs/{each}" for each in (image.config, *image.layers)),
    ):
        status, _, _ = await site.get(f"/v2/library/alpine/{path}")
        assert status == 200
    await over(site)
    if not running:
        await site.app.stop()
    return Shop(site, upstream, tmp_path / "entrepot.yml", image, other, index, running)


async def over(site: Site) -> None:
    """What clients have already may still be on its way to the disk."""
    going_on = site.app.composition.fills.in_flight()
    await asyncio.gather(*(each.task for each in going_on if each.task))


# What is stored


async def test_ls_lists_repositories(shop: Shop) -> None:
    heads, row = await shop.lines("ls")
    assert heads.split() == ["REPOSITORY", "TAGS", "MANIFESTS", "STORED", "LAST", "USED"]
    assert row.split()[:3] == [NAME, "1", "2"]
    (found,) = msgspec.convert(await shop.told("ls"), models.Listed).repositories
    assert (found.repository, found.tags, found.manifests) == (NAME, 1, 2)
    assert found.bytes > len(LAYER)


async def test_ls_lists_tags_with_what_is_held(shop: Shop) -> None:
    (found,) = msgspec.convert(await shop.told("ls", "--tags"), models.Listed).images
    assert (found.repository, found.tag, found.digest) == (NAME, "3", shop.index.digest)
    assert [(each.platform, each.complete) for each in found.platforms] == [
        ("linux/amd64", True),
        ("linux/arm64", False),
    ]
    _, row = await shop.lines("ls", "--tags")
    assert row.startswith(f"{NAME}:3  {shop.index.digest}  ")
    assert "linux/amd64 (1 of 2)" in row


async def test_ls_takes_a_pattern(shop: Shop) -> None:
    assert len(await shop.lines("ls", "*alp*")) == 2
    hint = "A full name begins with its namespace, as in docker.io/library/alpine."
    assert await shop.lines("ls", "ghcr.io/*") == ["nothing that is stored matches", hint]
    assert len(await shop.lines("ls", "--tags", "alpine:*")) == 2


@pytest.mark.parametrize("name", ["docker.io", "docker.io/", "Index.docker.io"])
async def test_ls_takes_a_namespace(shop: Shop, name: str) -> None:
    assert NAME in (await shop.lines("ls", name))[1]
    (found,) = msgspec.convert(await shop.told("ls", "--tags", name), models.Listed).images
    assert found.repository == NAME
    assert (await shop.lines("ls", "ghcr.io"))[0] == "nothing that is stored matches"


async def test_ls_sorts(served: Shop) -> None:
    served.upstream.image("library/bear", "1", [LAYER * 10])
    served.upstream.image("library/zoo", "1", [b"a small one"])
    await served.run("warm", "bear:1", "zoo:1")
    served.site.clock.advance(100)
    await served.site.get("/v2/library/zoo/manifests/1")
    await served.site.app.composition.recorder.flush()
    for order, expected in (
        ("name", "alpine bear zoo"),
        ("size", "bear alpine zoo"),
        ("used", "zoo alpine bear"),
    ):
        for options in ([], ["--tags"]):
            _, *rows, total = await served.lines("ls", "docker.io", "--sort", order, *options)
            assert [re.split("[/: ]", row)[2] for row in rows] == expected.split()
            assert total.startswith("3 ")
    listed = msgspec.convert(await served.told("ls"), models.Listed).repositories
    now = served.site.clock()
    assert [each.last_used for each in listed] == [now - 100, None, now]


async def test_ls_gets_all_pages(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PAGE", 1)
    found = await shop.told("ls", "--tags", "*@*")
    assert {each["digest"] for each in found["images"]} == {shop.index.digest, shop.image.digest}
    assert found["next"] is None


async def test_show_draws_the_tree(shop: Shop) -> None:
    lines = await shop.lines("show", "alpine:3")
    assert lines[0] == f"{NAME}:3"
    starts = [line.split()[:-1] for line in lines[2:8]]
    assert starts[0][:2] == [shop.index.digest, "manifest"]
    assert [each[0] for each in starts[1:]] == ["├─", "│", "│", "│", "└─"]
    assert [word for line in starts for word in line if word in ("yes", "no")] == ["yes"] * 5 + ["no"]
    tree = msgspec.convert(await shop.told("show", "alpine:3"), models.ImageTree)
    assert [each.digest for each in tree.node.children] == [shop.image.digest, shop.other.digest]
    assert [each.present for each in tree.node.children[0].children] == [True] * 3


async def test_show_of_what_is_not_cached(shop: Shop) -> None:
    assert "ghcr" not in await shop.fails("show", "alpine:4")
    assert "alpine:4" in await shop.fails("show", "alpine:4")
    told = json.loads(await shop.fails("show", "alpine:4", "--json"))
    assert told["code"] == "MANIFEST_UNKNOWN"


# What goes on


async def test_stats_count(shop: Shop) -> None:
    found = await shop.told("stats", "--period", "7d")
    assert found["period"] == 7 * 86400
    assert found["stored_bytes"] > len(LAYER)
    if shop.running:  # a directory is looked at by the clock on the wall
        (row,) = msgspec.convert(found, models.Stats).namespaces
        assert (row.namespace, row.requests, row.misses) == ("docker.io", 5, 5)
    lines = await shop.lines("stats", "--period", "7d")
    assert lines[0] == (
        "saved 0 B and 0 Hub requests this week"
        if shop.running
        else "nothing was pulled through a cache this week"
    )
    stored = [line for line in lines if line.startswith("this week; ")]
    assert [line.partition("; ")[2] for line in stored] == [
        f"{format_size(found['stored_bytes'])} stored in caches"
    ]
    assert ("" in lines) == shop.running  # a trend follows


def test_the_sentence_about_what_was_saved() -> None:
    def row(name: str, **numbers: int) -> models.StatsRow:
        return rows.stats_row(name, Counters(**numbers))

    def sentence(period: float, total: models.StatsRow, *namespaces: models.StatsRow) -> str:
        found = models.Stats(
            period=period,
            since=0.0,
            namespaces=list(namespaces),
            stores=[],
            total=total,
            days=[],
            stored_bytes=0,
            limit=None,
        )
        return savings.stats_tables(found, 0.0)[0].title

    hub = row("docker.io", requests=4000, upstream_requests=900, sent_bytes=20 << 30, received_bytes=8 << 30)
    other = row("ghcr.io", requests=2, upstream_requests=1)
    assert sentence(7 * 86400, hub, hub, other) == "saved 12.0 GiB and 3,100 Hub requests this week"
    assert sentence(86400, other, other) == "saved 0 B and 1 upstream request in the last 1 d"
    assert sentence(3600, row("")) == "nothing was pulled through a cache in the last 1 h"


async def test_fills_without_a_server(shop: Shop) -> None:
    if shop.running:
        assert await shop.lines("fills") == ["nothing is being transferred"]
    else:
        assert "no server is running" in await shop.fails("fills")
        assert json.loads(await shop.fails("fills", "--json"))["code"] == "NOT_RUNNING"


async def test_fills_tell_how_far(
    served: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill_feed, "INTERVAL", 0.01)
    body = os.urandom(50_000)
    digest = served.upstream.blob("library/alpine", body)
    hold = Hold(asyncio.Event(), after=20_000)
    served.upstream.next("GET", digest, hold)
    pulling = asyncio.create_task(served.site.get(f"/v2/library/alpine/blobs/{digest}"))
    await hold.reached.wait()
    [found] = await served.told("fills")
    assert (found["repository"], found["digest"], found["size"]) == (NAME, digest, 50_000)
    assert found["followers"] == 1
    _, row = await served.lines("fills")
    assert row.startswith(f"{NAME}  {digest}  ")

    async with reach(load(served.config), str(served.site.app.admin_url), None) as there:

        class UntilItEnds:
            """The operations, until nothing is transferred any more."""

            async def watch(self) -> AsyncIterator[activity_reports.FillsNow]:
                async with aclosing(there.watch()) as stream:  # type: ignore[type-var]
                    async for now in stream:
                        yield now
                        if not now.fills:
                            return
                        hold.gate.set()

        await fills.follow(UntilItEnds(), False)  # type: ignore[arg-type]
        assert capsys.readouterr().out.startswith(f"{NAME}@{digest}: ")
        await pulling
        await fills.follow(UntilItEnds(), True)  # type: ignore[arg-type]
        assert capsys.readouterr().out == "[]\n"
        async with aclosing(there.watch()) as stream:  # type: ignore[type-var]
            ended = (await anext(stream)).ended[0]
        assert (ended.digest, ended.repository, ended.bytes) == (digest, NAME, 50_000)
        assert (ended.result, ended.error) == ("committed", None)


# What is done


async def test_purge_of_a_reference(shop: Shop) -> None:
    before = shop.asked()
    dry = await shop.lines("purge", "alpine:3", "--dry-run")
    assert dry[:2] == ["WOULD BE PURGED", f"{NAME}:3"]
    assert dry[2].endswith("; nothing was deleted")
    lines = await shop.lines("purge", "alpine:3")
    assert lines[:2] == ["PURGED", f"{NAME}:3"]
    assert lines[2].startswith("2 manifests, 3 links, 3 blobs, ")
    assert "nothing that is stored matches alpine:3" in await shop.fails("purge", "alpine:3")
    assert shop.asked() == before


async def test_purge_by_a_glob_asks_first(shop: Shop) -> None:
    assert "give --yes" in await shop.fails("purge", "*alpine*", status=2)
    assert len(await shop.lines("ls")) == 2
    found = await shop.told("purge", "*alpine*", "--yes")
    assert found["blobs"] == 3
    assert await shop.lines("ls") == ["nothing that is stored matches"]
    assert "nothing that is stored" in await shop.fails("purge", "*alpine*", "--yes")


async def test_purge_asks_on_a_terminal(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "is_interactive", lambda: True)
    assert "nothing was purged" in await shop.fails("purge", "*alpine*", input="n\n")
    assert len(await shop.lines("ls")) == 2
    result = await shop.run("purge", "*alpine*", input="y\n")
    assert result.exit_code == 0
    assert f"{NAME}:3" in result.stderr
    assert "Purge?" in result.stderr
    assert "PURGED" in result.stdout


async def test_pins(shop: Shop) -> None:
    assert await shop.lines("pins") == ["nothing is pinned"]
    heads, row = await shop.lines("pin", "alpine:*", "--keep-fresh", "1h", "--platform", "linux/amd64")
    assert row.startswith(f"{NAME}:*  every 1 h  linux/amd64  ")
    assert (await shop.lines("pins"))[0] == heads
    (found,) = msgspec.convert(await shop.told("pins"), list[models.PinRow])
    assert (found.pattern, found.keep_fresh, found.platforms) == (f"{NAME}:*", 3600, ["linux/amd64"])
    assert (found.references, found.manifests, found.blobs) == (1, 2, 3)
    assert "pinned" in (await shop.lines("ls", "--tags"))[1]
    assert "pinned" in await shop.fails("purge", "*:3", "--yes")
    assert await shop.lines("unpin", f"{NAME}:*") == [f"{NAME}:* is no longer pinned"]
    assert "is not pinned" in await shop.fails("unpin", f"{NAME}:*")


async def test_refresh_fetches_what_is_not_here(shop: Shop) -> None:
    lines = await shop.lines("refresh", "alpine:3", "--platform", "linux/amd64")
    assert lines[0] == f"{NAME}:3: unchanged"
    assert lines[1].endswith("2 manifests, 3 blobs; 0 fetched, 0 B")
    found = msgspec.convert(await shop.told("refresh", "alpine:3"), reports.Refreshed)
    assert (found.fetched, found.manifests, found.blobs) == (2, 3, 5)
    _, row = await shop.lines("ls", "--tags")
    stored, total = re.findall(r"[0-9.]+ [KMGT]?i?B", row)
    assert stored == total


async def test_refresh_tells_what_moved(shop: Shop) -> None:
    shop.upstream.image("library/alpine", "3", [b"new"])
    lines = await shop.lines("refresh", "alpine:3")
    assert lines[0] == f"{NAME}:3: moved from {shop.index.digest}"
    assert "answered 404" in await shop.fails("refresh", "alpine:none")


async def test_evict(shop: Shop) -> None:
    (line,) = await shop.lines("evict", "--dry-run")
    assert line == "would be evicted: 0 tags, 0 manifests, 0 links, 0 blobs, 0 B; nothing was deleted"
    found = await shop.told("evict", "--to", "1B", "--dry-run")
    assert (found["blobs"], found["dry_run"]) == (3, True)
    assert (await shop.lines("evict", "--to", "1B"))[0].startswith("evicted: 0 tags, 0 manifests, ")
    assert (await shop.told("stats"))["stored_bytes"] == 0


async def test_scrub(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "PAUSE", 0.01)
    lines = await shop.lines("scrub", "--wait")
    assert lines[0].startswith("SCRUB")
    found = msgspec.convert(await shop.told("scrub", "--wait"), reports.Scrubbing)
    assert not found.asked.running
    assert found.asked.damaged == 0


@pytest.mark.errors("blob.damaged", "scrub.damaged")
async def test_scrub_tells_of_damage(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "PAUSE", 0.01)
    algorithm, encoded = shop.image.layers[0].split(":")
    path = shop.site.directory / "cache" / "blobs" / algorithm / encoded[:2] / encoded
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"XX")
    result = await shop.run("scrub", "--wait")
    assert result.exit_code == 1
    assert "damaged" in result.stderr


async def test_why_asks_nobody(shop: Shop) -> None:
    before = shop.asked()
    found = msgspec.convert(await shop.told("why", "alpine:3"), reports.Why)
    assert (found.repository, found.reference, found.digest) == (NAME, "3", shop.index.digest)
    lines = await shop.lines("why", "alpine:3")
    assert lines[:2] == [f"{NAME}:3", "FIELD           VALUE"]
    assert lines[2].startswith(f"verdict         {found.verdict}: ")
    assert (await shop.told("why", "alpine:4"))["verdict"] == "miss"
    assert shop.asked() == before


# How the data is reached


async def test_what_is_asked_wrongly_is_status_2(shop: Shop) -> None:
    assert "such as 1h30m" in await shop.fails("stats", "--period", "soon", status=2)
    assert "expected a size" in await shop.fails("evict", "--to", "much", status=2)
    assert "os/architecture" in await shop.fails("refresh", "alpine", "--platform", "arm", status=2)
    assert (await shop.fails("show", "UPPER:3", status=2)).startswith("entrepot: REF: ")
    for words, name in (
        (["ls", "UPPER"], "PATTERN"),
        (["purge", "UPPER"], "REF|GLOB"),
        (["pin", "UPPER:1"], "PATTERN"),
        (["refresh", "UPPER"], "REF"),
    ):
        assert (await shop.fails(*words, status=2)).startswith(f"entrepot: {name}: ")
    (row,) = json.loads((await shop.run("warm", "UPPER:3", "--json")).stdout)
    assert row["error"].startswith("'library/UPPER' is not")
    assert json.loads(await shop.fails("why", "UPPER:3", "--json", status=2))["code"] == "FIELD_INVALID"
    assert "nowhere.example" in await shop.fails("show", "nowhere.example/x:1", status=2)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.housekeeping
async def test_webhooks_are_listed_with_what_is_pending(
    serve: Serve, upstream: Upstream, tmp_path: Path, clock: Clock, running: bool
) -> None:
    hook = {"name": "deploy", "url": "http://127.0.0.1:9/hook?token=hidden", "actions": ["pull", "move"]}
    ear = Ear()
    shop = await stocked(serve, upstream, tmp_path, running, webhooks=[hook])
    if running:
        await ear.heard("webhook.failing")
        publisher = shop.site.app.composition.publisher
        assert publisher is not None
        await publisher.close()  # what was pulled is written
    heads, row = await shop.lines("webhooks")
    assert re.split(" {2,}", heads) == [
        "WEBHOOK",
        "URL",
        "FORMAT",
        "ACTIONS",
        "PENDING",
        "OLDEST PENDING",
        "LAST DELIVERY",
        "ERROR",
    ]
    assert row.startswith("deploy   http://127.0.0.1:9  registry  pull move")
    assert "hidden" not in row
    assert "never" in row
    (found,) = msgspec.convert(await shop.told("webhooks"), list[models.WebhookRow])
    assert (found.pending, found.oldest, found.delivered_at) == (5, clock(), None)
    if running:
        assert f": {found.error}" in row
        assert "nothing listens there (connection refused)" in (found.error or "")


async def test_without_webhooks_none_is_listed(shop: Shop) -> None:
    assert await shop.lines("webhooks") == ["no webhook is configured"]


async def test_json_is_what_the_api_answers(served: Shop) -> None:
    for words, path in (
        (("ls",), "repositories"),
        (("ls", "--tags"), "images"),
        (("show", "alpine:3"), "image?ref=alpine:3"),
        (("why", "alpine:3"), "why?ref=alpine:3"),
        (("stats",), "stats"),
        (("pins",), "pins"),
        (("fills",), "fills"),
        (("webhooks",), "webhooks"),
    ):
        assert served.site.app.admin_url
        async with served.site.session.get(f"{served.site.app.admin_url}/api/v1/{path}") as response:
            content = await response.read()
        assert (await served.run(*words, "--json")).stdout_bytes == content + b"\n"


async def test_a_token_is_wanted(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    shop = await stocked(serve, upstream, tmp_path, running=True, admin_token="s3cret")
    assert len(await shop.lines("ls")) == 2  # that of the configuration
    said = await shop.fails("ls", "--token", "wrong")
    assert "--token or ENTREPOT_ADMIN_TOKEN" in said
    assert "s3cret" not in said
    assert "wrong" not in said
    assert (await shop.run("ls", env={"ENTREPOT_ADMIN_TOKEN": "wrong"})).exit_code == 1
    told = json.loads(await shop.fails("ls", "--json", "--token", "wrong"))
    assert told["code"] == "UNAUTHORIZED"


async def test_a_server_that_is_named_must_be_there(shop: Shop, unused_tcp_port: int) -> None:
    said = await shop.fails("ls", "--server", f"http://127.0.0.1:{unused_tcp_port}", server=False)
    cause = "nothing listens there (connection refused); check that it runs, and its port"
    assert said == f"entrepot: no server at http://127.0.0.1:{unused_tcp_port}: {cause}\n"
    assert "expected an address" in await shop.fails("ls", "--server", "ftp://x", status=2, server=False)


async def test_what_listens_may_be_something_else(served: Shop) -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(status=200, text="hello")

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        host, port = runner.addresses[0]
        said = await served.fails("ls", "--server", f"{host}:{port}", server=False)
        assert "sent an answer that is not of entrepot" in said
        # The clients' listener is a likely mistake.
        said = await served.fails("ls", "--server", served.site.url, server=False)
        assert "is that the admin address" in said
    finally:
        await runner.cleanup()


async def test_the_admin_address_of_the_configuration_is_tried_first(served: Shop) -> None:
    url = served.site.app.admin_url
    assert url
    text = served.config.read_text()
    served.config.write_text(text.replace('"admin": "127.0.0.1:0"', f'"admin": "127.0.0.1:{url.port}"'))
    assert (await served.run("fills", server=False)).stdout == "nothing is being transferred\n"
    await served.site.app.stop()
    assert "no server is running" in await served.fails("fills", server=False)
    assert (await served.run("ls", server=False)).stdout.splitlines()[1].startswith(NAME)


async def test_an_admin_address_by_https(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls = authority.issue("server", "registry.example")  # not the name by which it is reached from here
    top = {"tls": tls, "admin": "0.0.0.0:0", "admin_token": "t"}
    shop = await stocked(serve, upstream, tmp_path, running=True, **top)
    assert shop.site.app.admin_url
    port = shop.site.app.admin_url.port
    text = shop.config.read_text()
    shop.config.write_text(text.replace('"admin": "0.0.0.0:0"', f'"admin": "0.0.0.0:{port}"'))
    assert (await shop.run("fills", server=False)).stdout == "nothing is being transferred\n"

    words = ["fills", "--server", f"https://localhost:{port}", "--ca-file", str(authority.ca)]
    assert "its certificate is for registry.example, not for localhost" in (
        await shop.fails(*words, server=False)
    )
    authority.issue("server")
    assert (await shop.run(*words, server=False)).stdout == "nothing is being transferred\n"
    told = await shop.fails(*words[:3], server=False)
    assert "its certificate is from an authority that is not trusted here (ca)" in told
    assert (
        "it has no certificate, or no key, in pem format"
        in (await shop.fails(*words[:4], str(shop.config), server=False, status=2)).lower()
    )
    # What another one shows at that address is not what the configuration names.
    other = authority.issue("other")["certificate"]
    shop.config.write_text(shop.config.read_text().replace(tls["certificate"], other))
    told = await shop.fails("fills", server=False)
    assert "its certificate is from an authority that is not trusted here (ca)" in told


async def test_where_there_is_nothing_nothing_is_made(tmp_path: Path) -> None:
    config = tmp_path / "entrepot.yml"
    config.write_text(f"admin: off\ndisk: {{path: {tmp_path / 'disk'}}}\n")
    result = await asyncio.to_thread(CliRunner().invoke, main, ["ls", "--config", str(config)])
    assert result.exit_code == 1
    assert f"there is no cache in {tmp_path / 'disk'}" in result.stderr
    assert not (tmp_path / "disk").exists()
    config.write_text("nonsense: 1\n")
    result = await asyncio.to_thread(CliRunner().invoke, main, ["ls", "--config", str(config), "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stderr)["code"] == "CONFIG_INVALID"


def test_every_command_has_the_common_options() -> None:
    for command in (
        *content.COMMANDS,
        *status.COMMANDS,
        *pins.COMMANDS,
        *removal.COMMANDS,
        *maintenance.COMMANDS,
    ):
        names = {each.name for each in command.params if isinstance(each, click.Option)}
        assert {"path", "server", "token", "ca_file", "as_json", "wide"} <= names
        assert command.help


@pytest.mark.clients
def test_who_serves_loads_nothing_that_is_large() -> None:
    large = {"aiohttp", "diskcache", "proxy.admin.local_operations"}
    program = f"import sys, proxy.cli.main; print({large} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.clients
async def test_watching_ends_by_ctrl_c(served: Shop) -> None:
    words = ["fills", "--watch", "--json", "--server", str(served.site.app.admin_url)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout
    assert await process.stdout.readline() == b"[]\n"
    process.send_signal(signal.SIGINT)
    _, said = await process.communicate()
    assert (process.returncode, said) == (0, b"")
    await asyncio.sleep(0)  # its pipes are closed in the next turn of the loop
