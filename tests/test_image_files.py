"""References in files: what is found, what is not, and what is wrong with a file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.admin.image_files import ImageMentions, Mention, Unreadable, find_images, full_name, interpolate

FILES = Path(__file__).parent / "imagefiles"
HUB = "docker.io/library"


def digest(digit: str) -> str:
    return f"sha256:{digit * 64}"


def found(text: str, *registries: str, plain: bool = False, **environ: str) -> list[str]:
    """What standard input names."""
    return find_images(["-"], io.StringIO(text), environ, registries, plain=plain).references


def fault(text: str, **environ: str) -> str:
    with pytest.raises(Unreadable) as caught:
        found(text, **environ)
    (line,) = str(caught.value).splitlines()
    return line.removeprefix("standard input:")


def looked(name: str, **environ: str) -> ImageMentions:
    return find_images([str(FILES / name)], io.StringIO(), environ)


# Compose files


def test_a_compose_file() -> None:
    result = looked("compose.yml")
    assert result.references == [
        "registry.example:5000/shop/app:1.2",
        "registry.example:5000/shop/app:1.2-worker",
        f"{HUB}/postgres:15-alpine",
        f"{HUB}/redis@{digest('1')}",
        "docker.io/prom/prometheus:latest",
        "ghcr.io/shop/builder:1",
    ]
    path = FILES / "compose.yml"
    lines = path.read_text().splitlines()
    assert Mention("registry.example:5000/shop/app:1.2", f"{path}:5") in result.mentions
    for each, word in zip(result.built, ("docs", "tools"), strict=True):
        assert f"  {word}:" == lines[int(each.rpartition(":")[2]) - 2]


def test_the_environment_wins_over_the_file_beside() -> None:
    result = looked("compose.yml", TAG="9", POSTGRES_VERSION="", REGISTRY="mirror.example")
    assert "registry.example:5000/shop/app:9" in result.references
    assert f"{HUB}/postgres:16.4-alpine" in result.references  # empty is as good as not set to :-
    assert f"mirror.example/library/redis@{digest('1')}" in result.references


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", "a"),
        ("$A", "1"),
        ("${A}", "1"),
        ("$A.$A", "1.1"),
        ("x$$A", "x$A"),
        ("${EMPTY}", ""),
        ("${EMPTY-d}", ""),
        ("${EMPTY:-d}", "d"),
        ("${NONE-d}", "d"),
        ("${NONE:-d:e}", "d:e"),
        ("${NONE:-${NOR:-${A}}}", "1"),
        ("${A:-${NONE}}", "1"),
        ("${A:?why}", "1"),
        ("${EMPTY?why}", ""),
        ("${A+b}", "b"),
        ("${EMPTY+b}", "b"),
        ("${EMPTY:+b}", ""),
        ("${NONE+b}", ""),
        ("${NONE:-}x", "x"),
    ],
)
def test_interpolation(text: str, value: str) -> None:
    assert interpolate(text, {"A": "1", "EMPTY": ""}) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("$NONE", "the variable NONE is not set, and has no default"),
        ("${NONE}", "the variable NONE is not set, and has no default"),
        ("${NONE:?say ${A}}", "the variable NONE is not set: say 1"),
        ("${EMPTY:?why}", "the variable EMPTY is not set: why"),
        ("${A", "${ without a closing }"),
        ("${}", "$ must be followed by a variable"),
        ("a$", "$ must be followed by a variable"),
        ("$1", "$ must be followed by a variable"),
        ("${A!b}", "is not an interpolation of Compose"),
    ],
)
def test_interpolation_that_fails(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        interpolate(text, {"A": "1", "EMPTY": ""})


def test_an_override_that_takes_an_image_back() -> None:
    assert found("services: {a: {image: !reset null}, b: {image: }, c: , d: {image: x}}") == [
        f"{HUB}/x:latest"
    ]


# Kubernetes


def test_rendered_manifests() -> None:
    assert looked("rendered.yaml").references == [
        "ghcr.io/shop/migrate:2.0.1",
        f"ghcr.io/shop/app@{digest('2')}",
        f"{HUB}/nginx:latest",
        "quay.io/shop/model:v3",
        "registry.k8s.io/busybox:1.27",
        "ghcr.io/shop/app:1",
        "docker.io/nicolaka/netshoot:latest",
        "localhost:5000/fleet/shard:7",
    ]


def test_what_kubectl_prints_as_json() -> None:
    text = '{"kind": "PodList", "items": [{"spec": {"containers": [{"image": "a/b:1"}]}}]}'
    assert found(text) == ["docker.io/a/b:1"]


def test_an_alias_is_followed_once() -> None:
    text = "kind: Pod\na: &a {containers: [{image: x:1}]}\nb: [*a, *a]\nc: &c [*c]\n"
    assert found(text) == [f"{HUB}/x:1"]


def test_many_kinds_in_one_file() -> None:
    text = "services: {a: {image: x:1}}\n---\nkind: Pod\ncontainers: [{image: y:1}]\n---\n- z:1\n---\n"
    assert found(text) == [f"{HUB}/x:1", f"{HUB}/y:1", "z:1"]


# Lists


def test_a_list() -> None:
    result = looked("images.txt")
    assert result.references == [
        "alpine:3.20",
        "docker.io/library/alpine:3.20",
        f"ghcr.io/shop/app@{digest('3')}",
        "edge/tool",
    ]
    assert result.mentions[-1].place == f"{FILES / 'images.txt'}:6"


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "kind: Service\n", "services: {}"])
def test_what_names_nothing(text: str) -> None:
    assert found(text) == []


def test_a_list_in_yaml() -> None:
    assert found("- alpine\n- 'ghcr.io/x/y:1'\n") == ["alpine", "ghcr.io/x/y:1"]
    assert found("alpine\r\nnginx:1\r\n") == ["alpine", "nginx:1"]


def test_files_come_in_their_order_each_reference_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("b:1\na:1\n")
    (tmp_path / "two").write_text("a:1\nc:1\n")
    result = find_images([str(tmp_path / "one"), "-", str(tmp_path / "two")], io.StringIO("d:1"), {})
    assert result.references == ["b:1", "a:1", "d:1", "c:1"]
    assert [each.place for each in result.mentions[:3]] == [
        f"{tmp_path / 'one'}:1",
        f"{tmp_path / 'one'}:2",
        "standard input:1",
    ]


# What is wrong


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: Pod\nspec:\n  containers: [\n", "4: "),
        ("a: b: c\n", "1: "),
        ("services:\n\ta: 1\n", "2: "),
        ("kind: *none\n", "1: "),
        ("kind: Pod\nx: \x01\n", "2: this character is not allowed"),
        ("&a [*a]\n", "1: nested too deeply"),
        ("alpine\nnginx latest\n", "1: expected a compose file"),
        ("\nreplicas: 1\n", "2: expected a compose file"),
        ("services: [a]\n", "1: expected a compose file"),
        ("services:\n  a:\n    image: $TAG\n", "3: the variable TAG is not set"),
        ("services:\n  a:\n    image: Alpine\n", "3: 'Alpine' is not an image name: "),
        ("kind: Pod\ncontainers:\n- image: a:b:c\n", "3: 'a:b:c' is not an image name: "),
        ("kind: Pod\ncontainers:\n- image: {{ .Values.image }}\n", "; for a Helm chart, give the output of"),
        (
            'kind: Pod\ncontainers:\n- image: "{{ .Values.image }}"\n',
            "; for a Helm chart, give the output of",
        ),
        ("kind: Pod\n{{- if .Values.x }}\n", "; for a Helm chart, give the output of"),
        ("alpine\nAlpine\n", "2: 'Alpine' is not an image name: "),
    ],
)
def test_what_cannot_be_read_names_the_line(text: str, says: str) -> None:
    line = fault(text)
    assert line.startswith(says) if says[0].isdigit() else says in line


def test_what_is_said_to_be_a_list_is_one() -> None:
    with pytest.raises(Unreadable, match="standard input:1: 'kind: Pod' is not an image name"):
        found("kind: Pod\n", plain=True)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="absent: cannot be read: No such file"):
        find_images([str(tmp_path / "absent")], io.StringIO(), {})
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(Unreadable, match="binary: not UTF-8 at byte 2"):
        find_images([str(tmp_path / "binary")], io.StringIO(), {})
    bytes_ = io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8")
    with pytest.raises(Unreadable, match="standard input: not UTF-8 at byte 0"):
        find_images(["-"], bytes_, {})


@given(
    st.text()
    | st.lists(st.sampled_from(["a:", "- ", "\n", "kind: ", "[", "}", "&a ", "*a", "<<: "])).map("".join)
)
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        found(text)
    except Unreadable as error:
        assert len(str(error).splitlines()) == 1


# Names


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("alpine", f"{HUB}/alpine:latest"),
        ("alpine:3", f"{HUB}/alpine:3"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/alpine:3", f"{HUB}/alpine:3"),
        ("index.docker.io/alpine:3", f"{HUB}/alpine:3"),
        ("Ghcr.io/x/y:1", "ghcr.io/x/y:1"),
        ("localhost/x:1", "localhost/x:1"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("[::1]:5000/x:1", "[::1]:5000/x:1"),
        (f"alpine@{digest('0')}", f"{HUB}/alpine@{digest('0')}"),
        (f"alpine:3@{digest('0')}", f"{HUB}/alpine@{digest('0')}"),
        ("gcr.io/a/b/c/d:1_x.y-z", "gcr.io/a/b/c/d:1_x.y-z"),
        ("cache.example:5000/ghcr.io/x/y:1", "ghcr.io/x/y:1"),
        ("cache.example:5000/local/app", "local/app:latest"),
    ],
)
def test_names_are_read_as_clients_read_them(text: str, full: str) -> None:
    assert full_name(text, ["cache.example:5000"]) == full


@pytest.mark.parametrize(
    "text", ["", ":1", "a:", "a b", "a@b", "A", "x_.y.z/", "h.example:x/a", "-.x/y", "a//b"]
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not an image name"):
        full_name(text)


def test_an_address_of_our_own_is_no_part_of_a_name_in_a_list() -> None:
    text = "cache.example/ghcr.io/x/y:1\nalpine\n"
    assert found(text, "cache.example") == ["ghcr.io/x/y:1", "alpine"]
