"""Sockets that systemd opens for the server, and upgrades that no client notices."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from structlog.testing import LogCapture

from proxy.config.errors import StartError
from proxy.config.hosts import Address
from proxy.config.schema import TLS, Config, Hosting, NamespaceConfig
from proxy.web import activation
from proxy.web.activation import PassedSocket, PassedSockets, passed_sockets
from tests.clients.processes import require
from tests.processes import Place, Server, place
from tests.test_supervisor import CONFIG, Site, site
from tests.upstream import Upstream

__all__ = ["place", "site"]  # fixtures

# Makes its descriptors those from 3 on, as systemd does, and becomes another program.
HAND_OVER = """
import fcntl, os, sys
names, count = sys.argv[1], int(sys.argv[2])
files = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 100) for each in sys.argv[3:3 + count]]
for number, file in enumerate(files, 3):
    os.dup2(file, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=names)
os.execv(sys.argv[3 + count], sys.argv[3 + count:])
"""

Listen = Callable[..., socket.socket]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Open a listening socket; without an address it is one of 127.0.0.1."""
    with ExitStack() as closing:

        def opened(address: Any = ("127.0.0.1", 0), family: int = socket.AF_INET) -> socket.socket:
            return closing.enter_context(socket.create_server(address, family=family))

        yield opened


def handed(name: str, *sockets: socket.socket) -> PassedSockets:
    return PassedSockets([PassedSocket(name, each) for each in sockets])


def at(listening: socket.socket, **more: Any) -> Config:
    """A configuration that listens where a socket does."""
    return msgspec.structs.replace(CONFIG, listen=Address(*listening.getsockname()[:2]), **more)


@pytest.mark.parametrize("name", ["listen", "http"])
def test_a_socket_is_its_listeners_by_name(listen: Listen, name: str) -> None:
    mine, admin, team = listen(), listen(), listen()
    store = NamespaceConfig(store=Hosting(), listen=Address(*team.getsockname()))
    config = at(mine, admin=Address(*admin.getsockname()), namespaces={"team": store})
    passed = PassedSockets(
        [
            PassedSocket(name, mine),
            PassedSocket("admin", admin),
            PassedSocket("namespaces.team.listen", team),
        ]
    )
    passed.check(config)
    for key, address in config.listeners().items():
        [found] = passed.bind(address, key)
        with found:
            assert found.getsockname() == (address.host, address.port)
            assert not found.getblocking() and not found.get_inheritable()


def test_several_sockets_of_one_name_are_one_listener(listen: Listen) -> None:
    six = listen(("::", 0), socket.AF_INET6)
    four = listen(("0.0.0.0", six.getsockname()[1]))
    config = msgspec.structs.replace(CONFIG, listen=Address("", six.getsockname()[1]))
    passed = handed("listen", four, six)
    passed.check(config)
    found = passed.bind(config.listen, "listen")
    assert [each.getsockname() for each in found] == [four.getsockname(), six.getsockname()]
    for each in found:
        each.close()


def test_what_was_not_passed_is_bound(listen: Listen) -> None:
    [found] = handed("listen", listen()).bind(Address("127.0.0.1", 0), "admin")
    with found:
        assert found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "[::]"])
def test_every_address_is_what_it_stands_for(listen: Listen, host: str) -> None:
    family = socket.AF_INET6 if host == "[::]" else socket.AF_INET
    listening = listen((host.strip("[]"), 0), family)
    port = listening.getsockname()[1]
    handed("listen", listening).check(msgspec.structs.replace(CONFIG, listen=Address(host.strip("[]"), port)))


@pytest.mark.parametrize(
    "name, more, error",
    [
        ("Listen", {}, "descriptor .* is for no listener: set FileDescriptorName= .* admin, http, https"),
        ("entrepot.socket", {}, "'entrepot.socket' .* is for no listener"),
        ("admin", {"admin": None}, "'admin' .* is for no listener"),
        ("namespaces.team.listen", {}, "is for no listener"),
        ("https", {}, "'https' .* needs tls, which is not configured"),
        ("http", {"tls": TLS(certificate=Path("server.crt"))}, "'http' .* is for plain HTTP, and tls is set"),
        ("listen", {"listen": Address("127.0.0.2", 0)}, r"127\.0\.0\.1:\d+, and listen is 127\.0\.0\.2"),
        ("listen", {"listen": Address("127.0.0.1", 1)}, r"and listen is 127\.0\.0\.1:1: change listen, or L"),
        ("listen", {"listen": Address("::1", 0)}, r"and listen is \[::1\]:0"),
        ("listen", {"listen": Address("none.invalid", 0)}, r"cannot listen on none\.invalid:0 \(listen\)"),
    ],
)  # fmt: skip
def test_a_socket_that_fits_no_listener_is_named(
    listen: Listen, name: str, more: dict[str, Any], error: str
) -> None:
    config = msgspec.structs.replace(CONFIG, **{"admin": Address("127.0.0.1", 0), **more})
    with pytest.raises(StartError, match=error):
        handed(name, listen()).check(config)


def test_every_address_of_ipv6_is_not_that_of_ipv4(listen: Listen) -> None:
    """It would take clients whom the configuration does not mean."""
    listening = listen(("::", 0), socket.AF_INET6)
    config = msgspec.structs.replace(CONFIG, listen=Address("0.0.0.0", listening.getsockname()[1]))
    with pytest.raises(StartError, match=r"is bound to \[::\]:\d+, and listen is 0\.0\.0\.0"):
        handed("listen", listening).check(config)


# What the environment says


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch, listen: Listen) -> Callable[[socket.socket], None]:
    """Make a socket the first that is passed."""

    def passed(one: socket.socket) -> None:
        monkeypatch.setattr(activation, "FIRST", one.detach())

    return passed


def environment(count: str = "1", names: str = "listen", process: int | None = None) -> dict[str, str]:
    process = os.getpid() if process is None else process
    return {"LISTEN_PID": str(process), "LISTEN_FDS": count, "LISTEN_FDNAMES": names, "HOME": "/"}


def test_programs_that_the_server_starts_do_not_hear_of_its_sockets(
    listen: Listen, first: Callable[[socket.socket], None]
) -> None:
    listening = listen()
    config, told = at(listening), environment()
    first(listening)
    passed = passed_sockets(told)
    passed.check(config)
    assert told == {"HOME": "/"}
    passed.close()


@pytest.mark.parametrize("told", [{}, {"LISTEN_FDS": "1"}, environment(process=1), environment(count="")])
def test_without_sockets_all_are_bound(told: dict[str, str]) -> None:
    if told.get("LISTEN_FDS") == "":
        with pytest.raises(StartError, match="LISTEN_FDS is '' and not a number"):
            passed_sockets(told)
        return
    [bound] = passed_sockets(told).bind(Address("127.0.0.1", 0), "listen")
    bound.close()


@pytest.mark.parametrize("names", ["", "listen", "listen:admin:more"])
def test_each_socket_has_a_name(names: str) -> None:
    with pytest.raises(StartError, match=r"^2 sockets of systemd have \d names: set FileDescriptorName="):
        passed_sockets(environment("2", names))


@pytest.mark.parametrize(
    "family, kind, error",
    [
        (socket.AF_UNIX, socket.SOCK_STREAM, "'listen' .* is of AF_UNIX and SOCK_STREAM: set ListenStream="),
        (socket.AF_INET, socket.SOCK_DGRAM, "is of AF_INET and SOCK_DGRAM: set ListenStream="),
        (socket.AF_INET, socket.SOCK_STREAM, "is a connection: set Accept=no"),
    ],
)
def test_a_socket_that_is_no_listening_one_of_tcp_is_named(
    first: Callable[[socket.socket], None], family: int, kind: int, error: str
) -> None:
    first(socket.socket(family, kind))
    with pytest.raises(StartError, match=error):
        passed_sockets(environment())


def test_a_descriptor_that_is_no_socket_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(activation, "FIRST", file)
    with pytest.raises(StartError, match="is no socket: use ListenStream="):
        passed_sockets(environment())
    os.close(file)
    with pytest.raises(StartError, match="cannot be used: Bad file descriptor"):
        passed_sockets(environment())


# The supervisor


@pytest.mark.clients
@pytest.mark.errors("config.refused")
async def test_a_reload_keeps_the_sockets_and_refuses_another_address(
    site: Site, listen: Listen, events: LogCapture
) -> None:
    listening = listen()
    config = at(listening)
    parent = site.parent(config=config, passed=handed("listen", listening.dup()))
    await parent.start()
    site.next = msgspec.structs.replace(config, log=msgspec.structs.replace(config.log, level="debug"))
    await parent._change()
    assert await site.level(parent) == "debug"
    site.next = msgspec.structs.replace(config, listen=Address("127.0.0.1", 0))
    await parent._change()
    assert events.entries[-1]["event"] == "config.reloaded"  # any port: also this one
    site.next = msgspec.structs.replace(config, listen=Address("127.0.0.2", 0))
    await parent._change()
    assert "change listen, or ListenStream=" in events.entries[-1]["error"]
    assert await site.level(parent) == "info"
    await parent.stop()
    with socket.create_connection(listening.getsockname()[:2]) as waiting:  # for the next server
        waiting.settimeout(1)
        again = site.parent(config=config, passed=handed("listen", listening.dup()))
        await again.start()
        assert waiting.recv(100) == b"info"
        await again.stop()


# The whole server


def launcher(**sockets: socket.socket) -> tuple[list[str], list[int]]:
    """A command that hands these over, and their descriptors."""
    files = [each.fileno() for each in sockets.values()]
    words = [":".join(sockets), str(len(files)), *map(str, files)]
    return [sys.executable, "-c", HAND_OVER, *words], files


class Load:
    """Clients that pull one after the other, each time by a new connection."""

    def __init__(self, url: str, path: str, clients: int, trusted: ssl.SSLContext | bool) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self._ending = asyncio.Event()
        self._more = asyncio.Condition()
        self._tasks = [asyncio.create_task(self._run(url + path, trusted)) for _ in range(clients)]

    async def _run(self, url: str, trusted: ssl.SSLContext | bool) -> None:
        connector = aiohttp.TCPConnector(force_close=True, ssl=trusted)
        async with aiohttp.ClientSession(connector=connector) as session:
            while not self._ending.is_set():
                async with session.get(url) as response:
                    self.answers.append((response.status, await response.read()))
                async with self._more:
                    self._more.notify_all()

    async def rise(self, count: int) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + count
        async with self._more:
            rising = asyncio.ensure_future(self._more.wait_for(lambda: len(self.answers) >= wanted))
            await asyncio.wait((rising, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
            rising.result()

    async def end(self) -> None:
        self._ending.set()
        await asyncio.gather(*self._tasks)  # raises what a client met


@pytest.mark.clients
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_no_request_fails_while_the_server_is_replaced(
    place: Place, upstream: Upstream, listen: Listen, identity: dict[str, str], scheme: str
) -> None:
    content = b"layer" * 20_000
    path = f"/v2/docker.io/library/app/blobs/{upstream.blob('library/app', content)}"
    clients, admin = listen(), listen()
    place.tree |= {
        "listen": "{}:{}".format(*clients.getsockname()),
        "admin": "{}:{}".format(*admin.getsockname()),
        **({"tls": identity} if scheme == "https" else {}),
    }

    async def start() -> Server:
        command, files = launcher(**{scheme: clients, "admin": admin})
        return await place.start(command, files)

    old = await start()
    assert old.url == "{}://{}:{}".format(scheme, *clients.getsockname())
    load = Load(old.url, path, clients=8, trusted=False)
    await load.rise(50)
    for _ in range(2):
        await old.stop()
        gap = Load(old.url, path, clients=1, trusted=False)  # when no server runs
        old = await start()
        await gap.rise(1)
        await load.rise(50)
        await gap.end()
    await load.end()
    assert {(status, len(body)) for status, body in load.answers} == {(200, len(content))}
    await old.stop()


@pytest.mark.clients
async def test_systemds_own_launcher_is_understood(place: Place, upstream: Upstream) -> None:
    require("systemd-socket-activate", root=False)
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*trial.getsockname())
    place.tree["listen"] = address
    command = ("systemd-socket-activate", f"--listen={address}", "--fdname=http")
    starting = asyncio.create_task(place.start(command))
    async with aiohttp.ClientSession() as session:
        while not starting.done():  # it starts the server at the first connection
            with suppress(aiohttp.ClientConnectorError):
                async with session.get(f"http://{address}/v2/") as response:
                    assert response.status == 200
            await asyncio.sleep(0)
    server = await starting
    assert server.url == f"http://{address}"
    assert server.noise[-1].startswith("Execing "), server.noise  # all is the launcher's
    server.noise.clear()
    await server.stop()


@pytest.mark.clients
async def test_a_wrong_name_ends_the_start(place: Place, listen: Listen) -> None:
    command, files = launcher(**{"entrepot.socket": listen()})
    with pytest.raises(AssertionError, match="is for no listener: set FileDescriptorName="):
        await place.start(command, files)
    [server] = place.servers
    server.noise.clear()
