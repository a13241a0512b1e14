"""Image names are read and written by one grammar."""

from __future__ import annotations

from fnmatch import translate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.hosts import Address, is_host, local_url, parse_server
from proxy.config.image_names import ImageName, parse, split
from storage.names import is_glob, literal_prefix, matches_glob, untranslated, written
from storage.oci import Digest, Tag

DIGEST = Digest("sha256:" + "0" * 64)
WORD = r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8})?"
hosts = st.from_regex(
    r"([a-z0-9]{1,8}\.[a-z]{2,5}|localhost|\[::1\]|10\.0\.0\.1)(:[1-9][0-9]{0,4})?", fullmatch=True
)
paths = st.lists(st.from_regex(WORD, fullmatch=True), min_size=1, max_size=4).map("/".join)
tags = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}", fullmatch=True).map(Tag)
digests = st.binary(max_size=4).flatmap(
    lambda content: st.sampled_from([Digest.of(content), Digest.of(content, "sha512")])
)
# A Docker Hub's name of one component is completed, so it is not written as it was.
images = st.one_of(
    st.tuples(hosts, paths), st.tuples(st.just("docker.io"), paths.filter(lambda path: "/" in path))
)


@pytest.mark.clients
@given(images, tags | digests)
def test_parse_is_the_inverse_of_written(image: tuple[str, str], reference: Tag | Digest) -> None:
    host, repository = image
    text = written(f"{host}/{repository}", reference)
    name = parse(text)
    assert (name.host, name.repository, name.reference) == (host, repository, reference)
    assert isinstance(name.reference, type(reference))
    assert str(name) == text
    assert parse(str(name)) == name


@pytest.mark.clients
@given(images, st.none() | tags, st.none() | digests)
def test_split_is_the_inverse_of_written(
    image: tuple[str, str], tag: Tag | None, digest: Digest | None
) -> None:
    name = text = "/".join(image)
    for each in filter(None, (tag, digest)):
        text = written(text, each)
    assert split(text) == (name, tag, digest)
    assert parse(text) == ImageName(*image, tag, digest)


@pytest.mark.parametrize("text", ["", "a", "a*", r"local\Z", r"(?s:a)\Zb", "(?i)a"])
def test_a_glob_is_untranslated_in_every_python(text: str) -> None:
    """fnmatch of Python 3.14 ends it otherwise."""
    assert untranslated(translate("local/x")) == "local/x"
    assert untranslated(text) == text


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("team/app:1", "docker.io/team/app:1"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("registry-1.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("ghcr.io/team/app", "ghcr.io/team/app:latest"),
        ("GHCR.io/team/app", "ghcr.io/team/app:latest"),
        ("x.example:5000/app:1", "x.example:5000/app:1"),
        ("[::1]:5000/app:1", "[::1]:5000/app:1"),
        ("localhost/app", "localhost/app:latest"),
        (f"ghcr.io/a/b:1@{DIGEST}", f"ghcr.io/a/b@{DIGEST}"),
    ],
)
def test_names_are_completed_as_clients_do(text: str, full: str) -> None:
    assert str(parse(text)) == full


@pytest.mark.parametrize(
    "text",
    ["", ":1", "a:", "a b", "a@b", "a@", "A", "a/*", "a:1.*", "-.x/y", "a//b", "user@r.example/a"],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^'.*' is not an image name: [^\n]+$"):
        parse(text)


def test_globs() -> None:
    assert parse("r.example/team/*:v1.*", globs=True) == ImageName("r.example", "team/*", "v1.*")
    for text in ("a*", "a?", "a[b]"):
        assert is_glob(text)
        assert literal_prefix(text) == "a"
    assert not is_glob("docker.io/library/alpine:3")
    assert literal_prefix("a") == "a"


def test_the_brackets_of_an_address_are_no_wildcard() -> None:
    name = "[::1]:5000/team/app"
    assert not is_glob(name)
    assert matches_glob(name, name)
    assert not matches_glob("::5000/team/app", name)
    assert (is_glob("[::1]:5000/team/*"), literal_prefix("[::1]:5000/team/*")) == (True, "[::1]:5000/team/")
    assert matches_glob(name, "[::1]:5000/team/[ab]pp")
    assert matches_glob("[fd00::2]/app", "[fd00::2]/*")
    assert is_glob("[ab]/app")
    assert matches_glob("a/app", "[ab]/app")


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        (Address("", 5001), "http://127.0.0.1:5001"),
        (Address("0.0.0.0", 5001), "http://127.0.0.1:5001"),
        (Address("::", 5001), "http://[::1]:5001"),
        (Address("fd00::1", 5001), "http://[fd00::1]:5001"),
        (Address("cache.example", 5001), "http://cache.example:5001"),
    ],
)
def test_where_this_machine_reaches_a_listener(listen: Address, url: str) -> None:
    assert str(local_url("http", listen)) == url
    assert listen.everywhere == (listen.host in ("", "0.0.0.0", "::"))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:5001", "http://127.0.0.1:5001"),
        ("cache.example", "http://cache.example"),
        ("https://cache.example:5001", "https://cache.example:5001"),
        ("[::1]:5001", "http://[::1]:5001"),
    ],
)
def test_an_admin_address(text: str, url: str) -> None:
    assert str(parse_server(text)) == url


@pytest.mark.parametrize("text", ["", "ftp://cache.example", "http://", "http://h:x", "/path"])
def test_what_is_no_admin_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--server .*: expected an address such as http://"):
        parse_server(text)


def test_hosts() -> None:
    assert [is_host(each) for each in ("ghcr.io", "localhost", "cache:5000", "team")] == [
        True,
        True,
        True,
        False,
    ]
