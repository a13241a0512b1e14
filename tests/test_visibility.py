"""A cache that shows what its upstream shows to the caller, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.access import throttle
from proxy.access import visibility as module
from proxy.access.visibility import STALE_FOR, Visibility
from proxy.upstream.credentials import Credential, Credentials
from storage.errors import Unavailable
from tests.conftest import Clock, Serve
from tests.test_access import Door, login
from tests.upstream import Basic, Bearer, Image, Status, Upstream

OWNER = Basic("owner", "s3cret")
APP = "/v2/team/app"
BASIC = 'Basic realm="entrepot"'
LAYER = b"a layer" * 1000
ME = login("owner", "s3cret")
WRONG = login("owner", "guess")


@pytest.fixture
def image(upstream: Upstream) -> Image:
    upstream.auth = Bearer(OWNER, anonymous=False)
    return upstream.image("team/app", "latest", layers=(LAYER,))


Open = Callable[..., Any]


@pytest.fixture
def opened(serve: Serve, upstream: Upstream, image: Image, monkeypatch: pytest.MonkeyPatch) -> Open:
    """A cache with credentials of its own, whose upstream lets nobody in without."""
    monkeypatch.setattr(throttle, "FREE", 100)  # a test that waits says so

    async def open(access: dict[str, Any] | None = None, **keys: Any) -> Door:
        top = {"access": access} if access else None
        options = {"username": "owner", "password": "s3cret"}
        return Door(await serve(upstream, options=options, top=top, visibility="caller", **keys))

    return open


async def get(door: Door, path: str, headers: Mapping[str, str] | None = None) -> int:
    said = await door.ask("GET", f"{APP}/{path}", headers)
    assert said.challenge == (BASIC if said.status == 401 else None)
    return said.status


def asked(upstream: Upstream) -> list[str]:
    """What was asked but for tokens, and then forgotten."""
    log = [line for line in upstream.log if not line.startswith("GET token")]
    upstream.clear()
    return log


async def test_the_caller_sees_what_upstream_shows_it(opened: Open, upstream: Upstream, image: Image) -> None:
    door = await opened()
    paths = ("manifests/latest", f"manifests/{image.digest}", f"blobs/{image.layers[0]}", "tags/list")
    for _ in ("cold", "warm"):
        for path in paths:
            assert await get(door, path) == 401
            assert await get(door, path, WRONG) == 401
            assert await get(door, path, {"Authorization": "Bearer x"}) == 401
            assert await get(door, path, ME) == 200
        await asyncio.sleep(0)


async def test_answers_are_for_the_caller_alone(opened: Open) -> None:
    door = await opened()
    said = await door.ask("GET", f"{APP}/manifests/latest", ME)
    assert said.headers["Cache-Control"] == "private, max-age=600"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("manifests/latest", "HEAD manifest team/app:latest"),
        ("manifests/{manifest}", "HEAD manifest team/app@{manifest:.19}"),
        ("blobs/{layer}", "HEAD blob team/app@{layer:.19}"),
        ("tags/list", "GET tags team/app"),
        ("referrers/{manifest}", "HEAD manifest team/app@{manifest:.19}"),
    ],
)
async def test_upstream_is_asked_for_what_the_caller_wants(
    opened: Open, upstream: Upstream, image: Image, path: str, line: str
) -> None:
    names = {"manifest": image.digest, "layer": image.layers[0]}
    door = await opened()
    assert await get(door, path.format(**names)) == 401
    assert asked(upstream) == [line.format(**names)]


async def test_a_yes_is_remembered_for_the_caller_and_the_repository(
    opened: Open, upstream: Upstream, image: Image, clock: Clock
) -> None:
    upstream.image("team/other", "latest")
    door = await opened({"remember": "5m"}, fresh_for="forever")
    assert await get(door, "manifests/latest", ME) == 200
    upstream.clear()
    for _ in range(3):
        assert await get(door, "manifests/latest", ME) == 200
        assert await get(door, f"manifests/{image.digest}", ME) == 200
    assert asked(upstream) == []
    assert await get(door, "manifests/latest") == 401
    assert (await door.ask("GET", "/v2/team/other/manifests/latest")).status == 401
    asked(upstream)
    clock.advance(300)
    assert await get(door, "manifests/latest", ME) == 200
    assert asked(upstream) == ["HEAD manifest team/app:latest"]


async def test_what_everybody_may_see_is_asked_once_for_all(
    opened: Open, upstream: Upstream, image: Image
) -> None:
    upstream.auth = Bearer(OWNER)
    door = await opened(fresh_for="forever")
    assert await get(door, "manifests/latest") == 200
    asked(upstream)
    assert await get(door, "manifests/latest", WRONG) == 200
    assert asked(upstream) == []


async def test_a_no_is_not_remembered(opened: Open, upstream: Upstream, image: Image) -> None:
    door = await opened()
    assert await get(door, "manifests/latest") == 401
    upstream.auth = None
    assert await get(door, "manifests/latest") == 200


async def test_who_has_lost_its_right_sees_no_more(
    opened: Open, upstream: Upstream, image: Image, clock: Clock
) -> None:
    door = await opened(fresh_for="forever")
    assert await get(door, "manifests/latest", ME) == 200
    upstream.auth = Basic("owner", "changed")
    upstream.expire_tokens()
    clock.advance(300)
    assert await get(door, "manifests/latest", ME) == 401
    await upstream.stop()
    assert await get(door, "manifests/latest", ME) == 503
    await upstream.start()


async def test_unknown_is_unknown(opened: Open, upstream: Upstream, image: Image) -> None:
    upstream.auth = None
    door = await opened()
    assert await get(door, "manifests/absent") == 404
    assert await get(door, "manifests/latest") == 200
    # Some registries say so of what is there, to whom may not know.
    door.site.clock.advance(300)
    upstream.next("HEAD", image.digest, Status(404))
    assert await get(door, f"manifests/{image.digest}") == 404


async def test_while_upstream_cannot_be_asked_a_yes_of_the_last_day_does(
    opened: Open, upstream: Upstream, image: Image, clock: Clock
) -> None:
    door = await opened(fresh_for="forever")
    assert await get(door, "manifests/latest", ME) == 200
    await upstream.stop()
    clock.advance(STALE_FOR - 1)
    assert await get(door, "manifests/latest", ME) == 200
    assert await get(door, "manifests/latest") == 503
    assert await get(door, "manifests/latest", WRONG) == 503
    clock.advance(1)
    assert await get(door, "manifests/latest", ME) == 503
    await upstream.start()


async def test_offline_nobody_is_asked(opened: Open, upstream: Upstream, image: Image) -> None:
    door = await opened(offline=True)
    assert await get(door, "manifests/latest", ME) == 503
    assert upstream.log == []


async def test_bytes_that_are_here_for_another_repository_are_not_shown(
    opened: Open, upstream: Upstream, image: Image
) -> None:
    upstream.auth = None
    upstream.image("team/public", "latest", layers=(LAYER,))
    door = await opened()
    assert (await door.ask("GET", f"/v2/team/public/blobs/{image.layers[0]}")).status == 200
    upstream.auth = Bearer(OWNER, anonymous=False)
    for method in ("GET", "HEAD"):
        said = await door.ask(method, f"{APP}/blobs/{image.layers[0]}")
        assert (said.status, said.challenge) == (401, BASIC)


async def test_the_callers_credentials_go_to_upstream_alone(
    opened: Open, upstream: Upstream, image: Image, events: LogCapture
) -> None:
    upstream.cdn = True
    upstream.auth = Bearer(Basic("caller", "wonderland"), realm="{cdn_url}/token", anonymous=False)
    door = await opened(fresh_for="forever")
    caller = login("caller", "wonderland")
    # The realm is another host, and not one that it may send us to.
    assert await get(door, "manifests/latest", caller) == 401
    assert all(request.headers.get("Authorization") is None for request in upstream.requests)
    upstream.auth = OWNER
    assert await get(door, f"blobs/{image.layers[0]}", ME) == 200
    stored = [request for request in upstream.requests if request.kind == "cdn"]
    assert stored
    assert all("Authorization" not in request.headers for request in stored)
    text = repr(events.entries)
    for header in (ME, caller):
        assert header["Authorization"][6:] not in text
    assert "wonderland" not in text
    assert "s3cret" not in text


async def test_who_tries_too_often_has_to_wait(
    opened: Open, upstream: Upstream, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "FREE", 1)
    monkeypatch.setattr(throttle, "FIRST", 1000.0)
    door = await opened()
    assert await get(door, "manifests/latest", ME) == 200
    for status in (401, 401, 429):
        assert await get(door, "manifests/latest", WRONG) == status
    asked(upstream)
    assert await get(door, "manifests/latest", WRONG) == 429
    assert asked(upstream) == []
    assert await get(door, "manifests/latest", ME) == 200


async def test_a_ping_asks_who_it_is(opened: Open, upstream: Upstream, image: Image) -> None:
    door = await opened()
    said = await door.ask("GET", "/v2/")
    assert (said.status, said.challenge) == (401, BASIC)
    assert (await door.ask("GET", "/v2/", ME)).status == 200
    assert upstream.log == []


async def test_nothing_is_pushed_and_nothing_listed(opened: Open, image: Image) -> None:
    door = await opened()
    assert await get(door, "manifests/latest", ME) == 200
    assert (await door.push_blob(ME, APP)).status == 405
    said = await door.ask("GET", "/v2/_catalog", ME)
    assert (said.status, said.body) == (200, b'{"repositories":[]}')


async def test_of_several_urls_the_last_ones_word_counts(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    async with Upstream() as mirror:  # which shows everything to everybody
        mirror.image("team/app", "latest", layers=(LAYER,))
        options = {"url": [mirror.url, upstream.url], "username": "owner", "password": "s3cret"}
        door = Door(await serve(upstream, options=options, visibility="caller"))
        assert await get(door, "manifests/latest", ME) == 200
        assert await get(door, "manifests/latest") == 401
        assert await get(door, "manifests/latest", WRONG) == 401


# By itself


class Told:
    """Stands for an upstream that tells callers what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Credential | None] = []
        self.closed = 0
        self.gate = asyncio.Event()
        self.gate.set()

    def as_caller(self, credentials: Credentials) -> Told:
        caller = Told()
        caller.asked, caller.gate = self.asked, self.gate
        caller.credentials = credentials
        caller.close = self.close  # type: ignore[method-assign]
        return caller

    credentials: Credentials

    async def ask(self) -> None:
        self.asked.append(await self.credentials.get(""))
        await self.gate.wait()

    async def close(self) -> None:
        self.closed += 1


def ask(registry: Any) -> Any:
    return registry.ask()


def visibility(told: Told, clock: Clock) -> Visibility:
    return Visibility("docker.io", told, 300, clock)  # type: ignore[arg-type]


def test_processes_with_one_secret_identify_credentials_alike(clock: Clock) -> None:
    one, two, other = [
        Visibility("docker.io", Told(), 300, clock, secret=secret)  # type: ignore[arg-type]
        for secret in (b"a", b"a", b"b")
    ]
    alice = Credential("alice", "password")
    assert one.identify(alice) == two.identify(alice) != other.identify(alice)
    assert one.identify(alice) != one.identify(Credential("alice", "passwork"))


async def test_many_at_once_are_one_question(clock: Clock) -> None:
    told = Told()
    told.gate.clear()
    visible = visibility(told, clock)
    callers = [None, Credential("a", "1"), Credential("a", "2")]
    checks = [visible.check("team/app", each, "tag", ask) for each in callers * 10]
    asking = asyncio.gather(*checks)
    for _ in range(5):
        await asyncio.sleep(0)
    told.gate.set()
    await asking
    assert told.asked == callers
    await visible.close()


async def test_few_callers_and_their_passwords_are_held(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALLERS", 2)
    monkeypatch.setattr(module, "REMEMBERED", 3)
    told = Told()
    visible = visibility(told, clock)
    for number in range(5):
        await visible.check("team/app", Credential("a", f"secret-{number}"), "tag", ask)
    assert len(visible._callers) == 2
    assert len(visible._seen) == 3
    assert "secret" not in repr(visible._seen)
    await visible.close()
    assert told.closed == 2


async def test_while_it_is_cut_off_it_is_not_asked(clock: Clock) -> None:
    told, cut = Told(), False
    visible = Visibility("docker.io", told, 300, clock, cut=lambda: cut)  # type: ignore[arg-type]
    await visible.check("team/app", None, "tag", ask)
    cut = True
    clock.advance(300)
    await visible.check("team/app", None, "tag", ask)
    with pytest.raises(Unavailable, match="is cut off"):
        await visible.check("team/other", None, "tag", ask)
    assert told.asked == [None]
    await visible.close()


async def test_who_is_asked_for_just_now_is_not_let_go_of(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALLERS", 1)
    told = Told()
    told.gate.clear()
    visible = visibility(told, clock)
    asking = [
        asyncio.create_task(visible.check("team/app", Credential("a", str(number)), "tag", ask))
        for number in range(3)
    ]
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(visible._callers) == 3
    told.gate.set()
    await asyncio.gather(*asking)
    assert len(visible._callers) == 1
    await visible.close()


# Refusals that are no failed logins


@pytest.fixture
def impatient(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two failed logins the next attempt has to wait for long."""
    monkeypatch.setattr(throttle, "FREE", 1)
    monkeypatch.setattr(throttle, "FIRST", 1000.0)


@pytest.fixture
def refusing(upstream: Upstream) -> dict[str, int]:
    """The status for requests of manifests with an Authorization of a scheme, as long as one is set."""
    found: dict[str, int] = {}
    for status in (401, 403):

        def meets(request: Any, status: int = status) -> bool:
            scheme = request.headers.get("Authorization", "").partition(" ")[0]
            return found.get(scheme) == status and request.kind == "manifest"

        upstream.next("HEAD", meets, Status(status), times=1000)
    return found


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refusal_with_a_token_is_no_failed_login(
    opened: Open, upstream: Upstream, image: Image, impatient: None, refusing: dict[str, int], status: int
) -> None:
    door = await opened()
    refusing["Bearer"] = status
    for _ in range(6):
        assert await get(door, "manifests/latest", ME) == 401
    refusing.clear()
    assert await get(door, "manifests/latest", ME) == 200


async def test_a_refusal_by_403_is_no_failed_login(
    opened: Open, upstream: Upstream, image: Image, impatient: None, refusing: dict[str, int]
) -> None:
    upstream.auth = OWNER
    door = await opened()
    refusing["Basic"] = 403
    for _ in range(6):
        assert await get(door, "manifests/latest", ME) == 401
    refusing.clear()
    assert await get(door, "manifests/latest", ME) == 200


async def test_who_was_let_in_elsewhere_has_the_right_password(
    opened: Open, upstream: Upstream, image: Image, impatient: None, refusing: dict[str, int], clock: Clock
) -> None:
    upstream.auth = OWNER
    upstream.image("team/other", "v1")
    door = await opened({"remember": "1m"})
    assert (await door.ask("GET", "/v2/team/other/manifests/v1", ME)).status == 200
    clock.advance(3600)
    refusing["Basic"] = 401
    for _ in range(6):
        assert await get(door, "manifests/latest", ME) == 401
    refusing.clear()
    assert await get(door, "manifests/latest", ME) == 200


async def test_a_client_that_repeats_wrong_credentials_keeps_nobody_else_waiting(
    opened: Open, upstream: Upstream, image: Image, impatient: None
) -> None:
    upstream.auth = OWNER
    door = await opened()
    stranger = login("stranger", "own")
    for status in (401, 401, 429, 429):
        assert await get(door, "manifests/latest", stranger) == status
    assert await get(door, "manifests/latest", ME) == 200


async def test_many_guesses_keep_their_address_waiting(
    opened: Open, upstream: Upstream, image: Image, impatient: None
) -> None:
    door = await opened()
    for number, status in enumerate((401, 401, 429)):
        assert await get(door, "manifests/latest", login(f"user{number}", f"guess{number}")) == status
