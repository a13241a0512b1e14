"""The command as people meet it: what it prints, how it fails, how it ends.  Real processes."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from proxy.cli.main import main
from tests import ONE_AUTHORITY
from tests.authority import Authority
from tests.clients.processes import free_port
from tests.upstream import Hold, Image, Upstream
from tests.wire import connect

pytestmark = pytest.mark.clients

COMMAND = (sys.executable, "-m", "proxy")
PATIENCE = 30.0  # seconds; only a process that hangs takes them
END = "complete instructions and other clients: entrepot setup --help"
BLOB = os.urandom(1 << 20) * 4


class Program:
    """A process of ours; ended by its own id if a test has not ended it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> str:
        """The next one of standard output."""
        assert self._process.stdout
        async with asyncio.timeout(PATIENCE):
            return (await self._process.stdout.readline()).decode().rstrip("\n")

    async def event(self, name: str) -> dict[str, Any]:
        """The next event of that name from the log, which is to hold nothing but JSON."""
        assert self._process.stderr
        async with asyncio.timeout(PATIENCE):
            while line := await self._process.stderr.readline():
                event: dict[str, Any] = json.loads(line)
                if event["event"] == name:
                    return event
        raise AssertionError(f"it ended without {name}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def end(self) -> tuple[int, str, str]:
        """Wait for it: exit status, and what is left of standard output and error."""
        async with asyncio.timeout(PATIENCE):
            out, err = await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode, out.decode(), (err or b"").decode()

    async def make_end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()


@asynccontextmanager
async def running(
    home: Path, *words: str, stderr: int = asyncio.subprocess.PIPE, **more: str
) -> AsyncIterator[Program]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        **ONE_AUTHORITY,
        **more,
    }
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *words, env=environment, stdout=asyncio.subprocess.PIPE, stderr=stderr
    )
    program = Program(process)
    try:
        yield program
    finally:
        await program.make_end()
        await asyncio.sleep(0)  # its pipes are closed in the next turn of the loop


async def run(home: Path, *words: str, **more: str) -> tuple[int, str, str]:
    async with running(home, *words, **more) as program:
        return await program.end()


def run_here(home: Path, *words: str) -> tuple[int, str, str]:
    """As run(), in this process, which has imported everything: for what needs no loop and starts nothing."""
    done = CliRunner().invoke(main, words, env={"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")})
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def taken() -> Any:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def write(home: Path, tree: Any) -> Path:
    path = home / "entrepot.yml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def site(home: Path, upstream: Upstream, **top: Any) -> tuple[Path, str]:
    """A configuration before `upstream`, and the address that it listens on."""
    port = free_port()
    tree = {
        "listen": f"127.0.0.1:{port}",
        "admin": "off",
        "workers": 1,
        "disk": {"path": str(home / "disk")},
        "namespaces": {"docker.io": {"upstream": upstream.url}},
        **top,
    }
    return write(home, tree), f"http://127.0.0.1:{port}"


async def banner(program: Program) -> str:
    """All of it: it ends with where there is more."""
    lines = [await program.line()]
    while lines[-1] != END:
        lines.append(await program.line())
        assert lines.count("") < 10, "it has ended"
    return "\n".join(lines)


def settings(text: str, client: str) -> str:
    """What the banner says to put into the client's file: below its name, on until the next client's."""
    _, found, after = text.partition(f"  {client}: ")
    assert found
    lines = after.splitlines()[1:]
    stop = next(number for number, line in enumerate(lines) if line and not line.startswith("    "))
    return dedent("\n".join(lines[:stop]))


# Starting


async def test_banner(tmp_path: Path, upstream: Upstream) -> None:
    admin = free_port()
    config, url = site(tmp_path, upstream, admin=f"127.0.0.1:{admin}")
    async with running(tmp_path, "serve", "--config", str(config)) as program:
        said = await banner(program)
        program.send(signal.SIGTERM)
        assert (await program.end())[:2] == (0, "")
    first, page, source, second, third, *_ = said.splitlines()
    assert page == f"see it: http://127.0.0.1:{admin}/ui/"
    assert source == f"configured by {config}"
    assert first == f"entrepot {version('entrepot')} listening on {url}, admin on http://127.0.0.1:{admin}"
    assert second == f"storing in {tmp_path}/disk"
    assert third == "point clients at it:"
    assert "  docker: /etc/docker/daemon.json\n" in said
    assert json.loads(settings(said, "docker")) == {"registry-mirrors": [url]}
    assert "  containerd: /etc/containerd/certs.d/_default/hosts.toml\n" in said
    # Without capabilities containerd would push here as well.
    assert tomllib.loads(settings(said, "containerd")) == {
        "host": {url: {"capabilities": ["pull", "resolve"]}}
    }
    assert "  podman: /etc/containers/registries.conf.d/entrepot.conf\n" in said
    location = url.removeprefix("http://")
    assert tomllib.loads(settings(said, "podman")) == {
        "registry": [
            {
                "location": "docker.io",
                "mirror": [{"location": f"{location}/docker.io", "insecure": True}],
            },
            {"location": location, "insecure": True},
        ]
    }


async def test_the_banner_says_what_setup_writes(tmp_path: Path, upstream: Upstream) -> None:
    config, _ = site(tmp_path, upstream)
    async with running(tmp_path, "serve", "--config", str(config)) as program:
        said = await banner(program)
        program.send(signal.SIGTERM)
        await program.end()
    for client in ("docker", "containerd", "podman"):
        _, out, _ = run_here(tmp_path, "setup", client, "--config", str(config))
        assert settings(said, client).strip() in out


async def test_the_banner_of_a_server_with_tls(tmp_path: Path, upstream: Upstream) -> None:
    admin = free_port()
    files = Authority(tmp_path).issue("server")
    for scheme, address in (("http", "127.0.0.1"), ("https", "0.0.0.0")):
        config, url = site(tmp_path, upstream, tls=files, admin=f"{address}:{admin}")
        url = url.replace("http:", "https:")
        async with running(tmp_path, "serve", "--config", str(config)) as program:
            said = await banner(program)
            program.send(signal.SIGTERM)
            assert (await program.end())[:2] == (0, "")
        assert f" listening on {url}, admin on {scheme}://{address}:{admin}\n" in said
        assert f"\nsee it: {scheme}://127.0.0.1:{admin}/ui/\n" in said
        assert json.loads(settings(said, "docker")) == {"registry-mirrors": [url]}
        assert list(tomllib.loads(settings(said, "containerd"))["host"]) == [url]
        registry, *_ = tomllib.loads(settings(said, "podman"))["registry"]
        assert registry["mirror"] == [{"location": f"{url.removeprefix('https://')}/docker.io"}]


async def test_the_banner_speaks_only_of_what_is_configured(tmp_path: Path, upstream: Upstream) -> None:
    config, _ = site(tmp_path, upstream, namespaces={"edge.example": {"upstream": upstream.url}})
    async with running(tmp_path, "serve", "--config", str(config)) as program:
        said = await banner(program)
        program.send(signal.SIGTERM)
        await program.end()
    assert "admin" not in said
    assert "docker" not in said  # it takes mirrors for Docker Hub only
    registry, _ = tomllib.loads(settings(said, "podman"))["registry"]
    assert registry["location"] == "edge.example"


async def test_where_docker_can_log_in_is_said_at_the_start_and_by_check(
    tmp_path: Path, upstream: Upstream
) -> None:
    users = tmp_path / "htpasswd"
    users.touch()
    edge = f"127.0.0.1:{free_port()}"
    config, url = site(
        tmp_path,
        upstream,
        access={"htpasswd": str(users)},
        namespaces={
            "docker.io": {"upstream": upstream.url},
            "local": {"store": {}},
            "edge": {"store": {}, "listen": edge},
        },
    )
    async with running(tmp_path, "serve", "--config", str(config)) as program:
        said = await banner(program)
        program.send(signal.SIGTERM)
        await program.end()
    address = url.removeprefix("http://")
    cause = f"warning: namespaces.local: docker cannot log in at {address} to push: give it a listener of its"
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert [line.startswith(cause) for line in warnings] == [True]
    assert f"private registry edge: docker login {edge}; docker push {edge}/team/app:1" in said
    status, out, _ = await run(tmp_path, "check", "--config", str(config))
    assert (status, out.splitlines()[1:]) == (0, warnings)


async def test_without_a_configuration(tmp_path: Path) -> None:
    for port in (5000, 5001):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            pytest.skip(f"port {port} is taken")
    async with running(tmp_path, "serve") as program:
        said = await banner(program)
        assert "listening on http://127.0.0.1:5000, admin on http://127.0.0.1:5001\n" in said
        assert f"\nstoring in {tmp_path}/cache/entrepot\n" in said
        async with connect("http://127.0.0.1:5000") as wire:
            assert (await wire.ask("GET", "/v2/")).body == b"{}"
            reply = await wire.ask("GET", "/v2/library/alpine/manifests/latest?ns=unknown.example")
            assert (reply.status, json.loads(reply.body)["errors"][0]["code"]) == (404, "NAME_UNKNOWN")
            assert json.loads((await wire.ask("GET", "/v2/_catalog")).body) == {"repositories": []}
        program.send(signal.SIGTERM)
        assert (await program.end())[0] == 0


async def test_starting_asks_no_upstream(tmp_path: Path, upstream: Upstream) -> None:
    config, url = site(tmp_path, upstream)
    async with running(tmp_path, "serve", "--config", str(config)) as program:
        await banner(program)
        async with connect(url) as wire:
            assert (await wire.ask("GET", "/v2/")).status == 200
        program.send(signal.SIGTERM)
        assert (await program.end())[0] == 0
    assert upstream.log == []


# Failing

BAD_CONFIGURATIONS: dict[str, tuple[str, str]] = {
    "unknown key": ("lisen: 127.0.0.1:0", "lisen: unknown key; did you mean listen?"),
    "unknown key within": ("disk: {pth: /x}", "disk.pth: unknown key; did you mean path?"),
    "bad unit": (
        "drain: 30 parsecs",
        "drain: expected a duration: a number and its unit, one of ms, s, m, h, d, w, such as 1h30m",
    ),
    "bad address": (
        "listen: everywhere",
        "listen: expected host:port in quotes, such as '127.0.0.1:5000', '[::1]:5000' or ':5000'",
    ),
    "missing variable": (
        'namespaces: {docker.io: {upstream: {url: https://x.y, username: me, password: "${NO_SUCH}"}}}',
        "namespaces.docker.io.upstream.password: the environment variable NO_SUCH is not set",
    ),
    "no mapping": ("just words", "expected a mapping of keys to values, got a string"),
}


@pytest.mark.parametrize(("text", "message"), BAD_CONFIGURATIONS.values(), ids=BAD_CONFIGURATIONS)
async def test_a_bad_configuration_is_one_line_and_status_2(tmp_path: Path, text: str, message: str) -> None:
    config = write(tmp_path, text)
    expected = (2, "", f"entrepot: {config}: {message}\n")
    assert await run(tmp_path, "serve", "--config", str(config)) == expected
    assert run_here(tmp_path, "check", "--config", str(config)) == expected
    assert sorted(tmp_path.iterdir()) == [config]


async def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    for path, cause in (
        (tmp_path / "absent.yml", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        expected = (2, "", f"entrepot: {path}: cannot be read: {cause}\n")
        assert await run(tmp_path, "serve", "--config", str(path)) == expected


def test_two_namespaces_of_one_host_are_refused(tmp_path: Path) -> None:
    config = write(
        tmp_path, "namespaces: {a.example: {upstream: https://x.y}, a.example:443: {upstream: https://x.z}}"
    )
    status, out, err = run_here(tmp_path, "check", "--config", str(config))
    assert (status, out) == (2, "")
    assert "a.example" in err
    assert err.count("\n") == 1


def test_wrong_usage_is_status_2(tmp_path: Path) -> None:
    for words in (("serve", "--bogus"), ("sreve",), ("serve", "extra")):
        status, out, err = run_here(tmp_path, *words)
        assert (status, out) == (2, "")
        assert "Traceback" not in err


@pytest.mark.parametrize("key", ["listen", "admin"])
async def test_a_port_in_use_is_one_line_and_status_1(
    tmp_path: Path, upstream: Upstream, taken: int, key: str
) -> None:
    config, _ = site(tmp_path, upstream, **{key: f"127.0.0.1:{taken}"})
    status, out, err = await run(tmp_path, "serve", "--config", str(config))
    assert (status, out) == (1, "")
    cause = "Address already in use: stop what listens there (ss -ltnp shows it), or choose another port"
    assert err == f"entrepot: cannot listen on 127.0.0.1:{taken} ({key}): {cause}\n"


async def test_a_directory_that_cannot_be_used_is_one_line_and_status_1(
    tmp_path: Path, upstream: Upstream
) -> None:
    (tmp_path / "file").touch()
    config, _ = site(tmp_path, upstream, disk={"path": str(tmp_path / "file" / "disk")})
    status, out, err = await run(tmp_path, "serve", "--config", str(config))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith(f"entrepot: cannot store in {tmp_path}/file/disk (disk.path): ")
    assert err.endswith(": Not a directory\n")


async def test_a_certificate_that_is_not_there_is_one_line_and_status_1(
    tmp_path: Path, upstream: Upstream
) -> None:
    namespaces = {"a.example": {"upstream": {"url": "https://a.example", "ca_file": "/no/such.pem"}}}
    config, _ = site(tmp_path, upstream, namespaces=namespaces)
    status, out, err = await run(tmp_path, "serve", "--config", str(config))
    assert (status, out) == (1, "")
    assert err == "entrepot: namespaces.a.example.upstream: /no/such.pem: No such file or directory\n"


async def test_a_key_that_is_not_the_certificates_is_one_line_and_status_1(
    tmp_path: Path, upstream: Upstream
) -> None:
    authority = Authority(tmp_path)
    files = {**authority.issue("server"), "key": authority.issue("other")["key"]}
    config, _ = site(tmp_path, upstream, tls=files)
    status, out, err = await run(tmp_path, "serve", "--config", str(config))
    assert (status, out) == (1, "")
    assert err == (
        f"entrepot: tls.key: {files['key']}: it is not the key of the first certificate in "
        f"{files['certificate']} (tls.certificate)\n"
    )


# Ending


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "latest", layers=(BLOB,))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_downloads_end(
    tmp_path: Path, upstream: Upstream, image: Image, number: signal.Signals
) -> None:
    gate = asyncio.Event()
    upstream.next("GET", image.layers[0], hold := Hold(gate, after=1 << 20))
    config, url = site(tmp_path, upstream)
    async with running(tmp_path, "serve", "--config", str(config)) as program:
        await banner(program)
        async with connect(url) as wire:
            path = f"/v2/library/alpine/blobs/{image.layers[0]}"
            await wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert (await wire.head())[0] == 200
            await hold.reached.wait()
            program.send(number)
            await program.event("server.stopping")
            gate.set()
            assert await wire.read(len(BLOB)) == BLOB
        status, out, err = await program.end()
        assert (status, out) == (0, "")
        for line in err.splitlines():
            assert json.loads(line)["level"] == "info"
    assert list((tmp_path / "disk" / "cache" / "partial").glob("sha256-*")) == []


async def test_drain_bounds_the_end(tmp_path: Path, upstream: Upstream, image: Image) -> None:
    gate = asyncio.Event()
    upstream.next("GET", image.layers[0], hold := Hold(gate, after=1 << 20))
    config, url = site(tmp_path, upstream, drain="100ms")
    async with running(tmp_path, "serve", "--config", str(config)) as program:
        await banner(program)
        async with connect(url) as wire:
            path = f"/v2/library/alpine/blobs/{image.layers[0]}"
            await wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await wire.head()
            await hold.reached.wait()
            program.send(signal.SIGTERM)
            with pytest.raises(ConnectionResetError):
                await wire.rest()
        assert (await program.end())[0] == 0
    gate.set()
    # The next start goes on from what is there.
    (left,) = (tmp_path / "disk" / "cache" / "partial").glob("sha256-*")
    assert 0 < left.stat().st_size <= 1 << 20
    left.unlink()


# Other commands


def test_check_says_what_is_known_and_does_nothing(tmp_path: Path, upstream: Upstream) -> None:
    config, _ = site(tmp_path, upstream)
    expected = f"{config} is valid; namespaces: docker.io\n"
    assert run_here(tmp_path, "check", "--config", str(config)) == (0, expected, "")
    assert sorted(tmp_path.iterdir()) == [config]
    assert upstream.log == []


def test_check_without_a_configuration(tmp_path: Path) -> None:
    status, out, err = run_here(tmp_path, "check")
    assert (status, err) == (0, "")
    for name in ("docker.io", "ghcr.io", "quay.io", "registry.k8s.io", "gcr.io", "mcr.microsoft.com"):
        assert name in out


async def test_version_and_help(tmp_path: Path) -> None:
    assert await run(tmp_path, "--version") == (0, f"entrepot, version {version('entrepot')}\n", "")
    status, out, _ = run_here(tmp_path, "--help")
    assert status == 0
    for word in ("serve", "check", "--version"):
        assert word in out
    assert "worker" not in out  # not for people
    assert "5000" in run_here(tmp_path, "serve", "--help")[1]


# The log


async def test_the_log_is_json_in_a_pipe(tmp_path: Path, upstream: Upstream, image: Image) -> None:
    config, url = site(tmp_path, upstream)
    async with running(tmp_path, "serve", "--config", str(config)) as program:
        await banner(program)
        async with connect(url) as wire:
            await wire.ask("GET", "/v2/library/alpine/manifests/latest", "User-Agent: test \xff")
        event = await program.event("request.served")
        program.send(signal.SIGTERM)
        assert (await program.end())[0] == 0
    assert event.pop("timestamp")[:2] == "20"
    assert event.pop("seconds") > 0
    assert event.pop("id")
    assert event == {
        "level": "info",
        "event": "request.served",
        "client": "127.0.0.1",
        "method": "GET",
        "kind": "manifest",
        "user": "",
        "namespace": "docker.io",
        "repository": "library/alpine",
        "reference": "latest",
        "status": 200,
        "result": "miss",
        "detail": "",
        "reason": "",
        "upstream_requests": 1,
        "bytes": len(image.content),
        "received": 0,
        "agent": "test \udcff",
    }


async def test_the_log_is_for_people_on_a_terminal(tmp_path: Path, upstream: Upstream, image: Image) -> None:
    config, url = site(tmp_path, upstream)
    terminal, theirs = pty.openpty()
    try:
        async with running(tmp_path, "serve", "--config", str(config), stderr=theirs) as program:
            await banner(program)
            async with connect(url) as wire:
                await wire.ask("GET", "/v2/library/alpine/manifests/latest")
            program.send(signal.SIGTERM)
            assert (await program.end())[0] == 0
        os.set_blocking(terminal, False)
        said = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(theirs)
    (line,) = (line for line in said.splitlines() if "docker.io/library/alpine:latest" in line)
    assert "\x1b[32m200\x1b[0m miss GET docker.io/library/alpine:latest 127.0.0.1 " in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


# The help

COMMANDS = sorted(main.commands.items())


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_command_and_option_explains_itself(name: str, command: click.Command) -> None:
    """The first sentence of a command is that of the list of commands, and has at most eight words."""
    first = (command.help or "").split(".")[0].split()
    assert 1 < len(first) <= 8
    assert (command.help or "").split("\n\n")[0].endswith(".")
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.help.endswith("."), option.help
