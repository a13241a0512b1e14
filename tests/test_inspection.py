"""A closer look at what is stored: tags in any order, configurations, the files of layers."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from typing import Any

import pytest
from structlog.testing import LogCapture

import storage.graph
from proxy.admin import image_config, image_diff, inventory, measuring
from proxy.admin.explain import upstream_rows
from proxy.namespaces.references import FieldInvalid
from proxy.processes.rows import RefusalRow
from proxy.processes.state import UpstreamState
from storage.errors import ArchiveInvalid, BlobUnknown, ManifestUnknown
from storage.maintenance.usage import Use
from storage.oci import Digest
from tests.test_operations import ALPINE, Site, describe, on, settings, site  # noqa: F401

TAGS = ("1", "2", "3", "edge", "v3.1")


async def tagged(site: Site) -> None:  # noqa: F811
    """Images whose tags were set in the order of TAGS, a second each; two of them were used."""
    for tag in TAGS:
        await site.image(ALPINE, tag, tag.encode())
        site.composition.clock.advance(1)  # type: ignore[attr-defined]
    now = site.composition.clock()
    uses = {(ALPINE, "2"): Use(3, now - 5, now - 9), (ALPINE, "edge"): Use(1, now - 50, now - 50)}
    site.composition.usage.record(uses, [], {})
    await site.image("docker.io/library/other", "9", b"other")
    await site.image("local/app", "3", b"pushed")


@pytest.mark.parametrize(
    ("options", "found", "matched"),
    [
        ({}, ["1", "2", "3", "edge", "v3.1"], 5),
        ({"reverse": True}, ["v3.1", "edge", "3", "2", "1"], 5),
        ({"sort": "updated"}, ["1", "2", "3", "edge", "v3.1"], 5),
        ({"sort": "updated", "reverse": True, "limit": 2}, ["v3.1", "edge"], 5),
        ({"sort": "used", "reverse": True, "limit": 2}, ["2", "edge"], 5),
        ({"offset": 3}, ["edge", "v3.1"], 5),
        ({"offset": 9}, [], 5),
        ({"match": "alpine:*3*"}, ["3", "v3.1"], 2),
        ({"match": "alpine:nothing"}, [], 0),
        ({"match": "*:3"}, ["3", "3"], 2),  # of the private registry too
        ({"match": "*", "limit": 100, "reverse": True, "offset": 5}, ["2", "1"], 7),
    ],
)
async def test_tags_in_an_order(
    site: Site,  # noqa: F811
    options: dict[str, Any],
    found: list[str],
    matched: int,
) -> None:
    await tagged(site)
    answer = await site.operations.find(**{"match": "alpine:*", **options})
    assert ([each.tag for each in answer.images], answer.matched) == (found, matched)


async def test_only_tags_have_an_order(site: Site) -> None:  # noqa: F811
    with pytest.raises(FieldInvalid, match="match"):
        await site.operations.find("alpine@*")


async def test_when_a_repository_of_a_store_was_used(site: Site) -> None:  # noqa: F811
    await tagged(site)
    private = site.composition.private
    assert private is not None
    for name in ("local/app", "local/apple"):
        await site.image(name, "1", b"x")
    found = {each.repository: each for each in (await site.operations.repositories()).repositories}
    now = site.composition.clock()
    assert found[ALPINE].last_used == now - 5
    assert found["docker.io/library/other"].last_used is None


# Configurations

CONFIG = {
    "created": "2024-05-06T07:08:09Z",
    "author": "<b>nobody</b>",
    "os": "linux",
    "architecture": "arm64",
    "variant": "v8",
    "config": {
        "User": "65532",
        "WorkingDir": "/srv",
        "Entrypoint": ["/bin/app"],
        "Cmd": None,
        "Env": ["A=1", 2, "B=<script>"],
        "ExposedPorts": {"80/tcp": {}},
        "Labels": {"a": "1", "b": 2},
    },
    "history": [
        {"created": "0001-01-01T00:00:00Z", "created_by": "ADD rootfs"},
        {"created_by": "ENV A=1", "comment": "buildkit", "empty_layer": True},
        "what?",
    ],
}


async def configured(site: Site, content: bytes, **more: Any) -> dict[str, Any]:  # noqa: F811
    config = await site.blob(ALPINE, content)
    return await site.manifest(ALPINE, {"config": config, "layers": [], **more}, "3")


async def test_a_configuration(site: Site) -> None:  # noqa: F811
    made = await configured(site, json.dumps(CONFIG).encode(), annotations={"org": "me"})
    found = await site.operations.config("alpine:3")
    assert found.digest == made["digest"]
    assert found.config == Digest.of(json.dumps(CONFIG).encode())
    assert (found.created, found.os, found.architecture, found.variant) == (
        1714979289.0,
        "linux",
        "arm64",
        "v8",
    )
    assert (found.entrypoint, found.command, found.environment) == (
        ["/bin/app"],
        [],
        ["A=1", "2", "B=<script>"],
    )
    assert (found.ports, found.labels, found.annotations) == (["80/tcp"], {"a": "1", "b": "2"}, {"org": "me"})
    assert [(each.created, each.created_by, each.empty) for each in found.history] == [
        (None, "ADD rootfs", False),
        (None, "ENV A=1", True),
        (None, "", False),
    ]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b'{"config": 3, "history": {}}', b"[" * 9999])
async def test_what_is_no_configuration_says_nothing(site: Site, content: bytes) -> None:  # noqa: F811
    await configured(site, content)
    found = await site.operations.config("alpine:3")
    assert (found.os, found.history, found.labels) == ("", [], {})


async def test_a_configuration_that_is_not_there(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ManifestUnknown):
        await site.operations.config("alpine:3")
    made = await site.image(ALPINE, "4", b"layer")
    await site.manifest(ALPINE, {"manifests": [on("linux/amd64", made)]}, "index")
    with pytest.raises(FieldInvalid, match="name a manifest of the index"):
        await site.operations.config("alpine:index")
    absent = describe(Digest.of(b"absent"), 6)
    await site.manifest(ALPINE, {"config": absent, "layers": []}, "5")
    with pytest.raises(BlobUnknown):
        await site.operations.config("alpine:5")
    monkeypatch.setattr(image_config, "CONFIG_LIMIT", 4)
    with pytest.raises(FieldInvalid, match="more than 4 bytes"):
        await site.operations.config("alpine:4")


# What names the same many times


async def test_what_an_index_names_again_is_read_once(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An index may name 20,000 times a manifest that has as many layers."""
    made, read = await site.image(ALPINE, None, b"layer"), []
    rows = [on(f"linux/{number % 3}", made) for number in range(300)]
    for tag, named in (("many", rows), ("fewer", rows[1:])):
        await site.manifest(ALPINE, {"manifests": named}, tag)
    parse = storage.graph.contents

    def counted(content: bytes) -> Any:
        read.append(content)
        return parse(content)

    for module in (inventory, measuring, image_diff):
        monkeypatch.setattr(module, "contents", counted)
    tree = await site.operations.show("alpine:many")
    assert len(read) == 2
    assert [len(each.children) for each in tree.node.children] == [2] + [0] * 299
    assert all(each.present for each in tree.node.children)
    assert tree.node.children[1].platform == "linux/1"
    read.clear()
    [row] = (await site.operations.find("alpine:many")).images
    assert len(read) == 2
    assert [each.platform for each in row.platforms] == [f"linux/{number % 3}" for number in range(300)]
    assert row.complete and all(each.complete for each in row.platforms)
    read.clear()
    assert (await site.operations.why("alpine:many")).complete
    assert len(read) == 2
    read.clear()
    found = await site.operations.diff("alpine:many", "alpine:fewer")
    assert len(read) == 4
    assert [each.change for each in found.platforms].count("same") == 299
    assert [each.platform for each in found.platforms if each.change == "removed"] == ["linux/0"]


async def test_an_index_with_too_much_is_compared_in_part(
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of a thousand platforms may name the same thousand layers."""
    monkeypatch.setattr(image_diff, "MOST", 5)
    old, new = await site.image(ALPINE, None, b"old"), await site.image(ALPINE, None, b"new")
    for tag, made in (("old", old), ("new", new)):
        await site.manifest(ALPINE, {"manifests": [on(f"linux/{each}", made) for each in "abcd"]}, tag)
    found = (await site.operations.diff("alpine:old", "alpine:new")).platforms
    assert [len(each.layers) for each in found] == [2, 2, 0, 0]
    assert [str(each.unknown).count("left out") for each in found] == [0, 0, 2, 2]
    assert {each.change for each in found} == {"changed"}


# Files


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(name), 0o755, 1_700_000_000
            made.addfile(info, io.BytesIO(name.encode()))
    return buffer.getvalue()


async def test_files_of_a_layer(site: Site) -> None:  # noqa: F811
    content = gzip.compress(archive("bin/sh", "etc/passwd", "etc/os-release", "usr/é"))
    blob = await site.blob(ALPINE, content)
    ref = f"alpine@{blob['digest']}"
    found = await site.operations.files(ref)
    assert [(each.path, each.kind, each.size, each.mode) for each in found.files][:2] == [
        ("bin/sh", "file", 6, 0o755),
        ("etc/passwd", "file", 10, 0o755),
    ]
    assert (found.compression, found.size, found.total, found.cut) == ("gzip", len(content), 4, "")
    found = await site.operations.files(ref, "etc/", 1, 1)
    assert ([each.path for each in found.files], found.matched, found.total) == (["etc/os-release"], 2, 4)


async def test_files_of_what_is_none_of_a_repository(site: Site) -> None:  # noqa: F811
    blob = await site.blob(ALPINE, archive("secret"))
    with pytest.raises(BlobUnknown):  # to know a digest is no permission
        await site.operations.files(f"other@{blob['digest']}")
    with pytest.raises(FieldInvalid, match="by its digest"):
        await site.operations.files("alpine:3")
    blob = await site.blob(ALPINE, b"no tar archive" * 99)
    with pytest.raises(ArchiveInvalid):
        await site.operations.files(f"alpine@{blob['digest']}")


# Upstreams


def test_hosts_of_upstreams(events: LogCapture) -> None:
    def state(namespace: str, host: str, **more: Any) -> UpstreamState:
        fields = {"open": False, "until": None, "error": None, "limited_until": None, "limits": []}
        limits = {"ratelimit_limit": 100, "ratelimit_remaining": 50, "refused": []}
        return UpstreamState(namespace=namespace, url=f"https://{host}", host=host, **fields | limits | more)

    refusal = RefusalRow(credential=1, host="auth", status=401, at=1.0)
    rows = upstream_rows(
        [
            state("quay.io", "quay.io"),
            state("docker.io", "hub", ratelimit_remaining=7),
            state("docker.io", "hub", ratelimit_remaining=3),  # as another process sees it
            state("mirror", "hub", open=True, until=9.0, error="refused", refused=[refusal]),
        ]
    )
    assert [(each.namespace, each.host, each.open, each.ratelimit_remaining) for each in rows] == [
        ("docker.io", "hub", False, 3),
        ("mirror", "hub", True, 50),
        ("quay.io", "quay.io", False, 50),
    ]
    assert [each.refused for each in rows] == [[], [refusal], []]
