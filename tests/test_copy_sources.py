"""What people write who copy, and what it means."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from proxy.transfer.blob_copy import RetryPolicy
from proxy.transfer.copy_sources import CopyItem, CopySource, check, items, parse_source
from storage.errors import NameUnknown, Unavailable
from storage.oci import Digest
from storage.registry import Registry

DIGEST = Digest("sha256:" + "0" * 64)


@pytest.mark.parametrize(
    ("text", "place", "url"),
    [
        ("alpine", CopySource("docker.io", "library/alpine"), "https://registry-1.docker.io"),
        ("alpine:3", CopySource("docker.io", "library/alpine", "3"), "https://registry-1.docker.io"),
        (
            "docker.io/alpine:3",
            CopySource("docker.io", "library/alpine", "3"),
            "https://registry-1.docker.io",
        ),
        ("index.docker.io/a/b", CopySource("docker.io", "a/b"), "https://registry-1.docker.io"),
        ("team/app:*", CopySource("docker.io", "team/app", "*"), "https://registry-1.docker.io"),
        ("ghcr.io/-owner/app:1", None, ""),
        ("GHCR.io/owner/app:1", CopySource("ghcr.io", "owner/app", "1"), "https://ghcr.io"),
        ("docker://ghcr.io/owner/app:1", CopySource("ghcr.io", "owner/app", "1"), "https://ghcr.io"),
        (f"ghcr.io/a@{DIGEST}", CopySource("ghcr.io", "a", None, DIGEST), "https://ghcr.io"),
        (f"ghcr.io/a:1@{DIGEST}", CopySource("ghcr.io", "a", "1", DIGEST), "https://ghcr.io"),
        ("r.example:5000/a", CopySource("r.example:5000", "a"), "https://r.example:5000"),
        ("http://r.example/a", CopySource("r.example", "a", plain_http=True), "http://r.example"),
        ("localhost/a", CopySource("localhost", "a", plain_http=True), "http://localhost"),
        ("localhost:5000/a", CopySource("localhost:5000", "a", plain_http=True), "http://localhost:5000"),
        (
            "127.0.0.1:5000/a:1",
            CopySource("127.0.0.1:5000", "a", "1", plain_http=True),
            "http://127.0.0.1:5000",
        ),
        ("[::1]:5000/a", CopySource("[::1]:5000", "a", plain_http=True), "http://[::1]:5000"),
        ("https://localhost:5000/a", CopySource("localhost:5000", "a"), "https://localhost:5000"),
        ("localhost.example/a", CopySource("localhost.example", "a"), "https://localhost.example"),
        ("127.r.example/a", CopySource("127.r.example", "a"), "https://127.r.example"),
        ("r.example/", CopySource("r.example", "", below=True), "https://r.example"),
        ("r.example/local/", CopySource("r.example", "local", below=True), "https://r.example"),
        ("r.example/team/*:v1.*", CopySource("r.example", "team/*", "v1.*"), "https://r.example"),
        ("r.example/*", CopySource("r.example", "*"), "https://r.example"),
        ("ftp://r.example/a", None, ""),
        ("r.example/a b", None, ""),
        ("r.example/a:b c", None, ""),
        ("r.example/a@sha256:1", None, ""),
        ("r.example/a/:1", None, ""),
        ("user@r.example/a", None, ""),
        ("r.example:x/a", None, ""),
        ("", None, ""),
        ("http:///a", None, ""),
    ],
)
def test_copy_sources(text: str, place: CopySource | None, url: str) -> None:
    if place is None:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            parse_source(text)
        return
    assert parse_source(text) == place
    assert place.url == url


def test_plain_http_may_be_asked_for() -> None:
    assert parse_source("r.example/a", plain_http=True).url == "http://r.example"
    assert parse_source("https://r.example/a", plain_http=True).url == "https://r.example"


@pytest.mark.parametrize(
    ("sources", "destination", "all_tags", "why"),
    [
        (["r.example/a"], "s.example/b:*", False, "the destination must not be a glob"),
        (["r.example/a"], "s.example/*", False, "the destination must not be a glob"),
        (["r.example/a"], f"s.example/b@{DIGEST}", False, "the destination must not have a digest"),
        (["r.example/team/"], "s.example/", False, "is not a repository; r.example/team/* means all"),
        (["r.example/a:*"], "s.example/b:1", False, "tag 1 cannot be all of the tags of a"),
        (["r.example/a"], "s.example/b:1", True, "tag 1 cannot be all of the tags of a"),
        ([f"r.example/a@{DIGEST}"], "s.example/b", True, "is one manifest, not all tags"),
        (["r.example/a", "r.example/b"], "s.example/b", False, "a destination that ends with /"),
        (["r.example/team/*"], "s.example/b", False, "a destination that ends with /"),
        (["r.example/a"], "s.example/b", False, None),
        (["r.example/a", "q.example/b:*"], "s.example/b/", False, None),
        (["r.example/a:1.*"], "s.example/b", False, None),
    ],
)
def test_what_goes_where_must_be_told(
    sources: Sequence[str], destination: str, all_tags: bool, why: str | None
) -> None:
    given = [parse_source(each) for each in sources], parse_source(destination), all_tags
    if why is None:
        check(*given)
        return
    with pytest.raises(ValueError, match=re.escape(why)):
        check(*given)


class Listing(Registry):
    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        return ["a", "team/app", "team/base"]

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        found = {"team/app": ["1.0", "1.1", "2.0", "sha256-" + "0" * 64, f"sha256-{'0' * 64}.sig"]}
        return found.get(repository, [])


async def at_once(seconds: float) -> None:
    pass


class Silent:
    def moved(self, digest: Digest, done: int, whole: int) -> None: ...

    def ended(self, digest: Digest) -> None: ...

    def note(self, text: str) -> None: ...


RETRIES = RetryPolicy(Silent(), at_once)


async def meant(text: str, destination: str, **options: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    place, target = parse_source(text), parse_source(destination)
    found: list[CopyItem] = [each async for each in items(place, Listing(), target, RETRIES, **options)]
    return [(each.source, each.target, each.tags) for each in found]


async def test_what_is_meant() -> None:
    assert await meant("r.example/a", "s.example/b") == [("r.example/a:latest", "b", ("latest",))]
    assert await meant("r.example/a:1", "s.example/b:2") == [("r.example/a:1", "b", ("2",))]
    assert await meant("r.example/a:1", "s.example/b/") == [("r.example/a:1", "b/a", ("1",))]
    assert await meant("r.example/a:1", "s.example/") == [("r.example/a:1", "a", ("1",))]
    assert await meant(f"r.example/a@{DIGEST}", "s.example/b") == [(f"r.example/a@{DIGEST}", "b", ())]
    assert await meant(f"r.example/a:1@{DIGEST}", "s.example/b") == [(f"r.example/a@{DIGEST}", "b", ("1",))]
    assert await meant(f"r.example/a@{DIGEST}", "s.example/b:2") == [(f"r.example/a@{DIGEST}", "b", ("2",))]
    app = [f"r.example/team/app:{tag}" for tag in ("1.0", "1.1", "2.0", f"sha256-{'0' * 64}.sig")]
    assert [each[0] for each in await meant("r.example/team/app:1.*", "s.example/b")] == app[:2]
    # What lists referrers comes with what it lists.
    assert [each[0] for each in await meant("r.example/team/app", "s.example/b", all_tags=True)] == app
    found = await meant("r.example/team/app:*", "s.example/b", referrers=False)
    assert len(found) == 5
    assert await meant("r.example/team/*:2.*", "s.example/x/") == [(app[2], "x/app", ("2.0",))]
    assert await meant("r.example/*:2.*", "s.example/x/") == [(app[2], "x/team/app", ("2.0",))]
    assert await meant("r.example/[at]*:1.1", "s.example/x/") == [
        ("r.example/a:1.1", "x/a", ("1.1",)),
        ("r.example/team/app:1.1", "x/team/app", ("1.1",)),
        ("r.example/team/base:1.1", "x/team/base", ("1.1",)),
    ]


@pytest.mark.parametrize("text", ["r.example/none/*", "r.example/team/app:9.*", "r.example/a:*"])
async def test_a_glob_that_matches_nothing(text: str) -> None:
    with pytest.raises(NameUnknown, match="matches"):
        await meant(text, "s.example/")


class Restarting(Listing):
    """It answers every second request."""

    asked = 0

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        self._answer()
        return await super().repositories()

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        self._answer()
        return await super().tags(repository)

    def _answer(self) -> None:
        self.asked += 1
        if self.asked % 2:
            raise Unavailable("it restarts")


async def test_a_source_that_restarts_is_asked_again() -> None:
    place, target = parse_source("r.example/team/*:2.*"), parse_source("s.example/")
    found = [each.source async for each in items(place, Restarting(), target, RETRIES)]
    assert found == ["r.example/team/app:2.0"]
