"""The URL grammar: what each path means, that nothing else is accepted, and that both ways agree."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.web.routes import Endpoint, Route, build, build_next, parse, parse_limit
from storage.errors import (
    DigestInvalid,
    NameInvalid,
    PaginationNumberInvalid,
    PathUnknown,
    RegistryError,
    TagInvalid,
)
from storage.oci import Digest, Tag

DIGEST = Digest.of(b"content")
LONG = Digest.of(b"content", "sha512")
LATEST = Tag("latest")
HUB = "docker.io"


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v2", Route(Endpoint.BASE)),
        ("/v2/", Route(Endpoint.BASE)),
        ("/docker.io/v2", Route(Endpoint.BASE, prefix=HUB)),
        ("/docker.io/v2/", Route(Endpoint.BASE, prefix=HUB)),
        ("/v2/docker.io/", Route(Endpoint.BASE, prefix=HUB)),
        ("/v2/docker.io/v2", Route(Endpoint.BASE, prefix=HUB)),
        ("/v2/docker.io/v2/", Route(Endpoint.BASE, prefix=HUB)),
        ("/v2/my.example:5000/", Route(Endpoint.BASE, prefix="my.example:5000")),
        ("/v2/_catalog", Route(Endpoint.CATALOG)),
        ("/edge/v2/_catalog", Route(Endpoint.CATALOG, prefix="edge")),
        ("/v2/alpine/manifests/latest", Route(Endpoint.MANIFEST, "alpine", LATEST)),
        (f"/v2/a/b/c/manifests/{DIGEST}", Route(Endpoint.MANIFEST, "a/b/c", DIGEST)),
        (f"/v2/a/manifests/{LONG}", Route(Endpoint.MANIFEST, "a", LONG)),
        (f"/v2/library/alpine/blobs/{DIGEST}", Route(Endpoint.BLOB, "library/alpine", DIGEST)),
        ("/v2/a/tags/list", Route(Endpoint.TAGS, "a")),
        (f"/v2/a/referrers/{DIGEST}", Route(Endpoint.REFERRERS, "a", DIGEST)),
        ("/v2/a/blobs/uploads", Route(Endpoint.UPLOADS, "a")),
        ("/v2/a/blobs/uploads/", Route(Endpoint.UPLOADS, "a")),
        ("/v2/a/blobs/uploads/0f-9_Z.=~", Route(Endpoint.UPLOAD, "a", upload="0f-9_Z.=~")),
        (f"/v2/a/blobs/uploads/1&digest={DIGEST}", Route(Endpoint.UPLOAD, "a", DIGEST, upload="1")),
        # the namespace in front, before /v2, or both
        ("/v2/docker.io/a/manifests/latest", Route(Endpoint.MANIFEST, "docker.io/a", LATEST)),
        ("/docker.io/v2/a/manifests/latest", Route(Endpoint.MANIFEST, "a", LATEST, HUB)),
        ("/my.example:5000/v2/a/tags/list", Route(Endpoint.TAGS, "a", prefix="my.example:5000")),
        ("/v2/my.example:5000/a/tags/list", Route(Endpoint.TAGS, "my.example:5000/a")),
        ("/v2/docker.io/v2/a/manifests/latest", Route(Endpoint.MANIFEST, "docker.io/v2/a", LATEST)),
        # an IPv6 address
        ("/v2/[::1]:5000/a/b/tags/list", Route(Endpoint.TAGS, "[::1]:5000/a/b")),
        ("/v2/%5Bfd00::2%5D/a/manifests/latest", Route(Endpoint.MANIFEST, "[fd00::2]/a", LATEST)),
        ("/[::1]:5000/v2/a/tags/list", Route(Endpoint.TAGS, "a", prefix="[::1]:5000")),
        ("/v2/[::1]:5000/", Route(Endpoint.BASE, prefix="[::1]:5000")),
        # the last keyword decides
        ("/v2/a/manifests/b/manifests/latest", Route(Endpoint.MANIFEST, "a/manifests/b", LATEST)),
        ("/v2/manifests/manifests/manifests", Route(Endpoint.MANIFEST, "manifests", Tag("manifests"))),
        (f"/v2/v2/v2/blobs/{DIGEST}", Route(Endpoint.BLOB, "v2/v2", DIGEST)),
        ("/v2/tags/list/tags/list", Route(Endpoint.TAGS, "tags/list")),
        ("/v2/a/tags/manifests/list", Route(Endpoint.MANIFEST, "a/tags", Tag("list"))),
        ("/v2/a/blobs/uploads/manifests/latest", Route(Endpoint.MANIFEST, "a/blobs/uploads", LATEST)),
        (f"/v2/a/blobs/uploads/blobs/{DIGEST}", Route(Endpoint.BLOB, "a/blobs/uploads", DIGEST)),
        ("/v2/a/blobs/uploads/blobs/uploads/1", Route(Endpoint.UPLOAD, "a/blobs/uploads", upload="1")),
        ("/v2/blobs/blobs/uploads/", Route(Endpoint.UPLOADS, "blobs")),
        ("/v2/a/manifests/uploads", Route(Endpoint.MANIFEST, "a", Tag("uploads"))),
        # tags as they were
        (
            "/v2/@2026-08-01/docker.io/a/manifests/latest",
            Route(Endpoint.MANIFEST, "docker.io/a", LATEST, as_of="2026-08-01"),
        ),
        ("/v2/@2026-08-01T14:30:00Z/a/tags/list", Route(Endpoint.TAGS, "a", as_of="2026-08-01T14:30:00Z")),
        # escapes, once
        (f"/v2/a/blobs/{DIGEST.replace(':', '%3a')}", Route(Endpoint.BLOB, "a", DIGEST)),
        ("/v2/a%2Fb/manifests/v%31", Route(Endpoint.MANIFEST, "a/b", Tag("v1"))),
        ("/token", Route(Endpoint.TOKEN)),
        ("/ghcr.io/token", Route(Endpoint.TOKEN, prefix="ghcr.io")),
        ("/[fd00::1]:5000/token", Route(Endpoint.TOKEN, prefix="[fd00::1]:5000")),
    ],
)
def test_path(path: str, route: Route) -> None:
    assert parse(path) == route


@pytest.mark.parametrize("path", ["/v2/a/manifests/latest", f"/v2/a/manifests/{DIGEST}"])
def test_reference_carries_its_mutability(path: str) -> None:
    reference = parse(path).reference
    assert type(reference) is (Digest if ":" in path else Tag)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", PathUnknown),
        ("/", PathUnknown),
        ("*", PathUnknown),
        ("v2/", PathUnknown),
        ("/v1/", PathUnknown),
        ("/V2/", PathUnknown),
        ("/v20", PathUnknown),
        ("//v2/", PathUnknown),
        ("/v2//", PathUnknown),
        ("/v2/alpine", PathUnknown),
        ("/v2/_catalog/", PathUnknown),
        ("/v2/Docker.io/", PathUnknown),
        ("/v2/manifests/latest", PathUnknown),
        ("/v2//manifests/latest", PathUnknown),
        ("/v2/blobs/uploads/", PathUnknown),
        ("/v2/tags/list", PathUnknown),
        ("/v2/a/tags/other", PathUnknown),
        ("/v2/a/tags/list/", PathUnknown),
        ("/v2/a/manifests/latest/", PathUnknown),
        ("/v2/a/uploads/1", PathUnknown),
        ("/v2/a/blobs/uploads/..", PathUnknown),
        ("/v2/a/blobs/uploads/%00", PathUnknown),
        ("/v2/a/blobs/uploads/a%20b", PathUnknown),
        (f"/v2/a/blobs/uploads/&digest={DIGEST}", PathUnknown),
        ("/v2/a/blobs/uploads/1&n=1", PathUnknown),
        ("/v2/a/blobs/uploads/1&digest=", DigestInvalid),
        ("/two/components/v2/", PathUnknown),
        ("/../v2/", PathUnknown),
        ("/edge/v2/docker.io/", PathUnknown),
        ("/edge/v2/%0a", PathUnknown),
        ("/Docker.io/v2/a/manifests/latest", PathUnknown),
        ("/v2/%ff/manifests/latest", PathUnknown),
        ("/v2/a//b/manifests/latest", NameInvalid),
        ("/v2/../manifests/latest", NameInvalid),
        ("/v2/a/%2e%2e/manifests/latest", NameInvalid),
        ("/v2/a%0a/manifests/latest", NameInvalid),
        ("/v2/a%252fb/manifests/latest", NameInvalid),
        ("/v2/my.example:5000/manifests/latest", NameInvalid),
        ("/v2/my.example:/a/manifests/latest", NameInvalid),
        ("/v2/my.example:123456/a/manifests/latest", NameInvalid),
        ("/v2/a/b:80/c/manifests/latest", NameInvalid),
        ("/v2/[::g]:80/a/manifests/latest", NameInvalid),
        ("/v2/[::1]:80/manifests/latest", NameInvalid),
        ("/v2/[::1]:123456/a/manifests/latest", NameInvalid),
        ("/v2/a/[::1]/b/manifests/latest", NameInvalid),
        (f"/v2/{'a' * 256}/manifests/latest", NameInvalid),
        ("/v2/a/manifests/", TagInvalid),
        ("/v2/a/manifests/.INVALID_MANIFEST_NAME", TagInvalid),
        (f"/v2/a/manifests/{'t' * 129}", TagInvalid),
        ("/v2/a/manifests/latest%0a", TagInvalid),
        ("/v2/a/manifests/sha256:totallywrong", DigestInvalid),
        (f"/v2/a/manifests/{str(DIGEST).upper()}", DigestInvalid),
        ("/v2/a/blobs/", DigestInvalid),
        ("/v2/a/blobs/latest", DigestInvalid),
        ("/v2/a/referrers/latest", DigestInvalid),
    ],
)
def test_refused(path: str, error: type[RegistryError]) -> None:
    with pytest.raises(error) as raised:
        parse(path)
    assert type(raised.value) is error


def test_longest_name() -> None:
    name = f"my.example:5000/{'a' * 239}"
    assert len(name) == 255
    assert parse(f"/v2/{name}/tags/list").name == name


def test_refusals_are_short_and_printable() -> None:
    with pytest.raises(RegistryError) as raised:
        parse("/%0a" + "x" * 9000)
    assert len(str(raised.value)) < 250
    assert str(raised.value).isprintable()


words = st.sampled_from(
    [
        "a",
        "0",
        "a.b",
        "a__b",
        "a--b",
        "v2",
        "manifests",
        "blobs",
        "uploads",
        "tags",
        "list",
        "referrers",
        "localhost",
    ]
)
names = st.lists(words, min_size=1, max_size=6).map("/".join)
hosts = st.sampled_from(["", "docker.io/", "my.example:5000/", "localhost:1/", "edge/"])
prefixes = st.sampled_from(["", "docker.io", "my.example:5000", "edge", "manifests"])
digests = st.sampled_from([DIGEST, LONG])
letters = string.ascii_letters + string.digits + "_"
tags = st.builds(str.__add__, st.sampled_from(letters), st.text(letters + ".-", max_size=127))
uploads = st.builds(str.__add__, st.sampled_from(letters + "-"), st.text(letters + ".~=-", max_size=40))


@st.composite
def routes(draw: st.DrawFn) -> Route:
    kind = draw(st.sampled_from(Endpoint))
    prefix = draw(prefixes)
    if kind in (Endpoint.BASE, Endpoint.CATALOG, Endpoint.TOKEN):
        return Route(kind, prefix=prefix)
    name = draw(hosts) + draw(names)
    if kind is Endpoint.MANIFEST:
        return Route(kind, name, draw(st.one_of(digests, tags.map(Tag))), prefix)
    if kind in (Endpoint.BLOB, Endpoint.REFERRERS):
        return Route(kind, name, draw(digests), prefix)
    return Route(kind, name, None, prefix, draw(uploads) if kind is Endpoint.UPLOAD else "")


@given(routes())
def test_build_and_parse_are_inverse(route: Route) -> None:
    assert parse(build(route)) == route


pieces = st.sampled_from(
    [
        "/",
        "//",
        "v2",
        "/v2/",
        "/v2/@2026-08-01/",
        "%2f",
        "%25",
        "%ff",
        "%00",
        "..",
        ":",
        "\n",
        "a",
        "A",
        "docker.io",
        "5000",
        "[::1]",
        "_catalog",
    ]
)
keywords = st.sampled_from(
    ["manifests", "blobs", "uploads", "/blobs/uploads/", "&digest=", "tags/list", "referrers", DIGEST]
)
paths = st.one_of(
    st.text(),
    st.text().map("/v2/".__add__),
    st.lists(st.one_of(pieces, keywords), max_size=12).map("".join),
    st.lists(st.one_of(pieces, keywords, words), max_size=8).map(lambda each: "/v2/" + "/".join(each)),
)


@given(paths)
def test_any_text_is_a_route_or_one_of_four_refusals(path: str) -> None:
    try:
        route = parse(path)
    except (PathUnknown, NameInvalid, DigestInvalid, TagInvalid):
        return
    assert parse(build(route)) == route


@pytest.mark.parametrize(
    ("text", "limit"), [(None, None), ("0", 0), ("1", 1), ("007", 7), ("9" * 19, 10**19 - 1)]
)
def test_limit(text: str | None, limit: int | None) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.5", " 1", "1_0", "ten", "٣", "²", "9" * 5000])
def test_limit_refused(text: str) -> None:
    with pytest.raises(PaginationNumberInvalid):
        parse_limit(text)


def test_next_page_keeps_the_clients_address() -> None:
    route = Route(Endpoint.TAGS, "library/alpine", prefix=HUB)
    link = build_next(route, {"n": 2, "last": "a/b&c", "ns": "my.example:5000"})
    target = "/docker.io/v2/library/alpine/tags/list?n=2&last=a%2Fb%26c&ns=my.example%3A5000"
    assert link == f'<{target}>; rel="next"'
