"""Credentials: each source, what it does when it changes, and that it never tells a secret."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from proxy.upstream.credentials import (
    Credential,
    Credentials,
    DockerConfig,
    Helper,
    Inline,
    LoginFiles,
    PasswordFile,
    _login_files,
)
from storage.errors import OriginDenied
from tests.conftest import Clock

HUB = "registry-1.docker.io"


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# Values


def test_basic_is_in_utf8() -> None:
    assert Credential("jörg", "pä:ss").basic() == "Basic " + encoded("jörg:pä:ss")


def test_an_identity_token_is_no_password() -> None:
    assert Credential("", identity_token="refresh").basic() is None
    assert Credential("ci", "secret", identity_token="refresh").basic() == "Basic " + encoded("ci:secret")


def test_no_secret_in_a_repr() -> None:
    assert "hush" not in repr(Credential("ci", "hush", identity_token="hush"))


async def test_nobody() -> None:
    assert await Credentials().get(HUB) is None


async def test_inline() -> None:
    assert await Inline("ci", "secret").get(HUB) == Credential("ci", "secret")


# Password file


async def test_password_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("one\n")
    source = PasswordFile("ci", path)
    assert await source.get(HUB) == Credential("ci", "one")

    path.write_text("three\r\n")  # in place, another size
    assert await source.get(HUB) == Credential("ci", "three")

    before = path.stat()
    new = tmp_path / "new"
    new.write_text("seven\r\n")  # replaced: the same size and time, another inode
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)
    assert await source.get(HUB) == Credential("ci", "seven")


async def test_password_file_is_not_read_again_when_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "password"
    path.write_text("one\n")
    source = PasswordFile("ci", path)
    await source.get(HUB)
    monkeypatch.setattr(Path, "open", None)
    assert await source.get(HUB) == Credential("ci", "one")


async def test_a_password_keeps_its_spaces(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(" a b \n")
    assert await PasswordFile("ci", path).get(HUB) == Credential("ci", " a b ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"\n", "it is empty"), (b"hush\xff", "it is not UTF-8")],
)
async def test_unusable_password_file(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with capture_logs() as events, pytest.raises(OriginDenied) as caught:
        await PasswordFile("ci", path).get(HUB)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "hush" not in str(caught.value) + str(events)
    assert events == [
        {
            "event": "credentials.failed",
            "log_level": "error",
            "source": f"password file {path}",
            "reason": reason,
        }
    ]


@pytest.mark.errors("credentials.failed")
async def test_a_password_file_that_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "password"
    source = PasswordFile("ci", path)
    with pytest.raises(OriginDenied):
        await source.get(HUB)
    path.write_text("one")
    assert await source.get(HUB) == Credential("ci", "one")


# Docker's config.json

NOBODY = 4_000_000_000  # no such user has a directory in /run/containers


class Known(Credentials):
    """A helper that knows `name` and its password for every host but those it `lacks`."""

    def __init__(self, name: str) -> None:
        self.name, self.asked, self.forgotten = name, list[str](), 0

    async def get(self, host: str, repository: str = "") -> Credential | None:
        self.asked.append(host)
        return None if host == "lacking.example" else Credential(self.name, "helped")

    def forget(self) -> None:
        self.forgotten += 1


def docker_config(tmp_path: Path, content: object) -> DockerConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return DockerConfig(path, helper=Known)


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("https://index.docker.io/v1/", "registry-1.docker.io"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "registry-1.docker.io"),
        ("index.docker.io", "docker.io"),
        ("ghcr.io", "ghcr.io"),
        ("https://ghcr.io", "ghcr.io"),
        ("https://ghcr.io/v2/", "ghcr.io"),
        ("quay.io/team", "quay.io"),
        ("localhost:5000", "localhost:5000"),
        ("http://localhost:5000/v1/", "localhost:5000"),
    ],
)
async def test_keys_of_auths(tmp_path: Path, key: str, host: str) -> None:
    source = docker_config(tmp_path, {"auths": {"other.example": {}, key: {"auth": encoded("ci:a:b")}}})
    assert await source.get(host) == Credential("ci", "a:b")
    assert await source.get("elsewhere.example") is None


@pytest.mark.parametrize(
    ("key", "host"), [("ghcr.io", "ghcr.io.evil.example"), ("ghcr.io:5000", "ghcr.io"), ("io", "ghcr.io")]
)
async def test_keys_of_other_hosts(tmp_path: Path, key: str, host: str) -> None:
    source = docker_config(tmp_path, {"auths": {key: {"auth": encoded("ci:secret")}}})
    assert await source.get(host) is None


@pytest.mark.parametrize(
    ("loose", "exact", "host"),
    [
        ("https://index.docker.io/v1/access-token", "https://index.docker.io/v1/", HUB),
        ("ghcr.io/team", "ghcr.io", "ghcr.io"),
    ],
)
async def test_the_exact_key_wins(tmp_path: Path, loose: str, exact: str, host: str) -> None:
    auths = {loose: {"auth": encoded("wrong:x")}, exact: {"auth": encoded("right:x")}}
    assert await docker_config(tmp_path, {"auths": auths}).get(host) == Credential("right", "x")


@pytest.mark.parametrize(
    ("repository", "user"),
    [
        ("team/app", "team"),
        ("team", "team"),
        ("team/deep/app", "deep"),
        ("team/deeper/app", "team"),
        ("teams/app", "host"),
        ("other", "host"),
        ("", "host"),
    ],
)
async def test_the_longest_path_that_fits_wins(tmp_path: Path, repository: str, user: str) -> None:
    keys = {"team/deep": "deep", "team": "team", "team/deep/app/x": "x"}
    auths = {f"quay.io/{path}": {"auth": encoded(f"{name}:x")} for path, name in keys.items()}
    auths["quay.io"] = {"auth": encoded("host:x")}
    assert await docker_config(tmp_path, {"auths": auths}).get("quay.io", repository) == Credential(user, "x")


async def test_a_login_for_a_part_of_a_registry_is_for_no_other_part(tmp_path: Path) -> None:
    source = docker_config(tmp_path, {"auths": {"docker.io/team": {"auth": encoded("ci:x")}}})
    assert await source.get(HUB, "team/app") == Credential("ci", "x")
    assert await source.get(HUB, "library/alpine") is None
    assert await source.get(HUB) == Credential("ci", "x")


async def test_a_login_for_a_part_comes_before_a_helper_for_the_registry(tmp_path: Path) -> None:
    auths = {
        "quay.io/team": {"auth": encoded("ci:x")},
        "quay.io/empty": {},
        "quay.io": {"auth": encoded("no:x")},
    }
    for helpers in ({"credsStore": "store"}, {"credHelpers": {"quay.io": "store"}}):
        source = docker_config(tmp_path, {"auths": auths, **helpers})
        assert await source.get("quay.io", "team/app") == Credential("ci", "x")
        assert await source.get("quay.io", "empty/app") == Credential("store", "helped")
        assert await source.get("quay.io", "other/app") == Credential("store", "helped")


def test_where_logins_are_looked_for(tmp_path: Path) -> None:
    places = [
        tmp_path / "given.json",
        tmp_path / "run" / "containers" / "auth.json",
        tmp_path / "config" / "containers" / "auth.json",
        tmp_path / "docker" / "config.json",
    ]
    environment = {
        "REGISTRY_AUTH_FILE": str(places[0]),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "DOCKER_CONFIG": str(tmp_path / "docker"),
        "HOME": str(tmp_path / "home"),
    }
    assert LoginFiles(environment, NOBODY).paths == []
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert LoginFiles(environment, NOBODY).paths == places
    at_home = [
        tmp_path / "home" / ".config" / "containers" / "auth.json",
        tmp_path / "home" / ".docker" / "config.json",
    ]
    for path in at_home:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    assert LoginFiles({"HOME": str(tmp_path / "home")}, NOBODY).paths == at_home


def test_podmans_file_without_a_session_is_that_of_the_user() -> None:
    found = list(_login_files({"XDG_RUNTIME_DIR": "/run/user/1234", "HOME": "/home/u"}, 1234))
    assert [str(each) for each in found] == [
        "/run/user/1234/containers/auth.json",
        "/run/containers/1234/auth.json",
        "/home/u/.config/containers/auth.json",
        "/home/u/.docker/config.json",
    ]


async def test_the_first_file_that_has_a_login_wins(tmp_path: Path) -> None:
    logins = {
        tmp_path / "containers" / "auth.json": {"a.example": "podman"},
        tmp_path / ".docker" / "config.json": {"a.example": "docker", "b.example": "docker"},
    }
    for path, auths in logins.items():
        path.parent.mkdir()
        entries = {host: {"auth": encoded(f"{user}:x")} for host, user in auths.items()}
        path.write_text(json.dumps({"auths": entries}))
    source = LoginFiles({"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}, NOBODY)
    assert await source.get("a.example", "x") == Credential("podman", "x")
    assert await source.get("b.example", "x") == Credential("docker", "x")
    assert await source.get("c.example", "x") is None


async def test_forms_of_an_entry(tmp_path: Path) -> None:
    auths = {
        "plain.example": {"username": "ci", "password": "secret"},
        "identity.example": {"auth": encoded("00000000:"), "identitytoken": "refresh"},
        "empty.example": {},
    }
    source = docker_config(tmp_path, {"auths": auths, "HttpHeaders": {"X-Meta": "ignored"}})
    assert await source.get("plain.example") == Credential("ci", "secret")
    assert await source.get("identity.example") == Credential("00000000", "", "refresh")
    assert await source.get("empty.example") is None


async def test_helpers_of_the_configuration(tmp_path: Path) -> None:
    source = docker_config(
        tmp_path,
        {
            "auths": {"ghcr.io": {"auth": encoded("ci:x")}, "lacking.example": {"auth": encoded("ci:y")}},
            "credsStore": "store",
            "credHelpers": {"1234.dkr.ecr.example": "ecr-login", "https://index.docker.io/v1/": "hub"},
        },
    )
    assert await source.get("1234.dkr.ecr.example") == Credential("ecr-login", "helped")
    assert await source.get(HUB) == Credential("hub", "helped")
    assert await source.get("ghcr.io") == Credential("store", "helped")
    assert await source.get("lacking.example") == Credential("ci", "y")


async def test_forget_reaches_the_helpers(tmp_path: Path) -> None:
    made: list[Known] = []

    def helper(name: str) -> Credentials:
        made.append(Known(name))
        return made[-1]

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"credsStore": "a", "credHelpers": {"x.example": "b", "y.example": "b"}}))
    source = DockerConfig(path, helper=helper)
    await source.get("x.example")
    source.forget()
    assert sorted((each.name, each.forgotten) for each in made) == [("a", 1), ("b", 1)]


async def test_docker_config_is_read_again_when_it_changes(tmp_path: Path) -> None:
    source = docker_config(tmp_path, {"auths": {"ghcr.io": {"auth": encoded("ci:one")}}})
    assert await source.get("ghcr.io") == Credential("ci", "one")
    docker_config(tmp_path, {"auths": {"ghcr.io": {"auth": encoded("ci:another")}}})
    assert await source.get("ghcr.io") == Credential("ci", "another")


@pytest.mark.parametrize(
    "content",
    [
        '{"auths": {"ghcr.io": {"auth": "hush"',
        '{"auths": {"ghcr.io": {"auth": ["hush"]}}}',
        '{"auths": {"ghcr.io": {"auth": "hush!"}}}',
        '{"auths": {"ghcr.io": {"auth": "aHVzaA=="}}}',
        '{"auths": {"ghcr.io": {"auth": "aHVzaP8="}}}',
        '{"credsStore": "../../bin/sh"}',
    ],
)
async def test_unusable_docker_config(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with capture_logs() as events, pytest.raises(OriginDenied, match=str(path)) as caught:
        await DockerConfig(path).get("ghcr.io")
    assert "hush" not in str(caught.value) + str(events)
    assert [event["event"] for event in events] == ["credentials.failed"]


async def test_an_unusable_entry_harms_no_other_host(tmp_path: Path) -> None:
    auths = {"bad.example": {"auth": "!"}, "ghcr.io": {"auth": encoded("ci:one")}}
    assert await docker_config(tmp_path, {"auths": auths}).get("ghcr.io") == Credential("ci", "one")


# Helper programs

Program = Callable[[str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Puts docker-credential-test into PATH; what it is asked is appended to the file `asked`."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    asked = tmp_path / "asked"
    asked.touch()

    def write(body: str) -> Path:
        path = tmp_path / "docker-credential-test"
        path.write_text(f'#!/bin/sh\nread -r host\necho "$1 $host" >>{asked}\ncd {tmp_path}\n{body}\n')
        path.chmod(0o755)
        return asked

    return write


ANSWER = """echo '{"ServerURL": "x", "Username": "ci", "Secret": "helped"}'"""


@pytest.mark.parametrize(
    ("host", "key"), [("ghcr.io", "ghcr.io"), (HUB, "https://index.docker.io/v1/"), ("[::1]:5000",) * 2]
)
async def test_helper(program: Program, host: str, key: str) -> None:
    asked = program(ANSWER)
    assert await Helper("test").get(host) == Credential("ci", "helped")
    assert asked.read_text() == f"get {key}\n"


async def test_helper_in_which_podman_has_logged_in_to_docker_hub(program: Program) -> None:
    missing = "echo credentials not found in native keychain; exit 1"
    asked = program(f'[ "$host" = docker.io ] || {{ {missing}; }}\n{ANSWER}')
    assert await Helper("test").get(HUB) == Credential("ci", "helped")
    assert asked.read_text() == "get https://index.docker.io/v1/\nget docker.io\n"


async def test_helper_with_an_identity_token(program: Program) -> None:
    program("""echo '{"Username": "<token>", "Secret": "refresh"}'""")
    assert await Helper("test").get("ghcr.io") == Credential("", "", "refresh")


async def test_helper_without_credentials(program: Program) -> None:
    asked = program("echo credentials not found in native keychain; exit 1")
    helper = Helper("test")
    assert await helper.get("ghcr.io") is None
    assert await helper.get("ghcr.io") is None
    assert asked.read_text() == "get ghcr.io\n"


async def test_helper_is_asked_again_after_its_lifetime_and_when_forgotten(
    program: Program, clock: Clock
) -> None:
    asked = program(ANSWER)
    helper = Helper("test", lifetime=60, clock=clock)

    async def runs() -> int:
        assert await helper.get("ghcr.io")
        return len(asked.read_text().splitlines())

    assert await runs() == 1
    clock.advance(59)
    assert await runs() == 1
    clock.advance(1)
    assert await runs() == 2
    helper.forget()
    assert await runs() == 3


async def test_helper_runs_once_for_all_who_wait(program: Program) -> None:
    asked = program(ANSWER)
    helper = Helper("test")
    answers = await asyncio.gather(*(helper.get("ghcr.io") for _ in range(20)))
    assert answers == [Credential("ci", "helped")] * 20
    assert asked.read_text() == "get ghcr.io\n"


async def test_a_failure_is_shared_by_all_who_wait_and_not_kept(program: Program) -> None:
    asked = program("exit 3")
    helper = Helper("test")
    with capture_logs() as events:
        answers = await asyncio.gather(*(helper.get("ghcr.io") for _ in range(20)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [OriginDenied] * 20
    assert len(events) == 1
    program(ANSWER)
    assert await helper.get("ghcr.io") == Credential("ci", "helped")
    assert len(asked.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo hush; echo hush >&2; exit 3", "ended with status 3"),
        ("echo hush", "its answer is not JSON with Username and Secret"),
        ("""echo '{"Username": "hush"}'""", "its answer is not JSON with Username and Secret"),
        ("kill -TERM $$", "ended with status -15"),
    ],
)
async def test_unusable_helper(program: Program, body: str, reason: str) -> None:
    program(body)
    with capture_logs() as events, pytest.raises(OriginDenied) as caught:
        await Helper("test").get("ghcr.io")
    assert str(caught.value).endswith(f"credential helper docker-credential-test: {reason}")
    assert "hush" not in str(caught.value) + str(events)
    assert [event["event"] for event in events] == ["credentials.failed"]


@pytest.mark.errors("credentials.failed")
async def test_no_such_helper() -> None:
    with pytest.raises(OriginDenied, match="docker-credential-absent: No such file"):
        await Helper("absent").get("ghcr.io")


@pytest.mark.parametrize("name", ["", "../sh", "a/b", "-x", "a b"])
def test_names_that_are_no_helpers(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a credential helper"):
        Helper(name)


@pytest.mark.errors("credentials.failed")
async def test_a_helper_that_hangs_is_given_up(program: Program, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")
    program("cat never")
    with pytest.raises(OriginDenied, match=r"no answer within 0\.05 s"):
        await Helper("test", timeout=0.05).get("ghcr.io")


async def test_a_helper_nobody_waits_for_is_killed_with_its_children(
    program: Program, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "alive")
    os.mkfifo(tmp_path / "never")
    program("exec 3>alive\necho started >&3\ncat never")
    task = asyncio.create_task(Helper("test").get("ghcr.io"))
    with await asyncio.to_thread((tmp_path / "alive").open) as alive:
        assert await asyncio.to_thread(alive.readline) == "started\n"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(alive.read) == ""  # ends when nobody holds the other end


async def test_another_waiter_runs_it_when_the_first_is_cancelled(program: Program, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "alive")
    os.mkfifo(tmp_path / "never")
    program("exec 3>alive\necho started >&3\ncat never")
    helper = Helper("test")
    first = asyncio.create_task(helper.get("ghcr.io"))
    second = asyncio.create_task(helper.get("ghcr.io"))
    with await asyncio.to_thread((tmp_path / "alive").open):
        program(ANSWER)
        first.cancel()
        assert await second == Credential("ci", "helped")
    with pytest.raises(asyncio.CancelledError):
        await first
