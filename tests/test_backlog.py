"""Bodies that wait for slow clients, and who is cut off for them."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from proxy.web.backlog import PATIENT, Backlog, ClientProgress, corked, taken, waiting
from tests.conftest import Clock


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    found = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for _ in range(3):
            client = socket.create_connection(listening.getsockname())
            found.append((listening.accept()[0], client))
    yield found
    for server, client in found:
        server.close()
        client.close()


Pairs = list[tuple[socket.socket, socket.socket]]


def stuff(server: socket.socket) -> None:
    """Send until nothing more is accepted."""
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            server.send(bytes(1 << 20))


def test_for_lack_of_room_the_slowest_is_cut_off(pairs: Pairs, clock: Clock) -> None:
    backlog, cut = Backlog(100, lambda: clock.now), []
    (idle, _), (busy, reader), (third, _) = pairs
    assert backlog.add(b"x" * 50, busy, lambda: cut.append("busy"))
    held = backlog.add(b"x" * 40, idle, lambda: cut.append("idle"))
    assert held is not None
    busy.sendall(b"x" * 1000)
    reader.recv(1000, socket.MSG_WAITALL)
    assert backlog.add(b"x" * 20, third, lambda: cut.append("third")) is None
    assert (cut, backlog.size) == ([], 90)
    clock.advance(PATIENT)
    assert backlog.add(b"x" * 20, third, lambda: cut.append("third"))
    assert (cut, backlog.size, held.content) == (["idle"], 70, b"")
    backlog.remove(held)
    assert backlog.size == 70


def test_a_body_above_the_limit_has_room_alone(pairs: Pairs, clock: Clock) -> None:
    backlog = Backlog(100, lambda: clock.now)
    (server, _), (other, _), _ = pairs
    body = backlog.add(b"x" * 200, server, lambda: None)
    assert body is not None
    assert backlog.add(b"x", other, lambda: None) is None
    backlog.remove(body)
    assert backlog.add(b"x", other, lambda: None)


def test_a_client_is_idle_while_bytes_wait_that_it_does_not_take(pairs: Pairs) -> None:
    (server, client), *_ = pairs
    progress = ClientProgress()
    assert progress.idle(server, 10.0) == 0
    assert progress.idle(server, 500.0) == 0  # nothing waits for it
    stuff(server)
    assert waiting(server) > 0
    while True:  # until the kernels have come to rest
        before = taken(server)
        if progress.idle(server, 520.0) == progress.idle(server, 520.0) and taken(server) == before:
            break
    assert progress.idle(server, 620.0) >= 100
    client.recv(8 << 20)
    while taken(server) == before:
        client.recv(8 << 20)
    assert progress.idle(server, 630.0) == 0
    server.close()
    assert progress.idle(server, 999.0) == 0
    assert progress.idle(None, 999.0) == 0


def test_a_connection_is_corked_for_a_while(pairs: Pairs) -> None:
    def is_corked() -> int:
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK)

    connection, _ = pairs[0]
    with pytest.raises(EOFError), corked(connection):
        assert is_corked()
        raise EOFError
    assert not is_corked()
    with corked(connection):
        connection.close()
