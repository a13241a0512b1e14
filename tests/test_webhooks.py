"""What receivers hear of a server: what happened, over workers and deaths, and nothing else."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from proxy.webhooks.publisher import Publisher
from storage.disk.blobs import BlobFiles
from storage.oci import OCI_MANIFEST, OCTETS, Digest
from storage.records import Batch
from tests.conftest import OPEN, Clock, Serve
from tests.events import Ear
from tests.processes import Place, place  # noqa: F401  a fixture
from tests.receiver import Receiver, receiver  # noqa: F401  a fixture
from tests.test_admin import DOCUMENT
from tests.test_push import APP, UPLOADS, Client, image, pushed
from tests.upstream import Upstream

pytestmark = pytest.mark.housekeeping

ALL = ["push", "pull", "delete", "mount", "move"]
Told = Callable[..., Awaitable[Client]]


def hook(receiver: Receiver, **keys: Any) -> dict[str, Any]:  # noqa: F811
    return {"name": "a", "url": receiver.url, "actions": ALL, **keys}


@pytest.fixture
def told(serve: Serve, upstream: Upstream, receiver: Receiver) -> Told:  # noqa: F811
    """A server with the store `local`, whose webhook has `keys`."""

    async def start(**keys: Any) -> Client:
        top = {"webhooks": [hook(receiver, **keys)]}
        return Client(await serve(upstream, more={"local": {"store": {}}}, top=top))

    return start


def brief(events: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Action, repository, and tag or digest."""
    targets = [each["target"] for each in events]
    return [
        (each["action"], target["repository"], target.get("tag") or target["digest"])
        for each, target in zip(events, targets, strict=True)
    ]


# Stores


async def test_a_push_whole(told: Told, receiver: Receiver, clock: Clock) -> None:  # noqa: F811
    client = await told()
    config = await client.blob(b"{}")
    manifest = image()
    digest = Digest.of(manifest)
    async with client.site.request(
        "PUT",
        f"{APP}/manifests/v1",
        data=manifest,
        headers={"Content-Type": OCI_MANIFEST, "User-Agent": "x/1"},
    ) as response:
        assert response.status == 201
        id = response.headers["X-Request-Id"]
    blob, event = await receiver.took(2)
    host = client.site.url.removeprefix("http://")
    assert blob["target"] == {
        "mediaType": OCTETS,
        "digest": config,
        "size": 2,
        "length": 2,
        "repository": "local/team/app",
        "url": f"http://{host}{APP}/blobs/{config}",
    }
    assert event == {
        "id": event["id"],
        "timestamp": "2023-11-14T22:13:20.000000Z",
        "action": "push",
        "target": {
            "mediaType": OCI_MANIFEST,
            "digest": digest,
            "size": len(manifest),
            "length": len(manifest),
            "repository": "local/team/app",
            "url": f"http://{host}{APP}/manifests/{digest}",
            "tag": "v1",
        },
        "request": {"id": id, "addr": "127.0.0.1", "host": host, "method": "PUT", "useragent": "x/1"},
        "actor": {},
        "source": event["source"],
    }
    assert event["source"]["addr"].startswith(socket.gethostname())
    assert event["id"] != blob["id"]


async def test_a_push_that_is_repeated_is_told_again(told: Told, receiver: Receiver) -> None:  # noqa: F811
    """1. it is stored  2. the worker is killed, and tells nothing  3. the client repeats it."""
    client = await told()
    session, digest = await client.started(), Digest.of(b"{}")
    for _ in range(2):
        assert (await client.ask("PUT", f"{session}?digest={digest}", b"{}")).status == 201
    assert brief(await receiver.took(2)) == [("push", "local/team/app", digest)] * 2


async def test_everything_that_is_done_to_a_store(told: Told, receiver: Receiver) -> None:  # noqa: F811
    client = await told(actions=["push", "delete", "mount", "move"])
    config = await client.blob(b"{}")
    first, second = image(), image(annotations={"a": "b"})
    for reference, content in (("v1", first), ("v1", first), ("v1", second)):
        assert (await client.manifest(reference, content)).status == 201
    several = f"{Digest.of(first)}?tag=v1&tag=v2"
    assert (await client.manifest(several, first)).status == 201
    assert (await client.manifest(Digest.of(second), second)).status == 201
    other = "/v2/local/other"
    answer = await client.ask("POST", f"{other}/blobs/uploads/?mount={config}&from=local/team/app")
    assert answer.status == 201
    for path in ("manifests/v2", f"manifests/{Digest.of(second)}", f"blobs/{config}"):
        assert (await client.ask("DELETE", f"{APP}/{path}")).status == 202
    # What was refused, or begun and not ended, has not happened.
    assert (await client.ask("DELETE", await client.started())).status == 204
    assert (await client.ask("DELETE", f"{APP}/manifests/v2")).status == 404
    assert (await client.manifest("v3", image(Digest.of(b"lacking")))).status == 400
    lacking = f"mount={Digest.of(b'lacking')}&from=local/team/app"
    answer = await client.ask("POST", f"{other}/blobs/uploads/?{lacking}")
    assert (await client.ask("DELETE", answer.location)).status == 204
    app = "local/team/app"
    assert brief(await receiver.took(13)) == [
        ("push", app, config),
        ("push", app, "v1"),
        ("push", app, "v1"),
        ("move", app, "v1"),
        ("push", app, "v1"),
        ("move", app, "v1"),
        ("push", app, "v1"),
        ("push", app, "v2"),
        ("push", app, Digest.of(second)),
        ("mount", "local/other", config),
        ("delete", app, "v2"),
        ("delete", app, Digest.of(second)),
        ("delete", app, config),
    ]
    targets = [each.event["target"] for each in receiver.notices]
    assert (targets[3]["fromDigest"], targets[3]["digest"]) == (Digest.of(first), Digest.of(second))
    assert targets[9]["fromRepository"] == app
    assert targets[10] == {"repository": app, "tag": "v2"}
    assert targets[11] == {"repository": app, "digest": Digest.of(second)}
    await client.site.app.stop()
    assert len(receiver.notices) == 13


async def test_pulls(told: Told, receiver: Receiver) -> None:  # noqa: F811
    client = await told(actions=["pull"])
    config = await client.blob(b"{}")
    manifest = image()
    digest = Digest.of(manifest)
    await client.manifest("v1", manifest)
    for method, path, headers in (
        ("HEAD", "manifests/v1", {}),
        ("GET", "manifests/v1", {}),
        ("GET", f"manifests/{digest}", {}),
        ("GET", "manifests/v1", {"If_None_Match": f'"{digest}"'}),  # no pull
        ("HEAD", f"blobs/{config}", {}),
        ("GET", f"blobs/{config}", {}),
        ("GET", f"blobs/{config}", {"Range": "bytes=0-0"}),
        ("GET", f"blobs/{config}", {"If_None_Match": f'"{config}"'}),  # of a blob it is one
        ("GET", "manifests/lacking", {}),
        ("GET", "tags/list", {}),
    ):
        await client.ask(method, f"{APP}/{path}", **headers)
    app = "local/team/app"
    assert brief(await receiver.took(7)) == [
        ("pull", app, "v1"),
        ("pull", app, "v1"),
        ("pull", app, digest),
        *[("pull", app, config)] * 4,
    ]
    assert [each.event["request"]["method"] for each in receiver.notices][:3] == ["HEAD", "GET", "GET"]
    assert receiver.notices[0].event["target"]["size"] == len(manifest)


async def test_who_leaves_before_he_is_answered_does_not_take_the_event_along(
    told: Told,
    receiver: Receiver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = await told()
    arrived, gate = asyncio.Event(), asyncio.Event()
    renew = BlobFiles.renew
    loop = asyncio.get_running_loop()

    def held(self: BlobFiles, digest: Digest, batch: Batch | None = None) -> None:
        loop.call_soon_threadsafe(arrived.set)
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        renew(self, digest, batch)

    monkeypatch.setattr(BlobFiles, "renew", held)
    ear = Ear()
    pushing = asyncio.create_task(client.blob(b"{}"))
    await arrived.wait()
    pushing.cancel()
    await asyncio.gather(pushing, return_exceptions=True)
    gate.set()
    assert (await ear.heard("request.served"))["status"] == 499
    assert brief(await receiver.took(1)) == [("push", "local/team/app", Digest.of(b"{}"))]


async def test_a_receiver_in_another_tongue_behind_a_proxy(told: Told, receiver: Receiver) -> None:  # noqa: F811
    client = await told(format="cloudevents", actions=["push"])
    headers = {"X_Forwarded_Proto": "https", "Host": "registry.example", "User_Agent": "\udcff"}
    digest = Digest.of(b"{}")
    answer = await client.ask("POST", f"{APP}/blobs/uploads/?digest={digest}", b"{}", **headers)
    assert answer.status == 201
    (event,) = await receiver.took(1)
    assert event["type"] == "entrepot.blob.pushed"
    assert event["data"]["url"] == f"https://registry.example{APP}/blobs/{digest}"


# Caches


async def test_a_cache_tells_of_pulls_and_of_tags_that_move_upstream(
    told: Told,
    upstream: Upstream,
    receiver: Receiver,  # noqa: F811
    clock: Clock,
) -> None:
    client = await told()
    old = upstream.image("library/alpine", "3", [b"old"])
    await client.ask("GET", "/v2/library/alpine/manifests/3")
    await client.ask("GET", f"/v2/library/alpine/blobs/{old.layers[0]}")
    new = upstream.image("library/alpine", "3", [b"new"])
    clock.advance(3600)
    assert (await client.ask("GET", "/v2/library/alpine/manifests/3")).body == new.content
    name = "docker.io/library/alpine"
    events = await receiver.took(4)
    assert brief(events) == [
        ("pull", name, "3"),
        ("pull", name, old.layers[0]),
        ("move", name, "3"),
        ("pull", name, "3"),
    ]
    moved = events[2]["target"]
    assert (moved["fromDigest"], moved["digest"]) == (old.digest, new.digest)


# Without, and with little of it


async def test_without_webhooks_nothing_is_there(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    assert site.app.composition.publisher is None
    assert not (site.directory / "events").exists()


async def test_where_nobody_wants_pulls_none_is_put_together(
    told: Told,
    receiver: Receiver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = await told(actions=["push"])
    await client.blob(b"{}")
    monkeypatch.delattr(Publisher, "publish_later")
    assert (await client.ask("GET", f"{APP}/blobs/{Digest.of(b'{}')}")).status == 200
    assert len(await receiver.took(1)) == 1


@pytest.mark.errors("disk.failed", "webhook.lost")
async def test_a_queue_that_takes_nothing_in_fails_no_push(
    told: Told,
    receiver: Receiver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = await told()
    queue = client.site.app.composition.queue
    assert queue is not None
    records = queue._records

    def fail(*arguments: object, **options: object) -> None:
        raise records._disk.failed("records", Path("events"), OSError(28, "No space left on device"), 1 << 60)

    with monkeypatch.context() as full:
        full.setattr(records, "transaction", fail)
        await client.blob(b"lost")
        async with client.site.session.get(f"{client.site.app.admin_url}/readyz") as response:
            assert (await response.json())["status"] == "degraded"
    kept = await client.blob(b"kept")
    assert brief(await receiver.took(1)) == [("push", "local/team/app", kept)]
    metrics = await client.site.metrics()
    assert 'entrepot_webhook_events_total{result="lost",webhook="a"} 1.0' in metrics
    assert 'entrepot_webhook_events_total{result="queued",webhook="a"} 1.0' in metrics


# Seen by the administrator


async def test_it_is_listed(told: Told, receiver: Receiver, clock: Clock) -> None:  # noqa: F811
    client = await told()

    async def rows() -> Any:
        url = f"{client.site.app.admin_url}/api/v1/webhooks"
        async with client.site.session.get(url) as response:
            found = await response.json()
        schema = {"type": "array", "items": {"$ref": "#/components/schemas/WebhookRow"}}
        jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(found)
        return found

    host = receiver.url.partition("/hook")[0]
    assert await rows() == [
        {
            "name": "a",
            "url": host,
            "format": "registry",
            "actions": ALL,
            "pending": 0,
            "oldest": None,
            "delivered_at": None,
            "failing_since": None,
            "failed_at": None,
            "error": None,
            "replica": None,
        }
    ]
    ear = Ear()
    receiver.answers = [(503, {"Retry-After": "3000"})]
    await client.blob(b"{}")
    await ear.heard("webhook.failing")
    (row,) = await rows()
    assert (row["pending"], row["oldest"]) == (1, clock())
    assert (row["failing_since"], row["failed_at"], row["error"]) == (clock(), clock(), "answered 503")


# Processes


@pytest.mark.clients
async def test_the_keeper_is_woken_by_workers(place: Place, receiver: Receiver) -> None:  # noqa: F811
    place.tree |= {"access": OPEN}
    place.tree["namespaces"]["local"] = {"store": {}}
    place.tree["webhooks"] = [hook(receiver, actions=["push"])]
    server = await place.start()
    workers = await server.workers()
    expected = []
    for number in range(6):
        content = b"%d" % number
        expected.append(("push", "local/team/app", Digest.of(content)))
        assert (
            await pushed(workers[number % 2], "POST", UPLOADS + f"?digest={Digest.of(content)}", content)
        )[0] == 201
        await receiver.took(number + 1)
    assert brief(await receiver.took(6)) == expected
    # Those of a new configuration go on with it.
    former = [*server.pids(), server.keeper()]
    server.send(signal.SIGHUP)
    await server.heard("config.reloaded")
    await server.gone(*former)
    content = b"after"
    (worker, _) = await server.workers()
    assert (await pushed(worker, "POST", UPLOADS + f"?digest={Digest.of(content)}", content))[0] == 201
    await receiver.took(7)
    assert await server.metric("entrepot_webhook_events_total", webhook="a", result="queued") == 7
    await server.stop()


@pytest.mark.clients
async def test_what_was_acknowledged_is_told_by_the_next_server(
    place: Place,  # noqa: F811
    receiver: Receiver,  # noqa: F811
) -> None:
    place.tree |= {"access": OPEN}
    place.tree["namespaces"]["local"] = {"store": {}}
    place.tree["webhooks"] = [hook(receiver, actions=["push"])]
    receiver.gate = asyncio.Event()  # nothing is answered, so nothing is delivered
    server = await place.start()
    (worker, _) = await server.workers()
    expected = []
    for number in range(3):
        content = b"%d" % number
        expected.append(("push", "local/team/app", Digest.of(content)))
        assert (await pushed(worker, "POST", UPLOADS + f"?digest={Digest.of(content)}", content))[0] == 201
    await receiver.asked_for(1)
    await server.kill()
    receiver.gate = None
    receiver.notices.clear()
    heir = await place.start()
    assert brief(await receiver.took(3)) == expected
    await heir.stop()


async def test_what_a_retention_rule_removes(
    serve: Serve,
    upstream: Upstream,
    receiver: Receiver,  # noqa: F811
    clock: Clock,
) -> None:
    store = {"store": {"keep_tags": [{"last": 1}]}}
    top = {"webhooks": [hook(receiver, actions=["delete"])]}
    client = Client(await serve(upstream, top=top, more={"local": store}))
    for tag in ("v1", "v2", "v3"):
        clock.advance(60)
        content = image(await client.blob(tag.encode()), config=await client.blob(b"{}"))
        assert (await client.manifest(tag, content)).status == 201
    clock.advance(3 * 86400.0)
    url = client.site.app.admin_url
    assert url is not None
    async with client.site.session.post(url.with_path("/api/v1/collect"), json={}) as response:
        assert (await response.json())["tags"] == 2
    assert sorted(brief(await receiver.took(2))) == [
        ("delete", "local/team/app", "v1"),
        ("delete", "local/team/app", "v2"),
    ]
