"""A server with a history to show: images that were pulled and have moved, a policy, pins, an audit log."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OPEN, Clock, Serve, Site
from tests.upstream import OCI_MANIFEST, Upstream, digest_of

DAY = 86400.0
APPROVAL = {"name": "releases", "repositories": ["docker.io/team/*"], "tags": ["*"], "approval": True}
PATIENT = {"progress_timeout": "60s"}  # a test may hold a transfer while it looks at it
ISSUER = {
    "issuer": "https://ci.example",
    "audience": "cache.example",
    "required_claims": {"repository_owner": "team"},
}
RULES = [
    {
        "name": "no-latest",
        "action": "deny",
        "repositories": ["docker.io/library/redis"],
        "tags": ["latest"],
        "reason": "pull a release by its tag",
    },
    {"name": "all-else", "action": "allow"},
]


class Shop:
    """`site` is the server, `admin` the address of its admin listener."""

    def __init__(self, site: Site, upstream: Upstream, clock: Clock, audit: Path) -> None:
        self.site = site
        self.upstream = upstream
        self.clock = clock
        self.audit = audit

    @property
    def admin(self) -> str:
        return str(self.site.app.admin_url)

    def image(self, repository: str, tag: str | None, *layers: bytes, env: tuple[str, ...] = ()) -> Any:
        """An image upstream, with a configuration as a build writes it."""
        steps = [f"RUN make step-{number}" for number in range(len(layers))]
        config = json.dumps(
            {
                "os": "linux",
                "architecture": "amd64",
                "created": "2026-03-04T05:06:07Z",
                "config": {
                    "Env": ["PATH=/usr/bin", *env],
                    "Entrypoint": ["/app"],
                    "Labels": {"team": "shop"},
                },
                "rootfs": {"type": "layers", "diff_ids": [digest_of(each) for each in layers]},
                "history": [{"created_by": each} for each in steps],
            }
        ).encode()
        named = [
            {"mediaType": kind, "digest": self.upstream.blob(repository, content), "size": len(content)}
            for kind, content in (
                ("application/vnd.oci.image.config.v1+json", config),
                *(("application/vnd.oci.image.layer.v1.tar", each) for each in layers),
            )
        ]
        body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": named[0], "layers": named[1:]}
        return self.upstream.manifest(repository, json.dumps(body).encode(), OCI_MANIFEST, tag)

    async def pull(self, repository: str, reference: str) -> None:
        """All of an image."""
        status, _, content = await self.site.get(f"/v2/{repository}/manifests/{reference}")
        assert status == 200, content
        found = json.loads(content)
        for each in found.get("manifests", []):
            await self.pull(repository, each["digest"])
        for each in [found[name] for name in ("config",) if name in found] + found.get("layers", []):
            assert (await self.site.get(f"/v2/{repository}/blobs/{each['digest']}"))[0] == 200
        going_on = self.site.app.composition.fills.in_flight()
        await asyncio.gather(*(each.task for each in going_on if each.task))
        await self.site.app.composition.recorder.flush()

    async def api(self, method: str, path: str, **fields: Any) -> Any:
        url = f"{self.admin.rstrip('/')}/api/v1/{path}"
        async with self.site.session.request(method, url, json=fields or None) as response:
            assert response.status in (200, 202), await response.text()
            return await response.json()

    def acts(self) -> list[dict[str, Any]]:
        """What the audit log says of operators."""
        lines = [json.loads(each) for each in self.audit.read_text().splitlines()]
        return [each for each in lines if each["kind"] in ("admin", "override", "login")]


def layer(name: str, size: int = 200_000) -> bytes:
    """A layer with a program, of a size of its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(f"usr/bin/{name}")
        info.size, info.mode = size, 0o755
        archive.addfile(info, io.BytesIO((name.encode() * (size // len(name) + 1))[:size]))
    return buffer.getvalue()


async def open_shop(serve: Serve, upstream: Upstream, clock: Clock, directory: Path, **top: Any) -> Shop:
    """A server with some days behind it."""
    clock.now = 1_790_000_000.0
    audit = directory / "audit.log"
    tree = {
        "admin_ui": "on",
        "audit": {"file": str(audit)},
        "policy": {"rules": RULES, "moves": [APPROVAL]},
        "pins": [{"match": "docker.io/library/base:*"}],
        "disk": {"path": str(directory / "disk"), "cache_limit": "50MiB", "keep_for": "30d", "min_free": 0},
        "access": {**OPEN, "api_keys": True, "oidc": {"ci": ISSUER}},
        **top,
    }
    site = await serve(
        upstream,
        top=tree,
        more={"local": {"store": {}}},
        fresh_for="10m",
        directory=directory / "disk",
        options=PATIENT,
    )
    shop = Shop(site, upstream, clock, audit)
    base = layer("base", 900_000)
    shop.image("library/base", "1", base)
    shop.image("library/web", "3", base, layer("web"), env=("VERSION=1", "MODE=slow"))
    shop.image("team/api", "2", base, layer("api", 400_000), env=("VERSION=2",))
    shop.image("library/redis", "latest", base, layer("redis"))
    amd = upstream.image("library/db", None, [base, layer("db", 500_000)], "linux/amd64")
    arm = upstream.image("library/db", None, [base, layer("db-arm", 480_000)], "linux/arm64")
    upstream.artifact("library/db", amd, "application/vnd.dev.cosign.artifact.sig.v1+json")
    upstream.index("library/db", "16", [amd, arm])
    await shop.pull("library/db", "16")
    pulled = (("library/base", "1"), ("library/web", "3"), ("team/api", "2"))
    for repository, tag in pulled:
        await shop.pull(repository, tag)
        clock.advance(3600)
    clock.advance(2 * DAY)
    shop.image(
        "library/web", "3", base, layer("web-new", 250_000), layer("certs", 30_000), env=("VERSION=2",)
    )
    shop.image("team/api", "2", base, layer("api-new", 410_000), env=("VERSION=3",))
    await shop.pull("library/web", "3")
    await shop.pull("team/api", "2")  # held: it is still the former one
    await shop.site.get("/v2/library/redis/manifests/latest")
    clock.advance(3600)
    return shop


@pytest.fixture
async def shop(serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path) -> AsyncIterator[Shop]:
    yield await open_shop(serve, upstream, clock, tmp_path)
