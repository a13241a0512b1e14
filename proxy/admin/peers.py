"""The processes of one server, each of which serves a unix socket that only its user may connect to.

    GET /state      ProcessReport
    POST /forget    {"repository": "<namespace>/<repository>"}
    GET /drill      DrillState
    POST /drill     DrillOrder
    DELETE /drill

ServerProcesses asks all of them.  A process that does not answer in time counts as absent.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec
import structlog
from aiohttp import web

from proxy.admin.processes import FillState, ForgetRequest, ProcessReport, ProcessState
from proxy.cache.drill import DrillOrder, DrillState

T = TypeVar("T")
log = structlog.get_logger()

PATIENCE = 2.0  # seconds that another process may take to answer
CLOSING = 1.0  # seconds that answers under way may take when the socket is closed


async def serve_state(live: ProcessState, path: Path) -> Callable[[], Awaitable[None]]:
    """Answer those who ask; what it returns ends it.

    Raises OSError, also where the path is too long for a socket: about 100 bytes.
    """

    async def state(request: web.Request) -> web.Response:
        return _in_json(live.state())

    async def forget(request: web.Request) -> web.Response:
        await live.forget((await decoded_body(request, ForgetRequest)).repository)
        return web.Response(status=204)

    async def drill(request: web.Request) -> web.Response:
        if request.method == "GET":
            return _in_json(live.drill.state())
        if request.method == "POST":
            live.drill.begin(await decoded_body(request, DrillOrder))
        else:
            live.drill.end()
        return web.Response(status=204)

    application = web.Application()
    application.router.add_get("/state", state)
    application.router.add_post("/forget", forget)
    for method in ("GET", "POST", "DELETE"):
        application.router.add_route(method, "/drill", drill)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=CLOSING)
    listening = _listening(path)
    inode = path.stat().st_ino
    await runner.setup()
    await web.SockSite(runner, listening).start()

    async def close() -> None:
        await runner.cleanup()
        listening.close()
        with suppress(FileNotFoundError):
            if path.stat().st_ino == inode:  # else it is another's by now
                path.unlink()

    return close


def _in_json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def decoded_body(request: web.Request, form: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=form)
    except msgspec.DecodeError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


def _listening(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of a process that was killed, and had our id
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(0o600)  # before it listens: until then nobody can connect
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


class ServerProcesses:
    """All processes of a server: this one if it has a Live, and those with a socket in `directory`."""

    def __init__(self, live: ProcessState | None, directory: Path | None) -> None:
        self._live = live
        self._directory = directory

    async def states(self) -> list[ProcessReport]:
        found = [self._live.state()] if self._live else []
        pids = {each.pid for each in found}
        for answer in await self._ask("GET", "/state"):
            with suppress(msgspec.DecodeError):  # what does not speak as we do is none of ours
                state = msgspec.json.decode(answer, type=ProcessReport)
                if state.pid not in pids:  # our own socket may be among them
                    found.append(state)
        return found

    async def fills(self) -> list[FillState]:
        """One for each digest, the oldest first: as who transfers it sees it, with the followers of all."""
        found: dict[str, list[FillState]] = {}
        for state in await self.states():
            for fill in state.fills:
                found.setdefault(fill.digest, []).append(fill)
        return sorted(map(_merged, found.values()), key=lambda each: (each.started, each.digest))

    async def forget(self, repository: str) -> None:
        """See Live.forget()."""
        if self._live:
            await self._live.forget(repository)
        await self._ask("POST", "/forget", msgspec.json.encode(ForgetRequest(repository)))

    async def begin_drill(self, order: DrillOrder) -> None:
        if self._live:
            self._live.drill.begin(order)
        await self._ask("POST", "/drill", msgspec.json.encode(order))

    async def end_drill(self) -> None:
        if self._live:
            self._live.drill.end()
        await self._ask("DELETE", "/drill")

    async def drills(self) -> list[DrillState]:
        """What each knows of the last one, with no process twice."""
        found = {self._live.pid: self._live.drill.state()} if self._live else {}
        for path, answer in await self._ask_each("GET", "/drill"):
            with suppress(msgspec.DecodeError, ValueError):
                found.setdefault(int(path.stem), msgspec.json.decode(answer, type=DrillState))
        return list(found.values())

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> list[bytes]:
        """The answers of those that gave one."""
        return [answer for _, answer in await self._ask_each(method, path, body)]

    async def _ask_each(self, method: str, path: str, body: bytes | None = None) -> list[tuple[Path, bytes]]:
        """The answers of those that gave one."""
        sockets = sorted(self._directory.glob("*.sock")) if self._directory else []
        answers = await asyncio.gather(*(_answer(each, method, path, body) for each in sockets))
        return [(path, each) for path, each in zip(sockets, answers, strict=True) if each is not None]


async def _answer(path: Path, method: str, target: str, body: bytes | None) -> bytes | None:
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(path)),
                timeout=aiohttp.ClientTimeout(total=PATIENCE),
                raise_for_status=True,
            ) as session,
            session.request(method, f"http://live{target}", data=body) as response,
        ):
            return await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        log.debug("live.unanswered", path=str(path), error=str(error) or type(error).__name__)
        return None


def _merged(fills: list[FillState]) -> FillState:
    # One that waits for its turn may take itself for the one that is to transfer it.
    best = max(fills, key=lambda each: (each.own, each.bytes))
    return msgspec.structs.replace(
        best, followers=sum(each.followers for each in fills), size=max(each.size for each in fills)
    )
