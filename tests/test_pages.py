"""The pages of an upstream's listings, and where they continue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from proxy.upstream import listing_memory, pages
from proxy.upstream.connect import HEADER_LIMIT
from proxy.upstream.pages import next_target
from proxy.upstream.transport import RETRIES
from storage.errors import ManifestUnknown, OriginFailed, OriginTimeout
from storage.oci import Digest
from tests.conftest import Serve
from tests.pulls import TAGS, pull
from tests.upstream import Fault, Hold, Redirect, Status, Upstream
from tests.upstream_client import BODY, LATEST, Ask, read

NEXT = "/v2/a/b/tags/list?last=x"


@pytest.mark.parametrize(
    ("header", "target"),
    [
        ('<u>; rel="next"', "u"),
        ("<u>;rel=next", "u"),
        ('<u> ; REL = "Next"', "u"),
        ('<u>; title="a, <b>; rel=\\"prev\\""; rel="next"', "u"),
        ('<u>; rel="first next"', "u"),
        ("<u>; type=text/html; rel=next; title*=UTF-8''n%C3%A9", "u"),
        ('<p>; rel="prev", <u>; rel="next"', "u"),
        ('<p>; rel=prev,<u>; rel=next,<v>; rel="next"', "u"),
        (", <u>; ; rel=next;,", "u"),
        ("<a,b;c>; rel=next", "a,b;c"),
        ("<>; rel=next", ""),
        ('/v2/x/tags/list?n=5&last=b; rel="next"', "/v2/x/tags/list?n=5&last=b"),
        ("u?after=a,b;rel=next", "u?after=a,b"),
        ("p; rel=prev, u; rel=next", "u"),
        ("<u>; flag; rel=next", "u"),
        ('<u>; rel="prev"; rel="next"', None),
        ('<u>; rev="next"', None),
        ('<u>; rel="nextfield"', None),
        ('<u>; rel="next"; anchor="/other"', None),
        ("<next>", None),
        ("", None),
    ],
)
def test_the_target_of_the_next_page(header: str, target: str | None) -> None:
    assert next_target(header) == target


@pytest.mark.parametrize("header", ["<u", "; rel=next", '<u>; rel="next', "<u> rel=next", "<u>; =next"])
def test_a_link_that_is_malformed(header: str) -> None:
    with pytest.raises(ValueError, match=r"parameter|target"):
        next_target(header)


class Page(Fault):
    """A page of tags with these values of Link."""

    def __init__(self, tags: list[str], link: str = "") -> None:
        self._status = Status(200, {"Link": link} if link else {}, json.dumps({"tags": tags}).encode())

    def strike(self, answer: Any, request: Any) -> Any:
        return self._status.strike(answer, request)


def is_(target: str) -> Callable[[Any], bool]:
    return lambda request: request.target == target


@pytest.mark.parametrize(
    ("link", "target"),
    [
        (f"{NEXT}; Rel=NEXT", NEXT),
        ("<list?last=x>; rel=next", NEXT),
        ("<?last=x>; rel=next", NEXT),
        (f'<{NEXT}%2fy%3D&a=%7E+>; rel="next"', f"{NEXT}%2fy%3D&a=%7E+"),
        (f"<{NEXT} é>; rel=next", f"{NEXT}+%C3%A9"),
    ],
)
async def test_all_pages_are_read(ask: Ask, upstream: Upstream, link: str, target: str) -> None:
    upstream.image("a/b", "x")
    upstream.next("GET", is_("/v2/a/b/tags/list"), Page(["one"], link))
    upstream.next("GET", is_(target), Page(["two"]))
    assert await ask(upstream.url).tags("a/b") == ["one", "two"], upstream.requests[-1].target


@pytest.mark.parametrize(
    ("link", "named"),
    [
        ("<http://[::1>; rel=next", "http://"),
        ("<http://h:99999999/>; rel=next", "99999999"),
        ("<http://h:x/>; rel=next", "h:x"),
        ("<mailto:x>; rel=next", "mailto"),
        ('</v2/a/b/tags/list?last=x>; rel="next', "last=x"),
        ("<ftp://h/>; rel=next", "h"),
    ],
)
async def test_a_page_that_cannot_be_read_is_an_error(
    serve: Serve, upstream: Upstream, link: str, named: str
) -> None:
    upstream.image("a/b", "x")
    upstream.next("GET", "tags", Page(["one"], link))
    status, body, _ = await pull(await serve(upstream), TAGS)
    assert status == 502
    assert named in json.loads(body)["errors"][0]["message"]


async def test_a_malformed_link_to_something_else_is_ignored(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "x")
    upstream.next("GET", "tags", Page(["one"], '</style.css>; rel="preload'))
    assert await ask(upstream.url).tags("a/b") == ["one"]


@pytest.mark.parametrize("fault", [Status(404), Status(405), Status(500), Status(400)], ids=str)
async def test_no_list_ends_with_a_page_that_fails(ask: Ask, upstream: Upstream, fault: Fault) -> None:
    upstream.image("a/b", "x")
    upstream.next("GET", is_("/v2/a/b/tags/list"), Page(["one"], f"<{NEXT}>; rel=next"))
    upstream.next("GET", is_(NEXT), fault, times=1 + RETRIES)
    with pytest.raises(OriginFailed):
        await ask(upstream.url).tags("a/b")


async def test_a_second_page_that_is_unknown_is_no_missing_api(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b")
    for kind in ("one", "two"):
        upstream.artifact("a/b", image, f"application/x-{kind}")
    upstream.referrers_page_size = 1
    upstream.next("GET", lambda request: "from" in request.query, Status(404))
    with pytest.raises(OriginFailed, match="page 2"):
        await ask(upstream.url).referrers("a/b", Digest(image.digest))
    upstream.next("GET", "referrers", Status(404))
    with pytest.raises(ManifestUnknown):
        await ask(upstream.url).referrers("a/b", Digest(image.digest))


async def test_pages_behind_a_redirect(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "x")
    async with Upstream(page_size=1) as behind:
        for tag in ("one", "three", "two"):
            behind.image("a/b", tag)
        upstream.next("GET", "tags", Redirect(f"{behind.url}/v2/a/b/tags/list"))
        assert await ask(upstream.url).tags("a/b") == ["one", "three", "two"]
        assert len(upstream.requests) == 1
        assert all("Authorization" not in request.headers for request in behind.requests)


async def test_pages_behind_a_redirect_may_lead_back(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "x")
    async with Upstream() as behind:
        behind.image("a/b", "one")
        behind.next("GET", "tags", Page(["one"], f"<{upstream.url}{NEXT}>; rel=next"))
        upstream.next("GET", is_("/v2/a/b/tags/list"), Redirect(f"{behind.url}/v2/a/b/tags/list"))
        upstream.next("GET", is_(NEXT), Page(["two"]))
        assert await ask(upstream.url).tags("a/b") == ["one", "two"]


async def test_pages_behind_a_redirect_do_not_lead_elsewhere(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "x")
    async with Upstream() as behind:
        behind.image("a/b", "one")
        behind.next("GET", "tags", Page(["one"], f"<{behind.cdn_url}/>; rel=next"))
        upstream.next("GET", "tags", Redirect(f"{behind.url}/v2/a/b/tags/list"))
        with pytest.raises(OriginFailed, match="another host"):
            await ask(upstream.url).tags("a/b")


async def test_all_pages_are_bounded_together(
    ask: Ask, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LISTING_TOTAL", 2 << 20)
    upstream.image("a/b", "x")
    tags = [f"{number:0100}" for number in range(8000)]
    upstream.next("GET", "tags", Page(tags, f"<{NEXT}>; rel=next"), times=9)
    with pytest.raises(OriginFailed, match="more than 2 MiB"):
        await ask(upstream.url).tags("a/b")
    assert len(upstream.requests) == 3


async def test_all_listings_are_bounded_together(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_memory.ListingMemory.__init__, "__defaults__", (2 << 20,))
    tags = [f"{number:0100}" for number in range(8000)]  # of 0.8 MB
    gate = asyncio.Event()
    holds = [Hold(gate) for _ in range(2)]
    for name, hold in zip("ab", holds, strict=True):
        upstream.image(f"team/{name}", "x")
        upstream.next(
            "GET",
            is_(f"/v2/team/{name}/tags/list"),
            Page(tags, f"</v2/team/{name}/tags/list?last=x>; rel=next"),
        )
        upstream.next("GET", is_(f"/v2/team/{name}/tags/list?last=x"), hold)
    upstream.image("team/c", "x")
    upstream.image("team/d", "small")
    upstream.next("GET", is_("/v2/team/c/tags/list"), Page(tags))
    site = await serve(upstream)
    reading = [asyncio.create_task(pull(site, f"/v2/team/{name}/tags/list")) for name in "ab"]
    for hold in holds:
        await hold.reached.wait()
    status, headers, body = await site.get("/v2/team/c/tags/list")
    assert (status, headers["Retry-After"]) == (503, "1")
    assert b"the lists that upstreams are sending now have over 2 MiB" in body
    assert (await pull(site, "/v2/team/d/tags/list"))[0] == 200
    gate.set()
    assert [status for status, *_ in await asyncio.gather(*reading)] == [200, 200]
    site.clock.advance(11)
    upstream.next("GET", is_("/v2/team/c/tags/list"), Page(tags))
    status, body, _ = await pull(site, "/v2/team/c/tags/list")
    assert (status, len(json.loads(body)["tags"])) == (200, 8000)


async def test_all_pages_are_bounded_in_time(
    ask: Ask, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LISTING_SECONDS", 0.0)
    upstream.image("a/b", "x")
    upstream.next("GET", "tags", Hold(asyncio.Event()))
    with pytest.raises(OriginTimeout, match="to list /v2/a/b/tags/list"):
        await ask(upstream.url).tags("a/b")


# Headers


@pytest.mark.parametrize("size", [9000, HEADER_LIMIT - 100])
async def test_long_headers_of_upstreams(ask: Ask, upstream: Upstream, size: int) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    origin = ask(upstream.url)
    upstream.next("GET", "latest", Status(200, {"X-Long": "x" * size}, image.content))
    assert (await origin.get_manifest("a/b", LATEST)).content == image.content
    target = f"/v2/a/b/blobs/{image.layers[0]}"
    # The fake upstream reads requests of less than 64 KiB.
    signature = "a" * min(size, HEADER_LIMIT // 2)
    upstream.next("GET", is_(target), Redirect(f"{target}?signature={signature}"))
    assert await read(origin, image.layers[0]) == BODY


@pytest.mark.parametrize("name", ["X-Long", "Location", "Link"])
async def test_a_header_that_is_too_long_is_named(serve: Serve, upstream: Upstream, name: str) -> None:
    upstream.image("a/b", "x")
    upstream.next("GET", "tags", Status(200, {name: "x" * (HEADER_LIMIT + 1)}, b"{}"))
    status, body, _ = await pull(await serve(upstream), TAGS)
    assert (status, "longer than 64 KiB" in body.decode()) == (502, True)


async def test_a_status_line_that_is_malformed(serve: Serve, upstream: Upstream) -> None:
    upstream.image("a/b", "x")
    upstream.next("GET", "tags", Status(200, {"Content-Length": "+2"}, b"{}"))
    status, body, _ = await pull(await serve(upstream), TAGS)
    assert (status, "malformed HTTP" in body.decode()) == (502, True)
