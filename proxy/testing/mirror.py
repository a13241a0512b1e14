"""A pull-through cache for tests, before an upstream that is recorded, replayed, and fails as a test asks.

client ── cache ── UpstreamStandIn ── Recording ── UpstreamRegistry ── upstream
                    fails              keeps        logs in, retries
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from proxy.config.wellknown import WELL_KNOWN
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.request_log import RequestLog
from proxy.testing.failures import FailurePlan, UpstreamFailure
from proxy.testing.recording import CHUNK, Recording, RecordingInvalid, RecordMode
from proxy.testing.serving import ServedNamespace, listen
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials
from proxy.upstream.requests import UpstreamSettings
from proxy.web.responses import error_response
from proxy.web.server import DistributionAPI

__all__ = ["LocalMirror", "UpstreamStandIn"]

NAMESPACE = "upstream"  # unless the upstream is a built-in one


class UpstreamStandIn:
    """Answers as an upstream, from its recording, and fails as planned.

    pause: waits for a number of seconds
    """

    def __init__(
        self,
        recording: Recording,
        session: aiohttp.ClientSession,
        source: str,
        plan: FailurePlan,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.requests: list[str] = []
        self.lacking: list[str] = []
        self._recording, self._session, self._source = recording, session, source
        self._plan, self._pause = plan, pause

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path_qs
        self.requests.append(f"{request.method} {path}")
        failure = self._plan.next(path)
        if failure.status is not None:
            after = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
            code = "TOOMANYREQUESTS" if failure.status == 429 else "UNKNOWN"
            return error_response(code, "the test asked for this failure", failure.status, after)
        try:
            answer = await self._recording.answer(
                self._session, self._source, request.method, path, request.headers.get("Accept", "*/*")
            )
        except RecordingInvalid as error:
            self.lacking.append(str(error))
            return error_response("UNAVAILABLE", str(error), 504)
        except aiohttp.ClientError as error:
            return error_response("UNAVAILABLE", f"the upstream failed: {error}", 502)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        if request.method == "HEAD" or not answer.body:
            await response.prepare(request)
            return response
        return await self._send(request, response, self._recording.body(answer), failure)

    async def _send(
        self, request: web.BaseRequest, response: web.StreamResponse, path: Path, failure: UpstreamFailure
    ) -> web.StreamResponse:
        size = path.stat().st_size
        start, stop = _range(request, size) if response.status == 200 else (0, size)
        if (start, stop) != (0, size):
            response.set_status(206)
            response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        response.headers["Content-Length"] = str(stop - start)
        await response.prepare(request)
        piece = int(max(1, min(CHUNK, failure.rate)))
        end = int(min(stop, start + failure.cut))
        with path.open("rb") as file:
            file.seek(start)
            for at in range(start, end, piece):
                chunk = file.read(min(piece, end - at))
                if failure.rate < math.inf:
                    await self._pause(len(chunk) / failure.rate)
                await response.write(chunk)
        if end < stop and request.transport is not None:
            request.transport.close()  # after what was written
        return response


def _range(request: web.BaseRequest, size: int) -> tuple[int, int]:
    """The bytes that a request asks for; all if it asks for none of them.  RFC 9110, section 14.2."""
    try:
        start, stop, _ = request.http_range.indices(size)
    except ValueError:
        return 0, size
    return (start, stop) if start < stop else (0, size)


class LocalMirror(ServedNamespace):
    """A pull-through cache of `upstream`: a URL, or the name of a registry that is built in, as docker.io.

    recording: a directory for what the upstream answers
    keys: further keys of the namespace in the configuration, as `fresh_for="0s"`
    """

    def __init__(
        self, directory: Path, upstream: str, recording: Path, mode: RecordMode = "once", **keys: Any
    ) -> None:
        super().__init__(directory)
        self._upstream = WELL_KNOWN.get(upstream, upstream)
        if "://" not in self._upstream:
            self._upstream = f"https://{upstream}"
        self._of = upstream if upstream in WELL_KNOWN else NAMESPACE
        self._recording = Recording(recording, self._upstream, mode)
        self._keys = keys
        self._plan = FailurePlan()

    @property
    def replays(self) -> bool:
        """Whether the upstream is not asked: all answers are from a recording."""
        return self._recording.replays

    @property
    def upstream_requests(self) -> list[str]:
        """What the cache has asked its upstream, each as `GET /v2/…`, also what failed."""
        return self._stand_in.requests

    @property
    def lacking(self) -> list[str]:
        """Messages about requests whose answers are not in the recording."""
        return self._stand_in.lacking

    def fail(
        self,
        status: int,
        *,
        retry_after: int | None = None,
        after: int = 0,
        times: float = math.inf,
        seconds: float = math.inf,
        path: str = "",
    ) -> None:
        """From now on the upstream answers `status`, to what UpstreamFailure says."""
        self._plan.add(
            UpstreamFailure(
                status=status, retry_after=retry_after, after=after, times=times, seconds=seconds, path=path
            )
        )

    def cut(self, size: int, *, after: int = 0, times: float = math.inf, path: str = "/blobs/") -> None:
        """From now on the upstream breaks the connection after `size` bytes of a body."""
        self._plan.add(UpstreamFailure(cut=size, after=after, times=times, path=path))

    def slow(self, rate: float, *, path: str = "/blobs/") -> None:
        """From now on the upstream sends `rate` bytes per second of each body.  Raises ValueError for 0."""
        if rate <= 0:
            raise ValueError(f"rate is {rate}: give bytes per second, more than 0")
        self._plan.add(UpstreamFailure(rate=rate, path=path))

    def heal(self) -> None:
        """From now on the upstream does not fail."""
        self._plan.clear()

    async def _start(self) -> None:
        self._closing.callback(self._recording.close)
        source = "" if self.replays else await self._ask_upstream(self._closing)
        session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None))
        self._closing.push_async_callback(session.close)
        self._stand_in = UpstreamStandIn(self._recording, session, source, self._plan)
        url = await listen(self._stand_in.handle, self._closing)
        # A blob is recorded before it is sent.
        upstream = {"url": url, "header_timeout": "10m"}
        await self._serve(self._of, {"upstream": upstream, **self._keys})

    async def _ask_upstream(self, closing: AsyncExitStack) -> str:
        """The URL of what asks the upstream, and logs in there."""
        connect = Connect(plain_http=self._upstream.startswith("http://"))
        metrics = Metrics()
        settings = UpstreamSettings(self._upstream, connect)
        registry = UpstreamRegistry(self._of, settings, [Credentials()], metrics)
        closing.push_async_callback(registry.close)
        # What an upstream denies is not unknown, and must not be recorded as that.
        api = DistributionAPI(
            registry, _same_name, metrics, deny_bypass=True, request_log=RequestLog(off=True)
        )
        return await listen(api.handle, closing)


def _same_name(name: str, *, ns: str | None, host: str | None, prefix: str) -> str:
    return name
