"""The keys of an issuer: when they are fetched, what is no key, and an issuer that fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from joserfc.jwk import OctKey, OKPKey
from structlog.testing import LogCapture

from proxy.access import issuer_keys as module
from proxy.access.issuer_documents import USUAL, clock_ahead, freshness, parse_jwks, parse_metadata
from proxy.access.issuer_keys import LONGEST, RETRY, SHORTEST, UNKNOWN, IssuerKeys, KeyFile, KeySet
from proxy.upstream.connect import Connect
from proxy.upstream.transport import RETRIES
from storage.errors import Unavailable
from tests.authority import Authority
from tests.conftest import Clock
from tests.issuer import METADATA, Issuer, public, rsa_jwk, server_context

Make = Callable[..., IssuerKeys]
HOUR = 3600.0


@pytest.fixture
async def make(issuer: Issuer, clock: Clock) -> AsyncIterator[Make]:
    made: list[IssuerKeys] = []

    def make(jwks_url: str | None = None, **more: Any) -> IssuerKeys:
        connect = more.pop("connect", Connect(connect_timeout=2, header_timeout=2))
        made.append(IssuerKeys("ci", issuer.url, jwks_url, connect, clock=clock, monotonic=clock, **more))
        return made[-1]

    yield make
    for each in made:
        await each.close()


def names(keys: KeySet | None) -> list[str]:
    return keys.names() if keys is not None else []


async def reason(keys: Awaitable[KeySet]) -> str:
    with pytest.raises(Unavailable) as raised:
        await keys
    return str(raised.value)


def failures(events: LogCapture) -> list[str]:
    return [each["reason"] for each in events.entries if each["event"] == "issuer.failed"]


async def test_nothing_is_fetched_before_it_is_needed(issuer: Issuer, make: Make, clock: Clock) -> None:
    keys = make()
    assert keys.current() is None
    assert not issuer.asked
    assert names(await keys.keys("first")) == ["first"]
    assert issuer.asked == {METADATA: 1, "/keys": 1}
    clock.advance(USUAL - 1)
    assert names(await keys.keys("first")) == ["first"]
    assert issuer.asked == {METADATA: 1, "/keys": 1}
    assert keys.current() is await keys.keys(None)


async def test_one_fetch_for_all(issuer: Issuer, make: Make) -> None:
    keys, issuer.gate = make(), asyncio.Event()
    asked = [asyncio.create_task(keys.keys("first")) for _ in range(50)]
    await issuer.was_asked(1, METADATA)
    asked[0].cancel()  # it does not take the others with it
    issuer.gate.set()
    found = await asyncio.gather(*asked[1:])
    assert all(each is found[0] for each in found)
    assert issuer.asked == {METADATA: 1, "/keys": 1}


async def test_without_discovery(issuer: Issuer, make: Make) -> None:
    keys = make(f"{issuer.url}/keys")
    assert names(await keys.keys("first")) == ["first"]
    assert issuer.asked == {"/keys": 1}


async def test_a_rotated_key_is_fetched(issuer: Issuer, make: Make, clock: Clock, events: LogCapture) -> None:
    keys = make()
    former = await keys.keys("first")
    issuer.rotate("second")
    clock.advance(UNKNOWN)
    assert names(await keys.keys("first")) == ["first"]
    found = await keys.keys("second")
    assert names(found) == ["first", "second"]
    assert found is not former
    assert issuer.asked["/keys"] == 2
    told = [each["keys"] for each in events.entries if each["event"] == "issuer.keys"]
    assert told == [["first"], ["first", "second"]]


async def test_unknown_keys_are_fetched_once_in_a_while(issuer: Issuer, make: Make, clock: Clock) -> None:
    keys = make()
    found = await keys.keys("first")
    for number in range(20):
        assert await keys.keys(f"guess-{number}") is found
    assert issuer.asked["/keys"] == 1
    clock.advance(UNKNOWN)
    await asyncio.gather(*(keys.keys(f"guess-{number}") for number in range(20)))
    assert issuer.asked["/keys"] == 2


async def test_stale_keys_are_fetched_again(issuer: Issuer, make: Make, clock: Clock) -> None:
    issuer.headers = {"Cache-Control": "public, max-age=600", "Age": "100", "ETag": '"a"'}
    keys = make()
    found = await keys.keys("first")
    clock.advance(499)
    assert keys.current() is found
    clock.advance(1)
    assert keys.current() is None
    assert await keys.keys("first") is found  # 304
    assert issuer.conditions == [None, None, '"a"', '"a"']
    assert keys.current() is found
    issuer.headers["ETag"] = '"b"'
    issuer.rotate("second", keep=False)
    clock.advance(500)
    assert names(await keys.keys("first")) == ["second"]


async def test_an_issuer_that_dies(issuer: Issuer, make: Make, clock: Clock, events: LogCapture) -> None:
    keys = make(keep=10 * HOUR)
    found = await keys.keys("first")
    await issuer.stop()
    clock.advance(9 * HOUR)
    for _ in range(3):
        assert await keys.keys("first") is found
        assert keys.current() is None
        clock.advance(RETRY)
    assert len(failures(events)) == 1
    assert "cannot be reached" in failures(events)[0]
    clock.advance(HOUR)
    said = await reason(keys.keys("first"))
    assert said == "the keys of the issuer ci cannot be fetched now"
    assert len(failures(events)) == 1
    await issuer.start()
    clock.advance(RETRY)
    found = await keys.keys("first")
    assert names(found) == ["first"]
    assert [each["event"] for each in events.entries][-1] == "issuer.recovered"


async def test_an_issuer_that_was_never_there(issuer: Issuer, make: Make, clock: Clock) -> None:
    keys = make()
    issuer.answers[METADATA] = 500, {}, b""
    await reason(keys.keys("first"))
    for _ in range(5):
        await reason(keys.keys("first"))
    assert issuer.asked == {METADATA: 1 + RETRIES}
    with pytest.raises(Unavailable) as raised:
        await keys.keys("first")
    assert raised.value.retry_after == RETRY
    del issuer.answers[METADATA]
    clock.advance(RETRY)
    assert names(await keys.keys("first")) == ["first"]


async def test_stale_keys_are_waited_for_a_moment(issuer: Issuer, make: Make, clock: Clock) -> None:
    keys = make(patience=20)
    await keys.keys("first")
    issuer.rotate("second")
    clock.advance(USUAL)
    assert names(await keys.keys("first")) == ["first", "second"]


async def test_an_issuer_that_does_not_answer_holds_up_nobody(
    issuer: Issuer, make: Make, clock: Clock
) -> None:
    keys = make(patience=0.001)
    found = await keys.keys("first")
    issuer.rotate("second")
    issuer.gate = asyncio.Event()
    clock.advance(USUAL)
    assert await keys.keys("first") is found
    issuer.gate.set()


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        (METADATA, (404, {}, b""), "answered 404"),
        (METADATA, (302, {"Location": "/keys"}, b""), "answered 302"),
        (METADATA, (200, {}, b"<html>"), "no issuer or no jwks_uri"),
        (METADATA, (200, {}, b'{"issuer": "x"}'), "no issuer or no jwks_uri"),
        (METADATA, (200, {}, b'{"issuer": "https://other.example", "jwks_uri": "x"}'), "is of the issuer"),
        ("/keys", (200, {}, b"{}"), "no key for signatures"),
        ("/keys", (200, {}, b"[" * 100_000), "it is no JWKS"),
        ("/keys", (200, {}, b"\xff\xfe"), "it is no JWKS"),
        ("/keys", (200, {}, b" " * ((1 << 20) + 1)), "more than 1048576 bytes"),
        ("/keys", (503, {"Retry-After": "9"}, b""), "answered 503"),
    ],
)
async def test_wrong_answers(
    issuer: Issuer, make: Make, path: str, answer: Any, says: str, events: LogCapture
) -> None:
    issuer.answers[path] = answer
    assert says not in await reason(make().keys("first"))  # that is for the operator
    (logged,) = failures(events)
    assert says in logged


async def test_a_page_in_place_of_the_keys_is_not_kept(
    issuer: Issuer, make: Make, clock: Clock, events: LogCapture
) -> None:
    keys = make(keep=24 * HOUR)
    found = await keys.keys("first")
    issuer.answers["/keys"] = 200, {"ETag": '"page"', "Cache-Control": "max-age=86400"}, b"<html>later</html>"
    clock.advance(USUAL)
    assert await keys.keys("first") is found
    assert keys.current() is None  # so it is asked again
    del issuer.answers["/keys"]
    issuer.rotate("second")
    clock.advance(RETRY)
    assert names(await keys.keys("first")) == ["first", "second"]
    assert '"page"' not in issuer.conditions
    assert len(failures(events)) == 1


async def test_keys_that_have_moved(issuer: Issuer, make: Make, clock: Clock) -> None:
    keys = make()
    await keys.keys("first")
    body = json.dumps({"issuer": issuer.url, "jwks_uri": f"{issuer.url}/moved"}).encode()
    issuer.answers[METADATA] = 200, {}, body
    issuer.rotate("second")
    issuer.answers["/moved"] = (
        200,
        {},
        json.dumps({"keys": [public(issuer.signing["second"], kid="2")]}).encode(),
    )
    issuer.answers["/keys"] = 410, {}, b""
    clock.advance(UNKNOWN)
    assert names(await keys.keys("2")) == ["first"]
    clock.advance(max(RETRY, UNKNOWN))
    assert names(await keys.keys("2")) == ["2"]


async def test_a_cluster_asks_who_asks(issuer: Issuer, clock: Clock, make: Make, tmp_path: Path) -> None:
    await issuer.stop()
    authority = Authority(tmp_path)
    await issuer.start(server_context(authority.issue("issuer")))
    (tmp_path / "token").write_text("the-token\n")
    connect = Connect(ca_file=authority.ca, connect_timeout=2, header_timeout=2)
    keys = make(token_file=tmp_path / "token", connect=connect)
    assert names(await keys.keys("first")) == ["first"]
    (tmp_path / "token").write_text("another")
    clock.advance(UNKNOWN)
    await keys.keys("unknown")
    assert issuer.authorizations == ["Bearer the-token", "Bearer the-token", "Bearer another"]


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("", "no token"), ("a b", "no token")]
)
async def test_a_token_file_that_is_none(
    make: Make, tmp_path: Path, content: str | None, says: str, events: LogCapture
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    await reason(make(token_file=tmp_path / "token").keys("first"))
    assert says in failures(events)[0]


async def test_certificates_are_verified(
    issuer: Issuer, make: Make, tmp_path: Path, events: LogCapture
) -> None:
    await issuer.stop()
    await issuer.start(server_context(Authority(tmp_path).issue("issuer")))
    await reason(make().keys("first"))
    assert "not trusted here" in failures(events)[0]


# Documents


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, USUAL),
        ({"Cache-Control": "max-age=60"}, 60),
        ({"Cache-Control": 'Public, Max-Age="60"', "Age": "10"}, 50),
        ({"Cache-Control": "no-cache"}, 0),
        ({"Cache-Control": "no-store, max-age=60"}, 0),
        ({"Cache-Control": "max-age=a"}, 0),
        ({"Expires": "Thu, 01 Jan 1970 00:10:00 GMT", "Date": "Thu, 01 Jan 1970 00:00:00 GMT"}, 600),
        ({"Expires": "0"}, 0),
        ({"Cache-Control": "public"}, USUAL),
    ],
)
def test_freshness(headers: dict[str, str], seconds: float) -> None:
    assert freshness(headers) == seconds


def test_clocks() -> None:
    assert clock_ahead({"Date": "Thu, 01 Jan 1970 00:10:00 GMT"}, 500) == 100.5
    assert clock_ahead({}, 500) is None
    assert clock_ahead({"Date": "now"}, 500) is None


@pytest.mark.parametrize(("said", "seconds"), [("max-age=1", SHORTEST), ("max-age=999999", LONGEST)])
async def test_bounds_of_freshness(
    issuer: Issuer, make: Make, clock: Clock, said: str, seconds: float
) -> None:
    issuer.headers = {"Cache-Control": said}
    keys = make(keep=2 * LONGEST)
    await keys.keys("first")
    clock.advance(seconds - 1)
    assert keys.current() is not None
    clock.advance(1)
    assert keys.current() is None


@pytest.mark.filterwarnings("ignore:Key size should be")
def test_what_is_no_key_is_passed_over() -> None:
    good = rsa_jwk()
    others: list[Any] = [
        public(good, kid="encrypting", use="enc"),
        public(good, kid="signing", key_ops=["encrypt"]),
        OctKey.generate_key(256).as_dict(),
        public(OKPKey.import_key(x25519.X25519PrivateKey.generate())),
        public(rsa_jwk(bits=1024), kid="short"),
        {**public(good), "n": "AA"},
        {"kty": "AKP", "kid": "later"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        good.as_dict(private=True),
        None,
        [],
    ]
    found = parse_jwks(json.dumps({"keys": [*others, public(good, kid="good")]}).encode())
    assert [each.kid for each in found] == ["good"]
    with pytest.raises(ValueError, match="no key for signatures"):
        parse_jwks(json.dumps({"keys": others}).encode())


@pytest.mark.parametrize("url", ["http://other.example/keys", "https:keys", "file:///etc/passwd", "//x/keys"])
def test_keys_by_plain_http_may_be_anybodys(url: str) -> None:
    content = json.dumps({"issuer": "https://a.example", "jwks_uri": url}).encode()
    with pytest.raises(ValueError, match="not an https URL"):
        parse_metadata(content, "https://a.example")


# Files


@pytest.mark.errors("keys.failed")
async def test_a_file(tmp_path: Path, clock: Clock, events: LogCapture) -> None:
    issuer, path = Issuer(clock), tmp_path / "jwks.json"

    def write(*kids: str) -> None:
        path.write_text(json.dumps({"keys": [public(issuer.signing[each], kid=each) for each in kids]}))

    write("first")
    file = KeyFile(path)
    found = await file.keys("first")
    assert names(found) == ["first"]
    assert file.current() is found
    issuer.rotate("second")
    write("first", "second")
    assert names(await file.keys("x")) == ["first", "second"]
    write("second")
    assert file.current().withdrawn == {issuer.signing["first"].thumbprint()}
    write("first", "second")
    assert not file.current().withdrawn
    path.write_text("{}")
    assert names(file.current()) == []
    assert len(file.current().withdrawn) == 2
    path.unlink()
    assert names(file.current()) == []
    reasons = [each["reason"] for each in events.entries if each["event"] == "keys.failed"]
    assert reasons == [
        "its JWKS has no key for signatures, of type RSA (2048 bits or more), EC or OKP",
        "No such file or directory",
    ]


def test_the_bounds_make_sense() -> None:
    assert module.PATIENCE < 2
    assert UNKNOWN <= SHORTEST
