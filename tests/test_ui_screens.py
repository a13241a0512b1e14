"""The screens of the web page: what each shows, that anybody can read it, and that no name is markup."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import sqlite3
import tarfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

from proxy.admin.api.app import application
from proxy.admin.local_operations import LocalOperations
from proxy.admin.models import ImageNode, ReplicaStats, RepositoryRow, Stats
from proxy.admin.reports import ReplicaVerdict, Why
from proxy.namespaces.composition import compose
from proxy.processes.rows import RefusalRow
from proxy.processes.state import ProcessReport, UpstreamState
from proxy.telemetry.metrics import Metrics
from proxy.ui import snapshot
from proxy.ui.app import pages
from proxy.ui.charts import column_chart, scale
from proxy.ui.rendering import STATIC, static
from proxy.ui.screens.acts import ActsScreen
from proxy.ui.screens.image import kind_of
from proxy.ui.screens.overview import by_namespace
from proxy.ui.screens.repositories import glob
from storage.archives import layer
from storage.disk.salvage import checksum
from storage.errors import StorageFailed
from storage.keys import COUNTED, TOTAL
from storage.maintenance.usage import Counters, Use
from storage.oci import OCI_MANIFEST, Digest
from storage.totals import Counts, Total
from tests.conftest import Clock, configuration
from tests.test_operations import ALPINE, Everybody, Site, describe, on

HOSTILE = "<script>alert('x')</script>\"'&"
VOID = {"meta", "link", "input", "img", "br", "hr"}


class Screen(HTMLParser):
    """A page as a reader sees it: its text, its rows, its links; it must be well nested."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__()
        self.status = status
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = []
        self._open: list[str] = []
        self._text: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> in {self.source}"

    def handle_data(self, data: str) -> None:
        self._text.append(data)
        if self.rows and "tr" in self._open:
            self.rows[-1] += f" {data.strip()}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def link(self, start: str) -> str:
        """The first link that begins so."""
        return next(str(each["href"]) for each in self.all("a") if str(each["href"]).startswith(start))

    def firsts(self) -> list[str]:
        """The first word of each row but the head's."""
        return [row.split()[0] for row in self.rows[1:]]


class Screens:
    """A browser of the page, and what it shows."""

    def __init__(self, client: TestClient, site: Site, state: dict[str, str]) -> None:  # type: ignore[type-arg]
        self.client = client
        self.site = site
        self.state = state

    async def see(self, path: str, status: int = 200) -> Screen:
        async with self.client.get(f"/ui/{path}") as response:
            screen = Screen(response.status, await response.text())
        assert screen.status == status, screen.text
        check(screen)
        return screen


def check(screen: Screen) -> None:
    """What holds of every screen, whatever it shows."""
    assert screen.source.startswith('<!doctype html>\n<html lang="en">')
    assert [len(screen.all(tag)) for tag in ("h1", "main", "header")] == [1] * 3
    assert all(each.get("src") for each in screen.all("script"))
    ids = [attributes["id"] for _, attributes in screen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in screen.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (
            tag,
            attributes,
        )
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert name not in attributes or attributes[name] in ids
        target = attributes.get("href") or attributes.get("src") or attributes.get("action") or ""
        assert ":" not in target.partition("?")[0] and not target.startswith("/"), target
    labelled = {each["for"] for each in screen.all("label")}
    assert all(each["id"] in labelled for each in screen.all("input") if each.get("type") != "hidden")
    assert len(screen.all("table")) == len(screen.all("caption"))
    assert all(each.get("scope") in ("col", "row") for each in screen.all("th"))
    assert all(each.get("alt") == "" for each in screen.all("img"))
    for each in screen.all("div"):
        if each.get("class") == "scroll":  # what scrolls must be reached by keys
            assert each["tabindex"] == "0" and ("aria-label" in each or "aria-labelledby" in each)


@pytest.fixture
async def screens(tmp_path: Path, clock: Clock) -> AsyncIterator[Screens]:
    tree = {
        "disk": {"path": str(tmp_path / "disk"), "min_free": 0, "cache_limit": "1GiB"},
        "namespaces": {
            "docker.io": {"upstream": "http://127.0.0.1:9", "library": True},
            "local": {"store": {}},
        },
        "pins": [{"match": "docker.io/library/base:*"}],
    }
    config = configuration(tmp_path, tree)
    composition = compose(config, clock)
    state = {"status": "ready"}

    async def told() -> Mapping[str, str]:
        return state

    everyone = Everybody()
    operations = LocalOperations(composition, everyone)
    page = pages(config, operations, told, clock)
    admin = application(Metrics(), told, operations, token=None, loopback=True, pages=page)
    client = TestClient(TestServer(admin))
    await client.start_server()
    yield Screens(client, Site(composition, everyone, operations), state)
    await client.close()
    await composition.close()


# Many


def write_rows(root: Path, rows: Sequence[tuple[str, bytes]]) -> None:
    """Write records as one of them is written: by a transaction of each, they would take half a minute."""
    (path,) = root.rglob("cache.db")
    with closing(sqlite3.connect(path)) as database, database:
        columns = "raw, store_time, access_time, access_count, tag, size, mode, filename"
        made = f"INSERT INTO Cache (key, value, {columns}) SELECT ?, ?, {columns} FROM Cache WHERE key = ?"
        database.executemany(
            made, [(key, checksum(key, value) + value, COUNTED.key()) for key, value in rows]
        )


@pytest.mark.clients
async def test_a_hundred_thousand_repositories(screens: Screens) -> None:
    """First paint, search and order take not much longer than it takes to decode what is read."""
    count = 100_000
    names = [f"docker.io/team-{number % 997}/app-{number}" for number in range(count)]

    rows = []
    for number, name in enumerate(names):
        numbers = {"tag": number % 9 + 1, "manifest": 3, "link": 7}
        counts = Counts(numbers=numbers, bytes={"link": number}, used=float(number))
        rows.append((TOTAL.key(name), Total(counted=counts).encode()))
    await asyncio.to_thread(screens.site.store.records.put, COUNTED.key(), b"")
    await asyncio.to_thread(write_rows, screens.site.store.files.root, rows)
    begun = time.process_time()
    assert all(Total.parse(value) for _, value in rows)
    decoding = time.process_time() - begun
    largest = names[-1]
    for address, said, most in (
        ("repositories", "100,000", 20),
        ("repositories?sort=size", largest, 3),
        ("repositories?q=APP-99999&sort=used", largest, 3),
        ("repositories?sort=tags&page=1000", "Page 1,000 of", 3),
        ("", "100,000", 4),
    ):
        begun = time.process_time()
        screen = await screens.see(address)
        spent = time.process_time() - begun
        assert said in screen.text, (address, screen.text[:2000])
        assert spent < most * decoding, address


# The overview


def host(namespace: str, **more: Any) -> UpstreamState:
    fields = {"open": False, "until": None, "error": None, "limited_until": None, "limits": [], "refused": []}
    limits = {"ratelimit_limit": None, "ratelimit_remaining": None}
    name = f"{namespace}.example"
    return UpstreamState(
        namespace=namespace, url=f"https://{name}", host=name, **{**fields, **limits, **more}
    )


async def test_an_overview_of_nothing(screens: Screens) -> None:
    screen = await screens.see("")
    assert "Ready." in screen.text
    assert "Nothing is stored yet" in screen.text
    assert "Hit ratio -" in screen.text


async def test_what_is_degraded_comes_first(screens: Screens, clock: Clock) -> None:
    screens.state.update(
        status="degraded", store=f"/x: {HOSTILE}", drill="upstreams are cut off for 9 s more"
    )
    now = clock()
    screens.site.everyone.found = [
        ProcessReport(
            pid=1,
            fills=[],
            troubles=[],
            upstreams=[
                host("limited", limited_until=now + 60, ratelimit_limit=100, ratelimit_remaining=0),
                host("refused", refused=[RefusalRow(credential=1, host="auth", status=401, at=now)]),
                host("paused", open=True, until=now + 60, error=HOSTILE),
                host("well", ratelimit_limit=200, ratelimit_remaining=150),
            ],
        )
    ]
    screen = await screens.see("")
    order = ["The disk:", "paused:", "refused:", "limited:", "A drill:"]
    assert not [each for each in order if each not in screen.text], screen.text
    places = [screen.text.index(each) for each in order]
    assert places == sorted(places)
    assert places[-1] < screen.text.index("Hit ratio")
    assert "Ready." not in screen.text
    assert screen.text.count(HOSTILE) == 2
    assert "150 of 200" in screen.text


async def test_platforms_that_differ_come_first_in_a_comparison(screens: Screens) -> None:
    old, new = [await screens.site.image(ALPINE, None, content) for content in (b"old", b"new")]
    rows = [on(f"linux/p{number}", old) for number in range(120)]
    await screens.site.manifest(ALPINE, {"manifests": rows}, "before")
    await screens.site.manifest(ALPINE, {"manifests": [*rows[:-1], on("linux/p119", new)]}, "after")
    screen = await screens.see("diff?ref=alpine:before&other=alpine:after")
    assert screen.text.index("linux/p119") < screen.text.index("linux/p0")
    assert "20 more platforms are not shown: they are the same." in screen.text


async def test_replicas_of_a_fleet(screens: Screens, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = await screens.site.operations.stats()
    rows = [
        ReplicaStats(
            f"https://{name}.example", msgspec.structs.replace(stats.total, requests=count), 3 << 20, None
        )
        for name, count in (("one", 1234), ("other", 5))
    ]

    async def fleet(period: str = "7d") -> Stats:
        return msgspec.structs.replace(stats, replicas=rows)

    monkeypatch.setattr(screens.site.operations, "stats", fleet)
    text = (await screens.see("")).text
    assert "one.example 1,234" in text and "other.example 5" in text and "3.0 MiB" in text


async def test_what_was_saved(screens: Screens, clock: Clock) -> None:
    counted = Counters(
        requests=8, hits=6, misses=2, sent_bytes=8 << 20, received_bytes=2 << 20, upstream_requests=3
    )
    now = clock()
    screens.site.composition.usage.record(
        {}, [], {(now, "docker.io"): counted, (now - 86400, "local"): counted}
    )
    await screens.site.image(ALPINE, "3", b"layer" * 99)
    await screens.site.image("local/app", "1", b"pushed")
    screen = await screens.see("")
    for said in ("75.0%", "6.0 MiB", "2.0 MiB fetched", "local private", "of 1.0 GiB"):
        assert said in screen.text
    heights = [float(str(each["height"])) for each in screen.all("rect") if each.get("class") == "saved"]
    assert len(heights) == 14 and [bool(each) for each in heights] == [False] * 13 + [True]
    by_size = [str(each["href"]) for each in screen.all("a") if "sort=size" in str(each["href"])]
    assert by_size == ["repositories?q=docker.io%2F&sort=size", "repositories?q=local%2F&sort=size"]
    assert "Saved in a day" in (await screens.see("?period=24h")).text
    assert "Saved in a week" in (await screens.see("?period=nonsense")).text


async def test_the_overview_needs_no_records(screens: Screens, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(match: str = "*") -> None:
        raise StorageFailed(f"records in {HOSTILE}: Input/output error")

    monkeypatch.setattr(screens.site.operations, "repositories", fail)
    screen = await screens.see("")
    assert f"The records: cannot be read: records in {HOSTILE}" in screen.text
    assert "Ready." not in screen.text
    assert "Input/output error" in (await screens.see("repositories", 500)).text


def test_what_replicas_have_differently_counts_once() -> None:
    def row(repository: str, size: int, replica: str | None = None) -> RepositoryRow:
        return RepositoryRow(
            repository=repository, tags=1, manifests=1, bytes=size, last_used=None, replica=replica
        )

    found = by_namespace([row("a/x", 5, "b:1"), row("a/x", 7, "b:2"), row("a/y", 1), row("b/z", 9)])
    assert [(each.name, each.repositories, each.bytes) for each in found] == [("b", 1, 9), ("a", 2, 8)]


# Repositories and tags


@pytest.mark.clients
async def test_repositories_are_searched_sorted_and_paged(screens: Screens, clock: Clock) -> None:
    for number in range(53):
        await screens.site.image(f"docker.io/team/app-{number:02}", "1", b"x" * 99 * number)
    await screens.site.image("docker.io/team/app-07", "2", b"more")
    uses = {("docker.io/team/app-09", "1"): Use(1, clock() - 60, clock() - 60)}
    screens.site.composition.usage.record(uses, [], {})
    screen = await screens.see("repositories")
    assert screen.firsts() == [f"docker.io/team/app-{number:02}" for number in range(50)]
    assert "53 in all" in screen.text and "Page 1 of 2" in screen.text
    last = await screens.see(screen.link("repositories?sort=name&page=2"))
    assert last.firsts() == [f"docker.io/team/app-{number}" for number in (50, 51, 52)]
    assert "Next" not in last.text
    for sort, first in (("tags", "07"), ("images", "07"), ("size", "52"), ("used", "09")):
        found = await screens.see(screen.link(f"repositories?sort={sort}"))
        assert found.firsts()[0] == f"docker.io/team/app-{first}", sort
        assert [each["aria-sort"] for each in found.all("th") if each.get("aria-sort", "none") != "none"] == [
            "descending"
        ]
    assert (await screens.see("repositories?sort=name&order=down")).firsts()[0] == "docker.io/team/app-52"
    found = await screens.see("repositories?q=TEAM+app-1")
    assert found.firsts() == [f"docker.io/team/app-{number}" for number in range(10, 20)]
    assert "10 match" in found.text
    assert "No name contains this" in (await screens.see("repositories?q=%3Cscript%3E")).text


async def test_repositories_are_read_once_in_a_while(
    screens: Screens, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: now[0])
    assert "0 in all" in (await screens.see("repositories")).text
    await screens.site.image(ALPINE, "3", b"layer")
    assert "0 in all" in (await screens.see("repositories")).text
    now[0] = snapshot.KEPT
    assert "1 in all" in (await screens.see("repositories")).text


@pytest.mark.parametrize(
    "query", ["sort=x", "order=x", "page=0", "page=x", "page=9999999", "page=%C2%B2", "page=-1"]
)
async def test_what_is_no_list_is_refused(screens: Screens, query: str) -> None:
    assert "cannot be read" in (await screens.see(f"repositories?{query}", 400)).text


async def test_tags_are_searched_and_sorted(screens: Screens, clock: Clock) -> None:
    for tag in ("1", "2", "edge", "v3.2"):
        await screens.site.image(ALPINE, tag, tag.encode())
        clock.advance(1)
    uses = {(ALPINE, "2"): Use(5, clock() - 3, clock() - 9)}
    screens.site.composition.usage.record(uses, [], {})
    screen = await screens.see(f"repository?name={ALPINE}")
    assert screen.firsts() == ["1", "2", "edge", "v3.2"]
    assert "4 tags" in screen.text
    newest = await screens.see(screen.link(f"repository?name={ALPINE.replace('/', '%2F')}&sort=updated"))
    assert newest.firsts() == ["v3.2", "edge", "2", "1"]
    assert (await screens.see(f"repository?name={ALPINE}&sort=used")).firsts()[0] == "2"
    assert (await screens.see(f"repository?name={ALPINE}&q=2")).firsts() == ["2", "v3.2"]
    assert "No tag contains" in (await screens.see(f"repository?name={ALPINE}&q=%2A")).text
    assert "No tag is stored" in (await screens.see("repository?name=docker.io/library/none")).text
    for name in ("", "alpine", "docker.io/*", "docker.io/a@b"):
        assert "full name" in (await screens.see(f"repository?name={name}", 400)).text


def test_a_search_for_tags_means_the_text() -> None:
    assert glob("v1.*[a]? b") == "v1.[*][[]a][?]?b"


# An image

CONFIG = {
    "os": "linux",
    "architecture": "amd64",
    "author": HOSTILE,
    "created": "2023-11-14T00:00:00Z",
    "config": {"Labels": {HOSTILE: HOSTILE}, "Env": [HOSTILE], "Cmd": ["sh"], "User": HOSTILE},
    "history": [
        {"created_by": "ADD rootfs"},
        {"created_by": f"ENV {HOSTILE}", "comment": HOSTILE, "empty_layer": True},
    ],
}


async def pictured(site: Site) -> tuple[dict[str, Any], dict[str, Any]]:
    """An index with a platform that is here and one that is not, and what refers to it; and the first."""
    config = await site.blob(ALPINE, json.dumps(CONFIG).encode())
    content = gzip.compress(archive())
    rootfs = await site.blob(ALPINE, content)
    made = await site.manifest(ALPINE, {"config": config, "layers": [rootfs], "annotations": {"a": HOSTILE}})
    absent = describe(Digest.of(b"absent"), 1 << 20, OCI_MANIFEST)
    children = [on("linux/amd64", made), on("linux/s390x", absent)]
    index = await site.manifest(ALPINE, {"manifests": children}, "3")
    for kind in ("application/vnd.dev.cosign.artifact.sig.v1+json", "application/spdx+json", "text/x-<b>"):
        empty = await site.blob(ALPINE, b"{}")
        body = {"artifactType": kind, "config": empty, "layers": [], "subject": index}
        await site.manifest(ALPINE, body)
    return index, made


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name in ("etc/passwd", HOSTILE, "etc/.wh.shadow", *(f"usr/{number}" for number in range(60))):
            info = tarfile.TarInfo(name)
            info.size = 2048
            made.addfile(info, io.BytesIO(bytes(2048)))
        link = tarfile.TarInfo("bin")
        link.type, link.linkname = tarfile.SYMTYPE, "<usr>"
        made.addfile(link)
    return buffer.getvalue()


async def test_an_index(screens: Screens) -> None:
    index, made = await pictured(screens.site)
    screen = await screens.see("image?ref=alpine:3")
    assert f"{ALPINE}:3" in screen.text
    assert index["digest"] in screen.text
    rows = " | ".join(screen.rows)
    for said in ("linux/amd64", "linux/s390x", "not here", "signature", "SBOM", "text/x-<b>"):
        assert said in rows, said
    assert len([row for row in screen.rows if "signature" in row]) == 1
    payload = describe(Digest.of(b"{}"), 2, "application/vnd.dev.cosign.simplesigning.v1+json")
    config = describe(Digest.of(b"{}"), 2)
    tag = index["digest"].replace(":", "-") + ".sig"  # as cosign names it where there is no referrers API
    await screens.site.manifest(ALPINE, {"config": config, "layers": [payload]}, tag)
    rows = (await screens.see("image?ref=alpine:3")).rows
    assert len([row for row in rows if "signature" in row]) == 2
    assert "the tag is fresh" in screen.text
    child = await screens.see(screen.link("image?ref=docker.io%2Flibrary%2Falpine%40"))
    assert "Layers" in child.text and str(made["digest"]) in child.text
    judged = await screens.see(screen.link("image?ref=docker.io%2Flibrary%2Falpine%3A3&judge=1"))
    assert "the configuration has no policy" in judged.text
    assert [each["href"] for each in screen.all("a") if each.get("aria-current") == "true"] == [
        "repositories"
    ]


async def test_a_manifest_and_its_configuration(screens: Screens) -> None:
    _, made = await pictured(screens.site)
    screen = await screens.see(f"image?ref=alpine@{made['digest']}")
    for said in ("linux/amd64", "ADD rootfs", "here", "sh", "Annotations"):
        assert said in screen.text
    assert screen.text.count(HOSTILE) >= 7
    files = await screens.see(screen.link("files?ref="))
    assert "64 files" in files.text and "Page 1 of 2" in files.text
    assert files.firsts()[0] == "etc/passwd"
    assert HOSTILE in files.text and "deletes" in files.text
    assert "<usr>" in (await screens.see(screen.link("files?ref=") + "&q=bin")).text


async def test_what_a_long_table_leaves_out_is_said(screens: Screens) -> None:
    many = {f"name{number}": "x" for number in range(502)}
    steps = [{"created_by": f"RUN {number}"} for number in range(503)]
    content = {"config": {"Labels": many, "Env": [*many]}, "history": steps}
    config = await screens.site.blob(ALPINE, json.dumps(content).encode())
    layer = await screens.site.blob(ALPINE, b"layer")
    body = {"config": config, "layers": [layer] * 503, "annotations": many | {"one": "more"}}
    await screens.site.manifest(ALPINE, body, "4")
    text = (await screens.see("image?ref=alpine:4")).text
    for caption, count in (("Layers", 3), ("Labels", 2), ("Annotations", 3), ("History", 3)):
        after = text.rpartition(caption)[2] if caption != "History" else text.rpartition("Step")[2]
        assert f"{count} more are not shown." in after, caption
    assert text.count("more are not shown.") == 4
    assert "302 more" in text


async def test_a_configuration_that_is_not_stored(screens: Screens) -> None:
    absent = describe(Digest.of(b"absent"), 6)
    await screens.site.manifest(ALPINE, {"config": absent, "layers": [absent]}, "4")
    screen = await screens.see("image?ref=alpine:4")
    assert "is not stored" in screen.text and "not here" in screen.text
    assert [each for each in screen.all("a") if str(each["href"]).startswith("files")] == []


async def test_a_layer_may_be_too_large_to_read(screens: Screens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "FILE_LIMIT", 2)
    blob = await screens.site.blob(ALPINE, archive())
    screen = await screens.see(f"files?ref=alpine@{blob['digest']}")
    assert "The list is not complete: only the first 2 files are read." in screen.text
    plain = await screens.site.blob(ALPINE, b"plain" * 999)
    assert "no tar archive" in (await screens.see(f"files?ref=alpine@{plain['digest']}", 422)).text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("image", 400),
        ("image?ref=Alpine", 400),
        ("image?ref=alpine:9", 404),
        ("files?ref=alpine:3", 400),
        ("files", 400),
        (f"files?ref=alpine@{Digest.of(b'absent')}", 404),
    ],
)
async def test_what_cannot_be_shown(screens: Screens, path: str, status: int) -> None:
    await screens.see(path, status)


@pytest.mark.parametrize(
    ("types", "kind"),
    [
        (("application/vnd.dev.cosign.simplesigning.v1+json",), "signature"),
        (("application/vnd.cncf.notary.signature",), "signature"),
        (("application/vnd.in-toto+json",), "attestation"),
        (("application/vnd.cyclonedx+json",), "SBOM"),
        (("application/vnd.dev.sigstore.bundle.v0.3+json",), "signature or attestation"),
        (("text/plain",), ""),
    ],
)
def test_what_a_referrer_is(types: tuple[str, ...], kind: str) -> None:
    def node(media_type: str, *children: ImageNode) -> ImageNode:
        return ImageNode(
            role="referrer",
            digest="",
            media_type=media_type,
            size=0,
            present=True,
            platform=None,
            artifact_type=None,
            children=list(children),
        )

    assert kind_of(node(OCI_MANIFEST, *map(node, types))) == kind


# Why


async def test_why(screens: Screens, monkeypatch: pytest.MonkeyPatch) -> None:
    await screens.site.image(ALPINE, "3", b"layer")
    assert "What would a pull do" in (await screens.see("why")).text
    screen = await screens.see("why?ref=alpine:3")
    for said in ("hit", "the tag is fresh", "namespaces.docker.io.fresh_for", "disk.keep_for", f"{ALPINE}:3"):
        assert said in screen.text
    assert "miss" in (await screens.see("why?ref=busybox")).text
    why = await screens.site.operations.why("alpine:3")
    other = ReplicaVerdict(replica="https://b:5000", verdict="refused", because=HOSTILE, digest=None)

    async def elsewhere(ref: str) -> Why:
        return msgspec.structs.replace(why, elsewhere=[other], access=f"only {HOSTILE}")

    monkeypatch.setattr(screens.site.operations, "why", elsewhere)
    found = await screens.see("why?ref=alpine:3")
    assert f"https://b:5000 refused {HOSTILE}" in found.text
    assert f"Access only {HOSTILE}" in found.text
    monkeypatch.undo()
    assert "private" not in (await screens.see("why?ref=local/app:1")).text
    screen = await screens.see("why?ref=%3Cscript%3E", 400)
    assert screen.all("input")[0]["value"] == "<script>"


# All of it


async def test_the_page_is_small(screens: Screens) -> None:
    for number in range(50):
        await screens.site.image(f"docker.io/some/team/of/several/application-{number:02}", "1", b"x")
    screen = await screens.see("repositories")
    everything = len(screen.source.encode()) + sum(len(static(name)) for name in STATIC)
    assert everything < 150_000


async def test_every_file_has_its_type(screens: Screens) -> None:
    for name, kind in STATIC.items():
        async with screens.client.get(f"/ui/{name}") as response:
            assert (response.status, response.content_type) == (200, kind)
            assert "immutable" in response.headers["Cache-Control"]


@pytest.mark.parametrize(
    ("largest", "unit", "top"),
    [(0, 1024, 1), (1, 1024, 1), (3, 1024, 4), (700, 1024, 800), (1025, 1024, 2048), (3 << 30, 1024, 4 << 30),
     (0, 10, 1), (7, 10, 8), (10, 10, 10), (123, 10, 200)],
)  # fmt: skip
def test_scales_are_round(largest: float, unit: int, top: float) -> None:
    assert scale(largest, unit) == top


def test_columns_have_their_heights() -> None:
    chart = column_chart([("a", 1, 3, "text"), ("b", 0, 0, "")], 10)
    whole = chart.base - chart.lines[-1][0]
    (first, second) = chart.columns
    assert first.lower[1] == pytest.approx(whole / 4)
    assert first.lower[1] + first.upper[1] == pytest.approx(whole)
    assert first.upper[0] + first.upper[1] == pytest.approx(first.lower[0])
    assert second.lower[1] == second.upper[1] == 0
    assert first.x + first.width < second.x


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_two_lines_of_a_chart_have_the_same_whole_number(most: int) -> None:
    chart = column_chart([("a", 0, 0, ""), ("b", most, 0, "")])
    assert [round(value) for _, value in chart.lines] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "text", ["%00", "%ff%fe", "%ed%a0%80", "a%0d%0aX:y", "%e2%80%ae", "{{7*7}}", '"><b>']
)
async def test_nothing_that_is_typed_in_breaks_a_screen(screens: Screens, text: str) -> None:
    for path, status in (
        ("repositories?q=", 200),
        ("why?ref=", 400),
        ("image?ref=", 400),
        ("files?ref=", 400),
    ):
        screen = await screens.see(path + text, status)
        assert screen.all("b") == [] and "49" not in screen.text
    await screens.see(f"repository?name={ALPINE}&q={text}")
    await screens.see(f"repository?name=docker.io/{text}", 400)


async def test_what_cannot_be_encoded_is_replaced(screens: Screens) -> None:
    async def find(*arguments: object) -> None:
        raise StorageFailed("a lone \ud800 surrogate")

    setattr(screens.site.operations, "find", find)  # noqa: B010
    assert "a lone ? surrogate" in (await screens.see(f"repository?name={ALPINE}", 500)).text


@pytest.mark.clients
async def test_every_link_leads_to_a_screen(screens: Screens) -> None:
    await pictured(screens.site)
    seen, pending = {""}, [""]
    while pending:
        screen = await screens.see(pending.pop())
        for each in screen.all("a"):
            link = str(each["href"]).partition("#")[0].removeprefix("./")
            if link not in (*seen, "../docs/") and str(each["href"]) != "#content":
                seen.add(link)
                pending.append(link)
    kinds = {each.partition("?")[0] for each in seen}
    assert {"repository", "image", "files", "confirm", "why", "history"} <= kinds
    assert len(seen) > 40


# Acts


async def test_an_act_shows_at_once_in_the_lists(screens: Screens) -> None:
    await screens.site.image(ALPINE, "3", b"layer")
    assert "1 in all" in (await screens.see("repositories")).text
    image = await screens.see("image?ref=alpine:3")
    confirm = await screens.see(image.link("confirm?act=purge"))
    assert "Purge" in confirm.text
    fields = {str(each["name"]): str(each["value"]) for each in confirm.all("input") if "value" in each}
    async with screens.client.post("/ui/act", data=fields) as response:
        assert response.status == 200, await response.text()
    assert "0 in all" in (await screens.see("repositories")).text


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No act is waited for.  To be requested before `screens`."""
    monkeypatch.setattr(ActsScreen.__init__, "__defaults__", (0.0,))


async def test_an_act_that_takes_long_leads_to_what_goes_on(
    hurried: None, screens: Screens, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    monkeypatch.setattr(screens.site.operations, "scrub", gate.wait)
    page = await screens.see("confirm?act=scrub")
    fields = {str(each["name"]): str(each["value"]) for each in page.all("input") if "value" in each}
    async with screens.client.post("/ui/act", data=fields, allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (303, "transfers")
    gate.set()
