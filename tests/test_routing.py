"""Which namespace a request means, what is never guessed, and that where every method is passed on."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.namespaces.routing import Member, Namespaces
from storage.conditions import Conditions
from storage.errors import BlobUnknown, NameInvalid, NameUnknown, OriginFailed, RegistryError, Unsupported
from storage.oci import OCI_MANIFEST, Digest, Manifest, Span, Tag, parse_name
from storage.registry import Registry

DIGEST = Digest.of(b"content")
HUB_ALIASES = ("index.docker.io", "registry-1.docker.io", "hub")
MEMBERS = (
    Member(Registry(), "docker.io", HUB_ALIASES, ("hub.mirror.test", "mirror.test:7000"), library=True),
    Member(Registry(), "own:5000"),
    Member(Registry(), "own_5000"),
    Member(Registry(), "ghcr.io", ("old:5000",)),
    Member(Registry(), "my.example:5000"),
    Member(Registry(), "lan:5000"),
    Member(Registry(), "localhost"),
    Member(Registry(), "edge", hosts=("[::1]:5000",)),
    Member(Registry(), "[fd00::2]:5000", ("[fd00::3]",)),
)
NAMESPACES = Namespaces(MEMBERS, default="docker.io")
STRICT = Namespaces(MEMBERS)


@pytest.mark.parametrize(
    ("name", "said", "full"),
    [
        # the default, and library/
        ("alpine", {}, "docker.io/library/alpine"),
        ("library/alpine", {}, "docker.io/library/alpine"),
        ("user/app", {}, "docker.io/user/app"),
        ("v2/app", {}, "docker.io/v2/app"),
        ("name.with.dots", {}, "docker.io/library/name.with.dots"),
        ("docker.io", {}, "docker.io/library/docker.io"),
        ("alpine", {"host": "mirror.test:5000"}, "docker.io/library/alpine"),
        ("alpine", {"host": "[::2]:5000"}, "docker.io/library/alpine"),
        ("alpine", {"host": ""}, "docker.io/library/alpine"),
        # IPv6 addresses, however they are written
        ("app", {"ns": "[fd00::2]:5000"}, "[fd00::2]:5000/app"),
        ("app", {"ns": "[FD00:0::2]:5000"}, "[fd00::2]:5000/app"),
        ("app", {"ns": "[fd00::3]:443"}, "[fd00::2]:5000/app"),
        ("app", {"prefix": "[fd00::2]:5000"}, "[fd00::2]:5000/app"),
        ("app", {"host": "[fd00:0:0::2]:5000"}, "[fd00::2]:5000/app"),
        ("app", {"host": "[0::1]:5000"}, "edge/app"),
        ("[fd00::2]:5000/app", {}, "[fd00::2]:5000/app"),
        ("[fd00::3]/a/app", {}, "[fd00::2]:5000/a/app"),
        ("[fd00::2]:5000/app", {"ns": "[fd00::2]:5000"}, "[fd00::2]:5000/app"),
        # ns
        ("alpine", {"ns": "docker.io"}, "docker.io/library/alpine"),
        ("alpine", {"ns": "Registry-1.Docker.IO"}, "docker.io/library/alpine"),
        ("alpine", {"ns": "docker.io:443"}, "docker.io/library/alpine"),
        ("alpine", {"ns": "docker.io:80"}, "docker.io/library/alpine"),
        ("app", {"ns": "my.example:5000"}, "my.example:5000/app"),
        ("app", {"ns": "ghcr.io"}, "ghcr.io/app"),
        ("app", {"ns": "localhost"}, "localhost/app"),
        ("ghcr.io/app", {"ns": "ghcr.io"}, "ghcr.io/app"),
        ("index.docker.io/alpine", {"ns": "docker.io"}, "docker.io/library/alpine"),
        ("my.example:5000/app", {"ns": "my.example:5000"}, "my.example:5000/app"),
        ("docker.io/v2/library/alpine", {"ns": "docker.io"}, "docker.io/library/alpine"),
        ("v2/app", {"ns": "ghcr.io"}, "ghcr.io/v2/app"),
        ("ghcr.io", {"ns": "ghcr.io"}, "ghcr.io/ghcr.io"),
        ("ghcr.io/app", {"ns": "docker.io"}, "docker.io/ghcr.io/app"),
        ("hub/app", {"ns": "docker.io"}, "docker.io/hub/app"),
        ("edge/app", {"ns": "docker.io"}, "docker.io/edge/app"),
        # Host
        ("app", {"host": "ghcr.io"}, "ghcr.io/app"),
        ("app", {"host": "GHCR.io:8443"}, "ghcr.io/app"),
        ("alpine", {"host": "hub.mirror.test"}, "docker.io/library/alpine"),
        ("alpine", {"host": "hub.mirror.test:5000"}, "docker.io/library/alpine"),
        ("alpine", {"host": "mirror.test:7000"}, "docker.io/library/alpine"),
        ("app", {"host": "[::1]:5000"}, "edge/app"),
        ("app", {"host": "my.example:5000"}, "my.example:5000/app"),
        ("ghcr.io/app", {"host": "ghcr.io"}, "ghcr.io/app"),
        ("edge/app", {"host": "ghcr.io"}, "ghcr.io/edge/app"),
        ("edge/app", {"host": "GHCR.IO:443"}, "ghcr.io/edge/app"),
        ("hub/app", {"host": "registry-1.docker.io:5000"}, "docker.io/hub/app"),
        # Host, by hosts: the first component comes first
        ("edge/app", {"host": "[::1]:5000"}, "edge/app"),
        ("edge/edge/app", {"host": "[::1]:5000"}, "edge/edge/app"),
        ("edge", {"host": "[::1]:5000"}, "edge/edge"),
        ("ghcr.io/app", {"host": "[::1]:5000"}, "ghcr.io/app"),
        ("team/app", {"host": "[::1]:5000"}, "edge/team/app"),
        ("foo.example/app", {"host": "[::1]:5000"}, "edge/foo.example/app"),
        ("edge/app", {"host": "hub.mirror.test"}, "edge/app"),
        ("docker.io/v2/library/alpine", {"host": "hub.mirror.test"}, "docker.io/library/alpine"),
        ("index.docker.io/alpine", {"host": "mirror.test:7000"}, "docker.io/library/alpine"),
        # the first component
        ("ghcr.io/user/app", {}, "ghcr.io/user/app"),
        ("docker.io/alpine", {}, "docker.io/library/alpine"),
        ("registry-1.docker.io/library/alpine", {}, "docker.io/library/alpine"),
        ("docker.io:443/alpine", {}, "docker.io/library/alpine"),
        ("my.example:5000/app", {}, "my.example:5000/app"),
        ("edge/app", {}, "edge/app"),
        ("hub/library/alpine", {}, "docker.io/library/alpine"),
        ("docker.io/v2/library/alpine", {}, "docker.io/library/alpine"),
        ("hub/v2/library/alpine", {}, "docker.io/library/alpine"),
        ("docker.io/v2", {}, "docker.io/library/v2"),
        # the first component twice, as Testcontainers makes of a prefix and a full name
        ("docker.io/docker.io/library/alpine", {}, "docker.io/library/alpine"),
        ("hub/docker.io/alpine", {}, "docker.io/library/alpine"),
        ("docker.io/index.docker.io/alpine", {"host": "mirror.test:7000"}, "docker.io/library/alpine"),
        ("docker.io/docker.io", {}, "docker.io/library/docker.io"),
        ("docker.io/ghcr.io/app", {}, "docker.io/ghcr.io/app"),
        ("ghcr.io/docker.io/app", {}, "ghcr.io/docker.io/app"),
        ("docker.io/hub/app", {}, "docker.io/hub/app"),
        ("edge/edge/app", {}, "edge/edge/app"),
        ("edge/v2/app", {}, "edge/v2/app"),
        # the first component behind v2, as kaniko has to write it
        ("v2/ghcr.io/user/app", {}, "ghcr.io/user/app"),
        ("v2/docker.io/library/alpine", {}, "docker.io/library/alpine"),
        ("v2/docker.io/alpine", {"host": "hub.mirror.test"}, "docker.io/library/alpine"),
        ("v2/ghcr.io/app", {"host": "[::1]:5000"}, "ghcr.io/app"),
        ("v2/ghcr.io", {}, "docker.io/v2/ghcr.io"),
        ("v2/edge/app", {}, "docker.io/v2/edge/app"),
        ("v2/ghcr.io/app", {"ns": "ghcr.io"}, "ghcr.io/v2/ghcr.io/app"),
        ("v2/ghcr.io/app", {"host": "ghcr.io"}, "ghcr.io/v2/ghcr.io/app"),
        ("v2/ghcr.io/app", {"prefix": "ghcr.io"}, "ghcr.io/app"),
        # the prefix
        ("app", {"prefix": "ghcr.io"}, "ghcr.io/app"),
        ("app", {"prefix": "edge"}, "edge/app"),
        ("alpine", {"prefix": "index.docker.io"}, "docker.io/library/alpine"),
        ("app", {"prefix": "my.example:5000"}, "my.example:5000/app"),
        ("ghcr.io/app", {"prefix": "ghcr.io"}, "ghcr.io/app"),
        ("v2/app", {"prefix": "ghcr.io"}, "ghcr.io/v2/app"),
        # a port behind _ in place of the colon
        ("my.example_5000/app", {}, "my.example:5000/app"),
        ("My.Example_5000/app", {}, "my.example:5000/app"),
        ("v2/my.example_5000/app", {}, "my.example:5000/app"),
        ("app", {"prefix": "my.example_5000"}, "my.example:5000/app"),
        ("app", {"ns": "my.example_5000"}, "my.example:5000/app"),
        ("my.example_5000/app", {"ns": "my.example:5000"}, "my.example:5000/app"),
        ("my.example_5000/app", {"host": "my.example:5000"}, "my.example:5000/app"),
        ("lan_5000/app", {}, "lan:5000/app"),
        ("lan_5000/app", {"ns": "lan:5000"}, "lan:5000/app"),
        ("lan_5000/app", {"ns": "ghcr.io"}, "ghcr.io/lan_5000/app"),
        ("lan_5000/app", {"prefix": "lan:5000"}, "lan:5000/app"),
        ("lan_5000/lan_5000/app", {"prefix": "lan_5000"}, "lan:5000/lan_5000/app"),
        ("lan_5000", {}, "docker.io/library/lan_5000"),
        ("lan_5001/app", {}, "docker.io/lan_5001/app"),
        ("own_5000/app", {}, "own_5000/app"),
        ("own:5000/app", {}, "own:5000/app"),
        ("app", {"prefix": "old_5000"}, "ghcr.io/app"),
        ("foo.example/app", {"prefix": "ghcr.io"}, "ghcr.io/foo.example/app"),
        ("edge/app", {"prefix": "docker.io"}, "docker.io/edge/app"),
        # who wins
        ("a", {"ns": "ghcr.io", "host": "docker.io", "prefix": "edge"}, "ghcr.io/a"),
        ("localhost/a", {"ns": "ghcr.io"}, "ghcr.io/localhost/a"),
        ("a", {"host": "ghcr.io", "prefix": "edge"}, "ghcr.io/a"),
        ("hub/a", {"host": "[::1]:5000", "prefix": "ghcr.io"}, "edge/hub/a"),
        ("docker.io/a", {"host": "ghcr.io"}, "ghcr.io/docker.io/a"),
        ("ghcr.io/a", {"prefix": "docker.io"}, "ghcr.io/a"),
        ("ghcr.io/a", {"prefix": "nowhere"}, "ghcr.io/a"),
    ],
)
def test_qualify(name: str, said: dict[str, str], full: str) -> None:
    assert NAMESPACES.qualify(name, **said) == full


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("alpine", {"ns": ""}),
        ("alpine", {"ns": "nowhere"}),
        ("alpine", {"ns": "docker.io:5000"}),
        ("alpine", {"ns": "docker.io:80:443"}),
        ("alpine", {"ns": "my.example"}),
        ("alpine", {"ns": "169.254.169.254"}),
        ("alpine", {"ns": "[::1]"}),
        ("alpine", {"ns": "[::1]:5000"}),
        ("alpine", {"ns": "::1"}),
        ("alpine", {"ns": ":443"}),
        ("alpine", {"ns": "../docker.io"}),
        ("alpine", {"ns": "docker.io/library"}),
        ("alpine", {"ns": "docker.io\x00"}),
        ("alpine", {"ns": "https://docker.io"}),
        ("docker.io/alpine", {"ns": "nowhere"}),
        ("alpine", {"ns": "nowhere", "host": "docker.io", "prefix": "docker.io"}),
        ("foo.example/app", {}),
        ("foo:5000/app", {}),
        ("docker.io:5000/app", {}),
        ("127.0.0.1/app", {}),
        ("alpine", {"prefix": "nowhere"}),
        ("edge/app", {"prefix": "nowhere"}),
    ],
)
def test_unknown_is_never_the_default(name: str, said: dict[str, str]) -> None:
    with pytest.raises(NameUnknown, match="add it under namespaces: in the configuration"):
        NAMESPACES.qualify(name, **said)


def test_localhost_is_a_host() -> None:
    only_hub = Namespaces([Member(Registry(), "docker.io")], default="docker.io")
    with pytest.raises(NameUnknown, match="'localhost' is not a configured namespace"):
        only_hub.qualify("localhost/app")
    assert only_hub.qualify("localhost") == "docker.io/localhost"


def test_without_a_default() -> None:
    assert STRICT.qualify("edge/app") == "edge/app"
    with pytest.raises(NameUnknown, match=r"'alpine' names no namespace .* set default_namespace:"):
        STRICT.qualify("alpine")


@pytest.mark.parametrize(
    "name",
    ["", "/", "A", "a//b", "edge/", "edge//a", "edge/../a", "edge/A", "edge/a:1/b", "my.example:5000/A"],
)
def test_what_remains_must_be_a_repository(name: str) -> None:
    with pytest.raises(NameInvalid):
        NAMESPACES.qualify(name)


def test_the_full_name_is_limited() -> None:
    assert len(NAMESPACES.qualify("a" * 237)) == 255
    with pytest.raises(NameInvalid, match="255"):
        NAMESPACES.qualify("a" * 238)


known = st.sampled_from(
    ["lan_5000", "docker.io", "hub", "edge", "my.example:5000", "localhost", "DOCKER.IO:443"]
)
heads = st.one_of(
    known, st.text(), st.ip_addresses().map(str), st.sampled_from(["[::1]", "v2", "a:b:c", ".."])
)
any_names = st.lists(heads, max_size=4).map("/".join)


@given(any_names, st.none() | heads, st.none() | heads, heads, st.sampled_from([NAMESPACES, STRICT]))
def test_anything_is_a_full_name_or_refused(
    name: str, ns: str | None, host: str | None, prefix: str, namespaces: Namespaces
) -> None:
    try:
        full = namespaces.qualify(name, ns=ns, host=host, prefix=prefix)
    except RegistryError as error:
        assert isinstance(error, (NameUnknown, NameInvalid))
        return
    namespace, _, repository = full.partition("/")
    assert namespace in {member.name for member in MEMBERS}
    assert parse_name(repository) and len(full) <= 255


@given(st.sampled_from(["\U000e0001", "x", "\n", "'", "é"]))
def test_refusals_echo_little(letter: str) -> None:
    for said in ({"ns": letter * 5000}, {"prefix": letter * 5000}, {}):
        for name in (letter * 5000, f"a/{letter * 5000}", f"{letter * 5000}.b/c"):
            with pytest.raises(RegistryError) as raised:
                NAMESPACES.qualify(name, **said)
            assert str(raised.value).count(repr(letter)[1:-1]) <= 100
            assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "members",
    [
        (Member(Registry(), "a"), Member(Registry(), "a")),
        (Member(Registry(), "a", aliases=("c",)), Member(Registry(), "b", aliases=("c",))),
        (Member(Registry(), "a"), Member(Registry(), "b", aliases=("a:443",))),
        (Member(Registry(), "a", hosts=("h",)), Member(Registry(), "b", hosts=("H",))),
        (Member(Registry(), "a"), Member(Registry(), "b", hosts=("a",))),
    ],
)
def test_two_namespaces_claim_one_name(members: tuple[Member, ...]) -> None:
    with pytest.raises(ValueError, match=r"claimed by the namespaces 'a' and '[ab]'"):
        Namespaces(members)


def test_default_must_be_a_member() -> None:
    with pytest.raises(ValueError, match=r"'nowhere' is not configured"):
        Namespaces(MEMBERS, default="nowhere")


# Delegation


class Recorder(Registry):
    """Answers every call with an object of its own, and remembers the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[object] = []

    def __getattribute__(self, method: str) -> Any:
        if method not in (*METHODS, "close", "repositories"):
            return super().__getattribute__(method)

        async def record(*arguments: object) -> object:
            self.calls.append((method, *arguments))
            self.answers.append(object())
            return self.answers[-1]

        return record


METHODS = {name for name, _ in inspect.getmembers(Registry, inspect.iscoroutinefunction)} - {
    "close",
    "repositories",
}
MANIFEST = Manifest.of(OCI_MANIFEST, b"{}")
STALE = Conditions(frozenset(("other",)))
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "get_blob": (DIGEST, Span(1, 2)),
    "locate_blob": (DIGEST,),
    "resolve_blob": (DIGEST,),
    "get_manifest": (Tag("latest"),),
    "resolve_manifest": (DIGEST,),
    "tags": ("a", 3),
    "referrers": (DIGEST, "application/x", "", None),
    "start_upload": (7, "sha512"),
    "resume_upload": ("id",),
    "push_manifest": (Tag("latest"), MANIFEST, (Tag("v1"),), STALE),
    "delete_blob": (DIGEST, STALE),
    "delete_manifest": (Tag("latest"), STALE),
}


def test_every_method_of_a_registry_is_here() -> None:
    assert {*ARGUMENTS, "mount_blob"} == METHODS
    assert vars(Namespaces).keys() >= {*METHODS, "close", "repositories"}


@pytest.mark.parametrize("method", sorted(ARGUMENTS))
async def test_delegation(method: str) -> None:
    hub, port = Recorder(), Recorder()
    namespaces = Namespaces([Member(hub, "docker.io"), Member(port, "my.example:5000")])
    call: Callable[..., Awaitable[object]] = getattr(namespaces, method)

    answer = await call("docker.io/library/alpine", *ARGUMENTS[method])
    assert hub.calls == [(method, "library/alpine", *ARGUMENTS[method])]
    if not method.startswith("delete_"):
        assert answer is hub.answers[0]
    await call("my.example:5000/app", *ARGUMENTS[method])
    assert port.calls == [(method, "app", *ARGUMENTS[method])]
    # Only full names by their own namespace: aliases ended at qualify().
    with pytest.raises(NameUnknown):
        await call("index.docker.io/library/alpine", *ARGUMENTS[method])
    assert len(hub.calls) == 1


async def test_mount_stays_within_a_namespace() -> None:
    hub, ghcr = Recorder(), Recorder()
    namespaces = Namespaces([Member(hub, "docker.io"), Member(ghcr, "ghcr.io")])
    answer = await namespaces.mount_blob("docker.io/a/b", DIGEST, "docker.io/c/d")
    assert hub.calls[0][:4] == ("mount_blob", "a/b", DIGEST, "c/d")
    assert answer is hub.answers[0]
    with pytest.raises(BlobUnknown, match=r"ghcr\.io"):
        await namespaces.mount_blob("docker.io/a/b", DIGEST, "ghcr.io/c/d")
    with pytest.raises(NameUnknown):
        await namespaces.mount_blob("docker.io/a/b", DIGEST, "nowhere/c/d")
    assert len(hub.calls) == 1 and not ghcr.calls


async def test_a_mount_from_anywhere_tells_what_is_visible_by_full_names() -> None:
    hub = Recorder()
    asked: list[str] = []
    namespaces = Namespaces([Member(hub, "docker.io")])
    await namespaces.mount_blob("docker.io/a/b", DIGEST, visible=lambda name: bool(asked.append(name)))
    ((_, repository, digest, source, visible),) = hub.calls
    assert (repository, digest, source) == ("a/b", DIGEST, None)
    assert not visible("c/d") and asked == ["docker.io/c/d"]


class Listing(Registry):
    def __init__(self, *names: str) -> None:
        self.names = sorted(names)

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        return [name for name in self.names if name > last][:limit]


ALL = ["a-b/x", "a-b/y/z", "a/m", "a/n", "docker.io/library/alpine", "edge/app", "edge/v2/app"]


def listings() -> Namespaces:
    by_name: dict[str, list[str]] = {}
    for full in ALL:
        namespace, _, repository = full.partition("/")
        by_name.setdefault(namespace, []).append(repository)
    members = [Member(Listing(*names), namespace) for namespace, names in reversed(by_name.items())]
    return Namespaces([*members, Member(Registry(), "ghcr.io"), Member(Listing(), "empty")])


async def test_repositories_are_merged() -> None:
    assert await listings().repositories() == ALL == sorted(ALL)


@pytest.mark.parametrize(
    "last", ["", "0", "a", "a-b/", "a/", "a/m", "a/mm", "b", "edge", "edge/app", "edge/z", "z"]
)
@pytest.mark.parametrize("limit", [None, 0, 1, 3, 100])
async def test_pages_of_repositories(last: str, limit: int | None) -> None:
    assert await listings().repositories(last, limit) == [full for full in ALL if full > last][:limit]


async def test_a_full_page_asks_no_further() -> None:
    later = Recorder()
    namespaces = Namespaces([Member(Listing("x", "y"), "a"), Member(later, "b")])
    assert await namespaces.repositories(limit=2) == ["a/x", "a/y"]
    assert not later.calls


async def test_the_catalog_is_asked_instead() -> None:
    member = Member(Listing("never"), "edge")
    namespaces = Namespaces([member], catalogs=[Listing("docker.io/library/alpine", "edge/app")])
    assert await namespaces.repositories("docker.io/z", 5) == ["edge/app"]


async def test_close_closes_each_once_and_not_the_catalog() -> None:
    shared, other, catalog = Recorder(), Recorder(), Listing()
    members = [Member(shared, "a"), Member(shared, "b"), Member(other, "c")]
    await Namespaces(members, catalogs=[catalog]).close()
    assert shared.calls == other.calls == [("close",)]


async def test_close_goes_on_after_a_failure() -> None:
    class Failing(Registry):
        async def close(self) -> None:
            raise OriginFailed("cannot close")

    class Slow(Registry):
        closed = False

        async def close(self) -> None:
            for _turn in range(10):  # of the loop: the other one has failed by then
                await asyncio.sleep(0)
            self.closed = True

    other = Slow()
    with pytest.raises(OriginFailed, match="cannot close"):
        await Namespaces([Member(Failing(), "a"), Member(other, "b")]).close()
    assert other.closed


async def test_what_a_member_refuses_is_passed_on() -> None:
    with pytest.raises(Unsupported):
        await NAMESPACES.tags("edge/app")
