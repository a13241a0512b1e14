"""One view of replicas that share the records of their private registries in a database."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.oci import OCI_MANIFEST, Digest
from tests.conftest import OPEN, Clock
from tests.fleet import replicas
from tests.postgres import PostgresServer
from tests.test_fleet_view import joined, operators
from tests.test_peers import cached
from tests.test_push import image
from tests.upstream import Upstream

pytestmark = pytest.mark.clients


async def test_what_replicas_share_is_there_once(
    tmp_path: Path, clock: Clock, upstream: Upstream, postgres_server: PostgresServer
) -> None:
    shared = {"access": OPEN, "shared": {"records": postgres_server.database()}}
    keys = {**shared, "disk": {"path": str(tmp_path / "content")}}
    async with replicas(2, tmp_path, clock, cached(upstream), keys, {"local": {"store": {}}}) as fleet:
        first, second = fleet.all
        for content in (b"{}", b"a layer"):
            path = f"/v2/local/app/blobs/uploads/?digest={Digest.of(content)}"
            async with first.request("POST", path, data=content) as response:
                assert response.status == 201
        manifest, headers = image(Digest.of(b"a layer")), {"Content-Type": OCI_MANIFEST}
        path = "/v2/local/app/manifests/latest"
        async with first.request("PUT", path, data=manifest, headers=headers) as response:
            assert response.status == 201
        one, other = operators(fleet)
        for each in (one, other):
            (row,) = (await each.ask.images("local")).images
            assert (row.tag, row.replica) == ("latest", None)
        found = await other.ask.collect()  # by one, for all
        assert (found.repositories, [row.replica for row in found.rows], found.refused) == (1, [], "")
        await one.ask.pin("local/app", 60.0)
        await other.ask.unpin("local/app")
        for replica in (first, second):
            await joined(replica).exchange()
        assert [await each.ask.pins() for each in (one, other)] == [[], []]
        assert one.warnings == other.warnings == []
